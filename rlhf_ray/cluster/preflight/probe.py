"""What a node tells of itself.

`NodeProbe` travels by value, to nodes that may lack this package or have another version of it. So this file imports
nothing but the standard library at its top, and takes and gives nothing but builtin types.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

CONNECT_S = 3.0
"""Limit of a connection from node to node."""


class NodeProbe:
    """One process on the node that is looked at."""

    def look(
        self, libraries: list[str], folders: list[str], hub_names: list[str], modules: list[str], variables: list[str]
    ) -> dict[str, Any]:
        """What is there.

        Args:
            libraries: names of distributions.
            folders: of models, or files of data.
            hub_names: of models that are in no folder.
            modules: that must be importable.
            variables: of the environment, of which only the presence is told.

        Returns:
            `versions` (None: not installed), `code` (where this package is, and a hash of its files), `files` of each
            folder (name → bytes), `problems` by folder, hub name, module and variable.
        """
        files, problems = {}, {}
        for folder in folders:
            try:
                files[folder] = _readable_files(Path(folder))
            except OSError as error:
                problems[folder] = error.strerror or str(error)
        problems |= {name: problem for name in hub_names if (problem := _hub_problem(name))}
        for module in modules:
            if importlib.util.find_spec(module.partition(".")[0]) is None:
                problems[module] = "no such module"
        problems |= {name: "is not set" for name in variables if not os.environ.get(name)}
        versions = {"python": platform.python_version()} | {name: _version(name) for name in libraries}
        return {"versions": versions, "code": _code(), "files": files, "problems": problems}

    def processor(self, variables: list[str]) -> dict[str, Any]:
        """What decides about a number format.

        Returns:
            `cpuinfo`: text of the node's first CPU; `environ`: those of the variables that are set.
        """
        path = Path("/proc/cpuinfo")
        text = path.read_text().partition("\n\n")[0] if path.exists() else ""
        return {"cpuinfo": text, "environ": {name: os.environ[name] for name in variables if name in os.environ}}

    def compiler(self) -> str:
        """What this node lacks to compile DeepSpeed's Adam for CPUs, which takes no nvcc; empty where it has all, or
        DeepSpeed has been installed with the kernel in it."""
        spec = importlib.util.find_spec("deepspeed")
        installed = Path(spec.origin).with_name("git_version_info_installed.py") if spec and spec.origin else None
        if installed and installed.is_file() and re.search(r"['\"]cpu_adam['\"]: *True", installed.read_text()):
            return ""
        needs = {"C++ compiler": os.environ.get("CXX", "c++"), "ninja": "ninja"}
        beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        missing = [f"{what} ({program})" for what, program in needs.items() if not shutil.which(program, path=beside)]
        return " and ".join(missing)

    def now(self) -> float:
        """This node's clock."""
        return time.time()

    def write(self, folder: str, name: str, text: str) -> dict[str, Any]:
        """Write a file into a folder, which is made where it is missing.

        Returns:
            `made`: folders that were, outermost first; `free`: bytes that are left on the disk.
        """
        path = Path(folder)
        made = [str(each) for each in reversed((path, *path.parents)) if not each.exists()]
        path.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
        return {"made": made, "free": shutil.disk_usage(folder).free}

    def read(self, folder: str, name: str, text: str, patience_s: float) -> bool:
        """Whether a file comes to be seen here with this text; shared storage may show it a little later."""
        path, deadline = Path(folder) / name, time.monotonic() + patience_s
        while True:
            try:
                if path.read_text() == text:
                    return True
            except OSError:
                os.scandir(path.parent).close() if path.parent.is_dir() else None  # has NFS look again
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)

    def remove(self, folder: str, name: str, made: list[str]) -> None:
        """Remove what `write` made."""
        (Path(folder) / name).unlink(missing_ok=True)
        for each in reversed(made):
            Path(each).rmdir()

    def listen(self, host: str) -> int:
        """Open a free port at this node's address, as a collective does; who connects gets a word. Returns the port."""
        server = socket.create_server((host, 0), backlog=512)
        threading.Thread(target=_greet, args=(server,), daemon=True).start()
        return int(server.getsockname()[1])

    def reach(self, targets: dict[str, tuple[str, int]]) -> dict[str, str]:
        """Connect to other nodes, and tell which could not be reached and why."""
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(max(1, min(32, len(targets)))) as pool:
            found = pool.map(_connect, targets.values())
            return {name: problem for name, problem in zip(targets, found) if problem}  # noqa: B905


def _readable_files(path: Path) -> dict[str, int]:
    if not path.is_dir():
        path.open("rb").close()
        return {path.name: path.stat().st_size}
    files = {}
    for file in sorted(path.iterdir()):
        if file.is_file() and not file.name.startswith("."):
            file.open("rb").close()
            files[file.name] = file.stat().st_size
    return files


def _hub_problem(name: str) -> str:
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str) and any(Path(cached).parent.glob("*.safetensors")):
        return ""
    if constants.HF_HUB_OFFLINE:
        return "is not in the hub's cache of the node, and HF_HUB_OFFLINE is set"
    try:
        HfApi().model_info(name, timeout=CONNECT_S)
    except Exception as error:  # the hub's client raises a dozen kinds, and those of the libraries beneath it
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"is not in the hub's cache of the node, and the hub does not answer it ({first})"
    return ""


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _code() -> dict[str, str] | None:
    spec = importlib.util.find_spec("rlhf_ray")
    if spec is None or spec.origin is None:
        return None
    folder, digest = Path(spec.origin).parent, hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder)}\0".encode())
        digest.update(file.read_bytes())
    return {"folder": str(folder), "hash": digest.hexdigest()}


def _greet(server: socket.socket) -> None:
    while True:
        connection, _ = server.accept()
        with connection:
            connection.sendall(b"rlhf_ray")


def _connect(address: tuple[str, int]) -> str:
    try:
        with socket.create_connection(address, CONNECT_S) as connection:
            connection.settimeout(CONNECT_S)
            return "" if connection.recv(8) == b"rlhf_ray" else "another service answers"
    except OSError as error:
        return error.strerror or str(error)
