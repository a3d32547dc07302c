"""What imports what: the layers of docs/architecture.md, read from the source alone."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import rlhf_ray

PACKAGE = Path(rlhf_ray.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# From the bottom up. Folders in one set are side by side and may import each other.
LAYERS = (
    {"config"},
    {"algorithms"},
    {"data"},
    {"rewards"},
    {"models"},
    {"engines"},
    {"cluster"},
    {"planner"},
    {"recovery"},
    {"telemetry", "evaluation"},
    {"actors"},
    {"controllers"},
    {"cli"},
)
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}
# A leaf that every layer above config may use.
PLATFORM = "platform"
# `prepare` makes the tiny example model; it is a command's work that happens to be mostly data.
ALLOWED = {("data/prepare/tiny.py", "rlhf_ray.models")}


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in FILES:
        yield path.relative_to(PACKAGE), ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.Module) -> Iterator[str]:
    """Modules that are imported, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            # `from rlhf_ray import data` is an import of rlhf_ray.data
            yield from (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "rlhf_ray" else [node.module]
            )


def layer_of(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def test_every_folder_is_a_layer() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders <= HEIGHT.keys()
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", f"{PLATFORM}.py"}


def test_imports_point_downwards() -> None:
    wrong = []
    for path, tree in trees():
        own = layer_of(path)
        for module in imports(tree):
            if not module.startswith("rlhf_ray.") or (str(path), module) in ALLOWED:
                continue
            target = module.split(".")[1]
            if own == PLATFORM or (target == PLATFORM and own == "config"):
                wrong.append(f"{path} imports {module}")
            elif target != PLATFORM and HEIGHT[target] > HEIGHT[own]:
                wrong.append(f"{path} imports {module}, which is above it")
    assert not wrong, "\n".join(wrong)


def at_import(node: ast.AST, *, typing: bool) -> Iterator[ast.AST]:
    """What runs when a module is imported; with `typing` also what a type checker alone reads."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield child
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING" and not typing:
            yield from child.orelse
        else:
            yield from at_import(child, typing=typing)


def import_graph(modules: dict[str, ast.Module], *, typing: bool) -> dict[str, set[str]]:
    """Modules of the package that each imports."""
    found = {}
    for own, tree in modules.items():
        names = set[str]()
        for node in at_import(tree, typing=typing):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                names |= inner if inner <= modules.keys() else inner | {str(node.module)}
        found[own] = names & modules.keys() - {own}
    return found


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize("typing", [False, True])
def test_no_modules_import_each_other_in_a_circle(typing: bool) -> None:
    modules = {
        ".".join(("rlhf_ray", *path.with_suffix("").parts)).removesuffix(".__init__"): tree for path, tree in trees()
    }
    assert find_cycle(import_graph(modules, typing=typing)) == []


def test_a_circle_is_found() -> None:
    sources = {"a": "import b", "b": "from c import x", "c": "if TYPE_CHECKING:\n    import a\ndef f():\n    import a"}
    modules = {name: ast.parse(text) for name, text in sources.items()}
    assert not find_cycle(import_graph(modules, typing=False))
    assert set(find_cycle(import_graph(modules, typing=True))) == {"a", "b", "c"}


@pytest.mark.parametrize("library", ["deepspeed", "vllm"])
def test_only_engines_import(library: str) -> None:
    users = {layer_of(path) for path, tree in trees() for module in imports(tree) if module.split(".")[0] == library}
    assert users == {"engines"}


@pytest.mark.parametrize("library", ["torch", "ray", "transformers", "numpy"])
def test_config_imports_nothing_heavy(library: str) -> None:
    users = {str(path) for path, tree in trees() for module in imports(tree) if module.split(".")[0] == library}
    assert not {path for path in users if path.startswith("config")}


def test_nothing_prints() -> None:
    calls = [
        f"{path}:{node.lineno}"
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not calls, f"use logging: {', '.join(calls)}"


def test_only_the_platform_asks_whether_there_is_a_gpu() -> None:
    """Its one exception: which generators there are to save (actors/worker.py)."""
    askers = {
        str(path)
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "is_available"
    }
    assert askers <= {"platform.py", "actors/worker.py"}
