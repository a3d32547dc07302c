import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from rlhf_ray.config.jobs import JOB_TYPES, PPOJob, RewardModelJob
from rlhf_ray.config.loading import ConfigError, parse_config
from rlhf_ray.config.reference import render
from rlhf_ray.config.rewards import FunctionReward, HttpReward, ModelReward, part_name

REPOSITORY = Path(__file__).parents[2]


def ppo(**sections: Any) -> dict[str, Any]:
    return {
        "job": "ppo",
        "name": "x",
        "policy": {"model": "m"},
        "reward": [{"model": "r"}],
        "data": {"prompts": "p.jsonl"},
        "run": {"dir": "runs/x", "steps": 3},
        **sections,
    }


def sft(**sections: Any) -> dict[str, Any]:
    return {
        "job": "sft",
        "name": "n",
        "policy": {"model": "m"},
        "data": {"train": "t"},
        "run": {"dir": "d"},
        **sections,
    }


def reward_model(**sections: Any) -> dict[str, Any]:
    return {
        "job": "reward_model",
        "name": "x",
        "reward": {"model": "m"},
        "data": {"train": "t.jsonl"},
        "run": {"dir": "runs/x"},
        **sections,
    }


def preference(**sections: Any) -> dict[str, Any]:
    return {
        "job": "preference",
        "name": "n",
        "policy": {"model": "m"},
        "data": {"train": "t"},
        "run": {"dir": "d"},
        **sections,
    }


def losses(*types: str, **algorithm: Any) -> dict[str, Any]:
    return preference(algorithm={"loss": [{"type": kind} for kind in types], **algorithm})


def problems_of(raw: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(raw)
    return caught.value.problems


def sections() -> Iterator[type[BaseModel]]:
    def inside(annotation: Any) -> Iterator[type[BaseModel]]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield annotation
            for field in annotation.model_fields.values():
                yield from inside(field.annotation)
        else:
            for argument in get_args(annotation):
                yield from inside(argument)

    for job in JOB_TYPES.values():
        yield from inside(job)


def test_the_config_package_imports_none_of_the_heavy_libraries() -> None:
    code = (
        "import importlib, pkgutil, sys, rlhf_ray.config as c\n"
        "for m in pkgutil.iter_modules(c.__path__): importlib.import_module(f'rlhf_ray.config.{m.name}')\n"
        "assert 'rlhf_ray.config.loading' in sys.modules\n"
        "sys.stdout.write(' '.join({'torch', 'ray', 'vllm', 'deepspeed', 'transformers'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, cwd=REPOSITORY)
    assert found.stdout == ""


def test_every_field_of_every_section_is_documented() -> None:
    found = list(sections())
    assert len(found) > 30
    assert [f"{s.__name__}.{n}" for s in found for n, f in s.model_fields.items() if not f.description] == []
    assert [s.__name__ for s in found if not s.__doc__] == []


def test_the_reference_page_is_current() -> None:
    page = (REPOSITORY / "docs/config.md").read_text()
    assert page == render(), "run: python -m rlhf_ray.config.reference > docs/config.md"


def test_the_reference_page_shows_the_defaults_that_hold() -> None:
    page = render()
    for section, row in [
        ("policy.optimizer", "| `lr` | float | `1e-06` |"),
        ("critic.optimizer", "| `lr` | float | `5e-06` |"),
        ("policy.optimizer", "| `betas` | list of float | `[0.9, 0.95]` |"),
        ("rollout.engine", "| `dtype` | `auto`, `bfloat16`, `float32` | `auto` |"),
        ("rollout.sampling", "| `stop_token_ids` | list of int | `[]` |"),
        ("placement", "| `reference` | section | `colocate: policy` |"),
        ("reference", "| `from` | str | `policy` |"),
    ]:
        assert row in page.split(f"### `{section}`\n")[1].split("###")[0], (section, row)


def test_a_section_given_in_part_keeps_its_other_defaults() -> None:
    config = parse_config(ppo(critic={"optimizer": {"weight_decay": 0.1}}))
    assert isinstance(config, PPOJob)
    assert (config.critic.optimizer.lr, PPOJob(**ppo()).critic.optimizer.lr) == (5e-6, 5e-6)
    config = parse_config(reward_model(reward={"model": "m", "optimizer": {"weight_decay": 0.1}}))
    assert isinstance(config, RewardModelJob)
    assert config.reward.optimizer.lr == 1e-5


LORA = {"model": "m", "lora": {}}
STAGE_0 = {"model": "m", "engine": {"zero_stage": 0, "offload_optimizer": "cpu"}}

# What is said about each conflict, whole: both dotted paths, both values.
CONFLICTS: list[tuple[dict[str, Any], str]] = [
    (
        ppo(data={"prompts": "p", "max_prompt_tokens": 2000}),
        "data.max_prompt_tokens (2000) + rollout.sampling.max_new_tokens (256) is more than "
        "rollout.engine.max_model_len (2048)",
    ),
    (
        ppo(rollout={"sampling": {"max_new_tokens": 64}, "engine": {"max_model_len": 64}}),
        "rollout.sampling.max_new_tokens (64) leaves no room for a prompt in rollout.engine.max_model_len (64)",
    ),
    (
        ppo(rollout={"sampling": {"max_new_tokens": 8, "min_new_tokens": 9}}),
        "rollout.sampling.min_new_tokens (9) is above rollout.sampling.max_new_tokens (8)",
    ),
    (
        ppo(rollout={"sampling": {"temperature": 0}}),
        "rollout.sampling.temperature is 0 (greedy), which gives no probabilities for job: ppo to learn from",
    ),
    (ppo(reward=[]), "reward: needs at least one part"),
    (
        ppo(reward=[{"model": "a/r/export"}, {"model": "b"}, {"function": "my.r:score"}]),
        "reward.2 and reward.0 are both named 'r': set name",
    ),
    (
        ppo(reward=[{"model": "r", "name": "mean"}]),
        "reward.0.name: 'mean' is the name of a metric of the sum; choose another",
    ),
    (ppo(reward=[{"model": "r", "weight": 0}]), "every reward.N.weight is 0: there is nothing to learn"),
    (
        ppo(reward=[{"function": "a.b:c"}]),
        "critic.init_from is 'reward', but reward has no part with a model: name a model folder in critic.init_from",
    ),
    (
        ppo(
            data={"prompts": "p", "prompts_per_step": 4},
            algorithm={"optimizer_steps": 4},
            placement={"critic": {"ranks": 2}},
        ),
        "data.prompts_per_step × data.samples_per_prompt (4) split into algorithm.optimizer_steps (4) gives fewer "
        "samples than placement.critic.ranks (2)",
    ),
    (
        ppo(algorithm={"kl": {"target": 6.0, "horizon": 10}}),
        "algorithm.kl.horizon (10) must be more than a fifth of data.prompts_per_step × data.samples_per_prompt (128), "
        "or one step could turn β negative",
    ),
    (
        ppo(
            rollout={"shard_samples": 1},
            placement={"critic": {"ranks": 2}, "policy": {"ranks": 2}},
            critic={"init_from": "m", "engine": {"zero_stage": 3}},
        ),
        "rollout.shard_samples (1) cuts 128 samples into shards of 1, fewer than placement.critic.ranks (2), which all "
        "work on each shard because critic.engine.zero_stage is 3",
    ),
    (
        ppo(placement={"policy": {"ranks": 3}}, policy={"model": "m", "engine": {"sequence_parallel": 2}}),
        "policy.engine.sequence_parallel (2) does not divide placement.policy.ranks (3)",
    ),
    (
        ppo(reference={"engine": {"sequence_parallel": 2}}),
        "reference.engine.sequence_parallel (2) does not divide placement.reference.ranks (1)",
    ),
    (
        ppo(reward=[{"function": "a:b"}, {"model": "r", "engine": {"sequence_parallel": 4}}]),
        "reward.1.engine.sequence_parallel (4) does not divide placement.reward.ranks (1)",
    ),
    (
        ppo(
            data={"prompts": "p", "prompts_per_step": 2},
            placement={"critic": {"ranks": 6}},
            critic={"engine": {"sequence_parallel": 2}},
        ),
        "data.prompts_per_step × data.samples_per_prompt (2) split into algorithm.optimizer_steps (1) gives fewer "
        "samples than placement.critic.ranks (6) ÷ critic.engine.sequence_parallel (2)",
    ),
    (
        sft(policy={"model": "m", "engine": {"sequence_parallel": 2}}),
        "policy.engine.sequence_parallel (2) does not divide placement.policy.ranks (1)",
    ),
    (
        reward_model(reward={"model": "m", "engine": {"sequence_parallel": 2}}),
        "reward.engine.sequence_parallel (2) does not divide placement.reward.ranks (1)",
    ),
    (
        preference(reference={"engine": {"sequence_parallel": 2}}),
        "reference.engine.sequence_parallel (2) does not divide placement.reference.ranks (1)",
    ),
    (
        preference(
            data={"train": "t", "rows_per_step": 2},
            policy={"model": "m", "engine": {"sequence_parallel": 2}},
            placement={"policy": {"ranks": 6}},
        ),
        "data.rows_per_step (2) is less than placement.policy.ranks (6) ÷ policy.engine.sequence_parallel (2)",
    ),
    (
        ppo(placement={"policy": {"gpus": 1}}),
        "placement.policy.gpus (1) and placement.rollout.gpus (0) must both be 0 or both not: weights travel over one "
        "kind of device",
    ),
    (
        ppo(algorithm={"critic_warmup_steps": 3}),
        "algorithm.critic_warmup_steps (3) leaves no step of run.steps (3) in which the policy learns",
    ),
    (
        ppo(policy={"model": "m", "engine": {"offload_parameters": "cpu"}}),
        "policy.engine.offload_parameters: cpu needs policy.engine.zero_stage: 3, but it is 2",
    ),
    (
        ppo(policy=STAGE_0),
        "policy.engine.offload_optimizer: cpu needs policy.engine.zero_stage: 1, 2 or 3, but it is 0",
    ),
    (
        ppo(policy={"model": "m", "engine": {"offload_optimizer": "nvme", "nvme_path": "/disk"}}),
        "policy.engine.offload_optimizer: nvme needs policy.engine.zero_stage: 3, but it is 2",
    ),
    (
        ppo(policy={"model": "m", "engine": {"zero_stage": 3, "offload_optimizer": "nvme"}}),
        "policy.engine.offload_optimizer: nvme needs policy.engine.nvme_path, a folder on a local disk of each node",
    ),
    (
        ppo(policy={"model": "m", "engine": {"nvme_path": "/disk"}}),
        "policy.engine.nvme_path is '/disk', but no policy.engine.offload_parameters or "
        "policy.engine.offload_optimizer is nvme",
    ),
    (
        ppo(reward=[{"model": "r", "engine": {"offload_parameters": "nvme"}}]),
        "reward.0.engine.offload_parameters: nvme needs reward.0.engine.zero_stage: 3, but it is 0",
    ),
    (
        ppo(reference={"engine": {"zero_stage": 3, "offload_parameters": "nvme"}}),
        "reference.engine.offload_parameters: nvme needs reference.engine.nvme_path, a folder on a local disk of each "
        "node",
    ),
    (
        ppo(placement={"reference": {"colocate": "critic", "ranks": 2}}),
        "placement.reference.ranks (2) differs from placement.critic.ranks (1), but placement.reference.colocate "
        "puts it on the same bundles",
    ),
    (
        ppo(placement={"policy": {"colocate": "policy"}}),
        "placement.policy.colocate: 'policy' must name a role that has its own place",
    ),
    (
        ppo(placement={"policy": {"colocate": "critic"}, "critic": {"colocate": "policy"}}),
        "placement.policy.colocate: 'critic' must name a role that has its own place",
    ),
    (
        ppo(placement={"policy": {"labels": {"zone": "in(a"}}}),
        "placement.policy.labels.zone is 'in(a', which is none of: value, !value, in(a, b), !in(a, b)",
    ),
    (
        ppo(placement={"policy": {"resources": {"GPU": 1}}}),
        "placement.policy.resources names GPU, which placement.policy.gpus sets",
    ),
    (
        ppo(placement={"policy": {"ranks": 4, "nodes": 2, "strategy": "SPREAD"}}),
        "placement.policy.strategy is 'SPREAD', but placement.policy.nodes (2) says already how they spread",
    ),
    (
        ppo(placement={"policy": {"ranks": 4, "nodes": 3}}),
        "placement.policy.ranks (4) can't be spread equally over placement.policy.nodes (3)",
    ),
    (
        ppo(placement={"rollout": {"engines": 3, "nodes": 2}}),
        "placement.rollout.engines (3) x placement.rollout.nodes_per_engine (1) can't be spread equally over "
        "placement.rollout.nodes (2)",
    ),
    (
        ppo(placement={"rollout": {"tensor_parallel": 3, "nodes_per_engine": 2}}),
        "placement.rollout.tensor_parallel (3) can't be divided into placement.rollout.nodes_per_engine (2)",
    ),
    (
        ppo(
            policy=LORA,
            rollout={"lora_sync": "adapters"},
            placement={"rollout": {"tensor_parallel": 2, "nodes_per_engine": 2}},
        ),
        "rollout.lora_sync is 'adapters', which workers read from a folder of their node, but "
        "placement.rollout.nodes_per_engine is 2: set rollout.lora_sync to 'merged'",
    ),
    (
        ppo(placement={"rollout": {"engines": 2, "colocate": "policy"}}),
        "placement.rollout.engines (2) x placement.rollout.tensor_parallel (1) differs from placement.policy.ranks "
        "(1), but placement.rollout.colocate puts each worker on the place of one rank",
    ),
    (
        ppo(
            placement={
                "policy": {"ranks": 4, "strategy": "STRICT_SPREAD"},
                "rollout": {"engines": 2, "tensor_parallel": 2, "colocate": "policy"},
            }
        ),
        "placement.rollout.tensor_parallel (2) does not divide the ranks that placement.policy has on a node (1): one "
        "engine's workers share a node",
    ),
    (
        ppo(placement={"rollout": {"labels": {"a": "b"}, "colocate": "policy"}}),
        "placement.rollout.labels has no effect beside placement.rollout.colocate: it sits in placement.policy's place",
    ),
    (
        ppo(
            placement={"offload_idle": True, "reference": {"colocate": None}, "reward": {"colocate": None}},
        ),
        "placement.offload_idle has no effect: no placement.ROLE.colocate puts two roles together",
    ),
    (
        ppo(placement={"offload_idle": True}, policy={"model": "m", "engine": {"zero_stage": 0}}),
        "placement.offload_idle: policy.engine.zero_stage is 0, whose optimizer state DeepSpeed can't move: set it to "
        "1, 2 or 3",
    ),
    (
        ppo(
            placement={"offload_idle": True},
            policy={"model": "m", "engine": {"zero_stage": 3, "offload_parameters": "cpu"}},
        ),
        "placement.offload_idle: DeepSpeed moves no optimizer state beside policy.engine.offload_parameters: set "
        "policy.engine.offload_optimizer to cpu",
    ),
    (
        ppo(placement={"offload_idle": True}, reference={"engine": {"zero_stage": 3}}),
        "placement.offload_idle: reference.engine.zero_stage is 3, whose shards stay where they are: set "
        "reference.engine.offload_parameters to cpu, or reference.engine.zero_stage to 0",
    ),
    (
        ppo(placement={"policy": {"gpus": 0.5, "ranks": 2}}),
        "placement.policy.gpus is 0.5 and placement.policy.ranks is 2: two ranks of one role would share a GPU, which "
        "NCCL refuses. Set placement.policy.gpus to 1, or placement.policy.ranks to 1, or placement.policy.strategy to "
        "STRICT_SPREAD, which gives each its own node",
    ),
    (
        ppo(placement={"policy": {"gpus": 2}}),
        "placement.policy.gpus is 2, but a rank drives one device: raise placement.policy.ranks instead",
    ),
    (
        reward_model(placement={"reward": {"colocate": "policy"}}),
        "placement.reward.colocate is 'policy', but this job has no other role",
    ),
    (
        reward_model(data={"train": "t", "rows_per_step": 2}, placement={"reward": {"ranks": 3}}),
        "data.rows_per_step (2) is less than placement.reward.ranks (3)",
    ),
    (
        reward_model(run={"dir": "d", "keep_best": {"metric": "eval/accuracy"}}),
        "run.keep_best.metric is 'eval/accuracy', but data.eval is not set",
    ),
    (
        sft(placement={"policy": {"colocate": "critic"}}),
        "placement.policy.colocate is 'critic', but this job has no other role",
    ),
    (
        sft(data={"train": "t", "rows_per_step": 2}, placement={"policy": {"ranks": 3}}),
        "data.rows_per_step (2) is less than placement.policy.ranks (3)",
    ),
    (
        sft(run={"dir": "d", "keep_best": {"metric": "eval/loss", "mode": "min"}}),
        "run.keep_best.metric is 'eval/loss', but data.eval is not set",
    ),
    (
        sft(data={"train": "t", "streaming": True}),
        "data.streaming: true needs run.steps, since a stream has no length",
    ),
    (
        sft(data={"train": "t", "streaming": True}, run={"dir": "d", "steps": 5, "epochs": 3}),
        "run.epochs (3) has no effect with data.streaming: set run.steps",
    ),
    (
        sft(run={"dir": "d", "steps": 5}),
        "run.steps (5) is for data.streaming: true; set run.epochs",
    ),
    (
        sft(data={"train": "t", "shuffle_buffer": 5}),
        "data.shuffle_buffer (5) has no effect without data.streaming: true",
    ),
    (
        sft(data={"train": "t", "streaming": True, "train_rows": 5}, run={"dir": "d", "steps": 5}),
        "data.train_rows (5) has no effect with data.streaming: run.steps is the limit",
    ),
    (
        ppo(data={"prompts": "p", "columns": {"promt": "question"}}),
        "data.columns: 'promt' is none of our columns; did you mean 'prompt'? (our name stands before the file's)",
    ),
    (
        sft(data={"train": "t", "columns": {"question": "prompt"}}),
        "data.columns: 'question' is none of our columns; known: uid, text, messages, prompt, completion (our name "
        "stands before the file's)",
    ),
    (
        sft(data={"train": []}),
        "data.train is empty, but needs at least one source",
    ),
    (
        sft(run={"dir": "d", "patience": 2, "eval_every": 1}),
        "run.patience needs run.keep_best.metric to be of the evaluation, such as eval/loss, but it is not set",
    ),
    (
        sft(
            data={"train": "t", "eval": "e"},
            run={"dir": "d", "patience": 2, "keep_best": {"metric": "eval/loss", "mode": "min"}},
        ),
        "run.patience counts evaluations, but run.eval_every is 0: one, after the last step",
    ),
    (
        sft(data={"train": "t", "eval": "e"}, run={"dir": "d", "keep_best": {"metric": "eval/loss"}}),
        "run.keep_best.mode is 'max', but less eval/loss is better: set it to 'min'",
    ),
    (
        sft(data={"train": "t", "eval": "e"}, run={"dir": "d", "keep_best": {"metric": "eval/accuracy"}}),
        "run.keep_best.metric is 'eval/accuracy', but an evaluation measures eval/entropy, eval/loss, eval/perplexity",
    ),
    (losses(), "algorithm.loss is empty, but needs at least one entry"),
    (
        preference(algorithm={"loss": [{"type": "sigmoid", "weight": 0}]}),
        "every algorithm.loss.N.weight is 0: there is nothing to learn",
    ),
    (losses("sigmod"), "algorithm.loss.0.type: 'sigmod' is not known; did you mean 'sigmoid'?"),
    (preference(algorithm={"loss": [{"beta": 1}]}), "algorithm.loss.0: needs the key type"),
    (
        preference(algorithm={"loss": [{"type": "simpo", "gama": 1}]}),
        "algorithm.loss.0.gama: unknown key; did you mean 'gamma'?",
    ),
    (
        preference(algorithm={"loss": [{"type": "hinge", "label_smoothing": 0.1}]}),
        "algorithm.loss.0.label_smoothing: unknown key; known keys: weight, beta, divergence, divergence_alpha, type",
    ),
    (
        preference(algorithm={"loss": [{"type": "sigmoid", "divergence_alpha": 0.5}]}),
        "algorithm.loss.0.divergence_alpha is only read with algorithm.loss.0.divergence: alpha, but it is "
        "'reverse_kl'",
    ),
    (
        losses("sigmoid", "kto"),
        "algorithm.loss.0 (sigmoid) and algorithm.loss.1 (kto) learn from different data: kto and bco from labels of "
        "single answers, the others from pairs",
    ),
    (losses("kto", "kto"), "algorithm.loss.1 is a second kto: one is enough"),
    (
        losses("sigmoid", "cpo", length_desensitised=0.5),
        "algorithm.length_desensitised shortens sums over the longer answer of a pair, but algorithm.loss.1 (cpo) is "
        "not made of such sums alone",
    ),
    (losses("bco", weighting="wpo"), "algorithm.weighting: wpo weights pairs, but algorithm.loss.0 is bco"),
    (
        losses("aot", weighting="wpo"),
        "algorithm.weighting: wpo weights pairs one by one, but aot sorts all pairs of a step",
    ),
    (
        losses("simpo", reference_free=True),
        "algorithm.reference_free has no effect: algorithm.loss.0 (simpo) has no reference anyway",
    ),
    (
        losses("orpo") | {"reference": {"cache": "runs/cache"}},
        "reference has no effect: algorithm.loss and algorithm.reference_free compare with none",
    ),
    (
        losses("orpo") | {"placement": {"policy": {"colocate": "reference"}, "reference": {}}},
        "placement.policy.colocate is 'reference', but algorithm.loss and algorithm.reference_free compare with none",
    ),
    (
        preference(reference={"cache": "c", "update_every": 5}),
        "reference.cache holds log-probs of a reference that stays as it is, but reference.update_every is 5: leave "
        "one of them out",
    ),
    (
        preference(reference={"update_mix": 0.5}),
        "reference.update_mix has no effect while reference.update_every is 0",
    ),
    (
        preference(policy={"model": "m", "lora": {}}, reference={"update_every": 3}),
        "reference.update_every is 3, but with policy.lora the reference is the policy with its adapters off, which "
        "stays as it is",
    ),
    (
        preference(policy={"model": "m", "lora": {}}, reference={"engine": {"dtype": "float32"}}),
        "reference.engine has no effect beside policy.lora: the policy with its adapters off is the reference. Leave "
        "it out, or name a model folder in reference.from",
    ),
    (
        preference(policy={"model": "m", "lora": {}}, placement={"reference": {"colocate": None}}),
        "placement.reference has no effect beside policy.lora: the policy with its adapters off is the reference. "
        "Leave it out, or name a model folder in reference.from",
    ),
    (
        preference(placement={"reference": {"colocate": "critic"}}),
        "placement.reference.colocate is 'critic', but this job has no such role",
    ),
    (
        preference(placement={"reference": {"colocate": "policy", "cpus": 2}}),
        "placement.reference.cpus has no effect beside placement.reference.colocate: it sits in placement.policy's "
        "place",
    ),
    (
        preference(data={"train": "t", "rows_per_step": 2}, placement={"reference": {"colocate": None, "ranks": 3}}),
        "data.rows_per_step (2) is less than placement.reference.ranks (3)",
    ),
    (
        preference(data={"train": "t", "eval": "e"}, run={"dir": "d", "keep_best": {"metric": "eval/acuracy"}}),
        "run.keep_best.metric is 'eval/acuracy', but an evaluation measures eval/accuracy, eval/chosen_logprob, "
        "eval/chosen_ratio, eval/loss, eval/margin, eval/rejected_logprob, eval/rejected_ratio",
    ),
    (
        ppo(policy={"model": "m", "lora": {"targets": []}}),
        "policy.lora.targets is empty: name layers, such as q_proj, or leave it out for all-linear",
    ),
    (
        ppo(policy=LORA, reference={"engine": {"dtype": "float32"}}),
        "reference.engine has no effect beside policy.lora: the policy with its adapters off is the reference. Leave "
        "it out, or name a model folder in reference.from",
    ),
    (
        ppo(policy=LORA, placement={"reference": {"colocate": "critic"}}),
        "placement.reference has no effect beside policy.lora: the policy with its adapters off is the reference. "
        "Leave it out, or name a model folder in reference.from",
    ),
    (
        ppo(rollout={"lora_sync": "adapters"}),
        "rollout.lora_sync is 'adapters', but policy.lora is not set: there are none to send",
    ),
    (
        ppo(policy={"model": "m", "lora": {"rank": 600}}, rollout={"lora_sync": "adapters"}),
        "rollout.lora_sync is 'adapters', but policy.lora.rank (600) is more than the 512 that vLLM takes: lower it, "
        "or set rollout.lora_sync to 'merged'",
    ),
    (
        ppo(
            policy={"model": "m", "lora": {"base": "nf4"}},
            rollout={"lora_sync": "adapters"},
            placement={"policy": {"gpus": 1}, "rollout": {"gpus": 1}},
        ),
        "rollout.lora_sync is 'adapters', but policy.lora.base is 'nf4': the engines' base model is not quantised, so "
        "it is another than the trainer's; set rollout.lora_sync to 'merged'",
    ),
    (
        ppo(policy={"model": "m", "lora": {"base": "nf4"}}),
        "policy.lora.base is 'nf4', which needs a GPU, but placement.policy.gpus is 0",
    ),
    (
        sft(policy={"model": "m", "lora": {"base": "nf4"}, "engine": {"zero_stage": 3}}),
        "policy.lora.base is 'nf4', which ZeRO can't shard, but policy.engine.zero_stage is 3",
    ),
    (
        reward_model(reward={"model": "m", "lora": {"base": "nf4"}}),
        "reward.lora.base is 'nf4', which needs a GPU, but placement.reward.gpus is 0",
    ),
]


@pytest.mark.parametrize(
    "policy",
    [
        {"gpus": 0.5},
        {"gpus": 0.6, "ranks": 2},
        {"gpus": 0.5, "ranks": 2, "strategy": "STRICT_SPREAD"},
        {"gpus": 0.5, "ranks": 2, "nodes": 2},
    ],
)
def test_ranks_with_a_part_of_a_gpu_each_may_not_meet_on_one(policy: dict[str, Any]) -> None:
    assert parse_config(sft(placement={"policy": policy}))


@pytest.mark.parametrize(("raw", "message"), CONFLICTS)
def test_a_conflict_names_both_paths(raw: dict[str, Any], message: str) -> None:
    assert problems_of(raw) == [message]


def test_the_prompt_budget_is_what_the_engine_leaves_unless_set() -> None:
    rollout = {"sampling": {"max_new_tokens": 24}, "engine": {"max_model_len": 128}}
    assert PPOJob(**ppo(rollout=rollout)).max_prompt_tokens == 104
    assert PPOJob(**ppo(rollout=rollout, data={"prompts": "p", "max_prompt_tokens": 9})).max_prompt_tokens == 9


def test_a_colocated_role_has_as_many_ranks_as_its_host() -> None:
    placement = PPOJob(**ppo(placement={"policy": {"ranks": 2}, "critic": {"ranks": 3}})).placement
    roles = ("policy", "critic", "reference", "reward")
    assert [placement.ranks_of(role) for role in roles] == [2, 3, 2, 3]


def test_a_policy_has_as_many_ranks_as_the_reference_that_it_sits_with() -> None:
    placement = {"policy": {"colocate": "reference"}, "reference": {"ranks": 2}}
    assert [role.ranks for role in parse_config(preference(placement=placement)).roles] == [2, 2]


def test_with_adapters_the_policy_is_the_reference_unless_it_is_another_model() -> None:
    another = {"from": "other", "engine": {"dtype": "float32"}}
    for policy, reference, wanted in ((LORA, {}, True), (LORA, another, False), ({"model": "m"}, {}, False)):
        assert PPOJob(**ppo(policy=policy, reference=reference)).policy_is_reference == wanted


def test_a_colocated_critic_has_its_hosts_gpus() -> None:
    gpus = {
        "policy": {"gpus": 1},
        "rollout": {"gpus": 1},
        "critic": {"colocate": "policy"},
        "reward": {"colocate": "policy"},
    }
    quantised = {"lora": {"base": "nf4"}}
    assert PPOJob(**ppo(critic=quantised, placement=gpus)).placement.gpus_of("critic") == 1


@pytest.mark.parametrize(
    ("part", "name"),
    [
        (ModelReward(model="runs/sentiment/export"), "sentiment"),
        (ModelReward(model="org/model/"), "model"),
        (ModelReward(model="x", name="mine"), "mine"),
        (FunctionReward(function="pkg.vader:score"), "vader"),
        (HttpReward(url="https://host/score"), "http"),
    ],
)
def test_a_reward_part_is_named_after_its_source(part: ModelReward | FunctionReward | HttpReward, name: str) -> None:
    assert part_name(part) == name
