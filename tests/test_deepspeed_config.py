"""DeepSpeed settings: presets, foreign configurations put right, ranks by hand."""

import copy
import json
import os
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import pytest

from medai_nb.config import ConfigError, TrainingConfig
from medai_nb.deepspeed_config import (
    DeepSpeedUtils,
    deepspeed_plan,
    deepspeed_settings,
    known_keys,
    normalize_deepspeed,
    section_keys,
)
from medai_nb.models import zero_stage

SHIPPED = sorted(Path(str(resources.files("medai_nb"))).glob("configs/deepspeed/*.json"))
TENSORBOARD = {"tensorboard": {"enabled": True, "output_path": "./logs/tensorboard/"}}
PINNED = {"device": "cpu", "pin_memory": True}

# Configurations as users have them, with the keys that each needs repaired.
FOREIGN = {
    "single_node_config": (
        {
            "zero_optimization": {
                "stage": 1,
                "offload_optimizer": False,
                "allgather_partitions": True,
                "reduce_scatter": True,
                "allgather_bucket_size": 5e8,
                "reduce_bucket_size": 5e8,
            },
            "bfloat16": {"enabled": True},
            "zero_allow_untested_optimizer": True,
            "train_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 1.0,
            "steps_per_print": 10,
            "wall_clock_breakdown": True,
            "logging": TENSORBOARD,
        },
        {"zero_optimization.offload_optimizer", "bfloat16", "train_batch_size", "logging.tensorboard"},
    ),
    "multi_node_config": (
        {
            "zero_optimization": {
                "stage": 2,
                "offload_optimizer": PINNED,
                "allgather_partitions": True,
                "reduce_scatter": True,
                "allgather_bucket_size": 2e8,
                "reduce_bucket_size": 2e8,
                "sub_group_size": 1e9,
                "prefetch_bucket_size": 5e7,
                "param_persistence_threshold": 4e5,
                "stage3_prefetch_stream_reserve_memory": 5e7,
            },
            "bfloat16": {"enabled": True},
            "train_batch_size": 4,
            "gradient_accumulation_steps": 8,
            "gradient_clipping": 1.0,
            "steps_per_print": 10,
            "save_interval": 100,
            "logging": TENSORBOARD,
        },
        {
            "zero_optimization.prefetch_bucket_size",
            "zero_optimization.param_persistence_threshold",
            "zero_optimization.stage3_prefetch_stream_reserve_memory",
            "bfloat16",
            "train_batch_size",
            "gradient_accumulation_steps",
            "save_interval",
            "logging.tensorboard",
        },
    ),
    "large_model_stage3_config": (
        {
            "zero_optimization": {
                "stage": 3,
                "offload_optimizer": PINNED,
                "offload_param": PINNED,
                "gather_16bit_weights_on_model_save": True,
            },
            "bfloat16": {"enabled": True},
            "train_batch_size": 1,
            "gradient_accumulation_steps": 32,
            "gradient_clipping": 1.0,
            "sub_group_size": 1e9,
            "prefetch_bucket_size": 5e7,
            "param_persistence_threshold": 4e5,
            "stage3_prefetch_stream_reserve_memory": 5e7,
            "gather_bucket_size": 5e8,
            "reduce_bucket_size": 5e8,
            "logging": TENSORBOARD,
            "checkpoint": {"use_pin_memory": True},
        },
        {
            "zero_optimization.gather_16bit_weights_on_model_save",
            "bfloat16",
            "train_batch_size",
            "gradient_accumulation_steps",
            "sub_group_size",
            "prefetch_bucket_size",
            "param_persistence_threshold",
            "stage3_prefetch_stream_reserve_memory",
            "gather_bucket_size",
            "reduce_bucket_size",
            "logging.tensorboard",
            "checkpoint.use_pin_memory",
        },
    ),
    "deepspeed_config": (
        {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 8,
            "optimizer": {"type": "AdamW", "params": {"lr": 2e-4, "betas": [0.9, 0.999], "eps": 1e-8}},
            "fp16": {"enabled": True},
            "zero_optimization": {
                "stage": 3,
                "offload_optimizer": {"device": "cpu"},
                "offload_param": {"device": "cpu"},
            },
            "wall_clock_breakdown": False,
        },
        {"train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "optimizer"},
    ),
}


def keys_of(warnings: list[str]) -> list[str]:
    return sorted(warning.partition(":")[0] for warning in warnings)


def as_the_trainer_fills_it(settings: dict, training: TrainingConfig, precision: str, world_size: int = 1):
    """The trainer's own processing of a configuration, then DeepSpeed's reader."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    arguments = SimpleNamespace(
        world_size=world_size,
        per_device_train_batch_size=training.per_device_train_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        max_grad_norm=training.max_grad_norm,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        adam_beta1=0.9,
        adam_beta2=training.adam_beta2,
        adam_epsilon=1e-8,
        save_on_each_node=False,
        fp16=precision == "fp16",
        bf16=precision == "bf16",
        fp16_full_eval=False,
        bf16_full_eval=False,
        get_warmup_steps=lambda steps: 0,
    )
    filled = HfTrainerDeepSpeedConfig(copy.deepcopy(settings))
    filled.trainer_config_process(arguments)
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=64))
    filled.trainer_config_finalize(arguments, model, num_training_steps=10)
    assert "auto" not in json.dumps(filled.config)
    reader = DeepSpeedConfig.__new__(DeepSpeedConfig)
    reader.world_size, reader.global_rank, reader._param_dict = world_size, 0, filled.config
    reader._initialize_params(filled.config)
    reader._configure_train_batch_size()
    reader._do_sanity_check()
    return reader


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_file_is_accepted_with_one_warning_for_each_repaired_key(name):
    foreign, repaired = FOREIGN[name]
    settings, warnings = normalize_deepspeed(foreign, TrainingConfig())
    assert keys_of(warnings) == sorted(repaired)
    assert set(settings) <= known_keys()[""]
    assert set(settings["zero_optimization"]) <= set(section_keys("zero_optimization").values())
    assert normalize_deepspeed(settings, TrainingConfig()) == (settings, []), (
        "a repaired file needs no repair"
    )


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_file_runs_as_the_run_says(name):
    training = TrainingConfig(
        deepspeed=FOREIGN[name][0], per_device_train_batch_size=2, gradient_accumulation_steps=3
    )
    settings, _ = deepspeed_plan(training, "bf16", world_size=4, accelerator=True)
    reader = as_the_trainer_fills_it(settings, training, "bf16", world_size=4)
    assert reader.train_batch_size == 2 * 3 * 4
    assert reader.bfloat16_config.enabled and not reader.float16_config.enabled
    assert reader.zero_optimization_stage == FOREIGN[name][0]["zero_optimization"]["stage"]


def test_a_repair_leaves_the_file_of_the_user_alone():
    foreign = copy.deepcopy(FOREIGN["multi_node_config"][0])
    normalize_deepspeed(foreign)
    assert foreign == FOREIGN["multi_node_config"][0]


def test_names_of_stage_three_are_repaired_there_and_dropped_below():
    block = {"stage": 3, "prefetch_bucket_size": 5e7}
    settings, _ = normalize_deepspeed({"zero_optimization": block})
    assert settings["zero_optimization"] == {"stage": 3, "stage3_prefetch_bucket_size": 50_000_000}
    settings, warnings = normalize_deepspeed({"zero_optimization": block | {"stage": 2}})
    assert settings["zero_optimization"] == {"stage": 2}
    assert "only under ZeRO stage 3" in warnings[0]


def test_keys_at_the_wrong_level_are_moved():
    settings, warnings = normalize_deepspeed({"zero_optimization": {"stage": 2}, "reduce_bucket_size": 1e6})
    assert settings["zero_optimization"]["reduce_bucket_size"] == 1_000_000
    assert warnings == ["reduce_bucket_size: moved to zero_optimization.reduce_bucket_size"]


def test_unknown_key_is_dropped_with_the_nearest_name():
    _, warnings = normalize_deepspeed(
        {"gradient_cliping": 1.0, "zero_optimization": {"stage": 1, "overlap_com": True}}
    )
    assert "nearest: gradient_clipping" in warnings[0]
    assert "nearest: overlap_comm" in warnings[1]


def test_batch_sizes_of_the_run_win_and_agreement_is_not_worth_a_warning():
    training = TrainingConfig(per_device_train_batch_size=4, gradient_accumulation_steps=8, max_grad_norm=0.5)
    agreeing = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 8,
        "gradient_clipping": 0.5,
    }
    settings, warnings = normalize_deepspeed(agreeing, training)
    assert warnings == [] and set(settings.values()) == {"auto"}
    _, warnings = normalize_deepspeed(agreeing | {"train_micro_batch_size_per_gpu": 16}, training)
    assert "training.per_device_train_batch_size decides" in warnings[0]


def test_offload_switches_of_earlier_days_become_blocks():
    settings, warnings = normalize_deepspeed({"zero_optimization": {"stage": 2, "cpu_offload": True}})
    assert settings["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert len(warnings) == 1


@pytest.mark.parametrize("stage, key", [(2, "offload_param"), (0, "offload_optimizer")])
def test_offload_that_a_stage_does_not_have_is_dropped(stage, key):
    settings, warnings = normalize_deepspeed({"zero_optimization": {"stage": stage, key: {"device": "cpu"}}})
    assert settings["zero_optimization"] == {"stage": stage}
    assert "needs ZeRO stage" in warnings[0]


@pytest.mark.parametrize(
    "foreign, message",
    [
        ({"zero_optimization": {"stage": 7}}, r"stage: 7 is no ZeRO stage"),
        (
            {"zero_optimization": {"stage": 1, "reduce_bucket_size": -5}},
            r"zero_optimization.reduce_bucket_size",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "moon"}}},
            r"offload_optimizer.device",
        ),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}, r"expected a block"),
        ({"fp16": {"enabled": "perhaps"}}, r"fp16.enabled"),
        ({"bf16": "yes"}, r"bf16: expected a block"),
    ],
)
def test_impossible_values_are_refused_by_key(foreign, message):
    with pytest.raises(ConfigError, match=message):
        normalize_deepspeed(foreign)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_file_needs_no_repair_and_is_read_by_trainer_and_deepspeed(path):
    content = json.loads(path.read_text())
    assert normalize_deepspeed(content)[1] == []
    training = TrainingConfig(deepspeed=str(path))
    settings, notes = deepspeed_plan(training, "fp16", world_size=2, accelerator=True)
    assert notes == []
    reader = as_the_trainer_fills_it(settings, training, "fp16", world_size=2)
    assert reader.zero_optimization_stage == content["zero_optimization"]["stage"] == zero_stage(training)


def test_the_four_known_files_are_shipped():
    assert {path.stem for path in SHIPPED} == set(FOREIGN)


@pytest.mark.parametrize(
    "given", ["multi_node_config", "multi_node_config.json", "configs/multi_node_config.json"]
)
def test_shipped_file_is_found_by_its_name(given):
    assert zero_stage(TrainingConfig(deepspeed=given)) == 2


def test_missing_file_names_the_shipped_ones():
    with pytest.raises(
        ConfigError, match="no file nowhere.json; give a JSON file or one of deepspeed_config"
    ):
        deepspeed_settings(TrainingConfig(deepspeed="nowhere.json"), "bf16", 1)


def test_broken_file_is_named(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match=r"broken\.json is no JSON"):
        deepspeed_settings(TrainingConfig(deepspeed=str(tmp_path / "broken.json")), "bf16", 1)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_presets_are_read_by_trainer_and_deepspeed(stage, precision):
    training = TrainingConfig(zero_stage=stage, gradient_accumulation_steps=2)
    settings = deepspeed_settings(training, precision, world_size=2)
    reader = as_the_trainer_fills_it(settings, training, precision, world_size=2)
    assert reader.zero_optimization_stage == stage
    assert (reader.bfloat16_config.enabled, reader.float16_config.enabled) == (
        precision == "bf16",
        precision == "fp16",
    )
    assert reader.optimizer_name is None, "an optimizer block would be compiled"
    assert reader.train_batch_size == 8 * 2 * 2


def test_stage_three_gathers_weights_for_saving_also_from_a_file_that_forgot():
    foreign = {"zero_optimization": {"stage": 3}}
    for training in (TrainingConfig(zero_stage=3), TrainingConfig(deepspeed=foreign)):
        settings, _ = deepspeed_plan(training, "bf16", 2, accelerator=True)
        assert settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True


def test_offload_appears_only_when_asked_and_only_beside_a_gpu():
    plain, _ = deepspeed_plan(TrainingConfig(zero_stage=3), "bf16", 2, accelerator=True)
    assert "offload_optimizer" not in plain["zero_optimization"]
    asked = TrainingConfig(zero_stage=3, cpu_offloading=True)
    offloading, _ = deepspeed_plan(asked, "bf16", 2, accelerator=True)
    assert {"offload_optimizer", "offload_param"} <= set(offloading["zero_optimization"])
    on_cpu, notes = deepspeed_plan(asked, "bf16", 2, accelerator=False)
    assert "offload_optimizer" not in on_cpu["zero_optimization"]
    assert len([note for note in notes if "no GPU to offload from" in note]) == 2


def test_offload_without_zero_is_refused():
    with pytest.raises(ConfigError, match="cpu_offloading needs training.zero_stage"):
        deepspeed_settings(TrainingConfig(zero_stage=0, cpu_offloading=True), "bf16", 1)


def test_precision_of_the_run_wins_over_the_file_and_it_is_said():
    training = TrainingConfig(deepspeed={"fp16": {"enabled": True, "loss_scale_window": 500}})
    settings, notes = deepspeed_plan(training, "bf16", 1, accelerator=True)
    assert settings["fp16"] == {"enabled": False} and settings["bf16"] == {"enabled": True}
    assert any("fp16.enabled: True became False" in note for note in notes)
    kept, notes = deepspeed_plan(training, "fp16", 1, accelerator=True)
    assert kept["fp16"] == {"enabled": True, "loss_scale_window": 500} and notes == []


def test_importing_the_module_does_not_import_deepspeed():
    import subprocess
    import sys

    code = "import sys, medai_nb.deepspeed_config; sys.exit('deepspeed' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.fixture
def clean_environment(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "0")  # so that monkeypatch restores what a test changes
        monkeypatch.delenv(name)


def test_environment_is_set_and_read_back(clean_environment, monkeypatch):
    # An earlier test of this process may have connected ranks, and what is connected counts before the environment.
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    world = DeepSpeedUtils.setup_distributed_environment(
        rank=3, world_size=4, master_addr="node-a", master_port="29500"
    )
    assert world == {
        "rank": 3,
        "local_rank": 1,
        "world_size": 4,
        "master_addr": "node-a",
        "master_port": 29500,
        "backend": None,
        "initialized": False,
    }
    assert (os.environ["RANK"], os.environ["MASTER_PORT"]) == ("3", "29500")


@pytest.mark.parametrize("arguments", [(4, 4), (-1, 2)])
def test_rank_outside_the_world_is_refused(clean_environment, arguments):
    with pytest.raises(ConfigError, match="is not in a world of"):
        DeepSpeedUtils.setup_distributed_environment(*arguments)


def test_port_that_is_none_is_refused(clean_environment):
    with pytest.raises(ConfigError, match="is no port"):
        DeepSpeedUtils.setup_distributed_environment(0, 1, master_port="abc")


@pytest.mark.slow
def test_two_ranks_set_up_by_hand_meet(tmp_path):
    import socket
    import subprocess
    import sys

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = f"""
import sys
from medai_nb.deepspeed_config import DeepSpeedUtils
world = DeepSpeedUtils.setup_distributed_environment(int(sys.argv[1]), 2, "127.0.0.1", {port}, initialize=True)
assert world["initialized"] and world["world_size"] == 2 and world["rank"] == int(sys.argv[1])
import torch
total = torch.ones(1); torch.distributed.all_reduce(total); assert total.item() == 2
torch.distributed.destroy_process_group()
"""
    environment = dict(os.environ, DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    ranks = [
        subprocess.Popen([sys.executable, "-c", program, str(rank)], env=environment) for rank in range(2)
    ]
    assert [rank.wait(timeout=400) for rank in ranks] == [0, 0]
