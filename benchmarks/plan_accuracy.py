"""What the planner predicts, against what is measured: `python -m benchmarks.plan_accuracy`.

Each case is a job that runs here for a few steps as `rlhf-ray train` runs it, on rows of the longest that its config
allows. Predicted is what `rlhf-ray plan` says of this machine. Measured is the peak resident memory of a process of
each role (`VmHWM`; for an engine of all its processes), as the kernel keeps it.
"""

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.common import RESULTS, Machine, Measure, ResultsOption, report, run_command, say
from benchmarks.measured_job import folder, measured_job
from benchmarks.plan_cases import CASES
from rlhf_ray.cluster.planner.hardware import this_machine
from rlhf_ray.cluster.planner.memory import MemoryPlan, plan_memory
from rlhf_ray.cluster.planner.processes import ProcessMemory

GIB = 2**30


def main(
    only: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Cases with this in their name.")] = None,
    steps: Annotated[int, typer.Option(min=2, help="Steps of each job; the first counts for memory only.")] = 3,
    results: ResultsOption = RESULTS,
) -> None:
    """Predicted ÷ measured peak memory of each role."""
    for name, case in CASES.items():
        if only and not any(part in name for part in only):
            continue
        machine = Machine.here()
        with folder() as made:
            job = case.job(Path(made), steps)
            plan = plan_memory(job, this_machine(None), ProcessMemory())
            measured = measured_job(job)
        measures = list(_memory(plan, measured.peaks))
        for measure in measures:
            say(f"{name}: {measure}")
        report("plan_accuracy", name, {"steps": steps}, measures, machine, results)


def _memory(plan: MemoryPlan, peaks: dict[str, int]) -> list[Measure]:
    measures = []
    for role, peak in sorted(peaks.items()):
        predicted = max(
            max(tenant.held) for shelf in plan.shelves for tenant in shelf.tenants if tenant.role.startswith(role)
        )
        measures += [
            Measure(name=f"predicted ÷ measured memory of {role}", value=predicted / peak, asked="0.90 to 1.10"),
            Measure(name=f"predicted memory of {role}", value=predicted / GIB, unit="GiB"),
            Measure(name=f"measured memory of {role}", value=peak / GIB, unit="GiB"),
        ]
    return measures


if __name__ == "__main__":
    run_command(main)
