"""Files of measured constants: written, read back, and refused by field."""

from pathlib import Path

import pytest

from rlhf_ray.config.loading import ConfigError
from rlhf_ray.planner.calibration import (
    Calibration,
    DeviceRates,
    default_place,
    defaults,
    load_calibration,
    save_calibration,
)


def measured() -> Calibration:
    rates = DeviceRates(bfloat16_tflops=0.512, float32_tflops=0.0731, memory_gb_s=7.77, link_gb_s=1.23)
    return defaults("cpu").model_copy(
        update={"machine": "two cores", "threads": 2, "rates": rates, "measured": ("rates", "scoring")}
    )


def test_a_file_reads_back_as_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "calibration.yaml"
    save_calibration(measured(), path)
    assert load_calibration(path) == measured()
    assert [file.name for file in path.parent.iterdir()] == ["calibration.yaml"]


def test_numbers_are_written_with_three_digits(tmp_path: Path) -> None:
    rates = DeviceRates(bfloat16_tflops=0.51234, float32_tflops=0.0731, memory_gb_s=7.77)
    save_calibration(measured().model_copy(update={"rates": rates}), tmp_path / "c.yaml")
    assert "bfloat16_tflops: 0.512\n" in (tmp_path / "c.yaml").read_text()


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_what_a_file_leaves_out_is_the_default_of_its_device(tmp_path: Path, device: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"device: {device}\noptimizer: {{traffic: 9.0, step_s: 0.5}}\n")
    found = load_calibration(path)
    assert found.optimizer.traffic == 9.0
    assert found.training == defaults(device).training  # type: ignore[arg-type]
    assert found.measured == ()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{}", "device: is required"),
        ("device: tpu", "device: input should be 'cpu' or 'gpu' (got 'tpu')"),
        ("device: cpu\noptimiser: {}", "optimiser: unknown key; did you mean 'optimizer'?"),
        ("device: cpu\noptimizer: {traffic: 2}", "optimizer.step_s: is required"),
        (
            "device: cpu\noptimizer: {traffic: -1, step_s: 0}",
            "optimizer.traffic: input should be greater than or equal to 0 (got -1)",
        ),
        (
            "device: cpu\noptimizer: {traffic: fast, step_s: 0}",
            "optimizer.traffic: should be a number, such as 0.5 or 1e-5 (got 'fast')",
        ),
        (
            "device: cpu\noptimizer: {traffic: .nan, step_s: 0}",
            "optimizer.traffic: input should be a finite number (got nan)",
        ),
        (
            "device: cpu\nrates: {bfloat16_tflops: 0, float32_tflops: 1, memory_gb_s: 1}",
            "rates.bfloat16_tflops: input should be greater than 0 (got 0)",
        ),
        ("device: cpu\nmeasured: [rates]", "measured names rates, but rates is missing"),
        ("device: cpu\nmeasured: [speed]", "measured: 'speed' is no section; known: rates"),
    ],
)
def test_bad_values_are_refused_by_field(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_calibration(path)
    assert error.value.source == str(path)
    assert any(found.startswith(problem) for found in error.value.problems), error.value.problems


def test_the_default_place_is_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_place() == tmp_path / "rlhf_ray" / "calibration.yaml"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_place() == tmp_path / ".cache" / "rlhf_ray" / "calibration.yaml"
