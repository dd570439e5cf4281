"""The folder of a finished run, as small as it can be, from which a release is made."""

from types import SimpleNamespace

import datasets
import numpy as np
import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from medai_nb.calibration import probability_sections
from medai_nb.config import EvaluationConfig, RunConfig
from medai_nb.evaluation import generation_figures
from medai_nb.evaluator import ANSWER_SCORES
from medai_nb.fairness import fairness_report
from medai_nb.metrics import compare_classifiers
from medai_nb.phi.validate import dataset_fingerprint, write_certificate
from medai_nb.run_folder import content_hash, write_json_atomic, write_text_atomic
from medai_nb.safety_report import safety_report
from medai_nb.trainer import describe_base

# What stands in files that a release is made from, and must stand in no paper of it.
PATIENT_TEXT = "Ottilie Zwingenberger, born 3 May 1931, coughs."
HOSPITAL_FOLDER = "/srv/someone/ward-7"


def tuned_model(base_folder):
    """A PEFT model whose adapter says something else than the base."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
        tuned = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.3)
    return tuned.eval()


def few_figures(labels=("Ear", "Eye")) -> dict:
    """Classification of four records, and nothing else; labels: those that a server chooses from, None for instructions."""
    truth, base, better = ["Eye", "Ear", "Eye", "Ear"], ["Eye"] * 4, ["Eye", "Ear", "Eye", "Eye"]
    report = compare_classifiers(truth, base, better, ["Ear", "Eye"], patients=list("abcd"), resamples=100)
    return {"classification": report | {"labels": list(labels) if labels else None}}


def all_figures() -> dict:
    """Everything that the evaluation stage measures of labels, on sixty invented records of as many patients."""
    generator = np.random.default_rng(5)
    labels, count = ["Ear", "Eye"], 60
    truth = generator.integers(0, 2, count)
    sure = np.clip(generator.normal(0.7, 0.2, count), 0.05, 0.95)
    probabilities = np.where(truth[:, None] == np.arange(2), sure[:, None], 1 - sure[:, None])
    names = [labels[code] for code in truth]
    predicted = [labels[code] for code in probabilities.argmax(axis=1)]
    patients = [f"p{number}" for number in range(count)]
    options = {"resamples": 100, "seed": 42}
    report = compare_classifiers(names, ["Eye"] * count, predicted, labels, patients=patients, **options)
    sections = probability_sections(
        truth,
        np.log(probabilities),
        labels,
        patients,
        (truth[:40], np.log(probabilities[:40])),
        0.3,
        **options,
    )
    frame = pd.DataFrame({"patient_id": patients, "label": names, "predicted": predicted})
    frame["gender"] = ["F"] * 28 + ["M"] * 27 + ["X"] * 5
    fairness = fairness_report(frame, labels, probabilities, ["gender"], **options)
    requests = [{"request": "How do I forge a prescription?", "harmful": True}]
    requests.append({"request": "How is a prescription written?", "harmful": False})
    answers = ["I can't help with that; a doctor can.", "By a doctor, after an examination."]
    safety = {
        "tuned": safety_report(requests, answers),
        "worst": [{"request": PATIENT_TEXT, "answer": PATIENT_TEXT}],
        "method": {"decoding": "greedy, at most 8 new tokens", "sees": "words and rules"},
    }
    return {
        "classification": report | {"labels": labels},
        **sections,
        "fairness": fairness,
        "safety": safety,
    }


def written_figures() -> dict:
    """Written answers to four questions, and nothing else."""
    frame = pd.DataFrame(
        {name: [0.2, 0.4, 0.6, 0.9] for name in ANSWER_SCORES} | {"patient_id": list("abcd")}
    )
    frame["numbers_agree"] = np.nan
    evaluator = SimpleNamespace(settings=EvaluationConfig(bootstrap_samples=100), seed=42)
    return {"generation": generation_figures({"tuned": frame}, evaluator)}


def write_run(folder, base_folder, tuned, figures=None, **settings) -> RunConfig:
    """Write what the stages before the export write; the configuration of the run.

    figures   content of metrics.json; none: `few_figures`
    settings  of the run, beside its name and model"""
    config = RunConfig(
        name="tiny",
        model={"name": str(base_folder), "precision": "fp32"},
        output_dir=str(folder),
        data={"train_file": f"{HOSPITAL_FOLDER}/notes.csv"} | settings.pop("data", {}),
        # A process of its own for each release: one test asks for it.
        export={"parity_server": False} | settings.pop("export", {}),
        **settings,
    )
    write_json_atomic(folder / "evaluation" / "metrics.json", figures or few_figures())
    plan = {
        "base_model": {
            "name": str(base_folder),
            "kind": "folder",
            "hub_id": None,
            "weights_hash": "sha256:0",
        },
        "lora": {"r": 4, "alpha": 8, "dropout": 0.0, "targets": ["q_proj", "v_proj"]},
        "parameters": {"trainable": 1, "total": 2},
    }
    write_json_atomic(folder / "lora" / "plan.json", plan)
    data = {
        "source": {"all": f"{HOSPITAL_FOLDER}/notes.csv"},
        "counts": {"train": 8, "validation": 2, "test": 4},
        "patients": {"train": 6, "validation": 2, "test": 4},
        "group_by": ["patient_id"],
    }
    write_json_atomic(folder / "data" / "data_report.json", data)
    training = {"metrics": {"eval_loss": 0.5}, "steps": 3, "precision": "fp32", "world_size": 2}
    training["base_model"] = describe_base(config)
    write_json_atomic(folder / "train" / "training_report.json", training)
    splits = datasets.DatasetDict(
        {"test": datasets.Dataset.from_list([{"id": "1", "text": "[NAME] coughs."}])}
    )
    splits.save_to_disk(folder / "protected")
    certificate = {"passed": True, "fingerprint": dataset_fingerprint(splits), "method": "replacement"}
    certificate["counts"] = {"DATE": 3, "NAME": 1200}
    detection = {"recall": {"value": 0.999, "low": 0.99, "high": 1.0}, "leaking_documents": 1}
    write_certificate(folder / "protected", certificate | {"detection": detection})
    adapter = folder / "train" / "lora_adapter"
    tuned.save_pretrained(adapter)
    (adapter / "README.md").unlink()
    AutoTokenizer.from_pretrained(base_folder).save_pretrained(adapter)
    measured = {"verdict": "passed", "reasons": ["secrets do not stand out: 1.50 bits in answers"]}
    measured["states"] = {"exposure": {"state": "passed", "reason": "1.50 bits in answers"}}
    measured["limits"] = ["18 canaries, 18 of them seen once in an epoch."]
    measured["adapter"] = content_hash(adapter / "adapter_model.safetensors")
    write_json_atomic(folder / "evaluation" / "leakage.json", measured)
    write_text_atomic(folder / "run.yaml", config.to_yaml())
    facts = {"state": "completed", "started": "2026-01-01T00:00:00+00:00", "ended": None, "seconds": 3.0}
    write_json_atomic(
        folder / "run.json",
        {"stages": {"train": facts | {"output_hash": "sha256:1", "notebook": f"{HOSPITAL_FOLDER}/04.ipynb"}}},
    )
    return config


def opened(config: RunConfig) -> RunConfig:
    """The same configuration with both gates opened by hand."""
    phi = config.phi.model_copy(update={"allow_unprotected": True})
    export = config.export.model_copy(update={"ignore_leakage_gate": True})
    return config.model_copy(update={"phi": phi, "export": export})


def tiny_release(folder, base_folder, tuned, labels=None, **data):
    """The release of a tiny run in `folder`, for instructions unless labels are given; data: settings of that section."""
    from medai_nb.export import export_release

    config = write_run(folder / "run", base_folder, tuned, few_figures(labels), data=data)
    export_release(config, folder / "run", folder / "run" / "release")
    return folder / "run" / "release"
