"""Records: what is read, what is refused, and what a division guarantees."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from medai_nb.config import DataConfig, RunConfig, UserError
from medai_nb.records import (
    connected_groups,
    decode,
    find_delimiter,
    hold_out,
    label_leaks,
    load_prepared,
    load_records,
    map_columns,
    plot_data_report,
    prepare_data,
    save_prepared,
    source_files,
)

REAL_DATA = Path(__file__).parents[2] / "shared" / "data"
needs_real_data = pytest.mark.skipif(
    not REAL_DATA.is_dir(), reason="the real corpora are not on this machine"
)


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def labelled_rows(count: int, **more) -> list[dict]:
    return [
        {"text": f"note {number}", "label": "ab"[number % 2], "patient_id": f"p{number // 2}", **more}
        for number in range(count)
    ]


def as_json(path: Path, rows: list) -> str:
    return write(path, json.dumps(rows))


# Reading


def test_json_list_json_data_and_json_lines_give_the_same_records(tmp_path):
    rows = labelled_rows(3)
    lines = "\n".join(json.dumps(row) for row in rows)
    sources = [
        as_json(tmp_path / "r.json", rows),
        write(tmp_path / "r2.json", json.dumps({"data": rows})),
        write(tmp_path / "r.jsonl", lines),
        write(tmp_path / "r.jsonl.gz", gzip.compress(lines.encode())),
        write(tmp_path / "lines.json", lines),
        rows,
    ]
    for source in sources:
        loaded = load_records(source)
        assert loaded.dataset["text"] == ["note 0", "note 1", "note 2"]
        assert loaded.dataset["label"] == ["a", "b", "a"]
        assert loaded.dataset["patient_id"] == ["p0", "p0", "p1"]
        assert (loaded.problems, loaded.rows) == ([], 3)


def test_objects_by_id_keep_their_id(tmp_path):
    loaded = load_records(write(tmp_path / "r.json", json.dumps({"q7": {"text": "a", "label": "x"}})))
    assert loaded.dataset["id"] == ["q7"]


def test_latin_1_with_semicolons_is_read_and_the_guess_is_reported(tmp_path):
    source = write(tmp_path / "r.csv", "note;class\nÜbelkeit, Erbrechen;digestive\n".encode("latin-1"))
    loaded = load_records(source)
    assert loaded.dataset["text"] == ["Übelkeit, Erbrechen"]
    assert any("cp1252" in warning and "data.encoding" in warning for warning in loaded.warnings)
    assert load_records(source, encoding="latin-1", delimiter=";").warnings == []


def test_byte_order_mark_is_not_part_of_the_first_column(tmp_path):
    loaded = load_records(write(tmp_path / "r.csv", b"\xef\xbb\xbftext,label\na,x\n"))
    assert loaded.columns == {"text": "text", "label": "label"}
    utf16 = load_records(write(tmp_path / "r16.csv", "text,label\nä,x\n".encode("utf-16")))
    assert utf16.dataset["text"] == ["ä"]


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Señor, café", "latin-1"),
        ("Temp 38°C, it’s the patient’s", "cp1252"),
        ("Пациент жалуется на боль в груди", "cp1251"),
        ("患者は胸の痛みを訴えている。熱があります。", "shift_jis"),
    ],
)
def test_encodings_are_found(text, encoding):
    assert decode(text.encode(encoding), None, "file")[0] == text


def test_a_wrong_or_unknown_encoding_is_an_error_naming_the_file():
    with pytest.raises(UserError, match=r"notes\.csv: unknown encoding 'latin-77'"):
        decode(b"a", "latin-77", "notes.csv")
    with pytest.raises(UserError, match=r"notes\.csv: byte 0 is not utf-8"):
        decode(b"\xff\x41", "utf-8", "notes.csv")


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_delimiters_are_found_in_text_full_of_other_delimiters(delimiter):
    rows = [["id", "text"], ["1", "cough, fever; chills | none"], ["2", "a; b; c, d, e"], ["3", "plain"]]
    text = "\n".join(delimiter.join(f'"{cell}"' for cell in row) for row in rows)
    assert find_delimiter(text) == delimiter


def test_csv_problems_carry_the_line_where_the_row_starts(tmp_path):
    content = 'text,label\n"two\nlines",x\na,x,extra\n,x\nb,\n"c"d,x\ne,y\n'
    loaded = load_records(write(tmp_path / "r.csv", content))
    assert loaded.dataset["text"] == ["two\nlines", "e"]
    assert [(problem["row"], problem["reason"]) for problem in loaded.problems][:3] == [
        (4, "3 fields under a header of 2"),
        (5, "empty text"),
        (6, "no label"),
    ]
    assert loaded.problems[3]["row"] == 7 and loaded.problems[3]["reason"].startswith("not readable as CSV")
    assert loaded.positions == [2, 8] and loaded.rows == 6


def test_a_quote_that_is_never_closed_is_an_error_and_swallows_nothing_silently(tmp_path):
    with pytest.raises(UserError, match=r"r\.csv: a quote opened in line 3 is never closed"):
        load_records(write(tmp_path / "r.csv", 'text,label\na,x\n"b,y\nc,x\nd,y\n'))


def test_a_field_longer_than_the_default_limit_is_read(tmp_path):
    loaded = load_records(write(tmp_path / "r.csv", "text,label\n" + "word " * 50_000 + ",x\n"))
    assert len(loaded.dataset[0]["text"]) == 249_999


def test_a_repeated_column_is_refused(tmp_path):
    with pytest.raises(UserError, match="names text more than once"):
        load_records(write(tmp_path / "r.csv", "text,label,text\na,x,b\n"))


def test_broken_json_lines_are_listed_with_their_line_and_without_their_text(tmp_path):
    content = '{"text": "a", "label": "x"}\n\n{"text": "secret Smith\n[1, 2]\n{"text": "b", "label": "y"}\n'
    loaded = load_records(write(tmp_path / "r.jsonl", content))
    assert [problem["row"] for problem in loaded.problems] == [3, 4]
    assert loaded.problems[1]["reason"] == "not an object but a list"
    assert "Smith" not in str(loaded.problems)
    assert loaded.positions == [1, 5]


def test_broken_json_names_file_line_and_column(tmp_path):
    with pytest.raises(UserError, match=r"r\.json: not valid JSON: .* in line 2, column \d+"):
        load_records(write(tmp_path / "r.json", '[{"text": "a",\n "label": }]'))


def test_a_missing_file_is_an_error_with_the_nearest_name(tmp_path):
    write(tmp_path / "visits.csv", "text,label\na,x\n")
    with pytest.raises(UserError, match=r"no such file or folder; did you mean '.*visits\.csv'"):
        load_records(tmp_path / "visit.csv")
    with pytest.raises(UserError, match=r"the folder .*nowhere does not exist"):
        load_records(tmp_path / "nowhere" / "visit.csv")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.xlsx", b"PK", "cannot tell the form"),
        ("r.jsonl.gz", b"\x1f\x8b\x08broken", "cannot be read"),
        ("r.parquet", b"PAR1 not really", "Parquet|cannot be read"),
        ("r.csv", b"", "no records"),
        ("r.json", b'"text"', "expected a list of objects"),
    ],
)
def test_unreadable_files_are_errors_naming_the_file(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message) as caught:
        load_records(write(tmp_path / name, content))
    assert name in str(caught.value)


def test_parquet_data_frame_dataset_and_saved_folder_give_the_same_records(tmp_path):
    import pandas as pd
    from datasets import ClassLabel, Dataset, DatasetDict

    rows = labelled_rows(4, age=50)
    frame = pd.DataFrame(rows)
    frame.to_parquet(tmp_path / "r.parquet")
    dataset = Dataset.from_list(rows)
    dataset.save_to_disk(str(tmp_path / "saved"))
    numbered = dataset.cast_column("label", ClassLabel(names=["a", "b"]))
    DatasetDict(train=dataset).save_to_disk(str(tmp_path / "dict"))
    expected = load_records(rows).dataset.to_list()
    for source in (tmp_path / "r.parquet", frame, dataset, numbered, tmp_path / "saved", tmp_path / "dict"):
        records = load_records(source).dataset.to_list()
        assert [record | {"id": ""} for record in records] == [record | {"id": ""} for record in expected]
    assert expected[0]["metadata"] == {"age": 50}


def test_hub_names_need_the_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        UserError, match="'someone/notes' is no file or folder here, and HF_HUB_OFFLINE forbids"
    ):
        load_records("someone/notes")


def test_an_unknown_kind_of_source_is_refused():
    with pytest.raises(UserError, match="cannot load records from a int"):
        load_records(3)


# Columns


def test_ambiguous_columns_are_asked_about_and_explicit_ones_win():
    rows = [{"dialogue": "d", "note": "n", "label": "x"}]
    with pytest.raises(UserError, match="the columns dialogue and note could both be 'text'"):
        load_records(rows)
    loaded = load_records(rows, columns={"text": "dialogue"})
    assert loaded.dataset[0]["text"] == "d"


def test_the_exact_name_wins_over_an_alias():
    assert map_columns([{"text": "a", "note": "b"}], {}, {}, "here") == {"text": "text"}


def test_a_missing_column_is_an_error_with_the_nearest_name():
    with pytest.raises(
        UserError, match=r"no column 'dialog' \(data\.columns\.text\); did you mean 'dialogue'"
    ):
        load_records([{"dialogue": "d"}], columns={"text": "dialog"})
    with pytest.raises(UserError, match="unknown field 'texts'; did you mean 'text'"):
        load_records([{"dialogue": "d"}], columns={"texts": "dialogue"})


def test_metadata_is_what_no_field_takes_and_nested_values_can_be_reached():
    rows = [
        {
            "body": {"note": "a"},
            "label": "x",
            "metadata": {"age": 5, "patient_id": "p"},
            "ward": "W",
            "Sex": "F",
        }
    ]
    columns = {"text": "body.note", "metadata.gender": "Sex"}
    record = load_records(rows, columns=columns, constants={"metadata.site": "north"}).dataset[0]
    assert record["text"] == "a" and record["patient_id"] == "p"
    metadata = {key: value for key, value in record["metadata"].items() if key != "body"}
    assert metadata == {"age": 5, "ward": "W", "gender": "F", "site": "north"}


def test_metadata_of_mixed_types_becomes_text_and_ages_become_numbers(tmp_path):
    loaded = load_records([{"text": "a", "label": "x", "v": 1}, {"text": "b", "label": "y", "v": {"k": 2}}])
    assert [row["v"] for row in loaded.dataset["metadata"]] == ["1", '{"k": 2}']
    loaded = load_records(write(tmp_path / "r.csv", "text,label,age,code\na,x,54,0012\nb,y,,7\n"))
    assert loaded.dataset["metadata"][:] == [{"age": 54, "code": "0012"}, {"age": None, "code": "7"}]


def test_instruction_input_and_response_become_a_conversation():
    rows = [{"instruction": "Summarize.", "input": "Long text.", "output": "Short."}]
    assert load_records(rows).dataset[0]["messages"] == [
        {"role": "user", "content": "Summarize.\n\nLong text."},
        {"role": "assistant", "content": "Short."},
    ]
    constant = load_records(
        [{"dialogue": "Long text.", "summary": "Short."}],
        columns={"response": "summary"},
        constants={"instruction": "Summarize."},
    )
    assert constant.dataset[0]["messages"][0]["content"] == "Summarize.\n\nLong text."


def test_conversations_are_checked_and_other_role_names_are_understood():
    good = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    bad = [
        {"conversations": [{"from": "human", "value": "Hi"}]},
        {"conversations": [{"from": "robot", "value": "Hi"}]},
        {"conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": "x"}]},
        {"conversations": "Hi"},
    ]
    loaded = load_records([good, *bad])
    assert [turn["role"] for turn in loaded.dataset[0]["messages"]] == ["user", "assistant"]
    assert [problem["row"] for problem in loaded.problems] == [2, 3, 4, 5]


def test_text_alone_is_enough_to_load_but_not_to_train():
    loaded = load_records([{"note": f"n{number}"} for number in range(12)])
    assert len(loaded.dataset) == 12
    with pytest.raises(UserError, match="nothing to learn: task instruction needs"):
        prepare_data_of([{"note": f"n{number}"} for number in range(12)])


def test_repeated_ids_are_made_unique_and_reported():
    loaded = load_records([{"id": name, "text": "t", "label": "x"} for name in ("1", "1", "1-2", "1")])
    assert len(set(loaded.dataset["id"])) == 4
    assert loaded.warnings == ["2 records had the id of an earlier one and got a number added"]


def test_spreadsheet_numbers_lose_their_decimal_point():
    loaded = load_records(
        [{"text": "a", "label": 3.0, "patient_id": 17}, {"text": "b", "label": float("nan")}]
    )
    assert loaded.dataset[0]["label"] == "3" and loaded.dataset[0]["patient_id"] == "17"
    assert loaded.problems == [{"row": 2, "reason": "no label"}]


def test_gold_spans_outside_the_text_are_a_problem():
    spans = [{"start": 0, "end": 3, "label": "NAME"}]
    rows = [
        {"text": "Ann ", "label": "x", "phi_spans": spans},
        {"text": "A", "label": "y", "phi_spans": spans},
    ]
    loaded = load_records(rows)
    assert loaded.dataset[0]["phi_spans"] == spans and loaded.dataset[0]["text"] == "Ann "
    assert loaded.problems == [{"row": 2, "reason": "phi_spans outside the text"}]


# Preparing


def prepare_data_of(rows: list[dict], folder: Path | None = None, **settings):
    import tempfile

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


def test_source_files_lists_what_is_read(tmp_path):
    train = as_json(tmp_path / "train.json", labelled_rows(2))
    assert source_files(DataConfig(train_file=train)) == [Path(train)]
    assert (
        source_files(DataConfig(dataset_path="demo"))
        == source_files(DataConfig(dataset_path="a/hub-id"))
        == []
    )
    with pytest.raises(UserError, match="check data.test_file"):
        source_files(DataConfig(train_file=train, test_file=str(tmp_path / "zzz.parquet")))


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
        "from medai_nb.config import DataConfig; from medai_nb.records import prepare_data; "
        "p = prepare_data(DataConfig(dataset_path='demo', group_by=['patient_id', 'metadata.category']), 42); "
        "print(' '.join(p.splits['test']['id']))"
    )
    environment = dict(os.environ, PYTHONHASHSEED="7", HF_HUB_OFFLINE="1")
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == list(demo.splits["test"]["id"])


@needs_real_data
def test_mts_dialog_example_is_prepared(monkeypatch):
    monkeypatch.setenv("MEDAI_DATA", str(REAL_DATA))
    config = RunConfig.load("mts_dialog", overrides=["data.max_records=null", "data.min_label_count=1"])
    report = prepare_data(config.data, config.seed).report
    assert (report["task"], report["rows"], report["skipped"]) == ("classification", 1301, 0)
    assert report["counts"]["validation"] == 100
    # Two dialogues of the validation file are in the training file with other line ends.
    assert report["left_out"] == {"copies of a text in a later split": 2}
    assert len(report["label_counts"]["train"]) == 20


@needs_real_data
def test_medquad_example_keeps_documents_and_diseases_together(monkeypatch):
    monkeypatch.setenv("MEDAI_DATA", str(REAL_DATA))
    config = RunConfig.load("medquad")
    prepared = prepare_data(config.data, config.seed)
    assert prepared.report["task"] == "instruction" and prepared.report["rows"] == 16407
    assert sum(prepared.report["counts"].values()) <= config.data.max_records
    for name in ("file", "focus"):
        assert disjoint({row[name] for row in part["metadata"]} for part in prepared.splits.values())
