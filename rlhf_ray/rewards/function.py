"""Scores from a Python function of the user's."""

import importlib
import threading
from collections.abc import Callable, Mapping, Sequence
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from rlhf_ray.config.rewards import FunctionReward, part_name
from rlhf_ray.data.prompt_rows import RowColumn
from rlhf_ray.data.trajectory import Floats
from rlhf_ray.rewards.errors import RewardError, checked_scores
from rlhf_ray.rewards.parameters import ParameterError, Parameters

_Function = Callable[..., Any]


class FunctionScorer:
    """Calls a function batch by batch with what its `Parameters` ask for, in one thread, so that a call that hangs can
    be given up.

    A thread can't be killed: after a time-out the scorer refuses all further calls, and the process that holds it
    is to be ended.
    """

    def __init__(self, config: FunctionReward) -> None:
        """Import the function.

        Raises:
            RewardError: it can't be imported or called.
        """
        self._part = part_name(config)
        self._source = f"reward function {config.function!r}"
        self._batch_size = config.batch_size
        self._timeout_s = config.timeout_s
        self._function = self._import(config.function)
        try:
            self._parameters = Parameters.of(self._function)
        except ParameterError as error:
            raise RewardError(self._part, f"{self._source} {error}") from error
        self._calls: SimpleQueue[_Call] = SimpleQueue()
        self._hung = False
        # One thread for all calls, since functions keep thread-bound things (database handles, event loops). A daemon,
        # since a hung one must not keep the process alive.
        threading.Thread(target=self._work, name=f"reward-{self._part}", daemon=True).start()

    def check(self, columns: Sequence[RowColumn], rows: int) -> None:
        """Look whether the rows of prompts have the columns that the function asks for.

        Raises:
            RewardError: they have not.
        """
        try:
            self._parameters.check(columns, rows)
        except ParameterError as error:
            raise RewardError(self._part, f"{self._source} {error}") from error

    def score(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        uids: Sequence[str],
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> Floats:
        """One score for each sample, float32 `[samples]`.

        Args:
            columns: by name, a value for each sample, None where its row has none.

        Raises:
            RewardError: the function raised (its exception is the cause), took longer than `timeout_s` for a batch,
                or gave the wrong count or something else than finite numbers; the samples are named.
        """
        scores = [np.empty(0, np.float32)]
        for start in range(0, len(uids), self._batch_size):
            batch = slice(start, start + self._batch_size)
            of_batch = {name: values[batch] for name, values in (columns or {}).items()}
            call = _Call(*self._parameters.arguments(prompts[batch], responses[batch], of_batch))
            answer = self._call(call, uids[batch])
            scores.append(checked_scores(self._part, self._source, answer, uids[batch]))
        return np.concatenate(scores)

    def _call(self, call: "_Call", uids: Sequence[str]) -> Any:
        if self._hung:
            raise RewardError(self._part, f"{self._source} still hangs in an earlier call: restart its process", uids)
        self._calls.put(call)
        try:
            call.done.get(timeout=self._timeout_s)
        except Empty:
            self._hung = True
            raise RewardError(
                self._part,
                f"{self._source} did not return within timeout_s ({self._timeout_s:g} s): raise timeout_s, lower "
                f"batch_size ({self._batch_size}), or find out what it waits for",
                uids,
            ) from None
        if call.error is not None:
            raise RewardError(
                self._part, f"{self._source} raised {type(call.error).__name__}: {call.error}", uids
            ) from call.error
        return call.answer

    def _work(self) -> None:
        while True:
            call = self._calls.get()
            try:
                call.answer = self._function(*call.placed, **call.named)
            except BaseException as error:  # SystemExit too: it would end this thread, and the caller would time out
                call.error = error
            call.done.put(None)

    def _import(self, target: str) -> _Function:
        module_name, _, name = target.partition(":")
        try:
            module = importlib.import_module(module_name)
        except (Exception, SystemExit) as error:  # a module may do anything while it is imported
            raise RewardError(
                self._part,
                f"{self._source} can't be imported: {type(error).__name__}: {error}; its module must be on the Python "
                "path of every node (install it, or put it into the job's working directory)",
            ) from error
        value: Any = getattr(module, name, None)
        if not callable(value):
            found = "has no such name" if value is None else f"has {type(value).__name__} under that name"
            raise RewardError(
                self._part,
                f"{self._source} can't be used: module {module_name!r} ({getattr(module, '__file__', None)}) {found}; "
                "write function: package.module:function",
            )
        function: _Function = value
        return function


class _Call:
    """One batch on its way through the thread."""

    def __init__(self, placed: Sequence[Any], named: Mapping[str, Any]) -> None:
        self.placed = placed
        self.named = named
        self.answer: Any = None
        self.error: BaseException | None = None
        self.done: SimpleQueue[None] = SimpleQueue()
