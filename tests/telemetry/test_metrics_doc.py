"""docs/metrics.md is made from the registry of names: `python tests/telemetry/test_metrics_doc.py` writes it."""

from pathlib import Path

from rlhf_ray.telemetry.names import WALL_CLOCK, describe

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"

HEAD = """\
# Metrics

Made from `rlhf_ray.telemetry.names` by `python tests/telemetry/test_metrics_doc.py`; a test keeps it current.

A run writes one JSON object per step to `metrics.jsonl` in its folder, and the same numbers to TensorBoard, W&B and
MLflow where they are configured (`run.tensorboard`, `run.wandb`, `run.mlflow`), and to Prometheus, where `a/b` is
`ray_rlhf_a_b` (docs/operations.md).

- Jobs over a data set (`sft`, `reward_model`, `preference`) log `epoch`, `data/*`, `train/*`, `eval/*`, some of
  `time/*` and `throughput/train_tokens_per_s`. All others belong to `job: ppo`.
- A metric is missing from the rows of steps in which it has no value: `policy/*` while only the critic learns
  (`algorithm.critic_warmup_steps`), `eval/*` between evaluations, `time/checkpoint_s` between checkpoints.
- `<part>` is the name of a part of the reward: its `name`, or what stands in for it (docs/config.md).
- `kl/mean` is always measured with estimator k1, whatever `algorithm.kl.estimator` the reward uses.
"""


def page() -> str:
    """The whole page."""
    timed = sorted(f"`{beginning}*`" for beginning in WALL_CLOCK)
    clock = f"- {' and '.join(timed)} depend on the machine's speed. Equal deterministic runs differ in these alone.\n"
    return f"{HEAD}{clock}\n{describe()}\n"


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tests/telemetry/test_metrics_doc.py"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
