"""A job, a role and plugs of one's own: a package beside the config, without a change to any file of rlhf_ray."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rlhf_ray.cli.app import main
from rlhf_ray.cluster.preflight.asked import modules_and_variables
from rlhf_ray.config.jobs import PPOJob
from rlhf_ray.config.loading import ConfigError, dump_config, load_config, parse_config
from rlhf_ray.config.yaml_text import dump_yaml, parse_yaml
from rlhf_ray.controllers.job import check, definition_of

PACKAGES = Path(__file__).parents[1] / "integration"


@pytest.fixture(autouse=True)
def _found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PACKAGES)


@pytest.fixture
def raw(tiny_model_dir: Path, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "texts.txt").write_text("a film\nno\nanother film\n")
    return {
        "job": "toy.config:ToyJob",
        "name": "toy",
        "student": {"model": str(tiny_model_dir), "engine": {"dtype": "float32"}},
        "data": {"texts": str(tmp_path / "texts.txt")},
        "run": {"dir": str(tmp_path / "run"), "steps": 2},
    }


def problem_of(raw: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as raised:
        parse_config(raw)
    [problem] = raised.value.problems
    assert "\n" not in problem
    return problem


def test_a_job_is_named_by_its_class_and_read_back_from_its_run(raw: dict[str, Any]) -> None:
    config = parse_config(raw)
    assert [(role.name, role.kind, role.trained) for role in config.roles] == [
        ("student", "causal", True),
        ("teller", "texts", False),
    ]
    assert parse_config(parse_yaml(dump_config(config))) == config
    assert modules_and_variables(config)[0] == {"job": "toy.config"}
    assert problem_of(raw | {"data": {"texts": "texts.txt", "rows_per_stp": 4}}).startswith(
        "data.rows_per_stp: unknown"
    )


def test_its_inputs_are_checked(raw: dict[str, Any], tmp_path: Path) -> None:
    inputs = check(parse_config(raw))
    assert (inputs.steps, len(inputs.rows)) == (2, 3)
    (tmp_path / "texts.txt").write_text("a film\n\n")
    with pytest.raises(ConfigError, match="data.texts: .* has an empty line"):
        check(parse_config(raw))


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("validate",), ["student", "teller", "1 worker", "valid"]),
        (("plan", "--cluster", "8xh100"), ["student", "optimizer", "update"]),
        (("data", "inspect"), ["data.texts", "3 read"]),
    ],
)
def test_commands_know_it_by_its_tables(
    raw: dict[str, Any], tmp_path: Path, command: tuple[str, ...], said: list[str]
) -> None:
    (tmp_path / "toy.yaml").write_text(dump_yaml(raw))
    done = CliRunner().invoke(main, [*command, str(tmp_path / "toy.yaml")])
    assert done.exit_code == 0, done.output
    for words in said:
        assert words in done.output


@pytest.mark.parametrize(
    ("job", "said"),
    [
        ("ppp", "job: 'ppp' is not a job type; did you mean 'ppo'? (known: ppo, preference, reward_model, sft, or "),
        ("toys.config:ToyJob", "job: 'toys.config:ToyJob' can't be imported: No module named 'toys'"),
        ("toy.config:Toyjob", "has no attribute 'Toyjob'"),
        ("toy.config:", "can't be imported"),
        (":ToyJob", "can't be imported"),
        ("toy.config:Texts", "is no class of jobs"),
        ("rlhf_ray.config.jobs:JOB_TYPES", "is no class of jobs"),
        ("rlhf_ray.config.jobs:EpochJob", "has no definition, job, placement,"),
    ],
)
def test_what_is_no_job_is_one_line(raw: dict[str, Any], job: str, said: str) -> None:
    assert said in problem_of(raw | {"job": job})


def test_a_module_that_fails_is_one_line(raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_job.py").write_text("raise RuntimeError('no\\nlicence')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert problem_of(raw | {"job": "broken_job:Job"}) == "job: 'broken_job:Job' can't be imported: no licence"


@pytest.mark.parametrize("definition", ["toy.job:TOI", "toy.config:ToyJob"])
def test_a_definition_that_is_none_is_one_line(
    raw: dict[str, Any], definition: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_config(raw)
    monkeypatch.setattr(type(config), "definition", definition)
    with pytest.raises(ConfigError, match=definition):
        definition_of(config)


def ppo(*overrides: str) -> PPOJob:
    config = load_config(Path(__file__).parents[2] / "configs/tiny_grpo.yaml", overrides)
    assert isinstance(config, PPOJob)
    return config


def test_roles_follow_from_what_an_estimator_of_ones_own_needs() -> None:
    assert ppo("algorithm.advantage=toy_plugs:SIGNED").critic is None
    assert ppo("algorithm.advantage=toy_plugs:VALUED").critic is not None
    with pytest.raises(ConfigError, match="but algorithm.advantage: toy_plugs:SIGNED compares"):
        ppo("algorithm.advantage=toy_plugs:SIGNED", "data.samples_per_prompt=1")
    with pytest.raises(ConfigError, match="toy_plugs:NONE"):
        ppo("algorithm.advantage=toy_plugs:NONE")


def test_nodes_must_have_the_module_of_a_loss_of_ones_own() -> None:
    config = ppo("algorithm.policy_loss=toy_plugs:LEARNT_ALONE")
    assert config.algorithm.loss.columns == ("engine_logprobs",)
    assert modules_and_variables(config)[0]["algorithm.policy_loss"] == "toy_plugs"
    assert "algorithm.policy_loss" not in modules_and_variables(ppo())[0]
