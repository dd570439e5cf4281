"""`medai deid`: files and folders lose their identities, keep their form, and appear complete or not at all."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

import medai_nb.phi.files as files
from medai_nb.cli import main
from medai_nb.config import UserError
from medai_nb.phi.audit import verify_audit
from medai_nb.phi.files import (
    deidentify,
    deidentify_stream,
    explanation,
    protected_name,
    text_output,
    text_pieces,
)
from medai_nb.phi.protect import in_order
from medai_nb.phi.redact import METHODS, PHIRedactor

KEY = b"a key for tests, nothing else"
NOTE = "PATIENT: Martha Collins, MRN: 4482913.\r\nSeen 3/14/2021 by Dr. Kumar; call 614-555-8142.\r\nCrohn's disease.\r\n"
RAW = ("Martha", "Collins", "4482913", "3/14", "Kumar", "614-555", "8142")
ROWS = [
    {"mrn": 4482913, "name": "Martha Collins", "dob": "1950-02-03", "zip": "45402", "age": 93, "note": NOTE},
    {"mrn": 5519204, "name": "R. Okafor", "dob": "1961-12-30", "zip": "77201", "age": 41, "note": "okafor coughs, no fever"},
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch):
    for name in ("PHI_HASH_KEY", "PHI_HASH_KEY_FILE", "PHI_AUDIT_LOGGING", "PHI_PROTECTION_LEVEL"):
        monkeypatch.delenv(name, raising=False)


def redactor(method: str = "replacement", **settings) -> PHIRedactor:
    return PHIRedactor(method, key=KEY, **settings)


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode())
    return path


def json_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def csv_text(rows: list[dict], **style) -> str:
    output = io.StringIO()
    writer = csv.DictWriter(output, list(rows[0]), **style)
    writer.writeheader()
    writer.writerows(rows)
    return output.getvalue()


def raw_in(text: str, more: tuple[str, ...] = ()) -> list[str]:
    return [
        value for value in (*RAW, "Okafor", "okafor", "5519204", "1950-02", "45402", *more) if value in text
    ]


# ---------------------------------------------------------------- forms


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("name", "content"),
    [("note.txt", NOTE), ("rows.jsonl", json_lines(ROWS)), ("rows.csv", csv_text(ROWS)), ("rows.tsv", csv_text(ROWS, delimiter="\t"))],
    ids=["text", "jsonl", "csv", "tsv"],
)  # fmt: skip
def test_no_identifier_stays_in_any_form_and_a_second_time_changes_nothing(tmp_path, method, name, content):
    done = deidentify(write(tmp_path / name, content), tmp_path / "out" / name, redactor(method))
    once = (tmp_path / "out" / name).read_bytes()
    assert raw_in(once.decode()) == [] and not done.suspicious and done.labels["NAME"] >= 2
    deidentify(tmp_path / "out" / name, tmp_path / "again" / name, redactor(method))
    assert (tmp_path / "again" / name).read_bytes() == once


def test_a_text_keeps_every_other_byte_line_ends_included(tmp_path):
    deidentify(write(tmp_path / "note.txt", NOTE), tmp_path / "out.txt", redactor())
    assert (tmp_path / "out.txt").read_bytes().decode() == (
        "PATIENT: [NAME], MRN: [MRN].\r\nSeen [DATE 2021] by Dr. [NAME]; call [PHONE].\r\nCrohn's disease.\r\n"
    )


def test_a_table_keeps_its_columns_and_rows_stay_linkable(tmp_path):
    rows = [*ROWS, {**ROWS[0], "note": 'said "no",\nthen; left'}]
    deidentify(write(tmp_path / "rows.csv", csv_text(rows, delimiter=";")), tmp_path / "out.csv", redactor())
    with (tmp_path / "out.csv").open(newline="") as file:
        found = list(csv.DictReader(file, delimiter=";"))
    assert list(found[0]) == list(ROWS[0]) and len(found) == 3
    assert found[0]["mrn"] == found[2]["mrn"] != found[1]["mrn"] and found[0]["mrn"].startswith("person-")
    assert found[0]["dob"] == "[DATE 1950]" and found[0]["zip"] == "[LOCATION 454]"
    assert (found[0]["age"], found[1]["age"]) == ("90", "41")
    assert found[2]["note"] == rows[2]["note"] and found[1]["note"] == "[NAME] coughs, no fever"


def test_columns_are_known_by_content_when_their_name_says_nothing(tmp_path):
    people = ["Martha Collins", "Robert Okafor", "Ann Lee", "Ruth Mayer", "Hugo Perez"]
    rows = [
        {"c1": people[place % 5], "c2": f"K{place * 7919 % 90000 + 10000}", "c3": "asthma", "c4": place}
        for place in range(25)
    ]
    deidentify(write(tmp_path / "rows.csv", csv_text(rows)), tmp_path / "out.csv", redactor())
    with (tmp_path / "out.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert {row["c1"] for row in found} == {"[NAME]"} and found[0]["c2"].startswith("person-")
    assert [(row["c3"], row["c4"]) for row in found] == [("asthma", str(place)) for place in range(25)]


def test_json_lines_keep_their_shape_however_deep(tmp_path):
    row = {
        "id": 7,
        "messages": [{"role": "user", "content": "I am Martha Collins"}],
        "extra": {"patient_name": "Martha Collins", "ok": True, "none": None, "scores": [1.5, 2]},
        "comment": "collins was late",
    }
    deidentify(write(tmp_path / "a.jsonl", json.dumps(row) + "\n\n"), tmp_path / "b.jsonl", redactor())
    lines = (tmp_path / "b.jsonl").read_text().split("\n")
    assert json.loads(lines[0]) == {
        "id": 7,
        "messages": [{"role": "user", "content": "I am [NAME]"}],
        "extra": {"patient_name": "[NAME]", "ok": True, "none": None, "scores": [1.5, 2]},
        "comment": "[NAME] was late",
    }
    assert lines[1:] == ["", ""]


def test_parquet_keeps_types_except_of_columns_that_identify(tmp_path):
    import datetime

    table = pa.table(
        {
            "mrn": [4482913, 5519204],
            "visit": [datetime.date(2021, 3, 14), None],
            "score": [1.5, 2.5],
            "note": ["Dr. Kumar", None],
            "tags": [["call 614-555-8142"], []],
        }
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    deidentify(tmp_path / "a.parquet", tmp_path / "b.parquet", redactor())
    found = parquet.read_table(tmp_path / "b.parquet")
    assert found.column("visit").to_pylist() == ["[DATE 2021]", None]
    assert found.column("note").to_pylist() == ["Dr. [NAME]", None]
    assert found.column("tags").to_pylist() == [["call [PHONE]"], []]
    assert found.schema.field("score").type == pa.float64() and found.column("mrn")[0].as_py().startswith(
        "person-"
    )


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
def test_the_encoding_stays(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("Dr. Kumar, café\n".encode(encoding))
    given = encoding if encoding == "latin-1" else None
    deidentify(tmp_path / "a.txt", tmp_path / "b.txt", redactor(), encoding=given)
    assert (tmp_path / "b.txt").read_bytes() == "Dr. [NAME], café\n".encode(encoding)


@pytest.mark.parametrize("name", ["empty.txt", "empty.csv", "empty.jsonl"])
def test_an_empty_file_stays_an_empty_file(tmp_path, name):
    deidentify(write(tmp_path / name, ""), tmp_path / f"out_{name}", redactor())
    assert (tmp_path / f"out_{name}").read_bytes() == b""


# ---------------------------------------------------------------- folders


def folder_of_notes(tmp_path: Path) -> Path:
    write(tmp_path / "notes/letters/visit.txt", NOTE)
    write(tmp_path / "notes/collins_martha.txt", "Mrs. Collins is well.\n")
    write(tmp_path / "notes/rows.jsonl", json_lines(ROWS))
    (tmp_path / "notes/scan.pdf").write_bytes(b"%PDF\0\1")
    return tmp_path / "notes"


def test_a_folder_keeps_its_tree_and_says_what_was_left_out(tmp_path):
    done = deidentify(
        folder_of_notes(tmp_path), tmp_path / "out", redactor(), report=tmp_path / "report.html"
    )
    written = {
        str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()
    }
    assert {"letters/visit.txt", "rows.jsonl"} <= written and len(written) == 3
    assert done.left_out == [("scan.pdf", "not text but binary data: convert it to text first")]
    assert raw_in(" ".join(written), ("collins",)) == [], "names of files identify as well"
    everything = "".join(path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file())
    page = (tmp_path / "report.html").read_text()
    assert raw_in(everything + page, ("collins",)) == []
    assert done.documents == 4 and "[NAME]" in page and "Left out: 1" in page and "http" not in page


def test_names_of_files_without_identifiers_stay():
    assert protected_name(Path("2021/visit 12.txt"), redactor()) == Path("2021/visit 12.txt")
    assert "614" not in str(protected_name(Path("614-555-8142/a.txt"), redactor()))


def test_two_processes_write_the_same_bytes_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PIECE", 10_000)
    rows = [
        {"id": place, "note": f"Dr. Kumar saw case {place} again. " + "No fever. " * 50}
        for place in range(200)
    ]
    source = write(tmp_path / "rows.jsonl", json_lines(rows))
    one = deidentify(source, tmp_path / "one.jsonl", redactor(), jobs=1)
    two = deidentify(source, tmp_path / "two.jsonl", redactor(), jobs=2, audit=tmp_path / "audit.jsonl")
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    assert (two.workers, two.labels, two.documents) == (2, one.labels, 200)
    assert verify_audit(tmp_path / "audit.jsonl")["lines"] == 202


# ---------------------------------------------------------------- size


def test_memory_stays_bounded_however_large_the_file(tmp_path, monkeypatch):
    """6 MB in each form through one process; what detection itself costs is not what is measured here."""
    monkeypatch.setattr("medai_nb.phi.redact.detect", lambda text, **settings: [])
    monkeypatch.setattr(files.PHIValidator, "find", lambda self, text: [])
    line = "No fever, no cough, no pain. " * 30
    sources = [tmp_path / name for name in ("a.txt", "a.csv", "a.jsonl")]
    for source, pattern in zip(sources, ("{0}\n", '"{0}",x\n', '{{"text": "{0}"}}\n')):
        with source.open("w") as file:
            file.write("text,more\n" if source.suffix == ".csv" else "")
            for _ in range(7_000):
                file.write(pattern.format(line))
    for source in sources:
        tracemalloc.start()
        try:
            deidentify(source, source.with_name(f"out{source.suffix}"), redactor(), jobs=1)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            # Left on, it would stop the next process that is forked while a thread allocates.
            tracemalloc.stop()
        size = source.stat().st_size
        assert size > 6e6 and peak < 5e6, (
            f"{source.suffix}: {peak / 1e6:.1f} MB at once for {size / 1e6:.0f} MB"
        )
        assert source.with_name(f"out{source.suffix}").stat().st_size >= 0.99 * size


def test_pieces_of_a_text_end_where_a_line_or_a_word_ends():
    text = "".join(f"line {number} of a note\r\n" + "\r\n" * (number % 7 == 0) for number in range(200))
    pieces = list(text_pieces(io.StringIO(text, newline=""), size=300))
    assert "".join(pieces) == text and all(
        piece.endswith("\n") and len(piece) <= 300 for piece in pieces[:-1]
    )
    words = list(text_pieces(io.StringIO("word " * 100), size=33))
    assert "".join(words) == "word " * 100 and all(piece.endswith(" ") for piece in words)
    with pytest.raises(UserError, match="not text"):
        list(text_pieces(io.StringIO("x" * 100), size=33))


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"note": "Dr. Kumar"}\n{"note": "Dr. Okafor\n', "line 2, column .*: not valid JSON"),
        ("a.jsonl", '{"a": 1}\n["Okafor"]\n', "line 2: not an object but a list"),
        ("a.csv", "a,b\n1,2\nOkafor\n", "line 3: 1 fields under a header of 2"),
        ("a.csv", 'a,b\n1,"Okafor\n', "line 2: a quote is never closed"),
        ("a.csv", "a,a\n1,2\n", "more than once"),
        ("a.csv", "614-555-8142,Okafor\n1,2\n", "first row looks like data"),
        ("a.txt", "caf\xe9 Okafor", "--encoding latin-1"),
        ("a.bin", "Okafor\0", "binary"),
        ("a.json", "{}", "write one object a line"),
        ("a.parquet", "Okafor", "not a readable Parquet file"),
    ],
)  # fmt: skip
def test_broken_input_stops_with_file_and_line_and_writes_nothing(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=message) as caught:
        deidentify(tmp_path / name, tmp_path / f"out{Path(name).suffix}", redactor())
    assert name in str(caught.value) and "Okafor" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_input_is_never_overwritten(tmp_path):
    source = write(tmp_path / "notes/a.txt", NOTE)
    os.link(source, tmp_path / "same.txt")
    for output in (source, tmp_path / "notes/../notes/a.txt", tmp_path / "same.txt"):
        with pytest.raises(UserError, match="is the input"):
            deidentify(source, output, redactor())
    for output in (tmp_path / "notes/out", tmp_path):
        with pytest.raises(UserError, match="lie in one another"):
            deidentify(source.parent, output, redactor())
    write(tmp_path / "full/x.txt", "x")
    with pytest.raises(UserError, match="not an empty folder"):
        deidentify(source.parent, tmp_path / "full", redactor())
    with pytest.raises(UserError, match="report"):
        deidentify(source, tmp_path / "out.txt", redactor(), report=source)
    assert source.read_bytes() == NOTE.encode()


@pytest.mark.parametrize(
    "fault", [KeyboardInterrupt(), OSError(28, "No space left on device"), ValueError("bug")]
)
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_fault_leaves_the_destination_as_it_was(tmp_path, monkeypatch, fault, kind):
    source = folder_of_notes(tmp_path)
    source, output = (
        (source, tmp_path / "out") if kind == "folder" else (source / "rows.jsonl", tmp_path / "out.jsonl")
    )
    if kind == "file":
        write(output, "what was there before")
    before = sorted(path.name for path in tmp_path.iterdir())

    def broken(self, result):
        raise fault

    monkeypatch.setattr(files._Writer, "write", broken)
    with pytest.raises((type(fault), UserError)) as caught:
        deidentify(source, output, redactor())
    if isinstance(fault, OSError):
        assert "No space left" in str(caught.value) and "nothing was written" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert kind == "folder" or output.read_text() == "what was there before"


def test_strict_writes_nothing_when_the_second_look_suspects_anything(tmp_path, monkeypatch):
    monkeypatch.setattr("medai_nb.phi.redact.detect", lambda text, **settings: [])
    with pytest.raises(UserError, match="title and name") as caught:
        deidentify(write(tmp_path / "a.txt", NOTE), tmp_path / "b.txt", redactor(), strict=True)
    assert raw_in(str(caught.value)) == [] and not (tmp_path / "b.txt").exists()
    done = deidentify(tmp_path / "a.txt", tmp_path / "b.txt", redactor(), report=tmp_path / "r.html")
    assert done.suspicious["title and name"] == 1 and ("b.txt", 2, "text", "title and name") in done.places


def test_the_audit_log_of_files_holds_places_and_codes_but_no_value(tmp_path):
    deidentify(write(tmp_path / "a.jsonl", json_lines(ROWS)), tmp_path / "b.jsonl", redactor(), audit=tmp_path / "audit.jsonl")  # fmt: skip
    written = (tmp_path / "audit.jsonl").read_text()
    lines = [json.loads(line) for line in written.splitlines()]
    assert verify_audit(tmp_path / "audit.jsonl")["valid"] and raw_in(written, ("Dr.",)) == []
    assert [line["event"] for line in lines] == ["started", "redacted", "redacted", "finished"]
    span = dict(zip(lines[0]["span"], next(span for span in lines[1]["spans"] if span[0] == "note")))
    assert (
        span["label"] == "NAME"
        and len(span["code"]) == 16
        and NOTE[span["start"] : span["end"]] == "Martha Collins"
    )


# ---------------------------------------------------------------- the command


def test_the_command_writes_reports_and_counts(tmp_path, capsys):
    folder = folder_of_notes(tmp_path)
    assert main(["deid", str(folder), "-o", str(tmp_path / "out"), "--report", str(tmp_path / "r.html")]) == 1
    captured = capsys.readouterr()
    assert "4 documents" in captured.err and "left out: scan.pdf" in captured.err
    assert f"report: {tmp_path / 'r.html'}" in captured.err and (tmp_path / "r.html").is_file()
    (folder / "scan.pdf").unlink()
    assert main(["deid", str(folder), "-o", str(tmp_path / "out2"), "--number_persons"]) == 0
    assert "Dr. [NAME 002]" in (tmp_path / "out2/letters/visit.txt").read_text()


def test_a_report_without_a_name_stands_beside_the_output(tmp_path, capsys):
    (tmp_path / "note.txt").write_text("Seen by Dr. Okonkwo.")
    assert main(["deid", str(tmp_path / "note.txt"), "-o", str(tmp_path / "out.txt"), "--report"]) == 0
    assert "Dr. [NAME]" in (tmp_path / "out.txt.report.html").read_text()
    assert f"report: {tmp_path}/out.txt.report.html" in capsys.readouterr().err
    assert main(["deid", str(tmp_path / "note.txt"), "--report"]) == 2


def test_standard_input_goes_to_standard_output(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(NOTE, newline=""))
    assert main(["deid", "-"]) == 0
    assert capsys.readouterr().out.startswith("PATIENT: [NAME], MRN: [MRN].\r\n")
    output = io.StringIO()
    assert (
        deidentify_stream(io.StringIO(NOTE), output, redactor()).documents == 1
        and raw_in(output.getvalue()) == []
    )


def test_an_explanation_shows_each_span_and_why(capsys):
    assert main(["deid", "--explain", "Seen by Dr. Kumar on 3/14/2021."]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["where", "label", "score", "detector", "reason", "text"]
    assert lines[1].startswith("12-17") and lines[1].endswith("Kumar") and "NAME" in lines[1]
    assert explanation("No fever.") == "no identifier found"


def test_the_audit_command_finds_tampering(tmp_path, capsys):
    log = tmp_path / "audit.jsonl"
    deidentify(write(tmp_path / "a.jsonl", json_lines(ROWS)), tmp_path / "b.jsonl", redactor(), audit=log)
    assert main(["audit", "verify", str(log)]) == 0 and "4 lines, unchanged" in capsys.readouterr().out
    assert main(["audit", "show", str(log)]) == 0 and "NAME" in capsys.readouterr().out
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join([lines[0], lines[2], lines[1], lines[3]]))
    assert main(["audit", "verify", str(log)]) == 1 and "line 2" in capsys.readouterr().out
    assert main(["audit", "verify", str(tmp_path / "none.jsonl")]) == 2


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_command_leaves_nothing_behind(tmp_path, number, status):
    source = write(tmp_path / "a.txt", "No fever, no cough, lungs are clear.\n\n" * 120_000)
    command = ["deid", "a.txt", "-o", "b.txt", "--jobs", "2"]
    program = "import sys; from medai_nb.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *command],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(
            number, signal.SIG_DFL
        ),  # a background shell lets its children ignore Ctrl-C
    )
    for _ in range(600):
        if len(list(tmp_path.iterdir())) > 1 or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status and b"Traceback" not in errors
    assert list(tmp_path.iterdir()) == [source]


def end_yourself(task: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return task


def test_a_worker_that_is_killed_is_one_clear_error():
    with pytest.raises(UserError, match="fewer processes"):
        list(in_order(end_yourself, range(9), workers=2))
    assert list(in_order(abs, range(-9, 0), workers=2)) == list(range(9, 0, -1))


def test_what_a_killed_process_leaves_is_its_owners_alone_and_goes_with_the_next_start(tmp_path):
    source, output = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_text("Cough.\n" * 10)
    script = (
        "import os, signal, sys\n"
        "import medai_nb.phi.files as files\n"
        "files._redact_all = lambda *more: os.kill(os.getpid(), signal.SIGKILL)\n"
        "files.deidentify(sys.argv[1], sys.argv[2])"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(source), str(output)])
    (left,) = [path for path in tmp_path.iterdir() if path != source]
    assert ended.returncode == -signal.SIGKILL and left.stat().st_mode & 0o777 == 0o600
    with text_output(output) as stream:
        stream.write("done")
    assert sorted(tmp_path.iterdir()) == [source, output] and output.stat().st_mode & 0o044


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_failure_leaves_neither_output_nor_temporary_files(tmp_path, kind, monkeypatch):
    source, output = tmp_path / "in", tmp_path / "out"
    if kind == "folder":
        source.mkdir()
        (source / "a.jsonl").write_text('{"text": "Cough."}\n{broken\n')
    else:
        source = tmp_path / "in.jsonl"
        source.write_text('{"text": "Cough."}\n{broken\n')
    with pytest.raises(UserError, match=r"\.jsonl, line 2.*: not valid JSON; repair or remove this line"):
        deidentify(source, output)
    assert list(tmp_path.iterdir()) == [source]
