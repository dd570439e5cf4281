"""Files as they come, and what makes figures too good: each is a counted finding or one clear error."""

import csv
import gzip
import json
import os
from collections import Counter
from pathlib import Path

import pytest

import medai_nb.records as records_module
import medai_nb.tables as tables_module
import medai_nb.traps as traps_module
from medai_nb.config import DataConfig, RunConfig, UserError
from medai_nb.records import load_records
from medai_nb.splits import prepare_data
from medai_nb.traps import label_findings, near_copies

REAL_DATA = Path(os.environ.get("MEDAI_DATA") or Path(__file__).parents[2] / "shared" / "data")
needs_real_data = pytest.mark.skipif(
    not REAL_DATA.is_dir(), reason="the real corpora are not on this machine"
)


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def prepare(folder: Path, rows: list[dict], **settings) -> dict:
    source = write(folder / "rows.json", json.dumps(rows))
    return prepare_data(DataConfig(dataset_path=source, group_by=[], **settings), seed=42).report


def findings(report: dict) -> dict[str, int]:
    return {found["kind"]: found["count"] for found in report["findings"]}


# Files


def test_a_wrong_delimiter_names_the_right_one(tmp_path):
    source = write(tmp_path / "r.csv", "text,label\na,x\n")
    with pytest.raises(UserError, match=r"r\.csv: the header has no ';' .* but ',' divides it"):
        load_records(source, delimiter=";")
    with pytest.raises(UserError, match="give one character"):
        load_records(source, delimiter="||")


def test_empty_rows_are_counted_with_their_lines(tmp_path):
    loaded = load_records(write(tmp_path / "r.csv", "text,label\n\na,x\n,\nb,y\n"))
    found = {finding.kind: (finding.count, finding.rows) for finding in loaded.findings}
    assert found == {"empty_rows": (2, [2, 4])} and loaded.rows == 2


def test_broken_characters_are_counted(tmp_path):
    loaded = load_records([{"text": "Ãœbelkeit", "label": "x"}, {"text": "Ã¼bel", "label": "y"}])
    assert [(finding.kind, finding.rows) for finding in loaded.findings] == [("broken_characters", [1, 2])]
    lone = write(tmp_path / "r.jsonl", '{"text": "half \\ud83d pair", "label": "x"}')
    assert load_records(lone).dataset["text"] == ["half \ufffd pair"]


def test_utf_16_without_a_mark_is_read(tmp_path):
    source = write(tmp_path / "r.csv", "text,label\nHusten,x\n".encode("utf-16-le"))
    assert load_records(source).dataset["text"] == ["Husten"]


def test_mixed_types_are_counted_and_kept_as_text():
    rows = [{"text": "a", "label": "x", "value": value} for value in (1, "two", 3, 10**30)]
    loaded = load_records(rows)
    assert [(finding.kind, finding.count) for finding in loaded.findings] == [("mixed_types", 2)]
    assert [row["value"] for row in loaded.dataset["metadata"]] == ["1", "two", "3", str(10**30)]


def test_a_field_without_end_is_an_error_before_memory_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(tables_module, "LONGEST_FIELD", 1_000)
    with pytest.raises(UserError, match="a quote opened in line 2 is never closed"):
        load_records(write(tmp_path / "r.csv", 'text,label\n"' + "word\n" * 1_000 + '",x\n'))
    with pytest.raises(UserError, match="line 1 is longer than 1,000 characters"):
        load_records(write(tmp_path / "r.jsonl", json.dumps({"text": "word " * 1_000})))


def test_a_huge_json_document_is_refused_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(tables_module, "JSON_DOCUMENT_BYTES", 1 << 20)
    rows = [{"text": "word " * 1_000, "label": "x"}] * 300
    with pytest.raises(UserError, match=r"r\.json: a JSON document of more than 1 MB .* jq -c"):
        load_records(write(tmp_path / "r.json", json.dumps(rows)))
    lines = "\n".join(map(json.dumps, rows))
    assert load_records(write(tmp_path / "lines.json", lines)).rows == 300


@pytest.mark.parametrize("form", ["csv", "jsonl", "jsonl.gz", "parquet"])
def test_a_table_that_outgrows_memory_continues_on_disk_and_is_divided_there(tmp_path, monkeypatch, form):
    monkeypatch.setattr(tables_module, "SPILL_BYTES", 100_000)
    monkeypatch.setattr(records_module, "BATCH_CHARACTERS", 20_000)
    monkeypatch.setenv("DATA_CACHE_DIR", str(tmp_path / "cache"))
    rows = [
        {
            "id": f"r{n}",
            "text": f"note {n} " + "word " * 200,
            "label": "ab"[n % 2],
            "patient_id": f"p{n // 2}",
        }
        for n in range(1_000)
    ]
    path = tmp_path / f"r.{form}"
    if form == "csv":
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
    elif form == "parquet":
        import pandas as pd

        pd.DataFrame(rows).to_parquet(path)
    else:
        lines = "\n".join(map(json.dumps, rows)).encode()
        path.write_bytes(gzip.compress(lines) if form.endswith("gz") else lines)
    sizes, made = [], []
    scratch_file = tables_module.scratch_file
    monkeypatch.setattr(tables_module, "scratch_file", lambda: made.append(scratch_file()) or made[-1])
    batches = records_module.record_batches

    def watched(records):
        for batch in batches(records):
            sizes.append(len(batch))
            yield batch

    monkeypatch.setattr(records_module, "record_batches", watched)
    prepared = prepare_data(DataConfig(dataset_path=str(path), near_copies=None), seed=42)
    assert sum(sizes) == 1_000 and max(sizes) <= 21
    assert prepared.report["counts"] == {"train": 800, "validation": 100, "test": 100}
    assert len(made) == 1 and list((tmp_path / "cache").iterdir()) == [], "on disk, but without a name"
    assert {row["id"] for part in prepared.splits.values() for row in part} == {row["id"] for row in rows}


# Traps

WORDS = [f"w{number}" for number in range(500)]


def sentence(seed: int, length: int = 60) -> list[str]:
    return [WORDS[(seed * 7919 + place * (seed % 13 + 3)) % 500] for place in range(length)]


def test_near_copies_stay_in_one_split_and_are_counted(tmp_path):
    rows = []
    for number in range(60):
        words = sentence(number)
        rows += [{"text": " ".join([*words, end]), "label": "ab"[number % 2]} for end in ("monday", "friday")]
    source = write(tmp_path / "r.json", json.dumps(rows))
    prepared = prepare_data(DataConfig(dataset_path=source, group_by=[]), seed=42)
    assert findings(prepared.report)["near_copies"] == 120
    where = {row["text"]: name for name, part in prepared.splits.items() for row in part}
    assert all(where[text] == where[text.replace("monday", "friday")] for text in where)
    off = prepare_data(DataConfig(dataset_path=source, group_by=[], near_copies=None), seed=42)
    assert "near_copies" not in findings(off.report)


def test_near_copies_in_two_given_files_are_counted_with_their_rows(tmp_path):
    rows = [{"text": " ".join([*sentence(n), "monday"]), "label": "ab"[n % 2]} for n in range(40)]
    later = [{"text": " ".join([*sentence(7), "friday"]), "label": "b"}]
    data = DataConfig(
        train_file=write(tmp_path / "a.json", json.dumps(rows)),
        test_file=write(tmp_path / "b.json", json.dumps(later)),
        group_by=[],
    )
    report = prepare_data(data, seed=42).report
    (found,) = [item for item in report["findings"] if item["kind"] == "near_copies_across_files"]
    assert (found["count"], found["rows"]) == (1, [8]) and report["counts"]["test"] == 1


def test_near_copies_are_the_same_with_any_size_of_block_and_memory(monkeypatch):
    texts = [" ".join([*sentence(n % 40), f"day {n}"]) for n in range(120)]
    pairs = near_copies(texts).tolist()
    monkeypatch.setattr(traps_module, "TEXTS_PER_BLOCK", 7)
    monkeypatch.setattr(traps_module, "SHINGLES_KEPT", 100)
    monkeypatch.setattr(traps_module, "DIFFERENT_KEPT", 2)
    assert near_copies(texts).tolist() == pairs and len(pairs) == 80


def test_every_pair_of_near_copies_is_verified_exactly():
    one = " ".join(sentence(1))
    assert near_copies([one, one + " x", " ".join(sentence(2))]).tolist() == [[0, 1]]
    assert len(near_copies([])) == len(near_copies([one])) == 0


def test_labels_with_one_record_unknown_labels_and_spellings_are_counted(tmp_path):
    rows = [{"text": f"t{n}", "label": ["Flu", "flu", "Gout"][n % 3]} for n in range(60)]
    rows.append({"text": "odd", "label": "rare"})
    found = findings(prepare(tmp_path, rows))
    assert found["label_spellings"] == 20 and found["single_record_labels"] == 1
    train = write(tmp_path / "train.json", json.dumps(rows[:60]))
    test = write(tmp_path / "test.json", json.dumps([{"text": "new", "label": "measles"}] * 1))
    report = prepare_data(DataConfig(train_file=train, test_file=test, group_by=[]), seed=42).report
    assert findings(report)["unknown_labels"] == 1
    assert label_findings({"train": Counter("aa"), "test": Counter("aa")}) == []


def test_a_label_written_into_the_text_is_counted(tmp_path):
    rows = [
        {"text": f"Diagnosis: {label}. Seen on day {n}.", "label": label}
        for n, label in enumerate(["gout", "asthma"] * 30)
    ]
    found = findings(prepare(tmp_path, rows))
    assert found["label_in_text"] == found["telling_words"] == 60


def test_ids_that_spell_the_label_are_a_leak(tmp_path):
    rows = [
        {"id": f"{'pos' if n % 2 else 'neg'}{n}", "text": f"t{n}", "label": "ab"[n % 2]} for n in range(60)
    ]
    assert findings(prepare(tmp_path, rows)) == {"label_leak": 60}


def test_every_row_is_somewhere(tmp_path):
    rows = [{"text": f"t{n}" if n % 9 else "", "label": "ab"[n % 2]} for n in range(90)]
    rows += [{"text": "odd", "label": "rare"}]
    report = prepare(tmp_path, rows, min_label_count=2, max_skipped_fraction=0.5)
    assert sum(report["counts"].values()) + report["skipped"] + sum(report["left_out"].values()) == 91


# The real files

INSTRUCTION = {"instruction": "harmful_medical_request", "response": "safe_response"}


@needs_real_data
@pytest.mark.parametrize(
    ("settings", "rows", "counts", "found"),
    [
        (
            {"train_file": "mts_dialog/MTS-Dialog-TrainingSet.csv",
             "validation_file": "mts_dialog/MTS-Dialog-ValidationSet.csv",
             "columns": {"text": "dialogue", "label": "section_header"}},
            1301, {"train": 1079, "validation": 100, "test": 120},
            {"copies_across_files": 2, "repeated_texts": 2, "ids_in_two_splits": 99},
        ),
        (
            {"dataset_path": "medquad/medquad_answered.jsonl.gz", "task": "classification",
             "columns": {"text": "question", "label": "question_type"}, "group_by": ["metadata.focus"]},
            16407, {"train": 13126, "validation": 1641, "test": 1640},
            {"repeated_ids": 4274, "repeated_texts": 2062, "single_record_labels": 1},
        ),
        (
            {"dataset_path": "pubmedqa/pubmedqa_train500.json",
             "columns": {"text": "CONTEXTS", "label": "final_decision"}},
            500, {"train": 399, "validation": 50, "test": 51}, {},
        ),
        (
            {"train_file": "aci_bench/train.csv", "validation_file": "aci_bench/valid.csv",
             "columns": {"input": "dialogue", "response": "note"}, "constants": {"instruction": "Write it."}},
            87, {"train": 60, "validation": 20, "test": 7}, {},
        ),
    ],
)  # fmt: skip
def test_real_files_are_read_whole_and_their_traps_are_counted(settings, rows, counts, found):
    paths = {name: str(REAL_DATA / settings[name]) for name in settings if name.endswith(("_file", "_path"))}
    report = prepare_data(DataConfig(**({"group_by": []} | settings | paths)), seed=42).report
    assert (report["rows"], report["skipped"], report["counts"]) == (rows, 0, counts)
    assert {kind: count for kind, count in findings(report).items() if kind != "mixed_types"} == found


@needs_real_data
@pytest.mark.parametrize("category", range(1, 10))
def test_every_safety_file_has_fifty_requests(category):
    path = REAL_DATA / "med_safety_bench" / f"med_safety_demonstrations_category_{category}.csv"
    loaded = load_records(path, columns=INSTRUCTION)
    assert (len(loaded.dataset), loaded.problems, loaded.findings) == (50, [], [])


@needs_real_data
@pytest.mark.parametrize(("name", "rows", "missing"), [("train", 67, [47, 60]), ("valid", 20, [21])])
def test_visit_metadata_lists_rows_without_gender(name, rows, missing):
    columns = {"text": "cc", "label": "patient_gender"}
    loaded = load_records(REAL_DATA / "aci_bench" / f"{name}_metadata.csv", columns=columns)
    assert loaded.rows == rows and [problem["row"] for problem in loaded.problems] == missing


@needs_real_data
def test_consultation_notes_are_one_object_a_file():
    notes = [json.loads(path.read_text()) for path in sorted((REAL_DATA / "primock57").glob("*.json"))]
    loaded = load_records(notes, columns={"text": "note"})
    assert (len(loaded.dataset), loaded.problems, loaded.findings) == (57, [], [])
    with pytest.raises(UserError, match="expected a list of objects"):
        load_records(next((REAL_DATA / "primock57").glob("*.json")))


@needs_real_data
def test_medquad_example_keeps_documents_and_diseases_together(monkeypatch):
    monkeypatch.setenv("MEDAI_DATA", str(REAL_DATA))
    config = RunConfig.load("medquad")
    prepared = prepare_data(config.data, config.seed)
    assert prepared.report["rows"] == 16407 and findings(prepared.report)["near_copies"] == 33
    assert sum(prepared.report["counts"].values()) <= config.data.max_records
    for name in ("file", "focus"):
        places = [{row[name] for row in part["metadata"]} for part in prepared.splits.values()]
        assert max(Counter(value for part in places for value in part).values()) == 1
