"""The YAML that this package reads and writes: small, shallow, without surprises.

Numbers are decimal, as in JSON and YAML 1.2: `1_000`, `0x10`, `017` and `1:30` are words, `1e-5` is a number. Dates are
words, keys are always words, and `yes`, `no`, `on` and `off` are truth values. Limits on size, depth and aliases hold
before anything is expanded, so that no file takes longer than a moment or more memory than it is worth.
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from rlhf_ray.config.regular_files import read_regular

MAX_BYTES = 256 * 1024
"""Of a file."""
MAX_VALUES = 5000
"""In a file, aliases expanded: sections, lists, keys and values, a long text counting once for each 100 characters."""
MAX_DEPTH = 32
"""Sections and lists within each other, aliases expanded."""
MAX_DIGITS = 40
"""Of a number; a longer one is none that a computer calculates with."""

_TAG = "tag:yaml.org,2002:"
_NULL = re.compile(r"(?:~|null|Null|NULL|)")
_BOOL = re.compile(r"(?:yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF)")
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*)")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_PLAIN = (("null", _NULL), ("bool", _BOOL), ("int", _INT), ("float", _FLOAT))


class YamlProblem(Exception):
    """A text that is not YAML, or more of it than is taken; the message says which, and where."""


def read_yaml(path: Path) -> Any:
    """The content of a regular file of at most `MAX_BYTES`.

    Raises:
        YamlProblem: it can't be read, or used.
    """
    try:
        content = read_regular(path, MAX_BYTES)
    except FileNotFoundError:
        raise YamlProblem("no such file") from None
    except OSError as error:
        raise YamlProblem(f"cannot be read: {error.strerror or error}") from error
    if len(content) > MAX_BYTES:
        raise YamlProblem(f"has more than the {MAX_BYTES // 1024} KiB that are read: it is no config")
    try:
        return parse_yaml(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise YamlProblem(f"is not UTF-8 text (byte {error.start + 1})") from None


def parse_yaml(text: str) -> Any:
    """The content of a text; no two places of it are one object, as YAML's aliases are.

    Raises:
        YamlProblem: it can't be used.
    """
    if len(text) > MAX_BYTES:
        raise YamlProblem(f"has {len(text):,} characters, more than the {MAX_BYTES:,} that are read")
    try:
        return _unshared(_Loader(text).get_single_data())
    except yaml.reader.ReaderError as error:
        raise YamlProblem(f"is not YAML: character {error.position + 1} is not printable") from None
    except _Refused as error:
        raise YamlProblem(str(error.problem)) from None
    except yaml.MarkedYAMLError as error:
        said = " ".join(filter(None, (error.context, error.problem, _at(error.problem_mark))))
        raise YamlProblem(f"is not YAML: {said}") from None


def dump_yaml(content: Any) -> str:
    """A text that `parse_yaml`, and any other reader of YAML, reads to the same content."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def word_in_yaml(text: str) -> str:
    """How a text is written where YAML is read: as it is, or in quotes where it would be read as something else."""
    try:
        plain = parse_yaml(text) == text
    except YamlProblem:
        plain = False
    return text if plain else json.dumps(text, ensure_ascii=False)


def _at(mark: Any) -> str:
    """Where in the text: PyYAML's marks, of which its types know two kinds."""
    return "" if mark is None else f"(line {mark.line + 1}, column {mark.column + 1})"


class _Refused(yaml.MarkedYAMLError):
    """YAML, but not for a config."""

    def __init__(self, problem: str, at: yaml.Node | yaml.Event) -> None:
        super().__init__(problem=f"{problem} {_at(at.start_mark)}")


class _Loader(yaml.SafeLoader):
    """Measures while it composes: a node is refused before what it holds is constructed."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._values = 0
        # By node, its values and its depth, aliases in it expanded. A node that is not complete has none.
        self._measures: dict[yaml.Node, tuple[int, int]] = {}

    def resolve(self, kind: type[yaml.Node], value: str | None, implicit: Any) -> str:
        """The tag of a node that has none."""
        if kind is yaml.ScalarNode and implicit[0] and value is not None:
            return next((_TAG + name for name, form in _PLAIN if form.fullmatch(value)), _TAG + "str")
        if kind is yaml.ScalarNode:
            return _TAG + "str"
        return _TAG + ("seq" if kind is yaml.SequenceNode else "map")

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            assert node is not None
            if node not in self._measures:
                raise _Refused("an anchor contains itself", event)
        else:
            _check_tag(event)
            self._check_depth(1, event)
            self._depth += 1
            node = super().compose_node(parent, index)
            assert node is not None
            self._depth -= 1
            self._measures[node] = self._measured(node)
        values, depth = self._measures[node]
        self._check_depth(depth, event)
        if isinstance(event, yaml.AliasEvent):
            self._count(values, event)
        return node

    def _measured(self, node: yaml.Node) -> tuple[int, int]:
        if isinstance(node, yaml.ScalarNode):
            values, depth = 1 + len(node.value) // 100, 0
            self._count(values, node)
            return values, depth
        self._count(1, node)
        inner = [self._measures[value] for value in _inner(node)]
        return 1 + sum(values for values, _ in inner), 1 + max((depth for _, depth in inner), default=0)

    def _count(self, values: int, at: yaml.Node | yaml.Event) -> None:
        self._values += values
        if self._values > MAX_VALUES:
            raise _Refused(f"has more than {MAX_VALUES:,} values, aliases expanded", at)

    def _check_depth(self, more: int, event: yaml.Event) -> None:
        if self._depth + more > MAX_DEPTH + 1:
            raise _Refused(f"has more than {MAX_DEPTH} levels within each other", event)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for index, (key, value) in enumerate(node.value):
            if not isinstance(key, yaml.ScalarNode):
                raise _Refused("has a key that is no word", key)
            is_merge = key.value == "<<" and key.style is None
            if key.value in seen and not is_merge:
                raise _Refused(f"key {key.value[:80]!r} stands twice", key)
            seen.add(key.value)
            # A node of its own, since the key may be an alias of a value.
            word = yaml.ScalarNode(_TAG + ("merge" if is_merge else "str"), key.value, key.start_mark, key.end_mark)
            self._measures[word] = self._measures[key]
            node.value[index] = (word, value)
        return node


def _inner(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for entry in node.value for part in entry]
    return list(node.value)


def _check_tag(event: yaml.Event) -> None:
    """Tags that name a type of another program, or one that a config has no use for, are refused."""
    tag: str | None = getattr(event, "tag", None)
    kinds = ("str", *(name for name, _ in _PLAIN)) if isinstance(event, yaml.ScalarEvent) else ("map", "seq")
    if tag is not None and tag != "!" and tag not in {_TAG + kind for kind in kinds}:
        shown = tag.replace(_TAG, "!!")[:80]
        raise _Refused(f"has the tag {shown!r}, which means nothing here: leave it out", event)


def _construct(loader: _Loader, node: yaml.ScalarNode) -> Any:
    """The value of a scalar whose tag was resolved or written out."""
    name, text = node.tag.removeprefix(_TAG), str(node.value)
    if not dict(_PLAIN)[name].fullmatch(text) and not (name == "float" and _INT.fullmatch(text)):
        raise _Refused(f"has {text[:80]!r} where its tag says {name}", node)
    if name == "null":
        return None
    if name == "bool":
        return text.lower() in ("yes", "true", "on")
    if len(text) > MAX_DIGITS:
        raise _Refused(f"has a number of {len(text):,} digits", node)
    if name == "int":
        return int(text)
    value = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    # 1e3 counts, as 1000 does.
    return int(value) if "." not in text and value.is_integer() and abs(value) < 2**53 else value


for _name, _ in _PLAIN:
    _Loader.add_constructor(_TAG + _name, _construct)


class _Dumper(yaml.SafeDumper):
    """Quotes the words that the loader above would read as numbers, and those that YAML 1.1 would."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        quoted = "'" if any(form.fullmatch(text) for _, form in _PLAIN) else None
        return self.represent_scalar(_TAG + "str", text, style=quoted)

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(str, _Dumper.represent_text)


def _unshared(value: Any) -> Any:
    """A copy in which no two places are one object: an override is for one of them."""
    if isinstance(value, dict):
        return {key: _unshared(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_unshared(inner) for inner in value]
    return value
