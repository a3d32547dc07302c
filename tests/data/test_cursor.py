import json
import pickle
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.data.cursor import CursorError, PromptCursor, PromptTicket, visit_uid


@settings(deadline=None)
@given(
    size=st.integers(1, 30),
    seed=st.integers(0, 2**64),
    shuffle=st.booleans(),
    takes=st.lists(st.integers(0, 40), max_size=8),
)
def test_every_row_comes_exactly_once_in_each_epoch(size: int, seed: int, shuffle: bool, takes: list[int]) -> None:
    cursor = PromptCursor(size, seed, shuffle)
    tickets = [ticket for n in takes for ticket in cursor.take(n)]
    tickets += cursor.take(-len(tickets) % size)
    epochs = len(tickets) // size
    assert [ticket.epoch for ticket in tickets] == [epoch for epoch in range(epochs) for _ in range(size)]
    assert Counter((t.epoch, t.index) for t in tickets) == Counter((e, i) for e in range(epochs) for i in range(size))


@settings(deadline=None)
@given(size=st.integers(1, 30), seed=st.integers(0, 99), before=st.integers(0, 100), after=st.integers(0, 100))
def test_a_resumed_cursor_goes_on_exactly(size: int, seed: int, before: int, after: int) -> None:
    whole = PromptCursor(size, seed, shuffle=True)
    whole.take(before)
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = PromptCursor(size, seed, shuffle=True)
    resumed.take(5)
    resumed.load_state_dict(state)
    assert resumed.take(after) == whole.take(after)


@settings(deadline=None)
@given(st.lists(st.integers(0, 12), max_size=10))
def test_the_order_does_not_depend_on_the_batch_size(takes: list[int]) -> None:
    pieces = PromptCursor(7, 3, shuffle=True)
    assert [t for n in takes for t in pieces.take(n)] == PromptCursor(7, 3, shuffle=True).take(sum(takes))


def test_epochs_and_seeds_have_their_own_order() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [t.index for t in PromptCursor(50, seed, shuffle=True).take(50 * (epoch + 1))[50 * epoch :]]

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    assert sorted(orders[0]) == list(range(50))


def test_without_shuffling_rows_come_in_the_order_of_the_file() -> None:
    assert PromptCursor(3, 9, shuffle=False).take(4) == [
        PromptTicket(0, 0),
        PromptTicket(1, 0),
        PromptTicket(2, 0),
        PromptTicket(0, 1),
    ]


@pytest.mark.parametrize(
    ("field", "value"), [("size", 4), ("seed", 1), ("shuffle", False), ("position", 5), ("position", -1), ("epoch", -1)]
)
def test_a_cursor_of_other_data_is_refused(field: str, value: int) -> None:
    cursor = PromptCursor(5, 0, shuffle=True)
    state = cursor.state_dict()
    state[field] = value  # type: ignore[literal-required]
    with pytest.raises(CursorError, match=f"data cursor has {field} {value}") as caught:
        cursor.load_state_dict(state)
    assert caught.value.field == field
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_cursor_needs_prompts() -> None:
    with pytest.raises(ValueError, match="size is 0"):
        PromptCursor(0, 0, shuffle=True)


def test_a_visit_in_a_later_epoch_has_another_uid() -> None:
    assert visit_uid("imdb:3", 2) == "imdb:3@2"
