"""Threads of optimizer steps in host memory."""

import pytest

from rlhf_ray.engines.cpu_adam import step_threads


@pytest.mark.parametrize(
    ("reserved", "cores", "devices", "threads"), [(1, 96, 8, 12), (16, 96, 8, 16), (1, 4, 8, 1), (2, 16, 0, 16)]
)
def test_a_rank_steps_with_its_part_of_the_cores(reserved: int, cores: int, devices: int, threads: int) -> None:
    assert step_threads(reserved, cores, devices) == threads
