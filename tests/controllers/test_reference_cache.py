"""Log-probs of the reference on disk: found again by what they depend on, and by nothing else."""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlhf_ray.actors.answers import AnswerLogProbs
from rlhf_ray.controllers.reference_columns import ReferenceCache
from rlhf_ray.data.comparisons import ComparisonSet
from rlhf_ray.data.trajectory import offsets_of

MakeCache = Callable[..., ReferenceCache]

DATA = ComparisonSet(
    uids=("a", "b"),
    token_ids=np.arange(14, dtype=np.int32),
    token_offsets=offsets_of([3, 4, 2, 5]),
    answer_starts=np.array([1, 1, 1, 1]),
    candidate_offsets=np.array([0, 2, 4]),
    ranks=np.array([0, 1, 0, 1]),
    margins=np.zeros(2, np.float32),
    weights=np.ones(2),
    dropped=0,
    truncated=0,
)
# As two ranks give them, in another order than the file's.
FOUND = AnswerLogProbs((2, 3, 0, 1), offsets_of([1, 4, 2, 3]), np.arange(10, dtype=np.float32))
IN_ORDER = [5, 6, 7, 8, 9, 0, 1, 2, 3, 4]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def make(tmp_path: Path, model: Path) -> MakeCache:
    def make(model: Path = model, dtype: str = "float32") -> ReferenceCache:
        return ReferenceCache(tmp_path / "cache", str(model), dtype, trust_remote_code=False)

    return make


def test_what_was_written_is_read_by_a_later_run_in_the_order_of_the_data(make: MakeCache) -> None:
    assert not make().has(DATA)
    make().write(DATA, FOUND)
    found = make().read(DATA)
    assert found is not None
    assert found.candidates == (0, 1, 2, 3)
    assert found.values.tolist() == IN_ORDER
    assert found.select([3, 0]).values.tolist() == [1, 2, 3, 4, 5, 6]


def test_a_copy_of_the_model_elsewhere_finds_them_too(make: MakeCache, model: Path) -> None:
    make().write(DATA, FOUND)
    shutil.copytree(model, model.with_name("copy"))
    assert make(model.with_name("copy")).has(DATA)


def test_labels_uids_and_weights_do_not_matter(make: MakeCache) -> None:
    make().write(DATA, FOUND)
    assert make().has(replace(DATA, uids=("c", "d"), ranks=DATA.ranks[::-1], weights=np.array([1.0, 3.0])))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_another_model_has_none(make: MakeCache, model: Path, file: str) -> None:
    make().write(DATA, FOUND)
    (model / file).write_bytes((model / file).read_bytes() + b" ")
    assert not make().has(DATA)


def test_another_number_format_has_none(make: MakeCache) -> None:
    make().write(DATA, FOUND)
    assert not make(dtype="bfloat16").has(DATA)


@pytest.mark.parametrize(
    "changed",
    [
        # Another text or another template.
        replace(DATA, token_ids=np.arange(1, 15, dtype=np.int32)),
        replace(DATA, token_offsets=offsets_of([4, 3, 2, 5])),
        replace(DATA, answer_starts=np.array([2, 1, 1, 1])),
        DATA.first(1),
    ],
)
def test_other_tokens_have_none(make: MakeCache, changed: ComparisonSet) -> None:
    make().write(DATA, FOUND)
    assert not make().has(changed)


@pytest.mark.parametrize("content", [b"", b"half of a file", None])
def test_a_damaged_file_is_named_and_made_again(
    make: MakeCache, tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes | None
) -> None:
    make().write(DATA, FOUND)
    [file] = (tmp_path / "cache").iterdir()
    if content is None:  # of other data
        make().write(DATA.first(1), FOUND.select([0, 1]))
        [other] = set((tmp_path / "cache").iterdir()) - {file}
        other.replace(file)
    else:
        file.write_bytes(content)
    with caplog.at_level(logging.WARNING, "rlhf_ray"):
        assert not make().has(DATA)
    assert file.name in caplog.text
    assert "made again" in caplog.text
    make().write(DATA, FOUND)
    assert make().has(DATA)
    assert list((tmp_path / "cache").iterdir()) == [file]
