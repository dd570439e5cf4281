"""The six stages end to end with a tiny random model, through the real launcher."""

import csv
import json
import math

import datasets
import nbformat
import pandas as pd
import pytest
from sandbox import Sandbox

from medai_nb.cli import main

STAGES = ["prepare_data", "protect_phi", "plan_lora", "train", "evaluate", "export"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def completed(completed_run, tmp_path_factory, tiny_llama) -> Sandbox:
    """A copy of the sandbox in which all six stages have completed."""
    sandbox = Sandbox(tmp_path_factory.mktemp("own"), tiny_llama)
    sandbox.continue_from(completed_run, without=())
    return sandbox


def training_losses(sandbox: Sandbox) -> list[float]:
    history = json.loads((sandbox.run / "train" / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_all_stages_complete_and_leave_what_the_design_promises(completed_run):
    state = completed_run.state
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
        assert (completed_run.run / file).is_file(), file
    assert list(completed_run.run.glob(".*.partial")) == []
    assert completed_run.processes() == []


def test_the_running_server_is_one_of_the_forms_that_answer_alike(completed_run):
    forms = json.loads((completed_run.run / "release" / "metadata.json").read_text())["parity"]["forms"]
    assert list(forms) == ["lora_adapter", "server"]
    assert forms["server"]["changed_answers"] == forms["server"]["changed_decisions"] == 0
    assert (
        forms["server"]["clinical"]["accuracy"]["found"]
        == forms["server"]["clinical"]["accuracy"]["expected"]
    )


def test_run_ends_with_base_beside_tuned_and_where_to_look(completed_run):
    shown = (completed_run.folder / "output.txt").read_text()
    assert "base" in shown and "tuned" in shown
    assert str(completed_run.run / "notebooks") in shown


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


def another_clinics(path, first_patient="q0", label="skin"):
    """Twelve records of six patients, the last one with the given label."""
    words = {"cardiac": "heart and valve", "renal": "kidney stone", "skin": "itch and rash"}
    rows = [
        (f"q{row // 2}", f"{words[name]} on admission {row}", name) for row, name in enumerate([*words] * 4)
    ]
    rows[0], rows[-1] = (first_patient, *rows[0][1:]), (*rows[-1][:2], label)
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([("patient_id", "text", "label"), *rows])
    return path


def evaluate(completed, file, *more):
    return main(["evaluate", str(completed.run), "--data", str(file), *map(str, more)])


def test_records_of_another_clinic_are_measured_by_the_run_that_was_trained(completed, tmp_path, capsys):
    file, out = another_clinics(tmp_path / "clinic.csv", label="dental"), tmp_path / "clinic"
    settings = ["-p", "evaluation.safety_requests=0", "-p", "evaluation.evaluate_base=false"]
    assert evaluate(completed, file, "--output_dir", out, *settings) == 0
    shown = capsys.readouterr().out
    assert "accuracy" in shown and "12 records read" in shown and "dental" in shown
    written = json.loads((out / "metrics.json").read_text())
    assert written["file"]["name"] == "clinic.csv" and written["file"]["records"] == 12
    figures = written["classification"]["tuned"]
    assert figures["records"] == 12 and figures["patients"] == 6
    frame = pd.read_parquet(out / "predictions.parquet")
    assert figures["overall"]["accuracy"]["value"] == (frame["label"] == frame["predicted"]).mean()
    assert "dental" not in set(frame["predicted"]), "it was never learnt"
    assert (out / "protected" / "certificate.json").is_file() and list(tmp_path.glob(".*partial")) == []
    again = evaluate(completed, file, "--output_dir", out)
    assert again == 2 and "exists already" in capsys.readouterr().err


def test_records_of_the_runs_own_patients_or_texts_are_refused(completed, tmp_path, capsys):
    own = datasets.load_from_disk(str(completed.run / "data"))["train"]
    file = another_clinics(tmp_path / "known.csv", first_patient=own[0]["patient_id"])
    assert evaluate(completed, file, "--output_dir", tmp_path / "out") == 2
    refused = capsys.readouterr().err
    assert "1 records are of patients whose records the run was trained on" in refused
    file = another_clinics(tmp_path / "copied.csv")
    file.write_text(file.read_text().replace("heart and valve on admission 0", own[0]["text"].upper()))
    assert evaluate(completed, file, "--output_dir", tmp_path / "out") == 2
    refused = capsys.readouterr().err
    assert "1 test records are also train records" in refused and own[0]["text"] not in refused.lower()
    assert not (tmp_path / "out").exists() and list(tmp_path.glob(".*partial")) == []


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        ([], "give the folder of a run, or --benchmark"),
        (["nowhere"], "is no run folder"),
        (["nowhere", "--model_name", "embedded"], "a run brings its own model"),
        (["nowhere", "--benchmark", "pubmedqa"], "give the folder of a run, or --benchmark"),
    ],
)
def test_an_evaluation_without_a_run_says_what_is_missing(arguments, answer, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *arguments, "--data", "any.csv"]) == 2
    assert answer in capsys.readouterr().err


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
