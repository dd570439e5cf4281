"""Records: what is read, and what is refused with its place."""

import gzip
import json
from pathlib import Path

import pytest
from data_files import as_json, labelled_rows, write

from medai_nb.config import DataConfig, UserError
from medai_nb.records import load_records, map_columns, source_files
from medai_nb.tables import decode, find_delimiter

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
    assert list(loaded.positions) == [2, 8] and loaded.rows == 6


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
    assert list(loaded.positions) == [1, 5]


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


# Folders of files


def shards(folder: Path, form: str, parts: int = 3) -> Path:
    """A folder of files with two rows each."""
    import pandas as pd

    folder.mkdir()
    for number in range(parts):
        rows = [
            {"text": f"note {number} {row}", "label": "ab"[row], "patient_id": f"p{number}"}
            for row in range(2)
        ]
        path = folder / f"part-{number}.{form}"
        if form == "parquet":
            pd.DataFrame(rows).to_parquet(path)
        elif form == "json":
            as_json(path, rows)
        elif form == "csv":
            pd.DataFrame(rows).to_csv(path, index=False)
        else:
            lines = "\n".join(map(json.dumps, rows)).encode()
            path.write_bytes(gzip.compress(lines) if form.endswith(".gz") else lines)
    return folder


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "json", "csv", "parquet"])
def test_a_folder_of_files_is_one_table_in_the_order_of_their_names(tmp_path, form):
    loaded = load_records(shards(tmp_path / "export", form))
    assert loaded.dataset["text"] == [f"note {number} {row}" for number in range(3) for row in range(2)]
    assert len(set(loaded.dataset["id"])) == loaded.rows == 6 and loaded.findings == []
    assert source_files(DataConfig(train_file=str(tmp_path / "export"))) == [tmp_path / "export"]


def test_a_row_of_a_folder_is_named_by_file_and_line(tmp_path):
    folder = shards(tmp_path / "export", "jsonl")
    with (folder / "part-1.jsonl").open("a") as file:
        file.write('\n{"text": "a", "label": ""}\n{broken\n')
    write(folder / "part-2.jsonl", "{broken\n")
    loaded = load_records(folder)
    assert [loaded.place(problem["row"]) for problem in loaded.problems] == [
        "part-1.jsonl:3",
        "part-1.jsonl:4",
        "part-2.jsonl:1",
    ]


def test_other_files_in_a_folder_are_reported_and_hidden_ones_are_not(tmp_path):
    folder = shards(tmp_path / "export", "csv")
    for name in ("README.md", "_SUCCESS", ".part-0.csv.crc"):
        write(folder / name, "x")
    loaded = load_records(folder)
    assert loaded.rows == 6 and [finding.kind for finding in loaded.findings] == ["other_files"]
    assert "README.md" in loaded.warnings[0]


def test_a_folder_without_records_with_several_kinds_or_with_other_columns_is_one_error(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"empty: no files of records in this folder \(it has nothing\): put"):
        load_records(empty)
    write(empty / "note.txt", "Cough.")
    with pytest.raises(UserError, match=r"empty: no files of records in this folder \(it has note.txt\)"):
        load_records(empty)
    mixed = shards(tmp_path / "mixed", "csv")
    write(mixed / "part-0.jsonl", '{"text": "a", "label": "x"}')
    with pytest.raises(UserError, match=r"mixed: files of several kinds \(3 x .csv and 1 x .jsonl\)"):
        load_records(mixed)
    other = shards(tmp_path / "other", "csv")
    write(other / "part-1.csv", "note,label\na,x\n")
    with pytest.raises(
        UserError, match=r"part-1\.csv: its columns \(label, note\) are not those of part-0\.csv"
    ):
        load_records(other)
    broken = shards(tmp_path / "broken", "parquet")
    write(broken / "part-2.parquet", b"PAR1 not really")
    with pytest.raises(UserError, match=r"part-2\.parquet"):
        load_records(broken)


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


def test_text_alone_is_enough_to_load():
    loaded = load_records([{"note": f"n{number}"} for number in range(12)])
    assert len(loaded.dataset) == 12


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
