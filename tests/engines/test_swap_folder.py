"""Each process has a folder of its own for what it keeps on a disk, and none is left behind for good."""

import fcntl
import gc
import shutil
from pathlib import Path
from typing import TextIO

import pytest

from rlhf_ray.engines import own_folder, swap_folder
from rlhf_ray.engines.swap_folder import SwapError


class Builder:
    """DeepSpeed's look at what its operator needs."""

    found = True

    def is_compatible(self) -> bool:
        return self.found


@pytest.fixture(autouse=True)
def libaio(monkeypatch: pytest.MonkeyPatch) -> type[Builder]:
    """As if it were there."""
    monkeypatch.setattr(swap_folder, "AsyncIOBuilder", Builder)
    return Builder


def folders(root: Path) -> set[Path]:
    return {path for path in root.iterdir() if path.is_dir()}


def test_a_folder_goes_with_what_uses_it(tmp_path: Path) -> None:
    root = tmp_path / "made/when/missing"
    one, other = swap_folder.swap_folder(str(root)), swap_folder.swap_folder(str(root))
    assert folders(root) == {one.path, other.path}
    (one.path / "weights.swp").write_bytes(b"x")
    del one
    gc.collect()
    assert folders(root) == {other.path}


def test_what_a_killed_process_left_goes_when_the_next_one_comes(tmp_path: Path) -> None:
    alive, killed = swap_folder.swap_folder(str(tmp_path)), swap_folder.swap_folder(str(tmp_path))
    (killed.path / "weights.swp").write_bytes(b"x")
    killed._lock.close()  # as the kernel does when a process ends
    others = tmp_path / "not-ours"
    others.mkdir()
    new = swap_folder.swap_folder(str(tmp_path))
    assert folders(tmp_path) == {alive.path, new.path, others}


def test_folders_that_their_processes_remove_meanwhile_are_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rlhf-ray-gone").symlink_to(tmp_path / "nowhere")  # seen by glob, and not there when its lock is opened
    going = swap_folder.swap_folder(str(tmp_path))
    lock = fcntl.flock
    going._lock.close()

    def remove_after_opening(file: TextIO, how: int) -> None:
        if Path(file.name).parent == going.path:
            shutil.rmtree(going.path)
        lock(file, how)

    monkeypatch.setattr(own_folder.fcntl, "flock", remove_after_opening)
    new = swap_folder.swap_folder(str(tmp_path))
    assert folders(tmp_path) == {new.path}


def test_a_machine_without_libaio_is_named_with_the_cure(
    tmp_path: Path, libaio: type[Builder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libaio, "found", False)
    with pytest.raises(SwapError, match=r"on node .+: DeepSpeed needs libaio .* \(apt-get install g\+\+ libaio-dev\)"):
        swap_folder.swap_folder(str(tmp_path))
    assert not folders(tmp_path)


def test_a_path_that_is_no_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SwapError, match=r"engine\.nvme_path '.*/file' can't be used: .*File exists"):
        swap_folder.swap_folder(str(tmp_path / "file"))
