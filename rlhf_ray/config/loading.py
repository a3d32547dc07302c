"""From a YAML file and dotted overrides to a checked config, or one error that lists every problem."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from rlhf_ray.config.base import Section, nearest
from rlhf_ray.config.jobs import JOB_TYPES, JobConfig

SectionT = TypeVar("SectionT", bound=Section)


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


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML without the silent overwriting of a key that stands twice, and with 1e-5 read as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                mark = key_node.start_mark
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_scalar_or_number(self, node: yaml.ScalarNode) -> str | float:
        text = str(self.construct_scalar(node))
        number = _as_number(text) if node.style is None else None
        return text if number is None else number


class _Dumper(yaml.SafeDumper):
    """Quotes the words that the loader above would read as numbers."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        quoted = "'" if _as_number(text) is not None else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=quoted)


def _as_number(text: str) -> float | None:
    """Exponents without a point, such as 1e-5, which YAML 1.1 takes for words."""
    if text[:1] not in tuple("+-.0123456789") or "e" not in text.lower():
        return None
    try:
        return float(text)
    except ValueError:
        return None


_UniqueKeyLoader.add_constructor("tag:yaml.org,2002:str", _UniqueKeyLoader.construct_scalar_or_number)
_Dumper.add_representer(str, _Dumper.represent_text)


def load_config(path: Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Read `path`, apply `key.path=value` overrides and check the whole.

    Raises:
        ConfigError: with every problem found, each naming its dotted path.
    """
    raw = _read_yaml(path)
    for override in overrides:
        apply_override(raw, override)
    return parse_config(raw, source=str(path))


def parse_config(raw: dict[str, Any], *, source: str = "config") -> JobConfig:
    """Check a nested dictionary as read from YAML.

    Raises:
        ConfigError: with every problem found, each naming its dotted path.
    """
    job = raw.get("job")
    if not isinstance(job, str) or job not in JOB_TYPES:
        known = ", ".join(JOB_TYPES)
        close = nearest(str(job), JOB_TYPES)
        said = (
            "is missing"
            if job is None
            else f"{job!r} is not a job type" + (f"; did you mean {close!r}?" if close else "")
        )
        raise ConfigError(source, [f"job: {said} (known: {known})"])
    return _validated(JOB_TYPES[job], raw, source)


def load_section(path: Path, section: type[SectionT]) -> SectionT:
    """Read a file that is no job, such as a description of a cluster, as strictly as one.

    Raises:
        ConfigError: with every problem found, each naming its dotted path.
    """
    return _validated(section, _read_yaml(path), str(path))


def _validated(section: type[SectionT], raw: dict[str, Any], source: str) -> SectionT:
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        problems = [_describe(section, dict(detail)) for detail in error.errors(include_url=False)]
        raise ConfigError(source, problems) from None


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one dotted path (`reward.0.weight=0.5`) in `raw`; the value is read as YAML.

    Raises:
        ConfigError: when it is not of that form or the path leads through something that is no section.
    """
    path, separator, text = override.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise ConfigError("override", [f"{override!r} is not of the form section.key=value"])
    value = _parse_scalar(text, override)
    target: Any = raw
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        where = ".".join(keys[: depth + 1])
        if isinstance(target, list):
            if not key.isdigit() or int(key) >= len(target):
                has = f"entries 0 to {len(target) - 1}" if target else "no entries"
                raise ConfigError("override", [f"{where}: the list has {has}"])
            if last:
                target[int(key)] = value
            target = target[int(key)]
        elif isinstance(target, dict):
            if last:
                target[key] = value
            elif target.get(key) is None:
                target[key] = {}
            target = target[key]
        else:
            raise ConfigError("override", [f"{where}: {'.'.join(keys[:depth])} is a value, not a section"])


def dump_config(config: JobConfig) -> str:
    """The resolved config as YAML that `load_config` reads back to the same object."""
    raw = config.model_dump(mode="json", by_alias=True)
    return yaml.dump(raw, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(str(path), ["no such file"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"cannot be read: {error}"]) from error
    return _parse_yaml(text, str(path))


def _parse_yaml(text: str, source: str) -> dict[str, Any]:
    try:
        raw = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ConfigError(source, [f"is not YAML: {' '.join(str(error).split())}"]) from None
    if not isinstance(raw, dict):
        raise ConfigError(source, ["must be a mapping of sections, such as `job: ppo`"])
    try:
        own: dict[str, Any] = _unshared(raw)
    except RecursionError:
        raise ConfigError(source, ["an anchor contains itself"]) from None
    return own


def _unshared(value: Any) -> Any:
    """A copy in which no two places are one object, as YAML aliases are: an override is for one of them."""
    if isinstance(value, dict):
        return {key: _unshared(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_unshared(inner) for inner in value]
    return value


def _parse_scalar(text: str, override: str) -> Any:
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError:
        raise ConfigError("override", [f"{override!r}: the value is not YAML"]) from None


def _describe(root: type[BaseModel], detail: dict[str, Any]) -> str:
    path = ".".join(str(part) for part in _without_tags(root, detail["loc"]))
    if detail["type"] == "extra_forbidden":
        section = _section_at(root, detail["loc"][:-1])
        known = [field.alias or name for name, field in section.model_fields.items()] if section else []
        return f"{path}: unknown key{_suggest(str(detail['loc'][-1]), known)}"
    if detail["type"] == "missing":
        return f"{path}: is required"
    if detail["type"] == "value_error":
        return _with_full_paths(detail["msg"].removeprefix("Value error, "), path)
    if detail["type"] == "union_tag_not_found":
        return f"{path}: needs the key type"
    if detail["type"] == "union_tag_invalid":
        known = detail["ctx"]["expected_tags"].replace("'", "").split(", ")
        tag = detail["ctx"]["tag"]
        close = nearest(tag, known)
        said = f"did you mean {close!r}?" if close else f"known: {', '.join(known)}"
        return f"{path}.type: {tag!r} is not known; {said}"
    message = {
        "tuple_type": "should be a list",
        "model_type": "should be a section",
        "model_attributes_type": "should be a section",
        "dict_type": "should be a section",
    }
    text = message.get(detail["type"], f"{detail['msg'][0].lower()}{detail['msg'][1:]}")
    return f"{path}: {text} (got {detail['input']!r})"


def _without_tags(root: type[BaseModel], location: Sequence[int | str]) -> list[int | str]:
    """The path as it stands in the file: pydantic puts the tag of a union's member behind its key or list index."""
    return [part for i, part in enumerate(location) if isinstance(part, int) or not _is_tag(root, location[:i])]


def _is_tag(root: type[BaseModel], before: Sequence[int | str]) -> bool:
    """Whether what follows `before` is the tag of a member of a union of sections."""
    keys = list(before)
    while keys and isinstance(keys[-1], int):
        keys.pop()
    section = _section_at(root, keys[:-1]) if keys else None
    field = section.model_fields.get(str(keys[-1])) if section else None
    return field is not None and len(_sections_in(field.annotation)) > 1


def _with_full_paths(message: str, path: str) -> str:
    """A section's conflicts name its own keys with a dot in front (`.zero_stage`), since it can't know its place."""
    full = re.sub(r"(?<!\S)\.(?=[a-z_])", f"{path}." if path else "", message)
    return f"{path}: {message}" if path and full == message else full


def _section_at(root: type[BaseModel], location: Sequence[int | str]) -> type[BaseModel] | None:
    """The section class that the error location points into; union members are told apart by their tags."""
    section: type[BaseModel] | None = root
    members: list[type[BaseModel]] = []
    for part in location:
        if isinstance(part, int):
            continue
        if section is not None and part in section.model_fields:
            members = _sections_in(section.model_fields[part].annotation)
            section = members[0] if len(members) == 1 else None
        elif members:
            section = next((member for member in members if part in _tags_of(member)), None)
            members = []
    return section


def _tags_of(member: type[BaseModel]) -> Iterable[str]:
    """What tells a member of a union from the others: a value of its `type`, else the names of its keys."""
    kind = member.model_fields.get("type")
    return member.model_fields if kind is None else get_args(kind.annotation)


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for inner in get_args(annotation) for found in _sections_in(inner)]


def _suggest(word: str, known: Sequence[str]) -> str:
    close = nearest(word, known)
    if close:
        return f"; did you mean {close!r}?"
    return f"; known keys: {', '.join(known)}" if known else ""
