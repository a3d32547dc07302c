import copy
import json
import logging
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from rlhf_ray.config.data import PromptData
from rlhf_ray.data.errors import MOST_LISTED, DataError, DataErrors
from rlhf_ray.data.prompts import PromptSet, load_prompts


def load(
    path: Path, lines: list[Any], tokenizer: PreTrainedTokenizerFast, budget: int = 100, **config: Any
) -> PromptSet:
    text = [line if isinstance(line, str | bytes) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_bytes(b"".join(line.encode() + b"\n" if isinstance(line, str) else line + b"\n" for line in text))
    settings = PromptData(**{"prompts": str(path), "prompts_per_step": 1, **config})
    return load_prompts(settings, tokenizer, budget)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "imdb.jsonl"


def test_text_prompts_become_the_tokenizers_tokens(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["A warm film", "naïve\u2028 text\twith odd characters 🙂", " leading space"]
    prompts = load(file, [{"prompt": text} for text in texts], tokenizer)
    assert len(prompts) == 3
    assert prompts.uids == ("imdb:1", "imdb:2", "imdb:3")
    for i, text in enumerate(texts):
        assert prompts.tokens(i).tolist() == tokenizer(text)["input_ids"]
    assert prompts.token_ids.dtype == np.int32
    assert prompts.offsets.dtype == np.int64
    assert (prompts.dropped, prompts.truncated) == (0, 0)


def test_text_gets_the_special_tokens_that_the_tokenizer_adds(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with_bos = copy.deepcopy(tokenizer)
    with_bos.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>"))]
    )
    prompts = load(file, [{"prompt": "A film"}, {"prompt": [{"role": "user", "content": "A film"}]}], with_bos)
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert prompts.tokens(0).tolist() == [start, *tokenizer("A film")["input_ids"]]
    # The template writes its own: one for the user, one for the assistant, none added.
    assert prompts.tokens(1).tolist().count(start) == 2


def test_chat_prompts_are_rendered_up_to_the_assistants_turn(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "A film?"}]
    prompts = load(file, [{"prompt": "text"}, {"prompt": chat}], tokenizer)
    expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert prompts.tokens(1).tolist() == expected
    assert tokenizer.decode(prompts.tokens(1)).endswith("<|im_start|>assistant\n")
    assert prompts.tokens(0).tolist() == tokenizer("text")["input_ids"]


def test_the_prompt_column_and_uids_come_from_the_row(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"question": "One", "uid": "x"}, {"question": "Two", "uid": 7, "answer": 4}, {"question": "Three"}]
    assert load(file, rows, tokenizer, columns={"prompt": "question"}).uids == ("x", "7", "imdb:3")


BAD_ROWS: list[tuple[Any, str]] = [
    ("", "is blank"),
    (" \t", "is blank"),
    ("{'prompt': 1}", "is not JSON: Expecting property name enclosed in double quotes (column 2)"),
    ('{"prompt": "cut', "is not JSON: Unterminated string"),
    ('["prompt"]', "is a list, but must be a JSON object"),
    ('"prompt"', "is text, but must be a JSON object"),
    ("17", "is a number, but must be a JSON object"),
    ("null", "is null, but must be a JSON object"),
    ('{"prompt": "a", "prompt": "b"}', "key 'prompt' stands twice"),
    ('{"prompt": "a", "score": NaN}', "NaN is no JSON value"),
    (b'{"prompt": "\xff"}', "is not UTF-8 text (byte 13)"),
    ("[" * 100_000, "has values nested deeper than 100"),
    ({"text": "a"}, "has no 'prompt' (it has 'text'): if its column has another name, say so in data.columns"),
    ({}, "has no 'prompt' (it has nothing)"),
    ({"prompt": ""}, "'prompt' is empty"),
    ({"prompt": " \n"}, "'prompt' is empty"),
    ({"prompt": None}, "'prompt' is null, but must be text or a list of chat messages"),
    ({"prompt": True}, "'prompt' is a truth value"),
    ({"prompt": 3.5}, "'prompt' is a number"),
    ({"prompt": {"role": "user"}}, "'prompt' is an object"),
    ('{"prompt": "\\ud83d"}', "half of a surrogate pair"),
    ({"prompt": []}, "'prompt' is an empty list"),
    ({"prompt": ["hi"]}, "message 0 of 'prompt' is text, but must be an object with 'role' and 'content'"),
    ({"prompt": [{"content": "hi"}]}, "message 0 of 'prompt' has no 'role'"),
    ({"prompt": [{"role": "user"}]}, "message 0 of 'prompt' has no 'content'"),
    ({"prompt": [{"role": "user", "content": ["hi"]}]}, "message 0 of 'prompt': 'content' is a list, but must be text"),
    ({"prompt": [{"role": 3, "content": "hi"}]}, "message 0 of 'prompt': 'role' is a number, but must be text"),
    ({"prompt": [{"role": " ", "content": "hi"}]}, "message 0 of 'prompt': 'role' is empty"),
    ('{"prompt": [{"role": "user", "content": "\\ud83d"}]}', "half of a surrogate pair"),
    ({"prompt": [{"role": "user", "content": "a"}] * 1001}, "'prompt' has 1,001 messages, but may have 1,000 at most"),
    ({"prompt": [{"role": "user", "content": " "}]}, "'prompt' has no message with content"),
    (
        {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "'prompt' ends with an assistant message",
    ),
    ({"prompt": "a", "uid": ""}, "'uid' is empty"),
    ({"prompt": "a", "uid": None}, "'uid' is null"),
    ({"prompt": "a", "uid": True}, "'uid' is a truth value"),
    ({"prompt": "a", "uid": "first"}, "uid 'first' stands in line 1 already"),
]


def test_every_bad_row_is_named_at_once(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "good", "uid": "first"}, *[row for row, _ in BAD_ROWS], {"prompt": "good too"}]
    with pytest.raises(DataErrors) as caught:
        load(file, rows, tokenizer)
    errors = caught.value.errors
    assert [error.row for error in errors] == [i + 2 for i in range(len(BAD_ROWS))]
    for error, (_, reason) in zip(errors, BAD_ROWS, strict=True):
        assert reason in error.reason
        assert error.file == str(file)
    told = [error for error in errors if f"{file}:{error.row}: {error.reason}" in str(caught.value)]
    assert len(told) == min(MOST_LISTED, len(errors))
    assert f"{len(BAD_ROWS)} rows can't be used" in str(caught.value)


def test_a_uid_made_from_a_line_may_not_be_taken_by_another_row(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataErrors, match=r"imdb.jsonl:2: uid 'imdb:2' stands in line 1 already"):
        load(file, [{"prompt": "a", "uid": "imdb:2"}, {"prompt": "b"}], tokenizer)


def test_data_errors_survive_pickling() -> None:
    error = DataErrors("f.jsonl", [DataError("f.jsonl", 3, "is blank")])
    copied = pickle.loads(pickle.dumps(error))
    assert str(copied) == str(error)
    assert copied.errors[0].row == 3


def test_a_template_that_refuses_a_row_names_the_row(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}hi"
    chats = [[{"role": role, "content": "a"}] for role in ("user", "system")]
    with pytest.raises(DataErrors, match=r"imdb.jsonl:2: 'prompt' is refused by the chat template .*: user first"):
        load(file, [{"prompt": chat} for chat in chats], strict)


def test_a_tokenizer_without_a_template_is_named_once(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    chat = [{"role": "user", "content": "a"}]
    with pytest.raises(DataErrors) as caught:
        load(file, [{"prompt": "text"}, {"prompt": chat}, {"prompt": chat}, ""], plain)
    assert [error.row for error in caught.value.errors] == [2, 4]
    assert f"tokenizer {plain.name_or_path!r} has no chat template" in caught.value.errors[0].reason
    assert len(load(file, [{"prompt": "text"}], plain)) == 1


def test_a_prompt_without_tokens_is_a_bad_row(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    silent = copy.deepcopy(tokenizer)
    silent.chat_template = "{{ '' }}"
    with pytest.raises(DataErrors, match=r"imdb.jsonl:2: 'prompt' gives no tokens with tokenizer"):
        load(file, [{"prompt": "a"}, {"prompt": [{"role": "user", "content": "a"}]}], silent)


LONG = "A warm and funny film with a wonderful cast."


def test_prompts_over_the_budget_are_dropped_counted_and_reported(
    file: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    exact = len(tokenizer("A film")["input_ids"])
    with caplog.at_level(logging.WARNING):
        prompts = load(file, [{"prompt": LONG}, {"prompt": "A film"}, {"prompt": LONG}], tokenizer, budget=exact)
    assert prompts.uids == ("imdb:2",)
    assert (prompts.dropped, prompts.truncated) == (2, 0)
    assert "prompts over the token budget, dropped: 2 (imdb:1, imdb:3)" in caplog.text


def test_truncation_keeps_the_end(
    file: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        prompts = load(file, [{"prompt": LONG}, {"prompt": "A"}], tokenizer, budget=3, overlong="truncate")
    assert prompts.tokens(0).tolist() == tokenizer(LONG)["input_ids"][-3:]
    assert prompts.tokens(1).tolist() == tokenizer("A")["input_ids"]
    assert (prompts.dropped, prompts.truncated) == (0, 1)
    assert "prompts over the token budget, truncated to their end: 1 (imdb:1)" in caplog.text


def test_too_few_prompts_for_a_step_is_an_error(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"1 of 2 prompts fit the budget of 4 tokens, but data.prompts_per_step is 2"):
        load(file, [{"prompt": LONG}, {"prompt": "A"}], tokenizer, budget=4, prompts_per_step=2)


def test_a_missing_or_empty_file_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    for path, reason in [
        (tmp_path / "none.jsonl", r"none.jsonl: can't be read \(No such file or directory\): see data.prompts"),
        (tmp_path, "is a folder, but none that `datasets.save_to_disk` wrote: see data.prompts"),
        (empty, "empty.jsonl: is empty, but must have one JSON object a line"),
    ]:
        with pytest.raises(DataError, match=reason):
            load_prompts(PromptData(prompts=str(path)), tokenizer, 8)


def test_a_last_line_needs_no_line_end_and_windows_line_ends_are_fine(
    file: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    file.write_bytes(b'{"prompt": "a"}\r\n{"prompt": "b"}')
    assert len(load_prompts(PromptData(prompts=str(file), prompts_per_step=2), tokenizer, 8)) == 2


def test_twenty_thousand_prompts_load_in_seconds(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        {"prompt": f"{LONG} {i}"} if i % 2 else {"prompt": [{"role": "user", "content": LONG}]} for i in range(20_000)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    start = time.monotonic()
    assert len(load_prompts(PromptData(prompts=str(file)), tokenizer, 100)) == 20_000
    assert time.monotonic() - start < 15
