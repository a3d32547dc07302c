"""Memory of one process of each kind of role: a rank that DeepSpeed trains, one that only scores, an engine's worker.

Of ranks it follows DeepSpeed 0.19's own code with the settings of `engines/training.py`: bfloat16 or float32 engines
with torch's AdamW, gradients accumulated in the engine's own format, contiguous buckets of DeepSpeed's default sizes.
"""

from dataclasses import dataclass
from functools import cache

from rlhf_ray.config.roles import Level
from rlhf_ray.config.training import Lora, TrainingEngine
from rlhf_ray.models.lora_sizes import adapted_layers, adapter_sizes, frozen_bytes
from rlhf_ray.models.shapes import ModelShape
from rlhf_ray.planner.activation_memory import FLOAT32, INT64, PassShape, widest
from rlhf_ray.planner.devices import GIB
from rlhf_ray.planner.footprint import OFFLOAD_LOCATIONS, MemoryItem, Moment, always, during
from rlhf_ray.planner.work import BYTES, PERSISTENT, REDUCE_BUCKET, cached_bytes
from rlhf_ray.planner.workload import RolloutRole, ScoredRole, TrainedRole

# DeepSpeed's defaults, in elements (runtime/zero/config.py), and what `engines/training.py` sets.
LIVE_PARAMETERS = 1_000_000_000
PREFETCH = 50_000_000
SUB_GROUP = 1_000_000_000
SWAP_GROUP = 50_000_000
SWAP_BUFFERS = 5

FLOAT64 = 8
MOMENTS = 2 * FLOAT32
"""Adam's, of one weight."""
SWAPPED = 4 * FLOAT32
"""Of one weight whose state is on a disk, while it is in host memory: gradient, master weight and moments."""

SORTED_LOGIT = 4 * FLOAT32 + INT64
"""Of one logit while vLLM samples: itself, its log-prob, its place in order with top-p, its probability."""


@dataclass(frozen=True)
class TrainedSizes:
    """Elements of a model as its engine holds it.

    Attributes:
        all: weights of the model with its adapters.
        trained: that have gradients.
        largest: of one trained tensor.
        persistent: in tensors that ZeRO-3 keeps whole.
    """

    all: int
    trained: int
    largest: int
    persistent: int

    @staticmethod
    @cache
    def of(shape: ModelShape, lora: Lora | None) -> "TrainedSizes":
        """Of a model with its adapters."""
        persistent = sum(t.size * t.count for t in shape.tensors() if t.size <= PERSISTENT)
        if lora is None:
            largest = max(tensor.size for tensor in shape.tensors())
            return TrainedSizes(shape.parameters, shape.parameters, largest, persistent)
        adapters = adapter_sizes(shape, lora)
        return TrainedSizes(shape.parameters + sum(adapters), sum(adapters), max(adapters), persistent)


def trained_items(role: TrainedRole, *, cpu: bool) -> list[MemoryItem]:
    """What one rank holds, without the process itself."""
    return _Rank(role, cpu).items()


def scored_items(role: ScoredRole, *, cpu: bool) -> list[MemoryItem]:
    """What one rank holds, without the process itself."""
    return [*_weights(role, cpu, "score"), _scoring(role, cpu)]


def _weights(role: TrainedRole | ScoredRole, cpu: bool, *passes: Moment) -> list[MemoryItem]:
    """Weights, which ZeRO-3 brings together in passes."""
    sizes, item = TrainedSizes.of(role.shape, role.lora), BYTES[role.engine.dtype]
    size = frozen_bytes(role.shape, role.lora, item) + item * sizes.trained
    if role.engine.zero_stage < 3:
        return [always("weights", size, Level.WEIGHTS)]
    location = OFFLOAD_LOCATIONS[role.engine.offload_parameters]
    # What is sharded or elsewhere; DeepSpeed keeps what it soon needs again, of weights on a disk the largest.
    whole = item * sizes.persistent if role.ranks > 1 or location != "device" else 0
    kept = sizes.largest if location == "disk" else LIVE_PARAMETERS
    gathered = 0 if role.ranks == 1 and (location == "device" or cpu) else min(sizes.all, kept + PREFETCH)
    # In host memory, each of the buffers of a disk holds any rank's part of any weight.
    swapped = SWAP_BUFFERS * -(-item * sizes.largest // role.ranks) if location == "disk" else 0
    return [
        always("weights", size / role.ranks, Level.WEIGHTS, location),
        always("weights kept whole", whole, Level.WEIGHTS),
        always("offload buffers", swapped, location="host"),
        during("gathered weights", item * gathered, *passes),
    ]


def _scoring(role: TrainedRole | ScoredRole, cpu: bool) -> MemoryItem:
    """A forward pass over the largest micro-batch of a shard."""
    how, pack = pass_shape(role, cpu=cpu), role.score_pack
    return during("logits and states", how.forward_bytes(pack.tokens) + how.head_bytes(pack, backward=False), "score")


def pass_shape(role: TrainedRole | ScoredRole, *, cpu: bool) -> PassShape:
    """How its model computes."""
    engine = role.engine
    return PassShape(
        shape=role.shape,
        dtype=engine.dtype,
        cpu=cpu,
        checkpointing=isinstance(engine, TrainingEngine) and engine.activation_checkpointing,
        vocab_chunk_tokens=engine.vocab_chunk_tokens,
        entropy=role.entropy,
        sequence_parallel=engine.sequence_parallel,
        adapter_rank=role.lora.rank if role.lora else 0,
        adapted=adapted_layers(role.shape, role.lora) if role.lora else frozenset(),
    )


class _Rank:
    def __init__(self, role: TrainedRole, cpu: bool) -> None:
        self.role, self.engine, self.cpu = role, role.engine, cpu
        self.stage, self.ranks = role.engine.zero_stage, role.ranks
        self.item = BYTES[role.engine.dtype]
        self.sizes = TrainedSizes.of(role.shape, role.lora)
        self.owned = -(-self.sizes.trained // (self.ranks if self.stage else 1))
        self.states = OFFLOAD_LOCATIONS[role.engine.offload_optimizer]

    def items(self) -> list[MemoryItem]:
        weights = _weights(self.role, self.cpu, "score", "backward", "reduce")
        return [*weights, *self._optimizer(), *self._gradients(), *self._step(), *self._passes()]

    def _optimizer(self) -> list[MemoryItem]:
        # Stage 0 in float32 trains the weights themselves; all others keep a float32 copy beside them.
        copies = self.stage > 0 or self.engine.dtype != "float32"
        items = [always("optimizer moments", MOMENTS * self.owned, location=self.states)]
        if copies:
            items.insert(0, always("master weights", FLOAT32 * self.owned, location=self.states))
        return [*items, *self._offload_buffers()]

    def _offload_buffers(self) -> list[MemoryItem]:
        """What stays allocated beside a state that is not on the device."""
        gradients = FLOAT32 * self.owned
        if self.states == "disk":
            shard = SWAPPED * min(SWAP_GROUP, self.owned)
            return [always("offload buffers", shard, location="host"), always("gradients", gradients, location="disk")]
        if self.states == "device":
            return []
        if self.stage == 3:
            return [always("offload buffers", gradients, location="host")]
        # Updated weights on their way back, and one gradient on its way, on both sides.
        largest = self.item * self.sizes.largest
        host = gradients + self.item * self.owned + largest
        return [always("offload buffers", host, location="host"), always("offload buffers", largest)]

    def _gradients(self) -> list[MemoryItem]:
        role, item, trained = self.role, self.item, self.sizes.trained
        accumulates = role.micro_batches > 1
        bucket = min(REDUCE_BUCKET, trained)
        buckets = bucket if self.cpu or self.ranks == 1 else 2 * bucket  # one is reduced while the other is filled
        flattened = min(max(REDUCE_BUCKET, self.sizes.largest), trained)
        several = trained > REDUCE_BUCKET
        # Of several buckets the first is full while most activations are still there.
        early: tuple[Moment, ...] = ("backward",) if several else ()
        whole: list[Moment] = [*(("backward",) if accumulates else ()), "reduce"]
        if self.stage == 0:
            return [
                during("gradients", item * trained, *whole, "step"),
                during("reduce buffers", item * flattened, "reduce"),
            ]
        if self.stage == 3:
            return [
                always("gradients", item * self.owned, location="device" if self.states == "device" else "host"),
                always("reduce buffers", item * bucket),
                during("reduce buffers", item * flattened, *early, "reduce"),
            ]
        shard = item * self.owned
        if self.stage == 1:
            return [
                during("gradients", item * trained, *whole),
                during("gradients", shard if self.states == "device" else 0, "step"),
                during("reduce buffers", item * (buckets + flattened) + shard, "reduce"),
            ]
        accumulated = shard if accumulates else 0
        passing = item * flattened + shard if several else max(item * flattened, shard)
        return [
            during("gradients", accumulated, "backward", location=self.states),
            during("gradients", shard, "step", location=self.states),
            during("reduce buffers", item * buckets, "backward"),
            during("reduce buffers", item * flattened, *early),
            during("reduce buffers", item * buckets + passing + accumulated, "reduce"),
        ]

    def _step(self) -> list[MemoryItem]:
        """Gradients flattened and in float32, or, before that, the float64 copy of one that its norm takes."""
        if self.states != "device":
            return []
        shard = min(self.owned, SUB_GROUP) if self.stage == 3 else self.owned
        flat = shard * (FLOAT32 if self.item == FLOAT32 else FLOAT32 + self.item)
        if self.stage == 0:
            flat = 0 if self.item == FLOAT32 else FLOAT32 * self.owned
        norm = FLOAT64 * min(self.sizes.largest, self.owned) if self.stage else 0
        return [during("gradients for the step", max(flat, norm), "step")]

    def _passes(self) -> list[MemoryItem]:
        role, how = self.role, pass_shape(self.role, cpu=self.cpu)
        pack = role.train_pack
        head, working = how.head_bytes(pack, backward=True), how.working_bytes(pack.tokens)
        head_gradient = self.item * role.shape.head_parameters if role.lora is None else 0
        items = [
            during("activations", how.held_bytes(pack.tokens), "backward"),
            during("logits and states", max(head, working), "backward"),
            during("gradients", head_gradient if role.shape.head == "vocabulary" else 0, "backward"),
        ]
        if role.score_passes:
            items.append(_scoring(role, self.cpu))
        if role.sync_bytes:
            items.append(during("sync bucket", self._sync_bytes(), "sync"))
        return items

    def _sync_bytes(self) -> int:
        """Weights leave from where they are, but shards and adapters are made whole first, a bucket at a time; NCCL
        packs buckets, of which one travels while the next is filled."""
        largest = max(tensor.size for tensor in self.role.shape.tensors())
        if self.stage == 3 or not self.cpu:
            buckets = 1 if self.cpu else 2
            return buckets * sync_bucket(self.role.sync_bytes, self.role.shape, self.item)
        return 2 * FLOAT32 * largest if self.role.lora is not None else 0


@dataclass(frozen=True)
class EnginePlan:
    """One engine.

    Attributes:
        items: of one worker, without the process itself.
        cached_tokens: that its KV cache has room for.
        wanted_tokens: of all sequences that it decodes at the same time, when they are longest.
        needs: device bytes of one worker, below which it can't start: weights, a pass, one longest sequence.
        allotted: device bytes that one worker may use; None on the CPU, where the KV cache alone is limited.
    """

    items: tuple[MemoryItem, ...]
    cached_tokens: int
    wanted_tokens: int
    needs: int
    allotted: int | None

    @property
    def starts(self) -> bool:
        """Whether one sequence fits into its KV cache."""
        return self.cached_tokens > 0


def engine_plan(role: RolloutRole, device_memory: int, *, cpu: bool) -> EnginePlan:
    """What one worker of an engine holds.

    Args:
        device_memory: of one device; on the CPU of the node.
    """
    shape, engine, workers = role.shape, role.engine, role.placement.tensor_parallel
    item = BYTES[role.engine.dtype]
    weights = item * shape.parameters // workers
    adapters = (
        item * role.adapter_rank * sum(sum(tensor.shape) * tensor.count for tensor in shape.tensors() if tensor.linear)
    )
    passing = _pass_bytes(role)
    each = cached_bytes(shape, engine.dtype, workers)
    allotted = None if cpu else int(engine.gpu_memory_utilization * device_memory)
    cache = engine.cpu_kv_cache_gib * GIB if allotted is None else allotted - weights - adapters - passing
    tokens = max(0, cache) // each
    longest = engine.max_model_len
    wanted = min(engine.max_num_seqs, -(-role.step.samples // role.placement.engines)) * role.step.longest
    items = (
        always("weights", weights, Level.WEIGHTS),
        always("adapters", adapters, Level.WEIGHTS),
        # A GPU's pass is measured when the engine starts and stays its own.
        always("pass", passing) if not cpu else during("pass", passing, "generate"),
        always("KV cache", max(0, cache)),
        during("sync bucket", sync_bucket(role.sync_bytes, shape, item), "sync"),
    )
    return EnginePlan(
        items,
        cached_tokens=tokens if tokens >= longest else 0,
        wanted_tokens=wanted,
        needs=weights + adapters + passing + longest * each,
        allotted=allotted,
    )


def _pass_bytes(role: RolloutRole) -> int:
    """One step of the engine with as many tokens as it may have, and the sampling of as many sequences."""
    shape, engine, workers = role.shape, role.engine, role.placement.tensor_parallel
    item = BYTES[role.engine.dtype]
    tokens = max(engine.max_num_batched_tokens, engine.max_model_len)
    states = item * (3 * shape.hidden + 3 * -(-widest(shape) // workers)) * tokens
    return states + SORTED_LOGIT * shape.vocab * min(engine.max_num_seqs, tokens)


def sync_bucket(most: int, shape: ModelShape, item: int) -> int:
    """Bytes of one bucket of a weight sync: `most`, but a larger tensor goes whole, and there is no more than the model
    has."""
    return min(max(most, item * max(tensor.size for tensor in shape.tensors())), item * shape.parameters)
