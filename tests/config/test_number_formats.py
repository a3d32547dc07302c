"""What `dtype: auto` becomes: which roles get which number format, from what is known of their machines."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.jobs import Job
from rlhf_ray.config.loading import ConfigError, dump_config, load_config, parse_config
from rlhf_ray.config.number_formats import Look, choose, engines_of
from rlhf_ray.config.training import UndecidedDtype
from rlhf_ray.platform import CpuProducts

FAST = CpuProducts(True, "has AMX_BF16")
SLOW = CpuProducts(False, "has neither AVX512_BF16 nor AMX", "9 times as long")


def ppo(**sections: Any) -> Job:
    config: dict[str, Any] = {
        "job": "ppo",
        "name": "a",
        "policy": {"model": "p"},
        "reward": [{"model": "r"}, {"function": "mine.rewards:f"}],
        "data": {"prompts": "rows.jsonl", "prompts_per_step": 4},
        "run": {"dir": "runs/a", "steps": 5},
    }
    return parse_config(config | sections)


def everywhere(products: CpuProducts) -> Look:
    return lambda role: {"this machine": products}


def dtypes(config: Job) -> dict[str, str]:
    return {key.removesuffix(".engine"): engine.dtype for key, engine in engines_of(config).items()}


ROLES = ("policy", "critic", "reference", "reward.0", "rollout")


@pytest.mark.parametrize(("products", "dtype"), [(FAST, "bfloat16"), (SLOW, "float32")])
def test_roles_on_cpus_get_what_the_cpus_multiply_in(products: CpuProducts, dtype: str) -> None:
    found = choose(ppo(), everywhere(products))
    assert dtypes(found.config) == dict.fromkeys(ROLES, dtype)
    assert found.lines == [
        f"{dtype} for policy.engine, critic.engine, reference.engine, reward.0.engine, rollout.engine: the CPU of this "
        f"machine {products.why}"
    ]
    assert found.content()["policy.engine.dtype"] == {"dtype": dtype, "why": f"the CPU of this machine {products.why}"}
    assert not found.open
    assert not found.warnings


@pytest.mark.parametrize(
    "job",
    [
        {"job": "sft", "policy": {"model": "p"}, "data": {"train": "t"}},
        {"job": "reward_model", "reward": {"model": "p"}, "data": {"train": "t"}},
        {"job": "preference", "policy": {"model": "p"}, "data": {"train": "t"}},
    ],
)
def test_every_job_is_covered(job: dict[str, Any]) -> None:
    config = parse_config({**job, "name": "a", "run": {"dir": "r"}})
    found = choose(config, everywhere(SLOW)).config
    assert set(dtypes(found).values()) == {"float32"}
    assert len(dtypes(found)) == len(config.placements)


def test_what_was_chosen_is_read_back_from_the_written_config(tmp_path: Path) -> None:
    found = choose(ppo(), everywhere(SLOW)).config
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(found))
    assert "dtype: auto" not in path.read_text()
    assert load_config(path) == found


def test_roles_on_gpus_compute_in_bfloat16_whatever_the_cpus_do() -> None:
    gpu = {"gpus": 1}
    config = ppo(placement={"policy": gpu, "rollout": gpu, "critic": {}})
    found = choose(config, everywhere(SLOW))
    # The reference sits with the policy, the reward model with the critic.
    gpus = {"policy": "bfloat16", "reference": "bfloat16", "rollout": "bfloat16"}
    assert dtypes(found.config) == {"critic": "float32", "reward.0": "float32"} | gpus
    assert "bfloat16 for policy.engine, reference.engine, rollout.engine: on GPUs" in found.lines
    assert not found.warnings


def test_one_slow_node_makes_all_roles_on_cpus_compute_in_float32() -> None:
    found = choose(ppo(), lambda role: {"node a": FAST, "node b": SLOW} if role == "critic" else {"node a": FAST})
    assert dtypes(found.config) == dict.fromkeys(ROLES, "float32")
    [line] = found.lines
    assert line.endswith("the CPU of node b has neither AVX512_BF16 nor AMX (1 of 2 nodes do not multiply in bfloat16)")
    found = choose(ppo(), lambda role: {"node a": FAST, "node b": FAST})
    assert dtypes(found.config) == dict.fromkeys(ROLES, "bfloat16")
    assert found.lines[0].endswith("the CPU of node a has AMX_BF16 (all 2 nodes multiply in bfloat16)")


def test_a_slow_node_of_one_role_alone_counts_although_the_same_node_is_fast_for_another() -> None:
    found = choose(ppo(), lambda role: {"this machine": SLOW if role == "reference" else FAST})
    assert dtypes(found.config) == dict.fromkeys(ROLES, "float32")


def test_engines_follow_the_policy_and_the_rest_its_machine() -> None:
    found = choose(ppo(policy={"model": "p", "engine": {"dtype": "float32"}}), everywhere(FAST))
    assert dtypes(found.config) == dict.fromkeys(ROLES, "bfloat16") | {"policy": "float32", "rollout": "float32"}
    assert "float32 for rollout.engine: as policy.engine" in found.lines


def test_what_an_earlier_session_computed_in_stands() -> None:
    kept = {"policy.engine": "bfloat16", "rollout.engine": "bfloat16", "critic.engine": "bfloat16"}
    found = choose(ppo(), everywhere(SLOW), kept=kept, source="runs/a/config.yaml")  # type: ignore[arg-type]
    assert dtypes(found.config) == dict.fromkeys(ROLES, "float32") | {
        key.removesuffix(".engine"): dtype for key, dtype in kept.items()
    }
    three = "policy.engine, critic.engine, rollout.engine"
    assert f"bfloat16 for {three}: as in runs/a/config.yaml, from which the run goes on" in found.lines
    own = ppo(policy={"model": "p", "engine": {"dtype": "float32"}})
    found = choose(own, everywhere(SLOW), kept=kept, source="x")  # type: ignore[arg-type]
    assert dtypes(found.config)["policy"] == dtypes(found.config)["rollout"] == "float32"


def test_bfloat16_written_out_is_obeyed_with_a_warning() -> None:
    config = ppo(policy={"model": "p", "engine": {"dtype": "bfloat16"}})
    found = choose(config, everywhere(SLOW))
    assert dtypes(found.config)["policy"] == dtypes(found.config)["rollout"] == "bfloat16"
    assert found.warnings[0] == (
        "policy.engine.dtype is bfloat16, but the CPU of this machine has neither AVX512_BF16 nor AMX: matrix products "
        "take 9 times as long as in float32 there; set it to float32"
    )
    assert [warning.partition(".")[0] for warning in found.warnings] == ["policy", "rollout"]
    assert not choose(config, everywhere(FAST)).warnings


def test_machines_that_are_not_known_leave_auto_which_nothing_can_compute_with() -> None:
    found = choose(ppo(), None)
    assert found.open == tuple(f"{role}.engine" for role in ROLES)
    with pytest.raises(UndecidedDtype, match="TrainingEngine.dtype is still 'auto'"):
        _ = found.config.policy.engine.dtype  # type: ignore[union-attr]


def test_a_role_without_actors_stays_as_it_is() -> None:
    config = ppo(policy={"model": "p", "lora": {"rank": 4}})
    assert set(dtypes(choose(config, everywhere(SLOW)).config)) == {*ROLES} - {"reference"}


def test_the_content_is_json() -> None:
    assert json.loads(json.dumps(choose(ppo(), everywhere(FAST)).content())).keys() == {
        f"{role}.engine.dtype" for role in ROLES
    }


def test_a_config_has_one_name_for_it() -> None:
    with pytest.raises(ConfigError, match="policy.engine.dtype_choice: unknown key"):
        ppo(policy={"model": "p", "engine": {"dtype_choice": "float32"}})
