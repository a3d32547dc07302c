"""A file with every kind of broken row gives one message for each, with its line, and nothing is loaded."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import ray
from tokenizers import normalizers, processors
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from rlhf_ray.cli.app import main
from rlhf_ray.config.data import ComparisonData, ComparisonKind, ConversationData, PromptData
from rlhf_ray.data.comparisons import load_comparisons
from rlhf_ray.data.conversations import load_conversations
from rlhf_ray.data.errors import MOST_LISTED, DataErrors
from rlhf_ray.data.prompts import load_prompts

# ChatML, but for conversations that begin with one of two words.
TEMPLATE = (
    "{% if messages[0]['content'] == 'forbidden' %}{{ raise_exception('not this') }}{% endif %}"
    "{% if messages[0]['content'] == 'counted' %}{{ messages | length }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def strict(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A tokenizer that adds a beginning, and writes ligatures as letters."""
    made = copy.deepcopy(tokenizer)
    made.add_special_tokens({"bos_token": "<s>"})
    bos = [("<s>", made.bos_token_id)]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=bos)
    made.backend_tokenizer.normalizer = normalizers.NFKC()
    made.chat_template = TEMPLATE
    return made


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def says(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


TEXTS = {"prompt": "Is it good?", "chosen": " Yes.", "rejected": " No."}
CHATS = {"prompt": [user("Is it good?")], "chosen": [says("Yes.")], "rejected": [says("No.")]}
NO_PREFIX = (
    "'chosen': the tokens of its prompt are not the first tokens of the whole from token {} on, so the model would "
    "learn to answer a prompt that it never gets: let the prompt end where a token ends, such as before a space"
)
OTHER_NAME = "if its column has another name, say so in data.columns"
NOT_BOTH = "but all must be text or all lists of chat messages"

# What a line of any file can be.
FORMS: list[tuple[Any, str]] = [
    ("", "is blank, but must be a JSON object"),
    ("{", "is not JSON: Expecting property name enclosed in double quotes (column 2)"),
    ("{} {}", "is not JSON: Extra data (column 4)"),
    ("[]", "is a list, but must be a JSON object"),
    ("3", "is a number, but must be a JSON object"),
    ('"text"', "is text, but must be a JSON object"),
    ("true", "is a truth value, but must be a JSON object"),
    ("null", "is null, but must be a JSON object"),
    ('{"prompt": "a", "prompt": "b"}', "key 'prompt' stands twice"),
    ('{"prompt": [{"role": "user", "role": "user"}]}', "key 'role' stands twice"),
    ('{"prompt": "a", "margin": NaN}', "is not JSON: NaN is no JSON value"),
    ('{"prompt": "a", "margin": -Infinity}', "is not JSON: -Infinity is no JSON value"),
    (b'{"prompt": "\xff"}', "is not UTF-8 text (byte 13)"),
    ({**TEXTS, "uid": ""}, "'uid' is empty"),
    ({**TEXTS, "uid": None}, "'uid' is null, but must be text or a whole number"),
    ({**TEXTS, "uid": True}, "'uid' is a truth value, but must be text or a whole number"),
    ({**TEXTS, "uid": ["a"]}, "'uid' is a list, but must be text or a whole number"),
    ({**TEXTS, "uid": "first"}, "uid 'first' stands in line 1 already"),
    ('{"deep": ' + "[" * 100 + "]" * 100 + "}", "has values nested deeper than 100"),
    ('{"deep": ' + "[" * 100_000 + "]" * 100_000 + "}", "has values nested deeper than 100"),
    ('{"uid": "\\ud83d"}', "'uid' has half of a surrogate pair at character 1"),
]

# What a comparison can be, whatever it is for.
COMPARISONS: list[tuple[Any, str]] = [
    ({"prompt": "a", "chosen": "b"}, f"has no 'rejected' (it has 'prompt', 'chosen'): {OTHER_NAME}"),
    ({**TEXTS, "chosen": None}, "'chosen' is null, but must be text or a list of chat messages"),
    ({**TEXTS, "rejected": 3.5}, "'rejected' is a number, but must be text or a list of chat messages"),
    ({**TEXTS, "prompt": {"a": 1}}, "'prompt' is an object, but must be text or a list of chat messages"),
    (
        {**CHATS, "prompt": "a"},
        "'prompt' is text, but the messages of 'chosen' do not begin with it: let their first message be the user's "
        "with that text, or make 'prompt' a list of chat messages",
    ),
    ({**TEXTS, "prompt": [user("a")]}, f"'prompt' is a list and 'chosen' is text and 'rejected' is text, {NOT_BOTH}"),
    (
        {**TEXTS, "chosen": "Is it good? Yes.", "rejected": "Is it good? No."},
        "'chosen' and 'rejected' begin with the whole 'prompt', so it would be there twice: set "
        "data.repeated_prompt to strip, or to keep if that is meant",
    ),
    (
        {**CHATS, "chosen": [user("Is it good?"), says("Yes.")]},
        "'chosen' begins with the messages of 'prompt', but 'rejected' does not",
    ),
    ({"chosen": [says("a")], "rejected": "b"}, f"'chosen' is a list and 'rejected' is text, {NOT_BOTH}"),
    ({**TEXTS, "chosen": ""}, "'chosen' is empty"),
    ({**TEXTS, "rejected": " \n"}, "'rejected' is empty"),
    ({**TEXTS, "prompt": ""}, "'prompt' is empty"),
    ('{"prompt": "a", "chosen": "b\\ud83d", "rejected": "c"}', "'chosen' has half of a surrogate pair at character 2"),
    (
        {**TEXTS, "rejected": " Yes."},
        "'chosen' and 'rejected' are the same text, so there is nothing to prefer",
    ),
    (
        {**CHATS, "rejected": CHATS["chosen"]},
        "'chosen' and 'rejected' are the same text, so there is nothing to prefer",
    ),
    (
        {**TEXTS, "chosen": " A \ufb01lm.", "rejected": " A film."},
        "'chosen' and 'rejected' give the same tokens with tokenizer {name!r}, so there is nothing to prefer",
    ),
    ({**CHATS, "prompt": []}, "'prompt' is an empty list, but needs at least one chat message"),
    (
        {**CHATS, "prompt": ["a"]},
        "message 0 of 'prompt' is text, but must be an object with 'role' and 'content'",
    ),
    ({**CHATS, "prompt": [{"content": "a"}]}, "message 0 of 'prompt' has no 'role'"),
    ({**CHATS, "chosen": [{"role": "assistant"}]}, "message 0 of 'chosen' has no 'content'"),
    ({**CHATS, "chosen": [says(["a"])]}, "message 0 of 'chosen': 'content' is a list, but must be text"),
    (
        {**CHATS, "rejected": [{"role": 3, "content": "a"}]},
        "message 0 of 'rejected': 'role' is a number, but must be text",
    ),
    ({**CHATS, "prompt": [{"role": " ", "content": "a"}]}, "message 0 of 'prompt': 'role' is empty"),
    (
        '{"prompt": [{"role": "user", "content": "\\udc00"}], "chosen": [], "rejected": []}',
        "message 0 of 'prompt': 'content' has half of a surrogate pair at character 1",
    ),
    ({**CHATS, "prompt": [user(" ")]}, "'prompt' has no message with content"),
    ({**CHATS, "rejected": [user("a")]}, "'rejected' ends with a message of 'user', but an answer is the assistant's"),
    (
        {"chosen": [user("a"), says(" ")], "rejected": [user("a"), says("b")]},
        "message 1 of 'chosen': the assistant's 'content' is empty",
    ),
    (
        {**CHATS, "prompt": [user("forbidden")]},
        "'chosen' is refused by the chat template of {name!r}: not this",
    ),
    (
        {**TEXTS, "prompt": "<s>Is it?"},
        "'chosen': begins with two '<s>': leave it out, since the tokenizer adds one",
    ),
    (
        {**TEXTS, "rejected": " No.<|im_end|><|im_end|>"},
        "'rejected': ends with two '<|im_end|>': leave it out, since the tokenizer adds one",
    ),
    (
        {**CHATS, "rejected": [says("No.<|im_end|>")]},
        "'rejected': has two '<|im_end|>' in a row: leave it out of 'content', since the chat template writes one",
    ),
    ({**TEXTS, "margin": -1}, "'margin' is -1, but must be at least 0"),
    ({**TEXTS, "margin": "much"}, "'margin' is text, but must be a number"),
    ({**TEXTS, "margin": True}, "'margin' is a truth value, but must be a number"),
    (
        '{"prompt": "a", "chosen": " b", "rejected": " c", "margin": 1e999}',
        "'margin' is inf, but must be a finite number",
    ),
    ({**TEXTS, "weight": 10**400}, "'weight' is inf, but must be a finite number"),
    ({**TEXTS, "margin": 1e39}, "'margin' is 1e+39, but may be 1e+30 at most"),
    (
        '{"prompt": "a", "chosen": " b", "rejected": " c", "margin": ' + "9" * 5000 + "}",
        "is not JSON that can be read: Exceeds the limit (4300 digits) for integer string conversion: value has 5000 "
        "digits; use sys.set_int_max_str_digits() to increase the limit",
    ),
    ({**TEXTS, "weight": 0}, "'weight' is 0, but must be more than 0"),
    ({**TEXTS, "weight": None}, "'weight' is null, but must be a number"),
]

PAIRS: list[tuple[Any, str]] = [
    ({}, f"has no 'chosen' (it has nothing): {OTHER_NAME}"),
    (
        {"chosen": "Yes.", "rejected": "No."},
        "has no 'prompt', and 'chosen' and 'rejected' begin with different words: give a prompt",
    ),
    (
        {"chosen": "Is it? ", "rejected": "Is it? No."},
        "'chosen' is nothing but what both begin with, so its answer is empty",
    ),
    (
        {**CHATS, "prompt": [user("a"), says("b")]},
        "'prompt' ends with an assistant message, but a prompt ends before the assistant's turn",
    ),
    (
        {**CHATS, "chosen": [says("a"), user("b"), says("c")]},
        "'chosen' has 3 messages, but an answer is one of the assistant: what comes before it belongs into 'prompt'",
    ),
    (
        {"chosen": [user("a"), says("b")], "rejected": [user("c"), says("d")]},
        "'chosen' and 'rejected' differ before their last messages, so they answer no common prompt",
    ),
    (
        {"chosen": [says("a")], "rejected": [says("b")]},
        "'chosen' is one message and there is no 'prompt', so it answers nothing",
    ),
    (
        {"chosen": [user("a"), says("b"), says("c")], "rejected": [user("a"), says("b"), says("d")]},
        "'chosen without its last message' ends with an assistant message, but a prompt ends before the assistant's "
        "turn",
    ),
    (
        {**CHATS, "prompt": [user("counted")]},
        "message 0 of 'chosen': the chat template writes the messages before it differently once it is there, so a "
        "prompt would not be how the conversation begins",
    ),
    ({"prompt": "It is a fi", "chosen": "lm.", "rejected": " No."}, NO_PREFIX.format(5)),
]

RANKED = {"completions": ["a", "b", "c"]}
REWARDS: list[tuple[Any, str]] = [
    ({**TEXTS, "tie": "yes"}, "'tie' is text, but must be true or false"),
    ({**TEXTS, "tie": True, "margin": 2}, "'margin' is 2, but nothing in the row is better than the rest"),
    (
        {**TEXTS, "chosen_rating": 1, "rejected_rating": 2.5},
        "'chosen_rating' is 1, less than 'rejected_rating', which is 2.5",
    ),
    ({**TEXTS, "chosen_rating": "5", "rejected_rating": 1}, "'chosen_rating' is text, but must be a number"),
    ({**RANKED, "best": 0, "chosen": "a"}, "has 'completions' and 'chosen', but must have a ranking or a pair"),
    ({"completions": "a", "best": 0}, "'completions' is text, but must be a list"),
    ({"completions": ["a"], "best": 0}, "'completions' has 1 entries, but must have at least 2 to compare"),
    (
        {"completions": ["a", None], "best": 0},
        "'completions.1' is null, but must be text or a list of chat messages",
    ),
    (
        {"completions": ["a", "b", "a"], "best": 0},
        "'completions.0' and 'completions.2' are the same text, so there is nothing to prefer",
    ),
    (RANKED, "has neither of 'ranks' and 'best', but must have one"),
    ({**RANKED, "best": 0, "ranks": [0, 1, 2]}, "has both of 'ranks' and 'best', but must have one"),
    ({**RANKED, "best": 3}, "'best' is 3, but there are completions 0 to 2"),
    ({**RANKED, "best": 10**4000}, "'best' is a number of 4001 digits, but there are completions 0 to 2"),
    ({**RANKED, "ranks": [0, 1, 2**63]}, f"entry 2 of 'ranks' is {2**63}, but may be {2**31 - 1} at most"),
    ({**RANKED, "best": True}, "'best' is a truth value, but must be the place of the best completion, from 0"),
    ({**RANKED, "ranks": 0}, "'ranks' is a number, but must be a list of whole numbers"),
    ({**RANKED, "ranks": [0, 1]}, "'ranks' has 2 entries, but 'completions' has 3"),
    ({**RANKED, "ranks": [0, 1, 1.5]}, "entry 2 of 'ranks' is 1.5, but must be a whole number, 0 for the best"),
    ({**RANKED, "ranks": [0, -1, 1]}, "entry 1 of 'ranks' is -1, but must be a whole number, 0 for the best"),
    (
        {**RANKED, "ranks": [False, 1, 2]},
        "entry 0 of 'ranks' is a truth value, but must be a whole number, 0 for the best",
    ),
    ({**RANKED, "ranks": [1, 2, 3]}, "'ranks' begin at 1, but the best completion has rank 0"),
    ({**RANKED, "ranks": [0, 0, 0], "margin": 1}, "'margin' is 1, but nothing in the row is better than the rest"),
]

LABELLED = {"prompt": "Is it good?", "completion": " Yes.", "label": True}
LABELS: list[tuple[Any, str]] = [
    ({"prompt": "a", "label": True}, f"has no 'completion' (it has 'prompt', 'label'): {OTHER_NAME}"),
    ({"prompt": "a", "completion": "b"}, f"has no 'label' (it has 'prompt', 'completion'): {OTHER_NAME}"),
    ({"completion": "b", "label": True}, f"has no 'prompt' (it has 'completion', 'label'): {OTHER_NAME}"),
    ({**LABELLED, "label": 1}, "'label' is a number, but must be true or false"),
    ({**LABELLED, "label": "true"}, "'label' is text, but must be true or false"),
    ({**LABELLED, "completion": ""}, "'completion' is empty"),
    (
        {**LABELLED, "completion": "Is it good? Yes."},
        "'completion' begins with the whole 'prompt', so it would be there twice: set "
        "data.repeated_prompt to strip, or to keep if that is meant",
    ),
    ({**LABELLED, "prompt": "It is a fi", "completion": "lm."}, NO_PREFIX.format(5).replace("chosen", "completion")),
]


def write(path: Path, rows: list[Any]) -> None:
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    path.write_bytes(b"".join(line + b"\n" for line in lines))


@pytest.mark.parametrize(
    ("kind", "rows", "good"),
    [
        ("pairs", FORMS + COMPARISONS + PAIRS, TEXTS),
        ("rewards", FORMS + COMPARISONS + REWARDS, TEXTS),
        ("labels", FORMS + COMPARISONS + LABELS, LABELLED),
    ],
)
def test_each_broken_comparison_gives_its_message(
    kind: ComparisonKind, rows: list[tuple[Any, str]], good: Any, tmp_path: Path, strict: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "rows.jsonl"
    write(path, [{**good, "uid": "first"}, *[row for row, _ in rows], good])
    with pytest.raises(DataErrors) as caught:
        load_comparisons(ComparisonData(train=str(path)), path, strict, kind)
    name = strict.name_or_path
    expected = [f"{path}:{line}: {reason.replace('{name!r}', repr(name))}" for line, (_, reason) in enumerate(rows, 2)]
    assert [str(error) for error in caught.value.errors] == expected
    listed = str(caught.value).splitlines()[1:]
    assert len(set(listed) & {f"  {message}" for message in expected}) == MOST_LISTED
    assert listed[:MOST_LISTED] == [f"  {message}" for message in expected if f"  {message}" in listed]


@pytest.mark.parametrize("command", ["validate", "train"])
def test_fifty_kinds_of_broken_rows_give_twenty_messages_and_nothing_else_happens(
    command: str, tmp_path: Path, strict: PreTrainedTokenizerFast, tiny_model_dir: Path
) -> None:
    model, path, run = tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "run"
    shutil.copytree(tiny_model_dir, model)
    rows = [
        (row, reason) for row, reason in FORMS + COMPARISONS + REWARDS if "<s>" not in reason and "{name" not in reason
    ]
    assert len({reason for _, reason in rows}) > 50
    write(path, [{**TEXTS, "uid": "first"}, *[row for row, _ in rows]])
    job = tmp_path / "job.yaml"
    job.write_text(
        f"{{job: reward_model, name: x, reward: {{model: {model}}}, data: {{train: {path}}}, run: {{dir: {run}}}}}"
    )
    done = CliRunner().invoke(main, [command, str(job)])
    assert done.exit_code == 2
    expected = [f"  {path}:{line}: {reason}" for line, (_, reason) in enumerate(rows, start=2)]
    told = f"error: {job}: data.train: {path}: {len(rows)} rows can't be used; correct or remove them:"
    lines = done.stderr.splitlines()
    listed = lines[lines.index(told) + 1 :]
    assert listed[:MOST_LISTED] == [line for line in expected if line in listed]
    assert sum(int(line.split()[2]) for line in listed[MOST_LISTED:]) == len(rows) - MOST_LISTED
    assert not run.exists()
    assert not ray.is_initialized()


def test_what_a_line_can_be_is_the_same_for_every_loader(tmp_path: Path, strict: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "rows.jsonl"
    write(path, [{"text": "a", "prompt": "a", "uid": "first"}, *[row for row, _ in FORMS]])
    expected = [reason for _, reason in FORMS]
    with pytest.raises(DataErrors) as caught:
        load_prompts(PromptData(prompts=str(path)), strict, 100)
    assert [error.reason for error in caught.value.errors] == expected
    write(path, [{"text": "a", "uid": "first"}, *[row for row, _ in FORMS]])
    with pytest.raises(DataErrors) as caught:
        load_conversations(ConversationData(train=str(path)), path, strict)
    assert [error.reason for error in caught.value.errors] == expected


def test_problems_of_rows_and_of_their_tokens_are_told_together(
    tmp_path: Path, strict: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "rows.jsonl"
    write(path, [{"prompt": "It is a fi", "completion": "lm."}, "", {"text": "<s>A"}, {"messages": []}])
    with pytest.raises(DataErrors) as caught:
        load_conversations(ConversationData(train=str(path)), path, strict)
    assert [error.row for error in caught.value.errors] == [1, 2, 3, 4]


def test_a_missing_template_is_said_once(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    path = tmp_path / "rows.jsonl"
    write(path, [TEXTS, CHATS, CHATS, "", CHATS])
    for kind in ("pairs", "rewards", "labels"):
        with pytest.raises(DataErrors) as caught:
            load_comparisons(ComparisonData(train=str(path)), path, plain, kind)  # type: ignore[arg-type]
        assert [error.row for error in caught.value.errors] == [2, 4]
        assert "has no chat template" in caught.value.errors[0].reason


def test_a_message_quotes_no_more_than_a_thousand_characters(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "' + "k" * 100_000 + '": 1, "' + "k" * 100_000 + '": 2}')
    with pytest.raises(DataErrors) as caught:
        load_conversations(ConversationData(train=str(path)), path, tokenizer)
    [error] = caught.value.errors
    assert error.reason.startswith("key 'kkk")
    assert error.reason.endswith("k… (100,019 characters)")
    assert len(error.reason) < 1100
