"""What a PPO step looked like: metrics, timings, samples."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_ray.actors.columns import PortionReport
from rlhf_ray.actors.rollout import ShardFacts
from rlhf_ray.actors.trained import NonFiniteLossError, UpdateReport
from rlhf_ray.algorithms.value_loss import ExplainedVariance
from rlhf_ray.config.jobs import PPOJob
from rlhf_ray.config.rewards import part_name
from rlhf_ray.data.trajectory import Floats, TrajectoryBatch
from rlhf_ray.rewards.combine import combine
from rlhf_ray.rewards.text import decode_responses
from rlhf_ray.telemetry.metrics import Metrics, reduce_means
from rlhf_ray.telemetry.rows import replace_file
from rlhf_ray.telemetry.samples import COLUMNS_SHOWN, SampleRow
from rlhf_ray.telemetry.trace import Span, SpanRecorder, uncovered_seconds


class StepRecord:
    """The clock of one step."""

    def __init__(self, step: int, recorder: SpanRecorder, kl_coef: float = 0.0) -> None:
        self.step = step
        self._recorder = recorder
        self.kl_coef = kl_coef
        self.seconds: dict[str, float] = {}
        self._began, self._began_wall = time.perf_counter(), time.time()
        self._scoring_began: float | None = None

    @contextmanager
    def timing(self, phase: str) -> Iterator[None]:
        """Record the body's seconds as `time/<phase>_s`."""
        began = time.perf_counter()
        try:
            with self._recorder.span(phase, self.step):
                yield
        finally:
            self.seconds[phase] = time.perf_counter() - began

    def scoring_started(self) -> None:
        """The first shard went to be scored."""
        if self._scoring_began is None:
            self._scoring_began = time.perf_counter()

    def scored(self) -> None:
        """All shards are scored."""
        assert self._scoring_began is not None
        self.seconds["score"] = time.perf_counter() - self._scoring_began

    def timings(self, spans: Sequence[Span]) -> Metrics:
        """`time/*` of the step; `spans` are what the actors did."""
        now = time.time()
        metrics = {f"time/{phase}_s": seconds for phase, seconds in self.seconds.items()}
        metrics["time/step_s"] = time.perf_counter() - self._began
        metrics["time/uncovered_s"] = uncovered_seconds(spans, self._began_wall, now)
        return metrics


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
        facts: Sequence[ShardFacts],
        portions: Sequence[PortionReport],
        parts: Mapping[str, Floats],
        scores: Floats,
        policy: Sequence[UpdateReport],
        critic: Sequence[UpdateReport],
    ) -> Metrics:
        """All metrics of a step but `time/*`."""
        lengths = np.concatenate([f.response_lengths for f in facts])
        prompts = np.concatenate([f.prompt_lengths for f in facts])
        tokens = int(lengths.sum())
        explained = ExplainedVariance()
        for portion in portions:
            explained = explained.merge(portion.explained_variance)
        metrics = {
            "reward/mean": float(scores.mean()),
            "reward/std": float(scores.std()),
            **{f"reward/{name}": float(values.mean()) for name, values in parts.items()},
            "kl/mean": float(np.concatenate([portion.kl for portion in portions]).mean()),
            "kl/coef": record.kl_coef,
            "response/length_mean": tokens / len(lengths),
            "response/truncated_fraction": float(np.concatenate([f.truncated for f in facts]).mean()),
            "mismatch/logprob_abs_mean": sum(portion.mismatch for portion in portions) / tokens,
            "staleness/mean": sum(f.version_lag for f in facts) / tokens,
            "critic/explained_variance": explained.value,
        }
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
    ) -> "TrainingDiverged":
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


class TrainingDiverged(Exception):
    """A loss or gradient is NaN or infinite.

    Attributes:
        step: of the run.
        samples_file: where the samples that caused it are.
    """

    def __init__(self, step: int, samples_file: Path, cause: NonFiniteLossError) -> None:
        self.step, self.samples_file = step, samples_file
        super().__init__(f"step {step}: {cause} (they are in {samples_file})")


def write_failed_samples(run_dir: Path, step: int, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write the samples that a loss failed on, one JSON object a line, and return the file."""
    path = run_dir / f"failed_step_{step:06d}.jsonl"
    replace_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return path


def _columns_to_show(row: bytes) -> dict[str, Any] | None:
    return json.loads(row) if len(row) <= COLUMNS_SHOWN else None


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
