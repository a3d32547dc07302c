"""The policy: log-probs, PPO updates, and the weights that go to the rollout engines."""

from collections.abc import Sequence
from typing import Any

import ray
import torch
from typing_extensions import TypeVar

from rlhf_ray.actors.columns import on_device, response_column
from rlhf_ray.actors.device_means import MicroStats
from rlhf_ray.actors.group import Calls, on_all
from rlhf_ray.actors.ppo_update import PPOTrainedGroup, PPOTrainedWorker, counted_places, token_mean
from rlhf_ray.actors.shards import GeneratedShard
from rlhf_ray.actors.trained import Stats, UpdateReport, sum_over_ranks
from rlhf_ray.actors.weight_sync import AdapterSync, EngineClient, WeightSync
from rlhf_ray.actors.worker import DataSlice
from rlhf_ray.algorithms.moments import Moments, whiten
from rlhf_ray.algorithms.policy_loss import PolicyLossInputs, PolicyLossOptions
from rlhf_ray.config import training as config
from rlhf_ray.config.algorithm import PPO
from rlhf_ray.config.plugs import imported
from rlhf_ray.config.rollout import LoraSync
from rlhf_ray.config.run import Timeouts
from rlhf_ray.data.columns import ColumnPart, Columns
from rlhf_ray.data.minibatches import OptimizerStep
from rlhf_ray.data.trajectory import Floats, TrajectoryBatch
from rlhf_ray.models.heads import count_ids, load_tokenizer
from rlhf_ray.models.lora import adapters_off
from rlhf_ray.models.responses import ResponsePack
from rlhf_ray.platform import platform
from rlhf_ray.telemetry.trace import in_span


class PolicyWorker(PPOTrainedWorker):
    """One rank of the policy."""

    @in_span("load model")
    def load_model(
        self, policy: config.Policy, ppo: PPO, temperature: float, total_steps: int, lora_sync: LoraSync
    ) -> None:
        """Load the model and build its training engine; collective."""
        if lora_sync == "merged":
            # vLLM takes seconds to import; here they pass while the other roles load.
            import rlhf_ray.engines.weight_transfer.sender  # noqa: F401

        self.policy, self.ppo, self.temperature, self.lora_sync = policy, ppo, temperature, lora_sync
        self._whitening: Moments | None = None
        self._loss = imported(ppo.loss.function)
        self._options = PolicyLossOptions(
            clip_low=ppo.clip,
            clip_high=ppo.clip if ppo.clip_high is None else ppo.clip_high,
            dual_clip=ppo.dual_clip,
            entropy_coef=ppo.entropy_coef,
        )
        # As the engines sample: rows of the vocabulary that no token has are left out of every probability.
        tokenizer = load_tokenizer(policy.model, trust_remote_code=policy.trust_remote_code)
        self.load_language_model(policy, total_steps, token_ids=count_ids(tokenizer))

    def logprobs(self, batch: TrajectoryBatch, index: int = 0, count: int = 1) -> ColumnPart:
        """Log-probs of the responses in one of `count` slices."""
        with self.recorder.span("log-probs"):
            return self._logprobs(batch, self.slice_of(index, count))

    def reference_logprobs(self, batch: TrajectoryBatch, index: int = 0, count: int = 1) -> ColumnPart:
        """The same under the model as it was before training, which it is with its adapters off."""
        with self.recorder.span("reference log-probs"), adapters_off(self.engine.model):
            return self._logprobs(batch, self.slice_of(index, count))

    @torch.no_grad()
    def _logprobs(self, batch: TrajectoryBatch, data_slice: DataSlice) -> ColumnPart:
        return response_column(
            batch,
            data_slice,
            self.policy.engine.micro_batch_tokens,
            lambda pack: self.engine(pack.packed, pack.positions, pack.targets, self.temperature, "nothing")[0],
        )

    def update(
        self,
        shards: Sequence[ray.ObjectRef],
        starts: Sequence[int],
        plan: Sequence[OptimizerStep],
        advantages: Floats | None,
        whitening: Moments | None,
    ) -> UpdateReport:
        """The optimizer steps of a batch; see `optimize`. Advantages are whitened by `whitening`, the moments of those
        of the whole batch."""
        self._whitening = whitening
        with self.recorder.span("update"):
            return self.optimize(shards, starts, plan, advantages)

    def micro_batch_loss(
        self, pack: ResponsePack, columns: Columns, weights: torch.Tensor
    ) -> tuple[torch.Tensor, MicroStats]:
        """The policy loss that `algorithm.policy_loss` names."""
        logprobs, entropy = self.engine(pack.packed, pack.positions, pack.targets, self.temperature)
        advantages, counted = on_device(columns.advantages), counted_places(columns)
        if self._whitening is not None:
            advantages = whiten(advantages, self._whitening)
        asked = self.ppo.loss.columns
        out = self._loss(
            PolicyLossInputs(
                logprobs,
                on_device(columns.old_logprobs),
                advantages,
                entropy,
                engine_logprobs=on_device(columns.engine_logprobs) if "engine_logprobs" in asked else None,
                reference_logprobs=on_device(columns.reference_logprobs) if "reference_logprobs" in asked else None,
            ),
            self._options,
        )
        stats = {
            "clip_fraction": token_mean(out.clipped, counted),
            "approx_kl": token_mean(out.approx_kl, counted),
            "entropy": token_mean(entropy, counted),
        }
        return (out.loss * weights).sum(), stats

    def after_step(self, stats: Stats) -> bool:
        """Stop when the policy has moved further from the sampling policy than `kl_early_stop`."""
        if self.ppo.kl_early_stop is None:
            return True
        kl = stats["approx_kl"]
        total, tokens = (sum_over_ranks(part, platform().device) for part in (kl.total, kl.weight))
        return total / max(1.0, tokens) <= self.ppo.kl_early_stop

    def connect(
        self,
        engines: list[Any],
        workers_per_engine: int,
        host: str,
        port: int,
        bucket_bytes: int,
        timeout_s: float,
        same_devices: bool = False,
    ) -> None:
        """Meet the rollout engines for weight transfer; on every rank, rank 0 sends."""
        self._sync: WeightSync | AdapterSync
        if self.lora_sync == "adapters":
            self._sync = AdapterSync(self.engine.model, self.rank, engines, timeout_s)
            return
        from rlhf_ray.engines.weight_transfer.sender import SyncGroup, WeightSender

        client = EngineClient(engines, workers_per_engine, timeout_s)
        group = SyncGroup(
            self.rank, host, port, len(engines) * workers_per_engine, bucket_bytes, timeout_s, same_devices
        )
        self._sync = WeightSync(client, client.beside(lambda: WeightSender(self.engine.model, group, client)))

    def send_weights(self, version: int) -> None:
        """Give every engine the present weights under the name `version`."""
        with self.recorder.span("send weights"):
            self._sync.send(version)


PolicyT = TypeVar("PolicyT", bound=PolicyWorker, default=PolicyWorker)


class PolicyGroup(PPOTrainedGroup[PolicyT]):
    """The ranks of the policy."""

    load_model = on_all(PolicyWorker.load_model)
    send_weights = on_all(PolicyWorker.send_weights)

    def logprobs(self, shard: GeneratedShard) -> Calls[ColumnPart]:
        """Log-probs of a shard's responses."""
        return self.call_shard(PolicyWorker.logprobs, shard)

    def reference_logprobs(self, shard: GeneratedShard) -> Calls[ColumnPart]:
        """The same with adapters off."""
        return self.call_shard(PolicyWorker.reference_logprobs, shard)

    def update(
        self,
        shards: ray.ObjectRef,
        starts: Sequence[int],
        plans: Sequence[Sequence[OptimizerStep]],
        advantages: Floats | None,
        whitening: Moments | None,
    ) -> Calls[UpdateReport]:
        """The optimizer steps of a batch.

        Args:
            shards: reference to the list of references to the batch's shards.
            plans: of each data-parallel rank.
        """
        return self.call_each(PolicyWorker.update, [(shards, starts, plan, advantages, whitening) for plan in plans])

    def connect(
        self,
        engines: Sequence[Any],
        workers_per_engine: int,
        bucket_bytes: int,
        timeouts: Timeouts,
        *,
        same_devices: bool,
    ) -> Calls[None]:
        """Have all ranks meet the rollout engines for weight transfer."""
        [(host, port)] = self.call_rank(0, PolicyWorker.address).wait(timeouts.setup)
        return self.call(
            PolicyWorker.connect,
            list(engines),
            workers_per_engine,
            host,
            port,
            bucket_bytes,
            timeouts.sync_s,
            same_devices,
        )
