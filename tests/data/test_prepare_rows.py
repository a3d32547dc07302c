"""Rows that `prepare` makes of its sources: prompts, pairs, rankings, choices, and the split of the demos."""

import itertools
import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.data.prepare.demos import split_by_prompt, usable
from rlhf_ray.data.prepare.imdb import first_tokens
from rlhf_ray.data.prepare.movies import (
    Snippet,
    build_movie_choices,
    make_pairs,
    movie_pairs,
    movie_rankings,
    read_snippets,
)
from rlhf_ray.data.prepare.rows import LabelRow, PairRow, PreferenceRow, write_rows

# --- prompts


def test_prompts_are_the_first_tokens_that_survive_a_round_trip() -> None:
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "slept"]

    class Tokenizer:
        def encode(self, text: str, **options: Any) -> list[int]:
            return [words.index(word) for word in text.split()]

        def decode(self, ids: list[int], **options: Any) -> str:
            return " ".join(words[i] for i in ids).replace("slept", "sat")

    texts = [
        ("long", "the cat<br /><br />sat on a  mat"),
        ("again", "the cat sat on the mat"),
        ("short", "a mat"),
        ("lossy", "slept on the mat"),
        ("last", "a mat and slept"),
    ]
    found = first_tokens(Tokenizer(), texts, 3)
    assert [(row.uid, row.prompt) for row in found] == [("long", "the cat sat"), ("last", "a mat and")]


# --- pairs, rankings and choices of movie snippets


def ratings_file(count: int) -> list[str]:
    rng = random.Random(0)
    return [f"{i}\t{rng.uniform(-4, 4)}\tsentence number {i}" for i in range(count)]


def test_movie_pairs_share_no_snippet_between_train_and_eval() -> None:
    snippets = read_snippets(ratings_file(200))
    train, held_out = movie_pairs(snippets, train_pairs=50, eval_pairs=60, eval_snippets=60)
    used = [text for row in train for text in (row.chosen, row.rejected)]
    assert len(used) == len(set(used)) == 100
    held = [text for row in held_out for text in (row.chosen, row.rejected)]
    assert len(held_out) == 60
    assert set(held).isdisjoint(used)
    assert max(held.count(text) for text in held) <= 3
    assert (train, held_out) == movie_pairs(snippets, train_pairs=50, eval_pairs=60, eval_snippets=60)


def test_movie_pairs_prefer_the_higher_rating_by_at_least_one() -> None:
    ratings = {snippet.text: snippet.rating for snippet in read_snippets(ratings_file(200))}
    for part in movie_pairs(read_snippets(ratings_file(200)), train_pairs=50, eval_pairs=60, eval_snippets=60):
        for row in part:
            assert ratings[row.chosen] - ratings[row.rejected] >= 1
            assert row.chosen_rating == pytest.approx(ratings[row.chosen], abs=1e-4)
            assert row.rejected_rating == pytest.approx(ratings[row.rejected], abs=1e-4)


def test_too_few_snippets_are_an_error_not_a_shorter_file() -> None:
    with pytest.raises(ValueError, match="training pairs where 500 are wanted"):
        movie_pairs(read_snippets(ratings_file(200)), train_pairs=500, eval_pairs=20, eval_snippets=60)


def test_pairs_of_equal_ratings_are_not_made() -> None:
    alike = [Snippet(str(i), str(i), 0.5 + i / 100) for i in range(20)]
    assert make_pairs(alike, 5, uses=2, rng=random.Random(0)) == []


def test_a_repeated_snippet_counts_once_and_a_malformed_row_is_named() -> None:
    assert len(read_snippets(["1\t2.0\tGood.", "2\t1.0\tgood. "])) == 1
    with pytest.raises(ValueError, match="line 2"):
        read_snippets(["1\t2.0\tGood.", "2\tgood\tGood."])


def training_pairs() -> list[PairRow]:
    return movie_pairs(read_snippets(ratings_file(200)), train_pairs=60, eval_pairs=30, eval_snippets=60)[0]


def test_rankings_have_the_snippets_of_the_training_pairs_each_once() -> None:
    rankings = movie_rankings(training_pairs())
    ranked = [text for row in rankings for text in row.completions]
    assert len(rankings) == 30
    assert sorted(ranked) == sorted(text for row in training_pairs() for text in (row.chosen, row.rejected))
    assert rankings == movie_rankings(training_pairs())
    assert len({row.uid for row in rankings}) == 30


def test_ranks_follow_the_ratings_which_are_far_enough_apart() -> None:
    ratings = {snippet.text: snippet.rating for snippet in read_snippets(ratings_file(200))}
    rankings = movie_rankings(training_pairs())
    for row in rankings:
        assert row.ratings == pytest.approx([ratings[text] for text in row.completions], abs=1e-4)
        best_first = [rating for _, rating in sorted(zip(row.ranks, row.ratings, strict=True))]
        assert sorted(row.ranks) == [0, 1, 2, 3]
        assert min(high - low for high, low in itertools.pairwise(best_first)) >= 0.5
    assert {row.ranks.index(0) for row in rankings} == {0, 1, 2, 3}


def test_choices_are_the_rankings_with_the_best_against_the_rest(tmp_path: Path) -> None:
    stage, target = tmp_path / "stage", tmp_path / "target"
    for folder in (stage, target):
        (folder / "data").mkdir(parents=True)
    write_rows(target / "data/movie_pairs_train.jsonl", training_pairs())
    build_movie_choices(stage, target)
    rankings, choices = (
        [json.loads(line) for line in (stage / f"data/movie_{kind}_train.jsonl").read_text().splitlines()]
        for kind in ("rankings", "choices")
    )
    assert [(row["uid"], row["completions"]) for row in choices] == [
        (row["uid"], row["completions"]) for row in rankings
    ]
    assert [[rank > 0 for rank in row["ranks"]] for row in rankings] == [row["ranks"] for row in choices]


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([PairRow("a", "x", "y", 2.0, 1.0)], "1 pairs of 2 texts can't be divided by 4"),
        ([PairRow("a", "x", "y", 2.0, 1.0), PairRow("b", "x", "z", 2.0, 1.0)], "2 pairs of 3 texts"),
        ([PairRow("a", "x", "y", 2.0, 1.0), PairRow("b", "z", "w", 3.0, 1.2)], "'w' and 'y' are rated less than 0.5"),
    ],
)
def test_snippets_that_give_no_rankings_are_an_error(pairs: list[PairRow], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        movie_rankings(pairs)


# --- demos


def turn(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def preference(uid: str, prompt: str, chosen: str, rejected: str) -> PreferenceRow:
    return PreferenceRow(uid, turn("user", prompt), turn("assistant", chosen), turn("assistant", rejected))


def test_rows_that_teach_nothing_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        preference("a", "p", "yes", "no"),
        preference("same prompt", "p", "yes", "never"),
        preference("empty", "p", " ", "no"),
        preference("equal", "p", "no", "no"),
        preference("twice", "p", "yes", "no"),
    ]
    with caplog.at_level(logging.INFO):
        assert [row.uid for row in usable(rows)] == ["a", "same prompt"]
    assert (
        "2 of 5 rows are used; left out: 1 with an empty answer, 1 with equal answers, 1 that stand twice"
        in caplog.text
    )


def test_no_prompt_is_in_both_splits() -> None:
    rows = [
        LabelRow(str(i), turn("user", f"prompt {i // 2}"), turn("assistant", f"answer {i}"), i % 2 == 0)
        for i in range(40)
    ]
    train, held_out = split_by_prompt(rows, 11)
    # Prompts come in twos here, so 11 rows are not to be had.
    assert (len(train), len(held_out)) == (30, 10)
    assert {str(row.prompt) for row in train}.isdisjoint(str(row.prompt) for row in held_out)
    assert sorted(int(row.uid) for row in train + held_out) == list(range(40))
    assert (train, held_out) == split_by_prompt(rows, 11)
