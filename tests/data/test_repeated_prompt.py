"""Rows whose answers bring their prompt along: it is there once, whatever the kind of row, or the row is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rlhf_ray.config.data import ComparisonData, ComparisonKind, ConversationData
from rlhf_ray.data.comparisons import ComparisonSet, load_comparisons
from rlhf_ray.data.conversations import ConversationSet, load_conversations
from rlhf_ray.data.errors import DataErrors


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def says(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


ASKED, YES, NO = user("Will it rain?"), says("Yes."), says("No.")
FIRST = [user("Hello."), says("Good day."), ASKED]
SYSTEM = [{"role": "system", "content": "Be brief."}, ASKED]


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def comparisons(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Any:
    def load(kind: ComparisonKind, *rows: dict[str, Any], **config: Any) -> ComparisonSet:
        path = write(tmp_path / "rows.jsonl", *rows)
        return load_comparisons(ComparisonData(train=path, **config), path, tokenizer, kind)

    return load


@pytest.fixture
def conversations(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Any:
    def load(*rows: dict[str, Any], **config: Any) -> ConversationSet:
        path = write(tmp_path / "rows.jsonl", *rows)
        return load_conversations(ConversationData(train=path, **config), path, tokenizer)

    return load


def same(one: ComparisonSet, other: ComparisonSet) -> bool:
    return (
        one.token_ids.tolist() == other.token_ids.tolist()
        and one.token_offsets.tolist() == other.token_offsets.tolist()
        and one.answer_starts.tolist() == other.answer_starts.tolist()
    )


@pytest.mark.parametrize("kind", ["pairs", "labels", "rewards"])
@pytest.mark.parametrize(
    ("prompt", "before"),
    [
        ("Will it rain?", [ASKED]),
        (" Will it rain?\n", [ASKED]),
        ("Will it rain?", SYSTEM),
        ("Hello.", FIRST),
        ([ASKED], [ASKED]),
        (SYSTEM, SYSTEM),
        (FIRST, FIRST),
        (FIRST[:1], FIRST),
    ],
)
def test_conversations_that_begin_with_their_prompt_have_it_once(
    kind: ComparisonKind, prompt: Any, before: list[dict[str, str]], comparisons: Any
) -> None:
    found = comparisons(kind, {"prompt": prompt, "chosen": [*before, YES], "rejected": [*before, NO]})
    assert same(found, comparisons(kind, {"prompt": before, "chosen": [YES], "rejected": [NO]}))


@pytest.mark.parametrize("prompt", ["Will it rain?", [ASKED]])
def test_so_have_rankings_choices_and_judged_answers(prompt: Any, comparisons: Any) -> None:
    several = {"prompt": prompt, "completions": [[ASKED, YES], [ASKED, NO]]}
    plain = {"prompt": [ASKED], "completions": [[YES], [NO]]}
    for judged in ({"ranks": [0, 1]}, {"best": 1}):
        assert same(comparisons("rewards", several | judged), comparisons("rewards", plain | judged))
    found = comparisons("labels", {"prompt": prompt, "completion": [ASKED, YES], "label": True})
    assert same(found, comparisons("labels", {"prompt": [ASKED], "completion": [YES], "label": True}))


@pytest.mark.parametrize(
    "before", [[user("Is it late?")], [says("Will it rain?"), ASKED], []], ids=["another", "the assistant's", "none"]
)
def test_a_text_that_conversations_do_not_begin_with_is_refused(before: list[dict[str, str]], comparisons: Any) -> None:
    for kind in ("pairs", "rewards"):
        with pytest.raises(DataErrors, match="'prompt' is text, but the messages of 'chosen' do not begin with it"):
            comparisons(kind, {"prompt": "Will it rain?", "chosen": [*before, YES], "rejected": [*before, NO]})


PLAIN = {"prompt": "Will it rain?", "chosen": " Yes.", "rejected": " No."}
REPEATED = {"prompt": "Will it rain?", "chosen": "Will it rain? Yes.", "rejected": "Will it rain? No."}


@pytest.mark.parametrize("kind", ["pairs", "labels", "rewards"])
def test_texts_that_begin_with_their_prompt_are_refused_stripped_or_kept(
    kind: ComparisonKind, comparisons: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(DataErrors, match=r"'chosen' and 'rejected' begin with the whole 'prompt'.* to strip, or"):
        comparisons(kind, REPEATED)
    assert same(comparisons(kind, REPEATED, repeated_prompt="strip"), comparisons(kind, PLAIN))
    kept = comparisons(kind, REPEATED, repeated_prompt="keep")
    assert tokenizer.decode(kept.tokens(0)).startswith("Will it rain?Will it rain? Yes.")


def test_so_are_rankings_and_judged_texts(comparisons: Any) -> None:
    ranked = {"prompt": "Will it rain?", "completions": ["Will it rain? Yes.", "Will it rain? No."], "best": 0}
    judged = {"prompt": "Will it rain?", "completion": "Will it rain? Yes.", "label": False}
    for kind, row in (("rewards", ranked), ("labels", judged)):
        with pytest.raises(DataErrors, match="with the whole 'prompt'"):
            comparisons(kind, row)
        comparisons(kind, row, repeated_prompt="strip")


@pytest.mark.parametrize(
    "answers",
    [
        {"chosen": "Will it rain? You ask that often.", "rejected": " No."},  # one answer that repeats the question
        {"prompt": "It is a", "chosen": "It is another day.", "rejected": "It is all the same."},  # longer words
    ],
)
def test_answers_that_just_look_alike_are_let_be(answers: dict[str, str], comparisons: Any) -> None:
    for rule in ("refuse", "strip"):
        found = comparisons("rewards", PLAIN | answers, repeated_prompt=rule)
        assert same(found, comparisons("rewards", PLAIN | answers, repeated_prompt="keep"))


def test_nothing_but_the_prompt_is_no_answer(comparisons: Any) -> None:
    with pytest.raises(DataErrors, match="'rejected' is nothing but the prompt"):
        comparisons("pairs", REPEATED | {"rejected": "Will it rain? "}, repeated_prompt="strip")


def test_completions_to_learn_have_their_prompt_once(conversations: Any) -> None:
    def learnt(*rows: dict[str, Any], **config: Any) -> tuple[list[int], list[bool]]:
        found = conversations(*rows, **config)
        return found.token_ids.tolist(), found.learnt.tolist()

    plain = learnt({"prompt": FIRST, "completion": [YES]})
    assert learnt({"prompt": FIRST, "completion": [*FIRST, YES]}) == plain
    asked = learnt({"prompt": [ASKED], "completion": [YES]})
    assert learnt({"prompt": "Will it rain?", "completion": [ASKED, YES]}) == asked
    text = {"prompt": "Will it rain?", "completion": "Will it rain? Yes."}
    with pytest.raises(DataErrors, match="'completion' begins with the whole 'prompt'"):
        conversations(text)
    alone = learnt({"prompt": "Will it rain?", "completion": " Yes."})
    assert learnt(text, repeated_prompt="strip") == alone
    assert learnt(text, repeated_prompt="keep") != alone


def test_the_shape_of_ultrafeedback_has_its_scores_as_margins_where_asked(comparisons: Any) -> None:
    rows = [
        {
            "prompt": ASKED["content"],
            "prompt_id": f"a{number}",
            "chosen": [ASKED, YES],
            "rejected": [ASKED, NO],
            "score_chosen": 8.0,
            "score_rejected": rejected,
        }
        for number, rejected in enumerate((3.0, 4.5))
    ]
    named = {"uid": "prompt_id", "chosen_rating": "score_chosen", "rejected_rating": "score_rejected"}
    for kind in ("pairs", "rewards"):
        assert comparisons(kind, *rows).margins.tolist() == [0, 0]
        found = comparisons(kind, *rows, columns=named)
        assert found.margins.tolist() == [5, 3.5]
        assert found.uids == ("a0", "a1")
