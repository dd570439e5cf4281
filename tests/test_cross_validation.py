"""Folds keep patients together, begin from one start, and share nothing: each gives the same figures alone and in any order."""

import json
from collections import Counter

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from medai_nb import trainer
from medai_nb.config import RunConfig, UserError
from medai_nb.cross_validation import (
    cross_validate_model,
    cross_validation_table,
    fold_interval,
    patient_folds,
    plot_folds,
    rare_classes,
)
from medai_nb.run_folder import content_hash

pytestmark = pytest.mark.usefixtures("restored_environment")

FINDINGS = {"Skin": "rash and itching", "Lung": "cough and wheezing"}
SETTINGS = {
    "training": {"max_steps": 3, "learning_rate": 0.02, "packing": False, "report_to": []},
    "data": {"max_length": 64},
    "evaluation": {"bootstrap_samples": 100},
}


def notes(count=24, **labels):
    names = ["Skin", "Lung", "Lung", "Skin"] * (count // 4)
    return [
        {
            "id": f"MRN {row}",
            "patient_id": f"p{row // 2}",
            "text": f"Visit {row}: {FINDINGS[label]}.",
            "label": label,
        }
        for row, label in enumerate(names)
    ]


def test_patients_are_dealt_whole_and_labels_evenly():
    generator = np.random.default_rng(3)
    groups = np.repeat(np.arange(120), generator.integers(1, 5, size=120))
    labels = np.array(["a", "b", "c"])[generator.choice(3, size=len(groups), p=[0.6, 0.3, 0.1])]
    fold_of = patient_folds(list(labels), groups, 5, seed=1)
    assert set(fold_of) == set(range(5))
    assert all(len(set(fold_of[groups == group])) == 1 for group in set(groups))
    share = Counter(labels)
    for fold in range(5):
        held = Counter(labels[fold_of == fold])
        for label, count in share.items():
            assert abs(held[label] - count / 5) <= 0.3 * count / 5 + 2, (fold, label, held)
    assert (fold_of == patient_folds(list(labels), groups, 5, seed=1)).all()
    assert (fold_of != patient_folds(list(labels), groups, 5, seed=2)).any()


def test_the_interval_is_the_corrected_one_and_no_certainty_is_invented():
    figure = fold_interval([0.80, 0.84, 0.78, 0.86, 0.82], n_folds=5)
    # Deviation 0.0316, t(4) at 97.5 % 2.776, root of 1/5 + 1/4 0.6708: 0.0589; independent folds would have 0.0393.
    assert figure["value"] == pytest.approx(0.82) and figure["high"] - 0.82 == pytest.approx(0.0589, abs=1e-4)
    assert fold_interval([0.8, None, float("nan"), 0.9], n_folds=4)["value"] == pytest.approx(0.85)
    assert fold_interval([0.7, 0.7, 0.7], n_folds=3)["low"] is None
    assert fold_interval([None], n_folds=3)["value"] is None


@pytest.fixture(scope="module")
def all_folds(tmp_path_factory, tiny_llama):
    """(result, folder, the first adapter of each fold, hashes of the base model's weights before)."""
    folder = tmp_path_factory.mktemp("folds") / "all"
    before = content_hash(tiny_llama / "model.safetensors")
    starts = []
    with pytest.MonkeyPatch.context() as patch:
        apply = trainer.apply_lora

        def observed(*arguments, **options):
            model = apply(*arguments, **options)
            starts.append(
                {name: one.detach().clone() for name, one in model.named_parameters() if "lora" in name}
            )
            return model

        patch.setattr(trainer, "apply_lora", observed)
        result = cross_validate_model(str(tiny_llama), notes(), 3, config=SETTINGS, output_dir=folder)
    return result, folder, starts, before


def test_every_fold_begins_with_the_same_adapter_on_unchanged_weights(all_folds, tiny_llama):
    result, folder, starts, before = all_folds
    assert len(starts) == 3 and len(starts[0]) > 0
    for start in starts[1:]:
        assert start.keys() == starts[0].keys()
        assert all(torch.equal(start[name], starts[0][name]) for name in start)
    assert content_hash(tiny_llama / "model.safetensors") == before
    trained = {
        content_hash(folder / f"fold-{fold}" / "lora_adapter" / "adapter_model.safetensors")
        for fold in (1, 2, 3)
    }
    assert len(trained) == 3, "each fold learns from other records"


def test_a_fold_alone_and_in_another_order_gives_the_same_figures(all_folds, tiny_llama, tmp_path):
    result, folder, _, _ = all_folds
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.rand(17)  # the state of the process must not matter
    again = cross_validate_model(
        model,
        datasets.Dataset.from_list(notes()),
        3,
        config=RunConfig(**SETTINGS),
        output_dir=tmp_path / "again",
        folds=[3, 1],
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    whole = {outcome["fold"]: outcome for outcome in result["folds"]}
    for outcome in again["folds"]:
        expected = whole[outcome["fold"]]
        assert outcome["figures"] == expected["figures"] and outcome["eval_loss"] == expected["eval_loss"]
    rows = pd.read_parquet(folder / "predictions.parquet")
    some = pd.read_parquet(tmp_path / "again" / "predictions.parquet")
    pd.testing.assert_frame_equal(some, rows[rows["fold"] != 2].reset_index(drop=True), check_exact=True)


def test_every_record_is_predicted_once_by_a_model_that_has_not_seen_its_patient(all_folds):
    result, folder, _, _ = all_folds
    frame = pd.read_parquet(folder / "predictions.parquet")
    assert frame["row"].tolist() == list(range(24))
    assert frame["label"].tolist() == [note["label"] for note in notes()]
    assert (frame.groupby("patient_id")["fold"].nunique() == 1).all() and frame["patient_id"].nunique() == 12
    for fold in (1, 2, 3):
        splits = datasets.load_from_disk(str(folder / f"fold-{fold}" / "protected"))
        assert {name: len(split) for name, split in splits.items()} == result["folds"][fold - 1]["records"]
        tested = {text for text in splits["test"]["text"]}
        assert not tested & ({*splits["train"]["text"]} | {*splits["validation"]["text"]})
    correct = (frame["label"] == frame["predicted"]).mean()
    assert result["out_of_fold"]["overall"]["accuracy"]["value"] == pytest.approx(correct)
    by_fold = (frame["label"] == frame["predicted"]).groupby(frame["fold"]).mean()
    assert [outcome["figures"]["accuracy"] for outcome in result["folds"]] == pytest.approx(by_fold.tolist())
    assert result["over_folds"]["accuracy"]["value"] == pytest.approx(by_fold.mean())
    assert "MRN" not in frame.to_csv() + json.dumps(result), "ids of the given records stay where they were"


def test_the_result_is_json_and_has_a_table_and_a_plot(all_folds):
    result, folder, _, _ = all_folds
    assert json.loads((folder / "cross_validation.json").read_text()) == json.loads(
        json.dumps(result, allow_nan=False)
    )
    table = cross_validation_table(result)
    assert list(table.columns) == ["mean over folds", "all predictions", "fold 1", "fold 2", "fold 3"]
    assert "accuracy" in table.index
    shown = [label.get_text() for label in plot_folds(result).axes[0].get_yticklabels()]
    assert shown == ["AUC-ROC", "macro F1", "accuracy"]


@pytest.mark.parametrize(
    "changes, options, message",
    [
        ({}, {"n_folds": 1}, "needs two folds or more"),
        ({}, {"n_folds": 13}, "12 patients cannot be dealt to 13 folds"),
        ({}, {"n_folds": 3, "folds": [4]}, r"folds is \[4\]: name some of 1 to 3"),
        ({"label": "Skin"}, {}, "all records have one label"),
        ({"label": None}, {}, "record 0 has no label"),
        ({"text": ""}, {}, "record 0 has no text"),
        ({"text": "The same."}, {}, "1 patients cannot be dealt to 5 folds"),
    ],
)
def test_folds_that_cannot_be_made_are_refused_in_words(changes, options, message):
    with pytest.raises(UserError, match=message):
        cross_validate_model("embedded", [note | changes for note in notes()], **options)


def test_rare_classes_are_named_and_results_are_not_overwritten(tmp_path, tiny_llama):
    (tmp_path / "fold-2").mkdir()
    with pytest.raises(UserError, match="fold-2 exists already"):
        cross_validate_model(str(tiny_llama), notes(), 3, output_dir=tmp_path)
    with pytest.raises(UserError, match="no label has 5 records"):
        patient_folds(["a", "a", "b", "b", "c", "c"], range(6), 5, seed=1)
    assert rare_classes(["a", "a", "a", "b", "b", "c"], [0, 1, 2, 3, 4, 5], 3) == [
        "'b' has 2 patients for 3 folds: some folds do not test it",
        "'c' has one patient: the fold that tests it has not learnt it",
    ]
