"""What a PPO step looked like: metrics, timings, samples."""

import json
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_ray.actors.trained import NonFiniteLossError, UpdateReport
from rlhf_ray.algorithms.value_loss import ExplainedVariance
from rlhf_ray.config.jobs import PPOJob
from rlhf_ray.config.rewards import part_name
from rlhf_ray.controllers.diverged import TrainingDiverged, write_failed_samples
from rlhf_ray.controllers.experience import Experience
from rlhf_ray.controllers.step_record import StepRecord
from rlhf_ray.data.trajectory import Floats, TrajectoryBatch
from rlhf_ray.recovery.files import replace_file
from rlhf_ray.rewards.combine import combine
from rlhf_ray.rewards.text import decode_responses
from rlhf_ray.telemetry.metrics import Metrics, reduce_means
from rlhf_ray.telemetry.samples import COLUMNS_SHOWN, SampleRow


class PPOReport:
    """Turns what roles reported into metrics and samples.

    Attributes:
        before: responses to the showcase prompts before training.
    """

    def __init__(self, config: PPOJob, tokenizer: PreTrainedTokenizerBase, run_dir: Path) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._run_dir = run_dir
        self._weights = {part_name(part): part.weight for part in config.reward}
        self.before: list[SampleRow] = []

    def metrics(
        self,
        record: StepRecord,
        batch: Experience,
        policy: Sequence[UpdateReport],
        critic: Sequence[UpdateReport],
    ) -> Metrics:
        """All metrics of a step but `time/*`."""
        facts, parts, scores = batch.facts, batch.parts, batch.scores
        lengths, prompts, actions = batch.response_lengths, batch.prompt_lengths, int(batch.action_lengths.sum())
        tokens = int(lengths.sum())
        metrics = {
            "reward/mean": float(scores.mean()),
            "reward/std": float(scores.std()),
            **{f"reward/{name}": float(values.mean()) for name, values in parts.items()},
            "kl/mean": float(batch.kl.mean()),
            "kl/coef": record.kl_coef,
            "response/length_mean": tokens / len(lengths),
            "response/truncated_fraction": float(np.concatenate([f.truncated for f in facts]).mean()),
            "mismatch/logprob_abs_mean": sum(report.mismatch for report in batch.reports) / actions,
            "staleness/mean": sum(f.version_lag for f in facts) / tokens,
        }
        explained = [report.explained_variance for report in batch.reports if report.explained_variance is not None]
        if explained:
            metrics["critic/explained_variance"] = reduce(ExplainedVariance.merge, explained).value
        if batch.spread is not None:
            metrics["group/spread_fraction"] = batch.spread
        for role, reports in (("policy", policy), ("critic", critic)):
            if reports:
                metrics |= {f"{role}/{name}": v for name, v in reduce_means([r.means for r in reports]).items()}
                metrics[f"{role}/lr"] = reports[0].lr
                record.seconds[f"{role}_update"] = max(report.seconds for report in reports)
        if policy:
            metrics["policy/optimizer_steps"] = float(policy[0].optimizer_steps)
        passes = self._config.algorithm.epochs * (tokens + int(prompts.sum()))
        updating = max(report.seconds for report in [*policy, *critic])
        metrics["throughput/response_tokens_per_s"] = tokens / record.seconds["generate"]
        metrics["throughput/train_tokens_per_s"] = passes / updating
        return metrics

    def sample_rows(self, batch: TrajectoryBatch, parts: Mapping[str, Floats], kl: Floats) -> list[SampleRow]:
        """The samples of a shard as text, with their scores."""
        prompts, responses = decode_responses(batch, self._tokenizer)
        scores = combine(parts, self._weights)
        return [
            SampleRow(
                uid=batch.uids[row],
                sample_index=int(batch.sample_index[row]),
                prompt=prompts[row],
                response=responses[row],
                score=float(scores[row]),
                rewards={name: float(values[row]) for name, values in parts.items()},
                truncated=bool(batch.truncated[row]),
                kl=float(kl[row]),
                columns=_columns_to_show(batch.rows.json(row)),
            )
            for row in range(len(batch))
        ]

    def write_showcase(self, after: Sequence[SampleRow]) -> Path:
        """The same prompts before and after training, as a Markdown table."""
        lines = ["| prompt | before | score | after | score |", "|---|---|---|---|---|"]
        for old, new in zip(self.before, after, strict=True):
            cells = (old.prompt, old.response, f"{old.score:+.2f}", new.response, f"{new.score:+.2f}")
            lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
        path = self._run_dir / "before_after.md"
        replace_file(path, ("\n".join(lines) + "\n").encode())
        return path

    def save_failure(
        self,
        step: int,
        portions: Sequence[TrajectoryBatch],
        parts: Mapping[str, Floats],
        error: NonFiniteLossError,
    ) -> TrainingDiverged:
        """Write the samples that led to a loss that is no number, and the error to raise."""
        batch = TrajectoryBatch.concat(portions)
        named = [f"{uid}#{index}" for uid, index in zip(batch.uids, batch.sample_index, strict=True)]
        prompts, responses = decode_responses(batch, self._tokenizer)
        rows = [
            {
                "uid": batch.uids[row],
                "sample_index": int(batch.sample_index[row]),
                "prompt": prompts[row],
                "response": responses[row],
                "columns": json.loads(batch.rows.json(row)),
                "prompt_tokens": batch.prompt(row).tolist(),
                "response_tokens": batch.response(row).tolist(),
                "engine_logprobs": batch.engine_logprobs[batch.response_slice(row)].tolist(),
                "rewards": {name: float(values[row]) for name, values in parts.items()},
            }
            for row, name in enumerate(named)
            if name in set(error.samples)
        ]
        return TrainingDiverged(step, write_failed_samples(self._run_dir, step, rows), error)


def _columns_to_show(row: bytes) -> dict[str, Any] | None:
    return json.loads(row) if len(row) <= COLUMNS_SHOWN else None


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
