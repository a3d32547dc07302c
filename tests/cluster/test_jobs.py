"""Ray jobs: what they run, how they end, and what is shown of them."""

import asyncio
import os
import shlex
from collections.abc import AsyncIterator, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobDetails

from rlhf_ray.cluster import jobs as jobs_module
from rlhf_ray.cluster.jobs import JobError, Jobs, Outcome, UnknownJob, _only_address, default_id, entrypoint, outcome


def details(status: str, code: int | None = None, message: str | None = None) -> JobDetails:
    return JobDetails(
        type="SUBMISSION", submission_id="a", status=status, entrypoint="x", driver_exit_code=code, message=message
    )


class Head:
    """A job server: what each connection gives of the log before it ends, and whether the job has ended by then."""

    def __init__(self, connections: list[tuple[list[str], bool, Exception | None]]) -> None:
        self._connections = iter(connections)
        self._ended = False

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        chunks, self._ended, error = next(self._connections)
        for chunk in chunks:
            yield chunk
        if error is not None:
            raise error

    def get_job_info(self, job_id: str) -> JobDetails:
        return details("SUCCEEDED", 0) if self._ended else details("RUNNING")


@pytest.fixture
def follow(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Follow a job on such a server; gives what was shown and how it ended."""
    monkeypatch.setattr(jobs_module, "_RETRY_S", 0)

    def run(head: Any) -> tuple[str, Outcome]:
        jobs = Jobs.__new__(Jobs)
        jobs.address, jobs._client = "http://head:8265", head
        shown: list[str] = []
        ended = jobs.follow("a", shown.append)
        return "".join(shown), ended

    return run


def test_a_log_is_followed_over_connections_that_break_and_no_line_comes_twice(follow: Any) -> None:
    head = Head(
        [
            (["one\n", "two\n"], False, RuntimeError("closed unexpectedly")),
            (["one\ntwo\nth"], False, None),  # as proxies end what was silent for a while
            (["one\n", "two\nthree\n"], True, None),
        ]
    )
    assert follow(head) == ("one\ntwo\nthree\n", Outcome(0, "job a succeeded"))


def test_a_connection_that_is_silent_is_made_again(follow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(Head):
        async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
            async for chunk in super().tail_job_logs(job_id):
                yield chunk
            if not self._ended:
                await asyncio.sleep(60)

    monkeypatch.setattr(jobs_module, "SILENCE_S", 0.01)
    head = Silent([(["one\n"], False, None), (["one\n", "two\n"], True, None)])
    assert follow(head) == ("one\ntwo\n", Outcome(0, "job a succeeded"))


def test_a_break_after_a_long_connection_is_no_loss(follow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(Head):
        async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
            await asyncio.sleep(0.05)
            async for chunk in super().tail_job_logs(job_id):
                yield chunk

    monkeypatch.setattr(jobs_module, "LOST_S", 0.02)
    head = Slow([(["one\n"], False, RuntimeError("closed")), (["one\n", "two\n"], True, None)])
    assert follow(head)[0] == "one\ntwo\n"


def test_a_cluster_that_stays_out_of_reach_ends_the_following(follow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[tuple[list[str], bool, Exception | None]]:
        while True:
            yield [], False, RuntimeError("no route")

    monkeypatch.setattr(jobs_module, "LOST_S", 0.01)
    with pytest.raises(JobError, match="http://head:8265 has been out of reach for 0.01 s .*rlhf-ray logs a --follow"):
        follow(Head(broken()))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        (details("SUCCEEDED", 0), Outcome(0, "job a succeeded")),
        (details("FAILED", 2), Outcome(2, "job a failed with exit code 2")),
        (details("FAILED", -9), Outcome(137, "job a failed with exit code -9")),
        (details("STOPPED"), Outcome(143, "job a was stopped")),
        (
            details("FAILED", message="runtime_env setup failed"),
            Outcome(1, "job a was not run by Ray: runtime_env setup failed"),
        ),
    ],
)
def test_the_exit_code_is_the_jobs_own(job: JobDetails, expected: Outcome) -> None:
    assert outcome(job) == expected


@pytest.mark.parametrize(
    "job", [details("FAILED", 127), details("FAILED", 1, "ModuleNotFoundError: No module named 'rlhf_ray'")]
)
def test_a_node_without_the_package_has_a_cure(job: JobDetails) -> None:
    assert "--python" in outcome(job).message


def test_the_command_of_a_job_is_quoted_for_the_shell() -> None:
    command = entrypoint(Path("configs/a.yaml"), ["rollout.sampling.stop=['a b']"], "python")
    assert shlex.split(command)[1:] == [
        *("-m", "rlhf_ray.cli.app", "train", "configs/a.yaml"),
        "rollout.sampling.stop=['a b']",
    ]


def test_an_id_tells_the_run_and_the_time() -> None:
    assert default_id("tiny", datetime(2026, 11, 22, 17, 45)) == "tiny-20261122-174500"


def test_a_given_address_wins_over_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's client would do it the other way round."""
    from ray.dashboard.utils import get_address_for_submission_client

    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://other:8265")
    with _only_address("http://head:8265"):
        assert get_address_for_submission_client("http://head:8265") == "http://head:8265"
    assert os.environ["RAY_API_SERVER_ADDRESS"] == "http://other:8265"


def test_an_unknown_job_names_those_there_are(follow: Any) -> None:
    class Other(Head):
        def get_job_info(self, job_id: str) -> JobDetails:
            raise RuntimeError("Request failed with status code 404: Job a does not exist.")

        def list_jobs(self) -> list[JobDetails]:
            return [details("RUNNING").model_copy(update={"submission_id": "b"})]

    with pytest.raises(UnknownJob, match="http://head:8265 has no job 'a'; the newest are b"):
        follow(Other([]))


def test_nobody_answers_is_an_error_with_the_cure() -> None:
    with pytest.raises(JobError, match=r"no cluster answers at http://127.0.0.1:1 \(.*\): give --address"):
        Jobs("http://127.0.0.1:1")
