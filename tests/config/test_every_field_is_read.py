"""A field that nothing reads is a promise that nothing keeps.

A field counts as read where an attribute of its name is taken from something that can be its section: a name that is
annotated with the section or a base of it, a field or property that holds one, what is assigned from those or goes
over them, or `self` in the section's own properties. So `policy.engine` is no reader of `critic.engine`.
"""

import ast
import importlib
import pkgutil
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TypeVar, get_args

from pydantic import BaseModel

import rlhf_ray
import rlhf_ray.config
from rlhf_ray.config.base import Section
from rlhf_ray.config.jobs import JOB_TYPES

PACKAGE = Path(rlhf_ray.__file__).parent

SectionType = type[BaseModel]


def sections_in(annotation: object) -> Iterator[SectionType]:
    """The sections that a type names; those of its fields are not among them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    if isinstance(annotation, TypeVar):
        yield from sections_in(annotation.__bound__)
    for argument in get_args(annotation):
        yield from sections_in(argument)


def sections() -> set[SectionType]:
    found, left = set[SectionType](), [*JOB_TYPES.values()]
    while left:
        section = left.pop()
        if section not in found:
            found.add(section)
            left += [inner for field in section.model_fields.values() for inner in sections_in(field.annotation)]
    return found


@cache
def named_types() -> dict[str, set[SectionType]]:
    """Sections by the names that annotations have for them: of classes, aliases of several, and bounds."""
    found = defaultdict[str, set[SectionType]](set)
    for module in pkgutil.walk_packages(rlhf_ray.config.__path__, "rlhf_ray.config."):
        for name, value in vars(importlib.import_module(module.name)).items():
            found[name] |= set(sections_in(value)) - {BaseModel, Section}
    return found


def annotated_with(annotation: ast.expr | None) -> set[SectionType]:
    if annotation is None:
        return set()
    text = ast.unparse(annotation).strip("'\"")
    names = {
        node.attr if isinstance(node, ast.Attribute) else node.id
        for node in ast.walk(ast.parse(text, mode="eval"))
        if isinstance(node, ast.Attribute | ast.Name)
    }
    return {section for name in names for section in named_types().get(name, set())}


def last_name(node: ast.expr) -> str | None:
    """`b` of `a.b`, `b()`, `a.b[0]`, `enumerate(a.b)` and `zip(c, a.b)`."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case ast.Call(func=ast.Name(id="enumerate" | "zip" | "iter" | "list"), args=[*_, inner]):
            return last_name(inner)
        case ast.Call(func=inner) | ast.Subscript(value=inner) | ast.NamedExpr(value=inner):
            return last_name(inner)
    return None


Holders = dict[str, set[SectionType]]


def assigned(tree: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Targets, and what they are taken from."""
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)):
                yield from zip(targets, values, strict=False)
            case ast.Assign(targets=[target], value=value) | ast.NamedExpr(target=target, value=value):
                for one in [value.body, value.orelse] if isinstance(value, ast.IfExp) else [value]:
                    yield target, one
            case ast.For(target=target, iter=value) | ast.comprehension(target=target, iter=value):
                elements = target.elts if isinstance(target, ast.Tuple) else [target]
                values = value.args if isinstance(value, ast.Call) and last_name(value.func) == "zip" else []
                yield from (
                    ((element, value) for element in elements) if not values else zip(elements, values, strict=False)
                )


def everywhere(trees: dict[Path, ast.Module]) -> Holders:
    """Fields and properties, by name, that hold sections."""
    found = defaultdict[str, set[SectionType]](set)
    for section in sections():
        for name, field in section.model_fields.items():
            found[name] |= set(sections_in(field.annotation))
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                found[node.name] |= annotated_with(node.returns)
    return found


def of_file(tree: ast.Module, shared: Holders) -> Holders:
    """Those and the variables of a file."""
    found = defaultdict[str, set[SectionType]](set, {name: set(held) for name, held in shared.items()})
    for node in ast.walk(tree):
        match node:
            case ast.arg(arg=name, annotation=annotation):
                found[name] |= annotated_with(annotation)
            case ast.AnnAssign(target=target, annotation=annotation):
                if name := last_name(target):
                    found[name] |= annotated_with(annotation)
            case ast.Call(func=ast.Name(id="isinstance"), args=[value, kind]):
                if name := last_name(value):
                    found[name] |= annotated_with(kind)
    for _ in range(3):  # a variable may be taken from a variable
        for target, value in assigned(tree):
            name, source = last_name(target), last_name(value)
            if name and source:
                found[name] |= found.get(source, set())
    return found


def reads(tree: ast.AST, holders: Holders) -> Iterator[tuple[SectionType, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and (owner := last_name(node.value)):
            yield from ((section, node.attr) for section in holders.get(owner, set()))


def config_functions(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef, set[SectionType]]]:
    """Properties and methods of config, through which some fields take effect, with what `self` is there, and private
    ones that these call; validators only check."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    used = {
        inner.attr if isinstance(inner, ast.Attribute) else inner.id
        for function in functions
        if not function.name.startswith("_")
        for inner in ast.walk(function)
        if isinstance(inner, ast.Attribute | ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.Module):
            own = named_types().get(node.name, set()) if isinstance(node, ast.ClassDef) else set()
            for function in node.body:
                if isinstance(function, ast.FunctionDef) and (function.name[0] != "_" or function.name in used):
                    yield function, own


def all_reads(trees: dict[Path, ast.Module]) -> set[tuple[SectionType, str]]:
    shared, found = everywhere(trees), set[tuple[SectionType, str]]()
    for path, tree in trees.items():
        holders = of_file(tree, shared)
        if path.relative_to(PACKAGE).parts[0] != "config":
            found |= set(reads(tree, holders))
            continue
        for function, own in config_functions(tree):
            found |= set(reads(function, {**holders, "self": own}))
    return found


def sources() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}


def unread(trees: dict[Path, ast.Module]) -> set[str]:
    found = all_reads(trees)
    return {
        f"{section.__name__}.{name}"
        for section in sections()
        for name in section.model_fields
        if not any((base, name) in found for base in section.__mro__)
    }


def test_every_field_is_read_by_something() -> None:
    dead = unread(sources())
    assert not dead, f"nothing reads {', '.join(sorted(dead))}"


def test_the_engine_of_one_section_is_not_that_of_another() -> None:
    source = "def f(config: PPOJob, other: Rollout):\n    held = config.policy\n    return held.engine, other.engine"
    found = all_reads({PACKAGE / "actors/made_up.py": ast.parse(source)})
    assert {section.__name__ for section, name in found if name == "engine"} >= {"Policy", "Rollout"}
    assert not {"Critic", "Reference"} & {section.__name__ for section, name in found if name == "engine"}
