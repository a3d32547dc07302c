"""Which devices the driver is asked about. The driver is the outside service here."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_ray import platform


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the driver's library is asked for, of a node with four GPUs."""
    found: list[Any] = []

    def handle(name: Any) -> Any:
        found.append(name)
        return name

    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetHandleByIndex=handle,
        nvmlDeviceGetMemoryInfo=lambda _: SimpleNamespace(used=3, total=10),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(platform, "platform", lambda: SimpleNamespace(device=torch.device("cuda", 0)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    uuids = [f"GPU-{number}" for number in range(4)]
    monkeypatch.setattr(torch.cuda, "_raw_device_uuid_nvml", lambda: uuids)
    return found


@pytest.mark.parametrize(("shown", "devices"), [("3,1", [3, 1]), ("GPU-2,GPU-0", [2, 0])])
def test_whole_gpus_are_asked_about_by_number(
    asked: list[Any], monkeypatch: pytest.MonkeyPatch, shown: str, devices: list[int]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert platform.device_memory() == (6, 20)
    assert asked == devices


def test_a_slice_of_a_gpu_is_asked_about_by_name(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-5c1e,MIG-77aa")
    assert platform.device_memory() == (3, 10)
    assert asked == ["MIG-5c1e"]
