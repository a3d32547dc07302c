import pytest

from rlhf_ray.actors.group import _bundle, _share


@pytest.mark.parametrize("parts", range(1, 12))
def test_colocated_roles_never_ask_for_more_than_their_bundle_holds(parts: int) -> None:
    for amount in (1.0, 0.5, 3.0, 0.0):
        share = _share(amount, parts)
        assert share * parts <= amount
        assert share == pytest.approx(amount / parts, abs=1e-4)
        assert round(share * 10_000) / 10_000 == share, "Ray counts in ten-thousandths"


def test_a_role_that_reserves_nothing_still_has_a_bundle() -> None:
    assert _bundle(2.0, 1.0) == {"CPU": 2.0, "GPU": 1.0}
    assert _bundle(0.0, 1.0) == {"GPU": 1.0}
    assert _bundle(0.0, 0.0) == {"CPU": 0.001}
