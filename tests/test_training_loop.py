"""The plain loop beside the Trainer, code of the user's own, and what happens when memory or numbers run out."""

import json
from types import SimpleNamespace

import datasets
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import TrainerState

from medai_nb.callbacks import MedicalSafetyCallback
from medai_nb.checkpoints import CheckpointError, CheckpointManager
from medai_nb.config import ConfigError, PHIConfig, load_config
from medai_nb.examples import Collator, build_examples, pack
from medai_nb.lora import apply_lora
from medai_nb.models import load_model, load_tokenizer
from medai_nb.phi.protect import protect_dataset
from medai_nb.safety import LABEL_RULES, RULES
from medai_nb.trainer import (
    MedicalLoRATrainer,
    TrainingError,
    is_out_of_memory,
    join_world,
    make_trainer,
    memory_advice,
    safety_callback,
    train,
    training_arguments,
)

pytestmark = pytest.mark.usefixtures("restored_environment")


def note(index: int) -> dict:
    """A record whose label can be read off its text."""
    finding, label = [("rash and itching", "Skin"), ("cough and wheezing", "Lung")][index % 2]
    return {
        "id": f"note-{index}",
        "patient_id": str(index),
        "text": f"Patient has {finding}" + ", again" * (index % 5) + ".",
        "label": label,
    }


@pytest.fixture(scope="module")
def splits():
    parts = {"train": range(48), "validation": range(48, 61)}
    return datasets.DatasetDict(
        {name: datasets.Dataset.from_list([note(n) for n in part]) for name, part in parts.items()}
    )


@pytest.fixture(scope="module")
def protected(splits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("records") / "protected"
    protect_dataset(splits, PHIConfig(), folder)
    return folder


@pytest.fixture
def settings(tiny_llama, tmp_path):
    return {
        "output_dir": str(tmp_path / "run"),
        "model": {"name": str(tiny_llama), "precision": "fp32"},
        "lora": {"r": 4, "alpha": 8},
        "data": {"instruction": "Which organ?", "system_prompt": "Be brief."},
        "leakage": {"canaries": False},
        "training": {
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 4,
            "pack_length": 128,
            "num_train_epochs": 2,
            "logging_steps": 1,
            "warmup_steps": 2,
            "zero_stage": 1,
            "report_to": [],
        },
    }


def both_losses(settings, splits, **changes):
    """Losses of the Trainer and of the plain loop on the same batches, and their adapters."""
    config = load_config({**settings, "training": {**settings["training"], "num_train_epochs": 1, **changes}})
    join_world()
    tokenizer = load_tokenizer(config.model)
    built = {
        name: build_examples(rows, tokenizer, config.data, ["Lung", "Skin"]) for name, rows in splits.items()
    }
    examples = {name: made[0] for name, made in built.items()}
    arguments = training_arguments(config, config.run_dir / "trainer", config.model.precision, 1)
    arguments.eval_strategy = arguments.save_strategy = "no"
    arguments.load_best_model_at_end = False
    model = apply_lora(load_model(config.model, for_training=True), config.lora, seed=0)
    summaries = {"train": {"tokens": sum(examples["train"]["length"][:])}}
    trainer, _, _ = make_trainer(model, tokenizer, dict(examples), summaries, arguments, config)
    batches = []
    collate = trainer.data_collator

    def recording(rows):
        batch = collate(rows)
        batches.append({name: part.clone() for name, part in batch.items() if torch.is_tensor(part)})
        return batch

    trainer.data_collator = recording
    trainer.train()
    by_trainer = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    first = {name: one.detach().float() for name, one in model.named_parameters() if one.requires_grad}

    again = apply_lora(load_model(config.model, for_training=True), config.lora, seed=0)
    if config.training.fast_layers and "attention" in trainer.fast_layers:
        from medai_nb.fast_layers import fast_layers

        fast_layers(again, packed=True)
    loop = MedicalLoRATrainer(again, tokenizer, batches, config=config)
    assert loop.total_steps == len(by_trainer)
    history = loop.train()
    by_loop = [entry["loss"] for entry in history if "loss" in entry][: len(by_trainer)]
    second = {name: one.detach().float() for name, one in again.named_parameters() if one.requires_grad}
    return by_trainer, by_loop, first, second


@pytest.mark.parametrize(
    "changes",
    [{}, {"gradient_accumulation_steps": 3}, {"packing": False, "zero_stage": 2}],
    ids=["packed", "accumulated", "padded, ZeRO-2"],
)
def test_the_plain_loop_gives_the_losses_of_the_trainer(settings, splits, changes):
    by_trainer, by_loop, first, second = both_losses(settings, splits, **changes)
    assert len(by_trainer) >= 3 and by_trainer[-1] < by_trainer[0]
    assert by_loop == pytest.approx(by_trainer, abs=1e-5)


def test_the_plain_loop_keeps_32_bit_copies_of_a_bf16_adapter(settings, splits):
    settings["model"]["precision"] = "bf16"
    by_trainer, by_loop, *_ = both_losses(settings, splits)
    assert by_loop == pytest.approx(by_trainer, abs=2e-2)


def plain_loop(settings, splits, seed=0, batch_size=2, packed=True, **order):
    """The plain loop over records in batches of so many rows; `order` goes to the loader of the training records."""
    config = load_config(settings)
    tokenizer = load_tokenizer(config.model)
    loaders = []
    for name, how in (("train", order), ("validation", {})):
        rows = build_examples(splits[name], tokenizer, config.data, ["Lung", "Skin"])[0]
        rows = pack(rows, 128) if packed else rows
        loaders.append(DataLoader(rows, batch_size, collate_fn=Collator(tokenizer.pad_token_id), **how))
    model = apply_lora(load_model(config.model, for_training=True), config.lora, seed=seed)
    return MedicalLoRATrainer(model, tokenizer, *loaders, config)


def test_the_plain_loop_saves_checkpoints_and_the_best_model(settings, splits, tmp_path):
    loop = plain_loop(settings, splits)
    history = loop.train()
    assert loop.current_step == loop.total_steps == 2 * loop.steps_per_epoch
    evaluated = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert evaluated[1] < evaluated[0] and loop.best_eval_loss == evaluated[1]
    best = CheckpointManager(tmp_path / "run" / "checkpoints").find_best_checkpoint(
        "eval_loss", ascending=True
    )
    assert best["metrics"]["eval_loss"] == evaluated[1]
    assert {path.name for path in (tmp_path / "run" / "best_model").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
    }


def test_the_plain_loop_trains_on_eight_single_rows_as_on_one_batch_of_eight(settings, splits):
    """The rows have unlike numbers of tokens, each of which weighs the same."""
    loops = []
    for batch_size, accumulation in ((8, 1), (1, 8)):
        settings["training"] |= {"gradient_accumulation_steps": accumulation, "num_train_epochs": 1}
        loops.append(plain_loop(settings, splits, batch_size=batch_size, packed=False))
    whole, apart = ([entry["loss"] for entry in loop.train() if "loss" in entry] for loop in loops)
    assert len(whole) == 6 and whole[-1] < whole[0]
    assert apart == pytest.approx(whole, abs=2e-5)
    adapters = [state_of(loop)["adapter"] for loop in loops]
    torch.testing.assert_close(*adapters, atol=1e-4, rtol=1e-3)


def state_of(loop):
    """All that a loop has learnt and noted, but for the bar it shows."""
    return {
        "adapter": {name: one.detach() for name, one in loop.model.named_parameters() if one.requires_grad},
        "optimizer": loop.optimizer.state_dict(),
        "scheduler": {
            key: value for key, value in loop.scheduler.state_dict().items() if key != "lr_lambdas"
        },
        "loop": loop.state_dict(),
    }


@pytest.mark.parametrize("how", ["fp32, shuffled by torch", "bf16, shuffled by a generator of its own"])
def test_the_plain_loop_goes_on_after_a_crash_to_the_last_bit(settings, splits, tmp_path, how):
    """The new object begins with another adapter and other random numbers: all that counts is in the checkpoint."""
    settings["model"]["precision"] = how.partition(",")[0]
    settings["lora"]["dropout"] = 0.1
    settings["training"]["logging_steps"] = 1

    def loop_into(folder, seed):
        torch.manual_seed(5)
        own = {"generator": torch.Generator().manual_seed(3)} if "own" in how else {}
        return plain_loop(settings | {"output_dir": str(folder)}, splits, seed=seed, shuffle=True, **own)

    whole = loop_into(tmp_path / "whole", seed=0)
    whole.train()
    crashed = loop_into(tmp_path / "run", seed=0)
    step = crashed._train_step

    def crash_in_the_second_epoch(batches):
        if crashed.current_step == crashed.steps_per_epoch + 1:
            raise MemoryError
        return step(batches)

    crashed._train_step = crash_in_the_second_epoch
    with pytest.raises(MemoryError):
        crashed.train()
    again = loop_into(tmp_path / "run", seed=1)
    torch.manual_seed(99)
    if again._shuffler:
        again._shuffler.manual_seed(99)
    history = again.train("latest")
    assert [entry["epoch"] for entry in history if "epoch" in entry] == [1, 2] and again.current_epoch == 1
    torch.testing.assert_close(state_of(again), state_of(whole), atol=0, rtol=0)
    done = loop_into(tmp_path / "run", seed=2)
    done.settings.resume_from_checkpoint = "latest"
    assert done.train() == history, "nothing is left to train"


def test_the_plain_loop_refuses_what_it_cannot_go_on_from(settings, splits, tmp_path):
    settings["training"] |= {"max_steps": 2}
    cut_short = plain_loop(settings, splits)
    cut_short.train()
    settings["training"] |= {"max_steps": -1}
    with pytest.raises(CheckpointError, match="at step 2, which is no end of an epoch of"):
        plain_loop(settings, splits).train("latest")
    with pytest.raises(CheckpointError, match="no whole checkpoint: it was not written to the end"):
        plain_loop(settings, splits).train(tmp_path)
    folder = tmp_path / "run" / "checkpoints"
    other = plain_loop(settings, splits)
    other.manager.save_checkpoint(other.model, 1, 3, {}, optimizer=other.optimizer)
    with pytest.raises(CheckpointError, match="loop, scheduler is in the checkpoint or in this call"):
        other.train(folder / "checkpoint-3")
    # Begun afresh, it leaves nothing that could be taken for its own.
    afresh = plain_loop(settings | {"training": settings["training"] | {"max_steps": 1}}, splits)
    afresh.train()
    assert {path.name for path in folder.iterdir()} == {
        "checkpoint-1",
        "set-aside-checkpoint-2",
        "set-aside-checkpoint-3",
    }


HOOKS = """
import torch

def loss(outputs, labels, num_items_in_batch=None):
    HOOKS.append("loss")
    labels = labels[:, 1:]
    logits = outputs.logits[:, :-1].float()
    total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return total / (num_items_in_batch or (labels != -100).sum())

def optimizer(parameters, settings):
    HOOKS.append("optimizer")
    return torch.optim.SGD(parameters, lr=settings.learning_rate, momentum=0.5)

def schedule(optimizer, steps, settings):
    HOOKS.append(f"schedule of {steps}")
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, steps)

def broken(outputs, labels, num_items_in_batch=None):
    return outputs.logits.sum() * float("nan")

def hungry(outputs, labels, num_items_in_batch=None):
    if outputs.logits[..., 0].numel() > 128:  # more than a row
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return loss(outputs, labels, num_items_in_batch)

HOOKS = []
"""


@pytest.fixture
def hooks(tmp_path, monkeypatch):
    (tmp_path / "hospital_hooks.py").write_text(HOOKS)
    monkeypatch.syspath_prepend(str(tmp_path))
    import sys

    sys.modules.pop("hospital_hooks", None)
    import hospital_hooks

    return hospital_hooks.HOOKS


@pytest.mark.parametrize("stage", [0, 2])
def test_loss_optimizer_and_schedule_of_the_users_own_are_used(settings, protected, tmp_path, hooks, stage):
    settings["training"] |= {
        "zero_stage": stage,
        "max_steps": 4,
        "loss_function": "hospital_hooks:loss",
        "optimizer_function": "hospital_hooks:optimizer",
        "scheduler_function": "hospital_hooks:schedule",
    }
    outcome = train(load_config(settings), protected, None, tmp_path / "train")
    rates = [entry["learning_rate"] for entry in outcome.history if "learning_rate" in entry]
    assert {"loss", "optimizer", "schedule of 4"} <= set(hooks)
    assert rates == pytest.approx([0.01, 0.00875, 0.0075, 0.00625]), rates


VARIANTS = {
    "rslora": ({"use_rslora": True}, {}),
    "dora": ({"use_dora": True}, {}),
    "gaussian": ({"init": "gaussian"}, {}),
    "loftq": ({"init": "loftq"}, {"use_4bit": True}),
    "4 bits": ({}, {"use_4bit": True}),
    "8 bits": ({}, {"use_8bit": True}),
}


@pytest.mark.parametrize(
    "name, stage",
    [("rslora", 1), ("dora", 1), ("dora", 3), ("gaussian", 1), ("loftq", 1), ("4 bits", 3), ("8 bits", 1)],
)
def test_every_variant_of_lora_trains_and_is_saved_as_it_was(settings, protected, tmp_path, name, stage):
    import json

    from safetensors.torch import load_file

    lora, model = VARIANTS[name]
    settings["training"] |= {"zero_stage": stage, "max_steps": 3}
    settings["lora"] = settings.get("lora", {}) | lora
    settings["model"] |= model
    outcome = train(load_config(settings), protected, None, tmp_path / "train")
    losses = [entry["loss"] for entry in outcome.history if "loss" in entry]
    assert losses[-1] < losses[0], losses
    saved = json.loads((outcome.adapter / "adapter_config.json").read_text())
    assert (saved["use_rslora"], saved["use_dora"]) == (
        bool(lora.get("use_rslora")),
        bool(lora.get("use_dora")),
    )
    names = load_file(outcome.adapter / "adapter_model.safetensors").keys()
    assert any("magnitude" in name for name in names) == bool(lora.get("use_dora"))


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("hospital_hooks", "package.module:function"),
        ("nowhere:loss", "PYTHONPATH"),
        ("hospital_hooks:none", "has no none"),
    ],
)
def test_a_hook_that_does_not_exist_is_named_with_its_setting(
    settings, protected, tmp_path, hooks, path, said
):
    settings["training"]["loss_function"] = path
    with pytest.raises(ConfigError, match="training.loss_function") as error:
        train(load_config(settings), protected, None, tmp_path / "train")
    assert said in str(error.value)


def test_a_loss_that_is_not_finite_names_the_records_of_the_batch(settings, protected, tmp_path, hooks):
    settings["training"] |= {"loss_function": "hospital_hooks:broken", "packing": False}
    with pytest.raises(TrainingError, match="nan at step 1") as error:
        train(load_config(settings), protected, None, tmp_path / "train")
    named = set(str(error.value).split("of the records ")[1].split(". Look")[0].split(", "))
    assert len(named) == 2 and named <= set(datasets.load_from_disk(str(protected))["train"]["id"])


def test_when_memory_runs_out_the_settings_that_help_are_named(settings, protected, tmp_path, hooks):
    settings["training"] |= {"loss_function": "hospital_hooks:hungry", "per_device_train_batch_size": 4}
    with pytest.raises(TrainingError, match="micro-batches of 4") as error:
        train(load_config(settings), protected, None, tmp_path / "train")
    for way in (
        "per_device_train_batch_size: 2 and training.gradient_accumulation_steps: 2",
        "gradient_checkpointing: true",
        "model.use_8bit: true",
    ):
        assert way in str(error.value)


def test_halved_micro_batches_train_the_same(settings, protected, tmp_path, hooks, caplog):
    settings["training"] |= {
        "loss_function": "hospital_hooks:loss",
        "per_device_train_batch_size": 4,
        "max_steps": 3,
    }
    whole = train(load_config(settings), protected, None, tmp_path / "whole")
    settings["training"] |= {"loss_function": "hospital_hooks:hungry", "auto_micro_batch": True}
    # Evaluation runs with its own batch size.
    settings["training"]["per_device_eval_batch_size"] = 1
    halved = train(load_config(settings), protected, None, tmp_path / "halved")
    assert "micro-batches of 2" in caplog.text
    pairs = [[entry["loss"] for entry in outcome.history if "loss" in entry] for outcome in (whole, halved)]
    assert pairs[1] == pytest.approx(pairs[0], abs=2e-5) and len(pairs[0]) == 3


def test_what_counts_as_out_of_memory():
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")
    )
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    small = load_config(
        {"training": {"per_device_train_batch_size": 1, "gradient_checkpointing": True, "packing": False}}
    )
    assert [way.partition(":")[0] for way in memory_advice(small, 2)] == [
        "training.zero_stage",
        "model.use_8bit",
        "data.max_length",
    ]
    assert memory_advice(load_config({}), 1)[0] == (
        "training.per_device_train_batch_size: 4 and training.gradient_accumulation_steps: 2"
    )


class NoPromises:
    """Finds every other answer non-compliant."""

    def __init__(self):
        self.asked = 0

    def check_safety_compliance(self, answer):
        self.asked += 1
        return {"compliant": self.asked % 2 == 0, "violations": ["promise"]}


@pytest.mark.parametrize("stage", [1, 3])
def test_answers_are_judged_while_training_and_failures_are_written(settings, splits, tmp_path, stage):
    config = load_config(
        {**settings, "training": {**settings["training"], "zero_stage": stage, "max_steps": 4}}
    )
    join_world()
    tokenizer = load_tokenizer(config.model)
    examples = {
        name: build_examples(rows, tokenizer, config.data, ["Lung", "Skin"])[0]
        for name, rows in splits.items()
    }
    arguments = training_arguments(config, tmp_path / "train", "fp32", 1)
    arguments.eval_strategy = arguments.save_strategy = "no"
    arguments.load_best_model_at_end = False
    model = apply_lora(load_model(config.model, for_training=True), config.lora, seed=0)
    summaries = {"train": {"tokens": sum(examples["train"]["length"][:])}}
    checker = NoPromises()
    callback = MedicalSafetyCallback(
        checker, splits["validation"], every_steps=2, prompts=3, max_new_tokens=4
    )
    trainer, _, _ = make_trainer(model, tokenizer, examples, summaries, arguments, config, [callback])
    trainer.train()
    assert checker.asked == 6 and [entry["step"] for entry in callback.history] == [2, 4]
    lines = [
        json.loads(line) for line in (tmp_path / "train" / "safety_failures.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [2, 2, 4]
    assert lines[0]["prompt"] == splits["validation"][0]["text"] and lines[0]["violations"] == ["promise"]
    assert [entry["safety_compliance"] for entry in callback.history] == pytest.approx([1 / 3, 2 / 3])
    assert model.training


class Secretive:
    """Finds nothing compliant, and repeats the answer in its violations."""

    def __init__(self):
        self.requests = []

    def check_safety_compliance(self, response, request=None):
        self.requests.append(request)
        return {"compliant": False, "violations": [{"rule": "all", "start": 3, "quoted": response}]}


def test_no_identifier_reaches_the_file_of_failures_and_offsets_still_fit(tmp_path, monkeypatch):
    answer = "You have gout, says Dr. Angela Whitcombe, 617-555-0143."
    record = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "I am James Halloway, MRN 48291733. My toe hurts."},
            {"role": "assistant", "content": "The answer of the data."},
        ]
    }
    monkeypatch.setattr(
        "medai_nb.callbacks.sample_answers",
        lambda model, tokenizer, prompts, *more: [
            {"prompt": prompts[0]["messages"][1]["content"], "answer": answer, "tokens": 9, "ended": True}
        ],
    )
    checker = Secretive()
    callback = MedicalSafetyCallback(checker, [record], every_steps=1, file=tmp_path / "failures.jsonl")
    state = TrainerState(global_step=7, is_world_process_zero=True)
    assert callback.check(None, state) == 0
    written = (tmp_path / "failures.jsonl").read_text()
    for secret in ("Angela", "Whitcombe", "0143", "Halloway", "48291733"):
        assert secret not in written
    line = json.loads(written)
    assert line["step"] == 7 and line["answer"].startswith("You have gout, says Dr. ***")
    assert len(line["answer"]) == len(line["violations"][0]["quoted"]) == len(answer)
    assert checker.requests == ["Be brief.\nI am James Halloway, MRN 48291733. My toe hurts."]


def test_going_on_drops_failures_after_the_checkpoint_and_beginning_afresh_drops_all(tmp_path):
    file = tmp_path / "failures.jsonl"
    lines = [json.dumps({"step": step}) + "\n" for step in (2, 4, 6)]
    callback = MedicalSafetyCallback(Secretive(), ["What is asthma?"], every_steps=2, file=file)
    for step, kept in ((4, lines[:2]), (0, [])):
        file.write_text("".join(lines) + '{"step": 6, "answ')
        log = [{"step": one, "safety_compliance": 0.5} for one in (2, 4) if one <= step]
        state = TrainerState(global_step=step, is_world_process_zero=True, log_history=log)
        callback.on_train_begin(None, state, None)
        assert file.read_text() == "".join(kept) and callback.history == log


def test_rules_and_prompts_follow_what_the_validation_split_asks_for(settings, splits):
    ask = {"messages": [{"role": "user", "content": "What is asthma?"}]}
    config = load_config(settings, ["training.safety_steps=5", "training.safety_prompts=2"])
    labels = safety_callback(config, splits["validation"])
    assert [rule.name for rule in labels.safety_checker.rules] == [
        name for name in RULES if name in LABEL_RULES
    ]
    assert len(labels.prompts) == 2 and labels.every_steps == 5 and labels.data == config.data
    mixed = safety_callback(config, [*splits["validation"], ask])
    assert mixed.prompts == [ask]
    assert "missing_escalation" in {rule.name for rule in mixed.safety_checker.rules}
    assert "unfinished_answer" not in {rule.name for rule in mixed.safety_checker.rules}
    assert safety_callback(load_config(settings), splits["validation"]) is None


def test_a_safety_callback_without_prompts_is_refused():
    with pytest.raises(ValueError, match="no prompt"):
        MedicalSafetyCallback(NoPromises(), [SimpleNamespace().__dict__])
