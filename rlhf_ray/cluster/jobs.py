"""Ray jobs: `rlhf-ray train` on a cluster, in a copy of a working directory, whoever is still watching."""

import asyncio
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from rlhf_ray.cluster.package import Package
from rlhf_ray.cluster.tokens import HOW_TO_GIVE_A_TOKEN, show_token

CONNECT_S, ANSWER_S = 10.0, 120.0
"""Limits of a request to the cluster."""
STOP_S = 60
"""Seconds that a job has to end its actors and engines after it is told to stop."""
LOST_S = 120.0
"""How long a cluster may be out of reach before following its logs is given up."""
SILENCE_S = 60.0
"""After so long without a word of the log, it is asked for anew."""
_RETRY_S = 2.0

TERMINATED = 143
_NOT_STARTED = (126, 127)


class JobError(Exception):
    """A job that can't be submitted, followed or stopped, or a cluster that can't be asked."""


class UnknownJob(JobError):
    """The cluster has no job of this id."""


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        exit_code: the job's own; 143 for one that was stopped, 1 for one that Ray could not run.
        message: one sentence, with the cure where there is one.
    """

    exit_code: int
    message: str


class _Shown:
    """A log that is read several times from its beginning, and shown once."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write, self._shown, self._seen = write, 0, 0

    def begin(self) -> None:
        """The next text is the first of the log."""
        self._seen = 0

    def add(self, text: str) -> None:
        """The log goes on with this text."""
        fresh = text[max(0, self._shown - self._seen) :]
        self._seen += len(text)
        if fresh:
            self._write(fresh)
            self._shown = self._seen


class _Client(JobSubmissionClient):
    """Ray's, with a limit on every request."""

    def _do_request(self, *args: Any, **options: Any) -> requests.Response:
        return super()._do_request(*args, timeout=(CONNECT_S, ANSWER_S), **options)


class Jobs:
    """The jobs of a cluster.

    Args:
        address: of its dashboard, such as `http://head:8265`; or `auto` for the cluster on this machine.

    Raises:
        JobError: there is no cluster that answers, or it wants another token.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        show_token(address)
        with self._errors(), _only_address(address):
            self._client = _Client(address)

    def submit(self, content: Package, job_id: str, entrypoint: str, metadata: dict[str, str]) -> None:
        """Upload the files and start the job.

        Args:
            job_id: that no other job of the cluster has or had.
            entrypoint: shell command.
            metadata: shown by Ray's dashboard; no secrets.

        Raises:
            JobError: the cluster refuses.
        """
        with TemporaryDirectory(prefix="rlhf_ray-") as folder, self._errors():
            archive = Path(folder) / "working_dir.zip"
            content.write(archive)
            # Ray's own limit of 3 s would kill engines and actors that are about to end in order.
            environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)}
            self._client.submit_job(
                entrypoint=entrypoint,
                submission_id=job_id,
                runtime_env={"working_dir": str(archive), "env_vars": environment},
                metadata=metadata,
            )

    def details(self, job_id: str) -> JobDetails:
        """What Ray knows of a job.

        Raises:
            JobError, UnknownJob.
        """
        with self._errors(job_id):
            return self._client.get_job_info(job_id)

    def logs(self, job_id: str) -> str:
        """What a job has written so far.

        Raises:
            JobError, UnknownJob.
        """
        with self._errors(job_id):
            return str(self._client.get_job_logs(job_id))

    def follow(self, job_id: str, write: Callable[[str], None]) -> Outcome:
        """Hand on what a job writes, from its beginning, until it ends. A connection that breaks is made again.

        Raises:
            JobError: the cluster was out of reach for `LOST_S`.
            UnknownJob.
        """
        self.details(job_id)
        asyncio.run(self._follow(job_id, write))
        return outcome(self.details(job_id))

    def stop(self, job_id: str) -> JobStatus:
        """Tell a job to end, wait until it has, and return how it ended.

        Raises:
            JobError: it has not ended in time.
            UnknownJob.
        """
        with self._errors(job_id):
            self._client.stop_job(job_id)
        limit = STOP_S + 30
        deadline = time.monotonic() + limit
        while not (status := self.details(job_id).status).is_terminal():
            if time.monotonic() > deadline:
                raise JobError(
                    f"job {job_id} was told to stop {limit} s ago and is still {status}: look at its node with "
                    "`ray stack`, and at the job in the dashboard"
                )
            time.sleep(0.5)
        return status

    async def _follow(self, job_id: str, write: Callable[[str], None]) -> None:
        shown = _Shown(write)
        lost_since: float | None = None
        while True:
            try:
                at_end = await self._read_on(job_id, shown)
                ended = (await asyncio.to_thread(self.details, job_id)).status.is_terminal()
                lost_since = None
                if at_end and ended:
                    return
            except UnknownJob:
                raise
            # Ray raises the first, plain class when the connection breaks.
            except (RuntimeError, aiohttp.ClientError, JobError) as error:
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since > LOST_S:
                    raise JobError(
                        f"the cluster at {self.address} has been out of reach for {LOST_S:g} s ({error}). The job "
                        f"{job_id} may go on: try again with `rlhf-ray logs {job_id} --follow`"
                    ) from error
            await asyncio.sleep(_RETRY_S)

    async def _read_on(self, job_id: str, shown: "_Shown") -> bool:
        """Read the log from its beginning over one connection; whether it came to an end. A silent one is given up:
        it may be dead without anybody having said so."""
        stream = self._client.tail_job_logs(job_id)
        shown.begin()
        while True:
            try:
                async with asyncio.timeout(SILENCE_S):
                    chunk = await anext(stream)
            except StopAsyncIteration:
                return True
            except TimeoutError:
                return False
            shown.add(chunk)

    @contextmanager
    def _errors(self, job_id: str | None = None) -> Iterator[None]:
        """What Ray's client raises, in words that help."""
        try:
            yield
        except AuthenticationError as error:
            reason = str(error).partition("\n")[0]
            raise JobError(f"the cluster at {self.address} refuses ({reason}): {HOW_TO_GIVE_A_TOKEN}") from error
        except (ConnectionError, requests.RequestException) as error:
            reason = str(error).rstrip(".")
            raise JobError(
                f"no cluster answers at {self.address} ({reason}): give --address the dashboard's address, such as "
                "http://HEAD:8265, which `ray start --head` prints; from another machine the port must be reachable "
                "(--dashboard-host=0.0.0.0, or an SSH tunnel)"
            ) from error
        except (RuntimeError, ValueError) as error:  # what Ray makes of every other answer
            text = str(error)
            if job_id is not None and "does not exist" in text:
                raise UnknownJob(f"the cluster at {self.address} has no job {job_id!r}{self._known()}") from error
            if "already exists" in text:
                raise JobError(
                    f"the cluster at {self.address} has a job of this id already: choose another with --id"
                ) from error
            raise JobError(f"the cluster at {self.address} refuses: {text}") from error

    def _known(self) -> str:
        """The newest jobs of the cluster, for an error that has their names wrong."""
        jobs = [job for job in self._client.list_jobs() if job.submission_id is not None]
        jobs.sort(key=lambda job: job.start_time or 0)
        named = ", ".join(str(job.submission_id) for job in jobs[-5:])
        return f"; the newest are {named}" if named else ""


def entrypoint(config: Path, overrides: Sequence[str], python: str) -> str:
    """The shell command of a job.

    Args:
        config: within the working directory.
        python: the interpreter on the cluster.
    """
    return shlex.join([python, "-m", "rlhf_ray.cli.app", "train", str(config), *overrides])


def default_id(name: str, now: datetime) -> str:
    """`NAME-20261122-174500`."""
    return f"{name}-{now:%Y%m%d-%H%M%S}"


def outcome(job: JobDetails) -> Outcome:
    """What to tell of a job that has ended, and its exit code."""
    code = job.driver_exit_code
    if job.status == JobStatus.SUCCEEDED:
        return Outcome(0, f"job {job.submission_id} succeeded")
    if job.status == JobStatus.STOPPED:
        return Outcome(TERMINATED, f"job {job.submission_id} was stopped")
    if code is None:  # Ray's own trouble, which the job's log does not have
        return Outcome(1, f"job {job.submission_id} was not run by Ray: {job.message}")
    failed = f"job {job.submission_id} failed with exit code {code}"
    if code in _NOT_STARTED or "No module named 'rlhf_ray'" in (job.message or ""):
        failed += (
            "; its node has no rlhf_ray where it looked: name the Python that has it, such as "
            "--python /shared/rlhf_ray/.venv/bin/python"
        )
    return Outcome(code if code >= 0 else 128 - code, failed)


@contextmanager
def _only_address(address: str) -> Iterator[None]:
    """Ray's client would prefer the environment's address to the one it is given."""
    name = "RAY_API_SERVER_ADDRESS"
    before = os.environ.get(name)
    os.environ[name] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
