"""Every form of a release answers as the trained adapter does; where one does not, the export says which and where."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from medai_nb import merged_models, parity
from medai_nb.config import RunConfig
from medai_nb.merged_models import write_gguf, write_merged
from medai_nb.parity import TOLERANCES, Answers, answers_of, check_parity, compare_answers
from medai_nb.release_files import ExportError

LABELS = ["Ear", "Eye", "Lung"]
RECORDS = [
    {"id": str(n), "text": text, "label": LABELS[n % 3], "messages": None, "metadata": None}
    for n, text in enumerate(
        ["Earache on the right.", "Blurred vision.", "Cough and fever.", "Otitis media."]
    )
] + [
    {
        "id": "w",
        "text": None,
        "label": None,
        "metadata": None,
        "messages": [
            {"role": "user", "content": "What helps against fever?"},
            {"role": "assistant", "content": "Rest and fluids."},
        ],
    }
]


@pytest.fixture(scope="module")
def config(small_llama):
    return RunConfig(model={"name": str(small_llama), "precision": "fp32"})


@pytest.fixture(scope="module")
def whole(tmp_path_factory, config, tuned_adapter):
    """A release with every form. Not to be changed."""
    folder = tmp_path_factory.mktemp("release")
    shutil.copytree(tuned_adapter, folder / "lora_adapter")
    write_merged(config, tuned_adapter, folder / "merged")
    write_gguf(folder / "merged", folder / "gguf")
    return folder


def part(whole, tmp_path, *names):
    """A copy with some of the forms only, to be damaged."""
    for name in ("lora_adapter", *names):
        shutil.copytree(whole / name, tmp_path / name)
    return tmp_path


def change_tensor(path, word, change):
    tensors = load_file(path)
    name = next(name for name in tensors if word in name)
    save_file(tensors | {name: change(tensors[name])}, path, metadata={"format": "pt"})


def test_all_forms_of_a_whole_release_agree_and_the_figures_are_written_down(config, tuned_adapter, whole):
    result = check_parity(config, tuned_adapter, whole, RECORDS, LABELS)
    forms = result["forms"]
    assert (result["prompts"], result["records"]) == (3, 5)
    assert list(forms) == ["lora_adapter", "merged", "gguf F16", "gguf Q8_0"]
    assert forms["lora_adapter"]["max_logit_difference"] == forms["lora_adapter"]["max_loss_difference"] == 0
    largest = [forms[form]["max_logit_difference"] for form in forms]
    assert largest == sorted(largest) and largest[1] < 1e-4 < largest[2]
    for form, tolerance in zip(forms.values(), ["adapter", "merged", "F16", "Q8_0"], strict=True):
        assert form["compared_with"] == "the trained adapter" and form["tolerance"] == TOLERANCES[tolerance]
        assert set(form["tolerance"]) <= set(form), "everything that has a tolerance was measured"
        assert form["mean_logit_difference"] <= form["max_logit_difference"]
        assert set(form["clinical"]) == {"accuracy", "answer_nll"}
    merged = forms["merged"]
    assert merged["clinical"]["accuracy"]["expected"] == merged["clinical"]["accuracy"]["found"]
    assert (merged["greedy_token_agreement"], merged["same_answers"]) == (1.0, 3)


def test_an_adapter_that_was_changed_in_the_release_is_named(config, tuned_adapter, whole, tmp_path):
    release = part(whole, tmp_path)
    change_tensor(release / "lora_adapter" / "adapter_model.safetensors", "lora_B", lambda t: t * 1.001)
    with pytest.raises(
        ExportError, match=r"lora_adapter differs from the trained adapter at prompt \d: max logit"
    ):
        check_parity(config, tuned_adapter, release)


def test_a_merged_weight_that_was_changed_is_named(config, tuned_adapter, whole, tmp_path):
    release = part(whole, tmp_path, "merged")
    change_tensor(release / "merged" / "model.safetensors", "down_proj", lambda t: t * 1.01)
    with pytest.raises(
        ExportError, match=r"merged differs .* at prompt \d: max logit difference .*, allowed 0.001"
    ):
        check_parity(config, tuned_adapter, release)


def test_a_weight_that_is_no_number_is_past_every_tolerance(config, tuned_adapter, whole, tmp_path):
    release = part(whole, tmp_path, "merged")
    change_tensor(release / "merged" / "model.safetensors", "down_proj", lambda t: t * float("nan"))
    with pytest.raises(ExportError, match=r"merged differs .* inf, allowed"):
        check_parity(config, tuned_adapter, release)


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_a_tensor_permuted_wrongly_in_a_gguf_file_is_named(
    config, tuned_adapter, whole, tmp_path, monkeypatch, kind
):
    release = part(whole, tmp_path)
    monkeypatch.setattr(merged_models, "rotate_pairs", lambda weights, heads: weights)
    write_gguf(whole / "merged", release / "gguf", [kind])
    with pytest.raises(ExportError, match=rf"gguf {kind} differs from the trained adapter at prompt \d"):
        check_parity(config, tuned_adapter, release, merged=whole / "nowhere")


def test_a_tokenizer_that_splits_otherwise_is_named(config, tuned_adapter, whole, tmp_path):
    release = part(whole, tmp_path, "merged")
    file = release / "merged" / "tokenizer.json"
    changed = file.read_text().replace('"add_prefix_space": false', '"add_prefix_space": true', 1)
    assert changed != file.read_text()
    file.write_text(changed)
    with pytest.raises(ExportError, match=r"merged differs .* at prompt 1: different token ids"):
        check_parity(config, tuned_adapter, release)


def test_a_server_is_held_to_its_labels_and_texts_and_no_patient_text_is_shown(
    config, tuned_adapter, whole, tmp_path, tuned
):
    release = part(whole, tmp_path)
    tokenizer = parity._load_adapter(config, tuned_adapter, None)[1]
    own = answers_of(tuned, tokenizer, config, RECORDS, LABELS)

    def honest(prompts, sample):
        assert len(prompts) == 3 and [record["id"] for record in sample] == list("0123w")
        return Answers(texts=own.texts, predicted=own.predicted)

    row = check_parity(config, tuned_adapter, release, RECORDS, LABELS, others={"server": honest})["forms"][
        "server"
    ]
    assert (row["same_answers"], row["changed_answers"], row["changed_decisions"]) == (3, 0, 0)
    sure = int(np.argmax([max(row) for row in own.probabilities]))
    wrong = list(own.predicted)
    wrong[sure] = next(label for label in LABELS if label != wrong[sure])

    def forgetful(prompts, sample):
        return Answers(predicted=wrong)

    with pytest.raises(
        ExportError, match=rf"server differs .* at record {sure + 1}: changed decisions 1"
    ) as caught:
        check_parity(config, tuned_adapter, release, RECORDS, LABELS, others={"server": forgetful})
    assert RECORDS[sure]["text"] not in str(caught.value)


def test_another_text_is_a_difference_only_where_the_reference_was_sure():
    sure = Answers(texts=["Rest and fluids", "Yes"], clear=["Rest and", ""])
    same = compare_answers(sure, Answers(texts=["Rest and sleep", "No"]), [], RunConfig())
    other = compare_answers(sure, Answers(texts=["Rest", "No"]), [], RunConfig())
    assert (same["changed_answers"], same["same_answers"]) == (0, 0)
    assert other["changed_answers"] == 1 and other["where"]["changed_answers"] == "prompt 1"


def test_what_quantized_training_costs_is_measured_and_past_its_tolerance_refused(
    config, tuned_adapter, whole, tmp_path, monkeypatch
):
    release = part(whole, tmp_path, "merged")
    quantized = config.model_copy(update={"model": config.model.model_copy(update={"use_4bit": True})})
    with pytest.raises(ExportError, match="full precision differs .* at prompt .* export.merged to false"):
        check_parity(quantized, tuned_adapter, release)
    generous = dict.fromkeys(TOLERANCES["from 4 bits"], 100.0)  # random weights lose more than trained ones
    monkeypatch.setattr(parity, "TOLERANCES", TOLERANCES | {"from 4 bits": generous})
    forms = check_parity(quantized, tuned_adapter, release, RECORDS, LABELS)["forms"]
    drift = forms["full precision"]
    assert drift["compared_with"] == "the trained adapter" and drift["tolerance"] == generous
    assert drift["max_logit_difference"] > 3 and set(drift["clinical"]) == {"accuracy", "answer_nll"}
    assert forms["merged"]["compared_with"] == "the trained adapter on full weights"
    assert forms["merged"]["max_logit_difference"] < 1e-3
    assert forms["lora_adapter"]["max_logit_difference"] == 0


def test_an_encoder_is_compared_by_its_head(tmp_path, small_llama):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    from medai_nb.models import load_model

    tokenizer = AutoTokenizer.from_pretrained(small_llama)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForSequenceClassification(BertConfig(**shape, vocab_size=len(tokenizer))).save_pretrained(
        tmp_path / "base"
    )
    tokenizer.save_pretrained(tmp_path / "base")
    config = RunConfig(
        model={"name": str(tmp_path / "base"), "precision": "fp32"}, data={"task": "classification"}
    )
    lora = LoraConfig(
        r=2, target_modules=["query", "value"], task_type="SEQ_CLS", modules_to_save=["classifier", "pooler"]
    )
    tuned = get_peft_model(load_model(config.model, labels=LABELS), lora)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_()
    for folder in ("trained", "release/lora_adapter"):
        tuned.save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
    release = tmp_path / "release"
    write_merged(config, tmp_path / "trained", release / "merged", LABELS)
    forms = check_parity(config, tmp_path / "trained", release, RECORDS[:4], LABELS)["forms"]
    assert set(forms) == {"lora_adapter", "merged"} and forms["merged"]["max_probability_difference"] < 1e-5
    assert "same_answers" not in forms["merged"] and "accuracy" in forms["merged"]["clinical"]
    change_tensor(release / "merged" / "model.safetensors", "classifier.weight", lambda t: t + 0.1)
    with pytest.raises(ExportError, match="merged differs .* at prompt"):
        check_parity(config, tmp_path / "trained", release, RECORDS[:4], LABELS)
