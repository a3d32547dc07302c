"""The base of every config section: strict, documented, immutable."""

import difflib
import reprlib
from collections.abc import Collection, Iterable
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

MOST = 10**9
"""Of anything that a config counts: more is a slip, and would be found out only when memory or time runs out."""
MOST_PROCESSES = 100_000
"""Of nodes, ranks, engines, workers: the planner makes an object for each."""
MOST_ROWS = 10**7
"""Of one step, be they prompts, samples or rows: it holds them in memory."""
MOST_FLOAT = 1e18
"""Of any other number: the products of some still are numbers."""
MOST_SECONDS = 1e8
"""Three years, of a wait; the system's own timers end at some."""
_LONGEST_WORD = 100

PositiveInt = Annotated[int, Field(gt=0, le=MOST)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MOST)]
RowCount = Annotated[int, Field(gt=0, le=MOST_ROWS)]
ProcessCount = Annotated[int, Field(gt=0, le=MOST_PROCESSES)]
Seconds = Annotated[float, Field(gt=0, le=MOST_SECONDS)]
PositiveFloat = Annotated[float, Field(gt=0, le=MOST_FLOAT)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=MOST_FLOAT)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("literal_type", "input should be one of its values, not a truth value")
    return value


def _refuse_other_kinds(schema: Any) -> None:
    """Numbers and truth values as such: pydantic would make 1 of `true`, 1000 of `'1_000'` and 16 of `'0x10'`."""
    if isinstance(schema, dict):
        for inner in list(schema.values()):
            _refuse_other_kinds(inner)
        if schema.get("type") in ("int", "float", "bool"):
            schema["strict"] = True
        elif schema.get("type") == "literal" and any(type(value) is int for value in schema["expected"]):
            # Python takes `true` for 1, and so does a literal.
            literal = dict(schema)
            schema.clear()
            schema.update(core_schema.no_info_before_validator_function(_no_truth_value, literal))
    elif isinstance(schema, list | tuple):
        for inner in schema:
            _refuse_other_kinds(inner)


class Section(BaseModel):
    """A config section. Unknown keys are errors, values are of the kind that their key says and never change after
    loading, and the docstring under each field is its documentation (docs/config.md is made from it)."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    @classmethod
    def __get_pydantic_core_schema__(cls, source: type[BaseModel], handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _refuse_other_kinds(schema)
        return schema


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120
_SHORT.maxlong = 60


def shown(value: Any) -> str:
    """A value as it stands in a message: as Python writes it, cut where it is long."""
    return _SHORT.repr(value)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that somebody who wrote `word` may have meant."""
    if len(word) > _LONGEST_WORD:
        return None
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)), None)


def suggestion(word: str, known: Collection[str], *, called: str = "known", more: str = "") -> str:
    """The end of a message about a word that is not known: what may have been meant, else all that is known."""
    close = nearest(word, known)
    return f"did you mean {close!r}?" if close else f"{called}: {', '.join(known)}{more}"


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field of this type can hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for inner in get_args(annotation) for found in sections_in(inner)]
