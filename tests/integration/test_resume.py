"""A run that was stopped goes on as if it had not been, to the last bit."""

import logging
import shutil
from pathlib import Path

import pytest

from rlhf_ray.controllers.train import ResumeError, train
from rlhf_ray.recovery.checkpoints import CheckpointStore
from rlhf_ray.telemetry.metrics import Metrics, read_metrics
from rlhf_ray.telemetry.samples import read_samples
from runs import MakeConfig, exported_weights, without_clock

STEPS, STOPPED = 4, 2

# Everything that a step depends on moves: several optimizer steps and their order, learning rate, β, the running
# statistics of the scores, the order of the prompts beyond the first epoch, the sampling of later visits.
SETTINGS = (
    "run.deterministic=true",
    f"run.steps={STEPS}",
    f"run.checkpoint_every={STOPPED}",
    "run.keep_last=9",
    "algorithm.epochs=2",
    "algorithm.optimizer_steps=2",
    "algorithm.normalise_scores=true",
    "algorithm.kl.target=0.5",
    "algorithm.kl.horizon=100",
    "policy.optimizer.schedule=linear",
    "critic.optimizer.schedule=cosine",
    "critic.optimizer.warmup_steps=3",
    "data.prompts_per_step=24",
    "rollout.sampling.top_k=50",
    "run.tensorboard=false",
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, ppo_config: MakeConfig) -> Path:
    return train(ppo_config(tmp_path_factory.mktemp("undisturbed") / "run", *SETTINGS))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, undisturbed: Path) -> Path:
    """The run folder as a kill within step 4 leaves it, with a later checkpoint that is damaged."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    shutil.copytree(undisturbed, folder)
    for leftover in ("export", "before_after.md", "curves.png"):
        path = folder / leftover
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    weights = next((folder / f"checkpoints/step_{STEPS:06d}/policy/state").glob("*model_states.pt"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def resumed(stopped: Path, ppo_config: MakeConfig, undisturbed: Path) -> tuple[Path, list[str]]:
    """The same folder after `train` again, and what that warned of."""
    warnings: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warnings.append(record.getMessage())

    handler = Keep(logging.WARNING)
    logging.getLogger("rlhf_ray").addHandler(handler)
    try:
        return train(ppo_config(stopped, *SETTINGS)), warnings
    finally:
        logging.getLogger("rlhf_ray").removeHandler(handler)


def test_a_damaged_checkpoint_is_named_and_skipped(resumed: tuple[Path, list[str]]) -> None:
    folder, warnings = resumed
    named = [text for text in warnings if "skipped a checkpoint that can't be used" in text]
    assert named
    assert all(f"step_{STEPS:06d}: checksum differs: policy/state/" in text for text in named)
    assert CheckpointStore(folder, keep_last=9, keep_best=None).steps() == [STOPPED, STEPS]


def test_a_resumed_run_gives_the_same_rows_to_the_last_bit(undisturbed: Path, resumed: tuple[Path, list[str]]) -> None:
    wanted = [without_clock(row) for row in read_metrics(undisturbed)]
    found = [without_clock(row) for row in read_metrics(resumed[0])]
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    assert_rows_equal(found, wanted)


def assert_rows_equal(found: list[Metrics], wanted: list[Metrics]) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.keys() == theirs.keys()
        different = {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}
        assert not different, f"step {mine['step']}"


def test_the_state_that_must_be_carried_over_did_move(undisturbed: Path) -> None:
    """Else the test above would prove little."""
    rows = read_metrics(undisturbed)
    for name in ("kl/coef", "policy/lr", "critic/lr", "reward/mean", "kl/mean"):
        assert len({row[name] for row in rows}) == STEPS, name
    assert {row["policy/optimizer_steps"] for row in rows} == {4.0}


def test_a_resumed_run_samples_the_same_and_ends_with_the_same_model(
    undisturbed: Path, resumed: tuple[Path, list[str]]
) -> None:
    folder, _ = resumed
    assert read_samples(folder) == read_samples(undisturbed)
    assert (folder / "before_after.md").read_text() == (undisturbed / "before_after.md").read_text()
    mine, theirs = exported_weights(folder / "export"), exported_weights(undisturbed / "export")
    assert mine.keys() == theirs.keys()
    assert all(mine[name].equal(theirs[name]) for name in mine)


def test_the_controllers_state_is_the_same_in_the_end(undisturbed: Path, resumed: tuple[Path, list[str]]) -> None:
    mine, theirs = (CheckpointStore(run, keep_last=9, keep_best=None).latest() for run in (resumed[0], undisturbed))
    assert mine is not None
    assert theirs is not None
    assert mine.state == theirs.state


def test_a_folder_with_a_checkpoint_is_refused_where_resuming_is_off(undisturbed: Path, ppo_config: MakeConfig) -> None:
    with pytest.raises(ResumeError, match=rf"run.resume is 'never', but .* holds a checkpoint of step {STEPS}"):
        train(ppo_config(undisturbed, *SETTINGS, "run.resume=never"))
