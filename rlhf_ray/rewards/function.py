"""Scores from a Python function of the user's."""

import importlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any

from rlhf_ray.config.rewards import FunctionReward
from rlhf_ray.data.prompt_rows import RowColumn
from rlhf_ray.rewards.parameters import ParameterError, Parameters
from rlhf_ray.rewards.scorer import TextBatch, TextScorer


class FunctionScorer(TextScorer):
    """Calls a function with what its `Parameters` ask for, in one thread, so that a call that hangs can be given up.

    A thread can't be killed: after a time-out the scorer refuses all further calls, and the process that holds it
    is to be ended.
    """

    def __init__(self, config: FunctionReward) -> None:
        """Import the function.

        Raises:
            RewardError: it can't be imported or called.
        """
        super().__init__(config, f"reward function {config.function!r}")
        self._timeout_s = config.timeout_s
        self._function = self._import(config.function)
        try:
            self._parameters = Parameters.of(self._function)
        except ParameterError as error:
            raise self._error(str(error)) from error
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
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
            raise self._error(str(error)) from error

    def _answer(self, batch: TextBatch) -> Any:
        if self._hung:
            raise self._error("still hangs in an earlier call: restart its process", batch.uids)
        placed, named = self._parameters.arguments(batch.prompts, batch.responses, batch.columns)
        call = Future[Any]()
        self._calls.put((call, partial(self._function, *placed, **named)))
        try:
            error = call.exception(self._timeout_s)
        except TimeoutError:
            self._hung = True
            raise self._error(
                f"did not return within timeout_s ({self._timeout_s:g} s): raise timeout_s, lower "
                f"batch_size ({self._batch_size}), or find out what it waits for",
                batch.uids,
            ) from None
        if error is not None:
            raise self._error(f"raised {type(error).__name__}: {error}", batch.uids) from error
        return call.result()

    def _work(self) -> None:
        while True:
            call, function = self._calls.get()
            try:
                call.set_result(function())
            except BaseException as error:  # SystemExit too: it would end this thread, and the caller would time out
                call.set_exception(error)

    def _import(self, target: str) -> Callable[..., Any]:
        module_name, _, name = target.partition(":")
        try:
            module = importlib.import_module(module_name)
        except (Exception, SystemExit) as error:  # a module may do anything while it is imported
            raise self._error(
                f"can't be imported: {type(error).__name__}: {error}; its module must be on the Python "
                "path of every node (install it, or put it into the job's working directory)"
            ) from error
        function: Callable[..., Any] | None = getattr(module, name, None)
        if not callable(function):
            found = "has no such name" if function is None else f"has {type(function).__name__} under that name"
            raise self._error(
                f"can't be used: module {module_name!r} ({getattr(module, '__file__', None)}) {found}; "
                "write function: package.module:function"
            )
        return function
