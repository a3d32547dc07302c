"""A tiny random model and data of every kind for it, all from text in the package, without a network."""

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

from rlhf_ray.data.prepare.movies import Snippet
from rlhf_ray.data.prepare.rows import (
    SEED,
    ChatRow,
    LabelRow,
    Messages,
    PairRow,
    PreferenceRow,
    PromptRow,
    RankingRow,
    write_rows,
)

TRAIN_PAIRS = 64
EVAL_PAIRS = 32
# Of the prompts, as many are for the training rows of conversations, preferences and labels; the others are held out.
TRAIN_PROMPTS = 48


def build_tiny(stage: Path, target: Path) -> None:
    """The model, prompts, pairs, rankings, and conversations with one good answer, with two, and with labels.

    No sentence of pairs, rankings, preferences and labels is in both splits, and no prompt of conversations.
    """
    from rlhf_ray.models import tiny

    tiny.build_tiny_model(stage / "models/tiny")
    data = stage / "data"
    prompts = [f"{opening} {topic}" for opening, topic in itertools.product(tiny.PROMPT_OPENINGS, tiny.PROMPT_TOPICS)]
    write_rows(data / "tiny_prompts.jsonl", [PromptRow(f"tiny-{i}", text) for i, text in enumerate(prompts)])

    positive = [Snippet(f"p{i}", text, 2.0) for i, text in enumerate(tiny.POSITIVE_SENTENCES)]
    negative = [Snippet(f"n{i}", text, -2.0) for i, text in enumerate(tiny.NEGATIVE_SENTENCES)]
    held_out = len(positive) // 4
    order = random.Random(SEED).sample(range(len(prompts)), len(prompts))
    for split, chosen, rejected, pairs, numbers in (
        ("eval", positive[:held_out], negative[:held_out], EVAL_PAIRS, order[TRAIN_PROMPTS:]),
        ("train", positive[held_out:], negative[held_out:], TRAIN_PAIRS, order[:TRAIN_PROMPTS]),
    ):
        chats = [
            ChatRow(f"tiny-{i}", _said("user", prompts[i]) + _said("assistant", positive[i % len(positive)].text))
            for i in numbers
        ]
        preferences = [
            PreferenceRow(
                f"tiny-{i}",
                _said("user", prompts[i]),
                _said("assistant", chosen[i % len(chosen)].text),
                _said("assistant", rejected[i % len(rejected)].text),
            )
            for i in numbers
        ]
        labels = [
            LabelRow(row.uid, row.prompt, row.chosen if good else row.rejected, good)
            for row, good in zip(preferences, itertools.cycle((True, False)), strict=False)
        ]
        write_rows(data / f"tiny_pairs_{split}.jsonl", _pairs(chosen, rejected, pairs))
        write_rows(data / f"tiny_chats_{split}.jsonl", chats)
        write_rows(data / f"tiny_preferences_{split}.jsonl", preferences)
        write_rows(data / f"tiny_labels_{split}.jsonl", labels)
    write_rows(data / "tiny_rankings_train.jsonl", _rankings(positive[held_out:], negative[held_out:]))


def _said(role: str, content: str) -> Messages:
    return [{"role": role, "content": content}]


def _pairs(chosen: Sequence[Snippet], rejected: Sequence[Snippet], count: int) -> list[PairRow]:
    every = [
        PairRow(f"tiny-{high.uid}-{low.uid}", high.text, low.text, high.rating, low.rating)
        for high, low in itertools.product(chosen, rejected)
    ]
    return random.Random(SEED).sample(every, count)


def _rankings(positive: Sequence[Snippet], negative: Sequence[Snippet]) -> list[RankingRow]:
    """Each has a good text, one that is good and bad, and two bad ones of equal rank, in any order."""
    rng = random.Random(SEED)
    rows = []
    for i, (good, bad) in enumerate(zip(positive, negative, strict=True)):
        mixed, other = f"{positive[i - 1].text} {negative[i - 1].text}", negative[i - 2]
        texts, ranks = zip(*rng.sample([(good.text, 0), (mixed, 1), (bad.text, 2), (other.text, 2)], 4), strict=True)
        rows.append(RankingRow(f"tiny-{i}", list(texts), list(ranks)))
    return rows
