"""A tiny finished run, and its release: what the tests of export and serving start from."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from medai_nb.config import RunConfig
from medai_nb.metrics import compare_classifiers
from medai_nb.run_folder import content_hash, write_json_atomic, write_text_atomic


def tuned_model(tiny_llama):
    """A PEFT model whose adapter says something else than the base."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        tuned = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.3)
    return tuned.eval()


def write_tiny_run(folder, tiny_llama, tuned, labels=("Ear", "Eye"), **data) -> RunConfig:
    """Everything that the stages before the export write, as small as possible; data: settings of that section."""
    import datasets

    from medai_nb.phi.validate import dataset_fingerprint, write_certificate
    from medai_nb.trainer import describe_base

    config = RunConfig(
        name="tiny", model={"name": str(tiny_llama), "precision": "fp32"}, output_dir=str(folder), data=data
    )
    truth, base, better = ["Eye", "Ear", "Eye", "Ear"], ["Eye"] * 4, ["Eye", "Ear", "Eye", "Eye"]
    report = compare_classifiers(truth, base, better, ["Ear", "Eye"], patients=list("abcd"), resamples=100)
    figures = {"classification": report | {"labels": list(labels) if labels else None}}
    write_json_atomic(folder / "evaluation" / "metrics.json", figures)
    plan = {
        "base_model": {
            "name": str(tiny_llama),
            "kind": "folder",
            "hub_id": None,
            "weights_hash": "sha256:0",
        },
        "lora": {"r": 4, "alpha": 8, "dropout": 0.0, "targets": ["q_proj", "v_proj"]},
        "parameters": {"trainable": 1, "total": 2},
    }
    write_json_atomic(folder / "lora" / "plan.json", plan)
    report = {
        "source": {"all": "/srv/someone/ward-7/notes.csv"},
        "counts": {"train": 8, "validation": 2, "test": 4},
        "patients": {"train": 6, "validation": 2, "test": 4},
        "group_by": ["patient_id"],
    }
    write_json_atomic(folder / "data" / "data_report.json", report)
    training = {"metrics": {"eval_loss": 0.5}, "steps": 3, "precision": "fp32", "world_size": 2}
    training["base_model"] = describe_base(config)
    write_json_atomic(folder / "train" / "training_report.json", training)
    splits = datasets.DatasetDict(
        {"test": datasets.Dataset.from_list([{"id": "1", "text": "[NAME] coughs."}])}
    )
    splits.save_to_disk(folder / "protected")
    certificate = {"passed": True, "fingerprint": dataset_fingerprint(splits), "method": "replacement"}
    detection = {"recall": {"value": 0.999, "low": 0.99, "high": 1.0}, "leaking_documents": 1}
    write_certificate(folder / "protected", certificate | {"detection": detection})
    adapter = folder / "train" / "lora_adapter"
    tuned.save_pretrained(adapter)
    (adapter / "README.md").unlink()
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(adapter)
    measured = {"verdict": "passed", "reasons": ["secrets do not stand out: 1.50 bits in answers"]}
    measured["adapter"] = content_hash(adapter / "adapter_model.safetensors")
    write_json_atomic(folder / "evaluation" / "leakage.json", measured)
    write_text_atomic(folder / "run.yaml", config.to_yaml())
    return config


def tiny_release(folder, tiny_llama, tuned, labels=None, **data):
    """The release of a tiny run in `folder`, for instructions unless labels are given."""
    from medai_nb.export import export_release

    config = write_tiny_run(folder / "run", tiny_llama, tuned, labels, **data)
    export_release(config, folder / "run", folder / "run" / "release")
    return folder / "run" / "release"
