"""A reward function gets what its parameters name, and is refused before a run when that is not there."""

import functools
from collections.abc import Callable
from typing import Any

import pytest

from rlhf_ray.data.prompt_rows import RowColumn
from rlhf_ray.rewards.parameters import ParameterError, Parameters

PROMPTS, RESPONSES = ["p", "q"], ["r", "s"]
COLUMNS = {"answer": [5, None], "level": ["easy", "hard"]}
FOUND = [RowColumn("answer", 9, "u4"), RowColumn("level", 10, None)]


def called(function: Callable[..., Any], columns: dict[str, list[Any]] = COLUMNS) -> Any:
    placed, named = Parameters.of(function).arguments(PROMPTS, RESPONSES, columns)
    return function(*placed, **named)


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def bare(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


class Scorer:
    def __call__(self, responses: Any, level: Any) -> Any:
        return responses, level

    def method(self, responses: Any, answer: Any) -> Any:
        return responses, answer


ANSWER, LEVEL = COLUMNS["answer"], COLUMNS["level"]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda prompts, responses: (prompts, responses), (PROMPTS, RESPONSES)),
        (lambda p, r: (p, r), (PROMPTS, RESPONSES)),
        (lambda *texts: texts, (PROMPTS, RESPONSES)),
        (bare, ((PROMPTS, RESPONSES), {})),
        (lambda p, r, /: (p, r), (PROMPTS, RESPONSES)),
        (lambda p, r, level: (p, r, level), (PROMPTS, RESPONSES, LEVEL)),
        (lambda p, r, temperature=0.5: (p, r, temperature), (PROMPTS, RESPONSES, 0.5)),
        (lambda responses, prompts: (prompts, responses), (PROMPTS, RESPONSES)),
        (lambda responses: responses, RESPONSES),
        (lambda prompts: prompts, PROMPTS),
        (lambda responses, answer: (responses, answer), (RESPONSES, ANSWER)),
        (lambda answer, responses: (responses, answer), (RESPONSES, ANSWER)),
        (lambda responses, level, /: (responses, level), (RESPONSES, LEVEL)),
        (lambda responses, group="x", /: (responses, group), (RESPONSES, "x")),
        (lambda *, responses, answer: (responses, answer), (RESPONSES, ANSWER)),
        (lambda responses, answer=None, group=None: (answer, group), (ANSWER, None)),
        (lambda responses, level, **columns: columns, {"answer": ANSWER}),
        (lambda prompts, responses, **columns: columns, COLUMNS),
        (lambda p, r, **columns: columns, COLUMNS),
        (lambda responses, answer=7, **columns: (answer, columns), (ANSWER, {"level": LEVEL})),
        (wrapped(lambda responses, answer: (responses, answer)), (RESPONSES, ANSWER)),
        (functools.partial(lambda kind, responses, level: (kind, level), "a"), ("a", LEVEL)),
        (Scorer(), (RESPONSES, LEVEL)),
        (Scorer().method, (RESPONSES, ANSWER)),
    ],
)
def test_parameters_get_what_they_name(function: Callable[..., Any], expected: Any) -> None:
    assert called(function) == expected


def test_lists_are_the_functions_own() -> None:
    def spoils(responses: list[str], level: list[str]) -> None:
        responses.clear()
        level.clear()

    called(spoils)
    assert RESPONSES == ["r", "s"]
    assert COLUMNS["level"] == ["easy", "hard"]


def test_texts_win_over_columns_of_their_names() -> None:
    assert called(lambda responses, answer: responses, {**COLUMNS, "responses": ["x", "y"]}) == RESPONSES


@pytest.mark.parametrize(
    "function",
    [
        lambda prompts, responses: [],
        lambda p, r: [],
        lambda responses, level: [],
        lambda responses, answer=None: [],
        lambda responses, group=None: [],
        lambda responses, **columns: [],
        bare,
        max,
    ],
)
def test_what_is_there_is_no_problem(function: Callable[..., Any]) -> None:
    Parameters.of(function).check(FOUND, 10)


@pytest.mark.parametrize(
    ("function", "columns", "message"),
    [
        (
            lambda responses, anwser: [],
            FOUND,
            "asks for column 'anwser', which no row of data.prompts has (the columns there are: answer, level); did "
            "you mean 'answer'?",
        ),
        (
            lambda prompts, completions: [],
            [],
            "asks for column 'completions', which no row of data.prompts has (the rows have no columns beside prompts)",
        ),
        (
            lambda p, r, group: [],
            FOUND,
            "asks for column 'group', which no row of data.prompts has (the columns there ",
        ),
        (
            lambda responses, answer: [],
            FOUND,
            "asks for column 'answer', which 1 of 10 rows, the first of them 'u4', have not: give it to all, or give "
            "the parameter a default, so that it gets None for these",
        ),
        (
            lambda respnses, level: [],
            FOUND,
            "has no parameters 'prompts' and 'responses', so its first two get them, but 'level' is a column: give the "
            "parameters that get the texts those names",
        ),
        (
            lambda responses, **columns: [],
            [*FOUND, RowColumn("prompts", 10, None)],
            "takes all columns, but column 'prompts' has the name of what it gets anyway: name in data.keep_columns",
        ),
    ],
)
def test_what_is_not_there_is_told(function: Callable[..., Any], columns: list[RowColumn], message: str) -> None:
    with pytest.raises(ParameterError) as caught:
        Parameters.of(function).check(columns, 10)
    assert str(caught.value).startswith(message)


def test_a_function_that_takes_nothing_is_refused() -> None:
    with pytest.raises(ParameterError, match="takes no parameters, but must take at least 'responses'"):
        Parameters.of(lambda: [])
