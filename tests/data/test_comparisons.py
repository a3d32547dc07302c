import copy
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from rlhf_ray.config.data import ComparisonData, ComparisonKind
from rlhf_ray.data.comparisons import ComparisonSet, load_comparisons
from rlhf_ray.data.errors import DataError, DataErrors

GOOD = "A warm and funny film with a wonderful cast."
BAD = "A dull and ugly film with a terrible cast."


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "pairs.jsonl"


def load(
    path: Path, lines: list[Any], tokenizer: PreTrainedTokenizerFast, kind: ComparisonKind = "rewards", **config: Any
) -> ComparisonSet:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return load_comparisons(ComparisonData(**{"train": str(path), **config}), path, tokenizer, kind)


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
    (
        {"chosen": ["a"], "rejected": "b"},
        "'chosen' is a list and 'rejected' is text, but all must be text or all lists of chat messages",
    ),
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
    assert "rows over the token budget, dropped: 2 (pairs:1, pairs:3)" in caplog.text


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
    with pytest.raises(DataError, match=r"none of 1 rows fits data.max_tokens \(2\): raise it, or set data.overlong"):
        load(file, [{"chosen": GOOD, "rejected": BAD}], tokenizer, max_tokens=2)


def test_none_is_told_to_truncate_what_is_truncated(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"\(1\): raise it: a row cut to that has nothing to learn from"):
        load(file, [{"chosen": GOOD, "rejected": BAD}], tokenizer, max_tokens=1, overlong="truncate")


def test_a_missing_file_names_the_setting_that_named_it(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = ComparisonData(train=str(tmp_path / "train.jsonl"), eval=str(tmp_path / "eval.jsonl"))
    with pytest.raises(DataError, match=r"train.jsonl: can't be read .* see data.train"):
        load_comparisons(config, config.train, tokenizer, "rewards")
    with pytest.raises(DataError, match=r"eval.jsonl: can't be read .* see data.eval"):
        load_comparisons(config, str(config.eval), tokenizer, "rewards")


TALK = [{"role": "user", "content": "Is it good?"}]


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def texts_of(found: ComparisonSet, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Each candidate as text."""
    return [tokenizer.decode(found.tokens(candidate)) for candidate in range(len(found.ranks))]


def answers_of(found: ComparisonSet, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The answer of each candidate as text."""
    starts = found.answer_starts
    return [tokenizer.decode(found.tokens(candidate)[start:]) for candidate, start in enumerate(starts)]


def test_rankings_choices_and_ties_become_ranks(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        {"completions": ["a", "b", "c"], "ranks": [2, 0, 2], "margin": 0.5, "weight": 3},
        {"completions": ["a", "b", "c"], "best": 2, "prompt": "Say"},
        {"chosen": "a", "rejected": "b", "tie": True},
        {"chosen": "a", "rejected": "b", "tie": False},
    ]
    found = load(file, rows, tokenizer)
    assert found.candidate_offsets.tolist() == [0, 3, 6, 8, 10]
    assert found.ranks.tolist() == [2, 0, 2, 1, 1, 0, 0, 0, 0, 1]
    assert texts_of(found, tokenizer)[:6] == ["a", "b", "c", "Saya", "Sayb", "Sayc"]
    assert (found.margins.tolist(), found.weights.tolist()) == ([0.5, 0, 0, 0], [3, 1, 1, 1])
    assert found.answer_starts.tolist() == [0] * 10
    assert found.lengths.tolist() == [sum(len(found.tokens(c)) for c in found.candidates([row])) for row in range(4)]


def test_ratings_of_a_pair_are_its_margin_unless_it_says_another(
    file: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rated = {"chosen": "a", "rejected": "b", "chosen_rating": 1.5, "rejected_rating": -1}
    rows = [rated, {**rated, "margin": 1}, {**rated, "tie": True}, {**rated, "rejected_rating": None}]
    assert load(file, rows, tokenizer).margins.tolist() == [2.5, 1, 0, 0]
    columns = {"chosen_rating": "score_chosen", "rejected_rating": "score_rejected"}
    [margin] = load(
        file, [{"chosen": "a", "rejected": "b", "score_chosen": 3, "score_rejected": 1}], tokenizer, columns=columns
    ).margins
    assert margin == 2
    pair = {"prompt": "Is it?"} | rated | {"chosen": " a", "rejected": " b"}
    assert load(file, [pair], tokenizer, "pairs").margins == 2.5
    assert load(file, [pair], tokenizer, "labels").margins.tolist() == [0, 0]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": TALK, "chosen": [says("Yes.")], "rejected": [says("No.")]},
        {"chosen": [*TALK, says("Yes.")], "rejected": [*TALK, says("No.")]},
        {"prompt": TALK, "completions": [[says("Yes.")], [says("No.")]], "ranks": [0, 1]},
        {"completions": [[*TALK, says("Yes.")], [*TALK, says("No.")]], "best": 0},
    ],
)
def test_conversations_to_score_are_rendered_whole(
    row: dict[str, Any], file: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    found = load(file, [row], tokenizer)
    for candidate, answer in enumerate(("Yes.", "No.")):
        expected = tokenizer.apply_chat_template([*TALK, says(answer)])["input_ids"]
        assert found.tokens(candidate).tolist() == expected


@pytest.mark.parametrize("kind", ["pairs", "labels"])
@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Is it good?", "chosen": " Yes.", "rejected": " No."}, "Is it good?"),
        ({"chosen": "Is it good? Yes.", "rejected": "Is it good? No."}, "Is it good?"),
        ({"chosen": "It is goodly", "rejected": "It is good"}, "It is"),
        ({"chosen": "Good?\n\n Yes.", "rejected": "Good?\n\n No."}, "Good?"),
        ({"prompt": TALK, "chosen": [says("Yes.")], "rejected": [says("No.")]}, None),
        ({"chosen": [*TALK, says("Yes.")], "rejected": [*TALK, says("No.")]}, None),
    ],
)
def test_an_answer_follows_the_tokens_of_its_prompt(
    kind: ComparisonKind, row: dict[str, Any], prompt: str | None, file: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    found = load(file, [row], tokenizer, kind)
    if prompt is None:
        ids = tokenizer.apply_chat_template(TALK, add_generation_prompt=True)["input_ids"]
        answers = ["Yes.<|im_end|>\n", "No.<|im_end|>\n"]
    else:
        ids = tokenizer(prompt)["input_ids"]
        given = len(prompt) if "prompt" not in row else 0
        answers = [row[key][given:] + tokenizer.eos_token for key in ("chosen", "rejected")]
    assert answers_of(found, tokenizer) == answers
    for candidate, start in enumerate(found.answer_starts):
        assert found.tokens(candidate)[:start].tolist() == ids
    assert found.ranks.tolist() == [0, 1]
    rows, uids = (1, ["pairs:1"]) if kind == "pairs" else (2, ["pairs:1/chosen", "pairs:1/rejected"])
    assert (len(found), list(found.uids)) == (rows, uids)


def test_labels_say_what_is_wanted(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        {"prompt": "Is it good?", "completion": " Yes.", "label": False, "weight": 0.5},
        {"prompt": TALK, "completion": [says("Yes.")], "label": True},
        {"prompt": "Is it good?", "chosen": " Yes.", "rejected": " No.", "uid": "x", "weight": 2},
    ]
    found = load(file, rows, tokenizer, "labels")
    assert found.uids == ("pairs:1", "pairs:2", "x/chosen", "x/rejected")
    assert found.ranks.tolist() == [1, 0, 0, 1]
    assert found.candidate_offsets.tolist() == [0, 1, 2, 3, 4]
    assert found.weights.tolist() == [0.5, 1, 2, 2]
    assert answers_of(found, tokenizer) == [" Yes.<|im_end|>", "Yes.<|im_end|>\n", " Yes.<|im_end|>", " No.<|im_end|>"]


def test_answers_over_the_budget_keep_their_beginning(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        {"prompt": "Is it good?", "chosen": " Yes.", "rejected": " No."},
        {"prompt": "Is it good?", "chosen": " It is.", "rejected": " It is a film."},  # the same after the cut
        {"prompt": "Is it a warm and funny film?", "chosen": " Yes.", "rejected": " No."},  # no answer is left
    ]
    whole = load(file, rows[:1], tokenizer, "pairs")
    budget = int(whole.answer_starts[0]) + 2
    found = load(file, rows, tokenizer, "pairs", max_tokens=budget, overlong="truncate")
    assert (found.uids, found.dropped, found.truncated) == (("pairs:1",), 2, 1)
    for candidate in range(2):
        assert found.tokens(candidate).tolist() == whole.tokens(candidate)[:budget].tolist()


def test_a_labelled_answer_that_is_cut_off_is_dropped(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        {"prompt": "Is it good?", "completion": " Yes.", "label": True},
        {"prompt": "Is it a warm and funny film?", "completion": " Yes.", "label": True},
    ]
    found = load(file, rows, tokenizer, "labels", max_tokens=10, overlong="truncate")
    assert (found.uids, found.dropped) == (("pairs:1",), 1)


def test_first_takes_rows_with_all_their_candidates(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"completions": ["a", "b", "c"], "best": 1}, {"chosen": "d", "rejected": "e"}]
    found = load(file, rows, tokenizer).first(1)
    assert (found.ranks.tolist(), texts_of(found, tokenizer)) == ([1, 0, 1], ["a", "b", "c"])
