"""A stream gives the rows that loading gives, in an order that its state goes on with exactly."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rlhf_ray.config.data import ConversationData
from rlhf_ray.data import sources, streaming
from rlhf_ray.data.conversations import load_conversations
from rlhf_ray.data.cursor import CursorError
from rlhf_ray.data.errors import DataError, DataErrors
from rlhf_ray.data.streaming import ConversationStream, DroppedRow

ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": f"Film {i}?"}, {"role": "assistant", "content": f"Good {i}."}]}
    if i % 3
    else {"prompt": f"Film {i} is", "completion": " good."}
    for i in range(150)
]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def stream_of(train: Any, tokenizer: PreTrainedTokenizerFast, *, seed: int = 0, **config: Any) -> ConversationStream:
    return ConversationStream(ConversationData(train=train, streaming=True, **config), tokenizer, seed)


def uids(stream: ConversationStream, steps: int, per_step: int = 10) -> list[str]:
    return [uid for _ in range(steps) for uid in stream.take(per_step)[0].uids]


@pytest.mark.parametrize("loss", ["assistant", "all"])
def test_a_buffer_of_one_gives_the_rows_of_the_file_in_its_order(
    loss: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = write(tmp_path / "a.jsonl", ROWS)
    loaded = load_conversations(ConversationData(train=source, loss=loss), source, tokenizer)
    stream = stream_of(source, tokenizer, shuffle_buffer=1, loss=loss)
    for start in range(0, 150, 30):
        rows, dropped = stream.take(30)
        part = slice(loaded.offsets[start], loaded.offsets[start + 30])
        assert rows.uids == loaded.uids[start : start + 30]
        assert rows.token_ids.tolist() == loaded.token_ids[part].tolist()
        assert rows.learnt.tolist() == loaded.learnt[part].tolist()
        assert rows.lengths.tolist() == loaded.lengths[start : start + 30].tolist()
        assert not dropped
    assert stream.take(1)[0].uids == loaded.uids[:1]


def test_a_larger_buffer_gives_each_row_in_another_order(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write(tmp_path / "a.jsonl", ROWS)
    found = uids(stream_of(source, tokenizer, shuffle_buffer=20), 30)
    counts = Counter(found)
    # Of two passes at most the rows of a buffer are still to come, or came early from a third.
    assert sum(abs(counts[f"a:{i}"] - 2) for i in range(1, 151)) <= 2 * 20
    assert found[:150] != [f"a:{i}" for i in range(1, 151)]
    assert found == uids(stream_of(source, tokenizer, shuffle_buffer=20), 30)
    assert found != uids(stream_of(source, tokenizer, shuffle_buffer=20, seed=1), 30)


def test_sources_are_mixed_in_proportion_to_their_weights(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    many = write(tmp_path / "many.jsonl", ROWS)
    few = write(tmp_path / "few.jsonl", ROWS[:3])
    train = [{"path": many, "weight": 3}, {"path": few, "weight": 1.0}]
    found = uids(stream_of(train, tokenizer, shuffle_buffer=1), 4)
    assert found[:8] == ["many:1", "many:2", "many:3", "few:1", "many:4", "many:5", "many:6", "few:2"]
    assert Counter(uid.partition(":")[0] for uid in found) == {"many": 30, "few": 10}


BAD: list[Any] = [
    {"text": "A film."},
    "{",
    {"text": "long " * 200},
    {"prompt": "It is a fi", "completion": "lm."},
    {"text": "Another."},
    {"prompt": "long " * 200, "completion": " film."},
]


def test_rows_that_cannot_be_used_are_skipped_and_told_of(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write(tmp_path / "a.jsonl", BAD)
    stream = stream_of(source, tokenizer, shuffle_buffer=1, max_tokens=50)
    taken = [stream.take(1) for _ in range(4)]
    assert [rows.uids for rows, _ in taken] == [("a:1",), ("a:5",), ("a:1",), ("a:5",)]
    told = [[(row.row, row.again) for row in dropped] for _, dropped in taken]
    assert told == [
        [],
        [(2, False), (3, False), (4, False)],
        [(6, False)],
        [(2, True), (3, True), (4, True)],
    ]
    reasons = {row.row: row.reason for _, dropped in taken for row in dropped}
    assert reasons[2].startswith("is not JSON")
    assert reasons[3] == f"has {len(tokenizer(BAD[2]['text'])['input_ids']) + 1} tokens, but data.max_tokens is 50"
    assert reasons[4].startswith("the tokens of its prompt are not the first tokens")


def test_rows_over_the_budget_can_be_cut(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write(tmp_path / "a.jsonl", BAD)
    config = {"max_tokens": 50, "overlong": "truncate"}
    rows, dropped = stream_of(source, tokenizer, shuffle_buffer=1, **config).take(4)
    assert rows.uids == ("a:1", "a:3", "a:5", "a:1")
    assert (rows.truncated, rows.dropped) == (1, 3)
    assert rows.lengths[1] == 50
    assert dropped[-1] == DroppedRow(
        source, 6, "has nothing to learn in its first 50 tokens, which data.max_tokens leaves of it", again=False
    )
    loaded = load_conversations(
        ConversationData(train=write(tmp_path / "good.jsonl", [BAD[2]]), **config), tmp_path / "good.jsonl", tokenizer
    )
    assert rows.tokens(1).tolist() == loaded.token_ids.tolist()


@pytest.mark.parametrize("buffer", [1, 7, 400])
@pytest.mark.parametrize("steps", [1, 5, 15, 16, 40])
def test_a_stream_goes_on_exactly_from_its_state(
    buffer: int, steps: int, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    mixed = [*ROWS[:70], "{", *ROWS[70:], {"text": ""}]
    train = [
        {"path": write(tmp_path / "a.jsonl", mixed)},
        {"path": write(tmp_path / "b.jsonl", ROWS[:40]), "weight": 0.4},
    ]
    first = stream_of(train, tokenizer, shuffle_buffer=buffer)
    for _ in range(steps):
        first.take(10)
    state = json.loads(json.dumps(first.state_dict()))
    second = stream_of(train, tokenizer, shuffle_buffer=buffer)
    second.load_state_dict(state)
    assert second.state_dict() == state
    for _ in range(25):
        (mine, my_dropped), (theirs, their_dropped) = second.take(10), first.take(10)
        assert mine.uids == theirs.uids
        assert mine.token_ids.tolist() == theirs.token_ids.tolist()
        assert mine.learnt.tolist() == theirs.learnt.tolist()
        assert my_dropped == their_dropped


def test_going_on_tokenises_only_what_waits(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "a.jsonl", ROWS)
    first = stream_of(source, tokenizer, shuffle_buffer=5)
    first.take(100)
    second = stream_of(source, tokenizer, shuffle_buffer=5)
    tokenised = []
    real = streaming.tokenise_answered
    monkeypatch.setattr(
        streaming, "tokenise_answered", lambda texts, *rest: tokenised.append(len(texts)) or real(texts, *rest)
    )
    second.load_state_dict(first.state_dict())
    assert sum(tokenised) == 4


def test_a_state_of_another_stream_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write(tmp_path / "a.jsonl", ROWS)
    stream = stream_of(source, tokenizer, shuffle_buffer=5)
    stream.take(10)
    state = stream.state_dict()
    other = write(tmp_path / "b.jsonl", ROWS)
    for wrong, field in [
        (stream_of(other, tokenizer, shuffle_buffer=5), "sources"),
        (stream_of([{"path": source, "weight": 2}], tokenizer, shuffle_buffer=5), "sources"),
        (stream_of(source, tokenizer, shuffle_buffer=6), "shuffle_buffer"),
        (stream_of(source, tokenizer, shuffle_buffer=5, seed=3), "seed"),
    ]:
        with pytest.raises(CursorError, match=f"the checkpoint's data cursor has {field} "):
            wrong.load_state_dict(state)
    write(tmp_path / "a.jsonl", [{"text": "Changed."}] * 150)
    with pytest.raises(CursorError, match=r"data cursor has row \d+ of .*a.jsonl 'checksum"):
        stream_of(source, tokenizer, shuffle_buffer=5).load_state_dict(state)


def test_a_source_without_a_usable_row_ends_the_run(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": ""}, "{"])
    stream = stream_of(source, tokenizer)
    with pytest.raises(DataError, match="none of its 2 rows can be used: see `rlhf-ray data inspect`"):
        stream.take(1)
    with pytest.raises(DataErrors) as caught:
        stream.readers[0].check()
    assert [error.row for error in caught.value.errors] == [1, 2]
    with pytest.raises(DataError, match="none.jsonl: can't be read"):
        stream_of(str(tmp_path / "none.jsonl"), tokenizer).readers[0].check()


def test_a_source_is_read_no_further_than_the_buffer_needs(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "a.jsonl", ROWS * 20)
    read = []
    real = sources._entries
    monkeypatch.setattr(sources, "_entries", lambda *args: (read.append(entry) or entry for entry in real(*args)))
    stream_of(source, tokenizer, shuffle_buffer=100).take(10)
    assert 109 <= len(read) <= 109 + 2 * 64
