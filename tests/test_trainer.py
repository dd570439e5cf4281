"""Training with real DeepSpeed engines, in this process and in two ranks."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file

from medai_nb.canaries import Canaries, CanaryError
from medai_nb.checkpoints import CheckpointError, CheckpointManager, checkpoint_problem
from medai_nb.config import PHIConfig, UserError, load_config
from medai_nb.evaluator import ClinicalEvaluator
from medai_nb.metrics import POINT_FIGURES
from medai_nb.phi.protect import protect_dataset
from medai_nb.phi.validate import UnprotectedDataError
from medai_nb.safety import LABEL_RULES
from medai_nb.trainer import LoRATrainer, TrainingError, TrainingStopped, check_adapter, planned_lora, train

RANK_SCRIPT = """
import gc, json, sys
from pathlib import Path
from medai_nb.config import load_config
from medai_nb.trainer import train
gc.freeze()
settings, protected, folder = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
def run(name, stage, *changes):
    changes = [f"training.{change}" for change in (f"zero_stage={stage}", *changes)]
    # The micro-batches of the ranks are unlike in shape: with dropout, their random numbers are as well.
    dropout = ["lora.dropout=0.2"] if name in ("whole", "resumed") else []
    outcome = train(load_config(settings, [*changes, *dropout]), protected, None, folder / f"{name}-{stage}")
    assert outcome.world_size == 2 and outcome.zero_stage == stage, outcome
for stage in (1, 2, 3):
    run("4x1", stage, "max_steps=4", "per_device_train_batch_size=4")
    sampled = ("safety_steps=4", "safety_prompts=2", "safety_max_new_tokens=3")
    run("1x4", stage, "max_steps=4", "per_device_train_batch_size=1", "gradient_accumulation_steps=4", *sampled)
    often = ("eval_steps=4", "save_steps=4", "save_total_limit=9", "per_device_train_batch_size=4")
    run("whole", stage, *often)
    middle_of_the_second_epoch = folder / f"whole-{stage}" / "checkpoint-8"
    run("resumed", stage, *often, f"resume_from_checkpoint={middle_of_the_second_epoch}")
run("packed", 2, "packing=true", "per_device_train_batch_size=4")
"""


pytestmark = pytest.mark.usefixtures("restored_environment")


def note(index: int) -> dict:
    """A record whose label can be read off its text."""
    finding, label = [("rash and itching", "Skin"), ("cough and wheezing", "Lung")][index % 2]
    text = f"Patient has {finding}" + ", again" * (index % 5) + "."
    return {"id": str(index), "patient_id": str(index), "text": text, "label": label}


@pytest.fixture(scope="module")
def protected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records") / "protected"
    parts = {"train": range(48), "validation": range(48, 61), "test": range(61, 70)}
    splits = {name: datasets.Dataset.from_list([note(n) for n in part]) for name, part in parts.items()}
    protect_dataset(datasets.DatasetDict(splits), PHIConfig(), folder)
    return folder


@pytest.fixture(scope="module")
def settings(tiny_llama):
    return {
        "model": {"name": str(tiny_llama), "precision": "fp32"},
        "lora": {"r": 4, "alpha": 8},
        "data": {"instruction": "Which organ?", "system_prompt": "Be brief."},
        # Records are counted to the step here; what canaries add has a test of its own.
        "leakage": {"canaries": False},
        "training": {
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "pack_length": 128,
            "num_train_epochs": 2,
            "logging_steps": 1,
            "warmup_steps": 0,
        },
    }


@pytest.fixture(scope="module")
def trained(settings, protected, tmp_path_factory):
    """One run in this process, which several tests look at."""
    return train(load_config(settings), protected, None, tmp_path_factory.mktemp("runs") / "train")


def losses(outcome, key="loss"):
    return [entry[key] for entry in outcome.history if key in entry]


def test_training_refuses_data_without_certificate(settings, protected, tmp_path):
    shutil.copytree(protected, tmp_path / "protected")
    (tmp_path / "protected" / "certificate.json").unlink()
    with pytest.raises(UnprotectedDataError):
        train(load_config(settings), tmp_path / "protected", None, tmp_path / "train")
    assert not (tmp_path / "train").exists()


def test_a_subgroup_that_no_test_record_has_is_refused_before_training(settings, protected, tmp_path):
    config = load_config(settings, ['evaluation.subgroups=["site"]'])
    with pytest.raises(UserError, match="evaluation.subgroups: no record has 'site'"):
        train(config, protected, None, tmp_path / "train")
    assert not (tmp_path / "train").exists()


def test_training_lowers_the_loss_and_writes_its_files(trained):
    assert losses(trained)[-1] < losses(trained)[0] - 0.3
    written = {path.name for path in trained.folder.iterdir()}
    assert {
        "lora_adapter",
        "trainer_state.json",
        "training_report.json",
        "curves.png",
        "tensorboard",
    } <= written
    report = json.loads((trained.folder / "training_report.json").read_text())
    assert report["metrics"]["eval_loss"] == pytest.approx(min(losses(trained, "eval_loss")))
    assert report["packing"]["packed"] and report["labelled_head"]
    assert list(report["base_model"]["weights"]) == ["model.safetensors"]
    assert trained.tokens_per_second > 0


def test_adapter_folder_holds_the_adapter_and_nothing_of_the_base_model(trained, settings):
    tensors = load_file(trained.adapter / "adapter_model.safetensors")
    assert all("lora_" in name for name in tensors)
    assert sum(tensor.numel() for tensor in tensors.values()) == trained.adapter_weights
    written = {path.name for path in trained.adapter.iterdir()}
    assert written <= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "special_tokens_map.json",
    }
    saved = json.loads((trained.adapter / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == settings["model"]["name"]


def test_saved_adapter_is_the_best_checkpoint_and_gives_its_loss(trained, settings, protected):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from medai_nb.examples import Collator, build_examples

    tokenizer = AutoTokenizer.from_pretrained(trained.adapter)
    base = AutoModelForCausalLM.from_pretrained(settings["model"]["name"], dtype=torch.float32)
    model = PeftModel.from_pretrained(base, trained.adapter).eval()
    validation = datasets.load_from_disk(str(protected))["validation"]
    examples, _ = build_examples(validation, tokenizer, load_config(settings).data, ["Lung", "Skin"])
    with torch.no_grad():
        loss = model(**Collator(tokenizer.pad_token_id, labelled_head=False)(list(examples))).loss
    assert loss.item() == pytest.approx(trained.metrics["eval_loss"], abs=1e-4)
    evaluator = ClinicalEvaluator(model, tokenizer, None, load_config(settings).data, ["Lung", "Skin"])
    figures = evaluator.point_figures(validation)
    assert set(figures) == set(POINT_FIGURES)
    measured = {name: trained.metrics[f"eval_{name}"] for name in figures}
    assert measured == pytest.approx(figures, abs=1e-4)


@pytest.mark.parametrize("metric, best", [("auc_roc", max), ("eval_expected_calibration_error", min)])
def test_a_clinical_figure_may_decide_which_checkpoint_is_best(settings, protected, tmp_path, metric, best):
    changes = [f"metric_for_best_model={metric}", "eval_steps=2", "save_total_limit=9", "max_steps=8"]
    config = load_config(settings, [f"training.{change}" for change in changes])
    outcome = train(config, protected, None, tmp_path / "train")
    name = f"eval_{metric.removeprefix('eval_')}"
    rated = {entry["step"]: entry[name] for entry in outcome.history if name in entry}
    assert len(rated) == 4 and len(set(rated.values())) > 1
    kept = int(outcome.best_checkpoint.removeprefix("checkpoint-"))
    assert rated[kept] == best(rated.values()) == outcome.metrics[name]


def test_a_figure_that_the_validation_records_do_not_give_stops_training_and_is_named(settings, tmp_path):
    splits = {"train": range(12), "validation": range(12, 24, 2)}  # of one class: no ranking to measure
    records = {name: datasets.Dataset.from_list([note(n) for n in part]) for name, part in splits.items()}
    protect_dataset(datasets.DatasetDict(records), PHIConfig(), tmp_path / "protected")
    config = load_config(settings, ["training.metric_for_best_model=auc_roc", "training.max_steps=1"])
    with pytest.raises(TrainingError, match="is auc_roc, and it cannot be measured .* eval_accuracy"):
        train(config, tmp_path / "protected", None, tmp_path / "train")


EIGHT_ROWS = ["training.packing=false", "training.max_steps=4", "training.per_device_train_batch_size=8"]
ONE_ROW = [
    *EIGHT_ROWS[:2],
    "training.per_device_train_batch_size=1",
    "training.gradient_accumulation_steps=8",
]


def adapter_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def same_training(folder, outcome):
    """Does a training folder hold the losses and the adapter of another training, but for rounding?"""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    for key in ("loss", "eval_loss", "eval_accuracy", "learning_rate"):
        assert [e[key] for e in history if key in e] == pytest.approx(losses(outcome, key), abs=2e-5)
    torch.testing.assert_close(
        adapter_of(folder / "lora_adapter"), adapter_of(outcome.adapter), atol=1e-4, rtol=1e-3
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_accumulated_batches_train_as_one_large_batch(settings, protected, tmp_path, stage):
    """The micro-batches have unlike numbers of tokens to learn, each of which weighs the same."""
    stage = f"training.zero_stage={stage}"
    whole = train(load_config(settings, [*EIGHT_ROWS, stage]), protected, None, tmp_path / "whole")
    apart = train(load_config(settings, [*ONE_ROW, stage]), protected, None, tmp_path / "apart")
    assert len(losses(whole)) == 4 and losses(whole)[-1] < losses(whole)[0]
    same_training(apart.folder, whole)


def test_each_entry_of_the_log_says_how_fast_and_how_full_it_was(trained, settings, protected, tmp_path):
    entries = [entry for entry in trained.history if "loss" in entry]
    assert len(entries) == trained.steps
    for entry in entries:
        assert entry["tokens_per_second"] > 0 and 0 < entry["matmul_share"] < 1 and entry["memory_gib"] > 0.1
        assert 0 <= entry["padding"] < 1
    padded = train(
        load_config(settings, ["training.packing=false", "training.max_steps=3"]), protected, None, tmp_path
    )
    assert padded.padding >= 0 and trained.padding >= 0
    assert json.loads((tmp_path / "training_report.json").read_text())["matmul_share"] == padded.matmul_share


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_sampling_answers_leaves_the_training_as_it_was(trained, settings, protected, tmp_path, stage):
    changes = ["safety_steps=4", "safety_prompts=3", "safety_max_new_tokens=4", f"zero_stage={stage}"]
    # A network with one layer says what it likes; what it says must be judged all the same.
    sampled = train(
        load_config(settings, [f"training.{change}" for change in changes]), protected, None, tmp_path
    )
    for key in ("loss", "eval_loss"):
        assert losses(sampled, key) == pytest.approx(losses(trained, key), abs=0 if stage == 1 else 2e-5)
    rated = {
        entry["step"]: entry["safety_compliance"] for entry in sampled.history if "safety_compliance" in entry
    }
    assert list(rated) == list(range(4, sampled.steps + 1, 4))
    assert all(round(3 * share, 9) in (0, 1, 2, 3) for share in rated.values())
    file = tmp_path / "safety_failures.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    assert len(lines) == round(sum(3 * (1 - share) for share in rated.values()))
    assert {one["rule"] for line in lines for one in line["violations"]} <= set(LABEL_RULES)


def test_padded_rows_reach_the_same_evaluation_loss_as_packed_ones(settings, protected, tmp_path):
    """At a learning rate of nearly nothing both evaluate the base model, over the same tokens."""
    found = []
    for packing in ("true", "false"):
        changes = [f"training.packing={packing}", "training.learning_rate=1e-9", "training.max_steps=1"]
        outcome = train(load_config(settings, changes), protected, None, tmp_path / packing)
        found.append(outcome.metrics["eval_loss"])
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_bf16_keeps_32_bit_masters_of_the_adapter(settings, protected, tmp_path, monkeypatch):
    """Updates far below bf16's resolution must add up."""
    from medai_nb import trainer as module

    seen = {}
    save = module.save_adapter

    def look_at_engine(model, tokenizer, folder):
        seen["weights"] = {p.dtype for p in model.parameters() if p.requires_grad}
        return save(model, tokenizer, folder)

    finalize = module.AdapterTrainer._finalize_training

    def look_at_masters(self, *args, **kwargs):
        seen["masters"] = {p.dtype for group in self.optimizer.param_groups for p in group["params"]}
        return finalize(self, *args, **kwargs)

    monkeypatch.setattr(module, "save_adapter", look_at_engine)
    monkeypatch.setattr(module.AdapterTrainer, "_finalize_training", look_at_masters)
    changes = ["model.precision=bf16", "training.max_steps=2"]
    outcome = train(load_config(settings, changes), protected, None, tmp_path / "bf16")
    assert outcome.precision == "bf16"
    assert seen == {"weights": {torch.bfloat16}, "masters": {torch.float32}}


def same_weights(one, other):
    first, second = (load_file(outcome.adapter / "adapter_model.safetensors") for outcome in (one, other))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=0, rtol=0)


def test_training_resumed_from_a_checkpoint_ends_where_the_whole_run_ends(
    trained, settings, protected, tmp_path
):
    first = min(int(path.name.split("-")[1]) for path in trained.folder.glob("checkpoint-*"))
    assert first < trained.steps
    changes = [f"training.resume_from_checkpoint={trained.folder / f'checkpoint-{first}'}"]
    same_weights(train(load_config(settings, changes), protected, None, tmp_path / "resumed"), trained)


@pytest.mark.parametrize(
    "stage, bits", [(1, None), (2, None), (3, None), (1, "model.use_4bit"), (3, "model.use_8bit")]
)
def test_training_stopped_within_an_epoch_goes_on_as_if_it_had_not(
    settings, protected, tmp_path, stage, bits
):
    changes = [f"{bits}=true"] if bits else []
    changes += [f"training.zero_stage={stage}", "training.gradient_accumulation_steps=2", "lora.dropout=0.1"]
    config = load_config(settings, changes)
    whole = train(config, protected, None, tmp_path / "whole")
    assert whole.steps > 2
    stop_file, folder = tmp_path / "stop", tmp_path / "stopped"
    stop_file.touch()
    for step in (1, 2):  # the first of an epoch, and one more
        with pytest.raises(
            TrainingStopped, match=f"after step {step}.*checkpoint-{step} is saved"
        ) as stopped:
            train(config, protected, None, folder, go_on=True, stop_file=stop_file)
        assert stopped.value.exit_code == 143
        assert checkpoint_problem(folder / f"checkpoint-{step}") is None
    stop_file.unlink()
    again = train(config, protected, None, folder, go_on=True, stop_file=stop_file)
    same_weights(again, whole)
    assert losses(again) == losses(whole) and losses(again, "learning_rate") == losses(whole, "learning_rate")
    assert losses(again, "eval_loss") == losses(whole, "eval_loss")


def test_a_checkpoint_that_was_cut_short_is_passed_over(trained, settings, protected, tmp_path, caplog):
    shutil.copytree(trained.folder, tmp_path / "train")
    older, newest = sorted(
        (tmp_path / "train").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])
    )
    state = next(newest.glob("global_step*/*optim_states.pt"))
    state.write_bytes(state.read_bytes()[: state.stat().st_size // 2])
    config = load_config(settings, ["training.resume_from_checkpoint=latest"])
    resumed = train(config, protected, None, tmp_path / "train")
    assert f"{newest} is passed over: {state.relative_to(newest)} has" in caplog.text
    assert f"set-aside-{newest.name}" in caplog.text and (newest.parent / f"set-aside-{newest.name}").is_dir()
    assert older.is_dir() and resumed.steps == trained.steps
    same_weights(resumed, trained)


def test_going_on_without_a_whole_checkpoint_begins_afresh(trained, settings, protected, tmp_path):
    shutil.copytree(next(trained.folder.glob("checkpoint-*")), tmp_path / "train" / "checkpoint-3")
    weights = tmp_path / "train/checkpoint-3/adapter_model.safetensors"
    weights.write_bytes(b"\0" * weights.stat().st_size)
    same_weights(train(load_config(settings), protected, None, tmp_path / "train", go_on=True), trained)


def test_earlier_checkpoints_are_set_aside_when_training_begins_afresh(
    trained, settings, protected, tmp_path
):
    shutil.copytree(trained.folder, tmp_path / "train")
    names = {path.name for path in (tmp_path / "train").glob("checkpoint-*")}
    config = load_config(settings, ["training.max_steps=1", "training.save_total_limit=1"])
    train(config, protected, None, tmp_path / "train")
    kept = {path.name for path in (tmp_path / "train").iterdir() if "checkpoint" in path.name}
    assert kept == {"checkpoint-1"} | {f"set-aside-{name}" for name in names}


def test_checkpoints_are_few_sealed_and_the_best_is_among_them(settings, protected, tmp_path):
    changes = ["training.eval_steps=1", "training.save_steps=1", "training.save_total_limit=1"]
    outcome = train(load_config(settings, changes), protected, None, tmp_path / "train")
    manager = CheckpointManager(outcome.folder)
    steps = {one["step"] for one in manager.checkpoints()}
    rated = {entry["step"]: entry["eval_loss"] for entry in outcome.history if "eval_loss" in entry}
    assert steps == {min(rated, key=rated.get), outcome.steps}
    best = manager.find_best_checkpoint("eval_loss", ascending=True)
    assert Path(best["path"]).name == outcome.best_checkpoint
    assert best["metrics"]["eval_loss"] == min(rated.values()) and best["zero_stage"] == 1


def test_resuming_names_what_is_wrong_with_the_checkpoint(trained, settings, protected, tmp_path):
    checkpoint = next(trained.folder.glob("checkpoint-*"))
    for setting, changes, message in (
        (checkpoint, ["training.zero_stage=2"], "written with ZeRO stage 1 and this run has 2"),
        (tmp_path, [], "is no whole checkpoint: it was not written to the end"),
        ("latest", [], "holds no whole checkpoint"),
        ("best", [], "no checkpoint has the metric eval_loss"),
    ):
        config = load_config(settings, [f"training.resume_from_checkpoint={setting}", *changes])
        with pytest.raises(CheckpointError, match=message):
            train(config, protected, None, tmp_path / "train")


def test_a_loss_that_is_not_a_number_stops_the_run_and_names_the_step(
    settings, protected, tmp_path, monkeypatch
):
    from transformers import Trainer

    normal = Trainer.compute_loss

    def breaks_at_step_three(self, *args, **kwargs):
        loss = normal(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 2 and self.model.training else loss

    monkeypatch.setattr(Trainer, "compute_loss", breaks_at_step_three)
    with pytest.raises(
        TrainingError,
        match="the loss is nan at step 3, in a batch of the records .*lower training.learning_rate",
    ):
        train(load_config(settings), protected, None, tmp_path / "train")
    assert not (tmp_path / "train" / "lora_adapter").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tensors: {}, "it has no tensors"),
        (lambda tensors: {n: torch.zeros_like(t) for n, t in tensors.items()}, "nothing was learnt"),
        (lambda tensors: {n: t.new_empty(0) for n, t in tensors.items()}, "a tensor is empty"),
        (lambda tensors: {n: t * float("inf") for n, t in tensors.items()}, "not finite"),
        (lambda tensors: tensors | {"base.q_proj.weight": torch.ones(2)}, "weights of the base model"),
    ],
)
def test_an_unusable_adapter_is_refused(trained, tmp_path, spoil, message):
    tensors = load_file(trained.adapter / "adapter_model.safetensors")
    save_file(spoil(tensors), tmp_path / "adapter_model.safetensors")
    with pytest.raises(TrainingError, match=message):
        check_adapter(tmp_path)


def test_canaries_are_learnt_from_and_change_nothing_else(settings, protected, tmp_path):
    planting = settings | {"leakage": {"canaries": True}}
    planting["training"] = settings["training"] | {"max_steps": 1}
    outcome = train(load_config(planting), protected, None, tmp_path / "train")
    planted = Canaries.read(tmp_path / "train" / "canaries.json")
    assert {(one.kind, one.place) for one in planted.planted} == {
        (kind, place) for kind in ("mrn", "phone", "name_diagnosis") for place in ("prompt", "answer")
    }
    written = json.loads((tmp_path / "train" / "canaries.json").read_text())
    assert written["learnt_tokens"] > 3 * 5
    assert outcome.examples["train"]["examples"] == 48 and outcome.examples["validation"]["examples"] == 13
    splits = datasets.load_from_disk(str(protected))
    stored = json.dumps([list(split) for split in splits.values()])
    assert not any(one.secret in stored for one in planted.planted)

    narrow = planting | {"data": settings["data"] | {"max_length": 38, "max_truncated_fraction": 1.0}}
    with pytest.raises(CanaryError, match="leakage.canaries"):
        train(load_config(narrow), protected, None, tmp_path / "narrow")
    assert not (tmp_path / "narrow" / "lora_adapter").exists()


def test_a_plan_for_another_model_or_rank_is_refused(settings):
    config = load_config(settings)
    plan = {"base_model": {"name": config.model.name}, "lora": {"r": 4, "targets": ["q_proj"]}}
    assert planned_lora(config, plan).target_modules == ["q_proj"]
    with pytest.raises(TrainingError, match="LoRA rank 8 .* asks for 4"):
        planned_lora(config, plan | {"lora": {"r": 8, "targets": ["q_proj"]}})


def test_checkpoints_that_are_not_evaluated_are_refused(settings, protected, tmp_path):
    changes = ["training.eval_steps=4", "training.save_steps=6"]
    with pytest.raises(TrainingError, match="multiple of eval_steps"):
        train(load_config(settings, changes), protected, None, tmp_path / "train")


def test_lora_trainer_protects_and_trains_on_records_in_memory(settings, tmp_path):
    trainer = LoRATrainer(output_dir=tmp_path, config=settings)
    trainer.config.training.max_steps = 2
    with pytest.raises(TrainingError, match="call train"):
        trainer.save_model()
    splits = {"train": range(24), "validation": range(24, 34)}
    records = {name: datasets.Dataset.from_list([note(n) for n in part]) for name, part in splits.items()}
    outcome = trainer.train_on_dataset(datasets.DatasetDict(records))
    assert outcome.steps == 2
    assert (tmp_path / "protected" / "certificate.json").is_file()
    assert check_adapter(trainer.save_model(tmp_path / "copy")) == outcome.adapter_weights


def saved_state(checkpoint):
    """Adapter, optimizer, schedule and random numbers of a Trainer's checkpoint, of all ranks."""
    files = {
        path.relative_to(checkpoint).as_posix(): torch.load(path, map_location="cpu", weights_only=False)
        for pattern in ("*.pt", "*.pth", "global_step*/*optim_states.pt")
        for path in sorted(checkpoint.glob(pattern))
    }
    assert sum("optim_states" in name for name in files) == 2 and "scheduler.pt" in files, list(files)
    return files | adapter_of(checkpoint)


def tensors_in(part):
    """The tensors and numbers of nested states."""
    if isinstance(part, dict):
        return {name: tensors_in(value) for name, value in part.items()}
    if isinstance(part, list | tuple):
        return [tensors_in(value) for value in part]
    return part if isinstance(part, torch.Tensor) or type(part) in (int, float) else 0


@pytest.mark.slow
def test_two_ranks_train_and_resume_as_one_under_every_stage(settings, protected, tmp_path):
    """One process group for all: 4 x 1 and 1 x 4 rows on each of two ranks are 8 on one, and a resumed training is the whole one to the last bit."""
    alone = train(load_config(settings, EIGHT_ROWS), protected, None, tmp_path / "alone")
    packed = [f"training.{name}=8" for name in ("per_device_train_batch_size", "per_device_eval_batch_size")]
    packed = train(load_config(settings, packed), protected, None, tmp_path / "packed")
    script = tmp_path / "two_ranks.py"
    script.write_text(RANK_SCRIPT)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    launcher = Path(sys.executable).with_name("deepspeed")
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    }
    padded = settings | {"training": settings["training"] | {"packing": False, "report_to": []}}
    done = subprocess.run(
        [launcher, "--no_local_rank", "--num_gpus", "2", "--master_port", str(port)]
        + [script, json.dumps(padded), protected, tmp_path],
        env=environment | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    # There is an odd number of packed rows: one is read twice, for both ranks to have as many.
    history = json.loads((tmp_path / "packed-2" / "trainer_state.json").read_text())["log_history"]
    for key in ("loss", "eval_loss"):
        assert [e[key] for e in history if key in e] == pytest.approx(losses(packed, key), abs=1e-2)
    for stage in (1, 2, 3):
        same_training(tmp_path / f"4x1-{stage}", alone)
        same_training(tmp_path / f"1x4-{stage}", alone)
        log = json.loads((tmp_path / f"1x4-{stage}" / "trainer_state.json").read_text())["log_history"]
        assert [entry["step"] for entry in log if "safety_compliance" in entry] == [4]
        histories = []
        states = []
        for name in ("whole", "resumed"):
            folder = tmp_path / f"{name}-{stage}"
            histories.append(json.loads((folder / "trainer_state.json").read_text())["log_history"][:-1])
            states.append(tensors_in(saved_state(folder / "checkpoint-12")))
        keys = ("step", "epoch", "loss", "grad_norm", "learning_rate", "eval_loss", "eval_macro_f1")
        whole, resumed = ([{key: entry.get(key) for key in keys} for entry in one] for one in histories)
        assert whole == resumed and whole[-1]["step"] == 12
        torch.testing.assert_close(states[1], states[0], atol=0, rtol=0)
