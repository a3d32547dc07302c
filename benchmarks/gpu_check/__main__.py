"""The command: `python -m benchmarks.gpu_check`, which `scripts/gpu_check.sh` calls."""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu_check import kernels, serving, training
from benchmarks.gpu_check.check import Check, Outcome, Setting, exit_code, table, why_skipped
from benchmarks.gpu_check.process import CheckProcess
from benchmarks.gpu_check.training import LORA, moves, steps
from rlhf_ray.models.random_llama import LlamaSize, write_random_llama
from rlhf_ray.models.tiny import build_tiny_model
from rlhf_ray.platform import machine_name

_TRAINER = ("deepspeed",)
_LORA = (*_TRAINER, "peft")
_BOTH = (*_TRAINER, "ray", "vllm")

CHECKS: tuple[Check, ...] = (
    Check("attention against float64", kernels.attention),
    Check("log-prob head against float64", kernels.head),
    *(Check(f"optimizer step, ZeRO-{n}", partial(steps, stage=n), _TRAINER) for n in (0, 1, 2, 3)),
    *(Check(f"float32, ZeRO-{n}", partial(steps, stage=n, dtype="float32"), _TRAINER) for n in (0, 1, 2, 3)),
    *(Check(f"LoRA, ZeRO-{n}", partial(steps, stage=n, dtype="float32", adapters=LORA), _LORA) for n in (2, 3)),
    Check("LoRA beside 4 bits (nf4)", training.nf4, (*_LORA, "bitsandbytes"), gpus=1),
    *(Check(f"moves, ZeRO-{n}", partial(moves, stage=n), _TRAINER, alone=True) for n in (1, 2, 3)),
    *(Check(f"moves with LoRA, ZeRO-{n}", partial(moves, stage=n, adapters=LORA), _LORA, alone=True) for n in (2, 3)),
    Check("model FLOPs of an update", training.utilisation, _TRAINER, alone=True),
    Check("sync beside the policy", partial(serving.sync, together=True), _BOTH, alone=True, limit_s=240),
    Check(
        "sync to a device apart (nccl)", partial(serving.sync, together=False), _BOTH, gpus=2, alone=True, limit_s=240
    ),
    Check("sleep and wake", serving.sleep_and_wake, _BOTH, alone=True, limit_s=240),
    Check("rollout ÷ bare vLLM", serving.rollout, _BOTH, alone=True, limit_s=300),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks and print the table. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="gpu_check", description="Whether this machine computes what it should.")
    parser.add_argument("--only", metavar="TEXT", help="checks whose name has this text")
    parser.add_argument("--log", type=Path, default=Path("gpu_check.log"), help="what libraries print")
    given = parser.parse_args(arguments)
    checks = [check for check in CHECKS if given.only is None or given.only in check.name]
    if not checks:
        parser.error(f"--only {given.only!r}: no such check; they are: {', '.join(check.name for check in CHECKS)}")
    given.log.write_text("")
    with tempfile.TemporaryDirectory() as scratch:
        setting = _setting(Path(scratch))
        outcomes = _run(checks, setting, given.log)
    print(table(outcomes, setting.device))
    if exit_code(outcomes):
        print(f"what libraries printed is in {given.log}")
    return exit_code(outcomes)


def _run(checks: Sequence[Check], setting: Setting, log: Path) -> list[Outcome]:
    process, outcomes = CheckProcess(setting, log), list[Outcome]()
    try:
        for check in checks:
            reason = why_skipped(check, setting)
            print(f"{check.name} ...", end=" ", file=sys.stderr, flush=True)
            outcomes.append(Outcome(check.name, "skip", reason) if reason else process.run(check))
            print(outcomes[-1].state, file=sys.stderr, flush=True)
    finally:
        process.end()
    return outcomes


def _setting(scratch: Path) -> Setting:
    """The device of this machine, and the models that are made for it."""
    gpus = torch.cuda.device_count()
    size = LlamaSize(hidden=256, layers=2, intermediate=512, vocab=512)
    if gpus:  # about 1 billion parameters, 16 GB with their optimizer state, or a quarter of it
        roomy = torch.cuda.get_device_properties(0).total_memory > 30e9
        size = LlamaSize(2048, 18, 5632, 32000) if roomy else LlamaSize(1024, 16, 2816, 32000)
    return Setting(
        device=machine_name() if gpus else f"cpu ({machine_name()}): what only a GPU can show is not shown here",
        gpus=gpus,
        tiny=build_tiny_model(scratch / "tiny", hidden=128, layers=2),
        large=write_random_llama(scratch / "large", size),
        scratch=scratch,
    )


if __name__ == "__main__":
    sys.exit(main())
