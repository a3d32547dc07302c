"""To which clusters a token is shown."""

import pytest

from rlhf_ray.cluster.tokens import MODE, TOKEN, TOKEN_PATH, wants_token

FAR = "http://10.0.0.5:8265"


@pytest.mark.parametrize("address", ["auto", "http://127.0.0.1:8265", "localhost:6379", "http://[::1]:8265"])
def test_this_machines_token_is_shown_to_its_own_cluster(address: str) -> None:
    assert wants_token(address, {}, has_token=True)
    assert not wants_token(address, {}, has_token=False)


@pytest.mark.parametrize("address", [FAR, "head:6379", "http://localhost.example.org:8265"])
def test_this_machines_token_is_shown_to_no_other_machine(address: str) -> None:
    assert not wants_token(address, {}, has_token=True)


@pytest.mark.parametrize("name", [TOKEN, TOKEN_PATH])
def test_a_token_of_the_environment_is_shown(name: str) -> None:
    assert wants_token(FAR, {name: "x"}, has_token=True)
    assert not wants_token(FAR, {name: ""}, has_token=True)


def test_the_mode_that_is_set_decides() -> None:
    assert not wants_token("auto", {MODE: "disabled", TOKEN: "x"}, has_token=True)
    assert wants_token(FAR, {MODE: "token"}, has_token=False)
