import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import numpy as np
import pytest

from rlhf_ray.config.rewards import HttpReward
from rlhf_ray.rewards.errors import RewardError
from rlhf_ray.rewards.http import LONGEST_WAIT_S, HttpScorer

UIDS = ["a@0", "b@0", "c@0"]
PROMPTS = ["p", "pp", "ppp"]
RESPONSES = ["r", "", "ü"]
TOKEN = "s3cr3t-t0k3n"

Answer = Callable[["Service"], None]


class Service(BaseHTTPRequestHandler):
    """Answers with the next of `server.answers`, the last one for ever."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.headers, json.loads(body)))
        self.body = json.loads(body)
        answers = self.server.answers
        (answers.pop(0) if len(answers) > 1 else answers[0])(self)

    def reply(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def gives(body: Any, status: int = 200, **headers: str) -> Answer:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return lambda service: service.reply(status, text, **headers)


def scores_by_length(service: Service) -> None:
    pairs = zip(service.body["prompts"], service.body["responses"], strict=True)
    service.reply(200, json.dumps({"scores": [len(p) + 10 * len(r) for p, r in pairs]}).encode())


def drips(service: Service) -> None:
    service.send_response(200)
    service.send_header("Content-Length", "1000")
    service.end_headers()
    for _ in range(100):
        if service.server.stopping.wait(0.05):
            return
        service.wfile.write(b" ")
        service.wfile.flush()


def keeps_silent(service: Service) -> None:
    service.server.stopping.wait(20)


def hangs_up(service: Service) -> None:
    service.close_connection = True


@pytest.fixture
def service() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    server.answers, server.requests, server.stopping = [scores_by_length], [], threading.Event()
    server.handle_error = lambda *_: None  # clients that gave up
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.stopping.set()
    server.shutdown()
    server.server_close()


class Naps(list[float]):
    """Stands in for the clock: remembers the waits instead of waiting."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


def scorer(service: Any, naps: Naps | None = None, **config: Any) -> HttpScorer:
    url = config.pop("url", None) or f"http://127.0.0.1:{service.server_port}/score"
    settings = HttpReward(**{"url": url, "timeout_s": 10.0, "name": "judge", **config})
    # A transport of its own keeps proxy variables of the machine out of the tests.
    return HttpScorer(settings, transport=httpx.HTTPTransport(), sleep=Naps() if naps is None else naps)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_scores_come_in_order_and_in_batches(service: Any) -> None:
    scores = scorer(service, batch_size=2).score(PROMPTS, RESPONSES, UIDS)
    assert scores.dtype == np.float32
    assert scores.tolist() == [11, 2, 13]
    assert [body for _, body in service.requests] == [
        {"prompts": ["p", "pp"], "responses": ["r", ""]},
        {"prompts": ["ppp"], "responses": ["ü"]},
    ]


def test_columns_are_sent_with_the_samples_that_they_belong_to(service: Any) -> None:
    columns = {"answer": ["ü", None, {"a": [1]}]}
    scorer(service, batch_size=2).score(PROMPTS, RESPONSES, UIDS, columns)
    assert [body["columns"] for _, body in service.requests] == [{"answer": ["ü", None]}, {"answer": [{"a": [1]}]}]


def test_no_samples_make_no_request(service: Any) -> None:
    assert scorer(service).score([], [], []).shape == (0,)
    assert service.requests == []


def test_the_token_is_sent_and_none_without_one(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", TOKEN)
    scorer(service, token_env="JUDGE_TOKEN").score(PROMPTS, RESPONSES, UIDS)
    scorer(service).score(PROMPTS, RESPONSES, UIDS)
    assert [headers["Authorization"] for headers, _ in service.requests] == [f"Bearer {TOKEN}", None]


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_failure_that_passes_is_tried_again(service: Any, status: int, caplog: pytest.LogCaptureFixture) -> None:
    service.answers[:0] = [gives({"error": "busy"}, status)] * 2
    naps = Naps()
    with caplog.at_level(logging.WARNING):
        scores = scorer(service, naps, backoff_s=1.0).score(PROMPTS, RESPONSES, UIDS)
    assert scores.tolist() == [11, 2, 13]
    assert len(service.requests) == 3
    assert len(naps) == 2
    assert f"try 1 of 5 failed (it answered {status}" in caplog.text


def test_the_wait_doubles_with_jitter_up_to_a_limit(service: Any) -> None:
    service.answers[:] = [gives({}, 500)]
    naps = Naps()
    with pytest.raises(RewardError, match="failed at 13 of 13 tries"):
        scorer(service, naps, backoff_s=1.0, retries=12).score(PROMPTS, RESPONSES, UIDS)
    assert len(naps) == 12
    for i, nap in enumerate(naps):
        assert min(0.5 * 2**i, LONGEST_WAIT_S) <= nap <= min(1.5 * 2**i, LONGEST_WAIT_S)
    assert len({nap / 2**i for i, nap in enumerate(naps[:6])}) == 6


def test_retry_after_is_honoured_as_seconds_and_as_a_date(service: Any) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    past = format_datetime(datetime.now(UTC) - timedelta(seconds=60), usegmt=True)
    service.answers[:0] = [gives({}, 429, Retry_After=value) for value in ("17", date, past, "soon")]
    naps = Naps()
    scorer(service, naps, backoff_s=0.01).score(PROMPTS, RESPONSES, UIDS)
    assert naps[0] == 17
    assert 50 < naps[1] <= 60
    assert naps[2] < 1
    assert naps[3] < 1


def test_a_service_that_asks_to_wait_too_long_counts_as_down(service: Any) -> None:
    service.answers[:] = [gives({}, 503, Retry_After="86400")]
    naps = Naps()
    with pytest.raises(RewardError, match="failed at 1 of 5 tries, .* it answered 503 .* asks to wait 86400 s"):
        scorer(service, naps).score(PROMPTS, RESPONSES, UIDS)
    assert naps == []


def test_a_service_that_stays_broken_is_named_with_tries_and_cause(service: Any) -> None:
    service.answers[:] = [scores_by_length, gives(b"out of memory", 500)]
    url = f"http://127.0.0.1:{service.server_port}/score"
    with pytest.raises(RewardError) as caught:
        scorer(service, retries=2, batch_size=2).score(PROMPTS, RESPONSES, UIDS)
    assert f"reward 'judge': service {url} failed at 3 of 3 tries, the last time because it answered 500" in str(
        caught.value
    )
    assert "'out of memory'" in caught.value.reason
    assert "check that it runs" in caught.value.reason
    assert caught.value.samples == ("c@0",)


def test_a_service_that_is_down_is_tried_again_and_named() -> None:
    naps = Naps()
    with pytest.raises(
        RewardError, match="failed at 4 of 4 tries, the last time because ConnectError: .*refused"
    ) as caught:
        scorer(None, naps, url=f"http://127.0.0.1:{free_port()}/score", retries=3).score(PROMPTS, RESPONSES, UIDS)
    assert len(naps) == 3
    assert isinstance(caught.value.__cause__, httpx.ConnectError)


def test_a_service_that_hangs_up_is_tried_again(service: Any) -> None:
    service.answers.insert(0, hangs_up)
    assert scorer(service).score(PROMPTS, RESPONSES, UIDS).tolist() == [11, 2, 13]


@pytest.mark.parametrize("slow", [keeps_silent, drips])
def test_a_slow_service_is_given_up_after_the_time_limit(service: Any, slow: Answer) -> None:
    service.answers[:] = [slow]
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"at 2 of 2 tries, .* no complete answer within timeout_s \(0.3 s\)"):
        scorer(service, timeout_s=0.3, retries=1).score(PROMPTS, RESPONSES, UIDS)
    assert time.monotonic() - start < 3


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (gives({"scores": [1.0, 2.0]}), "gave 2 scores for 3 samples"),
        (gives({"scores": [1.0, float("nan"), 2.0]}), "gave nan as a score, but must give finite"),
        (gives(b'{"scores": [1e999, 0, 0]}'), "gave inf as a score"),
        (gives({"scores": [1.0, "2", 3.0]}), r"gave '2' \(str\) as a score"),
        (gives({"scores": [1.0, None, 3.0]}), r"gave None \(NoneType\) as a score"),
        (gives({"scores": [True, 1.0, 3.0]}), r"gave True \(bool\) as a score"),
        (gives({"scores": 1.0}), "gave float, but must give a list of numbers"),
        (gives({"score": [1.0]}), r'must answer \{"scores": \[...\]\}, but gave \'\{"score": \[1.0\]\}\''),
        (gives([1.0, 2.0, 3.0]), "must answer .* but gave"),
        (gives(b"<html>hello</html>"), "not JSON: '<html>hello</html>'"),
        (gives(b"[" * 100_000), "not JSON"),
        (gives(b"\xff\xfe\xff"), "not JSON"),
        (gives(b"", 204), "not JSON: ''"),
        (gives(b"this is not gzip", 200, Content_Encoding="gzip"), "DecodingError"),
        (gives({"detail": "no such path"}, 404), "answered 404 Not Found: .*no such path.*; check url"),
        (gives({}, 302, Location="/new"), "answered 302 Found: .*set url to where it points, '/new'"),
        (gives({}, 401), "answered 401 Unauthorized: .*name the token's variable in token_env"),
    ],
)
def test_an_answer_that_trying_again_would_not_mend_is_an_error_at_once(
    service: Any, answer: Answer, message: str
) -> None:
    service.answers[:] = [answer]
    naps = Naps()
    with pytest.raises(RewardError, match=message) as caught:
        scorer(service, naps).score(PROMPTS, RESPONSES, UIDS)
    assert f"service http://127.0.0.1:{service.server_port}/score" in str(caught.value)
    assert len(service.requests) == 1
    assert naps == []
    assert set(caught.value.samples) <= set(UIDS)
    assert caught.value.samples


def test_the_token_is_in_no_message_and_no_log(
    service: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", TOKEN)

    def echoes(status: int) -> Answer:
        # So long that the token stands across the place where the message is cut.
        return lambda service: service.reply(status, b"x" * 185 + service.headers["Authorization"].encode())

    for answers in [[echoes(500)], [echoes(401)], [echoes(200)], [gives({}, 500), gives({}, 401)]]:
        service.answers[:] = answers
        with caplog.at_level(logging.DEBUG), pytest.raises(RewardError) as caught:
            scorer(service, token_env="JUDGE_TOKEN", retries=1).score(PROMPTS, RESPONSES, UIDS)
        assert TOKEN[:4] not in str(caught.value)
    assert "check the token in JUDGE_TOKEN" in str(caught.value)
    assert "try 1 of 2 failed" in caplog.text
    assert TOKEN[:4] not in caplog.text


def test_a_password_in_the_address_is_not_shown(service: Any) -> None:
    service.answers[:] = [gives({}, 400)]
    with pytest.raises(RewardError) as caught:
        scorer(service, url=f"http://me:hidden@127.0.0.1:{service.server_port}/score").score(PROMPTS, RESPONSES, UIDS)
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("value", [None, ""])
def test_a_missing_token_is_an_error_at_the_start(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_TOKEN", value)
    with pytest.raises(RewardError, match="token_env names JUDGE_TOKEN, but that environment variable is not set"):
        scorer(None, url="http://127.0.0.1:1/score", token_env="JUDGE_TOKEN")


@pytest.mark.parametrize("value", [TOKEN + "\n", TOKEN + " x", TOKEN + "ü"])
def test_a_token_that_no_header_may_hold_is_not_shown(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", value)
    with pytest.raises(RewardError, match="the token in JUDGE_TOKEN has spaces, line ends") as caught:
        scorer(None, url="http://127.0.0.1:1/score", token_env="JUDGE_TOKEN")
    assert TOKEN not in str(caught.value)


def test_an_address_that_is_none_is_an_error_at_the_start() -> None:
    with pytest.raises(RewardError, match="url can't be used"):
        scorer(None, url="http://[::1/score")


def test_the_check_is_content_with_any_answer_at_all(service: Any) -> None:
    scorer(service).check()  # this server knows no OPTIONS and answers 501
    assert service.requests == []


def test_the_check_fails_when_nothing_listens_or_answers() -> None:
    with pytest.raises(RewardError, match="can't be reached: ConnectError: .*refused.*start it, or correct url"):
        scorer(None, url=f"http://127.0.0.1:{free_port()}/score").check()
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}/score"
        with pytest.raises(RewardError, match=r"can't be reached: .* no complete answer within timeout_s \(0.2 s\)"):
            scorer(None, url=url, timeout_s=0.2).check()
