"""A field that nothing reads is a promise that nothing keeps."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from pydantic import BaseModel

import rlhf_ray
from rlhf_ray.config.jobs import JOB_TYPES

PACKAGE = Path(rlhf_ray.__file__).parent


def sections() -> set[type[BaseModel]]:
    def inside(annotation: object) -> Iterator[type[BaseModel]]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield annotation
            for field in annotation.model_fields.values():
                yield from inside(field.annotation)
        for argument in get_args(annotation):
            yield from inside(argument)

    return {section for job in JOB_TYPES.values() for section in inside(job)}


def nodes(inside_config: bool) -> Iterator[ast.AST]:
    for path in PACKAGE.rglob("*.py"):
        if (path.relative_to(PACKAGE).parts[0] == "config") == inside_config:
            yield from ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def attributes(tree: Iterator[ast.AST]) -> set[str]:
    """Names that are read as `something.name`."""
    return {node.attr for node in tree if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}


def config_functions() -> Iterator[ast.AST]:
    """Properties and methods of config, through which some fields take effect; validators only check."""
    for node in nodes(inside_config=True):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield from ast.walk(node)


def test_every_field_is_read_by_something() -> None:
    read = attributes(nodes(inside_config=False)) | attributes(config_functions())
    dead = {f"{section.__name__}.{name}" for section in sections() for name in section.model_fields if name not in read}
    assert not dead, f"nothing reads {', '.join(sorted(dead))}"
