"""What is wrong with models and data is said before Ray starts, all of it at once."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_ray.config.jobs import Job, PPOJob, RewardModelJob, SFTJob
from rlhf_ray.config.loading import ConfigError, parse_config
from rlhf_ray.controllers.inputs import EpochInputs, PPOInputs
from rlhf_ray.controllers.job import check
from rlhf_ray.data.comparisons import ComparisonSet
from rlhf_ray.data.streaming import ConversationStream
from rlhf_ray.models.score_scale import ScoreScale, write_scale
from rlhf_ray.models.tiny import build_tiny_model

MakeConfig = Callable[..., PPOJob | RewardModelJob]


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with another vocabulary."""
    return build_tiny_model(tmp_path_factory.mktemp("other") / "model", vocab=400)


@pytest.fixture
def ppo(prepared: Path) -> MakeConfig:
    def make(**sections: Any) -> PPOJob | RewardModelJob:
        model = str(prepared / "models/tiny")
        raw = {
            "job": "ppo",
            "name": "x",
            "policy": {"model": model},
            "critic": {"init_from": model},
            "reward": [{"model": f"{model}-reward", "name": "r"}],
            "rollout": {"engine": {"max_model_len": 64}, "sampling": {"max_new_tokens": 16}},
            "data": {"prompts": str(prepared / "data/tiny_prompts.jsonl"), "prompts_per_step": 4},
            "run": {"dir": "runs/x", "steps": 3},
        }
        return parse_config(raw | sections)

    return make


@pytest.fixture
def pairs(prepared: Path) -> MakeConfig:
    def make(**sections: Any) -> PPOJob | RewardModelJob:
        data = {name: str(prepared / f"data/tiny_pairs_{name}.jsonl") for name in ("train", "eval")}
        raw = {
            "job": "reward_model",
            "name": "x",
            "reward": {"model": str(prepared / "models/tiny")},
            "data": {**data, "rows_per_step": 16},
            "run": {"dir": "runs/x", "epochs": 2},
        }
        return parse_config(raw | sections)

    return make


def problems_of(config: Job) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check(config)
    return caught.value.problems


def test_a_good_ppo_config_gives_what_the_controller_needs(ppo: MakeConfig, prepared: Path) -> None:
    config = ppo()
    inputs = check(config)
    assert isinstance(inputs, PPOInputs)
    assert inputs.steps == 3
    model = str(prepared / "models/tiny")
    assert [source.path for name in ("reference", "critic") if (source := config.role(name).model)] == [model, model]
    assert len(inputs.prompts) == 64
    assert inputs.same_tokens == [True]


def test_a_causal_model_is_no_reward_model(ppo: MakeConfig, prepared: Path) -> None:
    [problem] = problems_of(ppo(reward=[{"model": str(prepared / "models/tiny")}]))
    assert problem.startswith("reward.0: model ")
    assert "it is a LlamaForCausalLM, not a reward model: train one with job: reward_model" in problem


def test_a_reward_model_of_another_vocabulary_is_told_apart(
    ppo: MakeConfig, other_model: Path, as_reward_model: Callable[[Path], Path]
) -> None:
    inputs = check(ppo(reward=[{"model": str(as_reward_model(other_model))}, {"function": "math:hypot"}]))
    assert isinstance(inputs, PPOInputs)
    assert inputs.same_tokens == [False]


def test_a_good_reward_model_config_counts_its_steps(pairs: MakeConfig) -> None:
    inputs = check(pairs())
    assert isinstance(inputs, EpochInputs)
    assert (len(inputs.train), inputs.steps) == (64, 8)
    assert inputs.held_out is not None
    assert len(inputs.held_out) == 32


def test_every_problem_is_listed_with_its_path(ppo: MakeConfig, tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere")
    found = problems_of(
        ppo(
            reference={"from": missing},
            critic={"init_from": missing},
            reward=[{"model": missing}, {"function": "math:nothing"}, {"function": "no_such_module:f", "name": "f"}],
            data={"prompts": missing},
        )
    )
    paths = [problem.partition(":")[0] for problem in found]
    assert paths == ["reference.from", "critic.init_from", "reward.0", "reward.1", "reward.2", "data.prompts"]
    assert all(missing in problem for problem in (*found[:3], found[-1]))


def test_heads_that_cannot_be_dealt_to_the_ranks_are_named(
    ppo: MakeConfig, pairs: MakeConfig, prepared: Path, as_reward_model: Callable[[Path], Path], tmp_path: Path
) -> None:
    three = str(build_tiny_model(tmp_path / "three", hidden=96))
    four = {"engine": {"sequence_parallel": 4}}
    said = (
        "engine.sequence_parallel: model {!r}: its {} attention heads and 1 key/value heads can't be dealt evenly to 4 "
        "ranks, but to {}"
    )
    model, scorer = str(prepared / "models/tiny"), str(as_reward_model(prepared / "models/tiny"))
    found = problems_of(
        ppo(
            policy={"model": model, **four},
            reference={"from": three, **four},
            critic={"init_from": model, **four},
            reward=[{"model": scorer, **four}],
            placement={"policy": {"ranks": 4}, "critic": {"ranks": 4}, "rollout": {"tensor_parallel": 4}},
        )
    )
    assert found == [
        f"policy.{said.format(model, 2, 2)}",
        f"placement.rollout.{said.format(model, 2, 2).replace('engine.sequence_parallel', 'tensor_parallel')}",
        f"reference.{said.format(three, 3, 3)}",
        f"critic.{said.format(model, 2, 2)}",
        f"reward.0.{said.format(scorer, 2, 2)}",
    ]
    found = problems_of(pairs(reward={"model": model, **four}, placement={"reward": {"ranks": 4}}))
    assert found == [f"reward.{said.format(model, 2, 2)}"]


def test_a_missing_policy_is_named(ppo: MakeConfig, tmp_path: Path) -> None:
    [problem, *_] = problems_of(ppo(policy={"model": str(tmp_path / "nowhere")}))
    assert problem.startswith("policy.model: model ")
    assert "no such folder; `rlhf-ray prepare`" in problem


def test_a_tokenizer_that_does_not_match_the_model_is_named(
    ppo: MakeConfig, prepared: Path, other_model: Path, tmp_path: Path
) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(other_model, mixed)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(prepared / "models/tiny" / name, mixed)
    found = problems_of(ppo(policy={"model": str(mixed)}))
    assert "token ids up to 511, but its embedding has 400 rows" in found[0]


def test_models_that_must_share_the_policys_vocabulary_are_named(ppo: MakeConfig, other_model: Path) -> None:
    found = problems_of(ppo(reference={"from": str(other_model)}, critic={"init_from": str(other_model)}))
    assert [problem.partition(":")[0] for problem in found] == ["reference.from", "critic.init_from"]
    assert all("has another vocabulary than policy.model" in problem for problem in found)


def test_a_context_longer_than_the_models_is_refused(ppo: MakeConfig) -> None:
    policy, reward = problems_of(ppo(rollout={"engine": {"max_model_len": 4096}, "sampling": {"max_new_tokens": 16}}))
    assert policy.startswith("rollout.engine.max_model_len (4096) is more than the 512 positions of policy.model")
    assert reward.startswith("reward.0.model: model ")
    assert "has positions for 512 tokens, but a prompt of up to 4080 and a response of up to 16 have 4096" in reward


def test_bad_prompt_rows_are_named_by_file_and_line(ppo: MakeConfig, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    rows = [json.dumps({"prompt": "I think"}), "{", json.dumps({"prompt": ""}), json.dumps({"text": "x"})]
    path.write_text("\n".join(rows) + "\n")
    [problem] = problems_of(ppo(data={"prompts": str(path), "prompts_per_step": 1}))
    assert problem.startswith("data.prompts: ")
    assert all(f"{path}:{line}: " in problem for line in (2, 3, 4))
    assert f"{path}:1: " not in problem


def test_a_reward_function_that_asks_for_a_column_that_no_row_has_is_refused(
    ppo: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "asking_rewards.py").write_text("def exact(responses, answer):\n    return [0.0 for _ in responses]\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "rows.jsonl"
    reward = [{"function": "asking_rewards:exact", "name": "right"}]
    data = {"prompts": str(path), "prompts_per_step": 1}
    path.write_text('{"prompt": "2 + 3 =", "solution": "5"}\n')
    assert problems_of(ppo(reward=reward, critic={"init_from": ppo().policy.model}, data=data)) == [
        "reward.0: reward 'right': reward function 'asking_rewards:exact' asks for column 'answer', which no row of "
        "data.prompts has (the columns there are: solution)"
    ]
    path.write_text('{"prompt": "2 + 3 =", "answer": "5"}\n')
    assert isinstance(check(ppo(reward=reward, critic={"init_from": ppo().policy.model}, data=data)), PPOInputs)


def test_a_service_that_is_down_is_named(ppo: MakeConfig) -> None:
    part = {"url": "http://127.0.0.1:9/score", "retries": 0, "timeout_s": 2.0}
    [problem] = problems_of(ppo(reward=[part]))
    assert problem.startswith("reward.0: reward 'http': ")
    assert "http://127.0.0.1:9/score" in problem


def test_a_tracker_that_is_not_installed_is_named(ppo: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    [problem] = problems_of(ppo(run={"dir": "runs/x", "steps": 3, "wandb": {"project": "p"}}))
    assert "run.wandb is set, but the package wandb is not installed" in problem


def test_bad_conversations_and_a_missing_model_are_listed(prepared: Path, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text('{"text": "A film."}\n{"messages": []}\n')

    def sft(model: Path, train: Any) -> SFTJob:
        data = {
            "train": train if isinstance(train, list) else str(train),
            "eval": str(prepared / "data/tiny_chats_eval.jsonl"),
            "rows_per_step": 5,
        }
        sections = {"policy": {"model": str(model)}, "data": data, "run": {"dir": str(tmp_path / "run"), "epochs": 3}}
        return SFTJob.model_validate({"job": "sft", "name": "n", **sections})

    inputs = check(sft(prepared / "models/tiny", prepared / "data/tiny_chats_train.jsonl"))
    assert isinstance(inputs, EpochInputs)
    assert inputs.held_out is not None
    assert (inputs.steps, len(inputs.train), len(inputs.held_out)) == (30, 48, 16)
    [problem] = problems_of(sft(prepared / "models/tiny", path))
    assert problem.startswith("data.train: ")
    assert f"{path}:2: 'messages' is an empty list" in problem
    [problem] = problems_of(sft(tmp_path / "nowhere", path))
    assert problem.startswith("policy.model: ")
    good = {"path": str(prepared / "data/tiny_chats_train.jsonl"), "weight": 0.5}
    mixed = check(sft(prepared / "models/tiny", [good, {"path": str(prepared / "data/tiny_chats_eval.jsonl")}]))
    assert isinstance(mixed, EpochInputs)
    assert len(mixed.train) == 24 + 16
    [problem] = problems_of(sft(prepared / "models/tiny", [good, {"path": str(path)}]))
    assert problem.startswith("data.train.1.path: ")


def test_a_stream_is_looked_into_before_the_run(prepared: Path, tmp_path: Path) -> None:
    def streamed(*sources: Path) -> SFTJob:
        data = {"train": [{"path": str(source)} for source in sources], "streaming": True, "shuffle_buffer": 4}
        sections = {"policy": {"model": str(prepared / "models/tiny")}, "data": data}
        run = {"dir": str(tmp_path / "run"), "steps": 7}
        return SFTJob.model_validate({"job": "sft", "name": "n", **sections, "run": run})

    good, bad, partly = prepared / "data/tiny_chats_train.jsonl", tmp_path / "bad.jsonl", tmp_path / "partly.jsonl"
    bad.write_text('{"text": ""}\n{\n')
    partly.write_text('{"text": ""}\n{"text": "A film."}\n')
    inputs = check(streamed(good, partly))
    assert isinstance(inputs, EpochInputs)
    assert isinstance(inputs.train, ConversationStream)
    assert (inputs.steps, inputs.train.take(2)[0].uids[1]) == (7, "partly:2")
    found = problems_of(streamed(good, bad, tmp_path / "none.jsonl"))
    assert [problem.partition(":")[0] for problem in found] == ["data.train.1.path", "data.train.2.path"]
    assert all(f"{bad}:{line}: " in found[0] for line in (1, 2))


def test_bad_pairs_and_a_missing_model_are_listed_together(pairs: MakeConfig, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"chosen": "a"}\n')
    [problem] = problems_of(pairs(data={"train": str(path)}))
    assert problem.startswith("data.train: ")
    assert f"{path}:1: " in problem
    [problem] = problems_of(pairs(reward={"model": str(tmp_path / "nowhere")}))
    assert problem.startswith("reward.model: ")


def judged(*ranks: list[int]) -> ComparisonSet:
    flat = [rank for row in ranks for rank in row]
    return ComparisonSet(
        uids=tuple(f"row{number}" for number in range(len(ranks))),
        token_ids=np.ones(len(flat), np.int32),
        token_offsets=np.arange(len(flat) + 1),
        answer_starts=np.zeros(len(flat), np.int64),
        candidate_offsets=np.cumsum([0, *map(len, ranks)]),
        ranks=np.array(flat),
        margins=np.zeros(len(ranks), np.float32),
        weights=np.ones(len(ranks)),
        dropped=0,
        truncated=0,
    )


def test_rows_that_the_loss_of_a_reward_model_cannot_learn_from_are_refused(
    pairs: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = judged([0, 1], [0, 1, 2], [0, 1, 1])
    monkeypatch.setattr("rlhf_ray.controllers.inputs.load_comparisons", lambda *_, **__: rows)
    said = (
        "2 of 3 rows, the first of them 'row1', have more than two candidates, but loss.type is 'bradley_terry': set "
        "it to 'softmax', 'plackett_luce' or 'all_pairs'"
    )
    assert problems_of(pairs()) == [f"data.train: {said}", f"data.eval: {said}"]
    for loss in ("softmax", "plackett_luce", "all_pairs"):
        assert isinstance(check(pairs(loss={"type": loss})), EpochInputs)
    rows = judged([0, 1], [0])
    assert problems_of(pairs())[0] == (
        "data.train: 1 of 2 rows, the first of them 'row1', have one candidate, but a reward model learns from "
        "comparisons of at least two"
    )
    rows = judged([0, 0])
    assert problems_of(pairs())[0] == "data.train: every row is a tie: there is nothing to prefer"


def test_a_reward_can_be_normalised_only_by_a_model_that_has_a_scale(
    ppo: MakeConfig, prepared: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(prepared / "models/tiny-reward", tmp_path / "reward")
    config = ppo(reward=[{"model": str(model), "normalise": True}])
    assert problems_of(config) == [
        f"reward.0.normalise: the config.json of '{model}' has no score_mean and score_std: export a checkpoint of a "
        "step that was evaluated, or leave this key out"
    ]
    write_scale(model, ScoreScale(0.5, 2.0))
    assert isinstance(check(config), PPOInputs)


def test_layers_that_lora_names_are_looked_for(ppo: MakeConfig, prepared: Path) -> None:
    model = str(prepared / "models/tiny")
    problems = problems_of(
        ppo(
            policy={"model": model, "lora": {"targets": ["q_proj", "w1"]}},
            critic={"init_from": model, "lora": {"targets": ["score"]}},
        )
    )
    known = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    assert problems == [
        f"{role}.lora: model {model!r}: can't get the adapters of lora: targets: {target!r} is no linear layer of its "
        f"decoder, which has {known}"
        for role, target in (("policy", "w1"), ("critic", "score"))
    ]


def test_a_missing_model_is_told_once(pairs: MakeConfig, tmp_path: Path) -> None:
    [problem] = problems_of(pairs(reward={"model": str(tmp_path / "none"), "lora": {}}))
    assert problem.startswith("reward.model: ")


def test_four_bits_need_their_package(pairs: MakeConfig, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    lora = {"lora": {"base": "nf4"}}
    [problem] = problems_of(
        pairs(reward={"model": str(prepared / "models/tiny"), **lora}, placement={"reward": {"gpus": 1}})
    )
    assert problem.startswith("reward.lora: ")
    assert problem.endswith("needs bitsandbytes, which is not installed: pip install 'rlhf_ray[nf4]'")


def test_a_good_lora_is_no_problem(ppo: MakeConfig, prepared: Path) -> None:
    check(ppo(policy={"model": str(prepared / "models/tiny"), "lora": {"targets": ["q_proj"]}}))
