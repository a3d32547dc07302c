"""What can be known to be wrong before any actor starts."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from rlhf_ray.config.jobs import JobConfig, PPOJob, RewardModelJob
from rlhf_ray.config.loading import ConfigError
from rlhf_ray.config.rewards import FunctionReward, HttpReward, ModelReward
from rlhf_ray.data.errors import DataError
from rlhf_ray.data.pairs import PairSet, load_pairs
from rlhf_ray.data.prompts import PromptSet, load_prompts
from rlhf_ray.models.heads import (
    ModelError,
    check_scores,
    check_tokenizer_matches,
    load_config,
    load_tokenizer,
    longest_sequence,
)
from rlhf_ray.rewards.errors import RewardError
from rlhf_ray.rewards.function import FunctionScorer
from rlhf_ray.rewards.http import HttpScorer
from rlhf_ray.telemetry.errors import MissingTrackerError
from rlhf_ray.telemetry.trackers import check_trackers


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


@dataclass(frozen=True)
class PairInputs:
    """What the controller of a reward-model job needs of data.

    Attributes:
        steps: of the run; the last of an epoch may be smaller.
        train: pairs to train on.
        held_out: pairs to evaluate on, None without `data.eval`.
    """

    steps: int
    train: PairSet
    held_out: PairSet | None


def check(config: JobConfig) -> PPOInputs | PairInputs:
    """Read models' configs, tokenizers and data, and look for what can't work.

    Raises:
        ConfigError: with every problem found, each naming its dotted path; bad rows also by file and line.
    """
    problems: list[str] = []
    with _collect(problems, "run"):
        check_trackers(config.run)
    return _check_ppo(config, problems) if isinstance(config, PPOJob) else _check_pairs(config, problems)


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
    with _collect(problems, "reference.from"):
        if tokenizer is not None and not _same_vocabulary(
            reference, tokenizer, trust_remote_code=policy.trust_remote_code
        ):
            problems.append(f"reference.from: {reference!r} has another vocabulary than policy.model {policy.model!r}")
    with _collect(problems, "critic.init_from"):
        if tokenizer is not None and not _same_vocabulary(
            critic, tokenizer, trust_remote_code=config.critic.trust_remote_code
        ):
            problems.append(
                f"critic.init_from: {critic!r} has another vocabulary than policy.model {policy.model!r}, whose tokens "
                "the critic reads"
            )
    same_tokens = []
    for index, part in enumerate(config.reward):
        with _collect(problems, f"reward.{index}"):
            if isinstance(part, ModelReward):
                check_scores(part.model, trust_remote_code=part.trust_remote_code)
                if tokenizer is not None:
                    same_tokens.append(
                        _same_vocabulary(part.model, tokenizer, trust_remote_code=part.trust_remote_code)
                    )
            elif isinstance(part, FunctionReward):
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


def _check_pairs(config: RewardModelJob, problems: list[str]) -> PairInputs:
    model = config.reward
    tokenizer = None
    with _collect(problems, "reward.model"):
        tokenizer = load_tokenizer(model.model, trust_remote_code=model.trust_remote_code)
        check_tokenizer_matches(model.model, tokenizer, trust_remote_code=model.trust_remote_code)
    train, held_out = None, None
    if tokenizer is not None:
        with _collect(problems, "data.train"):
            train = load_pairs(config.data, config.data.train, tokenizer).first(config.data.train_pairs)
        if config.data.eval is not None:
            with _collect(problems, "data.eval"):
                held_out = load_pairs(config.data, config.data.eval, tokenizer).first(config.data.eval_pairs)
    if problems or train is None:
        raise ConfigError("preflight", problems)
    steps = config.run.epochs * -(-len(train) // config.data.pairs_per_step)
    return PairInputs(steps, train, held_out)


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
