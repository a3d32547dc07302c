"""The Dockerfiles: what they copy exists, they install as scripts/ does, and nothing that shouldn't gets in."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from docker_files import DOCKERFILES, REPOSITORY, instructions, locked

HADOLINT = Path(sys.executable).with_name("hadolint")
of_each = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)


def profile_of(dockerfile: Path) -> str:
    return dockerfile.name.removesuffix(".Dockerfile")


def rest_of(dockerfile: Path, keyword: str) -> list[str]:
    return [rest for found, rest in instructions(dockerfile) if found == keyword]


def copied(dockerfile: Path) -> list[str]:
    """Sources that come from the repository."""
    own = (rest for rest in rest_of(dockerfile, "COPY") if not rest.startswith("--from"))
    return [source for rest in own for source in rest.split()[:-1]]


def build_arguments(dockerfile: Path) -> dict[str, str]:
    return dict(rest.split("=", 1) for rest in rest_of(dockerfile, "ARG") if "=" in rest)


def test_there_is_one_for_each_lock() -> None:
    assert [profile_of(path) for path in DOCKERFILES] == [path.stem for path in sorted(REPOSITORY.glob("locks/*.txt"))]


@of_each
def test_what_is_copied_exists_and_is_let_through(dockerfile: Path) -> None:
    lines = [line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    for source in copied(dockerfile):
        assert (REPOSITORY / source).exists(), f"{dockerfile.name} copies {source}, which is not there"
        assert source.split("/")[0] in allowed, f".dockerignore keeps {source} from {dockerfile.name}"
    # Nor is anything else in the context: no models, data, runs, tokens or history.
    assert allowed == {source.split("/")[0] for path in DOCKERFILES for source in copied(path)}


@of_each
def test_packages_come_from_the_lock_by_the_install_script(dockerfile: Path) -> None:
    profile = profile_of(dockerfile)
    installs = [rest for rest in rest_of(dockerfile, "RUN") if "install.sh" in rest]
    script = "/opt/rlhf_ray/scripts/install.sh"
    # The lock's layer comes first, so that a change of the code does not make it anew.
    assert re.sub(r"--mount=\S+ | && .*", "", installs[0]) == f"{script} {profile} --lock-only"
    assert installs[1:] == [f"{script} {profile}"]
    assert f"locks/{profile}.txt" in copied(dockerfile)
    assert not [rest for rest in rest_of(dockerfile, "RUN") if re.search(r"\bpip3? install\b|\buv\b|\bconda\b", rest)]
    order = [f"{keyword} {rest}" for keyword, rest in instructions(dockerfile)]
    assert order.index("COPY rlhf_ray /opt/rlhf_ray/rlhf_ray") > order.index(f"RUN {installs[0]}")


@of_each
def test_image_runs_as_another_user_than_root(dockerfile: Path) -> None:
    assert rest_of(dockerfile, "USER")[-1] == "${UID}"
    assert int(build_arguments(dockerfile)["UID"]) >= 1000


@of_each
def test_image_holds_no_secret_and_names_no_host(dockerfile: Path) -> None:
    for keyword, rest in instructions(dockerfile):
        assert not re.search(r"https?://|index-url|trusted-host", rest), rest
        assert keyword != "ADD"  # which fetches URLs
        if keyword in ("ENV", "ARG"):
            assert not re.search(r"(?i)\b\w*(token|password|secret|api_?key)\w*=(?!token\b)", rest), rest
    # Settings of pip may hold credentials: mounted for one command, in no layer.
    assert "--mount=type=secret,id=pip,target=/etc/pip.conf" in " ".join(rest_of(dockerfile, "RUN"))


@of_each
def test_base_images_are_pinned(dockerfile: Path) -> None:
    images = [value for name, value in build_arguments(dockerfile).items() if name in ("BASE", "TOOLKIT")]
    assert images
    for image in images:
        assert re.search(r":\d+\.\d+\.\d+-", image), f"{image} may be another image tomorrow"
    for rest in rest_of(dockerfile, "FROM"):
        assert rest.split()[0] in ("${BASE}", "${TOOLKIT}")


@of_each
def test_python_is_one_that_the_project_takes(dockerfile: Path) -> None:
    version = re.fullmatch(r"python:(\d+\.\d+)\.\d+-.*", build_arguments(dockerfile)["BASE"])
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert version is not None
    assert f"Programming Language :: Python :: {version[1]}" in project["classifiers"]
    assert build_arguments(dockerfile)["VERSION"] == project["version"]


def test_cuda_toolkit_is_the_release_that_torch_was_built_with() -> None:
    arguments = build_arguments(next(path for path in DOCKERFILES if profile_of(path) == "gpu"))
    release = ".".join(locked("nvidia-cuda-runtime", "gpu").split(".")[:2])
    assert arguments["CUDA"] == release
    assert arguments["TOOLKIT"].startswith(f"nvidia/cuda:{release}.")


@of_each
def test_login_shells_find_the_commands(dockerfile: Path) -> None:
    """KubeRay starts Ray in login shells, for which /etc/profile sets the PATH anew."""
    assert [rest for rest in rest_of(dockerfile, "RUN") if rest.startswith('echo "PATH=${RLHF_RAY_VENV}/bin:')]


@of_each
def test_hadolint_finds_nothing(dockerfile: Path) -> None:
    done = subprocess.run([str(HADOLINT), str(dockerfile)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
