"""What the Grafana dashboard asks Prometheus for."""

import json
import re
from pathlib import Path

DASHBOARD = json.loads((Path(__file__).parents[1] / "docker/grafana/rlhf_ray.json").read_text())
QUERIES = [
    (panel["title"], target["expr"], target["legendFormat"])
    for panel in DASHBOARD["panels"]
    for target in panel.get("targets", ())
]


def metrics_of(expression: str) -> set[str]:
    """Names of the metrics in a PromQL expression: what is left of its words without labels, ranges and functions."""
    bare = re.sub(r'"[^"]*"', "", expression)
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]", "", bare)
    bare = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", "", bare)
    words = re.findall(r"(?<![\w.])[a-zA-Z_:][\w:]*(?!\w*\s*\()", bare)
    return set(words) - {"and", "or", "unless", "offset", "bool"}
