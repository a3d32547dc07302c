"""reward_report.json and reward_report.md: how far a reward model can be trusted."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.algorithms.calibration import Bucket, ReliabilityBin, Share
from rlhf_ray.recovery.files import replace_file

JSON, MARKDOWN = "reward_report.json", "reward_report.md"


@dataclass(frozen=True)
class JudgedRows:
    """What a report is of.

    Attributes:
        file: that the rows are from.
        held_out: the model was not trained on them.
        rows, candidates: scored.
        pairs: of candidates of the same row, of which people liked one better.
        ties: pairs of which they liked both alike.
        dropped, truncated: rows of the file over the token budget.
    """

    file: str
    held_out: bool
    rows: int
    candidates: int
    pairs: int
    ties: int
    dropped: int
    truncated: int


@dataclass(frozen=True)
class Distribution:
    """Scores of some candidates; `percentiles` are by their number."""

    count: int
    mean: float
    std: float
    percentiles: dict[str, float]


@dataclass(frozen=True)
class RewardReport:
    """How a reward model does on judged rows.

    Attributes:
        step: of the run, after which it was evaluated.
        rows: what it was evaluated on.
        accuracy: share of the pairs in which the better candidate scores higher; None without such pairs.
        by_margin: the same by how much better people found it; empty where the rows don't say.
        by_rank_distance: by how many ranks lie between; empty where all rows have two candidates.
        by_difference: by |difference of the scores|, how sure the model is.
        calibration_error: expected calibration error of σ(difference of the scores); None without pairs.
        reliability: what it is made of.
        scores: of all candidates, of the best of each row and of the others.
    """

    step: int
    rows: JudgedRows
    accuracy: Share | None
    by_margin: list[Bucket]
    by_rank_distance: list[Bucket]
    by_difference: list[Bucket]
    calibration_error: float | None
    reliability: list[ReliabilityBin]
    scores: dict[str, Distribution]


def write_report(run_dir: Path, report: RewardReport) -> None:
    """Write both files, each complete or as it was before."""
    text = json.dumps(asdict(report), indent=2, allow_nan=False)
    replace_file(run_dir / JSON, (text + "\n").encode())
    replace_file(run_dir / MARKDOWN, ("\n".join(_markdown(report)) + "\n").encode())


def read_report(run_dir: Path) -> dict[str, Any]:
    """The content of reward_report.json, with the names of `RewardReport`.

    Raises:
        FileNotFoundError: the run has not been evaluated.
    """
    content: dict[str, Any] = json.loads((run_dir / JSON).read_text(encoding="utf-8"))
    return content


def _markdown(report: RewardReport) -> Iterator[str]:
    rows = report.rows
    yield f"# Reward model after step {report.step}\n"
    kind = "held-out rows" if rows.held_out else "rows that the model was trained on (data.eval is not set)"
    yield (
        f"{rows.rows:,} {kind} of `{rows.file}` with {rows.candidates:,} candidates: {rows.pairs:,} pairs of which one "
        f"was liked better, {rows.ties:,} ties. Of the file {rows.dropped:,} rows were dropped and {rows.truncated:,} "
        "truncated.\n"
    )
    if report.accuracy is not None and report.calibration_error is not None:
        accuracy, error = _share(report.accuracy), report.calibration_error
        yield f"**Accuracy {accuracy}** (95 % interval), expected calibration error {error:.3f}."
    yield from _buckets("By margin of the people", "margin", report.by_margin)
    yield from _buckets("By distance of the ranks", "ranks apart", report.by_rank_distance)
    yield from _buckets("By difference of the scores", "difference", report.by_difference)
    if report.reliability:
        yield "\n## Calibration\n"
        yield "| confidence | pairs | mean confidence | accuracy |"
        yield "|---|---|---|---|"
        for b in report.reliability:
            yield f"| {b.low:.2f} to {b.high:.2f} | {b.count:,} | {b.confidence:.3f} | {b.accuracy:.3f} |"
    yield "\n## Scores\n"
    names = list(report.scores["all"].percentiles)
    yield f"| candidates | number | mean | deviation | {' | '.join(f'{name} %' for name in names)} |"
    yield "|---" * (4 + len(names)) + "|"
    for name, scores in report.scores.items():
        values = [scores.mean, scores.std, *scores.percentiles.values()]
        yield f"| {name} | {scores.count:,} | {' | '.join(f'{value:.3f}' for value in values)} |"


def _buckets(title: str, what: str, buckets: Sequence[Bucket]) -> Iterator[str]:
    if not buckets:
        return
    yield f"\n## {title}\n"
    yield f"| {what} | pairs | accuracy (95 % interval) |"
    yield "|---|---|---|"
    for b in buckets:
        bounds = f"{b.low:.3g}" if b.low == b.high else f"{b.low:.3g} to {b.high:.3g}"
        yield f"| {bounds} | {b.accuracy.count:,} | {_share(b.accuracy)} |"


def _share(share: Share) -> str:
    return f"{share.value:.3f} ({share.low:.3f} to {share.high:.3f})"
