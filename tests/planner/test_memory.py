"""What a plan counts, against numbers worked out by hand from the shapes of public models."""

from collections.abc import Callable
from typing import Any

import pytest

from rlhf_ray.cluster.assignment import PlacementError
from rlhf_ray.config.roles import Level
from rlhf_ray.models.shapes import ShapeError
from rlhf_ray.planner.calibration import ProcessMemory
from rlhf_ray.planner.footprint import total
from rlhf_ray.planner.hardware import Hardware, load_hardware
from rlhf_ray.planner.jobs import workload_of
from rlhf_ray.planner.memory import MemoryPlan, MemoryPool, plan_memory, stages
from rlhf_ray.planner.role_memory import trained_items
from rlhf_ray.planner.work import cached_bytes
from rlhf_ray.planner.workload import RolloutRole, ScoredRole, TrainedRole

MakeJob = Callable[..., Any]
GIB = 2**30

LLAMA_8B, LLAMA_70B = 8_030_261_248, 70_553_706_496
QWEN_32B, QWEN_MOE = 32_762_123_264, 30_532_122_624

TOGETHER = (
    "placement.critic={colocate: policy}",
    "placement.reward={colocate: policy}",
    "placement.offload_idle=true",
)


def plan_of(job: Any, cluster: str = "8xh100", nodes: int = 1) -> MemoryPlan:
    return plan_memory(job, load_hardware(cluster, nodes), ProcessMemory())


def trained(job: Any, *, cpu: bool = False) -> dict[tuple[str, str], int]:
    """Bytes that are there all the time, by name and place, of one rank of the job's policy."""
    role = workload_of(job).roles[0]
    assert isinstance(role, TrainedRole)
    found: dict[tuple[str, str], int] = {}
    for item in trained_items(role, cpu=cpu):
        if item.moments is None and item.size:
            found[item.name, item.location] = found.get((item.name, item.location), 0) + item.size
    return found


def device(plan: MemoryPlan, number: int = 0) -> MemoryPool:
    return next(pool for pool in plan.pools if pool.device == number)


def host(plan: MemoryPlan) -> MemoryPool:
    return next(pool for pool in plan.pools if pool.device is None)


def test_stage_3_divides_everything_by_the_ranks(make_job: MakeJob) -> None:
    held = trained(make_job("sft", "policy.engine.zero_stage=3"))
    assert held == {
        ("weights", "device"): 2 * LLAMA_8B // 8,
        ("weights kept whole", "device"): 2 * 65 * 4096,  # two norms in each of 32 layers, and the last
        ("master weights", "device"): 4 * LLAMA_8B // 8,
        ("optimizer moments", "device"): 8 * LLAMA_8B // 8,
        ("gradients", "device"): 2 * LLAMA_8B // 8,
        ("reduce buffers", "device"): 2 * 500_000_000,
    }


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("meta-llama/Meta-Llama-3-70B", LLAMA_70B),
        ("Qwen/Qwen3-32B", QWEN_32B),
        ("Qwen/Qwen3-30B-A3B", QWEN_MOE),
    ],
)
def test_stage_2_keeps_weights_whole_and_divides_the_optimizer(make_job: MakeJob, model: str, parameters: int) -> None:
    held = trained(make_job("sft", f"policy.model={model}", "policy.engine.zero_stage=2"))
    assert held == {
        ("weights", "device"): 2 * parameters,
        ("master weights", "device"): 4 * parameters // 8,
        ("optimizer moments", "device"): 8 * parameters // 8,
    }


def test_float32_without_sharding_has_no_master_copy(make_job: MakeJob) -> None:
    held = trained(make_job("sft", "policy.engine.zero_stage=0", "policy.engine.dtype=float32"))
    assert held == {("weights", "device"): 4 * LLAMA_8B, ("optimizer moments", "device"): 8 * LLAMA_8B}


def test_offload_moves_the_optimizer_to_the_host(make_job: MakeJob) -> None:
    held = trained(make_job("sft", "policy.engine.zero_stage=2", "policy.engine.offload_optimizer=cpu"))
    largest = 2 * 128256 * 4096
    assert held == {
        ("weights", "device"): 2 * LLAMA_8B,
        ("offload buffers", "device"): largest,
        ("master weights", "host"): 4 * LLAMA_8B // 8,
        ("optimizer moments", "host"): 8 * LLAMA_8B // 8,
        ("offload buffers", "host"): largest + (4 + 2) * LLAMA_8B // 8,
    }


def test_offload_of_shards_needs_no_way_back_for_weights(make_job: MakeJob) -> None:
    held = trained(make_job("sft", "policy.engine.zero_stage=3", "policy.engine.offload_optimizer=cpu"))
    assert held["offload buffers", "host"] == 4 * LLAMA_8B // 8
    assert held["gradients", "host"] == 2 * LLAMA_8B // 8
    assert ("offload buffers", "device") not in held


def test_offload_to_a_disk_takes_buffers_of_host_memory(make_job: MakeJob) -> None:
    engine = "policy.engine={zero_stage: 3, offload_optimizer: nvme, offload_parameters: nvme, nvme_path: /nvme}"
    held = trained(make_job("sft", engine))
    largest = 128256 * 4096
    assert held["weights", "disk"] == 2 * LLAMA_8B // 8
    assert held["optimizer moments", "disk"] == 8 * LLAMA_8B // 8
    assert held["offload buffers", "host"] == 16 * 50_000_000 + 5 * 2 * largest // 8
    plan = plan_of(make_job("sft", engine))
    [disk] = [pool for pool in plan.pools if pool.kind == "disk"]
    assert disk.capacity == 27000 * GIB
    assert disk.held == 8 * sum(size for (_, location), size in held.items() if location == "disk")


def test_adapters_alone_have_gradients_and_optimizer_state(make_job: MakeJob) -> None:
    held = trained(make_job("sft", "policy.lora.rank=16"))
    # Into q and o 4096 + 4096, k and v 4096 + 1024, gate, up and down 4096 + 14336, in 32 layers.
    adapters = 16 * 32 * (2 * 8192 + 2 * 5120 + 3 * 18432)
    assert held["optimizer moments", "device"] == 8 * adapters // 8
    assert held["weights", "device"] == 2 * (LLAMA_8B + adapters)


def test_activations_of_an_8b_model(make_job: MakeJob) -> None:
    plan = plan_of(make_job("sft"))
    [policy] = device(plan).uses
    # Bytes for each token of a layer: two norms (float32 and bfloat16 of 4096, and a factor), what they feed (4096),
    # queries and result (4096 each), keys and values (1024 each), a normaliser for 32 heads, and four times 14336.
    layer = 2 * (6 * 4096 + 4) + 2 * 2 * 4096 + 2 * (2 * 4096 + 2 * 1024) + 4 * 32 + 2 * 4 * 14336
    last = 6 * 4096 + 4
    assert next(item.size for item in policy.items if item.name == "activations") == 4096 * (32 * layer + last)


def test_checkpointing_keeps_one_state_for_each_layer(make_job: MakeJob) -> None:
    plan = plan_of(
        make_job("sft", "policy.engine.activation_checkpointing=true", "policy.engine.micro_batch_tokens=65536")
    )
    [policy] = device(plan).uses
    kept = next(item.size for item in policy.items if item.name == "activations")
    assert kept == 2048 * 8 * (32 * 2 * 4096 + 6 * 4096 + 4)  # eight rows of a rank, not all that the budget allows


def test_the_kv_cache_gets_what_the_share_of_the_device_leaves(make_job: MakeJob) -> None:
    job = make_job("ppo")
    [role] = [role for role in workload_of(job).roles if isinstance(role, RolloutRole)]
    assert cached_bytes(role.shape, role.engine.dtype, role.placement.tensor_parallel) == 2 * 32 * 8 * 128 * 2
    plan = plan_of(job)
    rollout = device(plan, 4).uses[0]
    parts = {item.name: item.size for item in rollout.items}
    assert parts["weights"] == 2 * LLAMA_8B
    assert parts["weights"] + parts["pass"] + parts["KV cache"] == int(0.9 * int(79.1 * GIB))
    assert plan.engine is not None
    assert plan.engine.cached_tokens == parts["KV cache"] // 131072
    assert plan.engine.wanted_tokens == 32 * 2048  # 128 samples on four engines


def test_tensor_parallel_divides_weights_and_cache(make_job: MakeJob) -> None:
    job = make_job("ppo", "placement.rollout.tensor_parallel=4", "placement.rollout.engines=1")
    [role] = [role for role in workload_of(job).roles if isinstance(role, RolloutRole)]
    assert cached_bytes(role.shape, role.engine.dtype, role.placement.tensor_parallel) == 2 * 32 * 2 * 128 * 2
    rollout = device(plan_of(job), 4).uses[0]
    assert {item.name: item.size for item in rollout.items}["weights"] == 2 * LLAMA_8B // 4


def test_an_engine_without_room_for_one_sequence_does_not_start(make_job: MakeJob) -> None:
    plan = plan_of(make_job("ppo", "policy.model=meta-llama/Meta-Llama-3-70B"))
    assert plan.problems == [
        "rollout: the KV cache of an engine has no room for one sequence of rollout.engine.max_model_len (2048) "
        "tokens, so vLLM won't start"
    ]
    assert not plan.fits


def test_colocated_roles_add_up_on_their_devices(make_job: MakeJob) -> None:
    plan = plan_of(make_job("ppo"))
    assert [use.role for use in device(plan, 0).uses] == ["policy", "reference"]
    assert [use.role for use in device(plan, 2).uses] == ["critic", "reward-scores"]
    pool = device(plan, 0)
    assert pool.held == sum(max(use.held) for use in pool.uses)


def test_roles_that_leave_their_device_are_counted_stage_by_stage(make_job: MakeJob) -> None:
    stays = plan_of(make_job("ppo"))
    leaves = plan_of(make_job("ppo", "placement.offload_idle=true"))
    names = [stage.name for stage in leaves.stages]
    assert names == ["load", "generate", "score", "update", "sync"]
    policy, reference = device(leaves, 0).uses
    update = names.index("update")
    context = ProcessMemory().bytes_of("context_mib")
    assert reference.held[update] == context  # it has left
    assert device(leaves, 0).held < device(stays, 0).held
    # What leaves stays in host memory.
    assert host(leaves).held > host(stays).held
    assert policy.held[names.index("score")] < policy.held[update]


def test_trainers_that_share_a_device_update_one_after_the_other(make_job: MakeJob) -> None:
    job = make_job(
        "ppo",
        "placement.critic={colocate: policy}",
        "placement.reward={colocate: policy}",
        "placement.offload_idle=true",
    )
    assert [stage.name for stage in plan_of(job).stages if stage.phase == "update"] == [
        "update critic",
        "update policy",
    ]


def test_on_the_cpu_everything_is_in_host_memory(make_job: MakeJob) -> None:
    job = make_job("sft", "placement.policy={ranks: 2, cpus: 1}")
    plan = plan_of(job, "cpu-16")
    [pool] = plan.pools
    assert pool.device is None
    assert pool.capacity == int(0.95 * 64 * GIB)
    weights = [total(i for i in use.items if i.name == "weights") for use in pool.uses if use.role == "policy"]
    assert weights == [2 * LLAMA_8B, 2 * LLAMA_8B]
    assert not plan.fits


def test_each_rank_reads_the_whole_model_into_host_memory_unless_sharded(make_job: MakeJob) -> None:
    def loading(*overrides: str) -> int:
        use = host(plan_of(make_job("sft", *overrides))).uses[0]
        return next(item.size for item in use.items if item.name == "weights on their way to the device")

    assert loading("policy.engine.zero_stage=2") == 2 * LLAMA_8B
    assert loading("policy.engine.zero_stage=3") == 2 * LLAMA_8B // 8


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ("policy.engine.zero_stage=3", "policy.engine.zero_stage=2"),
        ("policy.engine.zero_stage=2", "policy.engine.zero_stage=1"),
        ("policy.engine.zero_stage=1", "policy.engine.zero_stage=0"),
        ("policy.engine.offload_optimizer=cpu", "policy.engine.offload_optimizer=none"),
        ("policy.engine.activation_checkpointing=true", "policy.engine.activation_checkpointing=false"),
        ("policy.engine.micro_batch_tokens=4096", "policy.engine.micro_batch_tokens=8192"),
        ("policy.engine.vocab_chunk_tokens=64", "policy.engine.vocab_chunk_tokens=1024"),
        ("policy.engine.sequence_parallel=2", "policy.engine.sequence_parallel=1"),
        ("policy.engine.dtype=bfloat16", "policy.engine.dtype=float32"),
        ("data.max_tokens=2048", "data.max_tokens=6000"),
        ("policy.lora.rank=8", "policy.lora.rank=64"),
    ],
)
@pytest.mark.parametrize("job", ["sft", "preference"])
def test_less_never_takes_more(make_job: MakeJob, job: str, less: str, more: str) -> None:
    assert device(plan_of(make_job(job, less))).held <= device(plan_of(make_job(job, more))).held


@pytest.mark.parametrize("job", ["ppo", "sft", "reward_model", "preference"])
def test_more_ranks_take_less_each(make_job: MakeJob, job: str) -> None:
    role = "reward" if job == "reward_model" else "policy"
    sizes = [device(plan_of(make_job(job, f"placement.{role}.ranks={ranks}"), nodes=2)).held for ranks in (1, 2, 4, 8)]
    assert sizes == sorted(sizes, reverse=True)


def test_ranks_of_several_nodes_are_planned_where_they_would_be_placed(make_job: MakeJob) -> None:
    plan = plan_of(make_job("sft", "placement.policy.ranks=16"), nodes=2)
    assert [(s.node, s.device, s.uses[0].rank) for s in plan.pools if s.device in (0, 7)] == [
        ("node-0", 0, 0),
        ("node-0", 7, 7),
        ("node-1", 0, 8),
        ("node-1", 7, 15),
    ]


def test_two_roles_can_share_a_device(make_job: MakeJob) -> None:
    alone = "{ranks: 1, gpus: 0.5}"
    plan = plan_of(make_job("ppo", f"placement.policy={alone}", f"placement.critic={alone}"))
    assert {"policy", "critic"} <= {use.role for use in device(plan).uses}


def test_a_job_without_a_place_is_told_which_role_lacks_what(make_job: MakeJob) -> None:
    with pytest.raises(PlacementError) as caught:
        plan_of(make_job("sft"), "cpu-16")
    assert str(caught.value).startswith("placement.policy: bundle 0 of 8 (1 CPU, 1 GPU) has no node: node-0 has 0 GPU.")


def test_workers_that_can_not_share_the_heads_are_refused(make_job: MakeJob) -> None:
    with pytest.raises(ShapeError) as caught:
        workload_of(make_job("ppo", "placement.rollout.tensor_parallel=3"))
    assert str(caught.value) == (
        "placement.rollout.tensor_parallel: 3 can't share the 32 attention heads and 8 key/value heads of "
        "'meta-llama/Meta-Llama-3-8B' evenly"
    )


def test_every_job_has_its_roles(make_job: MakeJob) -> None:
    def names(*arguments: str) -> list[str]:
        return [role.name for role in workload_of(make_job(*arguments)).roles]

    assert names("ppo") == ["policy", "critic", "reference", "reward-scores", "rollout"]
    assert names("ppo", "policy.lora.rank=8") == ["policy", "critic", "reward-scores", "rollout"]
    assert names("sft") == ["policy"]
    assert names("reward_model") == ["reward"]
    assert names("preference") == ["policy", "reference"]
    assert names("preference", "reference.cache=runs/cache") == ["policy"]
    assert names("preference", "policy.lora.rank=8") == ["policy"]
    reference = workload_of(make_job("preference")).roles[1]
    assert isinstance(reference, ScoredRole)
    assert reference.shape.head == "vocabulary"


def test_a_store_that_is_too_small_for_a_step_is_told_of(make_job: MakeJob) -> None:
    job = make_job("ppo", "data.prompts_per_step=65536", "rollout.shard_samples=4096")
    hardware = load_hardware("8xh100")
    small = Hardware("small", tuple(_with_store(machine, GIB) for machine in hardware.machines))
    plan = plan_memory(job, small, ProcessMemory())
    assert plan.problems == [
        "object store: a step's trajectories take 3.8 GiB, but a node's store has 1.0 GiB: Ray would write the rest to "
        "disk. Lower data.prompts_per_step, or start Ray with a larger --object-store-memory"
    ]


def _with_store(machine: Any, size: int) -> Any:
    from dataclasses import replace

    return replace(machine, object_store=size)


def test_roles_that_stay_have_no_level(make_job: MakeJob) -> None:
    found = stages(workload_of(make_job("ppo")))
    assert [stage.name for stage in found] == ["load", "generate", "score", "update", "sync"]
    assert all(not stage.levels for stage in found)
    assert found[3].working == {"policy", "critic"}


def test_each_stage_has_whom_it_needs_as_far_as_it_needs_them(make_job: MakeJob) -> None:
    by_name = {stage.name: stage for stage in stages(workload_of(make_job("ppo", *TOGETHER)))}
    assert list(by_name) == ["load", "generate", "score", "update critic", "update policy", "sync"]
    score = by_name["score"].levels
    assert score == dict.fromkeys(("policy", "critic", "reference", "reward"), Level.WEIGHTS)
    assert by_name["update critic"].levels["critic"] == Level.FULL
    assert by_name["update critic"].levels["policy"] == Level.OUT
    assert by_name["update policy"].levels["policy"] == Level.FULL
    assert by_name["update policy"].levels["critic"] == Level.OUT


def test_a_reference_on_the_policys_devices_leaves_before_the_update(make_job: MakeJob) -> None:
    found = stages(workload_of(make_job("preference", "placement.offload_idle=true")))
    assert [(stage.name, stage.levels.get("reference")) for stage in found] == [
        ("load", None),
        ("score", Level.WEIGHTS),
        ("update", Level.OUT),
    ]


def test_engines_that_get_adapters_keep_their_weights_in_host_memory(make_job: MakeJob) -> None:
    def copied(sync: str) -> int:
        together = "placement={offload_idle: true, policy: {ranks: 8, gpus: 1}, critic: {colocate: policy}, "
        together += "reward: {colocate: policy}, rollout: {engines: 8, colocate: policy}}"
        plan = plan_of(make_job("ppo", "policy.lora.rank=8", f"rollout.lora_sync={sync}", together))
        items = next(use.items for use in host(plan).uses if use.role == "rollout")
        return total(item for item in items if item.name in ("weights", "KV cache", "pass"))

    assert copied("merged") == 0
    assert copied("adapters") == 2 * LLAMA_8B


def test_a_job_with_one_role_only_updates(make_job: MakeJob) -> None:
    assert [stage.name for stage in stages(workload_of(make_job("sft")))] == ["load", "update"]
