"""Checks of the options that many of these losses share."""

import math

from rlhf_ray.algorithms.checks import check_option


def check_positive(name: str, value: float) -> None:
    """Raise `OptionError` unless value is above 0 and finite."""
    check_option(name, value, 0 < value < math.inf, "above 0 and finite")


def check_label_smoothing(label_smoothing: float) -> None:
    """Raise `OptionError` unless label_smoothing is in [0, 0.5]; at 0.5 the labels say nothing."""
    check_option("label_smoothing", label_smoothing, 0 <= label_smoothing <= 0.5, "in [0, 0.5]")
