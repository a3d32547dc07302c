"""What the planner predicts, against what is measured here: `python -m benchmarks.plan_accuracy`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import ROOT, run_command, say
from benchmarks.measured_job import folder, measured_job
from rlhf_ray.cluster.planner.hardware import this_machine
from rlhf_ray.cluster.planner.memory import plan_memory
from rlhf_ray.cluster.planner.processes import ProcessMemory
from rlhf_ray.config.jobs import JobConfig
from rlhf_ray.config.loading import parse_config

Raw = dict[str, Any]
SMOLLM = str(ROOT / "models/smollm2-135m")


def sft(model: str = SMOLLM, *, rows: int, tokens: int, ranks: int = 1, lora: Raw | None = None, **engine: Any) -> Raw:
    return {
        "job": "sft",
        "name": "plan-accuracy",
        "policy": {"model": model, "engine": engine, "lora": lora},
        "data": {"train": "", "rows_per_step": rows, "max_tokens": tokens, "overlong": "truncate"},
        "placement": {"policy": {"ranks": ranks, "cpus": 2 // ranks}},
    }


CASES: dict[str, Raw] = {
    "z2 512x4": sft(rows=8, tokens=512, zero_stage=2, micro_batch_tokens=2048),
    "z2 128x2": sft(rows=8, tokens=128, zero_stage=2, micro_batch_tokens=256),
    "z0 bf16": sft(rows=8, tokens=256, zero_stage=0, micro_batch_tokens=1024),
    "z1 fp32": sft(rows=4, tokens=256, zero_stage=1, micro_batch_tokens=512, dtype="float32"),
    "z3 r2": sft(rows=8, tokens=256, ranks=2, zero_stage=3, micro_batch_tokens=1024),
    "z1 r2": sft(rows=8, tokens=256, ranks=2, zero_stage=1, micro_batch_tokens=1024),
    "z2 ckpt": sft(rows=8, tokens=512, zero_stage=2, micro_batch_tokens=4096, activation_checkpointing=True),
    "lora": sft(rows=8, tokens=512, zero_stage=2, micro_batch_tokens=2048, lora={"rank": 16}),
}


def main(
    only: Annotated[list[str] | None, typer.Option(help="Names of cases.")] = None,
    steps: int = 3,
) -> None:
    """Predicted and measured peak memory."""
    for name, raw in CASES.items():
        if only and name not in only:
            continue
        with folder() as out:
            job = _job(raw, out, steps)
            plan = plan_memory(job, this_machine(None), ProcessMemory())
            predicted = {t.role: (max(t.held), t.parts) for t in plan.shelves[-1].tenants if t.rank == 0}
            measured = measured_job(job)
            for role, peak in measured.peaks.items():
                size, parts = predicted[role]
                say(
                    f"{name:12s} {role:10s} predicted {size / 2**20:8.0f} measured {peak / 2**20:8.0f} MiB "
                    f"{size / peak - 1:+.1%}  " + ", ".join(f"{i.name} {i.size / 2**20:.0f}" for i in parts)
                )


def _job(raw: Raw, out: Path, steps: int) -> JobConfig:
    made = json.loads(json.dumps(raw))
    text = "The film begins slowly, and then it finds its own voice. " * 400
    rows = raw["data"]["rows_per_step"] * steps
    (out / "rows.jsonl").write_text("".join(json.dumps({"text": f"{n} {text}"}) + "\n" for n in range(rows)))
    made["data"]["train"] = str(out / "rows.jsonl")
    made["run"] = {"dir": str(out / "run"), "checkpoint_every": 0, "trace": False}
    return parse_config(made)


if __name__ == "__main__":
    run_command(main)
