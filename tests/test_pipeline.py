"""The six stages end to end with a tiny random model, through the real launcher."""

import json
import math

import nbformat
import pytest
from sandbox import Sandbox

STAGES = ["prepare_data", "protect_phi", "plan_lora", "train", "evaluate", "export"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def completed(tmp_path_factory, tiny_llama) -> Sandbox:
    """A sandbox in which all six stages have completed."""
    sandbox = Sandbox(tmp_path_factory.mktemp("completed"), tiny_llama)
    sandbox.prepare()
    code, output = sandbox.execute()
    assert code == 0, output
    sandbox.first_output = output
    return sandbox


def training_losses(sandbox: Sandbox) -> list[float]:
    history = json.loads((sandbox.run / "train" / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_all_stages_complete_and_leave_what_the_design_promises(completed):
    state = completed.state
    assert state["state"] == "completed"
    assert {name: stage["state"] for name, stage in state["stages"].items()} == dict.fromkeys(
        STAGES, "completed"
    )
    for file in (
        "run.yaml",
        "data/data_report.json",
        "protected/certificate.json",
        "protected/audit.jsonl",
        "lora/plan.json",
        "train/lora_adapter/adapter_model.safetensors",
        "train/trainer_state.json",
        "train/curves.png",
        "evaluation/metrics.json",
        "evaluation/predictions.parquet",
        "release/metadata.json",
        "release/README.md",
        "release/lora_adapter/adapter_model.safetensors",
        "notebooks/04_train.ipynb",
        "notebooks/05_evaluate.html",
    ):
        assert (completed.run / file).is_file(), file
    assert list(completed.run.glob(".*.partial")) == []
    assert completed.processes() == []


def test_run_ends_with_base_beside_tuned_and_where_to_look(completed):
    assert "base" in completed.first_output and "tuned" in completed.first_output
    assert str(completed.run / "notebooks") in completed.first_output


def test_second_run_skips_every_stage(completed):
    before = completed.state["stages"]
    code, output = completed.execute()
    assert code == 0 and output.count("up to date") == 6
    assert completed.state["stages"] == before


def test_changed_setting_runs_what_depends_on_it_and_nothing_else(completed):
    code, output = completed.execute("--dry_run", "-p", "evaluation.bootstrap_samples=200")
    planned = {line.split()[0]: line.split()[1] for line in output.splitlines()[1:]}
    assert code == 0
    assert planned == dict.fromkeys(STAGES[:4], "skip") | dict.fromkeys(STAGES[4:], "run")


def test_output_that_was_changed_by_hand_is_made_again(completed):
    plan = completed.run / "lora" / "plan.json"
    original = plan.read_text()
    plan.write_text(original + " ")
    _, output = completed.execute("--dry_run")
    plan.write_text(original)
    planned = {line.split()[0]: line.split()[1] for line in output.splitlines()[1:]}
    assert planned["plan_lora"] == "run" and planned["protect_phi"] == "skip"


def test_two_ranks_with_partitioned_weights_train_as_one_does(completed):
    """Same global batch, same loss to 1e-2; non-empty adapter; a notebook for each rank."""
    alone = training_losses(completed)
    settings = ["--only", "train", "-p", "training.zero_stage=3"]
    code, output = completed.execute(
        *settings, "--num_accelerators", "2", "-p", "per_device_train_batch_size=1"
    )
    assert code == 0, output
    together = training_losses(completed)
    assert len(together) == len(alone) > 0
    assert all(math.isclose(one, two, abs_tol=1e-2) for one, two in zip(alone, together)), (alone, together)
    assert [status["state"] for status in completed.state["stages"]["train"]["ranks"]] == ["completed"] * 2
    for name in ("04_train.ipynb", "04_train.rank1.ipynb"):
        notebook = nbformat.read(completed.run / "notebooks" / name, 4)
        assert any(cell.get("outputs") for cell in notebook.cells), name
    from safetensors.torch import load_file

    adapter = load_file(completed.run / "train" / "lora_adapter" / "adapter_model.safetensors")
    assert adapter and all(tensor.numel() > 0 for tensor in adapter.values())
    assert any(tensor.abs().max() > 0 for name, tensor in adapter.items() if "lora_B" in name)
