"""What of a working directory is sent with a job, and where the job looks for the rest."""

from pathlib import Path
from zipfile import ZipFile

import pytest

from rlhf_ray.cluster.package import LEFT_OUT, Package, PackageTooLarge, package, pinned_paths
from rlhf_ray.config.jobs import Job
from rlhf_ray.config.loading import parse_config


def put(folder: Path, *names: str, size: int = 1) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)


def sent(content: Package) -> set[str]:
    return {str(file) for file in content.files}


def sft(**paths: str) -> Job:
    return parse_config(
        {
            "job": "sft",
            "name": "a",
            "policy": {"model": paths.get("model", "models/tiny")},
            "data": {"train": paths.get("train", "data/rows.jsonl")},
            "run": {"dir": paths.get("dir", "runs/a")},
        }
    )


def test_code_is_sent_and_results_models_data_and_environments_are_not(tmp_path: Path) -> None:
    put(tmp_path, "my.yaml", "rewards.py", "package/data/rows.py", "package/models/net.py")
    put(tmp_path, "runs/a/metrics.jsonl", "models/tiny/config.json", "data/rows.jsonl", "out/checkpoints/step_3/x")
    put(tmp_path, "weights.safetensors", ".git/HEAD", ".venv/bin/python", "a/__pycache__/b.pyc", ".mypy_cache/c")
    assert sent(package(tmp_path)) == {"my.yaml", "rewards.py", "package/data/rows.py", "package/models/net.py"}


def test_gitignore_and_rayignore_are_honoured_in_every_folder(tmp_path: Path) -> None:
    put(tmp_path, "my.yaml", "a.log", "sub/b.log", "sub/secret.txt", "sub/kept.txt")
    (tmp_path / ".gitignore").write_text("*.log\n")
    (tmp_path / "sub/.rayignore").write_text("secret.txt\n")
    assert sent(package(tmp_path)) == {".gitignore", "my.yaml", "sub/.rayignore", "sub/kept.txt"}


def test_more_can_be_left_out(tmp_path: Path) -> None:
    put(tmp_path, "my.yaml", "notes/a.txt", "sub/notes/b.txt")
    assert sent(package(tmp_path, ["/notes"])) == {"my.yaml", "sub/notes/b.txt"}


def test_too_large_a_folder_names_its_largest_files(tmp_path: Path) -> None:
    put(tmp_path, *(f"small{number}" for number in range(9)))
    put(tmp_path, "sub/large", size=3 * 2**20)
    put(tmp_path, "larger", size=4 * 2**20)
    with pytest.raises(PackageTooLarge) as caught:
        package(tmp_path, limit=2**20)
    assert str(caught.value).startswith(
        f"{tmp_path}: its files are 7.0 MiB, more than the 1.0 MiB that Ray takes. Leave some out with --exclude"
    )
    assert str(caught.value).splitlines()[1:3] == ["  4.0 MiB  larger", "  3.0 MiB  sub/large"]
    assert len(caught.value.largest) == 5


def test_the_same_files_make_the_same_archive(tmp_path: Path) -> None:
    put(tmp_path / "dir", "b/c.py", "a.py")
    content = package(tmp_path / "dir")
    content.write(tmp_path / "one.zip")
    content.write(tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    with ZipFile(tmp_path / "one.zip") as archive:
        assert archive.namelist() == ["a.py", "b/c.py"]


def test_paths_that_are_not_sent_become_absolute(tmp_path: Path) -> None:
    put(tmp_path, "models/tiny/config.json", "data/rows.jsonl", "my.yaml")
    pinned = pinned_paths(sft(), package(tmp_path))
    assert [path.override for path in pinned] == [
        f"policy.model={tmp_path}/models/tiny",
        f"data.train={tmp_path}/data/rows.jsonl",
        f"run.dir={tmp_path}/runs/a",
    ]


def test_paths_beside_the_folder_become_absolute(tmp_path: Path) -> None:
    put(tmp_path, "here/my.yaml", "beside/rows.jsonl")
    config = sft(model="owner/name", train="../beside/rows.jsonl", dir="/shared/runs/a")
    [pinned] = pinned_paths(config, package(tmp_path / "here"))
    assert pinned.override == f"data.train={tmp_path}/beside/rows.jsonl"


def test_paths_that_are_sent_and_names_of_the_hub_stay_as_they_are(tmp_path: Path) -> None:
    put(tmp_path, "rows/train.jsonl")
    config = sft(model="owner/name", train="rows/train.jsonl", dir="/shared/runs/a")
    assert pinned_paths(config, package(tmp_path)) == []


def test_a_pinned_path_is_quoted_where_yaml_would_read_something_else(tmp_path: Path) -> None:
    folder = tmp_path / "a: b"
    put(folder, "my.yaml")
    [pinned] = pinned_paths(sft(model="owner/name", train="owner/rows"), package(folder))
    assert pinned.override == f'run.dir="{folder}/runs/a"'


def test_the_help_names_what_is_left_out() -> None:
    from rlhf_ray.cli.jobs import submit

    assert submit.__doc__ is not None
    for word in ("runs/", "models/", "data/", "checkpoints", "*.safetensors", "*.gguf", ".git"):
        assert word in submit.__doc__
        assert any(word.strip("/") in pattern for pattern in LEFT_OUT)
