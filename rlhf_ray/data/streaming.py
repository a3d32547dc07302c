"""Conversations that are read while they are learnt, so that a data set need not fit into memory.

Each source is read from its beginning to its end, over and over. Rows are taken from the sources in proportion to their
weights and wait in a buffer, from which the next is drawn at random; with a buffer of one they come in the order of the
sources. The order is a function of sources, config and seed. Rows that can't be used are skipped and told of.

A state says how far each source was read, which rows wait in the buffer, and where the random generator stands. To go
on from it, the rows of the buffer are read again; all others before are passed over without being tokenised.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.config.data import ConversationData
from rlhf_ray.data.answers import ParsedRow, mark_answers, tokenise_answered
from rlhf_ray.data.conversations import ConversationParser, ConversationSet
from rlhf_ray.data.cursor import CursorError
from rlhf_ray.data.errors import DataError, RowProblem, raise_all
from rlhf_ray.data.formats import Row
from rlhf_ray.data.rows import uid_of
from rlhf_ray.data.sources import read_rows, stem_of
from rlhf_ray.data.tokens import Tokenizer
from rlhf_ray.data.trajectory import Tokens

# Tokenised at once, which is faster than one by one.
_CHUNK = 64
# A source whose first rows are all bad is taken to be not what it should be.
_PROBED = 1000


@dataclass(frozen=True, slots=True)
class DroppedRow:
    """A row that was skipped.

    Attributes:
        source: that it is from.
        row: its number there.
        reason: what is wrong with it.
        again: whether it was met in an earlier pass over the source, too.
    """

    source: str
    row: int
    reason: str
    again: bool


@dataclass(frozen=True, slots=True)
class _StreamedRow:
    """A row as tokens. `place` counts the rows before it, in the source numbered `source`."""

    source: int
    place: int
    uid: str
    ids: Tokens
    learnt: NDArray[np.bool_]
    truncated: bool

    @property
    def checksum(self) -> int:
        return crc32(self.ids.tobytes())


class ConversationStream:
    """Rows for one step after the other.

    Args:
        config: sources with their weights, the buffer, and what `load_conversations` reads of it.
        tokenizer: the model's.
        seed: of the order.

    Attributes:
        readers: of the sources.
    """

    def __init__(self, config: ConversationData, tokenizer: Tokenizer, seed: int) -> None:
        self._config = config
        self.readers = [SourceReader(number, config, tokenizer) for number in range(len(config.sources))]
        self._taken = [0] * len(self.readers)
        self._buffer: list[_StreamedRow] = []
        self._random = np.random.Generator(np.random.PCG64(seed))
        self._seed = seed

    def take(self, rows: int) -> tuple[ConversationSet, list[DroppedRow]]:
        """The next rows, and those that were skipped on the way.

        Raises:
            DataError: a source can't be read, or no row of it can be used.
        """
        dropped: list[DroppedRow] = []
        drawn = []
        for _ in range(rows):
            while len(self._buffer) < self._config.shuffle_buffer:
                self._buffer.append(self._read(dropped))
            place = int(self._random.integers(len(self._buffer)))
            drawn.append(self._buffer[place])
            self._buffer[place] = self._buffer[-1]
            self._buffer.pop()
        found = ConversationSet.of(
            ((row.uid, row.ids, row.learnt) for row in drawn),
            dropped=len(dropped),
            truncated=sum(row.truncated for row in drawn),
        )
        return found, dropped

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on exactly here; plain values, fit for JSON."""
        return {
            **self._facts(),
            "read": [reader.read for reader in self.readers],
            "passes": [reader.passes for reader in self.readers],
            "taken": list(self._taken),
            "buffer": [[row.source, row.place, row.checksum] for row in self._buffer],
            "random": self._random.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            CursorError: it was taken over other sources or with another order, or a source has changed.
            DataError: a source can't be read.
        """
        for field, own in self._facts().items():
            if state.get(field) != own:
                raise CursorError(field, state.get(field), own)
        again: dict[tuple[int, int], _StreamedRow] = {}
        for number, reader in enumerate(self.readers):
            reader.go_to(state["read"][number], state["passes"][number])
            places = {place for source, place, _ in state["buffer"] if source == number}
            again |= {(number, row.place): row for row in reader.reread(places)}
        self._taken = list(state["taken"])
        self._random.bit_generator.state = state["random"]
        self._buffer = []
        for source, place, checksum in state["buffer"]:
            row = again.get((source, place))
            if row is None or row.checksum != checksum:
                where = f"row {place + 1} of {self._config.sources[source].path}"
                raise CursorError(where, f"checksum {checksum}", f"checksum {row.checksum}" if row else "unusable")
            self._buffer.append(row)

    def _facts(self) -> dict[str, Any]:
        """What must be the same for a state to have a meaning."""
        return {
            "sources": [[source.path, source.weight] for source in self._config.sources],
            "shuffle_buffer": self._config.shuffle_buffer,
            "seed": self._seed,
        }

    def _read(self, dropped: list[DroppedRow]) -> _StreamedRow:
        """A row of the source that is furthest behind its share."""
        weights = [source.weight for source in self._config.sources]
        number = min(range(len(weights)), key=lambda n: (self._taken[n] + 1) / weights[n])
        self._taken[number] += 1
        return self.readers[number].next(dropped)


class SourceReader:
    """Reads one source, pass after pass.

    Attributes:
        setting: dotted path of the config key that names the source.
        read: rows of this pass that were given out or skipped.
        passes: that are complete.
    """

    def __init__(self, number: int, config: ConversationData, tokenizer: Tokenizer) -> None:
        self._number, self._config, self._tokenizer = number, config, tokenizer
        self._source = config.sources[number].path
        self.setting = "data.train" if isinstance(config.train, str) else f"data.train.{number}.path"
        self._parser = ConversationParser(
            tokenizer, learn_all=config.loss == "all", repeated_prompt=config.repeated_prompt
        )
        self.go_to(0, 0)

    def go_to(self, read: int, passes: int) -> None:
        """Read on from there."""
        self.read, self.passes = read, passes
        self._given = read > 0
        self._rows = self._converted(self._entries(read))

    def next(self, dropped: list[DroppedRow]) -> _StreamedRow:
        """The next row that can be used; those before it go to `dropped`."""
        while True:
            row = next(self._rows, None)
            if row is None:
                if not self._given:
                    reason = f"none of its {self.read} rows can be used: see `rlhf-ray data inspect`"
                    raise DataError(self._source, None, reason)
                self.go_to(0, self.passes + 1)
                continue
            self.read += 1
            if isinstance(row, _StreamedRow):
                self._given = True
                return row
            dropped.append(row)

    def check(self) -> None:
        """Look at the first rows.

        Raises:
            DataErrors: none of them can be used.
            DataError: the source can't be read.
        """
        problems: list[DataError] = []
        for row in self._converted(islice(self._entries(0), _PROBED)):
            if isinstance(row, _StreamedRow):
                return
            problems.append(DataError(row.source, row.row, row.reason))
        raise_all(self._source, problems)

    def reread(self, places: set[int]) -> Iterator[_StreamedRow]:
        """The usable ones of rows that were read before."""
        if not places:
            return
        first, last = min(places), max(places)
        entries = islice(self._entries(first), last - first + 1)
        rows = self._converted(entry for entry in entries if entry[0] in places)
        yield from (row for row in rows if isinstance(row, _StreamedRow))

    def _entries(self, skip: int) -> Iterator[tuple[int, int, Row | RowProblem]]:
        """Place, number and content of each row."""
        rows = read_rows(self._source, self.setting, self._config.columns, skip)
        return ((place, number, row) for place, (number, row) in enumerate(rows, start=skip))

    def _converted(self, entries: Iterable[tuple[int, int, Row | RowProblem]]) -> Iterator[_StreamedRow | DroppedRow]:
        entries = iter(entries)
        while chunk := list(islice(entries, _CHUNK)):
            yield from self._converted_chunk(chunk)

    def _converted_chunk(
        self, chunk: Sequence[tuple[int, int, Row | RowProblem]]
    ) -> Iterator[_StreamedRow | DroppedRow]:
        parsed: list[ParsedRow | RowProblem] = []
        for _, number, content in chunk:
            try:
                if isinstance(content, RowProblem):
                    raise content
                uid = uid_of(stem_of(self._source), number, content)
                parsed.append(self._parser.parse(number, uid, content))
            except RowProblem as problem:
                parsed.append(problem)
        good = [row.texts[0] for row in parsed if not isinstance(row, RowProblem)]
        tokens = tokenise_answered(good, self._tokenizer)
        for (place, number, _), row in zip(chunk, parsed, strict=True):
            try:
                if isinstance(row, RowProblem):
                    raise row
                ids, learnt = mark_answers(row.texts[0], next(tokens), self._tokenizer)
                yield self._within_budget(place, row.uid, ids, learnt)
            except RowProblem as problem:
                yield DroppedRow(self._source, number, str(problem), again=self.passes > 0)

    def _within_budget(self, place: int, uid: str, ids: list[int], learnt: NDArray[np.bool_]) -> _StreamedRow:
        budget = self._config.max_tokens
        over = len(ids) > budget
        if over and self._config.overlong == "drop":
            raise RowProblem(f"has {len(ids)} tokens, but data.max_tokens is {budget}")
        if over and not learnt[:budget].any():
            raise RowProblem(f"has nothing to learn in its first {budget} tokens, which data.max_tokens leaves of it")
        return _StreamedRow(self._number, place, uid, np.array(ids[:budget], np.int32), learnt[:budget], over)
