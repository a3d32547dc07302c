"""manifest.json: what a result came from. Versions, commit, seed, host, cluster, command and end of each session."""

import json
import logging
import os
import platform
import re
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasPath, Field, TypeAdapter, ValidationError

import rlhf_ray
from rlhf_ray.cluster.libraries import LIBRARIES
from rlhf_ray.config.jobs import Job
from rlhf_ray.config.regular_files import read_regular
from rlhf_ray.recovery.files import replace_file
from rlhf_ray.telemetry.errors import DamagedFileError

logger = logging.getLogger(__name__)

_MOST_BYTES = 64 * 2**20

REDACTED = "[redacted]"

Outcome = Literal["finished", "failed", "interrupted", "terminated"]


@dataclass(frozen=True)
class End:
    """How a session ended that could say so.

    Attributes:
        error: that ended it, in words; empty when it was not one.
    """

    utc: str
    outcome: Outcome
    error: str


@dataclass(frozen=True)
class Session:
    """A start or a resumption of a run, as its manifest tells.

    Attributes:
        address: of the Ray cluster.
        status_actor: name of the session's status actor in that cluster.
        host, pid: of the driver.
        steps: of the whole run.
        end: None while it runs, and when it was killed.
    """

    name: str
    job: str
    started_utc: str
    address: Annotated[str, Field(validation_alias=AliasPath("cluster", "gcs_address"))]
    status_actor: str
    host: Annotated[str, Field(validation_alias=AliasPath("host", "name"))]
    pid: int
    steps: int
    end: End | None = None


def write_manifest(
    run_dir: Path,
    config: Job,
    cluster: Mapping[str, Any],
    command: Sequence[str],
    status_actor: str = "",
    steps: int = 0,
    number_formats: Mapping[str, Mapping[str, str]] | None = None,
) -> None:
    """Append this session (a start or a resumption) to the manifest's `sessions`.

    Args:
        run_dir: folder of the run.
        config: of the job.
        cluster: what the cluster has, for JSON.
        command: command line; values of arguments that look like secrets are not written.
        status_actor: name of the session's status actor.
        steps: of the whole run.
        number_formats: what `dtype: auto` became and why, by key of the config.

    Raises:
        DamagedFileError: there is a manifest.json that cannot be read.
    """
    path = run_dir / "manifest.json"
    run_dir.mkdir(parents=True, exist_ok=True)
    manifest = _read(path) if path.exists() else {"sessions": []}
    manifest["sessions"].append(
        {
            "started_utc": datetime.now(UTC).isoformat(timespec="seconds"),
            "name": config.name,
            "job": config.job,
            "seed": config.seed,
            "steps": steps,
            "status_actor": status_actor,
            "number_formats": dict(number_formats or {}),
            "command": redact(command),
            "git": git_state(Path(rlhf_ray.__file__).parent),
            "versions": {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}},
            "pid": os.getpid(),
            "host": {
                "name": socket.gethostname(),
                "platform": platform.platform(),
                "cpus": os.cpu_count(),
                "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            },
            "cluster": dict(cluster),
        }
    )
    _write(path, manifest)


def end_session(run_dir: Path, outcome: Outcome, error: str = "") -> None:
    """Write into the manifest how its last session ended.

    Raises:
        DamagedFileError: there is no manifest.json that can be read.
    """
    path = run_dir / "manifest.json"
    manifest = _read(path)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    manifest["sessions"][-1]["end"] = {"utc": now, "outcome": outcome, "error": error}
    _write(path, manifest)


def last_session(run_dir: Path) -> Session:
    """The newest session of a run.

    Raises:
        FileNotFoundError: `run_dir` is no folder of a run.
        DamagedFileError: its manifest.json cannot be read.
    """
    path = run_dir / "manifest.json"
    try:
        return TypeAdapter(Session).validate_python(_read(path)["sessions"][-1])
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise DamagedFileError(path, f"its last session is not as those of this version are: {reason}") from None


def git_state(folder: Path, timeout_s: float = 10.0) -> dict[str, Any] | None:
    """`commit` of the checkout that `folder` belongs to, and `dirty`: whether files of `folder` differ from it.

    None where there is no git or the folder's files are in no checkout (an installed package inside somebody's
    repository is not of that repository).
    """
    try:
        if not _git(folder, timeout_s, "ls-files", "--", "__init__.py"):
            return None
        return {
            "commit": _git(folder, timeout_s, "rev-parse", "HEAD"),
            "dirty": bool(_git(folder, timeout_s, "status", "--porcelain", "--", ".")),
        }
    except (OSError, subprocess.SubprocessError) as error:
        logger.debug("no git state of %s: %s", folder, error)
        return None


# Names that tell of tokens of text, or of where a secret is rather than of what it is.
_HARMLESS = re.compile(r"tokens|tokenizer\w*|token_?ids?|token_env")
_SECRET = re.compile(r"token|secret|passw|credential|bearer|authorization|(?:api|access|private|auth)[._-]?key")
_PAIR = re.compile(r"""(?P<key>[\w.-]+)(?P<between>["']?\s*[=:]\s*)(?P<value>"[^"]*"|'[^']*'|[^\s"'&,;}\]]+)""")
_USER_IN_URL = re.compile(r"://[^/@\s]+@")
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+\S+")


def redact(command: Sequence[str]) -> list[str]:
    """The command line without the values of what looks like a secret by its name, wherever it stands.

    Covers `--hf-token abc`, `--token=abc`, `a.api_key=abc`, the same within an argument (`{"env": {"TOKEN": "abc"}}`,
    `https://host?token=abc`), `Bearer abc`, and `https://user:password@host`.
    """
    shown: list[str] = []
    value_is_secret = False
    for argument in command:
        if value_is_secret and not argument.startswith("--"):
            shown.append(REDACTED)
            value_is_secret = False
            continue
        key, separator, _ = argument.partition("=")
        named = re.fullmatch(r"[\w.-]+", key) is not None and _is_secret(key)
        value_is_secret = named and not separator and argument.startswith("-")
        shown.append(f"{key}={REDACTED}" if named and separator else _redact_within(argument))
    return shown


def _redact_within(argument: str) -> str:
    argument = _USER_IN_URL.sub(f"://{REDACTED}@", argument)
    argument = _BEARER.sub(rf"\1 {REDACTED}", argument)
    return _PAIR.sub(
        lambda pair: f"{pair['key']}{pair['between']}{REDACTED}" if _is_secret(pair["key"]) else pair[0], argument
    )


def _is_secret(key: str) -> bool:
    return _SECRET.search(_HARMLESS.sub("", key.lower())) is not None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(folder: Path, timeout_s: float, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
    )
    return done.stdout.strip()


def _write(path: Path, manifest: dict[str, Any]) -> None:
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    # A lone surrogate, of a file name or a sampled text, has no UTF-8; its backslash form is the JSON escape of it.
    replace_file(path, text.encode("utf-8", "backslashreplace"))


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_regular(path, _MOST_BYTES)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedFileError(path, f"can't be read: {error.strerror or error}") from None
    if len(content) > _MOST_BYTES:
        raise DamagedFileError(path, f"has more than {_MOST_BYTES:,} bytes")
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(path, f"is not JSON: {error}") from None
    sessions = manifest.get("sessions") if isinstance(manifest, dict) else None
    if not isinstance(sessions, list) or not sessions or not all(isinstance(session, dict) for session in sessions):
        raise DamagedFileError(path, "is not a manifest with a list of sessions")
    return manifest
