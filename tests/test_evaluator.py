"""Labels behind a shared prompt score as they do alone; base and tuned are measured on the same rows, on any ranks."""

import json
import os
import shutil
import subprocess
import sys
import time

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from medai_nb import calibration, evaluation, evaluator
from medai_nb.config import DataConfig, EvaluationConfig, RunConfig, UserError
from medai_nb.examples import build_examples, render_prompt

LABELS = ["Circulatory system", "Circulatory arrest", "Respiratory system", "Skin"]
DATA = DataConfig(instruction="Which chapter?", max_length=160)


def notes(count=12, patients=5):
    texts = [
        "Itching rash.",
        "Chest pain on exertion, worse since Monday, radiating to the left arm.",
        "Nightly cough.",
    ]
    return [
        {
            "id": f"n{row}",
            "patient_id": f"p{row % patients}",
            "text": f"{texts[row % 3]} Visit {row}.",
            "label": LABELS[row % len(LABELS)],
            "metadata": {"age": 30 + row, "gender": "F" if row % 2 else "M"},
        }
        for row in range(count)
    ]


@pytest.fixture(scope="module")
def tokenizer(embedded_folder):
    return AutoTokenizer.from_pretrained(embedded_folder)


def spread_out(model):
    """Larger random weights: differences that a wrong mask makes must not drown in a flat distribution."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    return model.float().eval()


@pytest.fixture(scope="module")
def model(tiny_llama):
    return spread_out(AutoModelForCausalLM.from_pretrained(tiny_llama))


def both_ways(model, prompts, answers, pad):
    together = evaluator.score_tree(model, prompts, evaluator.build_tree(answers), pad)
    apart = [evaluator.score_rows(model, [(prompt, answer)], pad) for prompt in prompts for answer in answers]
    return together, torch.cat(apart).view(len(prompts), len(answers))


PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17]]
ANSWERS = [[20, 21, 2], [20, 22, 23, 2], [24, 2], [20, 2], [20, 21, 25, 2]]


def by_hand(model, prompt, answer):
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0].double().log_softmax(-1)
    return sum(logits[len(prompt) - 1 + step, token] for step, token in enumerate(answer))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_label_scores_the_same_behind_the_shared_prompt_and_alone(tiny_llama, attention):
    model = spread_out(AutoModelForCausalLM.from_pretrained(tiny_llama, attn_implementation=attention))
    together, apart = both_ways(model, PROMPTS, ANSWERS, pad=2)
    expected = torch.tensor([[by_hand(model, prompt, answer) for answer in ANSWERS] for prompt in PROMPTS])
    assert expected.std() > 1, "the model tells answers apart, so the comparison means something"
    assert (together - expected).abs().max() < 1e-4
    assert (apart - expected).abs().max() < 1e-4


def test_the_embedded_model_scores_the_same_both_ways(embedded_folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(embedded_folder, dtype=torch.float32).eval()
    prompts = [tokenizer(text).input_ids for text in ("Itching rash on both forearms:", "Chest pain:")]
    answers = [[*tokenizer(label).input_ids, tokenizer.eos_token_id] for label in LABELS[1:]]
    together, apart = both_ways(model, prompts, answers, tokenizer.pad_token_id)
    assert (together - apart).abs().max() < 1e-4


def test_every_architecture_gets_right_likelihoods_shared_or_not(tiny_config):
    torch.manual_seed(0)
    model = spread_out(AutoModelForCausalLM.from_config(tiny_config))
    reason = evaluator.why_not_shared(model, PROMPTS[0], ANSWERS, 0)
    together, apart = both_ways(model, PROMPTS, ANSWERS, pad=0)
    expected = torch.tensor([[by_hand(model, prompt, answer) for answer in ANSWERS] for prompt in PROMPTS])
    assert (apart - expected).abs().max() < 1e-4
    if reason is None:
        assert (together - expected).abs().max() < 1e-3
    assert reason is None or tiny_config.model_type in ("opt",), reason


BEGINNING = list(range(30, 42))


def test_every_architecture_goes_on_from_what_all_prompts_begin_with(tiny_config, tokenizer):
    torch.manual_seed(0)
    model = spread_out(AutoModelForCausalLM.from_config(tiny_config))
    prompts = [BEGINNING + prompt for prompt in PROMPTS]
    scorer = evaluator.ClinicalEvaluator(model, tokenizer, settings=EvaluationConfig(batch_size=2))
    beginning, reason = scorer._sharing(prompts, ANSWERS)
    assert (beginning is None) == (reason is not None), "what can share a prompt can go on from its beginning"
    if beginning:
        assert beginning.length == len(BEGINNING)
    expected = [[float(by_hand(model, prompt, answer)) for answer in ANSWERS] for prompt in prompts]
    for _ in range(2):  # what a batch appends to the keys and values is not seen by the next
        found = scorer.answer_log_likelihoods(prompts, ANSWERS)
        assert np.abs(found - np.array(expected)).max() < 1e-3


def test_the_beginning_is_read_again_when_weights_have_changed(model, tokenizer):
    scorer = evaluator.ClinicalEvaluator(model, tokenizer, notes(3), DATA, LABELS)
    before = scorer.label_log_likelihoods()
    norm = model.model.layers[0].input_layernorm.weight
    with torch.no_grad():
        norm *= 2
    after = scorer.label_log_likelihoods()
    fresh = evaluator.ClinicalEvaluator(model, tokenizer, notes(3), DATA, LABELS).label_log_likelihoods()
    with torch.no_grad():
        norm /= 2
    assert np.abs(after - before).max() > 0.1
    assert np.abs(after - fresh).max() < 1e-5


def test_a_cache_that_gives_other_numbers_is_found_and_the_whole_prompt_read(model, tokenizer, monkeypatch):
    prompts = [BEGINNING + prompt for prompt in PROMPTS]
    repeated = evaluator.Beginning.repeated

    def spoilt(beginning, rows):
        cache = repeated(beginning, rows)
        cache.layers[0].keys = cache.layers[0].keys.flip(2)
        return cache

    monkeypatch.setattr(evaluator.Beginning, "repeated", spoilt)
    scorer = evaluator.ClinicalEvaluator(model, tokenizer)
    assert scorer._sharing(prompts, ANSWERS) == (None, None)
    expected = [[float(by_hand(model, prompt, answer)) for answer in ANSWERS] for prompt in prompts]
    assert np.abs(scorer.answer_log_likelihoods(prompts, ANSWERS) - np.array(expected)).max() < 1e-3


def test_a_model_that_ignores_the_mask_is_found_and_scored_the_plain_way(
    tiny_llama, tokenizer, monkeypatch, caplog
):
    model = spread_out(AutoModelForCausalLM.from_pretrained(tiny_llama))
    right = evaluator.ClinicalEvaluator(model, tokenizer, notes(), DATA, LABELS).label_log_likelihoods()
    forward = model.forward

    def causal_only(input_ids, attention_mask=None, position_ids=None, logits_to_keep=0, use_cache=None):
        if attention_mask is not None and attention_mask.ndim == 4:
            attention_mask = None
        return forward(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, logits_to_keep=logits_to_keep
        )

    monkeypatch.setattr(model, "forward", causal_only)
    scorer = evaluator.ClinicalEvaluator(model, tokenizer, notes(), DATA, LABELS)
    assert np.abs(scorer.label_log_likelihoods() - right).max() < 1e-4
    assert "repeated for each label" in scorer.scoring and "one by one" in caplog.text


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_mask_that_leaks_between_labels_is_found_in_any_precision(tiny_llama, precision, monkeypatch):
    model = spread_out(AutoModelForCausalLM.from_pretrained(tiny_llama)).to(precision)
    assert evaluator.why_not_shared(model, PROMPTS[0], ANSWERS, 2) is None
    monkeypatch.setattr(
        evaluator.LabelTree,
        "ancestors",
        lambda tree: torch.ones(len(tree.tokens), len(tree.tokens)).tril().bool(),
    )
    assert "other likelihoods" in evaluator.why_not_shared(model, PROMPTS[0], ANSWERS, 2)


def test_a_window_shorter_than_the_text_is_not_widened_by_the_mask(tokenizer):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(**shape, num_key_value_heads=2, vocab_size=len(tokenizer), sliding_window=16)
    model = spread_out(MistralForCausalLM(config))
    scorer = evaluator.ClinicalEvaluator(model, tokenizer, notes(2), DATA, LABELS)
    found = scorer.label_log_likelihoods()
    prompt = render_prompt(notes(2)[0], tokenizer, DATA, LABELS)
    answers = scorer._answers(notes(2)[0], LABELS)
    expected = [float(by_hand(model, prompt, answer)) for answer in answers]
    assert np.abs(found[0] - expected).max() < 1e-3


def test_what_is_scored_is_what_training_learns(model, tokenizer):
    records = notes(4)
    columns = [{key: record[key] for key in ("id", "text", "label")} for record in records]
    examples, _ = build_examples(datasets.Dataset.from_list(columns), tokenizer, DATA, LABELS)
    scored = evaluator.ClinicalEvaluator(model, tokenizer, records, DATA, LABELS).label_log_likelihoods()
    for row, example in enumerate(examples):
        with torch.inference_mode():
            output = model(torch.tensor([example["input_ids"]]), labels=torch.tensor([example["labels"]]))
        learnt = [label for label in example["labels"] if label != -100]
        assert learnt[-1] == tokenizer.eos_token_id, "the end of the turn is part of the score"
        own = scored[row, LABELS.index(records[row]["label"])]
        assert own == pytest.approx(-float(output.loss) * len(learnt), abs=1e-3)


def test_a_label_that_begins_another_label_can_win_and_lose():
    tree = evaluator.build_tree([[5, 9], [5, 6, 9]])
    assert tree.tokens == [5, 6]
    assert tree.targets.tolist() == [5, 9, 5, 6, 9] and tree.predictors.tolist() == [0, 1, 0, 1, 2]


def test_very_many_labels_are_cut_into_several_trees_with_the_same_result(model, tokenizer, monkeypatch):
    scorer = evaluator.ClinicalEvaluator(model, tokenizer, notes(3), DATA, LABELS)
    whole = scorer.label_log_likelihoods()
    monkeypatch.setattr(evaluator, "NODES_AT_ONCE", 4)
    assert len(evaluator._trees([[1, 2, 3], [4, 5, 6], [7, 8]])) == 3
    assert np.abs(scorer.label_log_likelihoods() - whole).max() < 1e-4


def test_order_and_batch_size_do_not_change_a_records_score(model, tokenizer):
    records = notes(9)
    scores = evaluator.ClinicalEvaluator(model, tokenizer, records, DATA, LABELS).score_labels()
    one = evaluator.ClinicalEvaluator(
        model, tokenizer, records[::-1], DATA, LABELS, EvaluationConfig(batch_size=1)
    )
    assert np.abs(one.score_labels()[::-1] - scores).max() < 1e-4
    assert np.allclose(scores.sum(axis=1), 1)


def test_length_normalization_compares_by_the_mean_per_token(model, tokenizer):
    def probabilities(normalized):
        settings = EvaluationConfig(length_normalized=normalized)
        return evaluator.ClinicalEvaluator(model, tokenizer, notes(3), DATA, LABELS, settings).score_labels()

    scorer = evaluator.ClinicalEvaluator(model, tokenizer, notes(3), DATA, LABELS)
    sums = scorer.label_log_likelihoods()
    lengths = [len(ids) for ids in scorer._answers(notes(1)[0], LABELS)]
    for normalized, scores in ((True, sums / lengths), (False, sums)):
        expected = torch.tensor(scores).double().softmax(-1).numpy()
        assert np.allclose(probabilities(normalized), expected, atol=1e-6)


def test_long_notes_are_cut_as_in_training(model, tokenizer):
    record = notes(1)[0] | {"text": "Nothing remarkable was found. " * 60}
    scorer = evaluator.ClinicalEvaluator(model, tokenizer, [record], DATA, LABELS)
    assert scorer._classification_prompts([record], LABELS)[0] == render_prompt(
        record, tokenizer, DATA, LABELS
    )


def test_the_public_figures_are_flat_floats_under_the_known_names(model, tokenizer):
    scorer = evaluator.ClinicalEvaluator(
        model, tokenizer, medical_test_dataset=datasets.Dataset.from_list(notes())
    )
    accuracy = scorer.calculate_clinical_accuracy()
    assert {"precision", "recall", "f1", "auc_roc", "accuracy", "balanced_accuracy"} <= set(accuracy)
    everything = scorer.evaluate_all_metrics()
    assert all(type(value) is float for value in everything.values())
    assert everything["accuracy"] == accuracy["accuracy"] and "f1/Skin" in everything
    frame = scorer.predict()
    assert accuracy["accuracy"] == pytest.approx((frame["label"] == frame["predicted"]).mean())
    assert frame["age"].tolist() == list(range(30, 42)) and frame["patient_id"][1] == "p1"


def test_answers_stop_at_the_end_of_turn_and_losses_equal_the_models_own(model, tokenizer):
    asked = [
        {"role": "user", "content": "What is a rash?"},
        {"role": "assistant", "content": "Spots on the skin."},
    ]
    records = [
        {"id": "a", "messages": asked},
        {"id": "b", "messages": [*asked[:1], {**asked[1], "content": "Red."}]},
    ]
    settings = EvaluationConfig(max_new_tokens=5)
    writer = evaluator.ClinicalEvaluator(model, tokenizer, records, settings=settings)
    frame = writer.write_answers()
    examples, _ = build_examples(datasets.Dataset.from_list(records), tokenizer, DataConfig())
    for row, example in enumerate(examples):
        with torch.inference_mode():
            loss = model(torch.tensor([example["input_ids"]]), labels=torch.tensor([example["labels"]])).loss
        assert frame["answer_nll"][row] == pytest.approx(float(loss), abs=1e-4)
    prompt = render_prompt(records[0], tokenizer, DataConfig())
    with torch.inference_mode():
        alone = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=5,
            do_sample=False,
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        )
    assert frame["answer"][0] == tokenizer.decode(alone[0, len(prompt) :], skip_special_tokens=True).strip()
    figures = writer.evaluate_all_metrics()
    assert figures["perplexity"] == pytest.approx(np.exp(figures["answer_nll"]))


@pytest.mark.parametrize(
    "dataset, labels, message",
    [
        (None, LABELS, "nothing to evaluate"),
        ([], LABELS, "is empty"),
        ([{"id": "1", "text": "x", "label": None}], None, "no labels to choose from"),
        (notes(2), ["Skin", "Skin"], "the same for the tokenizer"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_words(model, tokenizer, dataset, labels, message):
    with pytest.raises(UserError, match=message):
        evaluator.ClinicalEvaluator(model, tokenizer, dataset, DATA, labels).calculate_clinical_accuracy()


def test_records_with_a_label_that_training_never_saw_count_as_errors(model, tokenizer):
    records = notes(8)
    records[0] = records[0] | {"label": "Eye"}
    report = evaluator.ClinicalEvaluator(model, tokenizer, records, DATA, LABELS).classification_report()
    assert report["records"] == 8 and report["per_class"]["Eye"]["recall"]["value"] == 0
    assert any("Eye" in note and "errors" in note for note in report["notes"])


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_llama):
    """A run folder up to training: data, and an adapter that changes what the model says."""
    folder = tmp_path_factory.mktemp("run")
    sizes = {"train": 8, "validation": 10, "test": 14}
    splits = {
        name: datasets.Dataset.from_list([note | {"text": f"{note['text']} {name}"} for note in notes(size)])
        for name, size in sizes.items()
    }
    datasets.DatasetDict(splits).save_to_disk(folder / "protected")
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    tuned = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.random.fork_rng():
        torch.manual_seed(2)
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.5)
    tuned.save_pretrained(folder / "lora_adapter")
    config = RunConfig(
        data=DATA,
        model={"name": str(tiny_llama), "precision": "fp32"},
        evaluation={"batch_size": 4, "bootstrap_samples": 100, "safety_requests": 2, "max_new_tokens": 8},
    )
    return config, folder


def evaluate(run, output, **changes):
    config, folder = run
    settings = config.evaluation.model_copy(update=changes)
    return evaluation.evaluate_run(
        config.model_copy(update={"evaluation": settings}),
        folder / "protected",
        folder / "lora_adapter",
        output,
    )


def test_a_run_is_measured_with_and_without_its_adapter(run, tmp_path, tiny_llama, tokenizer):
    result = evaluate(run, tmp_path)
    frame = pd.read_parquet(tmp_path / "predictions.parquet")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "comparison.png",
        "confusion.png",
        "decision_curve.png",
        "explanations.json",
        "metrics.json",
        "predictions.parquet",
        "reliability.png",
        "risk_coverage.png",
        "safety.png",
        "subgroups.png",
        "validation.parquet",
    ]
    assert json.loads((tmp_path / "metrics.json").read_text()) == json.loads(json.dumps(result))
    assert result["classification"]["labels"] == sorted(LABELS)
    columns = [f"log_likelihood/{label}" for label in sorted(LABELS)]
    measured = {name: frame[frame["model"] == name][columns].to_numpy() for name in ("base", "tuned")}
    assert np.abs(measured["base"] - measured["tuned"]).max() > 0.1
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    scorer = evaluator.ClinicalEvaluator(
        plain,
        tokenizer,
        list(datasets.load_from_disk(str(run[1] / "protected"))["test"]),
        DATA,
        sorted(LABELS),
    )
    assert np.abs(scorer.label_log_likelihoods() - measured["base"]).max() < 1e-4, "base is the base model"
    for name in ("base", "tuned"):
        rows = frame[frame["model"] == name]
        accuracy = (rows["label"] == rows["predicted"]).mean()
        assert result["classification"][name]["overall"]["accuracy"]["value"] == pytest.approx(accuracy)
    table = evaluation.comparison_table(result)
    assert list(table.columns) == ["base", "tuned", "difference"] and "[" in table.loc["accuracy", "tuned"]
    assert evaluation.headline(result)[0][0] == "accuracy"


def test_what_was_chosen_on_validation_and_every_group_can_be_recomputed_from_the_files(run, tmp_path):
    result = evaluate(run, tmp_path, evaluate_base=False, accepted_risk=0.7, minimum_group_patients=2)
    validation = pd.read_parquet(tmp_path / "validation.parquet")
    assert len(validation) == result["calibration"]["temperature"]["records"] == 10
    labels = result["classification"]["labels"]
    columns = [f"log_likelihood/{label}" for label in labels]
    codes = [labels.index(label) for label in validation["label"]]
    temperature = calibration.fit_temperature(validation[columns].to_numpy(), np.array(codes))
    assert result["calibration"]["temperature"]["temperature"] == pytest.approx(temperature, rel=1e-4)
    frame = pd.read_parquet(tmp_path / "predictions.parquet")
    scaled = calibration.apply_temperature(frame[columns].to_numpy(), temperature)
    own = [labels.index(label) for label in frame["label"]]
    loss = result["calibration"]["scaled"]["overall"]["log_loss"]["value"]
    assert loss == pytest.approx(-np.log(scaled[np.arange(14), own]).mean(), rel=1e-3)
    error = (frame["label"] != frame["predicted"]).mean()
    assert result["selective"]["error_rate"]["value"] == pytest.approx(error)
    assert result["selective"]["accepted_risk"] == 0.7
    women = frame[frame["gender"] == "F"]
    group = result["fairness"]["columns"]["gender"]["groups"]["F"]
    assert group["overall"]["accuracy"]["value"] == pytest.approx(
        (women["label"] == women["predicted"]).mean()
    )
    assert group["patients"] == women["patient_id"].nunique()
    over = scaled[frame["gender"] == "F"].max(axis=1).mean() - (women["label"] == women["predicted"]).mean()
    assert group["overall"]["overconfidence"]["value"] == pytest.approx(over, abs=1e-4)
    assert list(result["fairness"]["columns"]["age"]["groups"]) == ["18-39", "40-64"]
    table = evaluation.calibration_table(result)
    assert list(table.columns) == ["as the model gives them", "at the temperature", "difference"]
    assert "Brier score" in table.index
    groups = evaluation.subgroup_table(result)
    assert groups.loc[("gender", "F"), "records"] == 7 and "[" in groups.loc[("gender", "F"), "accuracy"]


def test_without_validation_records_that_is_said_and_nothing_is_fitted(run, tmp_path):
    config, folder = run
    splits = datasets.load_from_disk(str(folder / "protected"))
    splits.pop("validation")
    splits.save_to_disk(tmp_path / "protected")
    result = evaluation.evaluate_run(
        config, tmp_path / "protected", folder / "lora_adapter", tmp_path / "out"
    )
    assert "no validation records" in result["calibration"]["notes"][0]
    assert result["calibration"]["temperature"] is None and "at_threshold" not in result["selective"]
    assert not (tmp_path / "out" / "validation.parquet").exists()
    assert list(evaluation.calibration_table(result).columns) == ["as the model gives them"]
    off = evaluate(run, tmp_path / "off", calibrate=False, evaluate_base=False, subgroups=[])
    assert off["calibration"]["notes"] == [
        "evaluation.calibrate is off: probabilities as the model gives them"
    ]
    assert "fairness" not in off and not (tmp_path / "off" / "subgroups.png").exists()
    assert "validation" not in off["seconds"]


def test_validation_records_with_labels_that_training_never_saw_choose_nothing(model, tokenizer):
    records = notes(12)
    scorer = evaluator.ClinicalEvaluator(
        model, tokenizer, None, DATA, LABELS, EvaluationConfig(bootstrap_samples=100)
    )
    test, validation = scorer.predict(records), scorer.predict(records)
    usual = evaluation.probability_figures(test, scorer, validation)
    odd = validation.assign(label=[*validation["label"][:-2], "Eye", None])
    seen = evaluation.probability_figures(test, scorer, odd)
    assert seen["calibration"]["temperature"]["records"] == 10
    assert usual["calibration"]["temperature"]["records"] == 12
    unseen = evaluation.probability_figures(
        test.assign(label=["Eye", *test["label"][1:]]), scorer, validation
    )
    assert unseen["calibration"]["temperature"] == usual["calibration"]["temperature"]
    assert unseen["selective"]["error_rate"]["value"] > usual["selective"]["error_rate"]["value"] - 1e-9
    json.dumps(unseen, allow_nan=False)


def test_log_probabilities_stay_finite_where_probabilities_are_rounded_to_zero(model, tokenizer):
    scorer = evaluator.ClinicalEvaluator(model, tokenizer, None, DATA, LABELS)
    frame = scorer.predict(notes(4))
    assert np.allclose(np.exp(scorer.log_probabilities_of(frame)), scorer.probabilities_of(frame))
    frame["log_likelihood/Skin"] = -2000.0
    assert (scorer.probabilities_of(frame)[:, LABELS.index("Skin")] == 0).all()
    assert np.isfinite(scorer.log_probabilities_of(frame)).all()


def test_any_metadata_column_divides_the_figures(run, tmp_path):
    config, folder = run
    splits = datasets.load_from_disk(str(folder / "protected"))
    wards = [
        note | {"metadata": note["metadata"] | {"ward": f"W{row % 2}"}}
        for row, note in enumerate(list(datasets.load_from_disk(str(run[1] / "protected"))["test"]))
    ]
    splits["test"] = datasets.Dataset.from_list(wards)
    splits.save_to_disk(tmp_path / "protected")

    def measure(subgroups):
        settings = config.evaluation.model_copy(update={"subgroups": subgroups, "evaluate_base": False})
        changed = config.model_copy(update={"evaluation": settings})
        return evaluation.evaluate_run(
            changed, tmp_path / "protected", folder / "lora_adapter", tmp_path / "out"
        )

    result = measure(["ward"])
    assert list(result["fairness"]["columns"]) == ["ward"]
    frame = pd.read_parquet(tmp_path / "out" / "predictions.parquet")
    assert frame["ward"].tolist() == [f"W{row % 2}" for row in range(14)] and "age" not in frame
    with pytest.raises(UserError, match="no record has 'clinic' in its metadata; there is age, gender, ward"):
        measure(["ward", "clinic"])
    with pytest.raises(UserError, match="'label' cannot be one"):
        measure(["label"])


def test_the_default_subgroups_are_used_where_there_are_any():
    bare = [{"id": "1", "metadata": None}, {"id": "2", "metadata": {"gender": "F", "age": None}}]
    assert evaluator.check_subgroups(bare, EvaluationConfig()) == ["gender"]
    assert evaluator.check_subgroups(bare[:1], EvaluationConfig()) == []
    with pytest.raises(UserError, match="no record has 'age' in its metadata; there is none"):
        evaluator.check_subgroups(bare[:1], EvaluationConfig(subgroups=["age"]))


def test_without_the_base_model_the_tables_still_stand(run, tmp_path):
    result = evaluate(run, tmp_path, evaluate_base=False, max_records=6)
    assert result["calibration"]["temperature"]["records"] == 6, "validation records are limited alike"
    assert result["classification"]["tuned"]["records"] == 6
    assert result["classification"]["records_available"] == 14
    assert evaluation.comparison_table(result).loc["accuracy", "base"] == "–"
    assert "base" not in set(evaluation.class_table(result).columns) and "->" not in evaluation.headline_of(
        result
    )


def test_an_adapter_that_is_not_there_is_named(run, tmp_path):
    config, folder = run
    with pytest.raises(UserError, match="holds no adapter"):
        evaluation.evaluate_run(config, folder / "protected", folder / "nothing", tmp_path)


def test_test_records_that_were_trained_on_are_refused(run, tmp_path):
    config, folder = run
    splits = datasets.load_from_disk(str(folder / "protected"))
    seen = splits["validation"][3] | {"id": "seen", "text": splits["validation"][3]["text"].upper()}
    splits["test"] = datasets.concatenate_datasets(
        [splits["test"], datasets.Dataset.from_list([seen], features=splits["test"].features)]
    )
    splits.save_to_disk(tmp_path / "protected")
    with pytest.raises(UserError, match=r"1 test records are also validation records \(ids seen\)") as error:
        evaluation.evaluate_run(config, tmp_path / "protected", folder / "lora_adapter", tmp_path / "out")
    assert "cough" not in str(error.value).lower() and not (tmp_path / "out").exists()


def test_an_adapter_of_other_weights_is_refused_and_the_same_weights_elsewhere_will_do(
    run, tmp_path, tiny_llama
):
    from medai_nb.trainer import describe_base

    config, folder = run
    train, moved, changed = tmp_path / "train", tmp_path / "moved", tmp_path / "changed"
    shutil.copytree(folder / "lora_adapter", train / "lora_adapter")
    (train / "training_report.json").write_text(json.dumps({"base_model": describe_base(config)}))
    shutil.copytree(tiny_llama, moved)
    elsewhere = config.model_copy(update={"model": config.model.model_copy(update={"name": str(moved)})})
    evaluation.require_trained_base(elsewhere, train / "lora_adapter")
    shutil.copytree(tiny_llama, changed)
    weights = bytearray((changed / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (changed / "model.safetensors").write_bytes(weights)
    other = config.model_copy(update={"model": config.model.model_copy(update={"name": str(changed)})})
    with pytest.raises(UserError, match="has other weights \\(model.safetensors\\)"):
        evaluation.evaluate_run(other, folder / "protected", train / "lora_adapter", tmp_path / "out")


def test_instruction_runs_compare_written_answers(run, tmp_path):
    config, folder = run

    def questions(name):
        asked = [
            {"role": "user", "content": f"What is a {name}?"},
            {"role": "assistant", "content": "Spots."},
        ]
        return datasets.Dataset.from_list(
            [{"id": str(row), "patient_id": None, "messages": asked} for row in range(3)]
        )

    splits = {"train": questions("rash"), "test": questions("bruise")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "protected")
    settings = config.model_copy(
        update={"evaluation": EvaluationConfig(max_new_tokens=3, bootstrap_samples=100, safety_requests=2)}
    )
    result = evaluation.evaluate_run(
        settings, tmp_path / "protected", folder / "lora_adapter", tmp_path / "out"
    )
    assert result["generation"]["records"] == 3 and "classification" not in result
    difference = result["generation"]["difference"]["answer_nll"]["value"]
    both = [result["generation"][name]["answer_nll"]["value"] for name in ("tuned", "base")]
    assert difference == pytest.approx(both[0] - both[1]) and difference != 0
    assert {"token F1", "ROUGE-L", "perplexity"} <= set(evaluation.comparison_table(result).index)
    assert evaluation.calibration_table(result).empty and evaluation.subgroup_table(result).empty
    assert set(pd.read_parquet(tmp_path / "out" / "predictions.parquet")["model"]) == {"base", "tuned"}


RANK_PROGRAM = """
import sys
from pathlib import Path
from medai_nb.config import RunConfig
from medai_nb.evaluation import evaluate_run
evaluate_run(RunConfig.load(sys.argv[1]), *map(Path, sys.argv[2:5]))
"""


@pytest.mark.slow
def test_two_ranks_write_what_one_rank_writes(run, tmp_path):
    import socket

    config, folder = run
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [tmp_path / "run.yaml", folder / "protected", folder / "lora_adapter", tmp_path / "two"]
    command = [sys.executable, "-c", RANK_PROGRAM, *map(str, arguments)]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(command, env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    evaluate(run, tmp_path / "one")
    torch.set_num_threads(threads)
    assert [rank.wait(timeout=400) for rank in ranks] == [0, 0]

    def written(name):
        return [json.loads((tmp_path / folder / name).read_text()) for folder in ("one", "two")]

    one, two = written("metrics.json")
    for section in ("classification", "calibration", "decision_curve", "selective", "fairness", "safety"):
        assert two[section] == one[section], section
    one, two = written("explanations.json")
    assert one == two != []
    frames = [pd.read_parquet(tmp_path / name / "predictions.parquet") for name in ("one", "two")]
    pd.testing.assert_frame_equal(*frames, check_exact=True)


def test_sharing_the_prompt_is_much_faster_than_repeating_it(model, tokenizer):
    words = ["Eye", "Ear", "Skin", "Heart", "Lung", "Liver", "Bone", "Blood"]
    labels = [f"{word} disorder" for word in words]
    records = [note | {"label": labels[0], "text": note["text"] * 4} for note in notes(4)]
    scorer = evaluator.ClinicalEvaluator(model, tokenizer, records, DATA, labels)
    prompts = scorer._classification_prompts(records, labels)
    answers = scorer._answers(records[0], labels)
    tree = evaluator.build_tree(answers)
    times = {"shared": [], "repeated": []}
    for _ in range(2):
        started = time.process_time()
        evaluator.score_tree(model, prompts, tree, 2)
        times["shared"].append(time.process_time() - started)
        started = time.process_time()
        for answer in answers:
            evaluator.score_rows(model, [(prompt, answer) for prompt in prompts], 2)
        times["repeated"].append(time.process_time() - started)
    assert min(times["repeated"]) > 2 * min(times["shared"]), times
