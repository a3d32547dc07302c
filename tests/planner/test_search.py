"""The fastest placements that fit: against all that can be tried on small clusters, and on large ones."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from on_bfloat16 import on_bfloat16
from rlhf_ray.cluster.assignment import PlacementError
from rlhf_ray.config.jobs import Job
from rlhf_ray.config.loading import ConfigError, apply_override, parse_config
from rlhf_ray.planner.calibration import Calibration, Device, ProcessMemory, defaults
from rlhf_ray.planner.candidates import Setting, layouts, settings
from rlhf_ray.planner.hardware import Hardware, load_hardware
from rlhf_ray.planner.jobs import workload_of
from rlhf_ray.planner.memory import plan_memory
from rlhf_ray.planner.placement import JobDevices
from rlhf_ray.planner.search import Proposal, best_placements
from rlhf_ray.planner.step_time import step_time
from rlhf_ray.planner.work import Lengths

SMALL = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
LENGTHS = Lengths(prompt=256, response=384, longest=512)
CONSTANTS: dict[Device, Calibration] = {"cpu": defaults("cpu"), "gpu": defaults("gpu")}


def ppo(folder: Path, **sections: Any) -> Job:
    model = folder / "config.json"
    model.write_text(json.dumps(SMALL))
    raw = {
        "job": "ppo",
        "name": "searched",
        "policy": {"model": str(model)},
        "reward": [{"model": str(model)}],
        "rollout": {"sampling": {"max_new_tokens": 512}, "engine": {"max_model_len": 1024}, "shard_samples": 16},
        "data": {"prompts": "prompts.jsonl", "prompts_per_step": 256},
        "run": {"steps": 10, "dir": "runs/searched"},
    }
    return on_bfloat16(parse_config({**raw, **sections}))


def cluster(folder: Path, devices: int, memory_gib: float) -> Hardware:
    group = {
        "device": "L4",
        "devices": devices,
        "device_memory_gib": memory_gib,
        "cpus": 8 * devices,
        "host_memory_gib": 64 * devices,
        "network_gb_s": 10,
    }
    path = folder / "lab.yaml"
    path.write_text(yaml.safe_dump({"nodes": [group]}))
    return load_hardware(str(path))


def search(job: Job, hardware: Hardware, most: int = 5) -> list[Proposal]:
    return best_placements(job, hardware, CONSTANTS, LENGTHS, most)


def everything(job: Job, hardware: Hardware) -> list[float]:
    """Seconds of a step in every layout with every setting of every group that fits."""
    raw = job.model_dump(mode="json", by_alias=True)
    roles = workload_of(job).roles
    found = []
    for layout in layouts(job, hardware, SMALL["num_attention_heads"]):
        each = [
            list(
                settings(
                    ranks=count,
                    scores=any(role.placed_as in ("reference", "reward") for role in roles if role.placed_as in group),
                    learns=any(role.placed_as in ("policy", "critic") for role in roles if role.placed_as in group),
                    leaves=layout.offload_idle,
                    on_devices=True,
                )
            )
            for group, count in zip(layout.groups, layout.devices, strict=True)
        ]
        for chosen in itertools.product(*each):
            changed = json.loads(json.dumps(raw))
            for key, value in layout.overrides.items():
                apply_override(changed, f"{key}={json.dumps(value)}")
            for group, setting in zip(layout.groups, chosen, strict=True):
                for role in roles:
                    if role.placed_as in group:
                        for key, value in setting.keys_of(role).items():
                            apply_override(changed, f"{role.section}.engine.{key}={json.dumps(value)}")
            seconds = timed(changed, hardware)
            if seconds is not None:
                found.append(seconds)
    return found


def timed(raw: dict[str, Any], hardware: Hardware) -> float | None:
    try:
        job = on_bfloat16(parse_config(raw))
        devices = JobDevices(job, hardware, CONSTANTS)
    except (ConfigError, PlacementError):
        return None
    plan = plan_memory(job, hardware, ProcessMemory())
    if not plan.fits:
        return None
    assert plan.engine is not None
    return step_time(workload_of(job), devices, LENGTHS, plan.engine.cached_tokens).seconds


@pytest.mark.parametrize(("devices", "memory_gib"), [(3, 60.0), (4, 30.0)])
def test_nothing_that_can_be_tried_on_a_small_cluster_is_a_percent_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: int, memory_gib: float
) -> None:
    fewer = [Setting(stage, off, again) for stage in (2, 3) for off in (False, True) for again in (False, True)]
    for module in ("rlhf_ray.planner.search", __name__):
        monkeypatch.setattr(f"{module}.settings", lambda *, learns, **_: fewer if learns else [Setting()])
    job, hardware = ppo(tmp_path), cluster(tmp_path, devices, memory_gib)
    [best] = search(job, hardware, most=1)
    all_of_them = everything(job, hardware)
    assert len(all_of_them) > 20
    # A group's settings are chosen by its own time, though it may have time to spare while it waits for another.
    assert best.time.seconds <= 1.01 * min(all_of_them)


def test_proposals_are_valid_fit_and_come_fastest_first(tmp_path: Path) -> None:
    job, hardware = ppo(tmp_path), cluster(tmp_path, 4, 40.0)
    found = search(job, hardware)
    assert len(found) == 5
    seconds = [proposal.time.seconds for proposal in found]
    assert seconds == sorted(seconds)
    raw = job.model_dump(mode="json", by_alias=True)
    for proposal in found:
        changed = json.loads(json.dumps(raw))
        for argument in proposal.arguments:
            apply_override(changed, argument)
        assert parse_config(changed) == proposal.job
        assert plan_memory(proposal.job, hardware, ProcessMemory()).fits


def test_the_job_as_it_is_may_be_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hardware = cluster(tmp_path, 4, 40.0)
    best = search(ppo(tmp_path), hardware, most=1)[0]
    found = search(best.job, hardware)
    assert found[0].arguments == []
    assert found[0].job == best.job
    assert len({str(proposal.job) for proposal in found}) == len(found) == 5
    monkeypatch.setattr("rlhf_ray.planner.search.layouts", lambda *_: [])
    assert [proposal.job for proposal in search(best.job, hardware)] == [best.job]


def test_what_a_role_needs_wherever_it_sits_is_kept(tmp_path: Path) -> None:
    placement = {"policy": {"gpus": 1, "labels": {"zone": "a"}, "env": {"A": "1"}}, "rollout": {"gpus": 1}}
    job, hardware = ppo(tmp_path, placement=placement), cluster(tmp_path, 4, 40.0)
    assert search(job, hardware) == []  # no node has the label
    machines = [replace(machine, node=replace(machine.node, labels={"zone": "a"})) for machine in hardware.machines]
    labelled = Hardware(hardware.name, tuple(machines))
    for proposal in search(job, labelled):
        assert proposal.job.placement.policy.labels == {"zone": "a"}
        assert proposal.job.placement.policy.env == {"A": "1"}


def test_nothing_is_proposed_where_nothing_fits(tmp_path: Path) -> None:
    assert search(ppo(tmp_path), cluster(tmp_path, 2, 2.0)) == []


def test_a_cpu_cluster_has_placements_too(tmp_path: Path) -> None:
    path = tmp_path / "cpus.yaml"
    path.write_text("nodes:\n  - {count: 2, cpus: 16, host_memory_gib: 256}\n")
    found = search(ppo(tmp_path), load_hardware(str(path)))
    assert found
    for proposal in found:
        assert proposal.job.placement.policy.gpus == 0
        assert proposal.plan.fits


@pytest.mark.parametrize("job", ["sft", "preference"])
def test_jobs_over_a_data_set_are_placed_too(tmp_path: Path, job: str) -> None:
    model = tmp_path / "config.json"
    model.write_text(json.dumps(SMALL))
    raw = {
        "job": job,
        "name": "searched",
        "policy": {"model": str(model)},
        "data": {"train": "rows.jsonl", "rows_per_step": 64},
        "run": {"dir": "runs/searched"},
    }
    best, *_ = search(on_bfloat16(parse_config(raw)), cluster(tmp_path, 4, 40.0))
    assert best.job.placement.policy.ranks == 4


def test_every_layout_has_all_roles_and_no_more_devices_than_there_are(tmp_path: Path) -> None:
    hardware = load_hardware("8xh100", 2)
    tried = list(layouts(ppo(tmp_path), hardware, heads=32))
    assert {layout.groups for layout in tried} == {
        (("policy", "reference"), ("critic", "reward"), ("rollout",)),
        (("policy",), ("critic",), ("reference",), ("reward",), ("rollout",)),
        (("policy", "critic", "reference", "reward"), ("rollout",)),
        (("policy", "critic", "reference", "reward", "rollout"),),
    }
    for layout in tried:
        assert sum(layout.devices) <= 16
        assert set(layout.sections) == {"policy", "critic", "reference", "reward", "rollout"}
        assert layout.tensor_parallel in (1, 2, 4, 8)


def test_without_a_critic_reward_models_sit_with_the_policy(tmp_path: Path) -> None:
    job = ppo(
        tmp_path,
        algorithm={"advantage": "rloo"},
        data={"prompts": "prompts.jsonl", "prompts_per_step": 64, "samples_per_prompt": 4},
        placement={"policy": {"gpus": 1}, "reward": {"gpus": 1}, "rollout": {"gpus": 1}},
    )
    for layout in layouts(job, load_hardware("8xh100"), heads=32):
        assert set(layout.sections) == {"policy", "reference", "reward", "rollout"}


def test_a_setting_that_takes_more_is_known_to(tmp_path: Path) -> None:
    plain = Setting()
    assert plain.takes_no_less_than(Setting(zero_stage=3, offload_optimizer=True))
    assert not Setting(offload_optimizer=True).takes_no_less_than(plain)
    assert not Setting(micro_batch=0.5).takes_no_less_than(plain)
