"""scripts/slurm.sbatch with stubs in place of Slurm and Ray: who is started where, how a run ends, and what follows."""

import signal
from pathlib import Path

import pytest
from slurm_stubs import SlurmJob, ended


@pytest.fixture
def job(tmp_path: Path) -> SlurmJob:
    return SlurmJob(tmp_path)


def test_first_node_is_the_head_and_the_others_join_it(job: SlurmJob) -> None:
    code, stderr = job.run("my.yaml", "run.steps=5", CODE="0", RLHF_RAY_PORT="7000")
    assert (code, stderr) == (0, "")
    head, worker = job.wrote("ray-0")[0], job.wrote("ray-1")[0]
    assert head == "start --block --num-cpus=4 --disable-usage-stats --head --node-ip-address=10.1.2.3 --port=7000"
    assert worker == "start --block --num-cpus=5 --disable-usage-stats --address=10.1.2.3:7000"
    assert job.wrote("driver")[0] == "train my.yaml run.steps=5"
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1"} <= set(job.wrote("srun")[0].split())


def test_nodes_and_run_share_a_token_made_for_the_job(job: SlurmJob, tmp_path: Path) -> None:
    job.run("my.yaml", CODE="0")
    mode, token = job.wrote("ray-0")[1].split()
    assert mode == "token"
    assert len(token) == 64
    assert job.wrote("ray-1")[1] == f"token {token}"
    assert job.wrote("driver")[1] == f"10.1.2.3:6379 token {token}"
    other = SlurmJob(tmp_path / "other")
    other.run("my.yaml", CODE="0")
    assert other.wrote("ray-0")[1].split()[1] != token


def test_a_token_of_the_user_is_kept(job: SlurmJob) -> None:
    job.run("my.yaml", CODE="0", RAY_AUTH_TOKEN="mine")
    assert job.wrote("ray-1")[1] == job.wrote("ray-0")[1] == "token mine"


@pytest.mark.parametrize("address", ["127.0.1.1", ""], ids=["loopback", "unknown"])
def test_a_name_without_an_address_that_others_reach_is_not_used(job: SlurmJob, address: str) -> None:
    assert job.run("my.yaml", CODE="0", HEAD_ADDRESS=address) == (0, "")
    assert "--node-ip-address=10.9.9.9" in job.wrote("ray-0")[0]
    assert "--address=10.9.9.9:6379" in job.wrote("ray-1")[0]


def test_labels_part_training_nodes_from_the_others(tmp_path: Path) -> None:
    job = SlurmJob(tmp_path, nodes=3)
    job.run("my.yaml", CODE="0", RLHF_RAY_TRAIN_NODES="2")
    groups = [job.wrote(f"ray-{node}")[0].split("--labels=pool=")[1].split()[0] for node in range(3)]
    assert groups == ["train", "train", "rollout"]


@pytest.mark.parametrize("code", [0, 1, 2])
def test_exit_code_is_the_runs_and_the_nodes_end_with_it(job: SlurmJob, code: int) -> None:
    assert job.run("my.yaml", CODE=str(code))[0] == code
    assert job.wrote("ended") == ["ended", "ended"]
    assert job.wrote("scontrol") == []


def test_near_the_time_limit_the_run_ends_in_order_and_is_queued_again(job: SlurmJob) -> None:
    code, stderr = job.signalled(signal.SIGUSR1)
    assert code == 143
    assert job.wrote("driver")[-1] == "TERM"
    assert job.wrote("scontrol") == ["requeue 42"]
    assert stderr == ("slurm.sbatch: the time limit is near, ending the run\nslurm.sbatch: queueing the job again\n")


def test_a_run_that_is_told_to_end_is_not_queued_again(job: SlurmJob) -> None:
    code, stderr = job.signalled(signal.SIGTERM)
    assert code == 143
    assert job.wrote("driver")[-1] == "TERM"
    assert job.wrote("scontrol") == []
    assert stderr == "slurm.sbatch: SIGTERM came, ending the run\n"


def test_a_run_that_finishes_as_its_time_ends_is_not_queued_again(job: SlurmJob) -> None:
    assert job.signalled(signal.SIGUSR1, CODE_AT_TERM="0")[0] == 0
    assert job.wrote("scontrol") == []


def test_a_limit_that_comes_before_the_run_starts_is_an_error(job: SlurmJob) -> None:
    process = job.start("my.yaml", LOST_NODE="1")
    job.wait_until("ray-0", process)
    process.send_signal(signal.SIGUSR1)
    code, stderr = ended(process)
    assert code == 1
    assert "give sbatch a longer --time" in stderr
    assert job.wrote("scontrol") == job.wrote("driver") == []


def test_queueing_again_has_a_limit(job: SlurmJob) -> None:
    stderr = job.signalled(signal.SIGUSR1, RLHF_RAY_MAX_REQUEUES="3", SLURM_RESTART_COUNT="3")[1]
    assert job.wrote("scontrol") == []
    assert "queued again 3 times (RLHF_RAY_MAX_REQUEUES)" in stderr


def test_a_node_that_does_not_join_is_waited_for_within_a_limit(job: SlurmJob) -> None:
    code, stderr = job.run("my.yaml", LOST_NODE="1", AFTER="ray-0", RLHF_RAY_START_TIMEOUT="0")
    assert code == 1
    assert "2 nodes have not joined within 0 s, only ['ray-0']" in stderr
    assert "RLHF_RAY_START_TIMEOUT" in stderr
    assert job.wrote("driver") == []
    assert job.wrote("ended") == ["ended"]


def test_ray_that_has_ended_everywhere_is_not_waited_for(tmp_path: Path) -> None:
    job = SlurmJob(tmp_path, nodes=1)
    code, stderr = job.run("my.yaml", LOST_NODE="0")
    assert code == 1
    assert stderr == "slurm.sbatch: Ray has ended on the nodes while they were waited for\n"


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {}, "usage: sbatch"),
        (["my.yaml"], {"SLURM_JOB_ID": ""}, "give it to sbatch"),
        (["my.yaml"], {"RLHF_RAY_VENV": "/nowhere"}, "/nowhere/bin has no rlhf-ray"),
    ],
)
def test_what_is_missing_is_said(
    job: SlurmJob, arguments: list[str], environment: dict[str, str], message: str
) -> None:
    code, stderr = job.run(*arguments, **environment)
    assert code == 1
    assert message in stderr
