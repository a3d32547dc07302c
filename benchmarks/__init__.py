"""Measurements of this package against the bare libraries; docs/benchmarks.md has the numbers. None asserts a time."""
