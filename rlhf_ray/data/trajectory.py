"""What was sampled, as flat arrays: the one batch type of reinforcement learning.

Numpy arrays without padding pass through Ray's object store without copies. Response columns (log-probs,
values, advantages) that other roles add are separate flat float32 arrays aligned with `response_tokens`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.data.prompt_rows import NO_COLUMNS, PromptRows

FinishReason = Literal["stop", "length"]

Tokens = NDArray[np.int32]
Floats = NDArray[np.float32]
Offsets = NDArray[np.int64]


@dataclass(frozen=True)
class Trajectory:
    """One sampled response.

    Attributes:
        uid: of the prompt; a prompt seen again in a later epoch has another uid.
        sample_index: which of the prompt's samples this is.
        seed: the sampler's seed, a function of run seed, uid and sample index.
        prompt_tokens, response_tokens: as the engine saw and sampled them; never re-tokenised text.
        engine_logprobs: the engine's log-probability of each response token.
        weight_versions: which version of the policy sampled each response token.
        finish_reason: `stop` for an end token or stop string, `length` when cut at the limit.
        loss_mask: whether each response token is an action of the policy, and not context that something else put
            there; None where all are.
        row: the other columns of the prompt's row, as JSON.
    """

    uid: str
    sample_index: int
    seed: int
    prompt_tokens: Sequence[int] | Tokens
    response_tokens: Sequence[int]
    engine_logprobs: Sequence[float]
    weight_versions: Sequence[int]
    finish_reason: FinishReason
    loss_mask: Sequence[bool] | None = None
    row: bytes = NO_COLUMNS


@dataclass(frozen=True)
class TrajectoryBatch:
    """Several trajectories. Sample i's response is `response_tokens[response_offsets[i]:response_offsets[i + 1]]`.

    Attributes:
        uids: `[samples]`.
        sample_index: int32 `[samples]`.
        seeds: int64 `[samples]`.
        prompt_tokens, prompt_offsets: int32 `[prompt tokens]`, int64 `[samples + 1]`.
        response_tokens, response_offsets: int32 `[response tokens]`, int64 `[samples + 1]`.
        engine_logprobs: float32 `[response tokens]`.
        weight_versions: int32 `[response tokens]`.
        truncated: bool `[samples]`, the response was cut at the length limit.
        loss_mask: bool `[response tokens]`, the token is an action of the policy.
        rows: the other columns of the prompts' rows, `[samples]`.
    """

    uids: tuple[str, ...]
    sample_index: NDArray[np.int32]
    seeds: NDArray[np.int64]
    prompt_tokens: Tokens
    prompt_offsets: Offsets
    response_tokens: Tokens
    response_offsets: Offsets
    engine_logprobs: Floats
    weight_versions: NDArray[np.int32]
    truncated: NDArray[np.bool_]
    loss_mask: NDArray[np.bool_]
    rows: PromptRows

    @classmethod
    def of(cls, trajectories: Sequence[Trajectory]) -> Self:
        """Flatten `trajectories`, keeping their order."""
        return cls(
            uids=tuple(t.uid for t in trajectories),
            sample_index=np.array([t.sample_index for t in trajectories], np.int32),
            seeds=np.array([t.seed for t in trajectories], np.int64),
            prompt_tokens=flat([t.prompt_tokens for t in trajectories], np.int32),
            prompt_offsets=offsets_of([len(t.prompt_tokens) for t in trajectories]),
            response_tokens=flat([t.response_tokens for t in trajectories], np.int32),
            response_offsets=offsets_of([len(t.response_tokens) for t in trajectories]),
            engine_logprobs=flat([t.engine_logprobs for t in trajectories], np.float32),
            weight_versions=flat([t.weight_versions for t in trajectories], np.int32),
            truncated=np.array([t.finish_reason == "length" for t in trajectories], np.bool_),
            loss_mask=flat([_mask_of(t) for t in trajectories], np.bool_),
            rows=PromptRows.of([t.row for t in trajectories]),
        )

    def __len__(self) -> int:
        return len(self.uids)

    @property
    def prompt_lengths(self) -> NDArray[np.int64]:
        """Tokens of each prompt, `[samples]`."""
        return np.diff(self.prompt_offsets)

    @property
    def response_lengths(self) -> NDArray[np.int64]:
        """Tokens of each response, `[samples]`."""
        return np.diff(self.response_offsets)

    @property
    def action_lengths(self) -> NDArray[np.int64]:
        """Response tokens of each sample that are actions of the policy, `[samples]`."""
        return np.diff(np.concatenate([[0], np.cumsum(self.loss_mask, dtype=np.int64)])[self.response_offsets])

    def prompt(self, sample: int) -> Tokens:
        """Prompt tokens of one sample."""
        return self.prompt_tokens[self.prompt_offsets[sample] : self.prompt_offsets[sample + 1]]

    def response(self, sample: int) -> Tokens:
        """Response tokens of one sample."""
        return self.response_tokens[self.response_slice(sample)]

    def response_slice(self, sample: int) -> slice:
        """Where one sample's response stands in every response column."""
        return slice(int(self.response_offsets[sample]), int(self.response_offsets[sample + 1]))

    @classmethod
    def concat(cls, batches: Sequence[Self]) -> Self:
        """The samples of several batches, in order."""
        columns = {
            f.name: np.concatenate([getattr(batch, f.name) for batch in batches])
            for f in fields(cls)
            if f.name not in ("uids", "prompt_offsets", "response_offsets", "rows")
        }
        return cls(
            uids=tuple(uid for batch in batches for uid in batch.uids),
            prompt_offsets=offsets_of([n for batch in batches for n in batch.prompt_lengths]),
            response_offsets=offsets_of([n for batch in batches for n in batch.response_lengths]),
            rows=PromptRows.concat([batch.rows for batch in batches]),
            **columns,
        )

    def select(self, samples: Sequence[int]) -> Self:
        """Some of the samples, in the given order."""
        chosen = np.asarray(samples, np.int64)
        prompt, response = take_rows(self.prompt_offsets, chosen), take_rows(self.response_offsets, chosen)
        return type(self)(
            uids=tuple(self.uids[sample] for sample in samples),
            sample_index=self.sample_index[chosen],
            seeds=self.seeds[chosen],
            prompt_tokens=self.prompt_tokens[prompt],
            prompt_offsets=offsets_of(self.prompt_lengths[chosen]),
            response_tokens=self.response_tokens[response],
            response_offsets=offsets_of(self.response_lengths[chosen]),
            engine_logprobs=self.engine_logprobs[response],
            weight_versions=self.weight_versions[response],
            truncated=self.truncated[chosen],
            loss_mask=self.loss_mask[response],
            rows=self.rows.select(chosen),
        )

    def nbytes(self) -> int:
        """Bytes of the arrays."""
        arrays = [value for f in fields(self) if isinstance(value := getattr(self, f.name), np.ndarray)]
        return sum(array.nbytes for array in arrays) + self.rows.nbytes()


def take_rows(offsets: Offsets, rows: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions, in a flat array, of the elements of some rows, in the order of `rows`."""
    if len(rows) == 0:
        return np.empty(0, np.int64)
    return np.concatenate([np.arange(offsets[row], offsets[row + 1]) for row in rows])


def offsets_of(lengths: Sequence[int] | NDArray[np.int64]) -> Offsets:
    """Offsets `[len + 1]` of flat arrays with these row lengths."""
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))]).astype(np.int64)


def _mask_of(trajectory: Trajectory) -> Sequence[bool]:
    mask = trajectory.loss_mask
    return [True] * len(trajectory.response_tokens) if mask is None else mask


def flat(
    rows: Iterable[Sequence[int] | Sequence[float] | Sequence[bool] | Tokens],
    dtype: type[np.int32] | type[np.float32] | type[np.bool_],
) -> NDArray[Any]:
    """All rows one after the other, `[elements]`."""
    return np.concatenate([np.empty(0, dtype), *(np.asarray(row, dtype) for row in rows)])
