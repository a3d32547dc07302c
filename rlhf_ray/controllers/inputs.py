"""Inputs of a job, and what can be known to be wrong with them before any actor starts."""

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from rlhf_ray.cluster.named_paths import named_in
from rlhf_ray.config.base import MOST
from rlhf_ray.config.jobs import (
    EpochJob,
    JobConfig,
    PPOJob,
    PreferenceJob,
    RewardModel,
    RewardModelJob,
    SFTJob,
)
from rlhf_ray.config.loading import ConfigError
from rlhf_ray.config.paths import why_not_writable
from rlhf_ray.config.reward_loss import BradleyTerry
from rlhf_ray.config.rewards import FunctionReward, HttpReward, ModelReward, part_name
from rlhf_ray.config.training import Critic, Policy, ScoringEngine, TrainingEngine
from rlhf_ray.data.comparisons import ComparisonSet, load_comparisons
from rlhf_ray.data.conversations import ConversationSet, load_conversations, mix
from rlhf_ray.data.errors import DataError
from rlhf_ray.data.mismatched import mismatched
from rlhf_ray.data.prompts import PromptSet, load_prompts
from rlhf_ray.data.seeds import derive_seed
from rlhf_ray.data.streaming import ConversationStream
from rlhf_ray.models.heads import (
    ModelError,
    check_heads,
    check_lora,
    check_scores,
    check_tokenizer_matches,
    load_config,
    load_tokenizer,
    longest_sequence,
)
from rlhf_ray.models.score_scale import scale_of
from rlhf_ray.rewards.errors import RewardError
from rlhf_ray.rewards.function import FunctionScorer
from rlhf_ray.rewards.http import HttpScorer
from rlhf_ray.telemetry.errors import MissingTrackerError
from rlhf_ray.telemetry.trackers import check_trackers

IMPORT_S = 60.0
"""Seconds that the module of a reward function may take to be imported."""


@dataclass(frozen=True)
class PPOInputs:
    """What the controller of a PPO job needs of models and data.

    Attributes:
        steps: of the run.
        tokenizer: the policy's.
        prompts: tokenised.
        reference_model: folder.
        critic_model: folder that the critic starts from.
        same_tokens: for each reward model, whether it reads the policy's tokens.
    """

    steps: int
    tokenizer: PreTrainedTokenizerBase
    prompts: PromptSet
    reference_model: str
    critic_model: str
    same_tokens: list[bool]


class RowSet(Protocol):
    """A data set as the controller sees it: `ComparisonSet` or `ConversationSet`."""

    @property
    def dropped(self) -> int:
        """Rows left out."""

    @property
    def truncated(self) -> int:
        """Rows that were cut."""

    def __len__(self) -> int: ...

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row, int64 `[rows]`."""

    @property
    def weights(self) -> NDArray[np.floating | np.integer]:
        """What each row counts in the mean that is the loss, `[rows]`."""


@dataclass(frozen=True)
class EpochInputs:
    """What the controller of a job over a data set needs of it.

    Attributes:
        steps: of the run; the last of an epoch may be smaller.
        train: rows to train on, or what reads them.
        held_out: rows to evaluate on, None without `data.eval`.
    """

    steps: int
    train: RowSet | ConversationStream
    held_out: RowSet | None


@dataclass(frozen=True)
class PreferenceInputs(EpochInputs):
    """What the controller of a preference job needs of its data.

    Attributes:
        mismatched: for KTO, the prompts of `train` and `eval` with other answers; empty for other losses.
    """

    mismatched: Mapping[str, ComparisonSet]

    @property
    def sets(self) -> list[ComparisonSet]:
        """All that reference log-probs are needed of."""
        every = (self.train, self.held_out, *self.mismatched.values())
        return [rows for rows in every if isinstance(rows, ComparisonSet)]


def check(config: JobConfig) -> PPOInputs | EpochInputs:
    """Read models' configs, tokenizers and data, and look for what can't work.

    Raises:
        ConfigError: with every problem found, each naming its dotted path; bad rows also by file and line.
    """
    problems: list[str] = []
    with _collect(problems, "run"):
        check_trackers(config.run)
    for named in named_in(config):
        if named.kind == "folder" and (why := why_not_writable(Path(named.value))):
            problems.append(f"{named.setting}: {why} (got {named.value!r})")
    return _check_ppo(config, problems) if isinstance(config, PPOJob) else _check_epochs(config, problems)


def _check_ppo(config: PPOJob, problems: list[str]) -> PPOInputs:
    policy = config.policy
    reference = policy.model if config.reference.from_model == "policy" else config.reference.from_model
    critic = config.reward_models[0].model if config.critic.init_from == "reward" else config.critic.init_from
    tokenizer = None
    with _collect(problems, "policy.model"):
        tokenizer = load_tokenizer(policy.model, trust_remote_code=policy.trust_remote_code)
        check_tokenizer_matches(policy.model, tokenizer, trust_remote_code=policy.trust_remote_code)
        longest = longest_sequence(policy.model, trust_remote_code=policy.trust_remote_code)
        if longest is not None and config.rollout.engine.max_model_len > longest:
            problems.append(
                f"rollout.engine.max_model_len ({config.rollout.engine.max_model_len}) is more than the {longest} "
                f"positions of policy.model {policy.model!r}"
            )
        _check_lora(problems, "policy", policy.model, policy)
        _check_heads(problems, "policy", policy.model, policy.engine, policy.trust_remote_code)
        _check_tensor_parallel(problems, config)
    with _collect(problems, "reference.from"):
        if tokenizer is not None and not _same_vocabulary(
            reference, tokenizer, trust_remote_code=policy.trust_remote_code
        ):
            problems.append(f"reference.from: {reference!r} has another vocabulary than policy.model {policy.model!r}")
        _check_heads(problems, "reference", reference, config.reference.engine, policy.trust_remote_code)
    with _collect(problems, "critic.init_from"):
        if tokenizer is not None and not _same_vocabulary(
            critic, tokenizer, trust_remote_code=config.critic.trust_remote_code
        ):
            problems.append(
                f"critic.init_from: {critic!r} has another vocabulary than policy.model {policy.model!r}, whose tokens "
                "the critic reads"
            )
        _check_lora(problems, "critic", critic, config.critic)
        _check_heads(problems, "critic", critic, config.critic.engine, config.critic.trust_remote_code)
    same_tokens = []
    for index, part in enumerate(config.reward):
        with _collect(problems, f"reward.{index}"):
            if isinstance(part, ModelReward):
                check_scores(part.model, trust_remote_code=part.trust_remote_code)
                _check_heads(problems, f"reward.{index}", part.model, part.engine, part.trust_remote_code)
                if part.normalise and scale_of(part.model, trust_remote_code=part.trust_remote_code) is None:
                    problems.append(
                        f"reward.{index}.normalise: the config.json of {part.model!r} has no score_mean and score_std: "
                        "export a checkpoint of a step that was evaluated, or leave this key out"
                    )
                if tokenizer is not None:
                    same_tokens.append(
                        _same_vocabulary(part.model, tokenizer, trust_remote_code=part.trust_remote_code)
                    )
            elif isinstance(part, FunctionReward):
                with _time_limit(IMPORT_S, part):
                    FunctionScorer(part)
            elif isinstance(part, HttpReward):
                HttpScorer(part).check()
    prompts = None
    if tokenizer is not None:
        with _collect(problems, "data.prompts"):
            prompts = load_prompts(config.data, tokenizer, config.max_prompt_tokens)
    if problems or tokenizer is None or prompts is None:
        raise ConfigError("preflight", problems)
    return PPOInputs(config.run.steps, tokenizer, prompts, reference, critic, same_tokens)


def _check_epochs(config: EpochJob, problems: list[str]) -> EpochInputs:
    section = config.role.trained
    tokenizer = None
    with _collect(problems, f"{config.role.name}.model"):
        tokenizer = load_tokenizer(section.model, trust_remote_code=section.trust_remote_code)
        check_tokenizer_matches(section.model, tokenizer, trust_remote_code=section.trust_remote_code)
        _check_lora(problems, config.role.name, section.model, section)
        _check_heads(problems, config.role.name, section.model, section.engine, section.trust_remote_code)
    train: RowSet | ConversationStream | None = None
    held_out: RowSet | None = None
    if tokenizer is not None:
        if isinstance(config, SFTJob):
            train = (
                _streamed(config, tokenizer, problems) if config.data.streaming else _mixed(config, tokenizer, problems)
            )
        else:
            with _collect(problems, "data.train"):
                train = _comparisons(config, config.data.train, "data.train", tokenizer, problems)
                train = train.first(config.data.train_rows)
        if config.data.eval is not None:
            with _collect(problems, "data.eval"):
                held_out = (
                    load_conversations(config.data, config.data.eval, tokenizer)
                    if isinstance(config, SFTJob)
                    else _comparisons(config, config.data.eval, "data.eval", tokenizer, problems)
                ).first(config.data.eval_rows)
    if isinstance(config, PreferenceJob) and tokenizer is not None:
        _check_reference(config, tokenizer, problems)
    if problems or train is None:
        raise ConfigError("preflight", problems)
    if isinstance(train, ConversationStream):
        assert isinstance(config, SFTJob)
        assert config.run.steps is not None
        return EpochInputs(config.run.steps, train, held_out)
    steps = config.run.epochs * -(-len(train) // config.role.rows_per_step)
    if steps > MOST:
        asked = f"{config.run.epochs:,} epochs of {len(train):,} rows are {steps:,} steps"
        raise ConfigError("preflight", [f"run.epochs: {asked}, more than the {MOST:,} that a run may have"])
    if not isinstance(config, PreferenceJob):
        return EpochInputs(steps, train, held_out)
    kto = config.algorithm.kto is not None
    others = {
        name: mismatched(rows, config.data.max_tokens)
        for name, rows in (("train", train), ("eval", held_out))
        if kto and isinstance(rows, ComparisonSet)
    }
    return PreferenceInputs(steps, train, held_out, others)


def _check_reference(config: PreferenceJob, tokenizer: PreTrainedTokenizerBase, problems: list[str]) -> None:
    model, trusted = config.reference_model, config.policy.trust_remote_code
    with _collect(problems, "reference.from"):
        if config.algorithm.needs_reference and not _same_vocabulary(model, tokenizer, trust_remote_code=trusted):
            problems.append(
                f"reference.from: {model!r} has another vocabulary than policy.model {config.policy.model!r}"
            )
        _check_heads(problems, "reference", model, config.reference.engine, trusted)


def _streamed(config: SFTJob, tokenizer: PreTrainedTokenizerBase, problems: list[str]) -> ConversationStream:
    stream = ConversationStream(config.data, tokenizer, derive_seed(config.seed, "rows"))
    for reader in stream.readers:
        with _collect(problems, reader.setting):
            reader.check()
    return stream


def _check_lora(problems: list[str], role: str, model: str, section: Policy | Critic | RewardModel) -> None:
    if section.lora is None:
        return
    with _collect(problems, f"{role}.lora"):
        check_lora(model, section.lora, scalar=role != "policy", trust_remote_code=section.trust_remote_code)


def _check_heads(
    problems: list[str], section: str, model: str, engine: TrainingEngine | ScoringEngine, trusted: bool
) -> None:
    if engine.sequence_parallel == 1:
        return
    with _collect(problems, f"{section}.engine.sequence_parallel"):
        check_heads(model, engine.sequence_parallel, trust_remote_code=trusted)


def _check_tensor_parallel(problems: list[str], config: PPOJob) -> None:
    workers = config.placement.rollout.tensor_parallel
    if workers == 1:
        return
    with _collect(problems, "placement.rollout.tensor_parallel"):
        check_heads(config.policy.model, workers, trust_remote_code=config.policy.trust_remote_code)


def _mixed(config: SFTJob, tokenizer: PreTrainedTokenizerBase, problems: list[str]) -> ConversationSet | None:
    """All files to train on, None when one of them can't be used."""
    found = []
    for index, source in enumerate(config.data.sources):
        with _collect(problems, "data.train" if isinstance(config.data.train, str) else f"data.train.{index}.path"):
            rows = load_conversations(config.data, source.path, tokenizer).first(config.data.train_rows)
            found.append((rows, source.weight))
    return mix(found) if len(found) == len(config.data.sources) else None


def _comparisons(
    config: RewardModelJob | PreferenceJob,
    path: str,
    setting: str,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[str],
) -> ComparisonSet:
    rows = load_comparisons(config.data, path, tokenizer, config.kind)
    if isinstance(config, RewardModelJob):
        problems += unfit_rows(config, setting, rows)
    return rows


def unfit_rows(config: RewardModelJob, setting: str, rows: ComparisonSet) -> Iterator[str]:
    """What of judged rows the loss of a reward model can't learn from."""
    counts = np.diff(rows.candidate_offsets)
    single = np.flatnonzero(counts == 1)
    if len(single):
        yield (
            f"{setting}: {len(single)} of {len(rows)} rows, the first of them {rows.uids[single[0]]!r}, have one "
            "candidate, but a reward model learns from comparisons of at least two"
        )
    several = np.flatnonzero(counts > 2)
    if len(several) and isinstance(config.loss, BradleyTerry):
        yield (
            f"{setting}: {len(several)} of {len(rows)} rows, the first of them {rows.uids[several[0]]!r}, have more "
            "than two candidates, but loss.type is 'bradley_terry': set it to 'softmax', 'plackett_luce' or 'all_pairs'"
        )
    if not rows.ranks.any():
        yield f"{setting}: every row is a tie: there is nothing to prefer"


@contextmanager
def _time_limit(seconds: float, part: FunctionReward) -> Iterator[None]:
    """Ends what a user's code does, in the main thread, where alone it can be.

    Raises:
        RewardError: the time is over.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise _TimeIsOver

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _TimeIsOver:
        slow = f"importing {part.function} took longer than {seconds:g} s: find out what it waits for"
        raise RewardError(part_name(part), slow) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class _TimeIsOver(BaseException):
    """No `Exception`, since what is imported may catch those."""


@contextmanager
def _collect(problems: list[str], path: str) -> Iterator[None]:
    try:
        yield
    except (ModelError, RewardError, DataError, MissingTrackerError) as error:
        problems.append(f"{path}: {error}")


def _same_vocabulary(model: str, tokenizer: PreTrainedTokenizerBase, *, trust_remote_code: bool) -> bool:
    load_config(model, trust_remote_code=trust_remote_code)
    other = load_tokenizer(model, trust_remote_code=trust_remote_code)
    return bool(other.get_vocab() == tokenizer.get_vocab())
