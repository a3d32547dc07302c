"""From a YAML file and dotted overrides to a checked config, or one error that lists every problem."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from rlhf_ray.config.base import Section, nearest, sections_in, shown, suggestion
from rlhf_ray.config.jobs import JOB_TYPES, Job
from rlhf_ray.config.plugs import import_named
from rlhf_ray.config.yaml_text import MAX_DEPTH, YamlProblem, dump_yaml, parse_yaml, read_yaml

SectionT = TypeVar("SectionT", bound=Section)

# What pydantic says of a value of another kind than the key's, in the words of a config file.
_KINDS = {
    "tuple_type": "should be a list",
    "model_type": "should be a section",
    "model_attributes_type": "should be a section",
    "dict_type": "should be a section",
    "int_type": "should be a whole number, in digits",
    "float_type": "should be a number, such as 0.5 or 1e-5",
    "bool_type": "should be true or false",
    "string_type": "should be text, in quotes where it looks like something else",
}
_LONGEST_LINE = 1000


class ConfigError(Exception):
    """A config that can't be used.

    Attributes:
        source: the file, or what stood in for it.
        problems: one line each, beginning with the dotted path of the key.
    """

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.source = source
        self.problems = list(problems)
        super().__init__(f"{source}: " + "; ".join(self.problems))

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[str, list[str]]]:
        return type(self), (self.source, self.problems)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Job:
    """Read `path`, apply `key.path=value` overrides and check the whole.

    Raises:
        ConfigError: with every problem found, each naming its dotted path.
    """
    raw = _read(path)
    for override in overrides:
        apply_override(raw, override)
    return parse_config(raw, source=str(path))


def parse_config(raw: dict[str, Any], *, source: str = "config") -> Job:
    """Check a nested dictionary as read from YAML.

    Raises:
        ConfigError: with every problem found, each naming its dotted path.
    """
    try:
        job_type = _job_type(raw.get("job"))
    except ValueError as error:
        raise ConfigError(source, [str(error)]) from None
    return _validated(job_type, raw, source)


def _job_type(job: Any) -> type[Job]:
    """One of ours by its name, or anybody's as `package.module:Class`. Raises ValueError."""
    if isinstance(job, str) and job in JOB_TYPES:
        return JOB_TYPES[job]
    if not isinstance(job, str) or ":" not in job:
        close = nearest(job, JOB_TYPES) if isinstance(job, str) else None
        said = "is missing" if job is None else f"{shown(job)} is not a job type"
        said += f"; did you mean {close!r}?" if close else ""
        raise ValueError(f"job: {said} (known: {', '.join(JOB_TYPES)}, or package.module:Class)")
    found = import_named("job", job)
    if not isinstance(found, type) or not issubclass(found, Job):
        raise ValueError(f"job: {shown(job)} is no class of jobs: it must be a subclass of rlhf_ray.config.jobs.Job")
    lacking = sorted(
        [name for name in ("job", "placement", "run") if name not in found.model_fields]
        + [name for name in ("definition",) if not hasattr(found, name)]
        + list(found.__abstractmethods__)
    )
    if lacking:
        raise ValueError(f"job: {shown(job)} has no {', '.join(lacking)}, which every job has")
    return found


def load_section(path: Path, section: type[SectionT]) -> SectionT:
    """Read a file that is no job, such as a description of a cluster, as strictly as one.

    Raises:
        ConfigError: with every problem found, each naming its dotted path.
    """
    return _validated(section, _read(path), str(path))


def _validated(section: type[SectionT], raw: dict[str, Any], source: str) -> SectionT:
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        details = _of_fitting_kinds(section, [dict(detail) for detail in error.errors(include_url=False)])
        raise ConfigError(source, [_one_line(_described(section, detail)) for detail in details]) from None


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one dotted path (`reward.0.weight=0.5`) in `raw`; the value is read as YAML.

    Raises:
        ConfigError: when it is not of that form or the path leads through something that is no section.
    """
    path, separator, text = override.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys) or len(keys) > MAX_DEPTH or not path.isprintable():
        raise ConfigError("override", [f"{shown(override)} is not of the form section.key=value"])
    try:
        value = parse_yaml(text)
    except YamlProblem as problem:
        raise ConfigError("override", [f"{shown(override)}: the value {problem}"]) from None
    target: Any = raw
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        where = _one_line(".".join(keys[: depth + 1]))
        if isinstance(target, list):
            index = int(key) if re.fullmatch("[0-9]{1,9}", key) else len(target)
            if index >= len(target):
                has = f"entries 0 to {len(target) - 1}" if target else "no entries"
                raise ConfigError("override", [f"{where}: the list has {has}"])
            if last:
                target[index] = value
            target = target[index]
        elif isinstance(target, dict):
            if last:
                target[key] = value
            elif target.get(key) is None:
                target[key] = {}
            target = target[key]
        else:
            before = _one_line(".".join(keys[:depth]))
            raise ConfigError("override", [f"{where}: {before} is a value, not a section"])


def dump_config(config: Job) -> str:
    """The resolved config as YAML that `load_config` reads back to the same object."""
    raw = config.model_dump(mode="json", by_alias=True)
    return dump_yaml(raw)


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = read_yaml(path)
    except YamlProblem as problem:
        raise ConfigError(str(path), [str(problem)]) from None
    if not isinstance(raw, dict):
        raise ConfigError(str(path), ["must be a mapping of sections, such as `job: ppo`"])
    return raw


def _of_fitting_kinds(root: type[BaseModel], details: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pydantic tells what is wrong with a value as each of the kinds that a key takes: what lies within one counts."""
    tags = [_walked(root, detail["loc"])[0] for detail in details]
    within = {
        detail["loc"][:place]
        for detail, is_tag in zip(details, tags, strict=True)
        for place in range(len(is_tag) - 1)
        if is_tag[place]
    }
    return [
        detail
        for detail, is_tag in zip(details, tags, strict=True)
        if not (is_tag and is_tag[-1] and detail["loc"][:-1] in within)
    ]


def _one_line(text: str) -> str:
    """Without characters that would do something to a terminal, and of a length that is read."""
    whole = text if len(text) <= _LONGEST_LINE else f"{text[:_LONGEST_LINE]}…"
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in whole)


def _described(root: type[BaseModel], detail: dict[str, Any]) -> str:
    tags, _ = _walked(root, detail["loc"])
    path = ".".join(str(part) for part, is_tag in zip(detail["loc"], tags, strict=True) if not is_tag)
    if detail["type"] == "extra_forbidden":
        _, section = _walked(root, detail["loc"][:-1])
        known = [field.alias or name for name, field in section.model_fields.items()] if section else []
        return f"{path}: unknown key; {suggestion(str(detail['loc'][-1]), known, called='known keys')}"
    if detail["type"] == "missing":
        return f"{path}: is required"
    if detail["type"] == "value_error":
        return _with_full_paths(detail["msg"].removeprefix("Value error, "), path)
    if detail["type"] == "union_tag_not_found":
        return f"{path}: needs the key type"
    if detail["type"] == "union_tag_invalid":
        known = detail["ctx"]["expected_tags"].replace("'", "").split(", ")
        tag = detail["ctx"]["tag"]
        return f"{path}.type: {shown(tag)} is not known; {suggestion(tag, known)}"
    text = _KINDS.get(detail["type"], f"{detail['msg'][0].lower()}{detail['msg'][1:]}")
    return f"{path}: {text} (got {shown(detail['input'])})"


def _with_full_paths(message: str, path: str) -> str:
    """A section's conflicts name its own keys with a dot in front (`.zero_stage`), since it can't know its place."""
    full = re.sub(r"(?<!\S)\.(?=[a-z_])", f"{path}." if path else "", message)
    return f"{path}: {message}" if path and full == message else full


def _walked(root: type[BaseModel], location: Sequence[int | str]) -> tuple[list[bool], type[BaseModel] | None]:
    """Along the location of an error.

    Returns:
        for each part, whether it is the tag of a union's member, which pydantic puts behind a key or an index and no
        file has; and the section that the location ends in, if it ends in one.
    """
    section: type[BaseModel] | None = root
    members: list[type[BaseModel]] = []
    tags: list[bool] = []
    tag_follows = False
    for part in location:
        tags.append(tag_follows and not isinstance(part, int))
        if isinstance(part, int):
            continue
        if tags[-1]:
            if len(members) > 1:
                section = next((member for member in members if part in _tags_of(member)), None)
            tag_follows = False
            continue
        field = section.model_fields.get(part) if section else None
        members = sections_in(field.annotation) if field else []
        section = members[0] if len(members) == 1 else None
        tag_follows = len(members) > 1 or (field is not None and _takes_several_kinds(field.annotation))
    return tags, section


def _takes_several_kinds(annotation: Any) -> bool:
    """Whether it is a union of more than a kind and nothing."""
    return get_origin(annotation) in (Union, UnionType) and len(set(get_args(annotation)) - {NoneType}) > 1


def _tags_of(member: type[BaseModel]) -> Iterable[str]:
    """What tells a member of a union from the others: a value of its `type`, else the names of its keys."""
    kind = member.model_fields.get("type")
    return member.model_fields if kind is None else get_args(kind.annotation)
