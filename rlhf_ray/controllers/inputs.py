"""Inputs of a job, and what can be known to be wrong with them before any actor starts."""

import logging
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_ray.config.base import MOST
from rlhf_ray.config.jobs import EpochJob, PPOJob, PreferenceJob, RewardModelJob, SFTJob
from rlhf_ray.config.reward_loss import BradleyTerry
from rlhf_ray.config.rewards import FunctionReward, HttpReward, ModelReward, part_name
from rlhf_ray.config.roles import ModelSource, RoleSpec
from rlhf_ray.data.comparisons import ComparisonSet, load_comparisons
from rlhf_ray.data.conversations import ConversationSet, load_conversations, mix
from rlhf_ray.data.errors import DataError
from rlhf_ray.data.mismatched import mismatched
from rlhf_ray.data.prompts import PromptSet, load_prompts
from rlhf_ray.data.seeds import derive_seed
from rlhf_ray.data.streaming import ConversationStream
from rlhf_ray.models.folder_checks import check_model, positions_of, try_export
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

logger = logging.getLogger("rlhf_ray")

IMPORT_S = 60.0
"""Seconds that the module of a reward function may take to be imported."""


@dataclass(frozen=True)
class PPOInputs:
    """What the controller of a PPO job needs of models and data.

    Attributes:
        steps: of the run.
        tokenizer: the policy's.
        prompts: tokenised.
        same_tokens: for each reward model, whether it reads the policy's tokens.
    """

    steps: int
    tokenizer: PreTrainedTokenizerBase
    prompts: PromptSet
    same_tokens: list[bool]


RowSet = ComparisonSet | ConversationSet
"""A data set as the controller sees it."""


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


def check_ppo(config: PPOJob, problems: list[str]) -> PPOInputs | None:
    """Models, rewards and prompts."""
    policy = config.policy
    tokenizer = None
    with collect(problems, "policy.model"):
        tokenizer = load_tokenizer(policy.model, trust_remote_code=policy.trust_remote_code)
        check_tokenizer_matches(policy.model, tokenizer, trust_remote_code=policy.trust_remote_code)
        longest = longest_sequence(policy.model, trust_remote_code=policy.trust_remote_code)
        if longest is not None and config.rollout.engine.max_model_len > longest:
            problems.append(
                f"rollout.engine.max_model_len ({config.rollout.engine.max_model_len}) is more than the {longest} "
                f"positions of policy.model {policy.model!r}"
            )
        check_role_model(config.role("policy"), problems)
        if (workers := config.placement.rollout.tensor_parallel) > 1:
            with collect(problems, "placement.rollout.tensor_parallel"):
                check_heads(policy.model, workers, trust_remote_code=policy.trust_remote_code)
    if not config.policy_is_reference:
        _check_reader(config.role("reference"), "reference.from", config, tokenizer, problems)
    if config.critic is not None:
        _check_reader(config.role("critic"), "critic.init_from", config, tokenizer, problems)
    same_tokens = []
    functions: dict[int, FunctionScorer] = {}
    for index, part in enumerate(config.reward):
        with collect(problems, f"reward.{index}"):
            if isinstance(part, ModelReward):
                check_scores(part.model, trust_remote_code=part.trust_remote_code)
                own = load_tokenizer(part.model, trust_remote_code=part.trust_remote_code)
                check_tokenizer_matches(part.model, own, trust_remote_code=part.trust_remote_code)
                role = config.role(f"reward-{part_name(part)}")
                _check_room(role, f"reward.{index}.model", config, problems)
                check_role_model(role, problems)
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
                    functions[index] = FunctionScorer(part)
            elif isinstance(part, HttpReward):
                HttpScorer(part).check()
    prompts = None
    if tokenizer is not None:
        with collect(problems, "data.prompts"):
            prompts = load_prompts(config.data, tokenizer, config.max_prompt_tokens)
            for index, function in functions.items():
                with collect(problems, f"reward.{index}"):
                    function.check(prompts.columns, len(prompts))
    if tokenizer is None or prompts is None:
        return None
    return PPOInputs(config.run.steps, tokenizer, prompts, same_tokens)


def _check_reader(
    role: RoleSpec, path: str, config: PPOJob, tokenizer: PreTrainedTokenizerBase | None, problems: list[str]
) -> None:
    """A role that reads the policy's tokens, and what every role's model must be."""
    with collect(problems, path):
        if tokenizer is not None:
            _check_vocabulary(_source(role), path, config.policy.model, tokenizer, problems)
        _check_room(role, path, config, problems)
        check_role_model(role, problems)


def _check_vocabulary(
    model: ModelSource, path: str, policy: str, tokenizer: PreTrainedTokenizerBase, problems: list[str]
) -> None:
    if _same_vocabulary(model.path, tokenizer, trust_remote_code=model.trust_remote_code):
        check_tokenizer_matches(model.path, tokenizer, trust_remote_code=model.trust_remote_code)
    else:
        problems.append(
            f"{path}: {model.path!r} has another vocabulary than policy.model {policy!r}, whose tokens it reads"
        )


def check_sft(config: SFTJob, problems: list[str]) -> EpochInputs | None:
    """The model, and conversations in memory or of a stream."""
    tokenizer = _check_trained(config, config.data.max_tokens, problems)
    if tokenizer is None:
        return None
    train: ConversationSet | ConversationStream | None
    train = _streamed(config, tokenizer, problems) if config.data.streaming else _mixed(config, tokenizer, problems)
    held_out = None
    if config.data.eval is not None:
        with collect(problems, "data.eval"):
            held_out = load_conversations(config.data, config.data.eval, tokenizer).first(config.data.eval_rows)
    if train is None:
        return None
    if isinstance(train, ConversationStream):
        assert config.run.steps is not None
        return EpochInputs(config.run.steps, train, held_out)
    return EpochInputs(_steps(config, train, problems), train, held_out)


def check_reward_model(config: RewardModelJob, problems: list[str]) -> EpochInputs | None:
    """The model, and judged answers that its loss can learn from."""
    tokenizer = _check_trained(config, config.data.max_tokens, problems)
    if tokenizer is None:
        return None
    train, held_out = _comparisons(config, tokenizer, problems)
    return None if train is None else EpochInputs(_steps(config, train, problems), train, held_out)


def check_preference(config: PreferenceJob, problems: list[str]) -> PreferenceInputs | None:
    """The models, judged answers, and for KTO mismatched ones."""
    tokenizer = _check_trained(config, config.data.max_tokens, problems)
    if tokenizer is None:
        return None
    train, held_out = _comparisons(config, tokenizer, problems)
    _check_reference(config, tokenizer, problems)
    if train is None:
        return None
    kto = config.algorithm.kto is not None
    others = {
        name: mismatched(rows, config.data.max_tokens)
        for name, rows in (("train", train), ("eval", held_out))
        if kto and rows is not None and not problems
    }
    return PreferenceInputs(_steps(config, train, problems), train, held_out, others)


def _check_trained(config: EpochJob, max_tokens: int, problems: list[str]) -> PreTrainedTokenizerBase | None:
    """The model that learns from rows of at most `max_tokens`; its tokenizer, None where it has none."""
    model, tokenizer = _source(config.trained), None
    with collect(problems, model.key):
        tokenizer = load_tokenizer(model.path, trust_remote_code=model.trust_remote_code)
        check_tokenizer_matches(model.path, tokenizer, trust_remote_code=model.trust_remote_code)
        _check_row_room(model, model.key, max_tokens, problems)
        check_role_model(config.trained, problems)
    return tokenizer


def _steps(config: EpochJob, rows: RowSet, problems: list[str]) -> int:
    steps = config.run.epochs * -(-len(rows) // config.rows_per_step)
    if steps > MOST:
        asked = f"{config.run.epochs:,} epochs of {len(rows):,} rows are {steps:,} steps"
        problems.append(f"run.epochs: {asked}, more than the {MOST:,} that a run may have")
    return steps


def _check_reference(config: PreferenceJob, tokenizer: PreTrainedTokenizerBase, problems: list[str]) -> None:
    if not config.algorithm.needs_reference or config.policy_is_reference:
        return
    role = config.role("reference")
    model = _source(role)
    with collect(problems, "reference.from"):
        _check_vocabulary(model, "reference.from", config.policy.model, tokenizer, problems)
        if model.path != config.policy.model:
            _check_row_room(model, "reference.from", config.data.max_tokens, problems)
        check_role_model(role, problems)


def _streamed(config: SFTJob, tokenizer: PreTrainedTokenizerBase, problems: list[str]) -> ConversationStream:
    stream = ConversationStream(config.data, tokenizer, derive_seed(config.seed, "rows"))
    for reader in stream.readers:
        with collect(problems, reader.setting):
            reader.check()
    return stream


def _source(role: RoleSpec) -> ModelSource:
    assert role.model is not None
    return role.model


def check_role_model(role: RoleSpec, problems: list[str]) -> None:
    """What is in the folder of a role's model, whether what is trained from it can be exported, whether it can have the
    role's adapters, and whether ranks can share its heads.

    Raises:
        ModelError: the folder can't be used.
    """
    model, engine, scalar = _source(role), role.model_engine, role.kind == "scalar"
    assert engine is not None
    check_model(model.path, scalar=scalar, sharded=engine.zero_stage == 3, trust_remote_code=model.trust_remote_code)
    if role.trained:
        try_export(model.path, scalar=scalar, trust_remote_code=model.trust_remote_code)
    if role.lora is not None:
        with collect(problems, f"{role.section}.lora"):
            check_lora(model.path, role.lora, scalar=scalar, trust_remote_code=model.trust_remote_code)
    if engine.sequence_parallel > 1:
        with collect(problems, f"{role.section}.engine.sequence_parallel"):
            check_heads(model.path, engine.sequence_parallel, trust_remote_code=model.trust_remote_code)


def _check_room(role: RoleSpec, path: str, config: PPOJob, problems: list[str]) -> None:
    """Who reads samples needs positions for prompt and response. The policy's are checked with its engines."""
    model = _source(role)
    if model.path == config.policy.model:
        return
    prompt, response = config.max_prompt_tokens, config.rollout.sampling.max_new_tokens
    positions = positions_of(model.path, trust_remote_code=model.trust_remote_code)
    if positions is not None and positions.tokens < prompt + response:
        problems.append(
            f"{path}: model {model.path!r} has positions for {positions.tokens} tokens, but a prompt of up to {prompt} "
            f"and a response of up to {response} have {prompt + response}: lower data.max_prompt_tokens or "
            "rollout.sampling.max_new_tokens, or choose a model with more positions"
        )


def _check_row_room(model: ModelSource, path: str, budget: int, problems: list[str]) -> None:
    """A model that learns from rows needs positions for the longest. Rotary ones go on, but further than it learnt."""
    positions = positions_of(model.path, trust_remote_code=model.trust_remote_code)
    if positions is None or positions.tokens >= budget:
        return
    said = f"{path}: model {model.path!r} has positions for {positions.tokens} tokens, but data.max_tokens is {budget}"
    if positions.in_table:
        problems.append(f"{said}: lower data.max_tokens, or choose a model with more positions")
    else:
        logger.warning(
            "%s: longer rows are trained on all the same; lower data.max_tokens where that is not meant", said
        )


def _mixed(config: SFTJob, tokenizer: PreTrainedTokenizerBase, problems: list[str]) -> ConversationSet | None:
    """All files to train on, None when one of them can't be used."""
    found = []
    for index, source in enumerate(config.data.sources):
        with collect(problems, "data.train" if isinstance(config.data.train, str) else f"data.train.{index}.path"):
            rows = load_conversations(config.data, source.path, tokenizer).first(config.data.train_rows)
            found.append((rows, source.weight))
    return mix(found) if len(found) == len(config.data.sources) else None


def _comparisons(
    config: RewardModelJob | PreferenceJob, tokenizer: PreTrainedTokenizerBase, problems: list[str]
) -> tuple[ComparisonSet | None, ComparisonSet | None]:
    """Rows to train on, and held-out ones, so many as the config says."""
    data = config.data
    found: list[ComparisonSet | None] = []
    for setting, path, limit in (("data.train", data.train, data.train_rows), ("data.eval", data.eval, data.eval_rows)):
        rows = None
        if path is not None:
            with collect(problems, setting):
                rows = load_comparisons(data, path, tokenizer, config.kind)
                if isinstance(config, RewardModelJob):
                    problems += unfit_rows(config, setting, rows)
                rows = rows.first(limit)
        found.append(rows)
    if found[0] is not None:
        _tell_unused_margins(config, found[0])
    return found[0], found[1]


def _tell_unused_margins(config: RewardModelJob | PreferenceJob, rows: ComparisonSet) -> None:
    """Other systems add a margin to the loss wherever rows have one."""
    stated = int((rows.margins > 0).sum())
    if not stated:
        return
    if isinstance(config, PreferenceJob):
        why = "no loss of job: preference reads one"
    elif not isinstance(config.loss, BradleyTerry):
        why = f"loss.type {config.loss.type!r} reads none; 'bradley_terry' does, by its margin"
    elif config.loss.margin == 0:
        why = "loss.margin is 0: set it to 1 for the loss of Llama 2"
    else:
        return
    logger.info("data.train: %d of %d rows have a margin, which the loss leaves out: %s", stated, len(rows), why)


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
def collect(problems: list[str], path: str) -> Iterator[None]:
    """Have what the body finds wrong with models, rewards, data or trackers be a problem of a setting."""
    try:
        yield
    except (ModelError, RewardError, DataError, MissingTrackerError) as error:
        problems.append(f"{path}: {error}")


def _same_vocabulary(model: str, tokenizer: PreTrainedTokenizerBase, *, trust_remote_code: bool) -> bool:
    load_config(model, trust_remote_code=trust_remote_code)
    other = load_tokenizer(model, trust_remote_code=trust_remote_code)
    return bool(other.get_vocab() == tokenizer.get_vocab())
