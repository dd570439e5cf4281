"""Dividing records: what belongs together, what is refused, and what the report says."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from data_files import as_json, labelled_rows

from medai_nb.config import DataConfig, UserError
from medai_nb.splits import (
    connected_groups,
    hold_out,
    load_prepared,
    plot_data_report,
    prepare_data,
    save_prepared,
)
from medai_nb.traps import label_leaks

# Preparing


def prepare_data_of(rows: list[dict], folder: Path | None = None, **settings):
    folder = folder or Path(tempfile.mkdtemp())
    return prepare_data(DataConfig(dataset_path=as_json(folder / "rows.json", rows), **settings), seed=42)


def values(prepared, name):
    return {split: {row[name] for row in part} for split, part in prepared.splits.items()}


def disjoint(sets) -> bool:
    sets = list(sets)
    return sum(map(len, sets)) == len(set().union(*sets))


def test_connected_rows_form_one_group():
    groups = connected_groups([["a", "1"], ["b", "1"], ["b", "2"], ["c", "3"], []])
    assert groups[0] == groups[1] == groups[2]
    assert len(set(groups.tolist())) == 3


def test_patients_stay_together_and_labels_keep_their_share():
    prepared = prepare_data_of(labelled_rows(200))
    assert disjoint(values(prepared, "patient_id").values())
    assert prepared.report["counts"] == {"train": 160, "validation": 20, "test": 20}
    for name, counts in prepared.report["label_counts"].items():
        assert counts["a"] == counts["b"], name


def test_duplicate_texts_never_part_and_are_compared_without_case_and_space():
    rows = [
        {"text": f"Note  {number % 50}" if number < 50 else f"note {number % 50} ", "label": "ab"[number % 2]}
        for number in range(100)
    ]
    prepared = prepare_data_of(rows)
    texts = [{" ".join(text.lower().split()) for text in part["text"]} for part in prepared.splits.values()]
    assert disjoint(texts)
    assert prepared.report["duplicates_across_splits"] == 0


def test_several_group_names_link_and_lists_link_by_item():
    rows = [
        {
            "text": f"t{number}",
            "label": "ab"[number % 2],
            "doc": f"d{number // 4}",
            "tags": [f"g{number // 8}", "x" * (number + 1)],
        }
        for number in range(80)
    ]
    prepared = prepare_data_of(rows, group_by=["metadata.doc", "metadata.tags"])
    tags = [{row["tags"][0] for row in part["metadata"]} for part in prepared.splits.values()]
    assert disjoint(tags)
    assert prepared.report["largest_group"] == 8


def test_labels_get_their_names_before_anything_is_counted_and_an_unused_name_is_told():
    names = {"a": "chief complaint", "b": "history", "c": "labs"}
    report = prepare_data_of(labelled_rows(100), label_names=names).report
    assert set(report["label_counts"]["train"]) == {"chief complaint", "history"}
    (told,) = [finding for finding in report["findings"] if finding["kind"] == "unused_label_names"]
    assert "no record has the label c; labels are chief complaint, history" in told["message"]
    merged = prepare_data_of(labelled_rows(100) + [{"text": f"more {n}", "label": "x"} for n in range(50)],
                             label_names={"b": "x"})  # fmt: skip
    assert {label: sum(part["label"].count(label) for part in merged.splits.values()) for label in "ax"} == {
        "a": 50, "x": 100,
    }  # fmt: skip


def test_text_without_label_is_nothing_to_learn():
    with pytest.raises(UserError, match="nothing to learn: task instruction needs"):
        prepare_data_of([{"note": f"n{number}"} for number in range(12)])


def test_one_group_cannot_be_divided():
    with pytest.raises(UserError, match="one group under data.group_by and cannot be divided"):
        prepare_data_of([row | {"patient_id": "p"} for row in labelled_rows(20)])


def test_an_unknown_group_name_is_an_error():
    with pytest.raises(
        UserError, match=r"no record has 'metadata\.doc'; there is patient_id and metadata\.ward"
    ):
        prepare_data_of(labelled_rows(20, ward="w"), group_by=["metadata.doc"])


def test_patients_stay_together_whatever_group_by_says():
    prepared = prepare_data_of(labelled_rows(100), group_by=[])
    assert disjoint(values(prepared, "patient_id").values())


def test_missing_patients_are_a_warning():
    rows = [{"text": f"t{number}", "label": "ab"[number % 2]} for number in range(40)]
    assert any("no patient_id" in warning for warning in prepare_data_of(rows).report["warnings"])
    assert prepare_data_of(rows, group_by=[]).report["warnings"] == []


def test_too_many_unusable_rows_stop_the_run_naming_file_rows_and_reason(tmp_path):
    rows = labelled_rows(20)
    for number in (3, 4, 5):
        rows[number]["text"] = " "
    with pytest.raises(
        UserError, match=r"rows\.json: 3 of 20 rows cannot be used.*empty text: 3 \(rows 4, 5, 6\)"
    ):
        prepare_data_of(rows, tmp_path)
    report = prepare_data_of(rows, tmp_path, max_skipped_fraction=0.2).report
    assert report["problems"] == [
        {"source": str(tmp_path / "rows.json"), "reason": "empty text", "count": 3, "rows": [4, 5, 6]}
    ]
    assert sum(report["counts"].values()) + report["skipped"] == report["rows"] == 20


def test_error_messages_and_report_never_contain_text(tmp_path):
    rows = [{"text": f"Smith {number}", "label": "" if number % 2 else "x"} for number in range(20)]
    with pytest.raises(UserError) as caught:
        prepare_data_of(rows, tmp_path)
    assert "Smith" not in str(caught.value)
    rows = [{"text": f"Smith {number}", "label": "xy"[number % 2]} for number in range(40)] + [
        {"text": "", "label": "x"}
    ]
    assert "Smith" not in json.dumps(prepare_data_of(rows, tmp_path).report)


def test_rare_labels_are_left_out_and_counted():
    rows = labelled_rows(60) + [{"text": "odd", "label": "rare", "patient_id": "z"}]
    report = prepare_data_of(rows, min_label_count=2).report
    assert report["left_out"] == {"labels with fewer than 2 records: rare": 1}
    assert list(report["label_counts"]["train"]) == ["a", "b"]
    with pytest.raises(UserError, match="classification needs two"):
        prepare_data_of(rows, min_label_count=31)


def test_max_records_draws_whole_groups():
    prepared = prepare_data_of(labelled_rows(400), max_records=101)
    counts = [row["patient_id"] for part in prepared.splits.values() for row in part]
    assert 95 <= len(counts) <= 101
    assert all(counts.count(patient) == 2 for patient in counts)
    assert prepared.report["left_out"] == {"over max_records": 400 - len(counts)}


def test_given_files_are_kept_and_only_what_is_missing_is_cut_from_training(tmp_path):
    train = as_json(tmp_path / "train.json", labelled_rows(100))
    given = [{"text": f"v{n}", "label": "ab"[n % 2], "patient_id": f"v{n}"} for n in range(10)]
    validation = as_json(tmp_path / "validation.json", given)
    prepared = prepare_data(DataConfig(train_file=train, validation_file=validation), seed=42)
    assert prepared.report["counts"] == {"train": 90, "validation": 10, "test": 10}
    assert prepared.splits["validation"]["text"] == [f"v{number}" for number in range(10)]
    assert len(set().union(*values(prepared, "id").values())) == 110


def test_a_patient_in_two_given_files_is_an_error(tmp_path):
    train = as_json(tmp_path / "train.json", labelled_rows(20))
    test = as_json(tmp_path / "test.json", [{"text": "new", "label": "a", "patient_id": "p3"}])
    with pytest.raises(
        UserError, match=r"train\.json.*test\.json.*same patient_id in 1 cases, e\.g\. rows 7 and 1"
    ):
        prepare_data(DataConfig(train_file=train, test_file=test), seed=42)


def test_the_same_text_in_two_given_files_is_an_error_and_near_copies_leave_training(tmp_path):
    train = as_json(tmp_path / "train.json", labelled_rows(40))
    exact = as_json(tmp_path / "exact.json", [{"text": "note 5", "label": "a", "patient_id": "new"}])
    with pytest.raises(UserError, match="same exact text in 1 cases, e.g. rows 6 and 1"):
        prepare_data(DataConfig(train_file=train, test_file=exact), seed=42)
    near = as_json(tmp_path / "near.json", [{"text": "Note\r\n5", "label": "a", "patient_id": "new"}])
    prepared = prepare_data(DataConfig(train_file=train, test_file=near), seed=42)
    assert not {"note 5"} & (values(prepared, "text")["train"] | values(prepared, "text")["validation"])
    assert prepared.report["duplicates_across_splits"] == 0
    assert any("records of train (rows 6) left out" in warning for warning in prepared.report["warnings"])


def test_a_saved_dataset_dict_keeps_its_splits(tmp_path):
    from datasets import Dataset, DatasetDict

    parts = {
        "train": Dataset.from_list(labelled_rows(40)),
        "dev": Dataset.from_list([{"text": "v", "label": "a", "patient_id": "v"}]),
        "test": Dataset.from_list([{"text": "w", "label": "b", "patient_id": "w"}]),
    }
    DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    report = prepare_data(DataConfig(dataset_path=str(tmp_path / "saved")), seed=42).report
    assert report["counts"] == {"train": 40, "validation": 1, "test": 1}


def test_the_task_follows_from_the_records_and_can_be_set():
    both = [
        {"text": f"t{number}", "label": "ab"[number % 2], "instruction": f"q{number}", "response": "r"}
        for number in range(40)
    ]
    assert prepare_data_of(both, group_by=[]).report["task"] == "classification"
    report = prepare_data_of(both, group_by=[], task="instruction").report
    assert report["task"] == "instruction" and report["label_counts"] == {}
    with pytest.raises(UserError, match="task classification needs text and label"):
        prepare_data_of(
            [{"question": f"q{number}", "answer": "r"} for number in range(40)], task="classification"
        )


def test_leaking_columns_and_contradictions_are_warnings():
    rows = labelled_rows(100)
    for number, row in enumerate(rows):
        row["outcome"] = f"died {row['label']}"
        row["ward"] = f"w{number % 3}"
        row["duration"] = (100 if row["label"] == "a" else 500) + number
    rows.append(
        {
            "text": "note 0",
            "label": "b",
            "patient_id": "p0",
            "outcome": "died b",
            "ward": "w1",
            "duration": 501,
        }
    )
    warnings = prepare_data_of(rows).report["warnings"]
    assert [warning.split()[0] for warning in warnings if "alone gives the label" in warning] == [
        "metadata.duration",
        "metadata.outcome",
    ]
    assert "1 texts stand under several labels: no model can get all of them right" in warnings
    grouped = [{"label": row["label"], "metadata": {"outcome": row["outcome"]}} for row in rows]
    assert label_leaks(grouped, known=["outcome"]) == []


def test_no_data_and_one_label_are_errors():
    with pytest.raises(UserError, match="no data: set data.dataset_path"):
        prepare_data(DataConfig(), seed=42)
    with pytest.raises(UserError, match="classification needs two"):
        prepare_data_of([{"text": f"t{number}", "label": "x"} for number in range(30)])


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.25, 0.4])
def test_hold_out_takes_about_the_fraction_of_every_label(fraction):
    labels = ["a"] * 200 + ["b"] * 100 + ["c"] * 100
    held = hold_out(labels, list(range(400)), fraction, seed=1)
    for label in "abc":
        rows = np.array(labels) == label
        assert abs(held[rows].mean() - fraction) <= 0.02
    assert (held == hold_out(labels, list(range(400)), fraction, seed=1)).all()
    assert (held != hold_out(labels, list(range(400)), fraction, seed=2)).any()


def test_hold_out_works_with_very_few_rows():
    held = hold_out(["a", "b", "c"], [0, 1, 1], 0.1, seed=0)
    assert 0 < held.sum() < 3


def test_saved_data_come_back_with_their_report(tmp_path):
    prepared = prepare_data_of(labelled_rows(40))
    again = load_prepared(save_prepared(prepared, tmp_path / "data"))
    assert again.report == prepared.report
    assert {name: part.to_list() for name, part in again.splits.items()} == {
        name: part.to_list() for name, part in prepared.splits.items()
    }
    with pytest.raises(UserError, match="run the stage prepare_data first"):
        load_prepared(tmp_path)


def test_figures_are_drawn_for_both_tasks():
    import matplotlib

    matplotlib.use("Agg")
    for rows in (labelled_rows(40), [{"question": f"q{number}", "answer": "r"} for number in range(40)]):
        figure = plot_data_report(prepare_data_of(rows, group_by=[]).report)
        assert len(figure.axes) == 3
        figure.canvas.draw()


# The embedded corpus and the real ones


@pytest.fixture(scope="module")
def demo():
    return prepare_data(
        DataConfig(dataset_path="demo", group_by=["patient_id", "metadata.category"]), seed=42
    )


def test_demo_splits_share_neither_patients_nor_categories(demo):
    assert demo.report["counts"] == {"train": 1600, "validation": 200, "test": 200}
    assert disjoint(values(demo, "patient_id").values())
    assert disjoint({row["category"] for row in part["metadata"]} for part in demo.splits.values())
    assert min(demo.report["label_counts"]["test"].values()) >= 5
    assert demo.report["warnings"] == demo.report["problems"] == []


def test_demo_keeps_its_gold_spans(demo):
    record = demo.splits["test"][0]
    assert record["phi_spans"]
    assert all(record["text"][span["start"] : span["end"]].strip() for span in record["phi_spans"])


@pytest.mark.slow
def test_splits_are_the_same_in_every_process(demo):
    program = (
        "from medai_nb.config import DataConfig; from medai_nb.splits import prepare_data; "
        "p = prepare_data(DataConfig(dataset_path='demo', group_by=['patient_id', 'metadata.category']), 42); "
        "print(' '.join(p.splits['test']['id']))"
    )
    environment = dict(os.environ, PYTHONHASHSEED="7", HF_HUB_OFFLINE="1")
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == list(demo.splits["test"]["id"])
