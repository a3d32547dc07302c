"""`rlhf-ray calibrate` on a model so small that it says little, with all the actors of the real one."""

from pathlib import Path

from rlhf_ray.actors.probe import Samples
from rlhf_ray.controllers.calibrate import MIB, Decoding, Sizes, calibrate
from rlhf_ray.models.random_llama import LlamaSize
from rlhf_ray.planner.calibration import load_calibration, save_calibration

TINY = Sizes(
    product=128,
    copy=MIB,
    collective=MIB,
    stored=MIB,
    models=(LlamaSize(256, 1, 256, 1024),),
    passes=(Samples(2, 12, 4), Samples(4, 4, 12)),
    decoding=(Decoding(1, 16), Decoding(4, 64)),
    long=8,
)


def test_everything_is_measured_and_read_back(tmp_path: Path) -> None:
    found = calibrate(TINY)
    everything = {"rates", "scoring", "training", "optimizer", "generation", "collectives", "weight_sync"}
    assert set(found.measured) == everything | {"ray", "start", "memory"}
    assert found.device == "cpu"
    assert found.threads
    assert found.machine.endswith(f"{found.threads} cores")
    assert found.rates is not None
    assert found.rates.bfloat16_tflops > 0
    assert found.memory.rank_mib > 100
    save_calibration(found, tmp_path / "c.yaml")
    assert load_calibration(tmp_path / "c.yaml").measured == found.measured
