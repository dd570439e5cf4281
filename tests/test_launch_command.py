"""What is started for a stage: on one machine, and on those of a hostfile."""

from pathlib import Path

from medai_nb.config import RunConfig
from medai_nb.pipeline import rank_count, rank_variables, stage_command
from medai_nb.run_folder import STAGES, RunFolder


def values_of(command: list[str], flag: str) -> list[str]:
    return [value for name, value in zip(command, command[1:]) if name == flag]


def test_one_machine_is_told_the_number_of_ranks_and_inherits_the_environment(tmp_path):
    command = stage_command(RunConfig(), STAGES["train"], RunFolder(tmp_path), 2)
    assert values_of(command, "--num_gpus") == ["2"] and values_of(command, "--module") == ["medai_nb.launch"]
    assert "--no_local_rank" in command and "--hostfile" not in command and "--environment" not in command


def test_machines_of_a_hostfile_are_told_the_variables_that_ssh_does_not_carry(tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.7")
    config = RunConfig.load({"hostfile": "hosts", "num_accelerators": 4})
    stage = STAGES["train"]
    command = stage_command(config, stage, RunFolder(tmp_path), rank_count(config, stage))
    assert values_of(command, "--hostfile") == ["hosts"] and values_of(command, "--master_addr") == [
        "10.0.0.7"
    ]
    carried = dict(item.split("=", 1) for item in values_of(command, "--environment"))
    assert carried == rank_variables(config, stage) and carried["HF_HUB_OFFLINE"] == "1"


def test_stages_of_one_rank_stay_on_this_machine_even_with_a_hostfile(tmp_path):
    config = RunConfig.load({"hostfile": "hosts", "num_accelerators": 4})
    command = stage_command(config, STAGES["prepare_data"], RunFolder(tmp_path), 1)
    assert "--hostfile" not in command and values_of(command, "--num_gpus") == ["1"]


def test_network_variable_is_left_alone_where_the_user_allows_the_network():
    allowed = RunConfig.load({"allow_network": True})
    assert "HF_HUB_OFFLINE" not in rank_variables(allowed, STAGES["train"])


def test_own_copies_of_the_stage_notebooks_are_used(tmp_path):
    (tmp_path / "04_train.ipynb").write_text("{}")
    config = RunConfig.load({"jobs_folder": str(tmp_path)})
    command = stage_command(config, STAGES["train"], RunFolder(tmp_path / "run"), 1)
    assert Path(values_of(command, "--notebook")[0]).parent == tmp_path
