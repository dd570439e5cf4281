"""BERT-like encoders with a classification head: trained, evaluated and released like any other base model."""

import json
import math

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sandbox import Sandbox
from test_pipeline import training_losses

from medai_nb.config import DataConfig, ModelConfig, RunConfig, UserError, load_config
from medai_nb.config_check import config_problems
from medai_nb.evaluator import ClinicalEvaluator
from medai_nb.examples import Collator, ExamplesError, build_classifier_examples, encode_text
from medai_nb.lora import apply_lora
from medai_nb.models import ModelError, head_modules, load_model, load_tokenizer
from medai_nb.plan import plan_lora, validate_model
from medai_nb.trainer import TrainingError, classification_loss, safety_callback

LABELS = ["cardiac", "renal", "skin"]
WORDS = ["chest", "heart", "valve", "kidney", "urine", "stone", "rash", "itch", "burn", "noted", "times"]


def save_encoder(folder, name="bert"):
    """A random encoder of a few thousand parameters with a tokenizer that knows the sandbox's words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        DistilBertConfig,
        DistilBertForMaskedLM,
        PreTrainedTokenizerFast,
        RobertaConfig,
        RobertaForMaskedLM,
    )

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    alphabet = [chr(code) for code in range(33, 127)]
    pieces = [*special, *WORDS, *alphabet, *(f"##{letter}" for letter in alphabet)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=128, **names)
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    common = {
        "vocab_size": len(vocabulary),
        "pad_token_id": 0,
        "max_position_embeddings": 130,
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = {
            "bert": lambda: BertForMaskedLM(BertConfig(**shape, **quiet, **common)),
            "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**shape, **quiet, **common)),
            "distilbert": lambda: DistilBertForMaskedLM(
                DistilBertConfig(
                    dim=32,
                    n_layers=2,
                    n_heads=4,
                    hidden_dim=64,
                    dropout=0.0,
                    attention_dropout=0.0,
                    seq_classif_dropout=0.0,
                    **common,
                )
            ),
        }[name]()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("models") / "tiny-bert")


@pytest.fixture(scope="module", params=["bert", "roberta", "distilbert"])
def tiny_encoder(request, tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="module")
def completed(tmp_path_factory, tiny_bert) -> Sandbox:
    sandbox = Sandbox(tmp_path_factory.mktemp("encoder"), tiny_bert)
    sandbox.prepare()
    settings = json.loads(sandbox.config.read_text())
    settings["training"] |= {"max_steps": 60, "learning_rate": 0.01, "per_device_train_batch_size": 8}
    # Twelve held-out records are too few to tell whether it remembers the others.
    settings["export"] = {"merged": True, "ignore_leakage_gate": True}
    sandbox.config.write_text(json.dumps(settings))
    code, output = sandbox.execute()
    assert code == 0, output
    return sandbox


def notes(count: int = 9) -> datasets.Dataset:
    return datasets.Dataset.from_list(
        [
            {"id": f"n{i}", "text": " ".join(WORDS[i % 9 : i % 9 + 1 + i % 4]), "label": LABELS[i % 3]}
            for i in range(count)
        ]
    )


@pytest.mark.slow
def test_a_run_trains_evaluates_and_releases_an_encoder(completed):
    figures = json.loads((completed.run / "evaluation" / "metrics.json").read_text())["classification"]
    assert figures["tuned"]["overall"]["accuracy"]["value"] == 1.0
    assert figures["base"]["overall"]["accuracy"]["value"] < 1.0
    assert figures["scoring"] == {"how": "the classification head", "compared_by": "probability"}
    assert any("never trained" in note for note in figures["tuned"]["notes"])
    plan = json.loads((completed.run / "lora" / "plan.json").read_text())
    by_target = {row["target"]: row["parameters"] for row in plan["parameters"]["by_target"]}
    assert (by_target["pooler"], by_target["classifier"]) == (32 * 32 + 32, 32 * 3 + 3)
    assert sum(by_target.values()) == plan["parameters"]["trainable"]
    metadata = json.loads((completed.run / "release" / "metadata.json").read_text())
    assert (metadata["lora"]["task_type"], metadata["labels"]) == ("SEQ_CLS", LABELS)
    card = (completed.run / "release" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "labels=labels" in card


@pytest.mark.slow
def test_the_loading_code_of_the_card_and_the_merged_model_give_the_measured_probabilities(completed):
    import pandas as pd
    from peft import PeftModel
    from transformers import pipeline

    frame = pd.read_parquet(completed.run / "evaluation" / "predictions.parquet")
    tuned = frame[frame["model"] == "tuned"]
    test = datasets.load_from_disk(str(completed.run / "protected"))["test"]
    texts = dict(zip(test["id"], test["text"], strict=True))
    base = load_model(ModelConfig(name=str(completed.model), precision="fp32"), labels=LABELS)
    model = PeftModel.from_pretrained(base, str(completed.run / "release" / "lora_adapter")).eval()
    tokenizer = load_tokenizer(str(completed.model))
    classify = pipeline("text-classification", str(completed.run / "release" / "merged"), device="cpu")
    for row in tuned.to_dict("records"):
        with torch.no_grad():
            logits = model(**tokenizer(texts[row["id"]], return_tensors="pt")).logits[0].float()
        expected = [row[f"log_likelihood/{label}"] for label in LABELS]
        assert np.allclose(logits.log_softmax(0), expected, atol=0.1), "bf16 against fp32"
        merged = classify(texts[row["id"]])[0]
        assert merged["label"] == row["predicted"]
        assert math.isclose(merged["score"], logits.softmax(0).max(), abs_tol=1e-4)


@pytest.mark.slow
def test_two_ranks_with_partitioned_weights_train_the_head_as_one_does(completed):
    alone = training_losses(completed)
    code, output = completed.execute(
        *("--only", "train", "--num_accelerators", "2"),
        *("-p", "training.zero_stage=3", "-p", "per_device_train_batch_size=4"),
    )
    assert code == 0, output
    together = training_losses(completed)
    # Which rows share a step differs between one rank and two once an epoch ends: the beginning is the same.
    assert len(together) == len(alone) == 60
    assert math.isclose(alone[0], together[0], abs_tol=1e-2), (alone[:3], together[:3])
    assert together[-1] < 0.5 * together[0]
    adapter = load_file(completed.run / "train" / "lora_adapter" / "adapter_model.safetensors")
    heads = {name: tensor for name, tensor in adapter.items() if "classifier" in name or "pooler" in name}
    assert {tuple(tensor.shape) for tensor in heads.values()} == {(3, 32), (3,), (32, 32), (32,)}


def test_every_kind_of_encoder_learns_its_whole_head(tiny_encoder):
    settings = {"model": {"name": str(tiny_encoder), "precision": "fp32"}, "lora": {"dropout": 0.0}}
    config = RunConfig.load(settings)
    tokenizer = load_tokenizer(config.model)
    examples, summary = build_classifier_examples(notes(), tokenizer, config.data, LABELS)
    plan = plan_lora(config, summary)
    model = load_model(config.model, for_training=True, labels=LABELS)
    fresh = {name: weight.clone() for name, weight in model.named_parameters()}
    model = apply_lora(model, config.lora, seed=0)
    assert model.get_nb_trainable_parameters()[0] == plan["parameters"]["trainable"]
    learns = [name for name, weight in model.named_parameters() if weight.requires_grad]
    heads = {name for name in learns if "lora_" not in name}
    assert all(any(f".{head}." in name for head in head_modules(model)) for name in heads)
    batch = Collator(tokenizer.pad_token_id, labelled_head=False)(list(examples))
    labels = batch.pop("labels")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.005)
    losses = []
    for _ in range(80):
        loss = classification_loss(model(**batch), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    base = model.unload() if hasattr(model, "unload") else model
    untouched = [n for n, w in base.named_parameters() if n in fresh and torch.equal(w, fresh[n])]
    assert any("embeddings" in name for name in untouched), "base weights stay as they were"


def test_a_fresh_head_is_the_same_in_every_process(tiny_bert):
    first, second = (load_model(str(tiny_bert), labels=LABELS) for _ in range(2))
    assert torch.equal(first.classifier.weight, second.classifier.weight)
    assert first.config.id2label == dict(enumerate(LABELS))


def test_head_of_a_checkpoint_for_other_labels_is_replaced(tiny_bert, tmp_path):
    load_model(str(tiny_bert), labels=["a", "b", "c", "d", "e"]).save_pretrained(tmp_path)
    load_tokenizer(str(tiny_bert)).save_pretrained(tmp_path)
    assert load_model(str(tmp_path), labels=LABELS).classifier.weight.shape == (3, 32)


def test_loss_of_a_step_does_not_depend_on_how_its_rows_are_cut_into_micro_batches():
    torch.manual_seed(0)
    logits, labels = torch.randn(7, 3), torch.tensor([0, 1, 2, 0, -100, 1, 1])

    class Output:
        def __init__(self, logits):
            self.logits = logits

    whole = classification_loss(Output(logits), labels)
    parts = [
        classification_loss(Output(logits[rows]), labels[rows], num_items_in_batch=6)
        for rows in (slice(0, 2), slice(2, 7))
    ]
    assert torch.allclose(whole, sum(parts))
    kept = labels != -100
    assert torch.allclose(whole, torch.nn.functional.cross_entropy(logits[kept], labels[kept]))


def test_probabilities_follow_the_labels_that_were_asked_for(tiny_bert):
    model, tokenizer = load_model(str(tiny_bert), labels=LABELS), load_tokenizer(str(tiny_bert))
    asked = ["skin", "cardiac", "renal"]
    straight = ClinicalEvaluator(model, tokenizer, labels=LABELS).score_labels(notes())
    turned = ClinicalEvaluator(model, tokenizer, labels=asked).score_labels(notes())
    assert np.allclose(turned, straight[:, [2, 0, 1]], atol=1e-6)
    assert np.allclose(straight.sum(axis=1), 1)
    one_by_one = [
        ClinicalEvaluator(model, tokenizer, labels=LABELS).score_labels([record])[0] for record in notes()
    ]
    assert np.allclose(straight, one_by_one, atol=0.02), "padding must not count"


def test_unknown_label_is_named(tiny_bert):
    model, tokenizer = load_model(str(tiny_bert), labels=LABELS), load_tokenizer(str(tiny_bert))
    with pytest.raises(UserError, match="knows no label 'bone'; it knows cardiac, renal, skin"):
        ClinicalEvaluator(model, tokenizer, labels=["bone", "skin"]).score_labels(notes())


def test_long_text_loses_its_middle_and_keeps_both_special_tokens(tiny_bert):
    tokenizer = load_tokenizer(str(tiny_bert))
    record = {"text": "chest " * 100 + "valve " * 100, "label": "cardiac"}
    ids, cut = encode_text(record, tokenizer, DataConfig(max_length=512))
    assert cut and len(ids) <= 128, "no more than the tokenizer says the model reads"
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    words = tokenizer.decode(ids, skip_special_tokens=True)
    assert words.startswith("chest") and words.endswith("valve") and "[UNK]" not in words


def test_encoder_for_written_answers_is_refused_with_what_to_do(tiny_bert):
    chats = datasets.Dataset.from_list(
        [{"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}] * 4
    )
    with pytest.raises(
        ExamplesError,
        match="4 x the record asks for a written answer, which an encoder cannot give: set model.name",
    ):
        build_classifier_examples(chats, load_tokenizer(str(tiny_bert)), DataConfig(), [])
    with pytest.raises(
        ModelError, match=r"is an encoder \(bert\).*set model.name to a causal language model"
    ):
        load_model(str(tiny_bert))
    with pytest.raises(UserError, match="an encoder cannot write answers"):
        model = load_model(str(tiny_bert), labels=LABELS)
        ClinicalEvaluator(model, load_tokenizer(str(tiny_bert))).generate(notes())


def test_an_encoder_is_not_asked_for_answers_while_it_learns(tiny_bert):
    config = load_config({"model_name": str(tiny_bert), "training": {"safety_steps": 100}})
    (problem,) = config_problems(config)
    assert "safety_steps is 100" in problem and "cannot write answers" in problem
    with pytest.raises(TrainingError, match="leave safety_steps out"):
        safety_callback(config, [{"text": "A rash.", "label": "Skin"}])
    config.training.safety_steps = None
    assert config_problems(config) == []


def test_one_label_is_no_classification(tiny_bert):
    with pytest.raises(ModelError, match="between two or more labels"):
        load_model(str(tiny_bert), labels=["only"])


def test_validate_model_says_what_an_encoder_is_for(tiny_bert):
    report = validate_model(str(tiny_bert))
    assert report["compatible"] and report["task"] == "classification"
    assert any("writes no answers" in note for note in report["notes"])
