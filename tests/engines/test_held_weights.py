import pytest

from rlhf_ray.config.roles import Level
from rlhf_ray.engines.held_weights import HeldWeights, WeightsMissing

OUT, WEIGHTS, FULL = Level.OUT, Level.WEIGHTS, Level.FULL


def loaded(*, keeps: bool) -> HeldWeights:
    held = HeldWeights(keeps=keeps)
    held.has(0)
    return held


def test_an_engine_has_nothing_before_it_has_loaded() -> None:
    with pytest.raises(
        WeightsMissing, match=r"rollout can't generate: it has not loaded any weights yet\. A weight sync"
    ):
        HeldWeights(keeps=True).check_generating()


@pytest.mark.parametrize("levels", [(OUT,), (WEIGHTS,), (OUT, FULL), (OUT, WEIGHTS, FULL), (WEIGHTS, FULL)])
def test_whoever_goes_loses_its_weights_unless_they_stay_in_host_memory(levels: tuple[Level, ...]) -> None:
    deep, light = loaded(keeps=False), loaded(keeps=True)
    assert [deep.moved(level) for level in levels] == [True] + [False] * (len(levels) - 1)
    assert not any([light.moved(level) for level in levels])
    assert (deep.version, light.version) == (None, 0)
    with pytest.raises(WeightsMissing, match="it left its devices to other roles and dropped its weights"):
        deep.check_generating()
    with pytest.raises(WeightsMissing):
        deep.check_queueing()
    light.check_generating()


def test_while_weights_arrive_prompts_may_be_queued_but_not_answered() -> None:
    held = loaded(keeps=False)
    held.moved(OUT)
    held.moved(WEIGHTS)
    held.arriving()
    held.check_queueing()
    with pytest.raises(WeightsMissing, match="the weight sync that began last has not ended"):
        held.check_generating()
    held.has(7)
    held.moved(FULL)
    held.check_generating()
    assert held.version == 7


def test_after_a_sync_that_failed_half_way_nothing_may_be_queued() -> None:
    held = loaded(keeps=True)
    held.arriving()
    held.lost("its last weight sync failed half-way")
    for check in (held.check_queueing, held.check_generating):
        with pytest.raises(WeightsMissing, match="failed half-way"):
            check()


def test_weights_do_not_come_where_there_is_no_memory_for_them() -> None:
    held = loaded(keeps=True)
    held.moved(OUT)
    with pytest.raises(WeightsMissing, match="take new weights: .* come to level WEIGHTS first") as caught:
        held.arriving()
    assert (caught.value.role, caught.value.work) == ("rollout", "take new weights")
    assert held.version == 0, "what it keeps is untouched"
