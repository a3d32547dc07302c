"""Every metric that a run can log, with its meaning; `describe` makes the table of the docs from it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MetricName:
    """One metric.

    Attributes:
        name: as in metrics.jsonl; `<part>` stands for the name of a part of the reward.
        meaning: one line, with the unit.
        wall_clock: it depends on the speed of the machine, so two equal runs differ in it.
    """

    name: str
    meaning: str
    wall_clock: bool = False


_ALL = (
    MetricName("step", "step of the run, from 1; every other value of the row belongs to it"),
    MetricName("epoch", "passes over the training data so far, a fraction within a pass"),
    MetricName("data/dropped", "sft with data.streaming: rows that were skipped while the rows of this step were read"),
    MetricName("reward/mean", "score of a sample: weighted sum of the parts, before shaping; mean over the batch"),
    MetricName("reward/std", "standard deviation of the score over the batch"),
    MetricName("reward/<part>", "unweighted score by one part of the reward, mean over the batch"),
    MetricName(
        "group/spread_fraction",
        "without a critic: share of prompts whose samples differ in their return; the others teach nothing",
    ),
    MetricName("kl/mean", "KL from policy to reference in nats per response (sum over tokens), mean over the batch"),
    MetricName("kl/coef", "β, the weight of the KL in the reward of this step"),
    MetricName("policy/loss", "clipped policy loss, mean over the optimizer steps"),
    MetricName("policy/clip_fraction", "share of response tokens whose probability ratio was clipped"),
    MetricName(
        "policy/approx_kl", "KL from the sampling policy to the one that enters an optimizer step, nats per token, k3"
    ),
    MetricName("policy/entropy", "entropy of the policy in nats per response token"),
    MetricName("policy/grad_norm", "norm of the policy's gradient before clipping, mean over the optimizer steps"),
    MetricName("policy/lr", "learning rate of the policy's last optimizer step"),
    MetricName("policy/optimizer_steps", "optimizer steps of the policy; fewer than configured after an early stop"),
    MetricName("critic/loss", "clipped value loss, mean over the optimizer steps"),
    MetricName("critic/clip_fraction", "share of response tokens whose value was clipped"),
    MetricName("critic/explained_variance", "1 − variance of (return − value) / variance of the return"),
    MetricName("critic/grad_norm", "norm of the critic's gradient before clipping, mean over the optimizer steps"),
    MetricName("critic/lr", "learning rate of the critic's last optimizer step"),
    MetricName("response/length_mean", "tokens in a response, mean over the batch"),
    MetricName("response/truncated_fraction", "share of responses that were cut at max_new_tokens"),
    MetricName("mismatch/logprob_abs_mean", "|log-prob of the engine − log-prob of the trainer|, mean over tokens"),
    MetricName("rollout/weight_version", "version of the weights that the engines sample with after this step"),
    MetricName("staleness/mean", "versions that the sampling policy was behind the trained one, mean over tokens"),
    MetricName(
        "train/loss",
        "reward_model: the configured loss, preference: the sum of the losses, weighted mean over rows; sft: −log-prob "
        "in nats, mean over learnt tokens",
    ),
    MetricName(
        "train/accuracy",
        "reward_model: share of the pairs within rows, ties left out, in which the better candidate scores higher; "
        "preference: share of the pairs in which the chosen answer has the higher log-ratio",
    ),
    MetricName(
        "train/margin",
        "better − worse, mean over the same pairs; reward_model: of the scores; preference: of the log-ratios in nats "
        "(of the log-probs where there is no reference)",
    ),
    MetricName("train/chosen_ratio", "preference: log-ratio of policy to reference of the chosen answer in nats, mean"),
    MetricName("train/rejected_ratio", "preference: the same of the rejected answer"),
    MetricName("train/chosen_logprob", "preference: log-prob of the chosen answer per token in nats, mean over pairs"),
    MetricName("train/rejected_logprob", "preference: the same of the rejected answer"),
    MetricName("train/wanted_ratio", "preference with labels: log-ratio of the answers that are wanted in nats, mean"),
    MetricName("train/unwanted_ratio", "preference with labels: the same of those that are not"),
    MetricName("train/kl", "preference, kto: z0, the mean log-ratio of mismatched prompts and answers, at least 0"),
    MetricName("train/shift", "preference, bco: δ, the running mean of rewards that this step's losses used"),
    MetricName("train/entropy", "sft: entropy of the model in nats, mean over learnt tokens"),
    MetricName("train/grad_norm", "norm of the gradient before clipping"),
    MetricName("train/lr", "learning rate of the optimizer step"),
    MetricName("eval/loss", "the same as train/loss on the held-out rows"),
    MetricName("eval/accuracy", "the same as train/accuracy on the held-out rows"),
    MetricName("eval/entropy", "the same as train/entropy on the held-out rows"),
    MetricName("eval/perplexity", "sft: exp(eval/loss), per learnt token"),
    MetricName("eval/margin", "the same as train/margin on the held-out rows"),
    MetricName("eval/chosen_ratio", "the same as train/chosen_ratio on the held-out rows"),
    MetricName("eval/rejected_ratio", "the same as train/rejected_ratio on the held-out rows"),
    MetricName("eval/chosen_logprob", "the same as train/chosen_logprob on the held-out rows"),
    MetricName("eval/rejected_logprob", "the same as train/rejected_logprob on the held-out rows"),
    MetricName("eval/wanted_ratio", "the same as train/wanted_ratio on the held-out rows"),
    MetricName("eval/unwanted_ratio", "the same as train/unwanted_ratio on the held-out rows"),
    MetricName("eval/kl", "the same as train/kl on the held-out rows"),
    MetricName(
        "score/mean",
        "reward_model: score of the held-out texts (without data.eval of training texts, at the end), mean",
    ),
    MetricName("score/std", "standard deviation of these scores"),
    MetricName("time/step_s", "seconds of the whole step", wall_clock=True),
    MetricName("time/generate_s", "seconds from the first prompt sent to the last response received", wall_clock=True),
    MetricName("time/score_s", "seconds of rewards, log-probs and values, generation overlapped", wall_clock=True),
    MetricName("time/policy_update_s", "seconds of the policy's update", wall_clock=True),
    MetricName("time/critic_update_s", "seconds of the critic's update", wall_clock=True),
    MetricName("time/weight_sync_s", "seconds from pausing the engines to resuming them", wall_clock=True),
    MetricName("time/checkpoint_s", "seconds in which the roles wrote their parts of a checkpoint", wall_clock=True),
    MetricName("time/uncovered_s", "seconds of the step in which no role was at work", wall_clock=True),
    MetricName("throughput/response_tokens_per_s", "response tokens / time/generate_s", wall_clock=True),
    MetricName("throughput/train_tokens_per_s", "tokens trained on / seconds of the updates", wall_clock=True),
)

METRICS: dict[str, MetricName] = {metric.name: metric for metric in _ALL}


def find_metric(name: str) -> MetricName | None:
    """The entry of a metric as it was logged (`reward/vader` is a `reward/<part>`), None when there is none."""
    return METRICS.get(name) or METRICS.get(f"{name.rpartition('/')[0]}/<part>")


def describe() -> str:
    """All metrics as a Markdown table."""
    rows = [f"| `{metric.name}` | {metric.meaning.replace('|', chr(92) + '|')} |" for metric in METRICS.values()]
    return "\n".join(["| Metric | Meaning |", "|---|---|", *rows])
