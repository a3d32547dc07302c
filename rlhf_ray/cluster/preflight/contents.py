"""Libraries, models, data and reward functions on the nodes."""

import re
from collections import defaultdict
from collections.abc import Iterator

from rlhf_ray.cluster.libraries import LIBRARIES
from rlhf_ray.cluster.named_paths import Named, local_path, named_in
from rlhf_ray.cluster.preflight.asked import compiled_optimizers, modules_and_variables
from rlhf_ray.cluster.preflight.judge import Seen, judge_compilers, judge_model, judge_presence, judge_versions
from rlhf_ray.cluster.preflight.probe import NodeProbe
from rlhf_ray.cluster.preflight.report import Check
from rlhf_ray.cluster.preflight.view import View

START_S = 20.0
"""Until a probe answers for the first time: its process has to start."""

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def check_contents(view: View) -> Iterator[Check]:
    """Have every node look, and compare it with what this process sees."""
    read = [named for named in named_in(view.config) if named.kind in ("model", "data")]
    on_hub = {named.value for named in read if local_path(named) is None and _HUB_NAME.fullmatch(named.value)}
    paths = {named: str(local_path(named) or named.value) for named in read if named.value not in on_hub}
    modules, variables = modules_and_variables(view.config)
    asked = (list(LIBRARIES), list(paths.values()), list(on_hub), list(modules.values()), list(variables.values()))
    driver = Seen(**NodeProbe().look(*asked))
    answers, raised = view.probes.ask_all("look", *asked, limit_s=START_S)
    seen = {name: Seen(**answer) for name, answer in answers.items()}
    broken = [f"node {name}: can't look at itself: {reason}" for name, reason in raised.items()]

    problems = [*broken, *judge_versions(driver, seen)]
    yield Check("versions", f"{len(LIBRARIES)} libraries and Python alike on {_count(len(seen))}", tuple(problems))
    yield _models(view, read, paths, driver, seen)
    yield from _compilers(view)
    home = {view.home.name: seen[view.home.name]} if view.home.name in seen else {}
    data = {named: path for named, path in paths.items() if named.kind == "data"}
    problems = [p for named, path in data.items() for p in judge_model(named.setting, path, driver, home)]
    yield Check("data", f"read on {view.home.name} alone, by the controller", tuple(problems))
    if modules or variables:
        importable = "Install it there, or name the folder it is in with PYTHONPATH when Ray is started"
        exported = "Set it there before Ray is started"
        problems = [p for setting, name in modules.items() for p in judge_presence(setting, name, importable, seen)]
        problems += [p for setting, name in variables.items() for p in judge_presence(setting, name, exported, seen)]
        yield Check("rewards", f"functions and tokens are there on {_count(len(seen))}", tuple(problems))


def _compilers(view: View) -> Iterator[Check]:
    """Nodes that compile the optimizer of a role have what that takes."""
    asked = compiled_optimizers(view.config)
    problems: list[str] = []
    for role, setting in asked.items():
        nodes = [node.name for node in view.of([role])]
        answers, _ = view.probes.ask("compiler", dict.fromkeys(nodes, ()), limit_s=START_S)
        problems += judge_compilers(setting, answers)
    if asked:
        yield Check("compilers", f"there for {' and '.join(asked)}, whose optimizer steps on the CPU", tuple(problems))


def _models(view: View, read: list[Named], paths: dict[Named, str], driver: Seen, seen: dict[str, Seen]) -> Check:
    """Models are read where their roles sit; the controller reads their configs and tokenizers."""
    roles: dict[tuple[str, str], set[str]] = defaultdict(set)
    for named in read:
        if named.kind == "model" and named.role is not None:
            roles[named.setting, paths.get(named, named.value)].add(named.role)
    problems: list[str] = []
    for (setting, model), readers in roles.items():
        nodes = view.of(sorted(readers), with_home=True)
        there = {node.name: seen[node.name] for node in nodes if node.name in seen}
        problems += judge_model(setting, model, driver, there)
    return Check("models", f"{len(roles)} readable where their roles sit", tuple(problems))


def _count(nodes: int) -> str:
    return "1 node" if nodes == 1 else f"{nodes} nodes"
