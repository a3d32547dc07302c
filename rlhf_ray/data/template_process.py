"""Chat templates run in a process of their own, since a template is a program that comes with a model.

A template may loop for ever or fill the memory, inside of one call of C code too, where nothing in the same process can
end it. So a child renders, with limits that the kernel keeps: an alarm for each conversation and an end to its memory.
The child imports transformers' renderer alone, which takes a second and is done once for all templates.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

# Seconds for one conversation, which takes a millisecond, on a machine however busy.
RENDER_LIMIT_S = 10.0
# Characters of one rendered conversation, and bytes that rendering it may take.
TEXT_LIMIT = 32 * 2**20
MEMORY_LIMIT = 2**30
_START_LIMIT_S = 120.0


class TemplateError(Exception):
    """A template that gives no text for a conversation."""


class TemplateLimitError(TemplateError):
    """A template that ran into a limit, as it will again."""


class TemplateProcess:
    """Renders conversations, one after the other. The child starts with the first and ends with this process."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def render(
        self,
        template: str,
        special_tokens: Mapping[str, Any],
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool,
        limit_s: float = RENDER_LIMIT_S,
    ) -> str:
        """The text of a conversation, as `apply_chat_template` gives it.

        Raises:
            TemplateError: the template refuses it.
            TemplateLimitError: it takes longer than `limit_s`, makes more than `TEXT_LIMIT` or needs more than
                `MEMORY_LIMIT`.
        """
        call = {"chat_template": template, "add_generation_prompt": add_generation_prompt, **special_tokens}
        try:
            request = json.dumps([limit_s, call | {"conversations": [messages]}], default=str)
        except (ValueError, RecursionError) as error:
            raise TemplateError(f"its messages can't be given to a template: {error}") from error
        with self._lock:
            try:
                if self._child is None or self._child.poll() is not None:
                    self._start()
                answer = self._ask(request)
            except (EOFError, BrokenPipeError):
                code = self._end()
                raise TemplateLimitError(_death(code, limit_s)) from None
            except BaseException:  # a half-read answer must not be taken for the next one's
                self._end()
                raise
        if "limit" in answer:
            raise TemplateLimitError(answer["limit"])
        if "error" in answer:
            raise TemplateError(answer["error"])
        return str(answer["text"])

    def _start(self) -> None:
        # The child finds this package where this process did.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        self._child = subprocess.Popen(
            [sys.executable, "-m", "rlhf_ray.data.template_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )

    def _end(self) -> int:
        assert self._child is not None
        self._child.kill()
        code = self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # of what was not yet written to a child that is gone
                    pipe.close()
        self._child = None
        return code

    def _ask(self, request: str) -> dict[str, Any]:
        assert self._child is not None
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(request.encode() + b"\n")
        self._child.stdin.flush()
        line = self._child.stdout.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        answer: dict[str, Any] = json.loads(line)
        return answer


TEMPLATES = TemplateProcess()


def _death(code: int, limit_s: float) -> str:
    if code == -signal.SIGALRM:
        return f"it does not come to an end within {limit_s:g} s"
    if code == -signal.SIGKILL:
        return "its process was killed, as it is when the machine has no memory left"
    return f"its process ended with code {code}"


def _serve() -> None:
    """The child: answers requests until there are no more."""
    import resource

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it, too; its parent decides
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, _START_LIMIT_S)
    answers = sys.stdout.buffer
    sys.stdout = sys.stderr  # nothing that is printed may stand between answers
    from transformers.utils.chat_template_utils import render_jinja_template

    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_LIMIT, used + MEMORY_LIMIT))
    signal.setitimer(signal.ITIMER_REAL, 0)
    for line in sys.stdin.buffer:
        limit_s, call = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        answers.write(_answer(render_jinja_template, call) + b"\n")
        answers.flush()
        signal.setitimer(signal.ITIMER_REAL, 0)


def _answer(render: Callable[..., tuple[list[str], Any]], call: dict[str, Any]) -> bytes:
    try:
        [text], _ = render(**call)
        told = {"text": text}
        if len(text) > TEXT_LIMIT:
            told = {"limit": f"it makes {len(text):,} characters of one conversation, more than {TEXT_LIMIT:,}"}
        return json.dumps(told).encode()
    except MemoryError:
        told = {"limit": f"it takes more than {MEMORY_LIMIT // 2**30} GiB for one conversation"}
    except Exception as error:  # templates raise what they like
        told = {"error": str(error)[:1000]}
    return json.dumps(told).encode()


if __name__ == "__main__":
    _serve()
