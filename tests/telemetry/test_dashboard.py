"""The Grafana dashboard asks for nothing that is not exported: by the code here, by vLLM, or by Ray."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dashboard import DASHBOARD, QUERIES, metrics_of
from rlhf_ray.telemetry.ray_metrics import all_series

OURS = {series.scraped: {"run", "job", *series.tags} for series in all_series()}

_SUFFIXES = {"gauge": ("",), "counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}


def labels_of(expression: str) -> set[str]:
    """Labels that an expression matches or groups by."""
    matched = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", expression)
    grouped = re.findall(r"\b(?:by|without|on)\s*\(([^)]*)\)", expression)
    return {*matched, *(label.strip() for labels in grouped for label in labels.split(","))}


def source(package: str, path: str) -> str:
    """A file of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return (Path(spec.submodule_search_locations[0]) / path).read_text()


def exported_by_vllm() -> Iterator[str]:
    found = re.findall(
        r'self\._(gauge|counter|histogram)_cls\(\s*name="vllm:(\w+)"', source("vllm", "v1/metrics/loggers.py")
    )
    for kind, name in found:
        yield from (f"ray_vllm_{name}{suffix}" for suffix in _SUFFIXES[kind])


def exported_by_ray() -> Iterator[str]:
    agent = source("ray", "dashboard/modules/reporter/reporter_agent.py")
    yield from (f"ray_{name}" for name in re.findall(r'^    "(\w+)": Gauge\(', agent, re.MULTILINE))
    # What Ray's core exports is not in Python, but in the dashboards that come with Ray.
    panels = source("ray", "dashboard/modules/metrics/dashboards/default_dashboard_panels.py")
    yield from re.findall(r"\bray_\w+(?=\{)", panels)


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ('ray_a{run=~"b",x="c d"}', {"ray_a"}),
        ("1 - sum by (run, role) (rate(ray_a_total[5m]))", {"ray_a_total"}),
        ("histogram_quantile(0.95, sum by (le) (rate(ray_b_bucket[1m]))) or ray_c", {"ray_b_bucket", "ray_c"}),
        ("ray_a / on (node) group_left (x) ray_b", {"ray_a", "ray_b"}),
    ],
)
def test_the_names_are_read_from_an_expression(expression: str, names: set[str]) -> None:
    assert metrics_of(expression) == names


def test_every_metric_of_the_dashboard_is_exported() -> None:
    exported = {*OURS, *exported_by_vllm(), *exported_by_ray()}
    asked = {name for _, expression, _ in QUERIES for name in metrics_of(expression)}
    assert asked - exported == set()
    assert {name.split("_")[1] for name in asked} >= {"rlhf", "vllm", "node"}


@pytest.mark.parametrize(("title", "expression", "legend"), QUERIES)
def test_labels_of_our_own_series_exist(title: str, expression: str, legend: str) -> None:
    for name in metrics_of(expression) & OURS.keys():
        shown = set(re.findall(r"\{\{(\w+)\}\}", legend))
        assert labels_of(expression) | shown <= OURS[name], title


def test_the_variables_of_the_dashboard_are_its_own() -> None:
    defined = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = {name for _, expression, _ in QUERIES for name in re.findall(r"\$\{?(\w+)", expression)}
    assert used <= defined
    runs = next(variable for variable in DASHBOARD["templating"]["list"] if variable["name"] == "run")
    assert runs["definition"] == "label_values(ray_rlhf_step, run)"
    assert "ray_rlhf_step" in OURS


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
