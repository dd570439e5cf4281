"""A release holds the adapter that was trained and papers that say what really happened; anything else is refused."""

import json
import subprocess

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel
from releases import HOSPITAL_FOLDER, write_run
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from medai_nb import export, model_cards, release_files
from medai_nb.config import UserError
from medai_nb.leakage import LeakageError
from medai_nb.run_folder import content_hash, read_json, write_json_atomic


@pytest.fixture
def run(tmp_path, small_llama, tuned):
    """(config, run folder) with everything that earlier stages write, as small as possible."""
    folder = tmp_path / "run"
    return write_run(folder, small_llama, tuned), folder


@pytest.fixture
def release(run, tmp_path):
    config, folder = run
    return export.export_release(config, folder, tmp_path / "release"), tmp_path / "release"


def logits(model, tokenizer):
    with torch.inference_mode():
        return model(**tokenizer("Chest pain since Monday.", return_tensors="pt")).logits


def test_the_released_adapter_computes_what_was_trained(release, small_llama, tuned):
    _, folder = release
    base = AutoModelForCausalLM.from_pretrained(small_llama, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "lora_adapter")
    untouched = logits(base, tokenizer)
    loaded = PeftModel.from_pretrained(base, folder / "lora_adapter").eval()
    assert (logits(loaded, tokenizer) - logits(tuned, tokenizer)).abs().max() < 1e-5
    assert (logits(loaded, tokenizer) - untouched).abs().max() > 1e-2, "the adapter matters"
    assert tokenizer.chat_template


def test_a_release_holds_the_agreed_files_and_no_base_weights(release):
    metadata, folder = release
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"metadata.json", "serving_config.json", "README.md", "SHA256SUMS"} <= files
    assert {"applied_model_card.xml", "sbom.cdx.json"} <= files
    assert {"lora_adapter/adapter_model.safetensors", "lora_adapter/tokenizer.json"} <= files
    assert not any("merged" in name for name in files) and metadata["merged"] is None
    tensors = load_file(folder / "lora_adapter" / "adapter_model.safetensors")
    assert all("lora_" in name for name in tensors)
    assert json.loads((folder / "metadata.json").read_text()) == json.loads(json.dumps(metadata))


def test_the_checksums_are_those_of_sha256sum_and_find_any_change(release):
    metadata, folder = release
    checked = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=False)
    assert checked.returncode == 0 and release_files.verify_release(folder) == []
    sums = (folder / "SHA256SUMS").read_text()
    assert all(f"{digest}  {name}\n" in sums for name, digest in metadata["files"].items())
    (folder / "README.md").write_text("better than it is")
    (folder / "extra.bin").write_bytes(b"?")
    (folder / "serving_config.json").unlink()
    assert release_files.changed_files(folder) == [
        "README.md was changed",
        "extra.bin was added",
        "serving_config.json is missing",
    ]


def test_the_card_is_valid_for_the_hub_and_says_what_was_measured(release):
    metadata, folder = release
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "peft" and card.data.license == "other" and "lora" in card.data.tags
    assert card.data.base_model is None, "a local folder is no hub id"
    for section in (
        "Intended use",
        "Data",
        "De-identification",
        "Training",
        "Evaluation",
        "Calibration",
        "Abstaining",
        "Subgroups",
        "Safety",
        "Leakage",
        "Limits",
        "How to load",
        "How to reproduce",
    ):
        assert f"## {section}\n" in card.text
    accuracy = metadata["evaluation"]["classification"]["tuned"]["overall"]["accuracy"]
    assert f"{accuracy['value']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}]" in card.text
    assert "0.9990 [0.9900, 1.0000]" in card.text


def test_the_embedded_model_is_named_with_its_hub_id_and_license(release):
    metadata, _ = release
    header = model_cards.card_header(
        metadata | {"base_model": {"kind": "embedded", "name": "embedded", "hub_id": None}}
    )
    assert header["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct" and header["license"] == "apache-2.0"
    header = model_cards.card_header(
        metadata | {"base_model": {"kind": "hub", "name": "small", "hub_id": "org/model"}}
    )
    assert header["base_model"] == "org/model" and header["license"] == "other"
    assert yaml.safe_load(model_cards.model_card(metadata).split("---")[1])["tags"]


def test_figures_on_the_synthetic_corpus_are_called_that(release):
    metadata, _ = release
    assert "synthetic" not in model_cards.model_card(metadata)
    demo = metadata | {"data": metadata["data"] | {"source": {"train": "demo"}}}
    assert "These notes are synthetic" in model_cards.model_card(demo)


def test_no_folder_of_the_hospital_is_written_into_a_release(release, tmp_path):
    _, folder = release
    for name in ("README.md", "metadata.json", "applied_model_card.xml", "sbom.cdx.json"):
        assert HOSPITAL_FOLDER not in (folder / name).read_text()
    assert "notes.csv" in (folder / "README.md").read_text()
    assert str(tmp_path) not in (folder / "README.md").read_text()


def test_serving_settings_say_what_really_holds(release):
    _, folder = release
    serving = json.loads((folder / "serving_config.json").read_text())
    assert serving["model_path"] == "lora_adapter" and (folder / serving["model_path"]).is_dir()
    assert serving["phi_protection_enabled"] is True and serving["labels"] == ["Ear", "Eye"]
    assert {"max_length", "temperature", "top_p", "repetition_penalty"} <= set(serving)


def test_without_a_valid_certificate_nothing_is_released(run, tmp_path):
    config, folder = run
    (folder / "protected" / "certificate.json").unlink()
    with pytest.raises(UserError, match="certificate"):
        export.export_release(config, folder, tmp_path / "release")
    assert not (tmp_path / "release").exists()


def test_a_gate_opened_by_hand_is_stated_everywhere(run, tmp_path):
    config, folder = run
    (folder / "protected" / "certificate.json").unlink()
    opened = config.model_copy(update={"phi": config.phi.model_copy(update={"allow_unprotected": True})})
    metadata = export.export_release(opened, folder, tmp_path / "release")
    assert metadata["phi_protection_enabled"] is False
    assert "allow_unprotected" in metadata["phi"]["gates_opened"][0]
    card = (tmp_path / "release" / "README.md").read_text()
    assert "A gate was opened by hand: phi.allow_unprotected" in card and "no valid certificate" in card
    assert "trained on **unprotected** clinical text" in card and "trained on de-identified" not in card
    serving = json.loads((tmp_path / "release" / "serving_config.json").read_text())
    assert serving["phi_protection_enabled"] is False


def judged(folder, **changes):
    """Another leakage.json."""
    file = folder / "evaluation" / "leakage.json"
    write_json_atomic(file, read_json(file) | changes)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: judged(folder, verdict="failed", reasons=["secrets stand out by 6.2 bits"]),
        lambda folder: judged(folder, verdict="not measured", reasons=["exposure was not measured"]),
        lambda folder: judged(folder, adapter="sha256:0"),
        lambda folder: (folder / "evaluation" / "leakage.json").unlink(),
    ],
    ids=["failed", "not measured", "of another adapter", "missing"],
)
def test_an_adapter_whose_leakage_gate_did_not_pass_is_released_only_by_name(run, tmp_path, change):
    config, folder = run
    change(folder)
    with pytest.raises(LeakageError, match="export.ignore_leakage_gate"):
        export.export_release(config, folder, tmp_path / "release")
    assert not (tmp_path / "release").exists()
    with pytest.raises(LeakageError):
        export.export_model_for_inference(folder, tmp_path / "inference")
    assert not (tmp_path / "inference").exists()
    opened = config.model_copy(
        update={"export": config.export.model_copy(update={"ignore_leakage_gate": True})}
    )
    metadata = export.export_release(opened, folder, tmp_path / "release")
    assert metadata["leakage"]["verdict"] != "passed"
    assert "export.ignore_leakage_gate was set" in metadata["leakage"]["gates_opened"][0]
    card = (tmp_path / "release" / "README.md").read_text()
    assert "A gate was opened by hand: export.ignore_leakage_gate" in card
    serving = json.loads((tmp_path / "release" / "serving_config.json").read_text())
    assert serving["leakage_gate"] == metadata["leakage"]["verdict"]


def damage_adapter(folder, change):
    path = folder / "train" / "lora_adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(change(tensors), path)
    judged(folder, adapter=content_hash(path))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: {}, "no tensors"),
        (
            lambda tensors: {name: t * 0 if "lora_B" in name else t for name, t in tensors.items()},
            "lora_B are zero",
        ),
        (lambda tensors: {name: t / 0 for name, t in tensors.items()}, "not finite"),
        (lambda tensors: tensors | {"model.embed_tokens.weight": torch.ones(2)}, "base model"),
        (lambda tensors: {name: t[:0].contiguous() for name, t in tensors.items()}, "empty"),
    ],
)
def test_an_unusable_adapter_is_not_released(run, tmp_path, change, message):
    config, folder = run
    damage_adapter(folder, change)
    with pytest.raises(UserError, match=message):
        export.export_release(config, folder, tmp_path / "release")


def test_an_adapter_of_another_base_model_is_not_released(run, tmp_path):
    config, folder = run
    plan = json.loads((folder / "lora" / "plan.json").read_text())
    plan["base_model"]["name"] = "embedded"
    write_json_atomic(folder / "lora" / "plan.json", plan)
    with pytest.raises(UserError, match="the plan says embedded"):
        export.export_release(config, folder, tmp_path / "release")


@pytest.mark.parametrize(
    "missing, stage",
    [
        ("lora/plan.json", "plan_lora"),
        ("evaluation/metrics.json", "evaluate"),
        ("data/data_report.json", "prepare_data"),
        ("train/training_report.json", "train"),
        ("train/lora_adapter/adapter_config.json", "training stage"),
        ("train/lora_adapter/chat_template.jinja", "chat template"),
        ("train/lora_adapter/tokenizer_config.json", "tokenizer"),
    ],
)
def test_what_an_earlier_stage_did_not_write_is_named(run, tmp_path, missing, stage):
    config, folder = run
    (folder / missing).unlink()
    with pytest.raises(UserError, match=stage):
        export.export_release(config, folder, tmp_path / "release")


def test_what_lies_beside_the_adapter_stays_behind(run, tmp_path):
    config, folder = run
    for name in ("optimizer.pt", "model.safetensors", "notes.csv"):
        (folder / "train" / "lora_adapter" / name).write_bytes(b"x")
    export.export_release(config, folder, tmp_path / "release")
    released = {path.name for path in (tmp_path / "release").rglob("*")}
    assert not released & {"optimizer.pt", "model.safetensors", "notes.csv"}


def asking_for(config, **wanted):
    return config.model_copy(update={"export": config.export.model_copy(update=wanted)})


def test_a_release_with_base_weights_names_their_licence_and_says_how_the_forms_answer(run, tmp_path):
    config, folder = run
    release = tmp_path / "release"
    metadata = export.export_release(asking_for(config, merged=True, gguf=["Q8_0"]), folder, release)
    assert list(metadata["parity"]["forms"]) == ["lora_adapter", "merged", "gguf Q8_0"]
    assert metadata["parity"]["forms"]["lora_adapter"]["max_logit_difference"] == 0
    assert metadata["base_model"]["license"] == "unknown"
    assert "licence is not recorded" in (release / "LICENSE-BASE-MODEL.txt").read_text()
    assert metadata["merged"]["bytes"] == (release / "merged" / "model.safetensors").stat().st_size
    assert metadata["gguf"]["Q8_0"]["bytes"] == (release / "gguf" / "model-Q8_0.gguf").stat().st_size
    assert release_files.verify_release(release) == []


def test_gguf_files_alone_leave_no_merged_model_behind(run, tmp_path):
    config, folder = run
    metadata = export.export_release(asking_for(config, gguf=["F16"]), folder, tmp_path / "out" / "release")
    assert list(metadata["parity"]["forms"]) == ["lora_adapter", "merged", "gguf F16"]
    assert metadata["merged"] is None
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["release"]
    assert not (tmp_path / "out" / "release" / "merged").exists()


def test_an_adapter_changed_on_its_way_into_the_release_is_found(run, tmp_path, monkeypatch):
    config, folder = run
    copy = export.copy_adapter

    def careless(adapter, target, *args):
        settings = copy(adapter, target, *args)
        tensors = load_file(target / "adapter_model.safetensors")
        name = next(name for name in tensors if "lora_B" in name)
        save_file(tensors | {name: tensors[name] * 1.01}, target / "adapter_model.safetensors")
        return settings

    monkeypatch.setattr(export, "copy_adapter", careless)
    with pytest.raises(release_files.ExportError, match=r"lora_adapter differs from .* at prompt \d"):
        export.export_release(config, folder, tmp_path / "release")


def test_a_model_without_gguf_form_is_refused_before_a_release_is_begun(run, tmp_path, small_llama):
    from transformers import GPT2Config

    config, folder = run
    GPT2Config(n_embd=8, n_head=2, n_layer=1).save_pretrained(tmp_path / "gpt2")
    other = config.model_copy(
        update={"model": config.model.model_copy(update={"name": str(tmp_path / "gpt2")})}
    )
    with pytest.raises(release_files.ExportError, match="gpt2 models cannot .* only the Llama family"):
        export.export_release(asking_for(other, gguf=["F16"]), folder, tmp_path / "release")
    assert not (tmp_path / "release").exists()


def test_a_model_in_memory_is_saved_with_its_adapter_only(tuned, small_llama, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(small_llama)
    metadata = export.save_model_for_deployment(tuned, tokenizer, tmp_path, {"phi_protection_enabled": True})
    assert json.loads((tmp_path / "metadata.json").read_text()) == metadata
    assert metadata["phi_protection_enabled"] is True and metadata["training_config"]["lora_r"] == 4
    assert (tmp_path / "model" / "adapter_model.safetensors").stat().st_size < 1_000_000
    assert (tmp_path / "tokenizer" / "tokenizer_config.json").is_file()
    assert not list(tmp_path.rglob("model*.safetensors"))
    with pytest.raises(UserError, match="has no adapter"):
        export.save_model_for_deployment(tuned.get_base_model(), tokenizer, tmp_path / "base")


@pytest.mark.parametrize("given", ["run", "run/train/lora_adapter"])
def test_inference_export_takes_a_run_or_an_adapter_and_claims_only_what_it_can_see(run, tmp_path, given):
    _, folder = run
    serving = export.export_model_for_inference(tmp_path / given, tmp_path / "out")
    assert serving["phi_protection_enabled"] is True and serving["labels"] == ["Ear", "Eye"]
    assert (tmp_path / "out" / serving["model_path"] / "adapter_model.safetensors").is_file()
    (folder / "protected" / "certificate.json").write_text("{}")
    assert (
        export.export_model_for_inference(tmp_path / given, tmp_path / "o")["phi_protection_enabled"] is False
    )


def test_a_server_that_answers_otherwise_stops_the_export(run, tmp_path, monkeypatch):
    from medai_nb import parity
    from medai_nb.serve import ModelServer

    monkeypatch.setattr(parity, "CLEAR_LEAD", 0.0)  # no near tie of a random model is excused
    monkeypatch.setattr(ModelServer, "load_model", lambda self: None)
    monkeypatch.setattr(ModelServer, "generate", lambda self, text: "Take two.")
    monkeypatch.setattr(
        ModelServer, "classify", lambda self, text: {"probabilities": {"Ear": 1.0, "Eye": 0.0}}
    )
    config, folder = run
    with pytest.raises(
        release_files.ExportError, match=r"parity: server differs from the trained adapter at prompt \d"
    ):
        export.export_release(asking_for(config, parity_server=True), folder, tmp_path / "release")
