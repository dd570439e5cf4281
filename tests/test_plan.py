"""The plan that is made before any weight is read: parameters, steps, memory, and what fits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medai_nb.config import ConfigError, RunConfig, UserError
from medai_nb.lora import apply_lora
from medai_nb.models import machine_memory, skeleton
from medai_nb.plan import (
    RowMemory,
    kept_bytes,
    memory_estimate,
    memory_fit,
    memory_table,
    parameter_table,
    plan_lora,
    plot_plan,
    require_fit,
    row_memory,
    smaller_settings,
    with_settings,
)


def test_the_measured_copy_keeps_what_the_whole_model_keeps(tiny_config):
    """One layer and the rest, measured on copies of one and two layers, give what the whole model keeps for its rows."""
    from transformers import AutoModelForCausalLM

    from medai_nb.examples import Collator
    from medai_nb.fast_layers import fast_layers

    config = RunConfig.load({"lora_r": 4, "precision": "fp32", "batch_size": 3})
    settings = tiny_config
    settings.vocab_size = 64  # as the copies have it
    row = row_memory(settings, config, precision="fp32", length=128, record=64)
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32, attn_implementation="sdpa")
    model = apply_lora(model, config.lora, seed=0).train()
    faster = fast_layers(model, True)
    labels = [*[-100] * 127, 1]
    one = {"input_ids": [0] * 128, "labels": labels, "position_ids": [*range(64), *range(64)]}
    collate = Collator(0, labelled_head=False, record_bounds="attention" in faster)
    measured = kept_bytes(model, collate([one] * 3) | {"use_cache": False})
    assert row.of(config.training)[0] == pytest.approx(measured, rel=0.1)


def test_plan_is_json_and_adds_up(tiny_llama):
    config = RunConfig.load({"model_name": str(tiny_llama), "lora_r": 8, "precision": "fp32"})
    plan = plan_lora(config)
    assert json.loads(json.dumps(plan)) == plan
    assert plan["parameters"]["trainable"] == sum(
        row["parameters"] for row in plan["parameters"]["by_target"]
    )
    assert plan["parameters"]["total"] == plan["base_model"]["parameters"] + plan["parameters"]["trainable"]
    assert plan["memory"]["parts"]["weights"] == plan["base_model"]["parameters"] * 4
    assert plan["base_model"]["weights_hash"].startswith("sha256:")
    assert plan["training"]["estimated_steps"] is None
    assert parameter_table(plan)[-1]["parameters"] == plan["parameters"]["trainable"]
    assert memory_table(plan)[-1]["part"] == "all"
    assert plot_plan(plan).axes


def test_plan_reads_no_weights(tiny_llama, monkeypatch):
    import safetensors
    from transformers import AutoModelForCausalLM

    def refuse(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr(safetensors, "safe_open", refuse)
    assert plan_lora(RunConfig.load({"model_name": str(tiny_llama)}))["memory"]["fits"]


def test_steps_follow_from_rows_batch_and_epochs(tiny_llama):
    settings = {
        "model_name": str(tiny_llama),
        "packing": False,
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_accelerators": 2,
        "num_train_epochs": 3,
    }
    summary = {"examples": 100, "tokens": 5000, "labelled_tokens": 500}
    steps = plan_lora(RunConfig.load(settings), summary)["training"]
    assert steps["rows_per_step"] == 16
    assert steps["estimated_steps"] == 7 * 3
    limited = plan_lora(RunConfig.load(settings | {"max_steps": 5}), summary)["training"]
    assert limited["estimated_steps"] == 5


def test_packed_rows_are_as_long_as_the_longest_record_needs(tiny_llama):
    def row_length(longest, **settings):
        summary = {"examples": 10, "tokens": 1000, "labelled_tokens": 100, "longest": longest}
        return plan_lora(RunConfig.load({"model_name": str(tiny_llama), **settings}), summary)["training"][
            "row_length"
        ]

    assert row_length(100) == 256
    assert row_length(400) == 400
    assert row_length(100, packing=False) == 100


def test_zero_stages_share_out_the_parts_that_they_say(tiny_llama):
    def parts(stage):
        settings = {
            "model_name": str(tiny_llama),
            "zero_stage": stage,
            "num_accelerators": 2,
            "precision": "fp32",
        }
        return plan_lora(RunConfig.load(settings))["memory"]["parts"]

    one, two, three = parts(1), parts(2), parts(3)
    assert one["gradients"] == 2 * two["gradients"]
    assert two["weights"] == 2 * three["weights"]
    assert one["optimizer"] == three["optimizer"] == parts(0)["optimizer"] * 12 // 8 // 2
    assert one["activations"] == two["activations"]


def test_checkpointing_and_quantization_lower_the_estimate(tiny_llama):
    def parts(**settings):
        return plan_lora(RunConfig.load({"model_name": str(tiny_llama), **settings}))["memory"]["parts"]

    plain = parts()
    assert parts(gradient_checkpointing=True)["activations"] < plain["activations"]
    assert parts(use_4bit=True)["weights"] < parts(use_8bit=True)["weights"] < plain["weights"]


def machine(available: int, accelerator: int | None = None, devices: int = 1) -> dict:
    kind = "cuda" if accelerator else "cpu"
    return {"kind": kind, "devices": devices if accelerator else 0, "accelerator": accelerator} | {
        "host": available,
        "host_available": available,
    }


@pytest.fixture
def large_llama(tmp_path, tiny_llama):
    """A configuration of a model with more activations than process; no weights are there, and none are asked for."""
    import shutil

    folder = tmp_path / "large"
    shutil.copytree(tiny_llama, folder)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 24}
    (folder / "config.json").write_text(json.dumps(settings))
    return str(folder)


def test_a_plan_that_does_not_fit_is_refused_with_the_cheapest_that_does(large_llama):
    config = RunConfig.load({"model_name": large_llama, "batch_size": 16, "precision": "bf16"})
    whole = plan_lora(config, machine=machine(64 * 2**30))["memory"]
    assert whole["fits"] and "nearest" not in whole
    needed = []
    for share in (0.99, 0.7, 0.45):
        tight = machine(int(whole["needed"] * share))
        plan = plan_lora(config, machine=tight)
        nearest = plan["memory"]["nearest"]
        with pytest.raises(UserError, match="does not fit: about .* What fits: training"):
            require_fit(plan, config)
        fitting = plan_lora(with_settings(config, nearest), machine=tight)
        require_fit(fitting, config)
        needed.append(fitting["memory"]["needed"])
        # What costs less does not fit.
        for settings in smaller_settings(config, 1, on_gpu=False):
            if settings == nearest:
                break
            assert not plan_lora(with_settings(config, settings), machine=tight)["memory"]["fits"], settings
    assert needed == sorted(needed, reverse=True)
    ignored = config.model_copy(deep=True)
    ignored.training.ignore_memory_plan = True
    require_fit(plan, ignored)


def test_a_plan_that_nothing_makes_fit_says_so(tiny_llama):
    plan = plan_lora(RunConfig.load({"model_name": str(tiny_llama)}), machine=machine(2**20))
    assert plan["memory"]["nearest"] is None
    with pytest.raises(UserError, match="choose a smaller model or shorter records"):
        require_fit(plan, RunConfig())


def test_smaller_micro_batches_train_the_same(tiny_llama):
    for micro, steps in ((8, 1), (6, 2), (5, 3)):
        config = RunConfig.load({"batch_size": micro, "gradient_accumulation_steps": steps})
        for settings in smaller_settings(config, 1, on_gpu=False):
            changed = with_settings(config, settings).training
            batch = changed.per_device_train_batch_size * changed.gradient_accumulation_steps
            assert batch == micro * steps, settings


def test_gpus_are_given_stages_and_offloading_and_a_deepspeed_file_is_left_alone():
    two_gpus = smaller_settings(RunConfig(), 2, on_gpu=True)
    assert {"training.zero_stage": 3} in two_gpus
    assert {"training.zero_stage": 2, "training.cpu_offloading": True} in two_gpus
    given = RunConfig.load({"training": {"deepspeed": {"zero_optimization": {"stage": 2}}}})
    assert not any("training.zero_stage" in way for way in smaller_settings(given, 2, on_gpu=True))


def test_the_tightest_place_decides():
    memory = {"accelerator": 10, "host": 30}
    assert memory_fit(memory, machine(59, accelerator=20), ranks_here=2) == {
        "needed": 60,
        "available": 59,
        "fits": False,
        "where": "in main memory",
    }
    assert memory_fit(memory, machine(600, accelerator=9), ranks_here=2)["where"] == "on each GPU"
    assert memory_fit(memory, machine(80), ranks_here=2)["fits"]
    assert not memory_fit(memory, machine(79), ranks_here=2)["fits"]


def test_a_model_that_cannot_be_cut_is_planned_by_a_rule_and_that_is_said(tiny_llama, monkeypatch):
    def broken(settings, layers):
        raise AttributeError("this configuration has no such thing")

    config = RunConfig.load({"model_name": str(tiny_llama)})
    measured = plan_lora(config)
    monkeypatch.setattr("medai_nb.plan._shallow", broken)
    plan = plan_lora(config)
    assert any("by a rule" in note and "AttributeError" in note for note in plan["notes"])
    share = plan["memory"]["parts"]["activations"] / measured["memory"]["parts"]["activations"]
    assert 0.2 < share < 5 and not any("by a rule" in note for note in measured["notes"])


def test_loftq_is_planned_by_measuring_like_any_other(tiny_llama):
    settings = {"model": {"name": str(tiny_llama), "use_4bit": True}}
    plain, loftq = (
        plan_lora(RunConfig.load(settings | {"lora": {"init": init}})) for init in ("default", "loftq")
    )
    assert loftq["notes"] == plain["notes"] == []
    assert loftq["memory"]["parts"] == plain["memory"]["parts"]


def test_ranks_that_share_a_machine_share_its_memory(tiny_llama, tmp_path):
    (tmp_path / "hosts").write_text("one slots=1\ntwo slots=1\n")
    needed = {}
    for name, settings in {
        "alone": {},
        "two here": {"num_accelerators": 2},
        "one on each of two": {"num_accelerators": 2, "hostfile": str(tmp_path / "hosts")},
    }.items():
        config = RunConfig.load({"model_name": str(tiny_llama), "zero_stage": 0, **settings})
        needed[name] = plan_lora(config, machine=machine(64 * 2**30))["memory"]["needed"]
    assert needed["two here"] == 2 * needed["alone"] == 2 * needed["one on each of two"]


def test_memory_of_a_frozen_skeleton_is_its_weights():
    from conftest import tiny_configs

    bones = skeleton(tiny_configs()["llama"], "bf16").requires_grad_(False)
    count = sum(weight.numel() for weight in bones.parameters())
    config = RunConfig.load({"zero_stage": 0})
    estimate = memory_estimate(config, bones, RowMemory(1, 1, 2, 1), length=32, device="cuda")
    assert estimate["parts"]["weights"] == 2 * count
    assert estimate["parts"]["adapter"] == estimate["parts"]["optimizer"] == estimate["parts"]["process"] == 0
    assert estimate["accelerator"] == sum(estimate["parts"].values()) and estimate["host"] == 0


def test_offloaded_parts_are_counted_for_the_host():
    from conftest import tiny_configs

    bones = skeleton(tiny_configs()["llama"], "bf16")
    config = RunConfig.load({"zero_stage": 3, "cpu_offloading": True})
    estimate = memory_estimate(config, bones, RowMemory(1, 1, 2, 1), length=32, device="cuda")
    parts = estimate["parts"]
    assert estimate["host"] == parts["optimizer"] + parts["weights"] + parts["adapter"] > 0
    assert estimate["host"] + estimate["accelerator"] == sum(parts.values())


MEASURE = """
import json, sys, tempfile
from pathlib import Path
from medai_nb.config import RunConfig
from medai_nb.plan import plan_lora
from medai_nb.trainer import train

config = RunConfig.load(json.loads(sys.argv[1]))
outcome = train(config, Path(sys.argv[2]), None, Path(tempfile.mkdtemp()))
# That of this program alone: getrusage gives the peak of the process that started it, where that was larger.
status = Path("/proc/self/status").read_text().split()
peak = int(status[status.index("VmHWM:") + 1]) * 1024
print(json.dumps({"peak": peak, "planned": plan_lora(config, outcome.examples["train"])["memory"]["needed"]}))
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="weights and activations are on the GPU here")
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux")
@pytest.mark.parametrize(
    "settings",
    [
        {"per_device_train_batch_size": 4},
        {"per_device_train_batch_size": 4, "gradient_checkpointing": True, "packing": False},
    ],
    ids=["packed", "padded, checkpointing"],
)
def test_the_plan_is_within_15_per_cent_of_the_measured_peak(settings, tmp_path, embedded_folder):
    """On the embedded model, in a process of its own, as a job trains it."""
    from datasets import Dataset, DatasetDict

    from medai_nb.demo_corpus import demo_records

    rows = [
        {name: row[name] for name in ("id", "text", "label")} for row in demo_records(patients=40, notes=60)
    ]
    DatasetDict(train=Dataset.from_list(rows), validation=Dataset.from_list(rows[:8])).save_to_disk(tmp_path)
    config = {
        "phi": {"enabled": False, "allow_unprotected": True},
        "data": {"max_length": 256},
        "training": {"max_steps": 2, "report_to": [], **settings},
    }
    command = [sys.executable, "-c", MEASURE, json.dumps(config), str(tmp_path)]
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of an earlier test
    environment = {name: value for name, value in os.environ.items() if name not in launched}
    result = subprocess.run(command, capture_output=True, text=True, timeout=580, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["planned"] == pytest.approx(found["peak"], rel=0.15)


def test_memory_that_a_container_grants_counts(tmp_path, monkeypatch):
    from medai_nb import models

    assert models.control_group_memory(tmp_path) is None
    for name, content in {"max": "max", "current": "5", "stat": "anon 1\ninactive_file 3\n"}.items():
        (tmp_path / f"memory.{name}").write_text(content)
    assert models.control_group_memory(tmp_path) is None, "nothing is limited"
    (tmp_path / "memory.max").write_text("4000000\n")
    granted = models.control_group_memory(tmp_path)
    assert granted == {"total": 4_000_000, "available": 4_000_000 - 5 + 3}
    monkeypatch.setattr(models, "control_group_memory", lambda: granted)
    assert (machine_memory()["host"], machine_memory()["host_available"]) == (4_000_000, 3_999_998)


def test_rows_longer_than_the_context_are_announced(tiny_llama):
    plan = plan_lora(RunConfig.load({"model_name": str(tiny_llama), "data.max_length": 4096}))
    assert any("1024 tokens" in note for note in plan["notes"])


def test_fp16_on_a_cpu_stops_the_plan(tiny_llama):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, where fp16 works")
    with pytest.raises(ConfigError, match="fp16 does not train on a CPU"):
        plan_lora(RunConfig.load({"model_name": str(tiny_llama), "fp16": True}))
