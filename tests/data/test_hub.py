"""Names on the hub where no hub answers: one line within seconds, for models, tokenizers and data sets alike."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_ray.data import hub
from rlhf_ray.data.errors import DataError
from rlhf_ray.data.sources import read_rows
from rlhf_ray.models.heads import ModelError, load_config, load_tokenizer


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A hub of which nobody answers, and an empty cache."""
    import datasets
    from huggingface_hub import constants

    # Port 9 is where packets are thrown away; nothing listens there.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv(hub.OFFLINE, "")
    hub._answers.cache_clear()
    yield
    hub._answers.cache_clear()


@pytest.mark.usefixtures("no_hub")
def test_a_name_that_no_hub_can_be_asked_for_is_told_in_one_line_within_seconds() -> None:
    began = time.monotonic()
    for load in (load_tokenizer, load_config):
        with pytest.raises(
            ModelError, match=r"no such folder, and the hub \(http://127.0.0.1:9\) can't be asked"
        ) as model:
            load("owner/name")
        assert "\n" not in str(model.value)
    with pytest.raises(DataError, match="it does not answer, and it is in no cache") as data:
        list(read_rows("owner/name", "data.train", {}))
    assert "\n" not in str(data.value)
    # Without the check the libraries try for half a minute.
    assert time.monotonic() - began < 15
    assert os.environ[hub.OFFLINE] == "1"


@pytest.mark.usefixtures("no_hub")
def test_what_is_cached_is_used_and_said_to_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    snapshot = tmp_path / "models--owner--name/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = tmp_path / "models--owner--name/refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    assert hub.why_no_model("owner/name") is None
    assert "owner/name is taken from the cache of this machine" in caplog.text


def test_a_name_that_no_model_can_have_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "reach_hub", lambda: sys.exit("asked"))
    assert "no name that a model of the hub can have" in (hub.why_no_model("a..b/c") or "")
