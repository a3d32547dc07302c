"""What a human judgement is worth, by what was asked: `python -m benchmarks.reward_labels`.

Reward models learn from pairs, choices of the best of four and rankings of four movie snippets, 400 judgements of each,
and from 800 pairs, which have as many texts as the fours. All are the same model with the same learning rate and number
of steps, and are judged by the same held-out pairs. Started again, the command goes on where it was stopped.
"""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import ROOT, Findings, Measure, run_benchmark, say
from rlhf_ray.config.jobs import RewardModelJob
from rlhf_ray.config.loading import load_config
from rlhf_ray.controllers.train import train
from rlhf_ray.telemetry.progress import setup_logging
from rlhf_ray.telemetry.reward_report import read_report


@dataclass(frozen=True)
class Learner:
    """A reward model to train.

    Attributes:
        name: what it learns from.
        config: in configs/.
        overrides: of the config.
        asked: bound of its accuracy.
    """

    name: str
    config: str
    overrides: tuple[str, ...] = ()
    asked: str = ""


ConfigsOption = Annotated[Path, typer.Option(help="Folder of the configs.", exists=True, file_okay=False)]
RunsOption = Annotated[Path, typer.Option(help="Folder that the runs are kept in, without their models.")]

LEARNERS = (
    Learner("800 pairs", "reward_model.yaml", asked="at least 0.83"),
    Learner("400 pairs", "reward_model.yaml", ("data.train_rows=400", "data.rows_per_step=16")),
    Learner("400 choices of the best of 4, softmax", "reward_choices.yaml"),
    Learner("400 rankings of 4, Plackett–Luce", "reward_rankings.yaml"),
    Learner("400 rankings of 4, all pairs", "reward_rankings.yaml", ("loss.type=all_pairs",)),
)


def main(configs: ConfigsOption = ROOT / "configs", runs: RunsOption = ROOT / "runs" / "reward-labels") -> Findings:
    """Held-out accuracy of reward models by the kind of their labels, with 95 % intervals."""
    setup_logging()
    accuracies: list[Measure] = []
    errors: list[Measure] = []
    pairs = 0
    for learner in LEARNERS:
        folder = runs / re.sub(r"\W+", "-", learner.name)
        found = _trained(load_config(configs / learner.config, [*learner.overrides, f"run.dir={folder}"]), folder)
        share = found["accuracy"]
        pairs = share["count"]
        accuracies.append(
            Measure(
                f"accuracy after {learner.name}",
                share["value"],
                interval=(share["low"], share["high"]),
                asked=learner.asked,
            )
        )
        errors.append(Measure(f"calibration error after {learner.name}", found["calibration_error"]))
        say(str(accuracies[-1]))
    return {"smollm2-135m, movie ratings": [*accuracies, *errors, Measure("held-out pairs", pairs)]}


def _trained(config: Any, folder: Path) -> dict[str, Any]:
    """The report of a run; one that is complete has no checkpoints any more."""
    assert isinstance(config, RewardModelJob)
    checkpoints = folder / "checkpoints"
    if checkpoints.exists() or not (folder / "reward_report.json").exists():
        train(config.model_copy(update={"run": config.run.model_copy(update={"export": False})}))
        shutil.rmtree(checkpoints)
    return read_report(folder)


if __name__ == "__main__":
    run_benchmark(main)
