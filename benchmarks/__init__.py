"""Measurements of this package against the bare libraries; docs/benchmarks.md has the numbers. None asserts a time."""

from rlhf_ray.cli.quiet import quiet_libraries

quiet_libraries(verbose=False)  # here, because it must come before the libraries are imported
