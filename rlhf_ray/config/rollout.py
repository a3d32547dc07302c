"""How responses are sampled, and the vLLM engines that sample them."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf_ray.config.base import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section
from rlhf_ray.config.training import Computing, DtypeChoice

LoraSync = Literal["merged", "adapters"]


class Sampling(Section):
    """One response's sampling. Each sample has its own seed, made from run seed, prompt uid and sample index."""

    temperature: NonNegativeFloat = 1.0
    """Softmax temperature, of the trainer's log-probs too; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus size."""
    top_k: NonNegativeInt = 0
    """Candidates kept; 0 keeps all."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Smallest probability kept, relative to the most likely token's."""
    repetition_penalty: PositiveFloat = 1.0
    """Above 1 makes repeated tokens less likely."""
    max_new_tokens: PositiveInt = 256
    """Longest response; a response that reaches it is truncated."""
    min_new_tokens: NonNegativeInt = 0
    """Shortest response before an end token may come."""
    stop: tuple[str, ...] = ()
    """Strings that end a response."""
    stop_token_ids: tuple[NonNegativeInt, ...] = ()
    """Token ids that end a response, beside the model's own end token."""
    ignore_eos: bool = False
    """Generate on past the end token, to `max_new_tokens`."""


class RolloutEngine(Computing):
    """One vLLM engine."""

    dtype_choice: DtypeChoice = Field(default="auto", alias="dtype")
    """Number format of the engine's weights. `auto` is the policy's."""
    max_model_len: PositiveInt = 2048
    """Longest prompt and response together."""
    max_num_seqs: PositiveInt = 256
    """Sequences that one engine decodes at the same time."""
    max_num_batched_tokens: PositiveInt = 8192
    """Tokens that one engine step processes at most."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of the GPU's memory that the engine may use. Not used on CPU."""
    cpu_kv_cache_gib: PositiveInt = 1
    """Host memory for the KV cache on CPU. Not used on GPU."""
    enforce_eager: bool = False
    """Skip graph capture and compilation: slower steps, faster start. Always so on CPU."""
    prefix_caching: bool = True
    """Share the KV cache of equal prompt beginnings."""


class Rollout(Section):
    """Generation."""

    sampling: Sampling = Sampling()
    """How responses are sampled."""
    engine: RolloutEngine = RolloutEngine()
    """The vLLM engines."""
    shard_samples: PositiveInt = 16
    """Samples that travel and are scored together. Scoring starts when the first shard is complete. Some shards for
    each engine and for each rank that scores even out their work; each costs the controller time."""
    sync_bucket_mib: PositiveInt | None = None
    """Most weights in flight at a time when new weights go to the engines, except that a larger tensor goes whole; by
    default 64 on CPU and 512 on GPUs, which send faster than they start to send."""
    lora_sync: LoraSync = "merged"
    """What goes to the engines with `policy.lora`: all weights with the adapters in them, or the adapters alone, which
    the engines then apply beside the base model."""

    def sync_bucket_bytes(self, *, on_gpu: bool) -> int:
        """Bytes of `sync_bucket_mib`."""
        return (self.sync_bucket_mib or (512 if on_gpu else 64)) * 2**20

    @model_validator(mode="after")
    def _response_fits_the_engine(self) -> "Rollout":
        if self.sampling.max_new_tokens >= self.engine.max_model_len:
            raise ValueError(
                f".sampling.max_new_tokens ({self.sampling.max_new_tokens}) leaves no room for a prompt in "
                f".engine.max_model_len ({self.engine.max_model_len})"
            )
        if self.sampling.min_new_tokens > self.sampling.max_new_tokens:
            raise ValueError(
                f".sampling.min_new_tokens ({self.sampling.min_new_tokens}) is above "
                f".sampling.max_new_tokens ({self.sampling.max_new_tokens})"
            )
        return self


def shard_count(samples: int, shard_samples: int) -> int:
    """Shards that `samples` are cut into."""
    return -(-samples // shard_samples)
