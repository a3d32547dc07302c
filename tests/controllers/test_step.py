"""A whole step of policy-gradient learning against an oracle, on groups and workers whose engines are scripted."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from step_oracle import Expected, critic_token, expected_step, policy_token, token_weight

from rlhf_ray.actors import policy as policy_module
from rlhf_ray.config.jobs import PPOJob
from rlhf_ray.config.roles import Level
from rlhf_ray.controllers.diverged import TrainingDiverged
from scripted import World, entropy_of, is_action, output, response_of, script, start_ppo

MakeJob = Callable[..., PPOJob]
REWARDS = [
    {"model": "helpful", "name": "helpful", "weight": 1.5, "engine": {"dtype": "float32"}},
    {"model": "harmless", "name": "harmless", "weight": -0.5, "engine": {"dtype": "float32"}},
]
GAE: dict[str, Any] = {
    "kl": {"coef": 0.3, "estimator": "k3"},
    "gamma": 0.9,
    "gae_lambda": 0.7,
    "clip": 0.1,
    "clip_high": 0.15,
    "dual_clip": 1.2,
    "value_clip": 0.1,
    "entropy_coef": 0.05,
    "epochs": 2,
    "optimizer_steps": 2,
    "truncation_penalty": 0.7,
    "score_clip": 0.9,
}


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return script(monkeypatch)


@pytest.fixture
def make_job(tmp_path: Path) -> MakeJob:
    def make(algorithm: dict[str, Any], *, run: dict[str, Any] | None = None, **sections: Any) -> PPOJob:
        with_critic = algorithm.get("advantage", "gae") == "gae"
        engine = {"zero_stage": 2, "dtype": "float32", "micro_batch_tokens": 24}
        job: dict[str, Any] = {
            "job": "ppo",
            "name": "scripted",
            "seed": 3,
            "policy": {"model": "policy-model", "engine": engine},
            "reward": REWARDS,
            "reference": {"engine": {"dtype": "float32"}},
            "rollout": {"sampling": {"temperature": 0.8}, "engine": {"dtype": "float32"}, "shard_samples": 3},
            "algorithm": algorithm,
            "data": {"prompts": "prompts.jsonl", "prompts_per_step": 4, "samples_per_prompt": 2},
            "placement": {"policy": {"ranks": 2}},
            "run": {"dir": str(tmp_path / "run"), "steps": 3, "export": False} | (run or {}),
        }
        if with_critic:
            job["critic"] = {"init_from": "reward", "engine": engine}
            job["placement"]["critic"] = {"ranks": 2}
        return PPOJob.model_validate(job | sections)

    return make


def check_role(job: PPOJob, world: World, role: str, step: Expected, first: int) -> tuple[list[float], int]:
    """All gradients of a role's update are the oracle's, and each sample is trained on once an epoch; the loss of each
    optimizer step, and how many tokens were clipped in all."""
    algorithm, losses, clips = job.algorithm, [], 0
    learn = policy_token if role == "policy" else critic_token
    per_epoch: list[list[int]] = []
    for made in range(algorithm.epochs * algorithm.optimizer_steps):
        passes = [each for each in world.passes(role) if each.step == first + made]
        every = [token for each in passes for token in each.gradient]
        trained = {token for token in every if token in step.tokens}
        assert len(set(every)) == len(every)
        loss = 0.0
        for each in passes:
            for token, gradient in each.gradient.items():
                if token in step.context:
                    assert gradient == 0
                    continue
                facts = step.tokens[token]
                weight = token_weight(job, facts, step, trained)
                learnt = learn(job, token, facts, first + made)
                assert gradient == pytest.approx(weight * learnt.gradient, rel=2e-4, abs=1e-6)
                if role == "policy":
                    assert each.entropy_gradient[token] == pytest.approx(-weight * algorithm.entropy_coef, rel=1e-4)
                loss += weight * learnt.loss
                clips += learnt.clipped
        for engine in world.engines[role]:
            mine = [each.last for each in engine.passes if each.step == first + made]
            assert mine == [False] * (len(mine) - 1) + [True]
        losses.append(loss)
        if made % algorithm.optimizer_steps == 0:
            per_epoch.append([])
        per_epoch[-1] += every
    for epoch in per_epoch:
        assert sorted(epoch) == sorted([*step.tokens, *step.context])
    return losses, clips


def check_run(job: PPOJob, world: World, beta: float, *, first: int = 1, seen: list[float] | None = None) -> None:
    """All steps of a run are the oracle's: what policy and critic learnt, and what was logged."""
    updates = job.algorithm.epochs * job.algorithm.optimizer_steps
    warmup, seen = job.algorithm.critic_warmup_steps, [] if seen is None else seen
    rollouts = world.requests[1:] if first == 1 else world.requests
    for step, logged in sorted(world.logged.items()):
        policy_steps, critic_steps = max(0, step - 1 - warmup) * updates, (step - 1) * updates
        expected = expected_step(job, rollouts[step - first], beta, seen, policy_steps, critic_steps)
        assert logged["kl/coef"] == pytest.approx(beta)
        assert logged["kl/mean"] == pytest.approx(np.mean(expected.kl), rel=1e-4)
        assert logged["reward/mean"] == pytest.approx(np.mean(expected.raw), rel=1e-5)
        assert logged["mismatch/logprob_abs_mean"] == pytest.approx(expected.mismatch / len(expected.tokens), rel=1e-4)
        assert logged["staleness/mean"] == 0
        if step > warmup:
            losses, clips = check_role(job, world, "policy", expected, policy_steps)
            assert logged["policy/loss"] == pytest.approx(np.mean(losses), rel=1e-3, abs=1e-5)
            share = clips / (len(expected.tokens) * job.algorithm.epochs)
            assert logged["policy/clip_fraction"] == pytest.approx(share)
            entropy = np.mean([entropy_of(token) for token in expected.tokens])
            assert logged["policy/entropy"] == pytest.approx(entropy, rel=1e-5)
            assert logged["policy/optimizer_steps"] == updates
            assert logged["policy/grad_norm"] == world.grad_norm
        else:
            assert "policy/loss" not in logged
        if "critic" in world.engines:
            losses, clips = check_role(job, world, "critic", expected, critic_steps)
            assert logged["critic/loss"] == pytest.approx(np.mean(losses), rel=1e-3)
            assert logged["critic/clip_fraction"] == pytest.approx(
                clips / (len(expected.tokens) * job.algorithm.epochs)
            )
            assert logged["critic/explained_variance"] == pytest.approx(expected.residual_variance, rel=1e-3)
        kl = job.algorithm.kl
        if kl.target is not None:
            error = max(-0.2, min(0.2, float(np.mean(expected.kl)) / kl.target - 1))
            beta *= 1 + error * len(expected.kl) / kl.horizon


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"loss_mean": "sample", "kl": {"coef": 0.3, "estimator": "k1"}, "value_clip": None},
        {"whiten_advantages": False, "dual_clip": None, "clip_high": None, "entropy_coef": 0.0},
        {"normalise_scores": True, "optimizer_steps": 1, "score_clip": None},
        {"kl": {"coef": 0.3, "estimator": "k2", "target": 0.4, "horizon": 50}, "epochs": 1, "optimizer_steps": 4},
        {"kl": {"coef": 0.3, "target": 30.0, "horizon": 40}, "critic_warmup_steps": 1},
    ],
)
def test_policy_and_critic_learn_what_the_oracle_says(world: World, make_job: MakeJob, changed: dict[str, Any]) -> None:
    job = make_job(GAE | changed)
    start_ppo(job, world).train()
    assert sorted(world.logged) == [1, 2, 3]
    check_run(job, world, 0.3)


@pytest.mark.parametrize("advantage", ["grpo", "rloo"])
def test_groups_are_compared_after_the_penalty_and_without_a_critic(
    world: World, make_job: MakeJob, advantage: str
) -> None:
    unread = ("gamma", "gae_lambda", "value_clip")
    algorithm = {key: value for key, value in GAE.items() if key not in unread} | {"advantage": advantage}
    for whitened in (False, True):
        data = {"prompts": "prompts.jsonl", "prompts_per_step": 3, "samples_per_prompt": 3}
        job = make_job(algorithm | {"whiten_advantages": whitened}, data=data)
        start_ppo(job, world).train()
        assert "critic" not in world.engines
        check_run(job, world, 0.3)
        assert all(logged["group/spread_fraction"] == 1 for logged in world.logged.values())
        assert {detail for role, what, detail in world.events if what == "make_training_shard"} == {0, 1}
        world.__init__()  # type: ignore[misc]
        for path in sorted((Path(job.run.dir) / "checkpoints").rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()


def test_the_policy_with_its_adapters_off_is_the_reference_where_it_has_adapters(
    world: World, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    class AdaptersOff:
        def __init__(self, model: Any) -> None:
            self.model = model

        def __enter__(self) -> None:
            self.model.adapters = False

        def __exit__(self, *_: object) -> None:
            self.model.adapters = True

    monkeypatch.setattr(policy_module, "adapters_off", AdaptersOff)
    lora = {"model": "policy-model", "lora": {"rank": 2}, "engine": {"zero_stage": 2, "dtype": "float32"}}
    job = make_job(GAE, policy=lora, reference={}, run={"steps": 1})
    start_ppo(job, world).train()
    assert "reference" not in world.engines
    tokens = [response_of(r.uid, r.sample_index) for shard in world.requests[1] for r in shard]
    kl = [
        sum(output("policy", t) - output("adapters off", t) for at, t in enumerate(each) if is_action(each, at))
        for each in tokens
    ]
    assert world.logged[1]["kl/mean"] == pytest.approx(np.mean(kl), rel=1e-4)


def test_log_probs_are_taken_at_the_temperature_of_sampling(world: World, make_job: MakeJob) -> None:
    start_ppo(make_job(GAE), world).train()
    for role in ("policy", "reference"):
        assert {at for engine in world.engines[role] for at in engine.temperatures} == {0.8}


def test_schedules_know_how_many_optimizer_steps_there_will_be(world: World, make_job: MakeJob) -> None:
    start_ppo(make_job(GAE | {"critic_warmup_steps": 1}), world)
    assert [engine.total_steps for engine in world.engines["policy"]] == [8, 8]
    assert [engine.total_steps for engine in world.engines["critic"]] == [12, 12]


def test_engines_sample_with_the_weights_of_the_last_update_under_its_version(world: World, make_job: MakeJob) -> None:
    """The showcase comes first and last. The version counts updates of the policy: none in the critic's warm-up."""
    start_ppo(make_job(GAE | {"critic_warmup_steps": 1}, run={"steps": 4}), world).train()
    generated = [detail for role, what, detail in world.events if what == "generate"]
    assert generated == [(0, 0, 0), (0, 0, 0), (0, 0, 0), (1, 1, 4), (2, 2, 8), (3, 3, 12)]
    assert [logged["rollout/weight_version"] for logged in world.logged.values()] == [0, 1, 2, 3]
    assert "time/weight_sync_s" not in world.logged[1]
    assert [logged["policy/lr"] for logged in world.logged.values() if "policy/lr" in logged] == pytest.approx(
        [0.4, 0.8, 1.2]
    )


def test_every_prompt_of_an_epoch_comes_once_with_its_own_seed(world: World, make_job: MakeJob) -> None:
    start_ppo(make_job(GAE, run={"steps": 5}), world, prompt_count=10).train()
    drawn = [(r.uid, r.sample_index, r.seed) for step in world.requests[1:-1] for shard in step for r in shard]
    uids = {uid for uid, _, _ in drawn}
    assert uids == {f"p{number}@{epoch}" for number in range(10) for epoch in (0, 1)}
    assert len({seed for _, _, seed in drawn}) == len(drawn) == 40
    assert [len(shard) for shard in world.requests[1]] == [3, 2, 3]


def test_each_step_and_epoch_is_split_in_another_order(world: World, make_job: MakeJob) -> None:
    """Policy and critic split it alike."""
    job = make_job(GAE | {"optimizer_steps": 4})
    start_ppo(job, world).train()
    orders: dict[str, list[tuple[tuple[int, ...], ...]]] = {"policy": [], "critic": []}
    for role, found in orders.items():
        for epoch in range(6):
            samples = [(r.uid, r.sample_index) for shard in world.requests[1 + epoch // 2] for r in shard]
            place = {t: number for number, sample in enumerate(samples) for t in response_of(*sample)}
            parts = []
            for step in range(epoch * 4, epoch * 4 + 4):
                passes = [each for each in world.passes(role) if each.step == step]
                parts.append(tuple(sorted({place[token] for each in passes for token in each.gradient})))
            found.append(tuple(parts))
    assert len(set(orders["policy"])) == 6
    assert orders["policy"] == orders["critic"]


PHASES = ("generate", "score", "logprobs", "values", "make_training_shard", "update", "send_weights", "save", "move")


def test_phases_follow_each_other_with_devices_apart(world: World, make_job: MakeJob) -> None:
    controller = start_ppo(make_job(GAE, run={"steps": 2, "checkpoint_every": 2}), world)
    world.events.clear()
    controller.train()
    assert "move" not in {what for _, what, _ in world.events}
    scoring = ["reward-helpful.score", "reward-harmless.score", "policy.logprobs", "reference.logprobs"]
    scoring += ["critic.values"]
    step = ["rollout.generate", *scoring * 3, "critic.make_training_shard", "critic.update", "policy.update"]
    showcase = ["rollout.generate", "reward-helpful.score", "reward-harmless.score"]
    saved = ["policy.save", "critic.save"]
    sync = ["policy.send_weights"]
    assert world.phases(*PHASES) == [*showcase, *step, *sync, *step, *saved, *sync, *showcase]


def shared(make_job: MakeJob, **run: Any) -> PPOJob:
    """All roles on the devices of the policy."""
    guests = {name: {"colocate": "policy"} for name in ("critic", "reference", "reward", "rollout")}
    placement = {"policy": {"ranks": 1}, "offload_idle": True, **guests}
    return make_job(GAE, placement=placement, run=run)


def test_roles_that_share_devices_come_and_go_with_the_phases(world: World, make_job: MakeJob) -> None:
    """Engines refuse to compute without what they need on the device, and the rollout forgets its weights outside."""
    job = shared(make_job, steps=2, checkpoint_every=1)
    controller = start_ppo(job, world)
    world.events.clear()
    controller.train()
    check_run(job, world, 0.3)
    generated = [detail for role, what, detail in world.events if what == "generate"]
    assert generated == [(0, 0, 0), (0, 0, 0), (1, 1, 4), (2, 2, 8)]
    levels: dict[str, Level] = {}
    for role, what, detail in world.events:
        if what == "move":
            levels[role] = detail
        at = {role for role, level in levels.items() if level > Level.OUT}
        if what in ("update", "save"):
            assert at == {role}
        elif what == "generate":
            assert at == {"rollout"}
        elif what in ("logprobs", "values"):
            assert "rollout" not in at
            assert {"policy", "critic", "reference"} <= at
    assert all(logged["time/checkpoint_s"] >= 0 for logged in world.logged.values())


def test_a_run_that_is_resumed_learns_the_same(
    world: World, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts, β, moments of the scores, versions, optimizers and the first showcase all go on from the checkpoint."""
    adaptive = GAE | {"kl": {"coef": 0.3, "target": 0.4, "horizon": 50}, "normalise_scores": True, "score_clip": None}
    whole_job = make_job(adaptive, run={"steps": 4, "checkpoint_every": 2})
    whole = start_ppo(whole_job, world)
    whole.train()
    kept = {step: dict(logged) for step, logged in world.logged.items()}
    events = [detail for _, what, detail in world.events if what == "generate"]
    before = (Path(whole_job.run.dir) / "before_after.md").read_text()

    first = script(monkeypatch)
    other = {"dir": whole_job.run.dir + "-resumed", "checkpoint_every": 2, "steps": 4}
    job = make_job(adaptive, run=other)
    controller = start_ppo(job, first)
    controller.report.before = controller._showcase()
    for step in (1, 2, 3):  # the third is lost
        controller.train_step(step)

    second = script(monkeypatch)
    resumed = start_ppo(job, second)
    resumed.train()
    assert sorted(second.logged) == [3, 4]
    for step, logged in second.logged.items():
        timed = {name for name in logged if name.startswith(("time/", "throughput/"))}
        assert {name: logged[name] for name in logged.keys() - timed} == {
            name: kept[step][name] for name in kept[step].keys() - timed
        }
    assert [detail for _, what, detail in second.events if what == "generate"] == events[3:]
    assert (Path(job.run.dir) / "before_after.md").read_text() == before
    assert resumed.state_dict() == whole.state_dict()
    restored = [what for role, what, _ in second.events if what in ("load", "send_weights", "generate")]
    assert restored[: restored.index("generate")] == ["load"] * 4 + ["send_weights"] * 2


def test_a_checkpoint_is_of_the_state_after_its_step(world: World, make_job: MakeJob) -> None:
    controller = start_ppo(make_job(GAE, run={"steps": 2, "checkpoint_every": 1, "keep_last": 5}), world)
    controller.train()
    for step in (1, 2):
        found = controller.folder.checkpoints._load(step)
        assert found is not None
        for role in ("policy", "critic"):
            assert (found.folder / role / "steps.json").read_text() == str(4 * step)
        assert found.state["version"] == step
        assert found.metrics["reward/mean"] == world.logged[step]["reward/mean"]


def test_the_showcase_asks_the_same_before_and_after(world: World, make_job: MakeJob) -> None:
    job = make_job(GAE, run={"steps": 2, "samples_kept": 3})
    controller = start_ppo(job, world)
    controller.train()
    first, last = ([(r.uid, r.seed) for shard in world.requests[at] for r in shard] for at in (0, -1))
    assert first == last
    assert [uid for uid, _ in first] == ["p0@0", "p1@0", "p2@0"]
    rows = controller.report.before
    scores = [
        1.5 * output("helpful", token) - 0.5 * output("harmless", token)
        for token in (response_of(uid, 0)[-1] for uid, _ in first)
    ]
    assert [row.score for row in rows] == pytest.approx(scores, rel=1e-5)
    table = (Path(job.run.dir) / "before_after.md").read_text().splitlines()
    assert [f"{score:+.2f}" in line for score, line in zip(scores, table[2:], strict=True)] == [True] * 3


def test_samples_that_are_written_down_have_their_own_scores_and_kl(world: World, make_job: MakeJob) -> None:
    job = make_job(GAE, run={"steps": 5, "samples_every": 3, "samples_kept": 7})
    start_ppo(job, world).train()
    assert sorted(world.samples) == [1, 3, 5]
    expected = expected_step(job, world.requests[1], 0.3, [], 0, 0)
    rows = world.samples[1]
    assert [row.uid for row in rows] == expected.uids[:7]
    assert [row.score for row in rows] == pytest.approx(expected.raw[:7], rel=1e-4)
    assert [row.kl for row in rows] == pytest.approx(expected.kl[:7], rel=1e-4)


@pytest.mark.parametrize("other_rank", [0.0, 4.0])
def test_the_update_stops_early_by_the_kl_of_all_ranks(
    world: World, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, other_rank: float
) -> None:
    """The KL of the first optimizer step is 0, that of the second is more; another rank's may be so much that the first
    is the last."""
    added = {"total": other_rank, "calls": 0}

    def sum_over_ranks(value: float, device: Any) -> float:
        added["calls"] += 1
        return value + (added["total"] if added["calls"] % 2 else 1.0)

    monkeypatch.setattr(policy_module, "sum_over_ranks", sum_over_ranks)
    world.level = {step: 0.5 * step for step in range(40)}
    job = make_job(GAE | {"kl_early_stop": 0.05}, placement={"policy": {"ranks": 1}}, run={"steps": 1})
    start_ppo(job, world).train()
    made = 1 if other_rank else 2
    assert world.logged[1]["policy/optimizer_steps"] == made
    assert world.engines["policy"][0].steps == made
    assert world.engines["critic"][0].steps == 4
    assert added["calls"] == 2 * made
    # The KL of a token that moved by 0.5 (k3), over the steps that were made, of equal weight as they are.
    if made == 2:
        kl = math.expm1(0.5) - 0.5
        assert 0.3 * kl < world.logged[1]["policy/approx_kl"] < 0.7 * kl


def test_a_sample_that_is_missing_from_an_update_is_a_bug(world: World, make_job: MakeJob) -> None:
    controller = start_ppo(make_job(GAE), world)
    batch_size = 8 * 2

    class Report:
        samples = 3

    with pytest.raises(RuntimeError, match="trained on 6 samples where 16 were due"):
        controller._check_all_trained("policy", [Report(), Report()], batch_size)  # type: ignore[list-item]


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_what_is_no_number_ends_the_run_with_the_samples_that_caused_it(
    world: World, make_job: MakeJob, what: str
) -> None:
    job = make_job(GAE | {"optimizer_steps": 1, "epochs": 1})
    controller = start_ppo(job, world)
    if what == "loss":
        world.spoil = True
    else:
        world.grad_norm = math.inf
    with pytest.raises(TrainingDiverged, match=f"step 1: .*: {what} is") as raised:
        controller.train()
    rows = raised.value.samples_file.read_text().splitlines()
    assert 1 <= len(rows) <= 8
    steps = {engine.steps for role in ("policy", "critic") for engine in world.engines[role]}
    assert (0 in steps) == (what == "loss")
    assert world.logged == {}
