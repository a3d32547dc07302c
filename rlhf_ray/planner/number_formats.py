"""What `dtype: auto` becomes on CPUs that can't be looked at: by the rates that the plan computes with."""

from pathlib import Path

from rlhf_ray.config.number_formats import Look
from rlhf_ray.planner.calibration import Calibration
from rlhf_ray.planner.devices import DEVICES
from rlhf_ray.platform import CpuProducts


def planned_cpus(constants: Calibration, path: Path | None) -> Look:
    """For CPUs with these constants.

    Args:
        path: of the file that they are from.
    """
    rates, kind = constants.rates, DEVICES["CPU"]
    bfloat16 = kind.bfloat16_tflops if rates is None else rates.bfloat16_tflops
    float32 = kind.float32_tflops if rates is None else rates.float32_tflops
    machine = "this plan" if rates is None or path is None else str(path)
    found = CpuProducts(
        bfloat16 > float32,
        f"multiplies with {bfloat16:.3g} TFLOP/s a core in bfloat16, {float32:.3g} in float32",
        f"{float32 / bfloat16:.2g} times as long",
    )
    return lambda role: {machine: found}
