"""Models that are trained (policy, critic, reward model) and models that only score."""

from typing import Literal

from pydantic import Field, model_validator

from rlhf_ray.config.base import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    ProcessCount,
    Section,
)
from rlhf_ray.config.paths import UsablePath, WritablePath

Dtype = Literal["bfloat16", "float32"]
DtypeChoice = Literal["auto", "bfloat16", "float32"]
Offload = Literal["none", "cpu", "nvme"]


def _check_offload(stage: int, nvme_path: str | None, **offload: Offload) -> None:
    """What the offload of weights needs, and that there is a path where and only where something goes to it."""
    if offload["offload_parameters"] != "none" and stage != 3:
        raise ValueError(
            f".offload_parameters: {offload['offload_parameters']} needs .zero_stage: 3, but it is {stage}"
        )
    on_disk = [name for name, place in offload.items() if place == "nvme"]
    if on_disk and nvme_path is None:
        raise ValueError(f".{on_disk[0]}: nvme needs .nvme_path, a folder on a local disk of each node")
    if nvme_path is not None and not on_disk:
        raise ValueError(f".nvme_path is {nvme_path!r}, but no {' or '.join(f'.{name}' for name in offload)} is nvme")


class UndecidedDtype(Exception):
    """A number format that is still `auto` was asked for: `config/number_formats.py` has to put in what was chosen."""


class Computing(Section):
    """What computes in a number format. `dtype` in a config file is `dtype_choice` here, which can be `auto`; code that
    computes reads `dtype`, which cannot."""

    dtype_choice: DtypeChoice = Field(default="auto", alias="dtype")
    """Number format."""

    @property
    def dtype(self) -> Dtype:
        """The number format.

        Raises:
            UndecidedDtype: none was chosen yet.
        """
        if self.dtype_choice == "auto":
            raise UndecidedDtype(f"{type(self).__name__}.dtype is still 'auto'")
        return self.dtype_choice


class ScoringEngine(Computing):
    """How a forward-only model is held and fed."""

    dtype_choice: DtypeChoice = Field(default="auto", alias="dtype")
    """Number format of the weights and of the forward pass. `auto` is `bfloat16` on GPUs and on CPUs that multiply in
    it, else `float32`."""
    zero_stage: Literal[0, 3] = 0
    """3 shards the weights over the ranks and gathers them layer by layer; 0 keeps a copy on each rank."""
    micro_batch_tokens: PositiveInt = 8192
    """Tokens (prompt and response) packed into one forward pass. A longer sample goes through alone."""
    sequence_parallel: ProcessCount = 1
    """Neighbouring ranks that share each micro-batch, every one with a part of its tokens and in attention of the heads
    (Ulysses), where long responses take too much memory. 1 gives each rank micro-batches of its own."""
    vocab_chunk_tokens: PositiveInt = 256
    """Logits that exist at the same time, as positions with the whole vocabulary; more positions take it in parts."""
    offload_parameters: Offload = "none"
    """Where sharded weights are between uses: `none` on the device, `cpu` in host memory, `nvme` in files under
    `nvme_path` (both need `zero_stage: 3`)."""
    nvme_path: WritablePath | None = None
    """Folder on a local disk of each node for what is offloaded to `nvme`. Ranks have folders of their own in it."""

    @model_validator(mode="after")
    def _can_offload(self) -> "ScoringEngine":
        _check_offload(self.zero_stage, self.nvme_path, offload_parameters=self.offload_parameters)
        return self


class TrainingEngine(Computing):
    """How DeepSpeed holds and trains a model."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """What is sharded over the ranks: 0 nothing, 1 optimizer state, 2 also gradients, 3 also weights."""
    dtype_choice: DtypeChoice = Field(default="auto", alias="dtype")
    """Number format of weights and activations. The optimizer keeps float32 master weights either way. `auto` is
    `bfloat16` on GPUs and on CPUs that multiply in it, else `float32`."""
    micro_batch_tokens: PositiveInt = 8192
    """Tokens packed into one forward and backward pass. Does not change the gradient."""
    sequence_parallel: ProcessCount = 1
    """Neighbouring ranks that share each micro-batch, every one with a part of its tokens and in attention of the heads
    (Ulysses), where long responses take too much memory. 1 gives each rank micro-batches of its own."""
    vocab_chunk_tokens: PositiveInt = 256
    """Logits that exist at the same time, as positions with the whole vocabulary; more positions take it in parts."""
    gradient_clip: NonNegativeFloat = 1.0
    """Largest global gradient norm of an optimizer step; 0 turns clipping off."""
    offload_optimizer: Offload = "none"
    """Where master weights and optimizer state are, and where the step is made: `none` on the device, `cpu` in host
    memory (needs `zero_stage` of at least 1), `nvme` in files under `nvme_path` that are read into host memory a part
    at a time (needs `zero_stage: 3`)."""
    offload_parameters: Offload = "none"
    """Where sharded weights are between uses: `none` on the device, `cpu` in host memory, `nvme` in files under
    `nvme_path` (both need `zero_stage: 3`)."""
    nvme_path: WritablePath | None = None
    """Folder on a local disk of each node for what is offloaded to `nvme`. Ranks have folders of their own in it."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""

    @model_validator(mode="after")
    def _can_offload(self) -> "TrainingEngine":
        if self.offload_optimizer == "cpu" and self.zero_stage == 0:
            raise ValueError(".offload_optimizer: cpu needs .zero_stage: 1, 2 or 3, but it is 0")
        if self.offload_optimizer == "nvme" and self.zero_stage != 3:
            raise ValueError(f".offload_optimizer: nvme needs .zero_stage: 3, but it is {self.zero_stage}")
        _check_offload(
            self.zero_stage,
            self.nvme_path,
            offload_parameters=self.offload_parameters,
            offload_optimizer=self.offload_optimizer,
        )
        return self


class Lora(Section):
    """Low-rank adapters (Hu et al. 2021): linear layers compute with W + (alpha / rank) · B·A, of which W is frozen."""

    rank: PositiveInt = 16
    """Rows of A and columns of B."""
    alpha: PositiveFloat = 32.0
    """The change B·A counts alpha / rank times."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the linear layers that get adapters, such as `[q_proj, v_proj]`; `all-linear` are all within the
    decoder. The vocabulary head never gets one, a scalar head is trained whole."""
    base: Literal["as_model", "nf4"] = "as_model"
    """How the frozen weights are held: in `engine.dtype`, or in 4 bits, which needs a GPU and bitsandbytes."""

    @model_validator(mode="after")
    def _names_a_layer(self) -> "Lora":
        if not self.targets:
            raise ValueError(".targets is empty: name layers, such as q_proj, or leave it out for all-linear")
        return self


class Optimizer(Section):
    """AdamW and its learning-rate schedule."""

    lr: PositiveFloat = 1.0e-6
    """Peak learning rate."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay of the first and the second moment."""
    eps: PositiveFloat = 1.0e-8
    """Added to the denominator of the update."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after warm-up, over all optimizer steps of the run."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps over which the learning rate rises linearly from 0."""
    min_lr_ratio: Fraction = 0.0
    """Where `linear` and `cosine` end, as a fraction of `lr`."""


class CriticOptimizer(Optimizer):
    """AdamW and its learning-rate schedule."""

    lr: PositiveFloat = 5.0e-6
    """Peak learning rate."""


class SupervisedOptimizer(Optimizer):
    """AdamW and its learning-rate schedule."""

    lr: PositiveFloat = 1.0e-5
    """Peak learning rate."""


class TrainedModel(Section):
    """A model that is trained."""

    model: UsablePath
    """Hugging Face model folder, or hub name where a hub can be reached."""
    trust_remote_code: bool = False
    """Run Python code that comes with this model. Off unless you have read that code."""
    engine: TrainingEngine = TrainingEngine()
    """How it is held and trained."""
    lora: Lora | None = None
    """Train low-rank adapters beside frozen weights; by default all weights are trained."""
    optimizer: Optimizer = Optimizer()
    """How it is updated."""


class Policy(TrainedModel):
    """The model that is trained and that generates."""


class RewardModel(TrainedModel):
    """The model that learns to score."""

    model: UsablePath
    """Folder of a causal language model, which gets a new scalar head, or of a reward model to train on."""
    optimizer: SupervisedOptimizer = SupervisedOptimizer()
    """How it is updated."""


class SFTPolicy(Policy):
    """The language model that is trained."""

    optimizer: SupervisedOptimizer = SupervisedOptimizer()
    """How it is updated."""


class Critic(Section):
    """The model that predicts the return at every response token."""

    init_from: UsablePath = "reward"
    """`reward` starts from the first reward model; else a model folder, a causal one getting a new scalar head."""
    trust_remote_code: bool = False
    """Run Python code that comes with this model. Off unless you have read that code."""
    engine: TrainingEngine = TrainingEngine()
    """How it is held and trained."""
    lora: Lora | None = None
    """Train low-rank adapters beside frozen weights; by default all weights are trained."""
    optimizer: CriticOptimizer = CriticOptimizer()
    """How it is updated."""


class Reference(Section):
    """The model that the policy is held close to."""

    from_model: UsablePath = Field(default="policy", alias="from")
    """`policy` is the policy as it was before training (with `policy.lora`, its own ranks with adapters off); else a
    model folder with the same tokenizer."""
    engine: ScoringEngine = ScoringEngine()
    """How it is held and fed."""


class PreferenceReference(Reference):
    """The model that the policy's log-probs are compared with."""

    cache: WritablePath | None = None
    """Folder for the log-probs of whole data sets: they are computed once, and read by every run with the same model,
    data and template. None computes those of each step when it comes."""
    update_every: NonNegativeInt = 0
    """Optimizer steps between updates of the reference from the policy (TR-DPO); 0 leaves it as it is."""
    update_mix: PositiveFraction = 1.0
    """Share of the policy in an update: 1 replaces the reference, less mixes weight by weight."""

    @model_validator(mode="after")
    def _cached_is_fixed(self) -> "PreferenceReference":
        if self.cache is not None and self.update_every:
            raise ValueError(
                f".cache holds log-probs of a reference that stays as it is, but .update_every is {self.update_every}: "
                "leave one of them out"
            )
        if self.update_mix != 1.0 and not self.update_every:
            raise ValueError(".update_mix has no effect while .update_every is 0")
        return self
