import pytest

from rlhf_ray.actors.start import ResourceSpec, _equal_part
from rlhf_ray.cluster.assignment import PlacementError
from rlhf_ray.cluster.placement import Bundle, _rank_of
from rlhf_ray.cluster.topology import Node


@pytest.mark.parametrize("count", range(1, 12))
def test_colocated_roles_never_ask_for_more_than_their_bundle_holds(count: int) -> None:
    for amount in (1.0, 0.5, 3.0, 0.0):
        part = _equal_part(amount, count)
        assert part * count <= amount
        assert part == pytest.approx(amount / count, abs=1e-4)
        assert round(part * 10_000) / 10_000 == part, "Ray counts in ten-thousandths"


def bundle(index: int, *devices: str) -> Bundle:
    return Bundle(None, index, Node("10.0.0.1", {}, {}), devices)  # type: ignore[arg-type]


def test_engines_on_the_bundles_of_ranks_see_the_devices_of_all_of_them() -> None:
    spec = ResourceSpec([bundle(1, "0"), bundle(0, "1"), bundle(3, "2"), bundle(2, "3")], 1.0, 0.0, 1, {}, span=2)
    assert [spec.bundle_of(rank).index for rank in (0, 1)] == [1, 3]
    assert [spec.devices_of(rank)["CUDA_VISIBLE_DEVICES"] for rank in (0, 1)] == ["0,1", "2,3"]


def test_ranks_on_their_own_bundles_see_what_ray_shows_them() -> None:
    spec = ResourceSpec([bundle(1, "0"), bundle(0, "1")], 1.0, 1.0, 1, {})
    assert [spec.bundle_of(rank).index for rank in (0, 1)] == [1, 0]
    assert spec.devices_of(1) == {}
    assert ResourceSpec([bundle(0)], 1.0, 0.0, 1, {}, span=1).devices_of(0) == {}, "on CPU there are none"


def test_devices_that_are_shown_by_name_are_passed_on_by_name() -> None:
    names = ["GPU-8f3a9c1e-0d52-4f3b-9a55-2b1f6f0f4f11", "GPU-0b7d11aa-77c5-4a57-8f0e-1a2b3c4d5e6f"]
    spec = ResourceSpec([bundle(0, names[0]), bundle(1, names[1])], 1.0, 0.0, 1, {}, span=2)
    assert spec.devices_of(0)["CUDA_VISIBLE_DEVICES"] == ",".join(names)


def test_an_engine_over_several_slices_of_a_gpu_is_refused() -> None:
    spec = ResourceSpec([bundle(0, "MIG-a"), bundle(1, "MIG-b")], 1.0, 0.0, 1, {}, span=2)
    with pytest.raises(PlacementError, match="MIG-a and MIG-b, but CUDA shows a process one slice"):
        spec.devices_of(0)
    alone = ResourceSpec([bundle(0, "MIG-a"), bundle(1, "MIG-b")], 1.0, 0.0, 1, {}, span=1)
    assert [alone.devices_of(rank)["CUDA_VISIBLE_DEVICES"] for rank in (0, 1)] == ["MIG-a", "MIG-b"]


def test_devices_have_an_order_whether_ray_tells_numbers_or_names() -> None:
    assert sorted(["10", "9", "1"], key=_rank_of) == ["1", "9", "10"]
    named = ["MIG-5c1e", "GPU-8f3a", "GPU-0b7d"]
    assert sorted(named, key=_rank_of) == ["GPU-0b7d", "GPU-8f3a", "MIG-5c1e"]
