"""Every row that docs/data.md shows can be loaded as it says."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from rlhf_ray.config.data import ComparisonData, ComparisonKind, ConversationData, PromptData
from rlhf_ray.data.comparisons import load_comparisons
from rlhf_ray.data.conversations import load_conversations
from rlhf_ray.data.prompts import load_prompts

PAGE = Path(__file__).parents[2] / "docs/data.md"
SECTIONS = dict(re.findall(r"### (.*?)\n.*?```json\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))


def rows_of(section: str, tmp_path: Path) -> tuple[str, list[dict[str, Any]]]:
    path = tmp_path / "rows.jsonl"
    path.write_text(SECTIONS[section])
    return str(path), [json.loads(line) for line in SECTIONS[section].splitlines()]


def test_the_page_shows_every_kind_of_row() -> None:
    assert list(SECTIONS) == ["Prompts", "Texts and conversations", "Pairs", "Labels", "Comparisons to score"]


def test_prompts(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path, rows = rows_of("Prompts", tmp_path)
    assert len(load_prompts(PromptData(prompts=path, prompts_per_step=1), tokenizer, 100)) == len(rows)


def test_texts_and_conversations(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path, rows = rows_of("Texts and conversations", tmp_path)
    assert len(load_conversations(ConversationData(train=path), path, tokenizer)) == len(rows)


@pytest.mark.parametrize(
    ("section", "kind"), [("Pairs", "pairs"), ("Labels", "labels"), ("Comparisons to score", "rewards")]
)
def test_comparisons(section: str, kind: ComparisonKind, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path, rows = rows_of(section, tmp_path)
    found = load_comparisons(ComparisonData(train=path), path, tokenizer, kind)
    pairs = sum("chosen" in row for row in rows)
    assert len(found) == len(rows) + (pairs if kind == "labels" else 0)
    if kind == "pairs":
        answers = [tokenizer.decode(found.tokens(c)[found.answer_starts[c] :]) for c in range(len(found.ranks))]
        assert [answer.strip() for answer in answers[:4]] == ["No.<|im_end|>", "I can't know.<|im_end|>"] * 2
        assert [answer.strip() for answer in answers[4:]] == ["No.<|im_end|>", "Perhaps.<|im_end|>"] * 4
        assert np.diff(found.candidate_offsets).tolist() == [2] * 6
