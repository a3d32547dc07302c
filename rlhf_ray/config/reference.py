"""docs/config.md, written from the schema: `python -m rlhf_ray.config.reference > docs/config.md`."""

import sys
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rlhf_ray.config.base import sections_in
from rlhf_ray.config.jobs import JOB_TYPES

HEADER = """\
# Config reference

Made from the schema by `python -m rlhf_ray.config.reference > docs/config.md`; a test keeps it current.
A config is one YAML file. Any key can be set on the command line: `rlhf-ray train CONFIG run.steps=5`.

- Numbers are decimal, in the file and on the command line: `1000`, `0.5`, `1e-5`. `1_000`, `0x10`, `017`, `1:30` and
  `'5'` are words, which no number is made of; `true`, `false`, `yes`, `no`, `on` and `off` are truth values; dates and
  keys are words. Counts end at 10⁹, processes at 100,000, what one step has of samples or rows at 10⁷.
- A path may begin with `~` or `~user`, which is expanded. Environment variables are not: a `$` before a name is
  refused, so write the path out, or give the key on the command line, where the shell expands it. `run.dir` must be
  somewhere that a folder can be kept, which `validate` and `train` look at; nothing is made before the run starts.
- A file is regular, UTF-8 and at most 256 KiB, has at most 5,000 values, aliases expanded, and at most 32 levels. Tags
  other than YAML's own for words, numbers, truth values, lists and sections are refused.
"""


def render() -> str:
    """All job types with all their fields, as Markdown."""
    parts = [HEADER]
    for job, model in JOB_TYPES.items():
        parts.append(f"## `job: {job}`\n\n{_one_paragraph(model.__doc__)}\n")
        parts.append(_table(model))
        parts.extend(_sections(model, ""))
    return "\n".join(parts)


def _sections(model: type[BaseModel], prefix: str) -> list[str]:
    parts = []
    for name, field in model.model_fields.items():
        inner = sections_in(field.annotation)
        for section in inner:
            path = f"{prefix}{field.alias or name}" + (".N" if _is_list(field.annotation) else "")
            title = f"### `{path}`" + (f" with `{_kind(section)}`" if len(inner) > 1 else "")
            parts.append(f"{title}\n\n{_one_paragraph(section.__doc__)}\n")
            parts.append(_table(section))
            parts.extend(_sections(section, f"{path}."))
    return parts


def _table(model: type[BaseModel]) -> str:
    rows = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in model.model_fields.items():
        meaning = _one_paragraph(field.description)
        kind = _type_name(field.annotation).replace("|", "\\|")
        rows.append(f"| `{field.alias or name}` | {kind} | {_default(field)} | {meaning} |")
    return "\n".join(rows) + "\n"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "none"
    if isinstance(value, BaseModel):
        own = [(name, getattr(value, name), inner) for name, inner in type(value).model_fields.items()]
        # A section that is left out can differ from one that is given without this key.
        return ", ".join(
            f"`{name}: {held}`" for name, held, inner in own if held != inner.get_default(call_default_factory=True)
        )
    if isinstance(value, str):
        return f"`{value}`" if value else '`""`'
    if isinstance(value, tuple):
        value = [entry.model_dump(exclude_unset=True) if isinstance(entry, BaseModel) else entry for entry in value]
    return f"`{repr(value).lower() if isinstance(value, bool) else repr(value)}`"


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_type_name(argument) for argument in arguments if argument is not NoneType))
    if sections_in(annotation):
        return "sections" if origin is tuple else "section"
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{argument}`" for argument in arguments)
    if origin is tuple:
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return f"{_type_name(arguments[1])} by name"
    return str(annotation.__name__)


def _is_list(annotation: Any) -> bool:
    return any(get_origin(kind) is tuple for kind in (annotation, *get_args(annotation)))


def _kind(section: type[BaseModel]) -> str:
    """What tells a member of a union from the others."""
    if "type" in section.model_fields:
        return f"type: {_type_name(section.model_fields['type'].annotation).replace('`', '')}"
    return next(kind for kind in ("model", "function", "url") if kind in section.model_fields)


def _one_paragraph(text: str | None) -> str:
    return " ".join((text or "").split())


if __name__ == "__main__":
    sys.stdout.write(render())
