"""Policy and reference sharded over two ranks with ZeRO-3, two ranks of the critic, two rollout engines: a PPO run,
weight sync, and failures.

The actors start once and serve all tests in the order of this file; the last ones leave them unfit for more.
"""

import json
import os
import re
import signal
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

from policy_surgery import change_weights, whole_weights
from rlhf_ray.actors.columns import assemble
from rlhf_ray.actors.group import ActorGroup
from rlhf_ray.actors.policy import PolicyWorker
from rlhf_ray.actors.reward import TextRewardGroup
from rlhf_ray.actors.rollout import RolloutGroup
from rlhf_ray.actors.waiting import ActorDied, TaskFailed, wait_all
from rlhf_ray.config.jobs import PPOJob
from rlhf_ray.config.number_formats import NumberFormats
from rlhf_ray.config.rewards import FunctionReward
from rlhf_ray.config.run import Limit, Timeouts
from rlhf_ray.controllers.inputs import PPOInputs
from rlhf_ray.controllers.job import check
from rlhf_ray.controllers.ppo import PPOController
from rlhf_ray.controllers.ppo_report import TrainingDiverged
from rlhf_ray.controllers.ppo_roles import PPORoles, start_ppo_roles
from rlhf_ray.controllers.roles import Actors
from rlhf_ray.controllers.run_folder import Checkpointing, RunFolder
from rlhf_ray.data.cursor import PromptCursor
from rlhf_ray.data.requests import PromptRequest, requests_for
from rlhf_ray.rewards.errors import RewardError
from rlhf_ray.telemetry.metrics import read_metrics
from rlhf_ray.telemetry.samples import read_samples
from runs import MakeConfig, assert_nothing_is_left, engine_processes
from sampling import as_shard, generated, greedy

ENGINES = 2

TOLD_WITHIN_S = 10.0
LIMIT = Limit(60.0, "no setting: a test")

# Together they are all weights of the model.
PARTS = ("embed_tokens", "self_attn", "mlp", "layernorm", "model.norm")


@pytest.fixture(scope="module")
def counted_prompts(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prompts of the tiny example with a column `words`."""
    path = tmp_path_factory.mktemp("counted") / "tiny.jsonl"
    rows = map(json.loads, (tiny / "data/tiny_prompts.jsonl").read_text().splitlines())
    path.write_text("".join(json.dumps(row | {"words": len(row["prompt"].split())}) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def make_config(ppo_config: MakeConfig, wide_model: Path, counted_prompts: Path) -> MakeConfig:
    def make(run_dir: Path, *overrides: str) -> PPOJob:
        return ppo_config(
            run_dir,
            f"policy.model={wide_model}",
            "policy.engine.zero_stage=3",
            "policy.engine.micro_batch_tokens=64",
            "reference.engine.zero_stage=3",
            "placement.policy.ranks=2",
            f"critic.init_from={wide_model}",
            "placement.critic.ranks=2",
            f"data.prompts={counted_prompts}",
            "reward=[{function: reward_functions:letters_of_counted, name: letters}]",
            "rollout.sync_bucket_mib=1",
            f"placement.rollout.engines={ENGINES}",
            "rollout.engine.max_num_seqs=8",
            "placement.rollout.cpus=0.5",
            "run.steps=2",
            "run.timeouts.sync_s=60",
            "run.tensorboard=false",
            *overrides,
        )

    return make


@pytest.fixture(scope="module")
def config(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> PPOJob:
    return make_config(tmp_path_factory.mktemp("ranks") / "run")


@pytest.fixture(scope="module")
def inputs(config: PPOJob) -> PPOInputs:
    inputs = check(config)
    assert isinstance(inputs, PPOInputs)
    return inputs


@pytest.fixture(scope="module")
def roles(config: PPOJob, inputs: PPOInputs) -> Iterator[PPORoles]:
    class Over(Exception):
        """Ends the actors as a failure does: after the last tests some would not answer."""

    with suppress(Over), Actors.of_job(config) as actors:
        started = start_ppo_roles(config, inputs, actors)
        assert len(engine_processes()) >= ENGINES
        yield started
        raise Over
    assert_nothing_is_left()


def controller(config: PPOJob, inputs: PPOInputs, roles: PPORoles) -> PPOController:
    folder = RunFolder(config, config.run.steps, NumberFormats(config, ()))
    folder.start_progress()
    assert roles.critic is not None
    trained = {"policy": roles.policy, "critic": roles.critic}
    return PPOController(config, inputs, roles, folder, Checkpointing(folder, trained, Timeouts(checkpoint_s=60.0)))


def use_reward(roles: PPORoles, config: PPOJob, function: str) -> None:
    part = FunctionReward(name="letters", function=f"reward_functions:{function}")
    group = roles.rewards[0].group
    assert isinstance(group, TextRewardGroup)
    group.load_model(part, config.policy.model, False, ()).wait(LIMIT)


def test_a_ppo_run_on_two_ranks_and_two_engines(config: PPOJob, inputs: PPOInputs, roles: PPORoles) -> None:
    running = controller(config, inputs, roles)
    with running.folder:
        running.train()
    rows = read_metrics(running.folder.path)
    assert [row["step"] for row in rows] == [1, 2]
    assert abs(rows[0]["policy/approx_kl"]) < 1e-6
    assert abs(rows[0]["kl/mean"]) < 1e-5
    assert rows[1]["kl/mean"] > 0.01
    for row in rows:
        assert row["mismatch/logprob_abs_mean"] <= 1e-4
        assert row["staleness/mean"] == 0
    samples = [sample for _, sample in read_samples(running.folder.path)]
    assert samples
    assert all(sample.columns == {"words": len(sample.prompt.split())} for sample in samples)
    export = AutoModelForCausalLM.from_pretrained(running.folder.path / "export", dtype=torch.float32)
    trained = whole(roles)
    for name, parameter in export.named_parameters():
        assert torch.equal(parameter, trained[name]), name


def whole(roles: PPORoles) -> dict[str, torch.Tensor]:
    """The trainer's weights, gathered from both ranks."""
    gathered = [actor.__ray_call__.remote(whole_weights) for actor in roles.policy.actors]
    return dict(wait_all(gathered, 60, "weights", "")[0])


def test_after_a_sync_every_engine_samples_from_the_trainers_weights(
    config: PPOJob, inputs: PPOInputs, roles: PPORoles
) -> None:
    requests = requests_for(inputs.prompts, PromptCursor(len(inputs.prompts), 0, True).take(6), 1, run_seed=0)
    model = config.policy.model
    responses = [greedy(whole(roles), model, requests)]
    changed = 0
    for version, part in enumerate(PARTS, start=10):
        counts = [actor.__ray_call__.remote(change_weights, part, version) for actor in roles.policy.actors]
        changed += wait_all(counts, 60, "change", "")[0]
        roles.policy.send_weights(version).wait(LIMIT)
        weights = whole(roles)
        responses.append(greedy(weights, model, requests))
        assert responses[-1] != responses[-2], f"{part}: the change must show, else the test proves nothing"
        for engine in range(ENGINES):
            batch = generated(roles, engine, requests, version)
            found = [batch.response(sample).tolist() for sample in range(len(batch))]
            assert found == responses[-1], f"engine {engine} after {part}"
            assert set(batch.weight_versions.tolist()) == {version}
            trainers = assemble(roles.policy.call(PolicyWorker.logprobs, ray.put(batch)).wait(LIMIT), batch).numpy()
            gaps = np.abs(batch.engine_logprobs - trainers)
            assert gaps.mean() <= 1e-5, f"engine {engine} after {part}"
            assert gaps.max() <= 1e-4, f"engine {engine} after {part}"
    assert changed == len(weights), "every weight was changed"
    assert roles.rollout.versions().wait(LIMIT) == [version] * ENGINES


def test_one_rank_alone_finds_the_values_that_both_find_together(inputs: PPOInputs, roles: PPORoles) -> None:
    batch = generated(roles, 0, requests_of(inputs, 6), version=0)
    assert roles.critic is not None
    together = roles.critic.values(as_shard(batch, number=1, shards=2))
    alone = roles.critic.values(as_shard(batch, number=1, shards=100))
    assert (len(together.refs), len(alone.refs)) == (2, 1)
    found, wanted = (assemble(calls.wait(LIMIT), batch).numpy() for calls in (alone, together))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("raises", "raised KeyError: 'no such lexicon entry'"),
        ("gives_nan", "gave nan as a score"),
        ("gives_too_few", "gave 7 scores for 8 samples"),
    ],
)
def test_a_bad_reward_ends_the_step_and_names_the_samples(
    make_config: MakeConfig, tmp_path: Path, inputs: PPOInputs, roles: PPORoles, function: str, message: str
) -> None:
    config = make_config(tmp_path / "run")
    use_reward(roles, config, function)
    running = controller(config, inputs, roles)
    began = time.monotonic()
    with running.folder, pytest.raises(RewardError, match=message) as caught:
        running.train_step(1)
    assert time.monotonic() - began < 30
    assert caught.value.part == "letters"
    assert {uid.rpartition("@")[0] for uid in caught.value.samples} <= set(inputs.prompts.uids)
    assert len(caught.value.samples) == (1 if function == "gives_nan" else 8)
    assert read_metrics(running.folder.path) == []


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_what_caused_it(
    make_config: MakeConfig, tmp_path: Path, inputs: PPOInputs, roles: PPORoles
) -> None:
    config = make_config(tmp_path / "run", "run.checkpoint_every=1", "run.steps=3")
    use_reward(roles, config, "letters")
    running = controller(config, inputs, roles)
    with running.folder:
        running.train_step(1)
        use_reward(roles, config, "gives_too_much")
        with pytest.raises(
            TrainingDiverged, match=r"step 2: critic: loss is inf, caused by samples tiny-\d+@0#0"
        ) as caught:
            running.train_step(2)
    assert caught.value.step == 2
    assert caught.value.samples_file == running.folder.path / "failed_step_000002.jsonl"
    rows = [json.loads(line) for line in caught.value.samples_file.read_text().splitlines()]
    assert rows
    for row in rows:
        assert row["uid"].rpartition("@")[0] in inputs.prompts.uids
        assert row["rewards"] == {"letters": pytest.approx(1e30)}
        assert len(row["response_tokens"]) == len(row["engine_logprobs"]) > 0
    checkpoint = running.folder.checkpoints.latest()
    assert checkpoint is not None
    assert checkpoint.step == 1
    running.checkpointing.load(checkpoint)


def test_a_refused_prompt_is_an_error_also_while_generation_is_held(
    config: PPOJob, inputs: PPOInputs, roles: PPORoles
) -> None:
    good = requests_of(inputs, 3)
    overlong = replace(good[1], tokens=np.full(config.rollout.engine.max_model_len + 1, 5, np.int32))
    timeouts = Timeouts(rollout_s=20.0)
    held = RolloutGroup(roles.rollout.actors, config.rollout, deterministic=True, timeouts=timeouts)

    def go_on() -> None:
        held.release([0] * ENGINES).wait(timeouts.rollout)

    go_on()  # what was queued before does not count
    with pytest.raises(TaskFailed, match=r"rollout/1: generate failed: .*maximum context length is 64 tokens"):
        list(held.generate([[good[0]], [overlong], [good[2]]], version=0))
    go_on()
    assert len(list(held.generate([[request] for request in good], version=0))) == 3


def test_engines_have_their_sockets_in_folders_of_their_own(roles: PPORoles) -> None:
    """Those that vLLM names lie in no folder that others use."""
    root = Path(tempfile.gettempdir()) / f"rlhf-ray-{os.getuid()}"
    processes = [psutil.Process(pid) for pid in [*engine_processes(), *(pid_of(roles.rollout, n) for n in range(2))]]
    bound = {Path(socket.laddr) for process in processes for socket in process.net_connections("unix") if socket.laddr}
    vllms = {path for path in bound if re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", path.name)}
    assert len({path.parent for path in vllms}) == ENGINES
    assert {path.parent.parent for path in vllms} == {root}


def test_an_engine_whose_actor_dies_ends_the_run(
    make_config: MakeConfig, tmp_path: Path, inputs: PPOInputs, roles: PPORoles
) -> None:
    config = make_config(tmp_path / "run")
    use_reward(roles, config, "letters")
    running = controller(config, inputs, roles)
    shards = roles.rollout.generate(more_than_fit(config, inputs), version=0)
    next(shards)
    ray.kill(roles.rollout.actors[1])
    with pytest.raises(ActorDied, match="^rollout/1 died while this was waited for: rollout"):
        list(shards)
    with running.folder, pytest.raises(ActorDied, match="^rollout/1 died while this was waited for: rollout"):
        running.train_step(1)


def test_an_engine_whose_own_process_dies_is_told_also_while_generation_is_held(
    config: PPOJob, inputs: PPOInputs, roles: PPORoles
) -> None:
    """vLLM never answers what its engine was asked before it died: here, to hold."""
    timeouts = Timeouts(rollout_s=60.0)
    left = RolloutGroup(roles.rollout.actors[:1], config.rollout, deterministic=True, timeouts=timeouts)
    [process] = engine_processes()
    os.kill(process, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as thread:
        held = thread.submit(list, left.generate(more_than_fit(config, inputs), version=0))
        time.sleep(1.0)
        assert not held.done()
        os.kill(process, signal.SIGKILL)
        with pytest.raises(ActorDied, match=rf"^rollout/0 died .*process {process} was killed by signal SIGKILL"):
            held.result(timeout=TOLD_WITHIN_S)
    with pytest.raises(TaskFailed, match=r"rollout.* failed.*EngineDeadError"):
        list(left.generate([requests_of(inputs, 1)], version=0))


@pytest.mark.parametrize("dies", ["reward-letters/0", "critic/1", "policy/1"])
def test_a_death_is_told_while_others_are_waited_for(roles: PPORoles, dies: str) -> None:
    """The first rank of the policy is stopped, and so the wait goes on until somebody else's death is told."""
    role, _, rank = dies.partition("/")
    groups = {"policy": roles.policy, "critic": roles.critic, "reward-letters": roles.rewards[0].group}
    victim, waited_for = (pid_of(groups[name], number) for name, number in ((role, int(rank)), ("policy", 0)))
    os.kill(waited_for, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(1) as thread:
            waiting = thread.submit(roles.policy.call(PolicyWorker.address).wait, LIMIT)
            time.sleep(1.0)
            assert not waiting.done()
            os.kill(victim, signal.SIGKILL)
            with pytest.raises(ActorDied, match=f"^{dies} died while this was waited for: policy: address") as caught:
                waiting.result(timeout=TOLD_WITHIN_S)
    finally:
        os.kill(waited_for, signal.SIGCONT)
    assert (caught.value.role, caught.value.rank) == (role, int(rank))


def pid_of(group: ActorGroup, rank: int) -> int:
    [activity] = wait_all([group.actors[rank].activity.remote()], 60, "", "")
    return int(activity.pid)


def more_than_fit(config: PPOJob, inputs: PPOInputs) -> list[list[PromptRequest]]:
    """Shards of which some are not sent before others have come back, however fast the engines are."""
    return [[request] for request in requests_of(inputs, 4 * ENGINES * config.rollout.engine.max_num_seqs)]


def requests_of(inputs: PPOInputs, count: int) -> list[PromptRequest]:
    tickets = PromptCursor(len(inputs.prompts), seed=0, shuffle=False).take(count)
    return requests_for(inputs.prompts, tickets, 1, run_seed=0)
