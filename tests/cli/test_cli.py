"""Help, checks and messages of the commands. `train` gets a stand-in for the job, so that no cluster starts."""

import ast
import json
import logging
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import Result

from rlhf_ray.cli.failures import exit_code, message_of
from rlhf_ray.cli.quiet import quiet_libraries
from rlhf_ray.cluster.daemons import ClusterLost, Terminated
from rlhf_ray.config.loading import ConfigError, dump_config, load_config
from rlhf_ray.data.prepare import ITEMS
from rlhf_ray.recovery.checkpoints import CheckpointStore
from rlhf_ray.recovery.seal import CheckpointError
from rlhf_ray.rewards.errors import RewardError

REPOSITORY = Path(__file__).parents[2]
PPO, REWARD = REPOSITORY / "configs/tiny.yaml", REPOSITORY / "configs/tiny_reward.yaml"
SFT, GRPO = REPOSITORY / "configs/tiny_sft.yaml", REPOSITORY / "configs/tiny_grpo.yaml"

RunCli = Callable[..., Result]


@pytest.fixture
def of_reward(prepared: Path, tmp_path: Path) -> list[str]:
    """Overrides that lead the reward-model config to what was prepared."""
    return [
        f"reward.model={prepared}/models/tiny",
        f"data.train={prepared}/data/tiny_pairs_train.jsonl",
        f"data.eval={prepared}/data/tiny_pairs_eval.jsonl",
        f"run.dir={tmp_path}/run",
    ]


@pytest.fixture
def of_ppo(prepared: Path, tmp_path: Path) -> list[str]:
    """Overrides that lead the PPO config to what was prepared."""
    return [
        f"policy.model={prepared}/models/tiny",
        f"reward.0.model={prepared}/models/tiny-reward",
        f"data.prompts={prepared}/data/tiny_prompts.jsonl",
        f"run.dir={tmp_path}/run",
    ]


@pytest.fixture
def instead_of_train(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a function in the place of `rlhf_ray.controllers.train.train`."""

    def put(train: Callable[..., Path]) -> None:
        module = SimpleNamespace(train=lambda config, last_words: train(config))
        monkeypatch.setitem(sys.modules, "rlhf_ray.controllers.train", module)  # type: ignore[arg-type]

    return put


def write_rows(run_dir: Path, rows: list[dict[str, float]]) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({"step": step, **row}) + "\n" for step, row in enumerate(rows, start=1))
    (run_dir / "metrics.jsonl").write_text(text)


def write_checkpoint(run_dir: Path, step: int) -> None:
    store = CheckpointStore(run_dir, keep_last=9, keep_best=None)
    store.begin(step)
    store.commit(step, {}, {})


# --- help


def test_help_imports_nothing_heavy_and_is_quick() -> None:
    code = (
        "import sys\n"
        "from rlhf_ray.cli.app import main\n"
        "for command in ([], ['prepare'], ['validate'], ['train'], ['export'], ['status']):\n"
        "    try:\n"
        "        main([*command, '--help'])\n"
        "    except SystemExit as ended:\n"
        "        assert not ended.code\n"
        "heavy = {'torch', 'ray', 'vllm', 'deepspeed', 'transformers', 'datasets', 'matplotlib', 'numpy'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    # Processor time, since the machine may be busy with other things; this is for six helps.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


@pytest.mark.parametrize("command", ["prepare", "validate", "train", "export", "status"])
def test_help_of_each_command_has_examples_of_it(cli: RunCli, command: str) -> None:
    done = cli(command, "--help")
    assert done.exit_code == 0
    assert f"\n    rlhf-ray {command}" in done.stdout


@pytest.mark.parametrize("command", ["validate", "train"])
def test_help_shows_how_to_override(cli: RunCli, command: str) -> None:
    text = " ".join(cli(command, "--help").stdout.split())
    assert "CONFIG" in text
    assert "[KEY=VALUE]..." in text
    assert "policy.optimizer.lr=1e-5" in text
    assert "reward.0.weight=0.5" in text


def test_help_of_prepare_names_every_item(cli: RunCli) -> None:
    text = "".join(cli("prepare", "--help").stdout.split())
    assert [name for name in ITEMS if name not in text] == []


def test_version(cli: RunCli) -> None:
    done = cli("--version")
    assert done.exit_code == 0
    assert done.stdout.startswith("rlhf-ray ")


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train"], ["train", "a.yaml", "--steps"], ["export", "runs/a"]])
def test_wrong_arguments_exit_with_2(cli: RunCli, arguments: list[str]) -> None:
    done = cli(*arguments)
    assert done.exit_code == 2
    assert "Traceback" not in done.output


# --- prepare


def test_prepare_says_what_it_made_and_what_it_reused(cli: RunCli, tmp_path: Path) -> None:
    first = cli("prepare", "--only", "tiny", "--dir", tmp_path)
    assert first.exit_code == 0, first.output
    rows = [line.split("  ") for line in first.stdout.splitlines()]
    assert [row[0] for row in rows] == ["tiny"] * len(ITEMS["tiny"].outputs)
    assert all(row[1].startswith("made in ") for row in rows)
    assert [Path(row[-1].strip()) for row in rows] == [tmp_path / output for output in ITEMS["tiny"].outputs]

    again = cli("prepare", "--only", "tiny", "--dir", tmp_path)
    assert [line.split("  ")[1] for line in again.stdout.splitlines()] == ["reused"] * len(ITEMS["tiny"].outputs)


def test_prepare_makes_again_when_forced(cli: RunCli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []
    monkeypatch.setattr(
        "rlhf_ray.data.prepare.prepare", lambda target, **options: asked.append((target, options)) or []
    )
    assert cli("prepare", "--only", "tiny", "--only", "movie-pairs", "--dir", tmp_path, "--force").exit_code == 0
    assert cli("prepare").exit_code == 0
    assert asked == [
        (tmp_path, {"only": {"tiny", "movie-pairs"}, "force": True}),
        (Path("."), {"only": None, "force": False}),
    ]


def test_prepare_refuses_an_unknown_item(cli: RunCli, tmp_path: Path) -> None:
    done = cli("prepare", "--only", "tiyn", "--dir", tmp_path)
    assert done.exit_code == 2
    assert "no such item as 'tiyn'. Did you mean 'tiny'?" in done.stderr


def test_prepare_exits_with_1_when_an_item_fails(cli: RunCli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("rlhf_ray.models.tiny.build_tiny_model", lambda folder: 1 / 0)
    done = cli("prepare", "--only", "tiny", "--dir", tmp_path)
    assert done.exit_code == 1
    assert "error: prepare tiny: building it failed: ZeroDivisionError" in done.stderr
    assert "Traceback" not in done.stderr


# --- validate


def test_validate_sums_up_a_reward_model_job(cli: RunCli, of_reward: list[str], prepared: Path) -> None:
    done = cli("validate", REWARD, *of_reward)
    assert done.exit_code == 0, done.output
    lines = dict(line.split("  ", 1) for line in done.stdout.splitlines()[:-1])
    facts = {label.strip(): value.strip() for label, value in lines.items()}
    assert facts["job"] == "reward_model 'tiny-reward', seed 7"
    assert facts["steps"] == "8 (2 epochs), 16 pairs a step"
    assert facts["reward"] == f"{prepared}/models/tiny · float32, ZeRO stage 2 · 1 rank with 1 CPU"
    assert facts["pairs"] == "64 kept, 0 dropped, 0 truncated"
    assert facts["held-out pairs"] == "32 kept, 0 dropped, 0 truncated"
    assert done.stdout.splitlines()[-1] == "valid"
    (unused,) = done.stderr.splitlines()
    assert "64 of 64 rows have a margin, which the loss leaves out" in unused


def test_validate_sums_up_a_fine_tuning_job(cli: RunCli, prepared: Path, tmp_path: Path) -> None:
    done = cli(
        "validate",
        SFT,
        f"policy.model={prepared}/models/tiny",
        f"data.train={prepared}/data/tiny_chats_train.jsonl",
        f"data.eval={prepared}/data/tiny_chats_eval.jsonl",
        f"run.dir={tmp_path}/run",
    )
    assert done.exit_code == 0, done.output
    facts = dict(map(str.strip, line.split("  ", 1)) for line in done.stdout.splitlines()[:-1])
    assert facts["job"] == "sft 'tiny-sft', seed 7"
    assert facts["steps"] == "6 (2 epochs), 16 rows a step"
    assert facts["policy"] == f"{prepared}/models/tiny · float32, ZeRO stage 2 · 1 rank with 1 CPU"
    assert facts["rows"] == "48 kept, 0 dropped, 0 truncated"
    assert facts["held-out rows"] == "16 kept, 0 dropped, 0 truncated"


def test_validate_sums_up_a_ppo_job(cli: RunCli, of_ppo: list[str], prepared: Path, tmp_path: Path) -> None:
    sizes = ["data.samples_per_prompt=2", "placement.policy.ranks=2", "placement.rollout.engines=2", "seed=3"]
    done = cli("validate", PPO, *of_ppo, *sizes)
    assert done.exit_code == 0, done.output
    tiny = f"{prepared}/models/tiny"
    for line in (
        "job               ppo 'tiny', seed 3",
        "steps             4, 32 samples a step (16 prompts × 2)",
        f"policy            {tiny} · float32, ZeRO stage 2 · 2 ranks with 0.5 CPU each",
        f"critic            from {tiny}-reward · float32, ZeRO stage 2 · 1 rank with 0.5 CPU",
        f"reference         {tiny} · float32 · 2 ranks beside policy",
        f"reward/sentiment  {tiny}-reward · float32 · 1 rank beside critic · weight 1",
        "rollout           float32 · 2 engines with 1 CPU each",
        "prompts           64 kept, 0 dropped, 0 truncated",
        f"run               {tmp_path}/run",
        "valid",
    ):
        assert line in done.stdout.splitlines()


def test_validate_sums_up_a_grpo_job_as_four_roles_without_a_critic(
    cli: RunCli, of_ppo: list[str], prepared: Path
) -> None:
    done = cli("validate", GRPO, *of_ppo)
    assert done.exit_code == 0, done.output
    facts = dict(map(str.strip, line.split("  ", 1)) for line in done.stdout.splitlines()[:-1])
    tiny = f"{prepared}/models/tiny"
    assert facts["job"] == "ppo 'tiny-grpo', seed 7"
    assert facts["steps"] == "4, 16 samples a step (4 prompts × 4)"
    assert {label: fact for label, fact in facts.items() if " · " in fact} == {
        "policy": f"{tiny} · float32, ZeRO stage 2 · 1 rank with 0.5 CPU",
        "reference": f"{tiny} · float32 · 1 rank beside policy",
        "reward/sentiment": f"{tiny}-reward · float32 · 1 rank beside policy · weight 1",
        "rollout": "float32 · 1 engine with 1 CPU",
    }
    assert "critic" not in done.stdout
    assert done.stdout.splitlines()[-1] == "valid"


def test_validate_counts_prompts_over_the_budget(cli: RunCli, of_ppo: list[str], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = ["The film was", "The actor played the part of the king, and " * 9, "I think that the music"]
    prompts.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    done = cli(
        "validate", PPO, *of_ppo, f"data.prompts={prompts}", "data.prompts_per_step=2", "rollout.shard_samples=2"
    )
    assert done.exit_code == 0, done.output
    assert "prompts           2 kept, 1 dropped, 0 truncated" in done.stdout


def test_validate_says_what_train_would_go_on_from(cli: RunCli, of_reward: list[str], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", 4)
    assert "has a checkpoint of step 4: train goes on from it" in cli("validate", REWARD, *of_reward).stdout
    done = cli("validate", REWARD, *of_reward, "run.resume=never")
    assert "has a checkpoint of step 4: train refuses it" in done.stdout


def test_validate_gives_every_schema_problem_its_own_line(cli: RunCli) -> None:
    done = cli("validate", PPO, "policy.modle=x", "run.stpes=3", "algorithm.clip=wide")
    assert done.exit_code == 2
    first, *others = done.stderr.splitlines()
    assert first == f"error: {PPO} has 3 problems"
    assert "  policy.modle: unknown key; did you mean 'model'?" in others
    assert "  run.stpes: unknown key; did you mean 'steps'?" in others
    assert any(line.startswith("  algorithm.clip: ") for line in others)
    assert len(others) == 3
    assert done.stdout == ""


def test_validate_names_a_missing_file_and_a_bad_override(cli: RunCli, tmp_path: Path) -> None:
    done = cli("validate", tmp_path / "none.yaml")
    assert (done.exit_code, done.stderr) == (2, f"error: {tmp_path}/none.yaml: no such file\n")
    done = cli("validate", PPO, "run.steps")
    assert done.exit_code == 2
    assert "'run.steps' is not of the form section.key=value" in done.stderr


def test_validate_names_a_missing_model_folder(cli: RunCli, of_ppo: list[str], tmp_path: Path) -> None:
    done = cli("validate", PPO, *of_ppo, f"policy.model={tmp_path}/gone", f"reward.0.model={tmp_path}/gone-too")
    assert done.exit_code == 2
    first, *others = done.stderr.splitlines()
    assert first.startswith(f"error: {PPO} has ")
    assert any(line.startswith(f"  policy.model: model '{tmp_path}/gone': no such folder") for line in others)
    assert any(line.startswith(f"  reward.0: model '{tmp_path}/gone-too': no such folder") for line in others)


def test_validate_names_bad_rows_by_file_and_line(cli: RunCli, of_ppo: list[str], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "fine"}\n{"prompt": 3}\nnot json\n')
    done = cli("validate", PPO, *of_ppo, f"data.prompts={bad}")
    assert done.exit_code == 2
    assert f"error: {PPO}: data.prompts: {bad}: 2 rows can't be used" in done.stderr
    assert f"\n  {bad}:2: 'prompt' is a number" in done.stderr
    assert f"\n  {bad}:3: is not JSON" in done.stderr
    assert f"{bad}:1:" not in done.stderr


def test_validate_finds_reward_functions_in_the_current_folder(
    cli: RunCli, of_ppo: list[str], prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "words_of_mine.py").write_text("def score(prompts, responses):\n    return [0.0] * len(prompts)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    own = ["reward=[{function: 'words_of_mine:score', workers: 2}]", f"critic.init_from={prepared}/models/tiny"]
    done = cli("validate", PPO, *of_ppo, *own)
    assert done.exit_code == 0, done.output
    assert "reward/words_of_mine  words_of_mine:score · 2 workers · weight 1" in done.stdout

    done = cli("validate", PPO, *of_ppo, "reward=[{function: 'words_of_nobody:score'}]", own[1])
    assert done.exit_code == 2
    assert "reward.0: reward 'words_of_nobody'" in done.stderr


def test_schema_only_opens_nothing(cli: RunCli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rlhf_ray.controllers.inputs", None)
    done = cli("validate", PPO, "policy.model=/gone", "data.prompts=/gone.jsonl", "--schema-only")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1].startswith("valid, as far as the schema goes")
    assert cli("validate", PPO, "seed=-1", "--schema-only").exit_code == 2


def test_verbose_shows_where_an_error_came_from(cli: RunCli) -> None:
    assert "Traceback" not in cli("validate", "none.yaml").stderr
    done = cli("-v", "validate", "none.yaml")
    assert done.exit_code == 2
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.endswith("error: none.yaml: no such file\n")


@pytest.mark.parametrize("config", sorted(REPOSITORY.glob("configs/*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_fit_the_schema(cli: RunCli, config: Path) -> None:
    done = cli("validate", config, "--schema-only")
    assert done.exit_code == 0, done.output


# --- train


def test_train_shows_reward_kl_and_results_of_ppo(
    cli: RunCli, of_ppo: list[str], tmp_path: Path, instead_of_train: Callable[..., None]
) -> None:
    run_dir = tmp_path / "run"

    def train(config: object) -> Path:
        rows = [
            {"reward/mean": step / 10, "reward/sentiment": step / 10, "reward/vader": step / 100, "kl/mean": 2.0}
            for step in range(10)
        ]
        write_rows(run_dir, rows)
        for name in ("curves.png", "samples.jsonl", "before_after.md"):
            (run_dir / name).write_text("x")
        (run_dir / "export").mkdir()
        (run_dir / "failure.txt").write_text("of the first try")
        write_checkpoint(run_dir, 5)
        write_checkpoint(run_dir, 10)
        return run_dir

    instead_of_train(train)
    config = tmp_path / "two_parts.yaml"
    config.write_text(
        PPO.read_text().replace("\nrollout:", "\n  - {function: 'a.vader:score', weight: 0}\nrollout:", 1)
    )
    done = cli("train", config, *of_ppo)
    assert done.exit_code == 0, done.output
    lines = {line.split("  ")[0]: line.split("  ")[-1].strip() for line in done.stdout.splitlines()}
    assert lines["reward"] == (
        "mean reward 0.200 in the first 5 steps, 0.700 in the last (+0.500), KL 2.00 nats per response"
    )
    assert lines["reward/vader"] == "0.020 → 0.070 (+0.050) (never trained on)"
    assert lines["reward/sentiment"] == "0.200 → 0.700 (+0.500)"
    assert lines["metrics"] == str(run_dir / "metrics.jsonl")
    assert lines["curves"] == str(run_dir / "curves.png")
    assert lines["samples"] == str(run_dir / "samples.jsonl")
    assert lines["before and after"] == str(run_dir / "before_after.md")
    assert lines["model"] == str(run_dir / "export")
    assert lines["checkpoints"] == f"{run_dir}/checkpoints (steps 5, 10)"
    assert "trace" not in lines
    assert not (run_dir / "failure.txt").exists()


def test_train_shows_the_held_out_accuracy_of_a_reward_model(
    cli: RunCli, of_reward: list[str], tmp_path: Path, instead_of_train: Callable[..., None]
) -> None:
    run_dir = tmp_path / "run"
    rows = [{"eval/accuracy": 0.5}, {"train/accuracy": 1.0}, {"eval/accuracy": 0.75}]

    def train(config: object) -> Path:
        write_rows(run_dir, rows)
        (run_dir / "samples.jsonl").touch()
        (run_dir / "reward_report.md").write_text("# Reward model\n")
        return run_dir

    instead_of_train(train)
    done = cli("train", REWARD, *of_reward)
    assert done.exit_code == 0, done.output
    assert f"report             {run_dir}/reward_report.md" in done.stdout.splitlines()
    assert "held-out accuracy  0.750 after step 3 (0.500 after step 1)" in done.stdout.splitlines()
    assert "samples" not in done.stdout  # an empty file is no result
    rows[:] = [{"train/accuracy": 1.0}]
    assert "held-out accuracy  not measured: data.eval is not set" in cli("train", REWARD, *of_reward).stdout


def test_train_gets_the_config_with_overrides(
    cli: RunCli, of_ppo: list[str], tmp_path: Path, instead_of_train: Callable[..., None]
) -> None:
    seen = []

    def train(config: object) -> Path:
        seen.append(config)
        write_rows(tmp_path / "run", [{"reward/mean": 1.0}])
        return tmp_path / "run"

    instead_of_train(train)
    assert cli("train", PPO, *of_ppo, "policy.optimizer.lr=5e-4").exit_code == 0
    assert "lr: 0.0005" in dump_config(seen[0])


def test_bad_config_found_by_train_exits_with_2(
    cli: RunCli, of_ppo: list[str], tmp_path: Path, instead_of_train: Callable[..., None]
) -> None:
    (tmp_path / "run").mkdir()

    def train(config: object) -> Path:
        raise ConfigError("preflight", ["policy.model: is gone", "data.prompts: is gone"])

    instead_of_train(train)
    done = cli("train", PPO, *of_ppo)
    assert done.exit_code == 2
    assert done.stderr.endswith(f"error: {PPO} has 2 problems\n  policy.model: is gone\n  data.prompts: is gone\n")
    assert not (tmp_path / "run/failure.txt").exists()


def test_a_failed_run_exits_with_1_and_keeps_its_traceback_in_a_file(
    cli: RunCli, of_ppo: list[str], tmp_path: Path, instead_of_train: Callable[..., None]
) -> None:
    run_dir = tmp_path / "run"
    remote = "\x1b[36mray::PolicyWorker.update()\x1b[39m (pid=7)\n  File 'policy.py', line 3, in update\nKeyError: 3"

    def train(config: object) -> Path:
        run_dir.mkdir()
        raise RewardError("words", f"it raised KeyError: 3\n{remote}")

    instead_of_train(train)
    done = cli("train", PPO, *of_ppo)
    assert done.exit_code == 1
    last = f"error: reward 'words': it raised KeyError: 3\nThe traceback is in {run_dir}/failure.txt.\n"
    assert done.stderr.endswith(last)
    assert "ray::" not in done.stderr
    report = (run_dir / "failure.txt").read_text()
    assert remote in report
    assert "Traceback (most recent call last)" in report


def test_an_unforeseen_error_keeps_its_traceback(
    cli: RunCli, of_ppo: list[str], tmp_path: Path, instead_of_train: Callable[..., None]
) -> None:
    def train(config: object) -> Path:
        raise ZeroDivisionError("a bug")

    instead_of_train(train)
    done = cli("train", PPO, *of_ppo)
    assert done.exit_code == 1
    assert isinstance(done.exception, ZeroDivisionError)  # which Python shows with its traceback
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("checkpoint", "overrides", "expected"),
    [
        (True, [], "interrupted; the same command resumes it from the checkpoint of step 6"),
        (True, ["run.resume=never"], "interrupted; to go on from step 6, give the same command with run.resume=auto"),
        (False, [], "interrupted; there is no checkpoint yet, so the same command starts again from the beginning"),
    ],
)
def test_an_interrupted_run_says_how_to_go_on(
    cli: RunCli,
    of_ppo: list[str],
    tmp_path: Path,
    instead_of_train: Callable[..., None],
    checkpoint: bool,
    overrides: list[str],
    expected: str,
) -> None:
    def train(config: object) -> Path:
        if checkpoint:
            write_checkpoint(tmp_path / "run", 6)
        raise KeyboardInterrupt

    instead_of_train(train)
    done = cli("train", PPO, *of_ppo, *overrides)
    assert done.exit_code == 130
    assert done.stderr.splitlines()[-1] == expected
    assert "Traceback" not in done.stderr


def test_sigterm_says_how_to_resume_and_has_its_own_exit_code(
    cli: RunCli, of_ppo: list[str], instead_of_train: Callable[..., None]
) -> None:
    def train(config: object) -> Path:
        raise Terminated

    instead_of_train(train)
    done = cli("train", PPO, *of_ppo)
    assert done.exit_code == 143
    assert done.stderr.splitlines()[-1].startswith("terminated; there is no checkpoint yet")


def test_a_run_whose_cluster_is_gone_ends_with_its_last_words(
    cli: RunCli, of_ppo: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are said from a thread, since the controller hangs in Ray then."""
    codes = []

    def train(config: object, last_words: Callable[[BaseException], int]) -> Path:
        write_checkpoint(tmp_path / "run", 6)
        codes.extend([last_words(Terminated(signal.SIGHUP)), last_words(ClusterLost("raylet (process 7) has ended"))])
        raise Terminated

    monkeypatch.setitem(sys.modules, "rlhf_ray.controllers.train", SimpleNamespace(train=train))  # type: ignore[arg-type]
    done = cli("train", PPO, *of_ppo)
    assert codes == [129, 1]
    hung_up, lost, _ = done.stderr.splitlines()[-3:]
    assert hung_up == "terminated; the same command resumes it from the checkpoint of step 6"
    assert lost == "error: raylet (process 7) has ended; the same command resumes it from the checkpoint of step 6"


def test_other_commands_can_be_interrupted_too(cli: RunCli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rlhf_ray.data.prepare.prepare", interrupted)
    done = cli("prepare")
    assert (done.exit_code, done.stderr) == (130, "interrupted\n")


# --- errors and noise


@pytest.mark.parametrize("name", ["ConfigError", "ExportError", "ResumeError"])
def test_errors_that_mean_bad_input_exist_and_exit_with_2(name: str) -> None:
    trees = (ast.parse(path.read_text()) for path in (REPOSITORY / "rlhf_ray").rglob("*.py"))
    assert name in {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    narrower = type("Narrower", (type(name, (Exception,), {}),), {})
    assert exit_code(narrower("x")) == 2


def test_other_errors_exit_with_1() -> None:
    assert exit_code(CheckpointError(Path("a"), "b")) == 1


def test_a_message_is_all_of_the_error_when_it_has_no_traceback() -> None:
    error = RewardError("words", "first line\n  second line")
    error.add_note("and a note")
    assert message_of(error) == "reward 'words': first line\n  second line\nand a note"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("DeepSpeed", "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it."),
        (
            "ray._private.authentication.authentication_token_setup",
            "Token authentication is enabled for this Ray cluster. Set RAY_AUTH_MODE=disabled to opt out.",
        ),
    ],
)
def test_library_noise_is_heard_with_verbose_only(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def passes(text: str) -> bool:
        return bool(logging.getLogger(name).filter(logging.LogRecord(name, logging.WARNING, "", 0, text, (), None)))

    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    try:
        quiet_libraries(verbose=False)
        assert not passes(message)
        assert passes("Something that matters")
    finally:
        quiet_libraries(verbose=True)
        monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    assert passes(message)


AUTO = ("policy.engine.dtype=auto", "critic.engine.dtype=auto", "reward.0.engine.dtype=auto")


def test_validate_says_what_the_machine_computes_in_and_why(
    cli: RunCli, of_ppo: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    done = cli("validate", PPO, *of_ppo, *AUTO)
    assert done.exit_code == 0, done.output
    assert "· float32, ZeRO stage 2 ·" in done.stdout
    told = next(line for line in done.stdout.splitlines() if line.startswith("dtype auto"))
    assert told.split("  ")[-1].strip() == (
        "float32 for policy.engine, critic.engine, reward.0.engine, rollout.engine: the CPU of this machine is held to "
        "AVX2 by ONEDNN_MAX_CPU_ISA"
    )
    done = cli("validate", PPO, *of_ppo, "policy.engine.dtype=bfloat16")
    warnings = [line for line in done.stdout.splitlines() if line.startswith("warning")]
    assert len(warnings) == 2, "policy and engines"
    assert "policy.engine.dtype is bfloat16, but the CPU of this machine is held to AVX2" in warnings[0]
    assert "4 to 60 times as long as in float32" in warnings[0]


@pytest.mark.parametrize("where", [["--schema-only"], ["cluster.address=10.0.0.1:6379"]])
def test_validate_does_not_guess_at_machines_that_it_does_not_see(
    cli: RunCli, of_ppo: list[str], where: list[str]
) -> None:
    done = cli("validate", PPO, *of_ppo, *AUTO, *where)
    assert done.exit_code == 0, done.output
    told = "for policy.engine, critic.engine, reward.0.engine, rollout.engine: chosen at the start, by the CPUs that"
    assert told in done.stdout


def test_a_run_that_goes_on_keeps_its_number_formats(
    cli: RunCli, of_ppo: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    run = tmp_path / "run"
    run.mkdir()
    before = load_config(PPO, [*of_ppo, *(key.replace("auto", "bfloat16") for key in AUTO)])
    (run / "config.yaml").write_text(dump_config(before))
    assert "· float32, ZeRO" in cli("validate", PPO, *of_ppo, *AUTO).stdout, "there is no checkpoint to go on from"
    write_checkpoint(run, 1)
    done = cli("validate", PPO, *of_ppo, *AUTO)
    assert "· bfloat16, ZeRO" in done.stdout
    assert f"as in {run}/config.yaml, from which the run goes on" in done.stdout
    assert "policy.engine.dtype is bfloat16, but the CPU of this machine is held to AVX2" in done.stdout
    assert "· float32, ZeRO" in cli("validate", PPO, *of_ppo, *AUTO, "run.resume=never").stdout
