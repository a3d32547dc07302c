"""What the planner predicts, against what is measured: `python -m benchmarks.plan_accuracy`.

Each case is a job that runs here for a few steps as `rlhf-ray train` runs it, on rows of the longest that its config
allows. Predicted is what `rlhf-ray plan` says of this machine. Measured is the most memory that a process of each role
holds in the first two steps (an engine in all its processes), looked at all the time; and the fastest step after them,
without its checkpoint, which was disturbed least. Step times need a calibration of this machine (`rlhf-ray calibrate`).
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from benchmarks.common import RESULTS, Machine, Measure, ResultsOption, report, run_command, say, spread
from benchmarks.measured_job import WATCHED_STEPS, measured_job
from benchmarks.plan_cases import CASES
from rlhf_ray.config.jobs import Job, PPOJob
from rlhf_ray.planner.calibration import constants
from rlhf_ray.planner.devices import GIB
from rlhf_ray.planner.hardware import this_machine
from rlhf_ray.planner.jobs import lengths_of
from rlhf_ray.planner.memory import MemoryPlan, plan_memory
from rlhf_ray.planner.step_time import StepTime, predict
from rlhf_ray.planner.work import Lengths
from rlhf_ray.platform import machine_name
from rlhf_ray.telemetry.metrics import Metrics


def main(
    only: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Cases with this in their name.")] = None,
    steps: Annotated[
        int, typer.Option(min=WATCHED_STEPS + 1, help=f"Steps of each job; the first {WATCHED_STEPS} count for memory.")
    ] = WATCHED_STEPS + 2,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="By default what was measured on this machine.", exists=True)
    ] = None,
    results: ResultsOption = RESULTS,
) -> None:
    """Predicted ÷ measured peak memory of each role and step time."""
    known = constants(calibration, machine_name())
    if not known["cpu"].measured and not known["gpu"].measured:
        say("no calibration of this machine was found: step times are predicted from defaults")
    for name, case in CASES.items():
        if only and not any(part in name for part in only):
            continue
        machine = Machine.here()
        with TemporaryDirectory(prefix="rlhf_ray-benchmark-") as made:
            job = case.job(Path(made), steps)
            hardware = this_machine(None)
            plan = plan_memory(job, hardware, known[hardware.device].memory)
            step = predict(job, hardware, known, _lengths(job), plan.engine.cached_tokens if plan.engine else None)
            measured = measured_job(job)
        measures = [*_memory(plan, measured.peaks, _unwritten(job, plan)), *_time(step, measured.rows)]
        for measure in measures:
            say(f"{name}: {measure}")
        report("plan_accuracy", name, {"steps": steps}, measures, machine, results)


def _unwritten(job: Job, plan: MemoryPlan) -> dict[str, float]:
    """Bytes of the KV cache of an engine on a CPU that so few steps don't write to: until then the kernel gives no
    memory for them."""
    if not isinstance(job, PPOJob) or plan.engine is None:
        return {}
    cache = next(item.size for item in plan.engine.items if item.name == "KV cache")
    written = WATCHED_STEPS * job.samples_per_step * job.rollout.engine.max_model_len / job.placement.rollout.engines
    return {"rollout": cache * max(0.0, 1 - written / plan.engine.cached_tokens)}


def _memory(plan: MemoryPlan, peaks: dict[str, int], unwritten: dict[str, float]) -> list[Measure]:
    measures = []
    for role, peak in sorted(peaks.items()):
        uses = [use for pool in plan.pools for use in pool.uses if use.role.startswith(role)]
        predicted = max(max(use.held) for use in uses) - unwritten.get(role, 0.0)
        measures += [
            Measure(name=f"predicted ÷ measured memory of {role}", value=predicted / peak, asked="0.90 to 1.10"),
            Measure(name=f"predicted memory of {role}", value=predicted / GIB, unit="GiB"),
            Measure(name=f"measured memory of {role}", value=peak / GIB, unit="GiB"),
        ]
    return measures


def _lengths(job: Job) -> Lengths:
    """Rows of the cases are as long as they may be; those of pairs have hardly a prompt."""
    return (
        lengths_of(job)
        if isinstance(job, PPOJob)
        else lengths_of(job, 0, job.step_shape.prompt + job.step_shape.response)
    )


def _time(step: StepTime, rows: list[Metrics]) -> list[Measure]:
    fastest = min(rows, key=_seconds)
    measures = [
        Measure(name="predicted ÷ measured step time", value=step.seconds / _seconds(fastest), asked="0.80 to 1.20"),
        Measure(name="predicted step time", value=step.seconds, unit="s"),
        Measure(name="measured step time", value=_seconds(fastest), unit="s"),
        spread([_seconds(row) for row in rows]),
    ]
    for phase, predicted in step.phases.items():
        if (metric := f"time/{phase}_s") in fastest:
            measures.append(Measure(name=f"predicted ÷ measured {phase}", value=predicted / fastest[metric]))
    return measures


def _seconds(row: Metrics) -> float:
    return row["time/step_s"] - row.get("time/checkpoint_s", 0.0)


if __name__ == "__main__":
    run_command(main)
