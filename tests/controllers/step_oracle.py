"""What roles must receive in a step, by loops in float64 over the numbers of the tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_ray.config.jobs import PPOJob
from scripted import entropy_of, is_action, is_truncated, output, response_of


@dataclass
class Token:
    """A token that is an action of the policy, and what is learnt at it."""

    sample: int
    old: float
    value: float
    advantage: float = math.nan
    gain: float = math.nan  # the return that the critic learns


@dataclass
class Expected:
    """A step.

    Attributes:
        tokens: by token.
        context: tokens that are no actions.
        actions: of each sample, how many there are.
        kl: k1 of each sample.
    """

    raw: list[float] = field(default_factory=list)
    tokens: dict[int, Token] = field(default_factory=dict)
    context: set[int] = field(default_factory=set)
    actions: list[int] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    uids: list[str] = field(default_factory=list)
    residual_variance: float = math.nan
    mismatch: float = 0.0


def variance(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / len(values)


def expected_step(
    config: PPOJob,
    requests: Sequence[Sequence[Any]],
    beta: float,
    seen: list[float],
    policy_steps: int,
    critic_steps: int,
) -> Expected:
    """Of the samples of a step, when policy and critic have made so many optimizer steps before it. The raw scores of
    all steps so far are in `seen`, to which this step's are added."""
    algorithm, found = config.algorithm, Expected()
    samples = [response_of(r.uid, r.sample_index) for shard in requests for r in shard]
    found.uids = [r.uid for shard in requests for r in shard]
    for response in samples:
        found.raw.append(sum(part.weight * output(part.model, response[-1]) for part in config.reward_models))
    seen += found.raw
    gains: list[float] = []
    for place, response in enumerate(samples):
        score = found.raw[place]
        if algorithm.normalise_scores:
            score = (score - math.fsum(seen) / len(seen)) / math.sqrt(variance(seen) + 1e-8)
        if algorithm.score_clip is not None:
            score = max(-algorithm.score_clip, min(algorithm.score_clip, score))
        if is_truncated(response):
            score -= algorithm.truncation_penalty
        actions = [token for at, token in enumerate(response) if is_action(response, at)]
        found.context |= set(response) - set(actions)
        found.actions.append(len(actions))
        ratios = [output("policy", t, policy_steps) - output("reference", t) for t in actions]
        found.kl.append(math.fsum(ratios))
        found.mismatch += sum(abs(output("engine", t) - output("policy", t, policy_steps)) for t in actions)
        match algorithm.kl.estimator:
            case "k1":
                penalties = ratios
            case "k2":
                penalties = [ratio**2 / 2 for ratio in ratios]
            case "k3":
                penalties = [math.exp(-ratio) - 1 + ratio for ratio in ratios]
        gains.append(score - beta * math.fsum(penalties))
        rewards = [-beta * penalty for penalty in penalties]
        rewards[-1] += score
        advantage = after = 0.0
        for token, reward in reversed(list(zip(actions, rewards, strict=True))):
            value = output("critic", token, critic_steps)
            advantage = reward + algorithm.gamma * after - value + algorithm.gamma * algorithm.gae_lambda * advantage
            after = value
            old = output("policy", token, policy_steps)
            found.tokens[token] = Token(place, old, value, advantage, advantage + value)
    if algorithm.advantage != "gae":
        for token in found.tokens.values():
            token.advantage = group_advantage(algorithm.advantage, token.sample, gains, found.uids)
    elif len(found.tokens) > 1:
        returns = [token.gain for token in found.tokens.values()]
        residuals = [token.gain - token.value for token in found.tokens.values()]
        found.residual_variance = 1 - variance(residuals) / variance(returns)
    if algorithm.whiten_advantages:
        every = [token.advantage for token in found.tokens.values()]
        mean, deviation = math.fsum(every) / len(every), math.sqrt(variance(every) + 1e-8)
        for token in found.tokens.values():
            token.advantage = (token.advantage - mean) / deviation
    return found


def group_advantage(name: str, sample: int, gains: Sequence[float], uids: Sequence[str]) -> float:
    group = [gain for gain, uid in zip(gains, uids, strict=True) if uid == uids[sample]]
    mean = sum(group) / len(group)
    if name == "grpo":
        deviation = math.sqrt(sum((gain - mean) ** 2 for gain in group) / max(1, len(group) - 1))
        return (gains[sample] - mean) / (deviation + 1e-6)
    return gains[sample] - (sum(group) - gains[sample]) / (len(group) - 1)


@dataclass
class Learnt:
    """What one token contributes to the loss of its optimizer step."""

    loss: float
    gradient: float
    clipped: bool


def policy_token(config: PPOJob, token: int, facts: Token, steps: int) -> Learnt:
    algorithm, advantage = config.algorithm, facts.advantage
    high = algorithm.clip if algorithm.clip_high is None else algorithm.clip_high
    ratio = math.exp(output("policy", token, steps) - facts.old)
    plain, bounded = ratio * advantage, max(1 - algorithm.clip, min(1 + high, ratio)) * advantage
    gain, clipped = min(plain, bounded), bounded < plain
    if algorithm.dual_clip is not None and advantage < 0 and algorithm.dual_clip * advantage > gain:
        gain, clipped = algorithm.dual_clip * advantage, True
    return Learnt(-gain - algorithm.entropy_coef * entropy_of(token), 0.0 if clipped else -plain, clipped)


def critic_token(config: PPOJob, token: int, facts: Token, steps: int) -> Learnt:
    clip, value = config.algorithm.value_clip, output("critic", token, steps)
    error = (value - facts.gain) ** 2
    if clip is None:
        return Learnt(error / 2, value - facts.gain, False)
    near = max(facts.value - clip, min(facts.value + clip, value))
    if (near - facts.gain) ** 2 > error:
        return Learnt((near - facts.gain) ** 2 / 2, 0.0, True)
    return Learnt(error / 2, value - facts.gain, False)


def token_weight(config: PPOJob, facts: Token, step: Expected, tokens_of_step: set[int]) -> float:
    """Weight of a token, of an optimizer step over these tokens."""
    if config.algorithm.loss_mean == "token":
        return 1 / len(tokens_of_step)
    samples = {step.tokens[token].sample for token in tokens_of_step}
    return 1 / (len(samples) * step.actions[facts.sample])
