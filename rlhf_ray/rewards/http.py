"""Scores from a service: POST of `{"prompts": [...], "responses": [...]}`, answered by `{"scores": [...]}`.

Where rows of prompts have other columns, the request has `"columns": {name: [...]}` as well: for each a list with one
entry a sample, null where its row has none.
"""

import json
import logging
import os
import random
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from rlhf_ray.config.rewards import HttpReward
from rlhf_ray.rewards.errors import RewardError
from rlhf_ray.rewards.scorer import TextBatch, TextScorer

_LOG = logging.getLogger(__name__)

# A service that wants to be left alone for longer is down, as far as a run that waits for it is concerned.
LONGEST_WAIT_S = 120.0


class HttpScorer(TextScorer):
    """Posts samples, and again after a back-off when the service is down, slow or busy."""

    def __init__(
        self,
        config: HttpReward,
        *,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Connects to nothing yet.

        Args:
            config: address, batches, time limits and the variable that holds the token.
            transport: what carries requests; by default httpx's own, which honours proxy variables.
            sleep: how to wait between tries.

        Raises:
            RewardError: the address is none, or the token's variable is not set or can't be sent.
        """
        super().__init__(config, "service")
        self._config = config
        self._sleep = sleep
        # Not the global generator: a retry must not change what the run draws from it.
        self._jitter = random.Random()
        self._token = self._read_token(config.token_env)
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        try:
            # A password in the address is used, but not shown.
            self._source = f"service {httpx.URL(config.url).copy_with(userinfo=b'')}"
            self._client = httpx.Client(transport=transport, timeout=config.timeout_s, headers=headers)
        except (httpx.InvalidURL, ValueError) as error:
            raise RewardError(self._part, f"url can't be used: {error}") from error

    def _answer(self, batch: TextBatch) -> Any:
        body: dict[str, Any] = {"prompts": list(batch.prompts), "responses": list(batch.responses)}
        if batch.columns:
            body["columns"] = {name: list(values) for name, values in batch.columns.items()}
        content = self._post(body, batch.uids)
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise self._error(f"gave an answer that is not JSON: {self._excerpt(content)}", batch.uids) from error
        if not isinstance(answer, dict) or "scores" not in answer:
            raise self._error(f'must answer {{"scores": [...]}}, but gave {self._excerpt(content)}', batch.uids)
        return answer["scores"]

    def check(self) -> None:
        """Ask for any HTTP answer at all, of whatever status, within `timeout_s`.

        Raises:
            RewardError: there is none.
        """
        try:
            with self._client.stream("OPTIONS", self._config.url):
                return
        except UnicodeError as error:
            raise RewardError(self._part, f"url names no host that there can be: {error}") from error
        except httpx.RequestError as error:
            raise self._error(f"can't be reached: {self._describe(error)}; start it, or correct url") from error

    def _post(self, body: dict[str, Any], uids: Sequence[str]) -> bytes:
        tries = self._config.retries + 1
        for attempt in range(1, tries + 1):
            cause: httpx.RequestError | None = None
            wait = self._backoff(attempt)
            try:
                response, content = self._request(body)
            except (httpx.UnsupportedProtocol, httpx.LocalProtocolError, httpx.DecodingError) as error:
                raise RewardError(self._part, f"{self._source}: {self._describe(error)}", uids) from error
            except httpx.RequestError as error:
                cause, failure = error, self._describe(error)
            else:
                if response.is_success:
                    return content
                failure = f"it answered {response.status_code} {response.reason_phrase}: {self._excerpt(content)}"
                if not (response.status_code == 429 or response.is_server_error):
                    raise RewardError(self._part, f"{self._source}: {failure}{self._cure(response)}", uids)
                wait = max(wait, self._retry_after(response))
            if attempt == tries or wait > LONGEST_WAIT_S:
                asked = f", and it asks to wait {wait:.0f} s" if wait > LONGEST_WAIT_S else ""
                raise self._error(
                    f"failed at {attempt} of {tries} tries, the last time because {failure}{asked}; "
                    "check that it runs and that the cluster's nodes reach it, or raise retries or timeout_s",
                    uids,
                ) from cause
            _LOG.warning("%s: try %d of %d failed (%s); next in %.1f s", self._source, attempt, tries, failure, wait)
            self._sleep(wait)
        raise AssertionError("the loop returns or raises")

    def _request(self, body: dict[str, Any]) -> tuple[httpx.Response, bytes]:
        limit = self._config.timeout_s
        deadline = time.monotonic() + limit
        content = bytearray()
        with self._client.stream("POST", self._config.url, json=body) as response:
            for chunk in response.iter_bytes():
                content += chunk
                # httpx limits each read, but a service that drips byte after byte would never reach that limit.
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout("the answer was not complete", request=response.request)
        return response, bytes(content)

    def _backoff(self, attempt: int) -> float:
        doubled = self._config.backoff_s * 2.0 ** min(attempt - 1, 60)
        return min(doubled * self._jitter.uniform(0.5, 1.5), LONGEST_WAIT_S)

    def _retry_after(self, response: httpx.Response) -> float:
        """Seconds that the service asks to wait, given as a number or a date; 0 when it doesn't say."""
        value = response.headers.get("Retry-After", "").strip()
        if value.isascii() and value.isdigit():
            return float(value)
        try:
            then = parsedate_to_datetime(value)
        except ValueError:
            return 0.0
        return max(0.0, (then.replace(tzinfo=then.tzinfo or UTC) - datetime.now(UTC)).total_seconds())

    def _cure(self, response: httpx.Response) -> str:
        if response.status_code in (401, 403):
            variable = self._config.token_env
            return f"; check the token in {variable}" if variable else "; name the token's variable in token_env"
        if response.is_redirect:
            return f"; set url to where it points, {self._redacted(response.headers.get('Location', ''))!r}"
        return "; check url, and that the service takes what docs/config.md says"

    def _describe(self, error: httpx.RequestError) -> str:
        if isinstance(error, httpx.TimeoutException):
            return f"there was no complete answer within timeout_s ({self._config.timeout_s:g} s)"
        return self._redacted(f"{type(error).__name__}: {error}")

    def _excerpt(self, content: bytes) -> str:
        return repr(self._redacted(content.decode(errors="replace"))[:200])

    def _redacted(self, text: str) -> str:
        # Services echo headers in their errors.
        return text.replace(self._token, "***") if self._token else text

    def _read_token(self, variable: str | None) -> str | None:
        if variable is None:
            return None
        token = os.environ.get(variable, "")
        if not token:
            raise RewardError(self._part, f"token_env names {variable}, but that environment variable is not set here")
        # Sent as it is, a bad one would be quoted by the error of the HTTP library.
        if not (token.isascii() and token.isprintable() and " " not in token):
            raise RewardError(
                self._part, f"the token in {variable} has spaces, line ends or other characters that no header may hold"
            )
        return token
