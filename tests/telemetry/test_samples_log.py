"""samples.jsonl: any text comes back as it was, and resumption takes rows back as in metrics.jsonl."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rlhf_ray.telemetry.errors import NonFiniteError, StepOrderError
from rlhf_ray.telemetry.samples import SampleRow, SamplesLog, read_samples

ROW = SampleRow("p7", 1, "The film", " was\nfine", 0.5, {"vader": 0.25, "model": 0.75}, truncated=True, kl=1.5)


@given(st.text(st.characters()), st.text(st.characters(exclude_categories=())))
@example("\u2028", "half an emoji \ud83d, a \0 and a \r\n")
def test_any_text_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, prompt: str, response: str) -> None:
    folder = tmp_path_factory.mktemp("samples")
    row = replace(ROW, prompt=prompt, response=response)
    with closing(SamplesLog(folder)) as log:
        log.append(1, [row, ROW])
        log.append(1, [])
        log.append(3, [row])
    assert read_samples(folder) == [(1, row), (1, ROW), (3, row)]


def test_text_stays_readable_and_numpy_numbers_are_taken(tmp_path: Path) -> None:
    row = replace(ROW, response="größer 映画", score=np.float32(0.5), truncated=np.bool_(True))  # type: ignore[arg-type]
    with closing(SamplesLog(tmp_path)) as log:
        log.append(1, [row])
    assert "größer 映画" in (tmp_path / "samples.jsonl").read_text(encoding="utf-8")
    assert read_samples(tmp_path) == [(1, row)]


def test_columns_of_the_prompts_row_come_back(tmp_path: Path) -> None:
    rows = [replace(ROW, columns=columns) for columns in ({"answer": ["ü", None]}, {}, None)]
    with closing(SamplesLog(tmp_path)) as log:
        log.append(1, rows)
    assert [row for _, row in read_samples(tmp_path)] == rows
    assert (tmp_path / "samples.jsonl").read_text(encoding="utf-8").count('"columns"') == 2


def test_resumption_takes_back_samples_beyond_the_checkpoint(tmp_path: Path) -> None:
    with closing(SamplesLog(tmp_path)) as log:
        for step in (2, 4, 6):
            log.append(step, [ROW, ROW])
    with closing(SamplesLog(tmp_path, resume_step=5)) as log:
        log.append(6, [ROW])
        with pytest.raises(StepOrderError):
            log.append(5, [ROW])
    assert [step for step, _ in read_samples(tmp_path)] == [2, 2, 4, 4, 6]


@pytest.mark.parametrize(
    ("row", "named"),
    [
        (replace(ROW, score=float("nan")), "score of sample p7:1 is nan"),
        (replace(ROW, kl=float("inf")), "kl of sample p7:1 is inf"),
        (replace(ROW, rewards={"vader": float("nan")}), "rewards.vader of sample p7:1 is nan"),
    ],
)
def test_a_number_that_is_none_is_refused_with_its_sample(tmp_path: Path, row: SampleRow, named: str) -> None:
    with closing(SamplesLog(tmp_path)) as log:
        with pytest.raises(NonFiniteError, match=named):
            log.append(1, [ROW, row])
        assert read_samples(tmp_path) == []
