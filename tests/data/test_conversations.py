import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from rlhf_ray.config.data import ConversationData
from rlhf_ray.data.conversations import ConversationSet, load_conversations, mix
from rlhf_ray.data.errors import DataError, DataErrors

# As models of three families have them; each ends a turn in its own way.
TEMPLATES = {
    "ChatML": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "Llama-3": (
        "{% for m in messages %}{% if loop.first %}<|begin_of_text|>{% endif %}<|start_header_id|>{{ m['role'] }}"
        "<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "Gemma": (
        "{{ '<bos>' }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "<start_of_turn>{{ role }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
}
LEARNT = {
    "ChatML": ["Good day.<|im_end|>\n", "A film.<|im_end|>\n"],
    "Llama-3": ["Good day.<|eot_id|>", "A film.<|eot_id|>"],
    "Gemma": ["Good day.<end_of_turn>\n", "A film.<end_of_turn>\n"],
}
TALK = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Good day."},
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "A film."},
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "chats.jsonl"


def load(path: Path, rows: list[Any], tokenizer: PreTrainedTokenizerFast, **config: Any) -> ConversationSet:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return load_conversations(ConversationData(**{"train": str(path), **config}), path, tokenizer)


def learnt_texts(found: ConversationSet, row: int, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Each stretch of learnt tokens, as text."""
    places, tokens = found.learnt_places(row), found.tokens(row)
    stretches = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
    return [tokenizer.decode(tokens[stretch]) for stretch in stretches]


@pytest.mark.parametrize("family", TEMPLATES)
def test_the_assistants_turns_are_learnt(family: str, file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATES[family]
    found = load(file, [{"messages": TALK}], tokenizer)
    assert tokenizer.decode(found.tokens(0)) == tokenizer.apply_chat_template(TALK, tokenize=False)
    assert learnt_texts(found, 0, tokenizer) == LEARNT[family]


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_learnt_turn_follows_the_tokens_of_its_prompt(
    family: str, file: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATES[family]
    found = load(file, [{"messages": TALK[:2]}], tokenizer)
    prompt = tokenizer.apply_chat_template(TALK[:1], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert found.tokens(0)[: found.learnt_places(0)[0]].tolist() == ids


def test_only_the_completion_of_a_conversation_is_learnt(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    found = load(file, [{"prompt": TALK[:3], "completion": TALK[3:]}], tokenizer)
    assert learnt_texts(found, 0, tokenizer) == ["A film.<|im_end|>\n"]


def test_a_completion_is_learnt_up_to_its_end(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    found = load(file, [{"prompt": "It is", "completion": " a film."}], tokenizer)
    eos = tokenizer.eos_token_id
    assert found.tokens(0).tolist() == [*tokenizer("It is a film.")["input_ids"], eos]
    assert learnt_texts(found, 0, tokenizer) == [f" a film.{tokenizer.eos_token}"]


def test_all_of_a_text_is_learnt_but_its_first_token(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    found = load(file, [{"text": "It is a film.", "uid": "x"}], tokenizer)
    assert found.uids == ("x",)
    assert found.learnt.tolist() == [False, *[True] * (len(found.tokens(0)) - 1)]
    assert found.tokens(0)[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("row", [{"messages": TALK}, {"prompt": "It is", "completion": " a film."}])
def test_everything_is_learnt_when_asked(row: dict[str, Any], file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    found = load(file, [row], tokenizer, loss="all")
    assert found.learnt.tolist() == [False, *[True] * (len(found.tokens(0)) - 1)]


def test_weights_count_the_learnt_tokens_of_each_row(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"messages": TALK}, {"text": "It is a film."}, {"prompt": "It is", "completion": " a film."}]
    found = load(file, rows, tokenizer)
    assert found.weights.tolist() == [len(found.learnt_places(row)) for row in range(3)]
    assert found.lengths.tolist() == [len(found.tokens(row)) for row in range(3)]
    assert found.first(2).weights.tolist() == found.weights[:2].tolist()
    assert found.first(2).uids == found.uids[:2]
    assert found.first(None) is found


def test_weights_say_how_often_an_epoch_has_each_row(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    one = load(file, [{"text": f"Film {i}.", "uid": f"a{i}"} for i in range(4)], tokenizer)
    two = load(file, [{"messages": TALK, "uid": "b0"}, {"messages": TALK[:2], "uid": "b1"}], tokenizer)
    found = mix([(one, 0.5), (two, 2.5)])
    assert found.uids == ("a0", "a1", "b0", "b1", "b0", "b1", "b0")
    for row, (data, place) in enumerate([(one, 0), (one, 1), (two, 0), (two, 1), (two, 0), (two, 1), (two, 0)]):
        assert found.tokens(row).tolist() == data.tokens(place).tolist()
        assert found.learnt_places(row).tolist() == data.learnt_places(place).tolist()
    assert mix([(one, 0.01)]).uids == ("a0",)
    assert mix([(one, 1.0)]).token_ids.tolist() == one.token_ids.tolist()


BAD_ROWS: list[tuple[Any, str]] = [
    ("", "is blank"),
    ({"words": "a"}, "has 'words', but must have one of 'text', 'messages', or 'prompt' with 'completion'"),
    ({"text": "a", "messages": TALK}, "has 'text' and 'messages', but must have one of"),
    ({"text": ""}, "'text' is empty"),
    ({"text": 3}, "'text' is a number, but must be text"),
    ({"prompt": "a"}, "has 'prompt', but no 'completion'"),
    ({"prompt": "a", "completion": ""}, "'completion' is empty"),
    ({"prompt": "a", "completion": TALK[1:2]}, "'prompt' is text and 'completion' is a list, but both must be"),
    ({"messages": "a"}, "'messages' is text, but must be a list of chat messages"),
    ({"messages": []}, "'messages' is an empty list"),
    ({"messages": ["a"]}, "message 0 of 'messages' is text, but must be an object"),
    ({"messages": TALK[:1]}, "'messages' has no assistant message, so there is nothing to learn"),
    ({"messages": TALK[1:]}, "'messages' begins with an assistant message, which answers nothing"),
    (
        {"messages": [TALK[0], {"role": "assistant", "content": " "}]},
        "message 1 of 'messages': the assistant's 'content' is empty",
    ),
    ({"prompt": TALK[:2], "completion": TALK[2:3]}, "'completion' has no assistant message"),
    ({"text": "a", "uid": "1"}, "uid '1' stands in line 1 already"),
    ({"prompt": "It is a fi", "completion": "lm."}, "the tokens of its prompt are not the first tokens of the whole"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_a_bad_row_is_named(row: Any, message: str, file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataErrors) as raised:
        load(file, [{"text": "It is a film.", "uid": 1}, row], tokenizer)
    assert f"{file}:2: {message}" in str(raised.value)


def test_all_bad_rows_are_named_at_once(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"text": ""}, {"text": "A film."}, {"messages": []}]
    with pytest.raises(DataErrors) as raised:
        load(file, rows, tokenizer)
    assert [error.row for error in raised.value.errors] == [1, 3]


def test_a_template_that_rewrites_earlier_turns_is_refused(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ messages | length }}" + TEMPLATES["ChatML"]
    with pytest.raises(DataErrors, match="writes the messages before it differently"):
        load(file, [{"messages": TALK}], tokenizer)


def test_a_second_bos_is_refused(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    assert load(file, [{"prompt": "It is", "completion": " a film."}], tokenizer).tokens(0)[0] == bos[1]
    with pytest.raises(DataErrors, match="begins with two '<s>'"):
        load(file, [{"text": "<s>It is a film."}], tokenizer)


def test_an_end_that_is_there_is_not_added(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    found = load(file, [{"text": f"It is.{tokenizer.eos_token}"}], tokenizer)
    assert found.tokens(0).tolist() == tokenizer(f"It is.{tokenizer.eos_token}")["input_ids"]
    with pytest.raises(DataErrors, match="ends with two"):
        load(file, [{"text": f"It is.{tokenizer.eos_token}{tokenizer.eos_token}"}], tokenizer)


def test_rows_over_the_budget_are_dropped_and_counted(
    file: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    found = load(file, [{"text": "A film. " * 20}, {"text": "A film."}], tokenizer, max_tokens=10)
    assert (found.uids, found.dropped, found.truncated) == (("chats:2",), 1, 0)
    assert "rows over the token budget, dropped: 1 (chats:1)" in caplog.text


def test_truncation_keeps_the_beginning_and_drops_what_has_nothing_left_to_learn(
    file: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    long = "A film. " * 20
    rows = [{"text": long}, {"prompt": long, "completion": " Yes."}]
    found = load(file, rows, tokenizer, max_tokens=10, overlong="truncate")
    assert (found.uids, found.dropped, found.truncated) == (("chats:1",), 1, 1)
    assert found.tokens(0).tolist() == tokenizer(long)["input_ids"][:10]


def test_a_file_of_which_nothing_fits_is_refused(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"none of 1 rows fits data.max_tokens \(2\)"):
        load(file, [{"text": "A film. " * 20}], tokenizer, max_tokens=2)
