"""Promises of rlhf_ray.algorithms.kl, against plain Python floats."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.algorithms.errors import OptionError, TensorInputError
from rlhf_ray.algorithms.kl import KLController, KLEstimator, kl_estimate

ESTIMATORS: list[KLEstimator] = ["k1", "k2", "k3"]
logprob_pairs = st.lists(st.tuples(st.floats(-20, 0), st.floats(-20, 0)), max_size=30)


def columns(pairs: list[tuple[float, float]]) -> tuple[torch.Tensor, torch.Tensor]:
    table = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def naive_kl(p: float, r: float, estimator: str) -> float:
    ratio = math.exp(r) / math.exp(p)
    return {"k1": p - r, "k2": 0.5 * (p - r) ** 2, "k3": ratio - 1 - math.log(ratio)}[estimator]


@settings(deadline=None)
@given(logprob_pairs, st.sampled_from(ESTIMATORS))
def test_estimators_equal_a_loop_in_float64(pairs: list[tuple[float, float]], estimator: KLEstimator) -> None:
    got = kl_estimate(*columns(pairs), estimator)
    want = [naive_kl(p, r, estimator) for p, r in pairs]
    assert got.tolist() == pytest.approx(want, rel=1e-9, abs=1e-9)


def test_estimators_give_hand_worked_values() -> None:
    logprobs, reference = torch.tensor([0.5, 0.25]).log(), torch.tensor([0.25, 0.5]).log()
    log2 = math.log(2)
    assert kl_estimate(logprobs, reference, "k1").tolist() == pytest.approx([log2, -log2])
    assert kl_estimate(logprobs, reference, "k2").tolist() == pytest.approx([log2**2 / 2, log2**2 / 2])
    assert kl_estimate(logprobs, reference, "k3").tolist() == pytest.approx([log2 - 0.5, 1 - log2])


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_average_to_the_exact_kl_under_the_policy(estimator: KLEstimator) -> None:
    p, r = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.3, 0.3, 0.4]).double()
    exact = sum(a * math.log(a / b) for a, b in zip(p.tolist(), r.tolist(), strict=True))
    assert (p * kl_estimate(p.log(), r.log(), estimator)).sum().item() == pytest.approx(exact)


def test_k2_and_k3_are_never_negative_and_all_are_zero_for_equal_models() -> None:
    logprobs = torch.linspace(-12, 0, 500)
    for estimator in ESTIMATORS:
        assert kl_estimate(logprobs, logprobs, estimator).abs().max() == 0
    assert kl_estimate(logprobs, logprobs.flip(0), "k2").min() >= 0
    assert kl_estimate(logprobs, logprobs.flip(0), "k3").min() >= 0


def test_k3_keeps_a_small_kl_in_float32() -> None:
    small = kl_estimate(torch.tensor([-1.0]), torch.tensor([-1.001]), "k3").item()
    assert small == pytest.approx(0.5e-6, rel=2e-3)


def test_estimates_refuse_shapes_that_would_broadcast_and_unknown_estimators() -> None:
    with pytest.raises(TensorInputError, match="reference_logprobs has shape"):
        kl_estimate(torch.zeros(3), torch.zeros(1), "k1")
    with pytest.raises(TensorInputError, match="logprobs has shape"):
        kl_estimate(torch.zeros(3, 1), torch.zeros(3, 1), "k1")
    with pytest.raises(TensorInputError, match=r"dtype torch\.int64"):
        kl_estimate(torch.zeros(3, dtype=torch.int64), torch.zeros(3), "k1")
    with pytest.raises(OptionError, match="estimator is 'k4', but must be k1, k2 or k3"):
        kl_estimate(torch.zeros(3), torch.zeros(3), "k4")  # type: ignore[arg-type]


def test_beta_rises_above_the_target_and_falls_below_it_in_proportion() -> None:
    high, low = KLController(0.1, target=6.0, horizon=1000), KLController(0.1, target=6.0, horizon=1000)
    high.update(6.6, 100)
    low.update(5.4, 100)
    assert high.coef == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert low.coef == pytest.approx(0.1 * (1 - 0.1 * 0.1))


def test_beta_stays_at_the_target() -> None:
    controller = KLController(0.1, target=6.0, horizon=1000)
    controller.update(6.0, 100)
    assert controller.coef == 0.1


@pytest.mark.parametrize(("kl", "change"), [(60.0, 1.02), (1e9, 1.02), (0.0, 0.98), (-50.0, 0.98)])
def test_beta_changes_by_at_most_a_fifth_of_samples_over_horizon(kl: float, change: float) -> None:
    controller = KLController(0.1, target=6.0, horizon=1000)
    controller.update(kl, 100)
    assert controller.coef == pytest.approx(0.1 * change)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-5, 50), st.integers(1, 500)), max_size=20), st.floats(0.01, 20))
def test_beta_follows_ziegler_over_any_course(steps: list[tuple[float, int]], target: float) -> None:
    controller = KLController(0.2, target=target, horizon=1000)
    beta = 0.2
    for kl, samples in steps:
        controller.update(kl, samples)
        error = kl / target - 1
        error = 0.2 if error > 0.2 else -0.2 if error < -0.2 else error
        beta = beta + beta * error * samples / 1000
    assert controller.coef == pytest.approx(beta)
    assert controller.coef > 0


def test_fixed_beta_ignores_updates() -> None:
    controller = KLController(0.05)
    controller.update(100.0, 10_000)
    assert controller.coef == 0.05


def test_controller_continues_exactly_from_its_state() -> None:
    whole, first = KLController(0.1, target=6.0, horizon=1000), KLController(0.1, target=6.0, horizon=1000)
    for controller in (whole, first):
        controller.update(6.123, 33)
    second = KLController(0.7, target=6.0, horizon=1000)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for controller in (whole, second):
        controller.update(5.01, 33)
    assert second.coef == whole.coef


def test_controller_refuses_settings_that_cannot_work() -> None:
    with pytest.raises(OptionError, match="horizon is None, but must be a number, because target is given"):
        KLController(0.1, target=6.0)
    with pytest.raises(OptionError, match="target is None, but must be a number, because horizon is given"):
        KLController(0.1, horizon=10.0)
    for kwargs in (
        {"coef": -0.1},
        {"coef": math.nan},
        {"coef": 0.0, "target": 6.0, "horizon": 100.0},
        {"coef": 0.1, "target": 0.0, "horizon": 100.0},
        {"coef": 0.1, "target": 6.0, "horizon": 0.0},
    ):
        with pytest.raises(OptionError):
            KLController(**kwargs)
    with pytest.raises(OptionError, match="coef"):
        KLController(0.1).load_state_dict({"coef": math.nan})


def test_controller_refuses_a_kl_that_is_not_finite_and_a_horizon_that_could_turn_beta_negative() -> None:
    controller = KLController(0.1, target=6.0, horizon=20)
    with pytest.raises(OptionError, match="kl_per_sample_mean is nan"):
        controller.update(math.nan, 10)
    with pytest.raises(OptionError, match=r"horizon is 20, but must be above 20\.0 for 100 samples a step"):
        controller.update(6.0, 100)
    assert controller.coef == 0.1
