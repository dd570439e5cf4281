"""Trackers, each read back by its own reader, and curves that somebody can look at."""

import importlib.util
import os
import time

import pytest
import torch

from medai_nb.monitor import TRACKERS, TrackerError, TrainingMonitor, open_tracker


def read_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def wandb_records(path):
    """The records of a .wandb file: a log of blocks of 32 KiB, whose parts have 4 bytes checksum, 2 length, 1 kind."""
    from wandb.proto import wandb_internal_pb2

    content, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:  # too short for a part: filled with zeros
            position += 32768 - position % 32768
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def read_wandb(folder):
    import json

    (file,) = folder.rglob("run-*.wandb")
    found = {}
    deadline = (
        time.monotonic() + 20
    )  # a process of W&B's own writes, and says that it is done a moment before it is
    while "exit" not in {record.WhichOneof("record_type") for record in wandb_records(file)}:
        assert time.monotonic() < deadline, file
        time.sleep(0.1)
    for record in wandb_records(file):
        if record.WhichOneof("record_type") == "history":
            items = {
                item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item
            }
            for name, value in items.items():
                found.setdefault(name, []).append((items.get("_step", record.history.step.num), value))
    return found


def read_mlflow(folder):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("medai_nb").experiment_id])
    return {
        name: [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }


READERS = {"tensorboard": read_tensorboard, "wandb": read_wandb, "mlflow": read_mlflow}


def installed(name):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"the extra {name} is not installed")


@pytest.mark.parametrize("name", TRACKERS)
def test_what_a_monitor_passes_on_is_read_back(tmp_path, name):
    installed(name)
    monitor = TrainingMonitor({"rank": 16}, trackers=[name], folder=tmp_path, quiet=True)
    for step, loss in enumerate([2.5, 1.25], start=1):
        monitor.log_training_step(step, loss, learning_rate=0.5 / step)
    monitor.log_metrics({"eval_loss": 0.75}, step=2)
    monitor.close()
    found = READERS[name](tmp_path)
    assert found["train_loss"] == [(1, 2.5), (2, 1.25)]
    assert found["learning_rate"] == [(1, 0.5), (2, 0.25)]
    assert [value for _, value in found["eval_loss"]] == [0.75]


def test_a_tracker_that_is_missing_names_its_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TrackerError, match=r"medai_nb\[mlflow\]"):
        open_tracker("mlflow", tmp_path, {})
    with pytest.raises(TrackerError, match="tensorboard, wandb, mlflow"):
        open_tracker("neptune", tmp_path, {})


def test_answers_are_noted_and_the_model_trains_on(tiny_llama, capsys):
    from medai_nb.models import load_model, load_tokenizer

    model, tokenizer = load_model(str(tiny_llama), for_training=True), load_tokenizer(str(tiny_llama))
    monitor = TrainingMonitor()
    state = torch.get_rng_state()
    quality = monitor.log_model_performance(model, tokenizer, ["What is asthma?", "And fever?"], step=7)
    assert model.training and torch.equal(torch.get_rng_state(), state), (
        "sampling changes nothing in training"
    )
    assert set(quality) == {"words", "tokens", "ended", "empty", "repetitive"}
    assert monitor.metrics_history["performance/tokens"] == [(7, quality["tokens"])]
    assert "step 7: performance/words" in capsys.readouterr().out


def test_the_trainer_reports_to_every_tracker(tiny_llama, tmp_path, monkeypatch):
    """The numbers of the Trainer's own connections are in the run's folder, and the environment is as before."""
    for name in TRACKERS:
        installed(name)
    import datasets

    from medai_nb.config import PHIConfig, load_config
    from medai_nb.phi.protect import protect_dataset
    from medai_nb.trainer import train

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    rows = [
        {"id": str(n), "text": "Patient has a " + ["rash", "cough"][n % 2], "label": ["Skin", "Lung"][n % 2]}
        for n in range(20)
    ]
    splits = {
        "train": datasets.Dataset.from_list(rows[:14]),
        "validation": datasets.Dataset.from_list(rows[14:]),
    }
    protect_dataset(datasets.DatasetDict(splits), PHIConfig(), tmp_path / "protected")
    config = load_config(
        {
            "model": {"name": str(tiny_llama), "precision": "fp32"},
            "lora": {"r": 2},
            "training": {
                "max_steps": 3,
                "logging_steps": 1,
                "report_to": list(TRACKERS),
                "per_device_train_batch_size": 2,
            },
        }
    )
    before = dict(os.environ)
    outcome = train(config, tmp_path / "protected", None, tmp_path / "train")
    changed = {name for name in before.keys() | os.environ.keys() if before.get(name) != os.environ.get(name)}
    changed -= {"WANDB_SERVICE"}  # where W&B finds its own process again
    assert not {name for name in changed if name.startswith(("WANDB", "MLFLOW", "TENSORBOARD"))}
    losses = [entry["loss"] for entry in outcome.history if "loss" in entry]
    for name, read in READERS.items():
        found = read(tmp_path / "train")
        logged = found.get("train/loss") or found["loss"]
        assert [value for _, value in logged] == pytest.approx(losses, rel=1e-5), name


LIVE = """
from medai_nb.monitor import LiveCurves
from transformers import TrainerState

live, state = LiveCurves(seconds=0), TrainerState(is_world_process_zero=True)
live.on_log(None, state, None)
for step in range(1, 4):
    state.log_history.append({"step": step, "loss": 1 / step, "tokens_per_second": 900.0})
    live.on_log(None, state, None)
"""


@pytest.mark.parametrize("launched", [False, True])
def test_curves_are_drawn_in_place_in_a_notebook_and_not_in_a_batch_job(monkeypatch, launched):
    import nbformat
    from nbclient import NotebookClient

    from medai_nb.run_folder import LAUNCHED_VARIABLE

    if launched:
        monkeypatch.setenv(LAUNCHED_VARIABLE, "train")
    else:
        monkeypatch.delenv(LAUNCHED_VARIABLE, raising=False)
    cells = [nbformat.v4.new_code_cell(text) for text in (LIVE, "live.on_train_end(None, state, None)")]
    notebook = nbformat.v4.new_notebook(cells=cells[:1])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    shown = [output for output in notebook.cells[0].outputs if output.output_type == "display_data"]
    assert len(shown) == (0 if launched else 1)
    assert all("image/png" in output.data for output in shown)
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    assert not any("image/png" in output.get("data", {}) for output in notebook.cells[0].outputs), "gone"


def test_a_meter_leaves_out_what_is_not_a_step(tiny_llama, monkeypatch):
    from medai_nb.config import LoRAConfig
    from medai_nb.lora import apply_lora
    from medai_nb.models import load_model
    from medai_nb.monitor import StepMeter

    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr("medai_nb.monitor.known_peak", lambda precision, threads: 1e9)
    meter = StepMeter(apply_lora(load_model(str(tiny_llama), for_training=True), LoRAConfig(r=2), 0), "fp32")
    for _ in range(2):
        meter.on_step_begin(None, None, None)
        meter.count([[30, 30], [20]], places=120, labelled=10)
        meter.count([[40]], places=60, labelled=5)
        clock[0] += 2.0
        meter.on_step_end(None, None, None)
        clock[0] += 100.0  # an evaluation
    seen = meter.read()
    assert seen["tokens_per_second"] == 2 * 120 / 4 and seen["padding"] == pytest.approx(1 - 240 / 360)
    expected = 2 * (meter.cost.operations([30, 30, 20], 10) + meter.cost.operations([40], 5)) / 4 / 1e9
    assert seen["matmul_share"] == pytest.approx(expected)
    assert meter.read() == {} and meter.read(whole=True)["tokens_per_second"] == 60
