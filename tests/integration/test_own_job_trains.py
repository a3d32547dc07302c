"""A job of one's own from its config to a model, and resumed."""

import shutil
from pathlib import Path
from typing import Any

from rlhf_ray.config.loading import parse_config
from rlhf_ray.controllers.train import train
from rlhf_ray.recovery.convert import export_checkpoint
from rlhf_ray.telemetry.metrics import read_metrics
from runs import exported_weights


def test_a_job_of_ones_own_trains_resumes_and_exports(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("a film\nno word of it\nanother film\n")
    raw: dict[str, Any] = {
        "job": "toy.config:ToyJob",
        "name": "toy",
        "student": {"model": f"{tiny}/models/tiny", "engine": {"dtype": "float32"}, "optimizer": {"lr": 1e-3}},
        "data": {"texts": str(tmp_path / "texts.txt")},
        "run": {"dir": str(tmp_path / "run"), "steps": 2, "checkpoint_every": 1, "tensorboard": False},
    }
    folder = train(parse_config(raw))
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == [1, 2]

    again = tmp_path / "again"
    shutil.copytree(folder, again)
    shutil.rmtree(again / "export")
    shutil.rmtree(again / "checkpoints/step_000002")
    train(parse_config(raw | {"run": raw["run"] | {"dir": str(again)}}))
    assert [row["train/loss"] for row in read_metrics(again)] == [row["train/loss"] for row in rows]

    exported = export_checkpoint(again, tmp_path / "model")
    assert (exported.role, exported.scalar) == ("student", False)
    mine, theirs = exported_weights(exported.folder), exported_weights(folder / "export")
    assert all(mine[name].equal(tensor) for name, tensor in theirs.items())
