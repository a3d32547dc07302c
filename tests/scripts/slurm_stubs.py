"""Slurm, Ray and rlhf-ray as small scripts that note how they were called: what scripts/slurm.sbatch is run with."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "slurm.sbatch"

# Each runs with the folder $STATE. A node of this Slurm is a process with another SLURM_NODEID.
_STUBS = {
    "bin/scontrol": """
        if [[ $1 == show ]]; then tr , '\\n' <<<"$3"; else echo "$@" >>"$STATE/scontrol"; fi
    """,
    "bin/getent": """
        [[ -n ${HEAD_ADDRESS-10.1.2.3} ]] || exit 2
        echo "${HEAD_ADDRESS-10.1.2.3} STREAM $2"
    """,
    "bin/hostname": "echo 10.9.9.9 172.17.0.1",
    "bin/srun": """
        echo "$@" >"$STATE/srun"
        while [[ $1 == --* ]]; do shift; done
        trap 'kill $(jobs -p); wait; exit 143' TERM
        for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
            SLURM_NODEID=$node SLURM_CPUS_ON_NODE=$((node + 4)) "$@" &
        done
        wait
    """,
    "venv/bin/python": 'exec "$PYTHON" "$@"',
    "venv/bin/ray": """
        [[ $SLURM_NODEID != "${LOST_NODE:-}" ]] || exit 1
        sleep 60 &
        trap 'kill %1; echo ended >>"$STATE/ended"; exit' TERM
        { echo "$@"; echo "$RAY_AUTH_MODE $RAY_AUTH_TOKEN"; } >"$STATE/new-$SLURM_NODEID"
        mv "$STATE/new-$SLURM_NODEID" "$STATE/ray-$SLURM_NODEID"
        wait
    """,
    "venv/bin/rlhf-ray": """
        sleep 60 &
        trap 'kill %1; echo "TERM" >>"$STATE/driver"; exit "${CODE_AT_TERM:-143}"' TERM
        { echo "$@"; echo "$RAY_ADDRESS $RAY_AUTH_MODE $RAY_AUTH_TOKEN"; } >"$STATE/driver.new"
        mv "$STATE/driver.new" "$STATE/driver"
        if [[ -n ${CODE:-} ]]; then kill %1; exit "$CODE"; fi
        wait
    """,
    # Only what the script asks of Ray: the nodes that have started.
    "modules/ray.py": """
        import os, pathlib, time
        def is_initialized(): return False
        def init(**options): assert os.environ["RAY_AUTH_TOKEN"] and os.environ["RAY_ADDRESS"]
        def nodes():
            state = pathlib.Path(os.environ["STATE"])
            while not (state / os.environ.get("AFTER", ".")).exists(): time.sleep(0.02)
            found = state.glob("ray-*")
            return [{"Alive": True, "NodeManagerHostname": path.name} for path in found]
    """,
}


@dataclass
class SlurmJob:
    """One run of the script on `nodes` nodes."""

    folder: Path
    nodes: int = 2
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, text in _STUBS.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".py":
                path.write_text("\n".join(line[8:] for line in text.splitlines()))
            else:
                path.write_text(f"#!/usr/bin/env bash\n{text}\n")
                path.chmod(0o755)
        self.state.mkdir()

    @property
    def state(self) -> Path:
        return self.folder / "state"

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        names = ",".join(f"node{number}" for number in range(self.nodes))
        slurm = {"SLURM_JOB_ID": "42", "SLURM_JOB_NUM_NODES": str(self.nodes), "SLURM_JOB_NODELIST": names}
        return subprocess.Popen(
            [str(SCRIPT), *arguments],
            env={
                "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
                "PYTHON": sys.executable,
                "PYTHONPATH": str(self.folder / "modules"),
                "STATE": str(self.state),
                "RLHF_RAY_VENV": str(self.folder / "venv"),
                **slurm,
                **environment,
            },
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, **environment: str) -> tuple[int, str]:
        """Exit code and what was written to stderr."""
        return ended(self.start(*arguments, **environment))

    def wrote(self, name: str) -> list[str]:
        """Lines of a file of the state folder, none where there is no such file."""
        path = self.state / name
        return path.read_text().splitlines() if path.exists() else []

    def wait_until(self, name: str, process: subprocess.Popen[str]) -> None:
        """Wait for a file of the state folder, while the script runs."""
        deadline = time.monotonic() + 30
        while not (self.state / name).exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, f"{name} has not started within 30 s"
            time.sleep(0.02)

    def signalled(self, number: signal.Signals, **environment: str) -> tuple[int, str]:
        """Send the script a signal while the run is on."""
        process = self.start("my.yaml", **environment)
        self.wait_until("driver", process)
        process.send_signal(number)
        return ended(process)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        stderr = process.communicate(timeout=30)[1]
    finally:
        process.kill()
    return process.returncode, stderr
