"""What a process holds, as the kernel counts it."""

import mmap
import os
import subprocess
import sys
import time

import psutil
import pytest

from rlhf_ray.actors.host_memory import held_bytes, host_bytes
from rlhf_ray.actors.start import KEEP_MEMORY

SIZE = 64 * 2**20
SLACK = 8 * 2**20


def test_pages_that_the_kernel_may_take_are_not_held() -> None:
    own = psutil.Process()
    before = held_bytes(own)
    with mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
        pages.write(bytes(SIZE))
        assert held_bytes(own) - before == pytest.approx(SIZE, abs=SLACK)
        pages.madvise(mmap.MADV_FREE)
        assert held_bytes(own) - before == pytest.approx(0, abs=SLACK)


def test_processes_that_this_one_started_count() -> None:
    before = host_bytes()
    code = f"held = bytes([1]) * {SIZE}; print('up', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert host_bytes() - before > SIZE
        child.communicate(b"\n")
    assert host_bytes() - before < SLACK


def test_an_ended_process_is_an_error() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        process = psutil.Process(child.pid)
        child.communicate(b"\n")
    with pytest.raises(psutil.NoSuchProcess):
        held_bytes(process)


def test_what_is_given_back_is_not_held() -> None:
    code = (
        "import numpy as np\n"
        "from rlhf_ray.actors.host_memory import give_back, host_bytes\n"
        f"rows = [np.ones({SIZE // 4}, np.uint8) for _ in range(16)]\n"
        "del rows[::2]; before = host_bytes(); give_back(); print(before - host_bytes())\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=os.environ | KEEP_MEMORY, capture_output=True, text=True, check=True)
    assert int(done.stdout) > SIZE


def test_what_an_actor_frees_is_soon_the_kernels_to_take() -> None:
    """Arrays of a process on CPU, some freed between others that stay."""
    code = (
        "import sys\n"
        "import numpy as np\n"
        f"rows = [np.ones({SIZE // 4}, np.uint8) for _ in range(16)]\n"
        "del rows[::2]; print('freed', flush=True)\n"
        "for line in sys.stdin:\n"
        "    any(np.ones(10_000) is None for _ in range(1_000)); print('up', flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | KEEP_MEMORY,
        text=True,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdout.readline()
        process = psutil.Process(child.pid)
        most, deadline = held_bytes(process), time.monotonic() + 60
        while most - held_bytes(process) < SIZE:
            assert time.monotonic() < deadline, "it still holds what it freed"
            time.sleep(0.2)
            child.stdin.write("\n")
            child.stdin.flush()
            child.stdout.readline()
        child.stdin.close()
