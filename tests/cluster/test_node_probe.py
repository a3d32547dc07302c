"""What a probe tells of the node it runs on; here of this one."""

import ast
import socket
import sys
from pathlib import Path

import pytest

from rlhf_ray.cluster.preflight import links, probe
from rlhf_ray.cluster.preflight.probe import NodeProbe, _connect


def test_it_tells_versions_and_files_and_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    monkeypatch.setenv("A_TOKEN", "secret")
    missing = str(tmp_path / "none")
    told = NodeProbe().look(
        ["ray", "no-such-library"], [str(tmp_path / "model"), missing], [], ["json", "no_such.module"], ["A_TOKEN", "B"]
    )
    assert told["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert told["versions"]["ray"]
    assert told["versions"]["no-such-library"] is None
    assert told["files"] == {str(tmp_path / "model"): {"config.json": 2}}
    assert told["problems"] == {
        missing: "No such file or directory",
        "no_such.module": "no such module",
        "B": "is not set",
    }
    assert "secret" not in str(told)


def test_a_hub_model_that_is_not_there_offline_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    told = NodeProbe().look([], [], ["no-such-owner/no-such-model"], [], [])
    assert "is not in the hub's cache of the node" in told["problems"]["no-such-owner/no-such-model"]


def test_the_hash_is_of_the_source_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_ray.cluster.preflight import probe as module

    package = tmp_path / "rlhf_ray"
    package.mkdir()
    (package / "__init__.py").write_text("a = 1\n")
    spec = type("Spec", (), {"origin": str(package / "__init__.py")})
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: spec)
    first = module._code()
    (package / "__pycache__").mkdir()
    (package / "__pycache__/x.pyc").write_text("compiled")
    assert module._code() == first
    (package / "__init__.py").write_text("a = 2\n")
    assert module._code() != first


def test_what_it_writes_is_seen_and_removed_with_the_folders_it_made(tmp_path: Path) -> None:
    folder, node = str(tmp_path / "runs/a"), NodeProbe()
    written = node.write(folder, "probe", "text")
    assert written["made"] == [str(tmp_path / "runs"), folder]
    assert isinstance(written["free"], int)
    assert node.read(folder, "probe", "text", 0.0)
    assert not node.read(folder, "probe", "other", 0.0)
    assert not node.read(str(tmp_path / "none"), "probe", "text", 0.0)
    node.remove(folder, "probe", written["made"])
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    node = NodeProbe()
    written = node.write(str(tmp_path), "probe", "text")
    node.remove(str(tmp_path), "probe", written["made"])
    assert list(tmp_path.iterdir()) == []


def test_open_ports_are_reached_and_closed_ones_told() -> None:
    node = NodeProbe()
    port = node.listen("127.0.0.1")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        targets = {"open": ("127.0.0.1", port), "closed": ("127.0.0.1", closed.getsockname()[1])}
        assert node.reach(targets) == {"closed": "Connection refused"}


def test_another_service_at_the_port_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setattr(probe, "CONNECT_S", 0.05)
        assert _connect(other.getsockname()) == "timed out"


@pytest.mark.parametrize("module", [probe, links])
def test_probes_import_nothing_that_a_node_may_lack(module: object) -> None:
    """They travel by value, so that they run on nodes without this package."""
    tree = ast.parse(Path(module.__file__).read_text())  # type: ignore[attr-defined]
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in top if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names


def test_it_tells_what_is_missing_to_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for program in ("c++", "ninja"):
        (tmp_path / program).touch(mode=0o755)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", "")
    assert NodeProbe().compiler() == ""
    (tmp_path / "ninja").unlink()
    assert NodeProbe().compiler() == "ninja (ninja)"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert NodeProbe().compiler() == "C++ compiler (no-such-compiler) and ninja (ninja)"
