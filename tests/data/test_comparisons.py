import copy
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from rlhf_ray.config.data import ComparisonData
from rlhf_ray.data.comparisons import ComparisonSet, load_comparisons
from rlhf_ray.data.errors import DataError, DataErrors

GOOD = "A warm and funny film with a wonderful cast."
BAD = "A dull and ugly film with a terrible cast."


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "pairs.jsonl"


def load(path: Path, lines: list[Any], tokenizer: PreTrainedTokenizerFast, **config: Any) -> ComparisonSet:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return load_comparisons(ComparisonData(**{"train": str(path), **config}), path, tokenizer)


def test_both_texts_of_a_pair_become_tokens(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    pairs = load(file, [{"chosen": GOOD, "rejected": BAD}, {"chosen": "Yes", "rejected": "No", "uid": "x"}], tokenizer)
    assert len(pairs) == 2
    assert pairs.uids == ("pairs:1", "x")
    assert pairs.tokens(0).tolist() == tokenizer(GOOD)["input_ids"]
    assert pairs.tokens(1).tolist() == tokenizer(BAD)["input_ids"]
    assert pairs.tokens(2).tolist() == tokenizer("Yes")["input_ids"]
    assert pairs.tokens(3).tolist() == tokenizer("No")["input_ids"]
    assert pairs.token_ids.dtype == np.int32
    assert pairs.ranks.tolist() == [0, 1, 0, 1]
    assert pairs.candidates([1, 0]).tolist() == [2, 3, 0, 1]
    assert pairs.lengths[0] == sum(len(tokenizer(text)["input_ids"]) for text in (GOOD, BAD))
    assert pairs.first(1).tokens(1).tolist() == tokenizer(BAD)["input_ids"]
    assert len(pairs.first(1).token_ids) == pairs.lengths[0]
    assert (pairs.dropped, pairs.truncated) == (0, 0)


def test_the_prompt_is_prepended_to_both_texts(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    pairs = load(file, [{"prompt": "Is it good?", "chosen": " Yes", "rejected": " No"}], tokenizer)
    assert pairs.tokens(0).tolist() == tokenizer("Is it good? Yes")["input_ids"]
    assert pairs.tokens(1).tolist() == tokenizer("Is it good? No")["input_ids"]


BAD_ROWS: list[tuple[Any, str]] = [
    ("", "is blank"),
    ("{", "is not JSON"),
    ("[]", "is a list, but must be a JSON object"),
    ({"chosen": "a"}, "has no 'rejected' (it has 'chosen')"),
    ({"rejected": "a"}, "has no 'chosen'"),
    ({"chosen": "a", "rejected": ""}, "'rejected' is empty"),
    ({"chosen": " ", "rejected": "a"}, "'chosen' is empty"),
    ({"chosen": ["a"], "rejected": "b"}, "'chosen' is a list, but must be text"),
    ({"chosen": "a", "rejected": None}, "'rejected' is null, but must be text"),
    ({"prompt": "", "chosen": "a", "rejected": "b"}, "'prompt' is empty"),
    ({"prompt": 3, "chosen": "a", "rejected": "b"}, "'prompt' is a number, but must be text"),
    ({"chosen": "a", "rejected": "a"}, "'chosen' and 'rejected' are the same text"),
    ({"chosen": "a", "rejected": "b", "uid": "first"}, "uid 'first' stands in line 1 already"),
]


def test_every_bad_row_is_named_at_once(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"chosen": "a", "rejected": "b", "uid": "first"}, *[row for row, _ in BAD_ROWS]]
    with pytest.raises(DataErrors) as caught:
        load(file, rows, tokenizer)
    assert [error.row for error in caught.value.errors] == [i + 2 for i in range(len(BAD_ROWS))]
    for error, (_, reason) in zip(caught.value.errors, BAD_ROWS, strict=True):
        assert reason in error.reason


def test_texts_with_the_same_or_no_tokens_are_bad_rows(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    deaf = copy.deepcopy(tokenizer)
    deaf.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("x", "")])
    rows = [{"chosen": "a", "rejected": "b"}, {"chosen": "Yes", "rejected": "yes"}, {"chosen": "a", "rejected": "x"}]
    with pytest.raises(DataErrors) as caught:
        load(file, rows, deaf)
    assert [error.row for error in caught.value.errors] == [2, 3]
    assert "'chosen' and 'rejected' give the same tokens" in caught.value.errors[0].reason
    assert "'rejected' gives no tokens" in caught.value.errors[1].reason


def test_a_pair_over_the_budget_is_dropped_whole_counted_and_reported(
    file: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"chosen": "Yes", "rejected": BAD}, {"chosen": "Yes", "rejected": "No"}, {"chosen": GOOD, "rejected": "No"}]
    with caplog.at_level(logging.WARNING):
        pairs = load(file, rows, tokenizer, max_tokens=5)
    assert pairs.uids == ("pairs:2",)
    assert (pairs.dropped, pairs.truncated) == (2, 0)
    assert "pairs over the token budget, dropped: 2 (pairs:1, pairs:3)" in caplog.text


def test_truncation_keeps_the_end_of_each_text(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"chosen": "Yes", "rejected": BAD}, {"chosen": "Yes", "rejected": "No"}]
    pairs = load(file, rows, tokenizer, max_tokens=5, overlong="truncate")
    assert pairs.tokens(0).tolist() == tokenizer("Yes")["input_ids"]
    assert pairs.tokens(1).tolist() == tokenizer(BAD)["input_ids"][-5:]
    assert (pairs.dropped, pairs.truncated) == (0, 1)


def test_a_pair_whose_ends_are_the_same_is_dropped_not_truncated(
    file: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [{"chosen": GOOD, "rejected": BAD}, {"chosen": "Yes", "rejected": "No"}]
    pairs = load(file, rows, tokenizer, max_tokens=1, overlong="truncate")
    assert tokenizer(GOOD)["input_ids"][-1:] == tokenizer(BAD)["input_ids"][-1:]
    assert pairs.dropped == 1
    assert "pairs:1" not in pairs.uids


def test_a_file_without_a_usable_pair_is_an_error(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"none of 1 pairs fits data.max_tokens \(2\): raise it, or set data.overlong"):
        load(file, [{"chosen": GOOD, "rejected": BAD}], tokenizer, max_tokens=2)


def test_a_missing_file_names_the_setting_that_named_it(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = ComparisonData(train=str(tmp_path / "train.jsonl"), eval=str(tmp_path / "eval.jsonl"))
    with pytest.raises(DataError, match=r"train.jsonl: can't be read .* see data.train"):
        load_comparisons(config, config.train, tokenizer)
    with pytest.raises(DataError, match=r"eval.jsonl: can't be read .* see data.eval"):
        load_comparisons(config, str(config.eval), tokenizer)
