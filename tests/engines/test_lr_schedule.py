import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.config.training import Optimizer
from rlhf_ray.engines.training import lr_factor


def factors(steps: int, total: int, **settings: object) -> list[float]:
    factor = lr_factor(Optimizer(**settings), total)  # type: ignore[arg-type]
    return [factor(step) for step in range(steps)]


def test_constant_stays_at_the_peak() -> None:
    assert factors(5, 3) == [1.0] * 5


def test_warm_up_rises_linearly_and_never_starts_at_zero() -> None:
    assert factors(6, 9, warmup_steps=3) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_falls_to_its_end_after_the_last_step() -> None:
    assert factors(5, 4, schedule="linear") == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert factors(5, 4, schedule="linear", min_lr_ratio=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_cosine_is_half_way_down_at_half_time() -> None:
    found = factors(7, 4, schedule="cosine", min_lr_ratio=0.1)
    assert found == pytest.approx([0.1 + 0.9 * (1 + math.cos(math.pi * min(step, 4) / 4)) / 2 for step in range(7)])
    assert found[2] == pytest.approx(0.55)


@settings(deadline=None)
@given(
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    warmup=st.integers(0, 9),
    total=st.integers(1, 30),
    end=st.floats(0, 1),
)
def test_the_rate_rises_to_one_and_falls_no_deeper_than_its_end(
    schedule: str, warmup: int, total: int, end: float
) -> None:
    found = factors(40, total, schedule=schedule, warmup_steps=warmup, min_lr_ratio=end)
    assert found[:warmup] == sorted(found[:warmup])
    assert found[warmup] == 1.0
    assert found[warmup:] == sorted(found[warmup:], reverse=True)
    assert all(0 < factor <= 1 for factor in found[:warmup])
    assert all(end - 1e-9 <= factor <= 1 for factor in found[warmup:])
