"""What is started for a stage: on one machine, and on those of a hostfile."""

import base64
import json
from pathlib import Path

import pytest

from medai_nb.config import ConfigError, RunConfig
from medai_nb.pipeline import rank_count, rank_variables, stage_command, with_hostfile_ranks
from medai_nb.run_folder import STAGES, RunFolder


def values_of(command: list[str], flag: str) -> list[str]:
    return [value for name, value in zip(command, command[1:]) if name == flag]


@pytest.fixture(autouse=True)
def outside_of_a_job(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def devices_of(command: list[str]) -> list:
    """What deepspeed's launcher starts a rank on, each."""
    (world,) = values_of(command, "--world_info")
    return json.loads(base64.urlsafe_b64decode(world))["localhost"]


@pytest.fixture
def hosts(tmp_path) -> str:
    (tmp_path / "hosts").write_text("node-a slots=2\nnode-b slots=2\n")
    return str(tmp_path / "hosts")


def test_one_machine_is_told_the_number_of_ranks_and_inherits_the_environment(tmp_path):
    command = stage_command(RunConfig(), STAGES["train"], RunFolder(tmp_path), 2)
    assert devices_of(command) == [0, 1] and values_of(command, "--module") == ["medai_nb.launch"]
    assert "--no_local_rank" in command and "--hostfile" not in command and "--environment" not in command


@pytest.mark.parametrize(
    ("visible", "devices"),
    [
        ("3,1", ["3", "1"]),
        ("5, 4,0", ["5", "4"]),
        ("GPU-a1,GPU-b2", ["GPU-a1", "GPU-b2"]),
        ("0", [0, 1]),
        ("", [0, 1]),
    ],
)
def test_ranks_are_put_on_the_gpus_that_the_user_left_visible(tmp_path, monkeypatch, visible, devices):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices_of(stage_command(RunConfig(), STAGES["train"], RunFolder(tmp_path), 2)) == devices


def test_a_hostfile_is_left_to_the_runner_of_deepspeed(tmp_path, hosts):
    config = RunConfig.load({"hostfile": hosts})
    command = stage_command(config, STAGES["train"], RunFolder(tmp_path), 4)
    assert "deepspeed.launcher.runner" in command and "--world_info" not in command


def test_machines_of_a_hostfile_are_told_the_variables_that_ssh_does_not_carry(tmp_path, monkeypatch, hosts):
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.7")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("HF_HOME", "$(touch x)")
    config = RunConfig.load({"hostfile": hosts, "num_accelerators": 4})
    stage = STAGES["train"]
    command = stage_command(config, stage, RunFolder(tmp_path), rank_count(config, stage))
    assert values_of(command, "--hostfile") == [hosts] and values_of(command, "--master_addr") == ["10.0.0.7"]
    carried = dict(item.split("=", 1) for item in values_of(command, "--environment"))
    assert carried == rank_variables(config, stage, 4) and carried["HF_HUB_OFFLINE"] == "1"
    assert carried["GLOO_SOCKET_IFNAME"] == "ib0" and not {"HF_TOKEN", "HF_HOME"} & carried.keys()


def test_job_of_slurm_starts_the_machines_by_srun(tmp_path, monkeypatch, hosts):
    (tmp_path / "srun").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "16")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    config, stage = RunConfig.load({"hostfile": hosts}), STAGES["train"]
    command = stage_command(config, stage, RunFolder(tmp_path), rank_count(config, stage))
    assert command[0] == "srun" and {"--nodes=2", "--cpus-per-task=16"} <= set(command)
    assert values_of(command, "--master_addr") == ["node-a"] and "--no_ssh" in command
    alone = stage_command(config, STAGES["prepare_data"], RunFolder(tmp_path), 1)
    assert "srun" not in alone


def test_hostfile_says_how_many_ranks_there_are_and_another_number_is_refused(hosts):
    config = RunConfig.load({"hostfile": hosts})
    assert rank_count(config, STAGES["train"]) == 4 and rank_count(config, STAGES["plan_lora"]) == 1
    assert with_hostfile_ranks(config).launch.num_accelerators == 4
    assert with_hostfile_ranks(RunConfig()) == RunConfig()
    with pytest.raises(ConfigError, match="launch.num_accelerators is 3 and .*hosts has 4 ranks"):
        with_hostfile_ranks(RunConfig.load({"hostfile": hosts, "num_accelerators": 3}))


def test_threads_are_divided_among_the_ranks_of_one_machine(hosts, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("medai_nb.pipeline.usable_cores", lambda: 8)
    config = RunConfig.load({"hostfile": hosts})
    assert rank_variables(config, STAGES["train"], 4)["OMP_NUM_THREADS"] == "4"
    assert rank_variables(RunConfig(), STAGES["train"], 4)["OMP_NUM_THREADS"] == "2"


def test_stages_of_one_rank_stay_on_this_machine_even_with_a_hostfile(tmp_path, hosts):
    config = RunConfig.load({"hostfile": hosts, "num_accelerators": 4})
    command = stage_command(config, STAGES["prepare_data"], RunFolder(tmp_path), 1)
    assert command[1:3] == ["-m", "medai_nb.launch"], "no launcher stands between"
    assert "--hostfile" not in command and values_of(command, "--parameter") == [f"run_dir={tmp_path}"]


def test_network_variable_is_left_alone_where_the_user_allows_the_network(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    allowed = RunConfig.load({"allow_network": True})
    assert "HF_HUB_OFFLINE" not in rank_variables(allowed, STAGES["train"], 1)


def test_own_copies_of_the_stage_notebooks_are_used(tmp_path):
    (tmp_path / "04_train.ipynb").write_text("{}")
    config = RunConfig.load({"jobs_folder": str(tmp_path)})
    command = stage_command(config, STAGES["train"], RunFolder(tmp_path / "run"), 1)
    assert Path(values_of(command, "--notebook")[0]).parent == tmp_path
