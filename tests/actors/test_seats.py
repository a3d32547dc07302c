import pytest

from rlhf_ray.actors.group import Seat, _share
from rlhf_ray.cluster.placement import Place
from rlhf_ray.cluster.topology import Node


@pytest.mark.parametrize("parts", range(1, 12))
def test_colocated_roles_never_ask_for_more_than_their_bundle_holds(parts: int) -> None:
    for amount in (1.0, 0.5, 3.0, 0.0):
        share = _share(amount, parts)
        assert share * parts <= amount
        assert share == pytest.approx(amount / parts, abs=1e-4)
        assert round(share * 10_000) / 10_000 == share, "Ray counts in ten-thousandths"


def place(bundle: int, *devices: str) -> Place:
    return Place(None, bundle, Node("10.0.0.1", {}, {}), devices)  # type: ignore[arg-type]


def test_engines_on_the_places_of_ranks_see_the_devices_of_all_of_them() -> None:
    seat = Seat([place(1, "0"), place(0, "1"), place(3, "2"), place(2, "3")], 1.0, 0.0, 1, {}, span=2)
    assert [seat.place_of(rank).bundle for rank in (0, 1)] == [1, 3]
    assert [seat.devices_of(rank)["CUDA_VISIBLE_DEVICES"] for rank in (0, 1)] == ["0,1", "2,3"]


def test_ranks_on_their_own_places_see_what_ray_shows_them() -> None:
    seat = Seat([place(1, "0"), place(0, "1")], 1.0, 1.0, 1, {})
    assert [seat.place_of(rank).bundle for rank in (0, 1)] == [1, 0]
    assert seat.devices_of(1) == {}
    assert Seat([place(0)], 1.0, 0.0, 1, {}, span=1).devices_of(0) == {}, "on CPU there are none"
