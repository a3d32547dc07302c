"""Numbers of micro-batches, read from the device once a step."""

import pytest
import torch

from rlhf_ray.actors.device_means import DeviceMean, StepNumbers, read_stats
from rlhf_ray.telemetry.metrics import Mean, sum_means


def test_they_are_what_reading_each_of_them_at_once_gives_to_the_last_bit() -> None:
    random = torch.Generator().manual_seed(0)
    numbers, wanted, losses = StepNumbers(), [], []
    for _ in range(50):
        loss, total = (torch.randn((), generator=random, requires_grad=True) * 1e3 for _ in range(2))
        weight = torch.randint(1, 99, (), generator=random)
        numbers.add({"a": DeviceMean(total, weight), "b": DeviceMean(total.double() / 3, 2)}, loss)
        wanted.append({"a": Mean(float(total), float(weight)), "b": Mean(float(total.double() / 3), 2.0)})
        losses.append(float(loss))
    assert numbers.read() == (losses, sum_means(wanted))


def test_the_device_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = StepNumbers()
    waits = []
    for name in ("tolist", "item", "__float__"):
        whole = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda tensor, whole=whole: (waits.append(1), whole(tensor))[1])
    for _ in range(3):
        numbers.add(
            {"a": DeviceMean(torch.ones(()), torch.ones(())), "b": DeviceMean(torch.ones(()), 4)}, torch.ones(())
        )
    assert not waits
    numbers.read()
    assert len(waits) == 1


def test_no_micro_batch_gives_no_numbers() -> None:
    assert StepNumbers().read() == ([], {})
    assert read_stats({}) == {}
    assert read_stats({"a": DeviceMean(1.0, 2)}) == {"a": Mean(1.0, 2)}
