"""Movie snippets rated by people (Hutto and Gilbert, ICWSM 2014): preference pairs, rankings and choices."""

import io
import itertools
import json
import random
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_ray.data.prepare.downloads import Distribution, download
from rlhf_ray.data.prepare.rows import SEED, PairRow, RankingRow, RatedRankingRow, require, write_rows

# The human ratings are in the source archive only.
VADER = Distribution(
    "vaderSentiment", "3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9", sdist=True
)

TRAIN_PAIRS = 800
EVAL_PAIRS = 1_024
# Eval pairs share snippets among themselves, so that 8,000 rated snippets stay unused for a gold scorer.
EVAL_SNIPPETS = 1_000
MIN_RATING_GAP = 1.0

RANKED_SNIPPETS = 4
MIN_RANK_GAP = 0.5


@dataclass(frozen=True)
class Snippet:
    """A sentence and its mean human rating, from -4 (very negative) to 4 (very positive)."""

    uid: str
    text: str
    rating: float


def build_movie_pairs(stage: Path, target: Path) -> None:
    """Preference pairs, for training and held out."""
    inner = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    ratings = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
    with (
        tarfile.open(download(VADER, stage / "work", "movie-pairs")) as sdist,
        tarfile.open(fileobj=sdist.extractfile(inner)) as archive,
    ):
        member = archive.extractfile(ratings)
        if member is None:
            raise ValueError(f"{ratings} is not a file in {inner}")
        lines = io.TextIOWrapper(member, encoding="utf-8").read().splitlines()
    train, held_out = movie_pairs(read_snippets(lines))
    write_rows(stage / "data/movie_pairs_train.jsonl", train)
    write_rows(stage / "data/movie_pairs_eval.jsonl", held_out)


def read_snippets(lines: Iterable[str]) -> list[Snippet]:
    """Reads rows of id, mean rating and text, separated by tabs; repeated texts are left out.

    Raises:
        ValueError: a row that has not these three fields, with its line number.
    """
    snippets: dict[str, Snippet] = {}
    for number, line in enumerate(lines, start=1):
        try:
            uid, rating, text = line.split("\t")
            snippet = Snippet(uid, text.strip(), float(rating))
        except ValueError as error:
            raise ValueError(f"line {number} is not an id, a rating and a text: {line[:80]!r}") from error
        snippets.setdefault(snippet.text.casefold(), snippet)
    return list(snippets.values())


def movie_pairs(
    snippets: Sequence[Snippet],
    *,
    train_pairs: int = TRAIN_PAIRS,
    eval_pairs: int = EVAL_PAIRS,
    eval_snippets: int = EVAL_SNIPPETS,
) -> tuple[list[PairRow], list[PairRow]]:
    """Training and held-out pairs that have no snippet in common.

    A snippet is in one training pair at most, and in up to three held-out pairs.

    Raises:
        ValueError: the snippets don't give that many pairs.
    """
    rng = random.Random(SEED)
    shuffled = list(snippets)
    rng.shuffle(shuffled)
    held_out = make_pairs(shuffled[:eval_snippets], eval_pairs, uses=3, rng=rng)
    train = make_pairs(shuffled[eval_snippets:], train_pairs, uses=1, rng=rng)
    require(len(train), train_pairs, "training pairs")
    require(len(held_out), eval_pairs, "held-out pairs")
    return train, held_out


def make_pairs(snippets: Sequence[Snippet], count: int, *, uses: int, rng: random.Random) -> list[PairRow]:
    """Up to `count` distinct pairs of snippets at least `MIN_RATING_GAP` apart, each snippet in `uses` at most."""
    pairs: dict[str, PairRow] = {}
    for _ in range(uses):
        waiting: list[Snippet] = []
        for snippet in rng.sample(snippets, len(snippets)):
            if len(pairs) == count:
                return list(pairs.values())
            for other in waiting:
                high, low = (snippet, other) if snippet.rating > other.rating else (other, snippet)
                uid = f"movie-{high.uid}-{low.uid}"
                if high.rating - low.rating >= MIN_RATING_GAP and uid not in pairs:
                    pairs[uid] = PairRow(uid, high.text, low.text, round(high.rating, 4), round(low.rating, 4))
                    waiting.remove(other)
                    break
            else:
                waiting.append(snippet)
    return list(pairs.values())


def build_movie_choices(stage: Path, target: Path) -> None:
    """The snippets of the training pairs again, in fours: ranked, and as the best one against the rest."""
    with (target / "data/movie_pairs_train.jsonl").open(encoding="utf-8") as file:
        rankings = movie_rankings([PairRow(**json.loads(line)) for line in file])
    choices = [RankingRow(row.uid, row.completions, [min(rank, 1) for rank in row.ranks]) for row in rankings]
    write_rows(stage / "data/movie_rankings_train.jsonl", rankings)
    write_rows(stage / "data/movie_choices_train.jsonl", choices)


def movie_rankings(pairs: Sequence[PairRow]) -> list[RatedRankingRow]:
    """Rankings that each have one snippet of every quarter of the ratings; a snippet of `pairs` is in one of them.

    Raises:
        ValueError: the pairs' snippets can't be divided so, or two of a ranking would be less than `MIN_RANK_GAP`
            apart.
    """
    sides = ((pair.chosen, pair.chosen_rating, pair.rejected, pair.rejected_rating) for pair in pairs)
    ratings = {text: rating for high, above, low, below in sides for text, rating in ((high, above), (low, below))}
    if len(ratings) != 2 * len(pairs) or len(ratings) % RANKED_SNIPPETS:
        raise ValueError(f"{len(pairs)} pairs of {len(ratings)} texts can't be divided by {RANKED_SNIPPETS}")
    rng = random.Random(SEED)
    best_first = sorted(ratings, key=lambda text: (-ratings[text], text))
    count = len(best_first) // RANKED_SNIPPETS
    rows = []
    for number in range(count):
        ranked = best_first[number::count]
        for high, low in itertools.pairwise(ranked):
            if ratings[high] - ratings[low] < MIN_RANK_GAP:
                raise ValueError(f"{high!r} and {low!r} are rated less than {MIN_RANK_GAP} apart")
        shown = rng.sample(ranked, RANKED_SNIPPETS)
        rows.append(
            RatedRankingRow(
                f"movies-{number}", shown, [ranked.index(text) for text in shown], [ratings[text] for text in shown]
            )
        )
    rng.shuffle(rows)
    return rows
