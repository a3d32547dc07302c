from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.data.minibatches import OptimizerStep, plan_update


@st.composite
def updates(draw: st.DrawFn) -> dict[str, object]:
    ranks, steps = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    samples = draw(st.integers(ranks * steps, 40))
    return {
        "prompt_lengths": np.array(draw(st.lists(st.integers(1, 30), min_size=samples, max_size=samples))),
        "response_lengths": np.array(draw(st.lists(st.integers(1, 30), min_size=samples, max_size=samples))),
        "action_lengths": np.array(draw(st.lists(st.integers(1, 30), min_size=samples, max_size=samples))),
        "epochs": draw(st.integers(1, 3)),
        "optimizer_steps": steps,
        "dp_size": ranks,
        "max_tokens": draw(st.integers(1, 120)),
        "seed": draw(st.integers(0, 2**63 - 1)),
    }


def samples_of(step: OptimizerStep) -> list[int]:
    return [sample for micro in step.micro_batches for sample in micro]


@settings(deadline=None)
@given(updates())
def test_every_sample_is_trained_exactly_once_in_each_epoch(update: dict) -> None:  # type: ignore[type-arg]
    plan = plan_update(**update)
    assert len(plan) == update["dp_size"]
    assert {len(steps) for steps in plan} == {update["epochs"] * update["optimizer_steps"]}
    for epoch in range(update["epochs"]):
        here = slice(epoch * update["optimizer_steps"], (epoch + 1) * update["optimizer_steps"])
        trained = Counter(sample for steps in plan for step in steps[here] for sample in samples_of(step))
        assert trained == Counter(range(len(update["prompt_lengths"])))


@settings(deadline=None)
@given(updates())
def test_ranks_take_the_same_steps_and_know_their_totals(update: dict) -> None:  # type: ignore[type-arg]
    for steps in zip(*plan_update(**update), strict=True):
        samples = [sample for step in steps for sample in samples_of(step)]
        assert {len(step.micro_batches) for step in steps} == {len(steps[0].micro_batches)}
        assert {step.step_samples for step in steps} == {len(samples)}
        assert {step.step_tokens for step in steps} == {int(update["action_lengths"][samples].sum())}


@settings(deadline=None)
@given(updates())
def test_micro_batches_stay_within_their_tokens(update: dict) -> None:  # type: ignore[type-arg]
    lengths = update["prompt_lengths"] + update["response_lengths"]
    for steps in plan_update(**update):
        for micro in (micro for step in steps for micro in step.micro_batches):
            assert len(micro) <= 1 or lengths[list(micro)].sum() <= update["max_tokens"]


@settings(deadline=None)
@given(updates())
def test_the_steps_of_an_epoch_differ_by_one_sample_at_most(update: dict) -> None:  # type: ignore[type-arg]
    sizes = [step.step_samples for step in plan_update(**update)[0]]
    assert max(sizes) - min(sizes) <= 1


def members(seed: int, ranks: int) -> list[frozenset[int]]:
    """The samples of each optimizer step, over all ranks."""
    ones = np.ones(24, np.int64)
    plan = plan_update(ones, ones, ones, epochs=2, optimizer_steps=3, dp_size=ranks, max_tokens=8, seed=seed)
    return [frozenset(s for step in steps for s in samples_of(step)) for steps in zip(*plan, strict=True)]


def test_each_epoch_and_each_seed_has_its_own_split() -> None:
    steps = members(seed=0, ranks=1)
    assert steps == members(seed=0, ranks=1)
    assert steps != members(seed=1, ranks=1)
    assert set(steps[:3]) != set(steps[3:])


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_the_split_into_steps_does_not_depend_on_the_ranks(ranks: int) -> None:
    assert members(seed=0, ranks=ranks) == members(seed=0, ranks=1)
