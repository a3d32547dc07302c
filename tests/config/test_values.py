"""Numbers are numbers, counts have ends, and a path is one that somebody can have meant."""

import os
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.loading import ConfigError, apply_override, parse_config
from rlhf_ray.config.paths import why_not_writable


def problems(*overrides: str) -> list[str]:
    raw: dict[str, Any] = {
        "job": "ppo",
        "name": "x",
        "policy": {"model": "m"},
        "reward": [{"model": "r"}],
        "data": {"prompts": "p"},
        "run": {"dir": "runs/x", "steps": 1},
    }
    for override in overrides:
        apply_override(raw, override)
    try:
        parse_config(raw)
    except ConfigError as error:
        return error.problems
    return []


WORDS = ["'5'", "1_000", "0x10", "0o17", "017", "0b1", "1:30", "2024-01-01", "true", "yes", "abc", "null", "[1]", "٣"]


@pytest.mark.parametrize("value", [*WORDS, "5.5", "1.0", "1e25", ".inf", ".nan"])
@pytest.mark.parametrize("key", ["run.steps", "seed", "placement.rollout.engines", "rollout.sampling.top_k"])
def test_a_count_is_a_whole_number(key: str, value: str) -> None:
    (problem,) = problems(f"{key}={value}")
    assert problem.startswith(f"{key}: should be a whole number, in digits")


@pytest.mark.parametrize("value", [*WORDS, "1_0.5", "1:30.5", "'1e-5'", "nan", "inf", "Infinity"])
@pytest.mark.parametrize("key", ["policy.optimizer.lr", "reward.0.weight", "placement.policy.resources.x"])
def test_a_number_is_a_number(key: str, value: str) -> None:
    (problem,) = problems(f"{key}={value}")
    assert problem.startswith(f"{key}: should be a number")


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e400"])
def test_a_number_is_finite(value: str) -> None:
    assert len(problems(f"reward.0.weight={value}")) == 1


@pytest.mark.parametrize("value", ["1", "0", "'true'", "2", "null", "TrUe"])
def test_a_truth_value_is_one(value: str) -> None:
    assert problems(f"run.export={value}")[0].startswith("run.export: should be true or false")


@pytest.mark.parametrize(
    "override",
    [
        "policy.engine.zero_stage=true",
        "placement.rollout.gpus=true",
        "policy.optimizer.betas=[true, 0.9]",
        "rollout.sampling.stop_token_ids=[true]",
        "rollout.sampling.stop=[1]",
    ],
)
def test_values_within_lists_and_choices_are_of_their_kind(override: str) -> None:
    assert len(problems(override)) == 1


@pytest.mark.parametrize(
    "override", ["run.steps=1e3", "run.steps=+5", "policy.optimizer.lr=1", "policy.optimizer.lr=1.e-5"]
)
def test_decimal_numbers_are_taken(override: str) -> None:
    assert problems(override) == []


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["run.steps=1000000000000000000"], "run.steps: input should be less than or equal to 1000000000"),
        (["data.prompts_per_step=10000000000000000000000000"], "data.prompts_per_step: input should be less than"),
        (["data.prompts_per_step=10000000", "data.samples_per_prompt=10000000"], "more than the 10,000,000 samples"),
        (["placement.policy.ranks=1000000"], "placement.policy.ranks: input should be less than or equal to 100000"),
        (
            ["placement.rollout.engines=100000", "placement.rollout.tensor_parallel=100000"],
            "more than the 100,000 processes",
        ),
        (["cluster.cpus=1000000000"], "cluster.cpus: input should be less than or equal to 100000"),
        (["run.timeouts.setup_s=1e10"], "run.timeouts.setup_s: input should be less than or equal to 100000000"),
        (["policy.optimizer.lr=1e300"], "policy.optimizer.lr: input should be less than or equal to"),
        (["seed=99999999999999999999"], "seed: input should be less than"),
        ([f"name={'x' * 101}"], "name: string should have at most 100 characters"),
    ],
)
def test_counts_have_sensible_ends(overrides: list[str], problem: str) -> None:
    assert any(problem in found for found in problems(*overrides))


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ('""', "is empty"),
        ('" "', "is empty"),
        ('"a\\0b"', "characters that no path should have"),
        ('"a\\nb"', "characters that no path should have"),
        ("$HOME/x", "environment variables are not expanded"),
        ("${HOME}/x", "environment variables are not expanded"),
        ("~nobody-of-this-name/x", "no user of that name"),
        ("a" * 5000, "is too long"),
        ("a" * 256, "is too long"),
        ("ü" * 200, "is too long"),
        ("a/" * 3000, "is too long"),
    ],
)
@pytest.mark.parametrize(
    "key", ["run.dir", "policy.model", "reward.0.model", "reference.from", "critic.init_from", "data.prompts"]
)
def test_a_path_is_one_that_a_file_can_have(key: str, value: str, problem: str) -> None:
    (found,) = problems(f"{key}={value}")
    assert found.startswith(f"{key}: ")
    assert problem in found
    assert len(found) < 400


@pytest.mark.parametrize(
    "value", ["/", "//", "/..", "/dev/null", "/dev", "/proc/1/x", "/tmp/../proc", "/sys/x", "/dev/shm"]
)
def test_a_run_is_not_kept_where_nothing_can_be(value: str) -> None:
    (found,) = problems(f"run.dir={value}")
    assert "root of the file system" in found or "where nothing can be kept" in found


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    raw = {"job": "sft", "name": "x", "policy": {"model": "~/m"}, "data": {"train": "~/t"}, "run": {"dir": "~/runs/x"}}
    config = parse_config(raw)
    assert config.run.dir == "/home/somebody/runs/x"
    assert config.policy.model == "/home/somebody/m"  # type: ignore[union-attr]
    assert config.data.train == "/home/somebody/t"  # type: ignore[union-attr]


def test_a_folder_that_cannot_be_made_is_found_on_disk(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    (tmp_path / "hidden").symlink_to("/proc")
    assert why_not_writable(tmp_path / "file") == "is a file, but must be a folder"
    assert why_not_writable(tmp_path / "file/x") == f"lies below {tmp_path}/file, a file"
    assert why_not_writable(tmp_path / "a/x") == f"{tmp_path}/a is a link that leads nowhere"
    assert why_not_writable(tmp_path / "dangling/x") == f"{tmp_path}/dangling is a link that leads nowhere"
    assert why_not_writable(tmp_path / "hidden/x") == "is in /proc, where nothing can be kept"
    assert why_not_writable(tmp_path / "new/folder") is None
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_folder_of_somebody_else_is_not_writable() -> None:
    os.seteuid(65534)
    try:
        assert why_not_writable(Path("/usr/x")) == "/usr can't be written to"
    finally:
        os.seteuid(0)
