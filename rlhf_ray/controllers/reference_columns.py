"""Log-probs of the reference model for a preference job: computed for each step, or once for all and kept on disk."""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from rlhf_ray.actors.answers import AnswerLogProbs
from rlhf_ray.actors.group import Calls
from rlhf_ray.actors.preference import PreferenceGroup
from rlhf_ray.actors.reference import ReferenceGroup
from rlhf_ray.actors.shards import Refs
from rlhf_ray.config.jobs import PreferenceJob
from rlhf_ray.config.run import Timeouts
from rlhf_ray.controllers.preference_roles import PreferenceRoles
from rlhf_ray.controllers.row_sources import Split, plan_rows
from rlhf_ray.data.comparisons import ComparisonSet
from rlhf_ray.data.trajectory import Floats, offsets_of
from rlhf_ray.models.heads import load_config

logger = logging.getLogger("rlhf_ray")

# Rows whose log-probs are computed between two looks at the clock.
_ROWS_PER_CALL = 512


class LiveReference:
    """Asks actors for each step's rows: the reference's, or with LoRA the policy's with their adapters off."""

    def __init__(self, group: ReferenceGroup | PreferenceGroup, max_tokens: int, timeouts: Timeouts) -> None:
        self.group = group
        self._max_tokens, self._timeouts = max_tokens, timeouts

    @classmethod
    def with_roles(cls, config: PreferenceJob, roles: PreferenceRoles) -> "LiveReference | None":
        """The reference of a job; None when none is needed."""
        timeouts = config.run.timeouts
        if roles.reference is not None:
            return cls(roles.reference, config.reference.engine.micro_batch_tokens, timeouts)
        if config.algorithm.needs_reference and config.policy_is_reference:
            return cls(roles.policy, config.policy.engine.micro_batch_tokens, timeouts)
        return None

    def of(self, split: Split, rows: NDArray[np.int64]) -> Refs:
        """References to `AnswerLogProbs`, together those of the answers of these rows."""
        return self._ask(split, rows).refs

    def _ask(self, split: Split, rows: NDArray[np.int64]) -> Calls[AnswerLogProbs]:
        plan = plan_rows(split, rows, self.group.dp_size, self._max_tokens)
        if isinstance(self.group, ReferenceGroup):
            return self.group.answer_logprobs(plan)
        return self.group.base_logprobs(plan)

    def whole(self, split: Split) -> AnswerLogProbs:
        """Log-probs of all answers of a data set."""
        parts: list[AnswerLogProbs] = []
        for start in range(0, len(split.rows), _ROWS_PER_CALL):
            # A last call with fewer rows than ranks could not be shared out.
            end = len(split.rows) if len(split.rows) - start < 2 * _ROWS_PER_CALL else start + _ROWS_PER_CALL
            parts += self._ask(split, np.arange(start, end)).wait(self._timeouts.score)
            if end == len(split.rows):
                break
        return AnswerLogProbs.join(parts)


class CachedReference:
    """Reads the log-probs of whole data sets from disk; the sets that are not there yet are computed first.

    Args:
        live: what to compute with; not needed when everything is there.
    """

    def __init__(self, cache: "ReferenceCache", live: LiveReference | None, splits: Sequence[Split]) -> None:
        self._whole: dict[str, AnswerLogProbs] = {}
        for split in splits:
            assert isinstance(split.rows, ComparisonSet)
            found = cache.read(split.rows)
            if found is None:
                assert live is not None
                logger.info("computing the reference's log-probs of %s once, into %s", split.name, cache.folder)
                found = live.whole(split)
                cache.write(split.rows, found)
            self._whole[split.name] = found

    def of(self, split: Split, rows: NDArray[np.int64]) -> Refs:
        """As `LiveReference.of`."""
        assert isinstance(split.rows, ComparisonSet)
        candidates = split.rows.candidates(rows.tolist()).tolist()
        return [ray.put(self._whole[split.name].select(candidates))]


class ReferenceCache:
    """Log-probs on disk, in one file for each model and data set.

    A file's name is a hash of the model's files, the number format, and the tokens with the places where answers begin,
    which tokenizer and chat template are part of. Whatever changes one of them makes another file; no file is ever
    out of date.
    """

    def __init__(self, folder: Path, model: str, dtype: str, *, trust_remote_code: bool) -> None:
        self.folder = folder
        self._model = _model_hash(model, trust_remote_code) + dtype

    def has(self, data: ComparisonSet) -> bool:
        """Whether log-probs of this data set are there."""
        return self.read(data) is not None

    def read(self, data: ComparisonSet) -> AnswerLogProbs | None:
        """Log-probs of all answers in order, None when there are none."""
        path = self._path(data)
        if not path.exists():
            return None
        lengths = data.answer_lengths
        try:
            values: Floats = load_file(path)["logprobs"]
        except (SafetensorError, KeyError, OSError) as error:
            logger.warning("%s can't be read and is made again: %s", path, error)
            return None
        if len(values) != lengths.sum():
            logger.warning("%s has %d log-probs instead of %d and is made again", path, len(values), lengths.sum())
            return None
        return AnswerLogProbs(tuple(range(len(lengths))), offsets_of(lengths), values)

    def write(self, data: ComparisonSet, found: AnswerLogProbs) -> None:
        """Keep the log-probs of a data set: complete, or not at all."""
        path = self._path(data)
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        save_file({"logprobs": found.select(range(len(data.answer_lengths))).values}, partial)
        partial.replace(path)

    def _path(self, data: ComparisonSet) -> Path:
        digest = hashlib.sha256(self._model.encode())
        for array in (data.token_ids, data.token_offsets, data.answer_starts):
            digest.update(np.ascontiguousarray(array).tobytes())
        return self.folder / f"{digest.hexdigest()[:32]}.safetensors"


def reference_cache(config: PreferenceJob) -> ReferenceCache | None:
    """The cache that the config names, None when it names none."""
    reference = config.reference
    if reference.cache is None:
        return None
    engine = config.policy.engine if config.policy_is_reference else reference.engine
    trusted = config.policy.trust_remote_code
    model = config.policy.model if reference.from_model == "policy" else reference.from_model
    return ReferenceCache(Path(reference.cache), model, engine.dtype, trust_remote_code=trusted)


def _model_hash(model: str, trust_remote_code: bool) -> str:
    """Of a folder, hash of its config and weights; of a hub name, the commit that was fetched."""
    folder = Path(model)
    if not folder.is_dir():
        config: Any = load_config(model, trust_remote_code=trust_remote_code)
        return json.dumps([model, getattr(config, "_commit_hash", None)])
    digest = hashlib.sha256()
    for path in (folder / "config.json", *sorted(folder.glob("*.safetensors"))):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
