"""Checkpoints: complete or absent whenever the writer stops, damage is named and skipped, the right ones are kept."""

import json
import logging
import os
import pickle
import random
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.run import KeepBest
from rlhf_ray.recovery.checkpoints import CheckpointStore
from rlhf_ray.recovery.seal import COMMITTED, CheckpointError

REWARD = "reward/mean"
WRITES: list[tuple[Any, str]] = [
    *((os, name) for name in ("fsync", "replace", "unlink", "rmdir")),
    *((Path, name) for name in ("write_bytes", "write_text")),
]


class Killed(BaseException):
    """Stands for the death of the process."""


def store_in(run_dir: Path, keep_last: int = 100, mode: str | None = None) -> CheckpointStore:
    keep_best = None if mode is None else KeepBest.model_validate({"metric": REWARD, "mode": mode})
    return CheckpointStore(run_dir, keep_last, keep_best)


def fill(folder: Path) -> None:
    """What two roles write."""
    for role in ("policy", "critic"):
        (folder / role / "state").mkdir(parents=True)
        (folder / role / "state" / "rank_0.pt").write_bytes(role.encode() * 100)


def save(store: CheckpointStore, step: int, **metrics: float) -> Path:
    fill(store.begin(step))
    return store.commit(step, {"step": step}, {name.replace("_", "/"): v for name, v in metrics.items()}).folder


def step_of_latest(run_dir: Path) -> int | None:
    found = store_in(run_dir).latest()
    return None if found is None else found.step


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    with caplog.at_level(logging.WARNING, logger="rlhf_ray"):
        yield lambda: [record.getMessage() for record in caplog.records if record.name == "rlhf_ray"]


def test_state_and_metrics_come_back_as_they_were(tmp_path: Path, warnings: Callable[[], list[str]]) -> None:
    state: dict[str, Any] = {
        "beta": 0.1 + 0.2,
        "rng": list(random.Random(7).getstate()[1]),
        "wide": 2**127 + 1,
        "cursor": {"epoch": 0, "nested": [None, True, {"uid": "größer \ud83d \0"}]},
    }
    metrics = {REWARD: -0.25, "step": 10}
    written = store_in(tmp_path)
    fill(written.begin(10))
    committed = written.commit(10, state, metrics)
    assert committed.folder == tmp_path / "checkpoints" / "step_000010"
    assert (committed.step, committed.state, committed.metrics) == (10, state, metrics)
    assert store_in(tmp_path).latest() == committed
    assert (committed.folder / "critic/state/rank_0.pt").read_bytes() == b"critic" * 100
    assert set(json.loads((committed.folder / COMMITTED).read_bytes())["files"]) == {
        "controller.json",
        "critic/state/rank_0.pt",
        "policy/state/rank_0.pt",
    }
    assert warnings() == []


@pytest.mark.parametrize(
    ("state", "metrics"),
    [
        ({"order": (1, 2)}, {}),
        ({"seen": {7: 1}}, {}),
        ({"path": Path("x")}, {}),
        ({"beta": float("nan")}, {}),
        ({"beta": float("inf")}, {}),
        ({}, {REWARD: float("inf")}),
        ({}, {REWARD: "high"}),
        ({}, {REWARD: None}),
    ],
)
def test_what_json_would_change_is_refused_before_the_commit(tmp_path: Path, state: Any, metrics: Any) -> None:
    store = store_in(tmp_path)
    store.begin(1)
    with pytest.raises(CheckpointError, match="JSON"):
        store.commit(1, state, metrics)
    assert store.steps() == []


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    store = store_in(tmp_path / "new", mode="max")
    assert (store.steps(), store.latest(), store.best()) == ([], None, None)


def commit_until_killed(store: CheckpointStore, step: int, writes: int) -> bool:
    """Commit, but die before the write that follows the first `writes`; whether it came to that."""
    done = 0

    def deadly(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            if done >= writes:
                raise Killed
            done += 1
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in WRITES:
            patch.setattr(owner, name, deadly(getattr(owner, name)))
        try:
            store.commit(step, {"step": step}, {})
        except Killed:
            return True
    return False


def test_a_kill_at_any_write_leaves_the_previous_checkpoint_or_the_complete_new_one(tmp_path: Path) -> None:
    outcomes: list[int | None] = []
    killed = True
    while killed:
        run_dir = tmp_path / str(len(outcomes))
        save(store_in(run_dir), 10)
        fill(store_in(run_dir).begin(20))
        killed = commit_until_killed(store_in(run_dir, keep_last=1), 20, writes=len(outcomes))
        outcomes.append(step_of_latest(run_dir))
        if not (run_dir / "checkpoints/step_000020" / COMMITTED).exists():
            assert outcomes[-1] == 10
            store_in(run_dir, keep_last=1).commit(20, {"step": 20}, {})  # as one who tries again in the same folder
        assert step_of_latest(run_dir) == 20
        save(store_in(run_dir, keep_last=1), 30)
        assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_000030"]
    before, after = outcomes.count(10), outcomes.count(20)
    assert outcomes == [10] * before + [20] * after
    assert before >= 10
    assert after >= 5


def test_everything_is_on_disk_before_committed_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    at_rename: list[set[Path]] = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(handle: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def recorded_replace(source: Path, target: Path) -> None:
        assert Path(target).name == COMMITTED
        at_rename.append(set(synced))
        replace(source, target)

    store = store_in(tmp_path)
    folder = store.begin(10)
    fill(folder)
    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    store.commit(10, {}, {})
    monkeypatch.undo()
    [before] = at_rename
    everything = {path for path in folder.rglob("*") if path.name != COMMITTED}
    assert len(everything) == 7
    assert before >= everything | {folder, folder.parent, tmp_path}
    assert synced[-1] == folder


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(b"c" + b"x" + path.read_bytes()[2:]), "checksum differs: {name}"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "wrong size: {name} has {short} bytes"),
        (lambda path: path.unlink(), "missing file {name}"),
    ],
)
@pytest.mark.parametrize("name", ["critic/state/rank_0.pt", "controller.json"])
def test_a_damaged_checkpoint_is_named_once_and_skipped(
    tmp_path: Path, warnings: Callable[[], list[str]], name: str, damage: Callable[[Path], object], reason: str
) -> None:
    store = store_in(tmp_path)
    folders = [save(store, step) for step in (10, 20, 30)]
    short = (folders[2] / name).stat().st_size - 1
    damage(folders[2] / name)
    assert step_of_latest(tmp_path) == 20
    [warning] = warnings()
    assert str(folders[2]) in warning
    assert reason.format(name=name, short=short) in warning


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "COMMITTED unreadable"),
        (b"\xff\xfe", "COMMITTED unreadable"),
        (b'{"format":2,"step":20,"files":{}}', "COMMITTED unreadable: format"),
        (b'{"format":1,"step":10,"files":{}}', "COMMITTED unreadable: it is of step 10"),
        (b'{"format":1,"step":20,"files":{}}', "controller.json unreadable"),
    ],
)
def test_an_unreadable_committed_is_named_and_skipped(
    tmp_path: Path, warnings: Callable[[], list[str]], content: bytes, reason: str
) -> None:
    save(store_in(tmp_path), 10)
    folder = save(store_in(tmp_path), 20)
    (folder / "controller.json").write_bytes(b"{")
    (folder / COMMITTED).write_bytes(content)
    assert step_of_latest(tmp_path) == 10
    [warning] = warnings()
    assert f"{folder}: {reason}" in warning


@pytest.mark.parametrize("mask", [0x01, 0x20])
def test_no_flipped_bit_goes_unnoticed(tmp_path: Path, mask: int) -> None:
    save(store_in(tmp_path), 10)
    folder = store_in(tmp_path).begin(20)
    (folder / "policy.pt").write_bytes(bytes(range(0, 256, 8)))
    store_in(tmp_path).commit(20, {"beta": 0.1}, {})
    for path in (folder / COMMITTED, folder / "controller.json", folder / "policy.pt"):
        content = path.read_bytes()
        for position in range(len(content)):
            path.write_bytes(content[:position] + bytes([content[position] ^ mask]) + content[position + 1 :])
            assert step_of_latest(tmp_path) == 10, (path, position)
        path.write_bytes(content)
    assert step_of_latest(tmp_path) == 20


def test_the_checksum_of_a_file_of_many_blocks_is_its_crc32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_ray.recovery.seal._BLOCK_BYTES", 64)
    folder = store_in(tmp_path).begin(10)
    content = random.Random(7).randbytes(1000)
    (folder / "policy.pt").write_bytes(content)
    store_in(tmp_path).commit(10, {}, {})
    listed = json.loads((folder / COMMITTED).read_bytes())["files"]["policy.pt"]
    assert listed == {"size": 1000, "crc32": zlib.crc32(content)}


def test_every_skipped_checkpoint_is_named_and_none_may_be_left(
    tmp_path: Path, warnings: Callable[[], list[str]]
) -> None:
    store = store_in(tmp_path)
    for step in (10, 20):
        (save(store, step) / "controller.json").unlink()
    store.begin(30)
    assert store_in(tmp_path).latest() is None
    assert [f"step_0000{step}" in warning for step, warning in zip((30, 20, 10), warnings(), strict=True)] == [True] * 3
    assert "no COMMITTED" in warnings()[0]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    store = store_in(tmp_path, keep_last=2)
    kept = []
    for step in (999_990, 999_999, 1_000_000, 1_000_010):
        save(store, step)
        kept.append(store.steps())
    assert kept == [[999_990], [999_990, 999_999], [999_999, 1_000_000], [1_000_000, 1_000_010]]
    assert step_of_latest(tmp_path) == 1_000_010


@pytest.mark.parametrize(("mode", "best"), [("max", 30), ("min", 40)])
def test_the_best_is_kept_beside_the_newest_and_of_equals_the_newer(tmp_path: Path, mode: str, best: int) -> None:
    store = store_in(tmp_path, keep_last=1, mode=mode)
    for step, reward in ((10, 0.5), (20, 0.9), (30, 0.9), (40, 0.1), (50, 0.5)):
        save(store, step, reward_mean=reward)
    save(store, 60, other=9.0)
    assert store.steps() == [best, 60]
    found = store_in(tmp_path, mode=mode).best()
    assert found is not None
    assert (found.step, found.state) == (best, {"step": best})


def test_a_damaged_best_is_named_and_the_next_best_is_taken(tmp_path: Path, warnings: Callable[[], list[str]]) -> None:
    store = store_in(tmp_path, mode="max")
    folders = [save(store, step, reward_mean=reward) for step, reward in ((10, 0.1), (20, 0.9), (30, 0.5))]
    (folders[1] / "critic/state/rank_0.pt").unlink()
    found = store.best()
    assert found is not None
    assert found.step == 30
    assert "missing file" in warnings()[0]


def test_leftovers_are_never_listed_and_go_when_a_newer_step_is_committed(
    tmp_path: Path, warnings: Callable[[], list[str]]
) -> None:
    store = store_in(tmp_path)
    save(store, 10)
    for step in (15, 30):
        fill(store.begin(step))
    for name in ("step_20", "step_000020.bak", "notes"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / COMMITTED).touch()
    (tmp_path / "checkpoints" / "step_000011").write_text("a file")
    assert store.steps() == [10]
    assert step_of_latest(tmp_path) == 10
    save(store, 20)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    kept = ["step_000010", "step_000011", "step_000020", "step_000020.bak", "step_000030"]
    assert names == ["notes", *kept, "step_20"]
    assert store.steps() == [10, 20]
    assert not any("step_000011" in warning for warning in warnings())


def test_begin_empties_what_an_unfinished_attempt_left(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    fill(store.begin(10))
    (store.begin(10) / "only").touch()
    assert [path.name for path in store.begin(10).iterdir()] == []


def test_an_intact_checkpoint_is_not_overwritten_or_overtaken(tmp_path: Path) -> None:
    folder = save(store_in(tmp_path), 20)
    for step in (20, 10):
        with pytest.raises(CheckpointError, match="resume from it") as caught:
            store_in(tmp_path).begin(step)
        assert caught.value.folder == folder
    with pytest.raises(CheckpointError, match="committed before"):
        store_in(tmp_path).commit(20, {}, {})
    with pytest.raises(CheckpointError, match=r"begin\(30\)"):
        store_in(tmp_path).commit(30, {}, {})
    assert step_of_latest(tmp_path) == 20


def test_a_run_resumed_before_a_damaged_checkpoint_replaces_it_and_loses_no_good_one(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(store_in(tmp_path), step)
    for step in (20, 30):
        (tmp_path / f"checkpoints/step_0000{step}/controller.json").unlink()
    store = store_in(tmp_path, keep_last=2)
    resumed = store.latest()
    assert resumed is not None
    assert resumed.step == 10
    save(store, 15)
    assert store.steps() == [10, 15]
    save(store, 20)
    assert store.steps() == [15, 20]
    assert step_of_latest(tmp_path) == 20


def test_a_look_at_the_checkpoints_while_one_is_written_does_not_condemn_it(tmp_path: Path) -> None:
    store = store_in(tmp_path, keep_last=2)
    save(store, 10)
    fill(store.begin(20))
    assert store.latest() is not None
    store.commit(20, {}, {})
    save(store, 30)
    assert store.steps() == [20, 30]


def test_one_half_deleted_is_not_taken_as_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_in(tmp_path, keep_last=1)
    old = save(store, 10)
    unlink = os.unlink
    removed = []

    def busy_after_first(path: Any, **kwargs: Any) -> None:
        removed.append(Path(path).name)
        if len(removed) > 1:
            raise OSError("device busy")
        unlink(path, **kwargs)

    fill(store.begin(20))
    monkeypatch.setattr(os, "unlink", busy_after_first)
    store.commit(20, {}, {})  # the new checkpoint stands whatever becomes of the old one
    monkeypatch.undo()
    assert removed[0] == COMMITTED
    assert (old / "critic/state/rank_0.pt").exists()
    assert store.steps() == [20]
    save(store, 30)
    assert not old.exists()


def test_only_files_and_folders_are_vouched_for(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    folder = store.begin(10)
    os.mkfifo(folder / "pipe")
    with pytest.raises(CheckpointError, match="holds pipe"):
        store.commit(10, {}, {})
    (folder / "pipe").unlink()
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match="holds link"):
        store.commit(10, {}, {})


def test_the_error_crosses_processes_with_its_facts() -> None:
    error = pickle.loads(pickle.dumps(CheckpointError(Path("a"), "why")))
    assert (error.folder, error.reason, str(error)) == (Path("a"), "why", "a: why")
