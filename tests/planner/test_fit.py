"""Factors that explain measured seconds."""

import numpy as np
import pytest

from rlhf_ray.planner.fit import fit_factors

RANDOM = np.random.default_rng(3)
IDEAL = [{name: float(RANDOM.uniform(0.1, 5)) for name in ("products", "moved", "constant")} for _ in range(8)]


def seconds(factors: dict[str, float]) -> list[float]:
    return [sum(factors[name] * row[name] for name in factors) for row in IDEAL]


def test_exact_measurements_give_back_their_factors() -> None:
    factors = {"products": 1.5, "moved": 0.25, "constant": 0.01}
    assert fit_factors(IDEAL, seconds(factors)) == pytest.approx(factors)


def test_no_factor_is_negative_where_least_squares_alone_would_make_it_so() -> None:
    found = fit_factors(IDEAL, seconds({"products": 2.0, "moved": 1.0, "constant": -0.5}))
    assert min(found.values()) >= 0
    assert found["constant"] == 0


def test_a_term_that_no_measurement_has_gets_no_factor() -> None:
    ideal = [{**row, "moved": 0.0} for row in IDEAL]
    measured = [2 * row["products"] + 3 * row["constant"] for row in ideal]
    assert fit_factors(ideal, measured) == pytest.approx({"products": 2, "moved": 0, "constant": 3})


def test_what_is_known_is_kept_and_the_rest_found() -> None:
    factors = {"products": 1.5, "moved": 0.25, "constant": 0.01}
    assert fit_factors(IDEAL, seconds(factors), {"moved": 0.25}) == pytest.approx(factors)
    assert fit_factors(IDEAL, seconds(factors), {"moved": 0.0})["moved"] == 0.0


def test_a_small_measurement_counts_as_much_as_a_large_one() -> None:
    ideal = [{"products": 1.0}, {"products": 1000.0}]
    # Relative errors of both are equal and opposite, where absolute ones would leave all of it to the first.
    found = fit_factors(ideal, [2.0, 1000.0])["products"]
    assert found == pytest.approx((1 / 2 + 1) / (1 / 4 + 1))


def test_noise_moves_predictions_by_no_more_than_itself() -> None:
    factors = {"products": 1.5, "moved": 0.25, "constant": 0.01}
    noisy = [second * float(RANDOM.uniform(0.95, 1.05)) for second in seconds(factors)]
    found = fit_factors(IDEAL, noisy)
    for row, exact in zip(IDEAL, seconds(factors), strict=True):
        assert sum(found[name] * row[name] for name in found) == pytest.approx(exact, rel=0.06)
