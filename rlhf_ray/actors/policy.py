"""The policy: log-probs, PPO updates, and the weights that go to the rollout engines."""

from typing import Any

import torch

from rlhf_ray.actors.columns import on_device, response_column
from rlhf_ray.actors.ppo_update import PPOTrainedWorker, token_mean
from rlhf_ray.actors.trained import Stats, UpdateReport, sum_over_ranks
from rlhf_ray.actors.weight_sync import AdapterSync, EngineClient, WeightSync
from rlhf_ray.actors.worker import Share
from rlhf_ray.algorithms.moments import Moments, whiten
from rlhf_ray.algorithms.policy_loss import PolicyLossInputs, clipped_policy_loss
from rlhf_ray.config import training as config
from rlhf_ray.config.algorithm import PPO
from rlhf_ray.config.rollout import LoraSync
from rlhf_ray.data.columns import ColumnPart, TrainingColumns
from rlhf_ray.data.trajectory import TrajectoryBatch
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
        self.load_language_model(policy, total_steps)

    def logprobs(self, batch: TrajectoryBatch, part: int = 0, parts: int = 1) -> ColumnPart:
        """Log-probs of a part of the responses."""
        with self.recorder.span("log-probs"):
            return self._logprobs(batch, self.share_of_part(part, parts))

    def reference_logprobs(self, batch: TrajectoryBatch, part: int = 0, parts: int = 1) -> ColumnPart:
        """The same under the model as it was before training, which it is with its adapters off."""
        with self.recorder.span("reference log-probs"), adapters_off(self.engine.model):
            return self._logprobs(batch, self.share_of_part(part, parts))

    @torch.no_grad()
    def _logprobs(self, batch: TrajectoryBatch, share: Share) -> ColumnPart:
        return response_column(
            batch,
            share,
            self.policy.engine.micro_batch_tokens,
            lambda pack: self.engine(pack.packed, pack.positions, pack.targets, self.temperature, "nothing")[0],
        )

    def update(self, portions: Any, starts: Any, plan: Any, whitening: Moments | None) -> UpdateReport:
        """One PPO update; see `optimize`. Advantages are whitened by `whitening`, the moments of the whole batch."""
        self._whitening = whitening
        with self.recorder.span("update"):
            return self.optimize(portions, starts, plan)

    def micro_batch_loss(
        self, pack: ResponsePack, columns: TrainingColumns, weights: torch.Tensor
    ) -> tuple[torch.Tensor, Stats]:
        """Clipped policy loss."""
        logprobs, entropy = self.engine(pack.packed, pack.positions, pack.targets, self.temperature)
        advantages = on_device(columns.advantages)
        if self._whitening is not None:
            advantages = whiten(advantages, self._whitening)
        out = clipped_policy_loss(
            PolicyLossInputs(logprobs, on_device(columns.old_logprobs), advantages, entropy),
            clip_low=self.ppo.clip,
            clip_high=self.ppo.clip if self.ppo.clip_high is None else self.ppo.clip_high,
            dual_clip=self.ppo.dual_clip,
            entropy_coef=self.ppo.entropy_coef,
        )
        stats = {
            "clip_fraction": token_mean(out.clipped),
            "approx_kl": token_mean(out.approx_kl),
            "entropy": token_mean(entropy),
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
