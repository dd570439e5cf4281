"""Configurations as people write them elsewhere, and every family of models: each is trained for two steps."""

import math
from pathlib import Path

import datasets
import pytest
import torch
import yaml

from medai_nb.config import PHIConfig, load_config
from medai_nb.config_check import config_lines, config_problems
from medai_nb.models import load_tokenizer, zero_stage
from medai_nb.phi.protect import protect_dataset
from medai_nb.trainer import train

# Flat, with the names of transformers and of DeepSpeed configurations beside each other.
FLAT = {
    "model_name": "microsoft/DialoGPT-medium",
    "output_dir": "./lora_checkpoints",
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.1,
    "lora_target_modules": ["q_proj", "v_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "learning_rate": 0.0002,
    "weight_decay": 0.001,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 8,
    "num_train_epochs": 3,
    "logging_steps": 10,
    "save_steps": 500,
    "eval_steps": 500,
    "dataloader_num_workers": 4,
    "warmup_steps": 100,
    "lr_scheduler_type": "cosine",
    "max_length": 512,
    "train_file": "./data/train.json",
    "validation_file": "./data/validation.json",
    "enable_phi_protection": True,
    "phi_redaction_method": "replacement",
    "phi_validation_strict": True,
    "fp16": True,
    "gradient_checkpointing": True,
    "deepspeed": "configs/deepspeed_config.json",
}
FOR_LARGE_MODELS = {
    "model_name": "facebook/opt-2.7b",
    "lora_r": 64,
    "lora_alpha": 128,
    "lora_dropout": 0.05,
    "lora_target_modules": [
        "q_proj", "v_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "mlp.down_proj", "mlp.up_proj",
    ],
    "learning_rate": 0.0001,
    "weight_decay": 0.01,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 16,
    "num_train_epochs": 5,
    "logging_steps": 5,
    "save_steps": 100,
    "eval_steps": 100,
    "deepspeed": "configs/large_model_stage3_config.json",
    "gradient_checkpointing": True,
    "max_grad_norm": 1.0,
    "use_8bit": True,
    "cpu_offloading": True,
}  # fmt: skip
NESTED = {
    "training": {
        "batch_size": 4,
        "gradient_accumulation_steps": 8,
        "learning_rate": 2e-4,
        "max_steps": 100,
        "logging_steps": 10,
        "early_stopping_patience": 3,
    },
    "lora": {
        "r": 16,
        "alpha": 32,
        "dropout": 0.1,
        "target_modules": ["q_proj", "v_proj", "k_proj", "o_proj"],
    },
    "model": {"name": "microsoft/Phi-4-mini-instruct", "max_length": 512},
}
TWO_STEPS = {
    "training.max_steps": 2,
    "training.logging_steps": 1,
    "training.eval_steps": 2,
    "training.save_steps": 2,
    "training.gradient_accumulation_steps": 2,
    "training.dataloader_num_workers": 0,
    "training.warmup_steps": 1,
    "training.report_to": "[]",
    "model.precision": "fp32",
    "data.instruction": "Which organ?",
}


pytestmark = pytest.mark.usefixtures("restored_environment")


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    """What a DeepSpeed file writes stays in the test's folder."""
    monkeypatch.chdir(tmp_path)


def protect(rows, folder):
    """The folder of these records, protected: 24 to train on, the others for validation."""
    splits = {
        "train": datasets.Dataset.from_list(rows[:24]),
        "validation": datasets.Dataset.from_list(rows[24:]),
    }
    protect_dataset(datasets.DatasetDict(splits), PHIConfig(), folder)
    return folder


@pytest.fixture(scope="module")
def protected(tmp_path_factory):
    rows = [
        {
            "id": str(n),
            "text": "Patient has a " + ["rash", "cough"][n % 2] + " again" * (n % 4),
            "label": ["Skin", "Lung"][n % 2],
        }
        for n in range(30)
    ]
    return protect(rows, tmp_path_factory.mktemp("records") / "protected")


@pytest.fixture(scope="module")
def instructed(tmp_path_factory):
    rows = [
        {
            "id": str(n),
            "messages": [
                {"role": "user", "content": f"What helps against {['itching', 'coughing'][n % 2]}?"},
                {"role": "assistant", "content": "Ask your doctor" + " soon" * (n % 3) + "."},
            ],
        }
        for n in range(30)
    ]
    return protect(rows, tmp_path_factory.mktemp("records") / "instructed")


def tiny_model(name, folder, embedded_folder):
    """A random model of two layers of an architecture, with the tokenizer of the embedded model."""
    import transformers

    tokenizer = load_tokenizer(str(embedded_folder))
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    specials = {
        "GPT2": {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "vocab_size": len(tokenizer),
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "OPT": {**shape, "ffn_dim": 64, "word_embed_proj_dim": 32},
        "Gemma": {**shape, "head_dim": 8},
        "Gemma3Text": {**shape, "head_dim": 8},
        "Qwen3": {**shape, "head_dim": 8},
    }
    config = getattr(transformers, f"{name}Config")(**specials.get(name, shape))
    torch.manual_seed(0)
    # Not by from_config: after an earlier ZeRO-3 run in this process it would make a partitioned model.
    transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def two_steps(settings, model, protected, folder, **changes):
    """Train two steps; the outcome."""
    wanted = {**TWO_STEPS, "model.name": model, **changes}
    source = {
        name: value
        for name, value in settings.items()
        if name not in ("train_file", "validation_file", "output_dir")
    }
    config = load_config(source, [f"{name}={value}" for name, value in wanted.items()])
    outcome = train(config, protected, None, folder)
    assert outcome.steps == 2 and outcome.adapter_weights
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in outcome.history if "loss" in entry)
    return outcome


def test_a_flat_configuration_is_read_and_trained(protected, tmp_path, embedded_folder):
    file = tmp_path / "lora_config.yaml"
    file.write_text(yaml.safe_dump(FLAT))
    config = load_config(file, ["model.precision=auto"])
    assert (config.lora.r, config.lora.alpha, config.data.max_length) == (16, 32, 512)
    assert config.training.gradient_checkpointing and config.training.deepspeed == FLAT["deepspeed"]
    assert "  r: 16  # lora_config.yaml: lora_r" in config_lines(file)
    if not torch.cuda.is_available():
        assert any("precision is fp16" in problem for problem in config_problems(load_config(file)))
    outcome = two_steps(
        FLAT, tiny_model("GPT2", tmp_path / "gpt2", embedded_folder), protected, tmp_path / "train"
    )
    assert outcome.zero_stage == zero_stage(config.training) > 0


def test_a_configuration_for_large_models_is_trained_at_zero_3(protected, tmp_path, embedded_folder):
    model = tiny_model("OPT", tmp_path / "opt", embedded_folder)
    outcome = two_steps(FOR_LARGE_MODELS, model, protected, tmp_path / "train", **{"model.use_8bit": False})
    assert outcome.zero_stage == 3


def test_a_nested_configuration_is_trained(protected, tmp_path, embedded_folder):
    model = tiny_model("Phi3", tmp_path / "phi3", embedded_folder)
    assert load_config(NESTED).training.early_stopping_patience == 3
    two_steps(NESTED, model, protected, tmp_path / "train")


@pytest.mark.parametrize(
    "name", ["single_node_config", "multi_node_config", "large_model_stage3_config", "deepspeed_config"]
)
def test_every_deepspeed_file_that_is_shipped_trains(tiny_llama, protected, tmp_path, name):
    outcome = two_steps({}, str(tiny_llama), protected, tmp_path / "train", **{"training.deepspeed": name})
    assert outcome.zero_stage == {"large_model_stage3_config": 3, "multi_node_config": 2}.get(
        name, outcome.zero_stage
    )


def test_every_yaml_that_is_shipped_trains(tiny_llama, protected, instructed, tmp_path, monkeypatch):
    from importlib import resources

    monkeypatch.setenv("MEDAI_DATA", str(tmp_path))
    names = sorted(path.stem for path in Path(str(resources.files("medai_nb") / "configs")).rglob("*.yaml"))
    assert {"quickstart", "notebook", "medquad", "mts_dialog"} <= set(names)
    for name in names:
        changes = {**TWO_STEPS, "model.name": str(tiny_llama)}
        config = load_config(name, [f"{key}={value}" for key, value in changes.items()])
        records = instructed if config.data.task == "instruction" else protected
        outcome = train(config, records, None, tmp_path / name)
        losses = [entry["loss"] for entry in outcome.history if "loss" in entry]
        assert len(losses) == outcome.steps == 2 and all(map(math.isfinite, losses)), name


@pytest.mark.parametrize(
    "family", ["GPT2", "OPT", "Llama", "Phi", "Phi3", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma3Text"]
)
def test_every_family_learns_its_two_steps(family, protected, tmp_path, embedded_folder):
    model = tiny_model(family, tmp_path / "model", embedded_folder)
    fast = two_steps({}, model, protected, tmp_path / "fast")
    plain = two_steps({}, model, protected, tmp_path / "plain", **{"training.fast_layers": False})
    pairs = [[entry["loss"] for entry in outcome.history if "loss" in entry] for outcome in (fast, plain)]
    assert pairs[0] == pytest.approx(pairs[1], abs=1e-4), (
        "our layers and those of transformers give the same losses"
    )
    assert plain.fast_layers == {} and plain.shared_beginning == 0
    # GPT-2 drops attention at random, and OPT is not packed.
    assert (fast.shared_beginning > 0) is (family not in ("GPT2", "OPT"))
