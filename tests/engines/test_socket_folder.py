"""Sockets of an engine are in a folder of its process, which leaves room for their names."""

import socket
import tempfile
from pathlib import Path
from uuid import uuid4

import pytest

from rlhf_ray.engines.socket_folder import socket_folder


@pytest.mark.parametrize("long", [False, True])
def test_a_socket_fits_however_long_the_folder_for_temporary_files_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, long: bool
) -> None:
    if long:
        temporary = tmp_path.joinpath(*["x" * 20] * 5)
        temporary.mkdir(parents=True)
        monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    folder = socket_folder()
    try:
        assert folder.path.is_relative_to(tempfile.gettempdir()) != long
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(f"{folder.path}/{uuid4()}")
    finally:
        folder.remove()
    assert not folder.path.exists()
