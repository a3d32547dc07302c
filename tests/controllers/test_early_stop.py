import pytest

from rlhf_ray.config.run import KeepBest
from rlhf_ray.controllers.early_stop import EarlyStop


def see(stop: EarlyStop, values: list[float]) -> list[bool]:
    return [stop.is_best({"eval/x": value}) for value in values]


@pytest.mark.parametrize(
    ("mode", "values", "best"),
    [("min", [3, 2, 2, 1, 1.5], [True, True, False, True, False]), ("max", [1, 0, 2, 2], [True, False, True, False])],
)
def test_a_new_best_is_better_than_all_before(mode: str, values: list[float], best: list[bool]) -> None:
    assert see(EarlyStop(KeepBest(metric="eval/x", mode=mode), 9), values) == best  # type: ignore[arg-type]


def test_it_is_over_after_patience_evaluations_without_a_new_best() -> None:
    stop = EarlyStop(KeepBest(metric="eval/x", mode="min"), 2)
    over = []
    for value in (3.0, 4.0, 2.0, 2.0, 5.0):
        stop.is_best({"eval/x": value})
        over.append(stop.over)
    assert over == [False, False, False, False, True]


def test_it_goes_on_from_its_state() -> None:
    first, second = (EarlyStop(KeepBest(metric="eval/x", mode="max"), 2) for _ in range(2))
    see(first, [1.0, 3.0, 2.0])
    second.load_state_dict(first.state_dict())
    assert see(second, [3.0]) == [False]
    assert second.over


def test_what_is_no_number_is_never_the_best() -> None:
    stop = EarlyStop(KeepBest(metric="eval/x", mode="min"), 2)
    assert see(stop, [float("nan"), 3.0, float("nan"), float("nan")]) == [False, True, False, False]
    assert stop.over
