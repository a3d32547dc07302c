"""The runbook quotes messages as the code has them."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import rlhf_ray

DOC = Path(rlhf_ray.__file__).parents[1] / "docs/operations.md"


def templates() -> Iterator[str]:
    """Every text of the package, with … for what is put into it."""
    for path in Path(rlhf_ray.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def quoted() -> list[str]:
    """The first cells of the runbook's rows."""
    runbook = DOC.read_text(encoding="utf-8").partition("## Runbook")[2]
    cells = [line.split(" | ")[0] for line in runbook.splitlines() if line.startswith("| `")]
    return [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]


def test_every_message_of_the_runbook_is_one_of_the_code() -> None:
    everything = "\n".join(templates())
    messages = quoted()
    assert len(messages) > 30
    unknown = []
    for message in messages:
        parts = [re.escape(part) for part in re.split("…", message) if part.strip()]
        if not re.search(".*?".join(parts), everything):
            unknown.append(message)
    assert not unknown, "\n".join(unknown)
