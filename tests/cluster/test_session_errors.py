"""A cluster that can't be joined: which setting, why, and the cure, at once."""

import pytest
import ray
from ray.exceptions import AuthenticationError

from rlhf_ray.cluster import session
from rlhf_ray.cluster.session import ClusterError, ray_session
from rlhf_ray.config.placement import Cluster


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


def test_an_address_where_nothing_listens_is_told_at_once() -> None:
    with (
        pytest.raises(
            ClusterError, match=r"cluster.address: can't connect to 127.0.0.1:1 \(.*does not answer.*\): check"
        ),
        ray_session(Cluster(address="127.0.0.1:1"), "a"),
    ):
        pass


def test_the_dashboards_address_is_not_the_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with (
        pytest.raises(ClusterError, match=r"RAY_ADDRESS: can't connect to http://127.0.0.1:8265 .* give HOST:6379 or"),
        ray_session(Cluster(), "a"),
    ):
        pass


def test_a_missing_token_is_told_with_where_it_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise AuthenticationError("no token was found")

    monkeypatch.setattr(session, "_check_answers", lambda address: None)
    monkeypatch.setattr(session, "show_token", lambda address: None)
    monkeypatch.setattr(ray, "init", refuse)
    with (
        pytest.raises(ClusterError, match=r"10.0.0.5:6379 \(no token was found.*\): set RAY_AUTH_MODE=token, and"),
        ray_session(Cluster(address="10.0.0.5:6379"), "a"),
    ):
        pass
