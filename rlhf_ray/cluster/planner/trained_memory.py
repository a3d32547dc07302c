"""Memory of one rank of a model that DeepSpeed trains.

It follows DeepSpeed 0.19's own code with the settings of `engines/training.py`: bfloat16 or float32 engines with
torch's AdamW, gradients accumulated in the engine's own format, contiguous buckets of DeepSpeed's default sizes.
"""

from dataclasses import dataclass
from functools import cache

from rlhf_ray.cluster.planner.activations import FLOAT32, ITEMSIZE, PassShape
from rlhf_ray.cluster.planner.adapters import adapted_layers, adapter_sizes, frozen_bytes
from rlhf_ray.cluster.planner.footprint import PLACES, Item, Moment, Place, always, during
from rlhf_ray.cluster.planner.roles import TrainedRole
from rlhf_ray.cluster.planner.rollout_memory import sync_bucket
from rlhf_ray.cluster.planner.shapes import ModelShape
from rlhf_ray.config.training import Lora
from rlhf_ray.engines.level import Level

# DeepSpeed's defaults, in elements (runtime/zero/config.py), and what `engines/training.py` sets.
REDUCE_BUCKET = 500_000_000
LIVE_PARAMETERS = 1_000_000_000
PREFETCH = 50_000_000
SUB_GROUP = 1_000_000_000
SWAP_GROUP = 50_000_000
SWAP_BUFFERS = 5
PERSISTENT = 10_000

FLOAT64 = 8
MOMENTS = 2 * FLOAT32
"""Adam's, of one weight."""
SWAPPED = 4 * FLOAT32
"""Of one weight whose state is on a disk, while it is in host memory: gradient, master weight and moments."""
UPDATE: tuple[Moment, ...] = ("backward", "reduce", "step")


@dataclass(frozen=True)
class Sizes:
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
    def of(shape: ModelShape, lora: Lora | None) -> "Sizes":
        """Of a model with its adapters."""
        persistent = sum(t.size * t.count for t in shape.tensors() if t.size <= PERSISTENT)
        if lora is None:
            largest = max(tensor.size for tensor in shape.tensors())
            return Sizes(shape.parameters, shape.parameters, largest, persistent)
        adapters = adapter_sizes(shape, lora)
        return Sizes(shape.parameters + sum(adapters), sum(adapters), max(adapters), persistent)


def trained_items(role: TrainedRole, *, cpu: bool) -> list[Item]:
    """What one rank holds, without the process itself."""
    return _Rank(role, cpu).items()


def swapped_weights(largest: int, ranks: int, place: Place) -> list[Item]:
    """Buffers in host memory of weights that are on a disk; each holds any rank's part of any of them."""
    size = SWAP_BUFFERS * -(-largest // ranks)
    return [always("offload buffers", size, place="host")] if place == "disk" else []


def gathered_elements(weights: int, largest: int, ranks: int, place: Place, *, cpu: bool) -> int:
    """Elements of sharded weights that are whole on a device at a time; DeepSpeed keeps what it soon needs again."""
    if ranks == 1 and (place == "device" or cpu):
        return 0
    kept = largest if place == "disk" else LIVE_PARAMETERS
    return min(weights, kept + PREFETCH)


def pass_shape(role: TrainedRole, *, cpu: bool) -> PassShape:
    """How its model computes."""
    engine = role.engine
    return PassShape(
        shape=role.shape,
        dtype=engine.dtype,
        cpu=cpu,
        checkpointing=engine.activation_checkpointing,
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
        self.item = ITEMSIZE[role.engine.dtype]
        self.sizes = Sizes.of(role.shape, role.lora)
        self.owned = -(-self.sizes.trained // (self.ranks if self.stage else 1))
        self.states = PLACES[role.engine.offload_optimizer]

    def items(self) -> list[Item]:
        return [*self._weights(), *self._optimizer(), *self._gradients(), *self._step(), *self._passes()]

    def _weights(self) -> list[Item]:
        size = frozen_bytes(self.role.shape, self.role.lora, self.item) + self.item * self.sizes.trained
        if self.role.lora is None:
            size = self.item * self.sizes.all
        if self.stage < 3:
            return [always("weights", size, Level.WEIGHTS)]
        place = PLACES[self.engine.offload_parameters]
        whole = self.item * self.sizes.persistent
        gathered = gathered_elements(self.sizes.all, self.sizes.largest, self.ranks, place, cpu=self.cpu) * self.item
        return [
            always("weights", size / self.ranks, Level.WEIGHTS, place),
            always("weights kept whole", whole if self.ranks > 1 or place != "device" else 0, Level.WEIGHTS),
            *swapped_weights(self.item * self.sizes.largest, self.ranks, place),
            during("gathered weights", gathered, "score", "backward", "reduce"),
        ]

    def _optimizer(self) -> list[Item]:
        # Stage 0 in float32 trains the weights themselves; all others keep a float32 copy beside them.
        copies = self.stage > 0 or self.engine.dtype != "float32"
        items = [always("optimizer moments", MOMENTS * self.owned, place=self.states)]
        if copies:
            items.insert(0, always("master weights", FLOAT32 * self.owned, place=self.states))
        return [*items, *self._offload_buffers()]

    def _offload_buffers(self) -> list[Item]:
        """What stays allocated beside a state that is not on the device."""
        gradients = FLOAT32 * self.owned
        if self.states == "disk":
            part = SWAPPED * min(SWAP_GROUP, self.owned)
            return [always("offload buffers", part, place="host"), always("gradients", gradients, place="disk")]
        if self.states == "device":
            return []
        if self.stage == 3:
            return [always("offload buffers", gradients, place="host")]
        # Updated weights on their way back, and one gradient on its way, on both sides.
        largest = self.item * self.sizes.largest
        host = gradients + self.item * self.owned + largest
        return [always("offload buffers", host, place="host"), always("offload buffers", largest)]

    def _gradients(self) -> list[Item]:
        role, item, trained = self.role, self.item, self.sizes.trained
        micro_batches = role.batch.micro_batches(self.engine, self.ranks)
        accumulates = micro_batches > 1
        bucket = min(REDUCE_BUCKET, trained)
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
                always("gradients", item * self.owned, place="device" if self.states == "device" else "host"),
                always("reduce buffers", item * bucket),
                during("reduce buffers", item * flattened, *early, "reduce"),
            ]
        part = item * self.owned
        if self.stage == 1:
            return [
                during("gradients", item * trained, *whole),
                during("gradients", part if self.states == "device" else 0, "step"),
                during("reduce buffers", item * (bucket + flattened) + part, "reduce"),
            ]
        accumulated = part if accumulates else 0
        passing = item * flattened + part if several else max(item * flattened, part)
        return [
            during("gradients", accumulated, "backward", place=self.states),
            during("gradients", part, "step", place=self.states),
            during("reduce buffers", item * bucket, "backward"),
            during("reduce buffers", item * flattened, *early),
            during("reduce buffers", item * bucket + passing + accumulated, "reduce"),
        ]

    def _step(self) -> list[Item]:
        """Gradients flattened and in float32, or, before that, the float64 copy of one that its norm takes."""
        if self.states != "device":
            return []
        part = min(self.owned, SUB_GROUP) if self.stage == 3 else self.owned
        flat = part * (FLOAT32 if self.item == FLOAT32 else FLOAT32 + self.item)
        if self.stage == 0:
            flat = 0 if self.item == FLOAT32 else FLOAT32 * self.owned
        norm = FLOAT64 * min(self.sizes.largest, self.owned) if self.stage else 0
        return [during("gradients for the step", max(flat, norm), "step")]

    def _passes(self) -> list[Item]:
        role, how = self.role, pass_shape(self.role, cpu=self.cpu)
        pack = role.batch.train_pack(self.engine, self.ranks)
        head, working = how.head_bytes(pack, backward=True), how.working_bytes(pack.tokens)
        head_gradient = self.item * role.shape.head_parameters if role.lora is None else 0
        items = [
            during("activations", how.held_bytes(pack.tokens), "backward"),
            during("logits and states", max(head, working), "backward"),
            during("gradients", head_gradient if role.shape.head == "vocabulary" else 0, "backward"),
        ]
        if role.scores:
            scored = role.batch.score_pack(self.engine, self.ranks)
            passing = how.forward_bytes(scored.tokens) + how.head_bytes(scored, backward=False)
            items.append(during("logits and states", passing, "score"))
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
