"""Every metric that a run can log, with its meaning; `describe` makes the table of the docs from it."""

WALL_CLOCK = ("time/", "throughput/")
"""Beginnings of the metrics that depend on the speed of the machine, so that two equal runs differ in them."""

METRICS: dict[str, str] = {
    "step": "step of the run, from 1; every other value of the row belongs to it",
    "epoch": "passes over the training data so far, a fraction within a pass",
    "data/dropped": "sft with data.streaming: rows that were skipped while the rows of this step were read",
    "reward/mean": "score of a sample: weighted sum of the parts, before shaping; mean over the batch",
    "reward/std": "standard deviation of the score over the batch",
    "reward/<part>": "unweighted score by one part of the reward, mean over the batch",
    "group/spread_fraction": "without a critic: share of prompts whose samples differ in their return; the others "
    "teach nothing",
    "kl/mean": "KL from policy to reference in nats per response (sum over tokens), mean over the batch",
    "kl/coef": "β, the weight of the KL in the reward of this step",
    "policy/loss": "clipped policy loss, mean over the optimizer steps",
    "policy/clip_fraction": "share of response tokens whose probability ratio was clipped",
    "policy/approx_kl": "KL from the sampling policy to the one that enters an optimizer step, nats per token, k3",
    "policy/entropy": "entropy of the policy in nats per response token",
    "policy/grad_norm": "norm of the policy's gradient before clipping, mean over the optimizer steps",
    "policy/lr": "learning rate of the policy's last optimizer step",
    "policy/optimizer_steps": "optimizer steps of the policy; fewer than configured after an early stop",
    "critic/loss": "clipped value loss, mean over the optimizer steps",
    "critic/clip_fraction": "share of response tokens whose value was clipped",
    "critic/explained_variance": "1 − variance of (return − value) / variance of the return",
    "critic/grad_norm": "norm of the critic's gradient before clipping, mean over the optimizer steps",
    "critic/lr": "learning rate of the critic's last optimizer step",
    "response/length_mean": "tokens in a response, mean over the batch",
    "response/truncated_fraction": "share of responses that were cut at max_new_tokens",
    "mismatch/logprob_abs_mean": "|log-prob of the engine − log-prob of the trainer|, mean over tokens",
    "rollout/weight_version": "version of the weights that the engines sample with after this step",
    "staleness/mean": "versions that the sampling policy was behind the trained one, mean over tokens",
    "train/loss": "reward_model: the configured loss, preference: the sum of the losses, weighted mean over rows; sft: "
    "−log-prob in nats, mean over learnt tokens",
    "train/accuracy": "reward_model: share of the pairs within rows, ties left out, in which the better candidate "
    "scores higher; preference: share of the pairs in which the chosen answer has the higher log-ratio",
    "train/margin": "better − worse, mean over the same pairs; reward_model: of the scores; preference: of the "
    "log-ratios in nats (of the log-probs where there is no reference)",
    "train/chosen_ratio": "preference: log-ratio of policy to reference of the chosen answer in nats, mean",
    "train/rejected_ratio": "preference: the same of the rejected answer",
    "train/chosen_logprob": "preference: log-prob of the chosen answer per token in nats, mean over pairs",
    "train/rejected_logprob": "preference: the same of the rejected answer",
    "train/wanted_ratio": "preference with labels: log-ratio of the answers that are wanted in nats, mean",
    "train/unwanted_ratio": "preference with labels: the same of those that are not",
    "train/kl": "preference, kto: z0, the mean log-ratio of mismatched prompts and answers, at least 0",
    "train/shift": "preference, bco: δ, the running mean of rewards that this step's losses used",
    "train/entropy": "sft: entropy of the model in nats, mean over learnt tokens",
    "train/grad_norm": "norm of the gradient before clipping",
    "train/lr": "learning rate of the optimizer step",
    **{
        f"eval/{name}": f"the same as train/{name} on the held-out rows"
        for name in (
            *("loss", "accuracy", "entropy", "margin", "chosen_ratio", "rejected_ratio", "chosen_logprob"),
            *("rejected_logprob", "wanted_ratio", "unwanted_ratio", "kl"),
        )
    },
    "eval/perplexity": "sft: exp(eval/loss), per learnt token",
    "score/mean": "reward_model: score of the held-out texts (without data.eval of training texts, at the end), mean",
    "score/std": "standard deviation of these scores",
    "time/step_s": "seconds of the whole step",
    "time/generate_s": "seconds from the first prompt sent to the last response received",
    "time/score_s": "seconds of rewards, log-probs and values, generation overlapped",
    "time/policy_update_s": "seconds of the policy's update",
    "time/critic_update_s": "seconds of the critic's update",
    "time/weight_sync_s": "seconds from pausing the engines to resuming them",
    "time/checkpoint_s": "seconds in which the roles wrote their parts of a checkpoint",
    "time/uncovered_s": "seconds of the step in which no role was at work",
    "throughput/response_tokens_per_s": "response tokens / time/generate_s",
    "throughput/train_tokens_per_s": "tokens trained on / seconds of the updates",
}
"""Meanings, one line with the unit, by the names of metrics.jsonl; `<part>` is the name of a part of the reward."""


def find_metric(name: str) -> str | None:
    """The key of a metric as it was logged (`reward/vader` is a `reward/<part>`), None when there is none."""
    return next((key for key in (name, f"{name.rpartition('/')[0]}/<part>") if key in METRICS), None)


def describe() -> str:
    """All metrics as a Markdown table."""
    rows = [f"| `{name}` | {meaning.replace('|', chr(92) + '|')} |" for name, meaning in METRICS.items()]
    return "\n".join(["| Metric | Meaning |", "|---|---|", *rows])
