"""What the parameters of a reward function stand for."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_ray.config.base import nearest
from rlhf_ray.data.prompt_rows import RowColumn

TEXTS = ("prompts", "responses")


class ParameterError(Exception):
    """A function that can't be called with samples of this data."""


@dataclass(frozen=True)
class Parameters:
    """How a reward function is called.

    Parameters named `prompts` and `responses` get the texts, and every other one gets the column of its name, each as a
    list with one entry a sample. A function that has neither of the two names gets the texts as its first two
    arguments. A parameter with a default keeps it where no row has its column. `**columns` gets all that no other
    parameter gets.

    Attributes:
        leading: names of the two parameters that get the texts by their place; empty where they go by name.
        by_place: what can be given by its place alone, in order.
        by_name: what is given by name.
        optional: by name, the default of each parameter that has one.
        takes_all: whether there is a `**columns`.
    """

    leading: tuple[str, ...]
    by_place: tuple[str, ...]
    by_name: tuple[str, ...]
    optional: Mapping[str, Any]
    takes_all: bool

    @classmethod
    def of(cls, function: Callable[..., Any]) -> "Parameters":
        """From its signature; one that has none, as some of compiled modules, gets the texts alone.

        Raises:
            ParameterError: it takes no parameters.
        """
        try:
            found = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):
            return cls(TEXTS, (), (), {}, takes_all=False)
        takes_any = any(p.kind is p.VAR_POSITIONAL for p in found)
        takes_all = any(p.kind is p.VAR_KEYWORD for p in found)
        own = [p for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if not own and not takes_any and not takes_all:
            raise ParameterError("takes no parameters, but must take at least 'responses'")
        placed = [p for p in own if p.kind is not p.KEYWORD_ONLY]
        leading: tuple[str, ...] = ()
        # `*args` is a wrapper, most often: what it wraps has the two texts.
        if takes_any or (len(placed) >= 2 and not any(p.name in TEXTS for p in own)):
            names = [p.name for p in placed[:2]]
            leading = (*names, *TEXTS[len(names) :])
            own = [p for p in own if p.name not in names]
        return cls(
            leading=leading,
            by_place=tuple(p.name for p in own if p.kind is p.POSITIONAL_ONLY),
            by_name=tuple(p.name for p in own if p.kind is not p.POSITIONAL_ONLY),
            optional={p.name: p.default for p in own if p.default is not p.empty},
            takes_all=takes_all and not takes_any,
        )

    def check(self, columns: Sequence[RowColumn], rows: int) -> None:
        """Look for what is asked for and not there.

        Args:
            columns: that the rows of prompts have.
            rows: how many there are.

        Raises:
            ParameterError: a column that no row has, or that some rows have not, or that can't be given.
        """
        known = {column.name: column for column in columns}
        there = f"the columns there are: {', '.join(known)}" if known else "the rows have no columns beside prompts"
        for name in (*self.by_place, *self.by_name):
            if name in TEXTS or name in self.optional:
                continue
            if name not in known:
                close = nearest(name, [*known, *TEXTS])
                hint = f"; did you mean {close!r}?" if close else ""
                raise ParameterError(f"asks for column {name!r}, which no row of data.prompts has ({there}){hint}")
            if (column := known[name]).rows < rows:
                raise ParameterError(
                    f"asks for column {name!r}, which {rows - column.rows} of {rows} rows, the first of them "
                    f"{column.first_without!r}, have not: give it to all, or give the parameter a default, so that it "
                    "gets None for these"
                )
        if taken := [name for name in self.leading if name in known and name not in TEXTS]:
            raise ParameterError(
                f"has no parameters 'prompts' and 'responses', so its first two get them, but {taken[0]!r} is a "
                "column: give the parameters that get the texts those names"
            )
        if self.takes_all and (taken := [name for name in (*TEXTS, *self.leading) if name in known]):
            raise ParameterError(
                f"takes all columns, but column {taken[0]!r} has the name of what it gets anyway: name in "
                "data.keep_columns the others"
            )

    def arguments(
        self, prompts: Sequence[str], responses: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> tuple[list[Any], dict[str, Any]]:
        """What to call the function with, by place and by name. Lists are the function's own."""
        given = {name: list(values) for name, values in columns.items()}
        texts = dict(zip(TEXTS, (list(prompts), list(responses)), strict=True))
        values = given | texts
        placed: list[Any] = list(texts.values()) if self.leading else []
        placed += [values[name] if name in values else self.optional[name] for name in self.by_place]
        named = {name: values[name] for name in self.by_name if name in values}
        if self.takes_all:
            named |= {name: value for name, value in given.items() if name not in (*self.by_place, *TEXTS)}
        return placed, named
