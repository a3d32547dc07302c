"""`rlhf-ray calibrate`: what this machine gives, for the planner."""

from pathlib import Path
from typing import Annotated

import typer

from rlhf_ray.cli.arguments import checked_path, writable_file


def calibrate(
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            callback=checked_path,
            help="File to write. By default calibration.yaml in the user's cache (~/.cache/rlhf_ray), where `plan` "
            "looks for it.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Measure what this machine gives of its peaks, for the times that `rlhf-ray plan` predicts. Takes two minutes.

    Starts a policy and rollout engines with small random models on a Ray cluster of its own, and measures them one
    after the other: let nothing else run meanwhile.

    \b
    Examples:
      rlhf-ray calibrate
      rlhf-ray calibrate --out h100.yaml
      rlhf-ray plan configs/quickstart.yaml --calibration h100.yaml
    """
    from rlhf_ray.cli.results import show
    from rlhf_ray.controllers.calibrate import calibrate as measure
    from rlhf_ray.planner.calibration import default_place, save_calibration

    path = writable_file(out or default_place())
    found = measure()
    save_calibration(found, path)
    assert found.rates is not None
    each = "GPU" if found.device == "gpu" else "core"
    show(
        [
            ("machine", found.machine),
            ("bfloat16", f"{found.rates.bfloat16_tflops:.3g} TFLOP/s a {each}"),
            ("float32", f"{found.rates.float32_tflops:.3g} TFLOP/s a {each}"),
            ("memory", f"{found.rates.memory_gb_s:.3g} GB/s a {each}"),
            ("training", f"{found.training.products:.2f} times the products' time at this peak, and more for the rest"),
            ("written", str(path)),
        ]
    )
