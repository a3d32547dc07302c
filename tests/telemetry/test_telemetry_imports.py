"""Telemetry is imported by actors and by the command line, so it loads the heavy libraries only when used."""

import subprocess
import sys

PROGRAM = """
import importlib, pkgutil, sys
import rlhf_ray.telemetry as package
for module in pkgutil.iter_modules(package.__path__):
    importlib.import_module(f"rlhf_ray.telemetry.{module.name}")
heavy = ("torch", "tensorboard", "matplotlib", "ray", "vllm", "deepspeed", "wandb", "mlflow")
sys.exit(", ".join(name for name in heavy if name in sys.modules) or 0)
"""


def test_importing_telemetry_loads_no_heavy_library() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"imported: {done.stderr}"
