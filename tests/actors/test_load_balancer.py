from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.actors.rollout import LoadBalancer


def test_a_shard_goes_to_the_engine_with_the_fewest_tokens() -> None:
    balancer = LoadBalancer(engines=3, capacity=100)
    assert [balancer.place(tokens, 1) for tokens in (50, 20, 30, 10, 10, 10)] == [0, 1, 2, 1, 1, 2]
    balancer.done(0, 50, 1)
    assert balancer.place(1, 1) == 0


def test_full_engines_are_left_alone_until_a_shard_comes_back() -> None:
    balancer = LoadBalancer(engines=2, capacity=4)
    assert [balancer.place(1, 2) for _ in range(5)] == [0, 1, 0, 1, None]
    balancer.done(1, 1, 2)
    assert balancer.place(1, 3) is None
    assert balancer.place(1, 2) == 1


def test_a_shard_above_the_capacity_goes_to_an_idle_engine() -> None:
    balancer = LoadBalancer(engines=2, capacity=4)
    assert [balancer.place(9, 9) for _ in range(3)] == [0, 1, None]


@settings(deadline=None)
@given(
    engines=st.integers(1, 4),
    capacity=st.integers(1, 12),
    shards=st.lists(st.tuples(st.integers(1, 99), st.integers(1, 8)), max_size=40),
    order=st.randoms(use_true_random=False),
)
def test_all_shards_run_and_no_engine_holds_more_than_it_may(
    engines: int, capacity: int, shards: list[tuple[int, int]], order: object
) -> None:
    balancer = LoadBalancer(engines, capacity)
    waiting, running = list(shards), []
    held = [0] * engines
    while waiting or running:
        while waiting and (engine := balancer.place(*waiting[0])) is not None:
            tokens, samples = waiting.pop(0)
            assert held[engine] == 0 or held[engine] + samples <= capacity
            held[engine] += samples
            running.append((engine, tokens, samples))
        assert running, "shards wait although all engines are idle"
        engine, tokens, samples = running.pop(order.randrange(len(running)))  # type: ignore[attr-defined]
        balancer.done(engine, tokens, samples)
        held[engine] -= samples
