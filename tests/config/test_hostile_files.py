"""Whatever a config file holds, and whatever it is, reading it ends at once and in one line."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.loading import ConfigError, apply_override, dump_config, load_config, load_section, parse_config
from rlhf_ray.config.placement import Cluster
from rlhf_ray.config.yaml_text import MAX_BYTES, MAX_DEPTH, MAX_VALUES, parse_yaml, word_in_yaml

HEAD = "job: sft\nname: x\n"
TEN = ",".join("x" * 10)


def bomb(levels: int, one: str, many: str) -> str:
    """Each level holds the one below it ten times."""
    lines = [f"a0: &a0 {one}"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} " + many.format(",".join(f"k{i}: *a{level - 1}" for i in range(10))))
    return "\n".join(lines)


MUCH = "more than 5,000 values"
DEEP = "more than 32 levels"
HOSTILE = {
    "lists of aliases": (bomb(9, f"[{TEN}]", "[{0}]").replace("k0: ", ""), MUCH),
    "sections of aliases": (bomb(9, "{k: x}", "{{{0}}}"), MUCH),
    "merged aliases": (
        "a0: &a0 {k: x}\n" + "".join(f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 9)),
        MUCH,
    ),
    "one long text thousands of times": (f"a: &a {'x' * 100_000}\nb: [{','.join(['*a'] * 9000)}]", MUCH),
    "one long list a thousand times": (
        f"a: &a [{','.join('x' * 2000)}]\n" + "".join(f"b{i}: *a\n" for i in range(999)),
        MUCH,
    ),
    "a chain of aliases": ("a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 3000)), DEEP),
    "an alias within itself": ("a: &a {b: &b {c: *a, d: *b}}", "an anchor contains itself"),
    "a section merged into itself": ("a: &a {<<: *a}", "an anchor contains itself"),
    "an alias of nothing": ("a: *b", "undefined alias"),
    "open brackets": ("a: " + "[" * 100_000, DEEP),
    "closed brackets": ("a: " + "[" * 5000 + "]" * 5000, DEEP),
    "braces": ("{a: " * 5000, "is not YAML"),
    "keys of keys": ("? " * 5000, DEEP),
    "dashes": ("a:\n" + "- " * 5000, DEEP),
    "indented": ("".join(" " * i + f"k{i}:\n" for i in range(500)), DEEP),
    "many values": (f"a: [{'1,' * 100_000}]", MUCH),
    "many keys": ("".join(f"k{i}: 1\n" for i in range(9000)), MUCH),
    "a number without end": ("seed: " + "9" * 10_000, "a number of 10,000 digits"),
    "a fraction without end": ("seed: 0." + "9" * 10_000, "digits"),
    "a Python object": ("a: !!python/object/apply:os.system [x]", "has the tag"),
    "a tag of its own": ("a: !own x", "has the tag '!own'"),
    "bytes": ("a: !!binary aGk=", "has the tag '!!binary'"),
    "a date that is none": ("a: !!timestamp 2024-99-99", "has the tag"),
    "a tag that lies": ("seed: !!int abc", "has 'abc' where its tag says int"),
    "a list with the tag of a number": ("seed: !!int [1]", "has the tag"),
    "two documents": ("---\njob: ppo", "expected a single document"),
    "a merge of a number": ("a: {<<: 5}", "expected a mapping"),
    "a control character": ("a: \x1b[2J", "is not printable"),
    "too large": ("#" + "x" * MAX_BYTES, "more than the 256 KiB"),
}


@pytest.mark.parametrize(("text", "problem"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_text_is_refused_at_once_in_one_line(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(HEAD + text)
    for read in (lambda: load_config(path), lambda: load_section(path, Cluster)):
        began = time.process_time()
        with pytest.raises(ConfigError) as caught:
            read()
        assert time.process_time() - began < 2
        (found,) = caught.value.problems
        assert problem in found
        assert len(found) < 300
        assert found.isprintable()


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("/dev/zero", "no regular file"),
        ("/dev/null", "no regular file"),
        ("fifo", "no regular file"),
        ("folder", "it is a folder"),
        ("loop", "Too many levels of symbolic links"),
        ("sparse", "more than the 256 KiB"),
        ("utf16", "is not UTF-8 text (byte 1)"),
        ("a" * 5000, "File name too long"),
        ("a\0b", "no file can have this name"),
    ],
)
def test_a_file_of_another_kind_is_refused_at_once(name: str, problem: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "utf16").write_text(HEAD, encoding="utf-16")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / name)
    assert problem in caught.value.problems[0]


def overridden(raw: dict[str, Any], override: str) -> dict[str, Any]:
    apply_override(raw, override)
    return raw


@pytest.mark.parametrize(
    "override",
    [
        "run.epochs=" + "[" * 100_000,
        "run.epochs=" + "9" * 5000,
        "run.epochs=[&a [x,x],*b]",
        ".".join("a" * 5000) + "=1",
        "a" * 100_000 + "=1",
        "reward." + "9" * 5000 + "=1",
        "reward.²=1",
        "reward.-1=1",
        "name.x=1",
        "name=\udcff",
        "name=a\0b",
        "run.\x1b[2J=1",
        "name=!!python/name:os.system",
        "job=" + "x" * 100_000,
        "job=[sft]",
    ],
    ids=lambda override: override[:20].encode("ascii", "backslashreplace").decode(),
)
def test_a_hostile_override_is_refused_in_one_line(override: str) -> None:
    raw = {"job": "ppo", "name": "x", "reward": [{"model": "m"}]}
    with pytest.raises(ConfigError) as caught:
        parse_config(overridden(raw, override))
    problem = next(problem for problem in caught.value.problems if "is required" not in problem)
    assert len(problem) < 1100
    assert problem.isprintable()


def test_an_alias_and_a_merge_within_the_limits_are_what_they_always_were() -> None:
    text = "a: &a {x: 1, y: [1, 2]}\nb: {<<: *a, x: 2}\nc: {<<: [*a, {z: 3}], z: 4}\n"
    text += "d: {e: &e {<<: *a, x: 5}}\nf: {<<: *e}"
    found = parse_yaml(text)
    assert found["b"] == {"x": 2, "y": [1, 2]}
    assert found["c"] == {"x": 1, "y": [1, 2], "z": 4}
    assert found["f"] == {"x": 5, "y": [1, 2]}
    found["b"]["y"].append(3)
    assert found["a"]["y"] == [1, 2]


def test_what_is_just_within_the_limits_is_read() -> None:
    assert len(parse_yaml(f"a: [{','.join('1' * (MAX_VALUES - 3))}]")["a"]) == MAX_VALUES - 3
    parse_yaml("[" * MAX_DEPTH + "]" * MAX_DEPTH)


def test_keys_are_words_whatever_they_look_like() -> None:
    assert parse_yaml("{yes: 1, 2: 2, null: 3, 2024-01-01: 4}") == {"yes": 1, "2": 2, "null": 3, "2024-01-01": 4}


@pytest.mark.parametrize("text", ["a/b", "a: b", "5", "1e5", "yes", "#x", "ü 😀", "- a", "'x'", "", "[", "a\\b"])
def test_any_text_can_be_written_for_an_override(text: str) -> None:
    assert parse_yaml(word_in_yaml(text)) == text


def test_a_key_of_several_kinds_tells_of_the_kind_that_was_given() -> None:
    raw = {"job": "sft", "name": "x", "policy": {"model": "m"}, "data": {"train": [{"pat": "a"}]}, "run": {"dir": "r"}}
    with pytest.raises(ConfigError) as caught:
        parse_config(raw)
    assert caught.value.problems == [
        "data.train.0.path: is required",
        "data.train.0.pat: unknown key; did you mean 'path'?",
    ]
    raw["data"] = {"train": [{"path": "a"}]}
    assert "path: a" in dump_config(parse_config(raw))
