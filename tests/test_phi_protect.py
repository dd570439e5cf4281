"""Redaction, validation, audit, certificate and the protection stage: nothing raw gets out, and every tampering is found."""

import json
import multiprocessing
import pickle
import random
import re
import time
from datetime import date, datetime
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, load_from_disk

from medai_nb.config import PHIConfig, UserError
from medai_nb.phi.audit import AuditError, AuditLog, audit_summary, certified_end, verify_audit
from medai_nb.phi.detect import detect, field_label
from medai_nb.phi.protect import ProtectionFailed, protect_dataset, protection_level
from medai_nb.phi.redact import (
    METHODS,
    PHIRedactor,
    RedactionError,
    content_labels,
    kept_year,
    kept_zip3,
    shifted_date,
    surrogate_names,
)
from medai_nb.phi.score import score_detection
from medai_nb.phi.validate import (
    ComplianceChecker,
    PHIValidator,
    UnprotectedDataError,
    dataset_fingerprint,
    require_certificate,
    surviving_values,
    write_certificate,
)

KEY = b"a key for tests, nothing else"
PIECES = [
    "Martha Collins, 93 yo", "seen 3/14/2021 by Dr. Kumar", "MRN: 4482913", "SSN 123-45-6789", "call 614-555-8142", "lives at 12 Oak St,\nDayton, OH 45402",
    "m.collins@mail.com", "Crohn's disease", "pain 3/10", "on 50 mg", "PEREZ, ANDREW (077-380)", "May 3rd, 2021", "daughter Sarah", "plate 4KHY280", "20319987",
    "https://portal.example.com/x1", "10.1.2.3", "IMG_77.jpg", "age 101", "born in 1931", "St. Mary's Hospital", "\t", "é ü 漢字 🙂", "[unknown]", "policy no. w1183387-02",
]  # fmt: skip
RAW = [
    "Collins",
    "Kumar",
    "4482913",
    "123-45-6789",
    "614-555-8142",
    "Oak St",
    "Dayton",
    "m.collins",
    "PEREZ",
    "077-380",
    "20319987",
    "10.1.2.3",
    "IMG_77",
    "w1183387",
]


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch):
    for name in ("PHI_HASH_KEY", "PHI_HASH_KEY_FILE", "PHI_AUDIT_LOGGING", "PHI_PROTECTION_LEVEL"):
        monkeypatch.delenv(name, raising=False)


def texts(count: int, seed: int = 7) -> list[str]:
    source = random.Random(seed)
    return [source.choice([". ", "\n", "; ", ", "]).join(source.sample(PIECES, 6)) for _ in range(count)]


# ---------------------------------------------------------------- redaction


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("structure", [True, False])
def test_redacting_twice_changes_nothing(method, structure):
    redactor = PHIRedactor(method, structure, key=KEY)
    for text in texts(60):
        once = redactor.redact_phi(text)
        assert redactor.redact_phi(once) == once
        assert not redactor.contains_phi(once)


@pytest.mark.parametrize("method", METHODS)
def test_text_outside_the_spans_is_returned_to_the_byte(method):
    redactor = PHIRedactor(method, key=KEY)
    for text in texts(60, seed=8):
        redacted, spans = redactor.redact_text(text)
        outside, position = [], 0
        for span in spans:
            outside.append(text[position : span.start])
            position = max(position, span.end)
        outside.append(text[position:])
        place = 0
        for piece in outside:
            place = redacted.index(piece, place) + len(piece)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_raw_is_left_by_any_method(method):
    redactor = PHIRedactor(method, key=KEY)
    for text in texts(60, seed=9):
        redacted = redactor.redact_phi(text)
        assert [value for value in RAW if value in redacted] == []


def test_mask_keeps_length_lines_and_separators():
    text = "Dr. Kumar, 614-555-8142,\n12 Oak St,\nDayton, OH 45402"
    masked = PHIRedactor("mask").redact_phi(text)
    assert len(masked) == len(text) and "***-***-****" in masked
    assert [len(line) for line in masked.split("\n")] == [len(line) for line in text.split("\n")]


def test_replacement_keeps_line_breaks_inside_an_identifier():
    text = "Address: 12 Oak St,\nDayton, OH 45402\nCough."
    assert PHIRedactor().redact_phi(text).count("\n") == text.count("\n")


def test_safe_harbor_keeps_the_year_but_not_of_very_old_people():
    assert PHIRedactor().redact_phi("Seen 3/14/2021.") == "Seen [DATE 2021]."
    assert PHIRedactor().redact_phi("DOB: 3/14/1929") == "DOB: [DATE]"
    assert kept_year("from 1 May 2019 to 3 June 2020") == ""


def test_zip_codes_keep_three_digits_except_in_small_areas():
    assert (kept_zip3("45402-1234"), kept_zip3("03601"), kept_zip3("77201")) == ("454", "000", "000")
    assert kept_zip3("82101") == "000" and kept_zip3("20301") == "000"


def test_ages_over_89_become_one_category():
    assert PHIRedactor().redact_phi("A 94-year-old man") == "A [AGE 90+]-year-old man"


def test_hash_and_surrogates_are_equal_for_equal_values_and_depend_on_the_key():
    text = "Dr. Kumar and dr. kumar; Dr. Okafor"
    for method in ("hash", "surrogate"):
        one, two = (
            PHIRedactor(method, key=KEY).redact_phi(text),
            PHIRedactor(method, key=b"another key, for tests").redact_phi(text),
        )
        assert one == PHIRedactor(method, key=KEY).redact_phi(text) and one != two
    first, second, third = (piece for piece in PHIRedactor("hash", key=KEY).redact_phi(text).split("[")[1:])
    assert first[:17] == second[:17] != third[:17]


def test_without_a_key_a_warning_says_that_codes_cannot_be_reproduced():
    with pytest.warns(UserWarning, match="PHI_HASH_KEY"):
        PHIRedactor("hash")


def test_short_keys_unknown_methods_and_unreadable_key_files_are_refused(monkeypatch, tmp_path):
    with pytest.raises(RedactionError, match="16"):
        PHIRedactor(key="short")
    with pytest.raises(RedactionError, match="choose replacement"):
        PHIRedactor("remove")
    monkeypatch.setenv("PHI_HASH_KEY_FILE", str(tmp_path / "missing"))
    with pytest.raises(RedactionError, match="PHI_HASH_KEY_FILE"):
        PHIRedactor()


def test_a_record_loses_identifiers_in_every_field():
    record = {
        "id": "1",
        "patient_id": "MRN-4482913",
        "text": "mrs collins is well; collins's number is 4482913.",
        "messages": [
            {"role": "user", "content": "Pt Collins coughs"},
            {"role": "assistant", "content": "Dr. Kumar should see her."},
        ],
        "label": "R05",
        "metadata": {
            "patientName": "Martha Collins",
            "mrn": "4482913",
            "age": 93,
            "gender": "F",
            "note": "call 614-555-8142",
            "serial": 123456789,
        },
        "phi_spans": [],
    }
    redacted, findings = PHIRedactor(key=KEY).redact_record(record)
    assert not any(
        value in json.dumps(redacted).lower()
        for value in ("collins", "kumar", "4482913", "8142", "123456789")
    )
    assert (
        redacted["metadata"]["age"] == 90
        and redacted["metadata"]["gender"] == "F"
        and redacted["label"] == "R05"
    )
    assert set(redacted["metadata"]) == {"age", "gender", "note", "serial"} and "phi_spans" not in redacted
    assert "collins" not in json.dumps(findings).lower()


def test_patients_stay_together_under_their_pseudonym():
    redactor = PHIRedactor(key=KEY)
    assert redactor.pseudonym("MRN 1") == redactor.pseudonym("mrn  1") != redactor.pseudonym("MRN 2")
    assert redactor.pseudonym(redactor.pseudonym("MRN 1")) == redactor.pseudonym("MRN 1")


def test_identifying_fields_are_known_by_name_in_any_spelling():
    assert (
        field_label("Date of Birth") == "DATE"
        and field_label("patientName") == "NAME"
        and field_label("ZIP-Code") == "LOCATION"
    )
    assert field_label("gender") is None and field_label("category") is None


def test_the_redactor_pickles_with_its_key_for_dataset_map():
    redactor = PHIRedactor("hash", key=KEY)
    assert pickle.loads(pickle.dumps(redactor)).redact_phi("Dr. Kumar") == redactor.redact_phi("Dr. Kumar")
    mapped = Dataset.from_dict({"text": ["Dr. Kumar"]}).map(
        lambda row: {"text": redactor.redact_phi(row["text"])}, load_from_cache_file=False
    )
    assert mapped["text"][0] == redactor.redact_phi("Dr. Kumar")


@pytest.mark.parametrize("method", METHODS)
def test_spans_reported_are_exactly_what_changed(method):
    """Sorted, disjoint, and with white space at no end; the pieces between them stand in the result in order."""
    redactor = PHIRedactor(method, key=KEY)
    for text in texts(40, seed=11):
        text = text.replace("\n", "\r\n")
        redacted, spans = redactor.redact_text(text)
        assert all(one.end <= two.start for one, two in zip(spans, spans[1:]))
        assert all(text[span.start : span.end] == text[span.start : span.end].strip() for span in spans)
        assert redacted.count("\r\n") == text.count("\r\n")


def test_numbered_persons_keep_their_number_within_a_document():
    redactor = PHIRedactor(number_persons=True)
    text = "Martha Collins and her son Robert Collins. Mrs. Martha Collins coughs. Dr. Kumar saw Robert."
    redacted = redactor.redact_phi(text)
    assert redacted == (
        "[NAME 001] and her son [NAME 002]. Mrs. [NAME 001] coughs. Dr. [NAME 003] saw [NAME 002]."
    )
    assert redactor.redact_phi(redacted) == redacted and not PHIValidator().contains_phi(redacted)
    assert "[NAME 004]" in redactor.redact_phi(redacted + " Dr. Okafor agreed."), "counting goes on"
    record = {
        "text": "Martha Collins coughs.",
        "messages": [{"role": "user", "content": "Dr. Kumar, is Martha Collins well?"}],
    }
    row, _ = redactor.redact_record(record)
    assert (
        row["text"].startswith("[NAME 001]")
        and row["messages"][0]["content"] == "Dr. [NAME 002], is [NAME 001] well?"
    )


def test_surrogates_keep_gender_case_and_format_in_every_document():
    redactor = PHIRedactor("surrogate", key=KEY)
    names = surrogate_names()
    for given, gender in (
        ("Martha", "female"),
        ("Jennifer", "female"),
        ("Robert", "male"),
        ("Andrew", "male"),
    ):
        one = redactor.redact_phi(f"Patient: {given} Collins").split()[1]
        two = redactor.redact_phi(f"PATIENT: COLLINS, {given.upper()}").split()[2]
        assert one in names[gender] and two == one.upper()
    surname = redactor.redact_phi("Mrs. Collins is well").split()[1]
    assert redactor.redact_phi("Mr. Collins is not").split()[1] == surname
    assert redactor.substitute("NAME", "J. Collins-O'Neil").startswith("X. ")
    for phone in ("614-555-8142", "(614) 555 8142", "+1.614.555.8142", "555-8142", "6145558142"):
        new = redactor.substitute("PHONE", phone)
        assert [char for char in new if not char.isdigit()] == [char for char in phone if not char.isdigit()]
        assert re.search(r"55501\d\d$", re.sub(r"\D", "", new))
        assert redactor.substitute("PHONE", new) == new


@pytest.mark.parametrize(
    ("value", "days", "moved"),
    [
        ("3/14/2021", 20, "4/3/2021"),
        ("03/14/21", -14, "02/28/21"),
        ("14.03.2021", 1, "15.03.2021"),
        ("2021-03-14T08:15", 20, "2021-04-03T08:15"),
        ("Tuesday, March 2nd, 2021", 1, "Wednesday, March 3rd, 2021"),
        ("14 Sept 2021", 20, "4 Oct 2021"),
        ("DEC 31, 2021", 1, "JAN 1, 2022"),
        ("the 3rd of May", 30, "the 2nd of June"),
        ("12/31", 1, "01/01"),
        ("March 2021", 20, "April 2021"),
        ("3/14-3/20/2021", 1, None),
        ("Christmas", 1, None),
        ("3/14/1929", 1, None),
        ("2/30/2021", 1, None),
    ],
)
def test_a_date_moves_in_its_own_format(value, days, moved):
    assert (shifted_date(value, days) or [None])[0] == moved


@pytest.mark.parametrize("method", ["replacement", "hash", "surrogate"])
def test_shifted_dates_keep_intervals_within_a_patient_and_only_there(method):
    redactor = PHIRedactor(method, key=KEY, date_shift=300)
    other = "Seen 3/14/2021 and again 3/21/2021."

    def dates(patient: str) -> list[date]:
        redacted, _ = redactor.redact_text(other, patient=patient)
        found = re.findall(r"\d{4}-\d\d-\d\d|\d+/\d+/\d{4}", redacted)
        return [
            date.fromisoformat(item) if "-" in item else datetime.strptime(item, "%m/%d/%Y").date()
            for item in found
        ]

    one, two = dates("MRN-1"), dates("MRN-2")
    assert [(pair[1] - pair[0]).days for pair in (one, two)] == [7, 7] and one != two
    assert (
        one == dates("mrn-1") and abs((one[0] - date(2021, 3, 14)).days) <= 300 and not redactor.safe_harbor
    )
    if method != "surrogate":
        once = redactor.redact_phi(other)
        assert redactor.redact_phi(once) == once


@pytest.mark.parametrize(
    "settings", [{"redaction_method": "mask", "date_shift": 9}, {"redaction_method": "hash", "number_persons": True}, {"date_shift": -1}],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(settings):
    with pytest.raises(RedactionError):
        PHIRedactor(key=KEY, **settings)


def test_table_columns_inside_an_identifier_survive():
    assert PHIRedactor().substitute("NAME", "Collins\tMartha") == "[NAME]\t[NAME]"
    assert PHIRedactor().substitute("NAME", "Collins | Martha") == "[NAME] | [NAME]"
    assert PHIRedactor(preserve_structure=False).substitute("NAME", "Collins\tMartha") == "[NAME]"


def test_what_the_last_field_gives_away_is_removed_from_the_first():
    record = {
        "text": "okonkwo feels well",
        "messages": None,
        "metadata": {"first": "ref 77812-QX", "comment": "Dr. Okonkwo. Accession number: 77812-QX"},
    }
    done = PHIRedactor(key=KEY).process_record(record)
    assert "konkwo" not in json.dumps(done.row) and "77812" not in json.dumps(done.row)
    assert "konkwo" not in repr(done), "values are never shown"
    assert surviving_values(done.values, done.row) == [] and surviving_values(done.values, record)


def test_a_number_found_with_its_label_is_removed_where_it_stands_alone():
    """The model may take the last word of the label into its span ("plate 100AA")."""
    text = "Lungs are clear to auscultation bilaterally.. license plate 100AA. "
    done = PHIRedactor(key=KEY).process_row({"note": text, "other": "see 100AA"})
    assert "100AA" not in json.dumps(done.row)


def test_identifying_columns_are_found_by_content():
    rows = [{"who": name, "k": 10_000_000 + 7919 * place, "drug": "Lisinopril", "grade": place % 4} for place, name in enumerate(["Ann Lee", "Hugo Perez", "Ruth Mayer"] * 8)]  # fmt: skip
    assert content_labels(rows) == {"who": "NAME", "k": "OTHER_ID"}
    assert content_labels([{"note": "Ann Lee " * 20}] * 5) == {}


def test_metadata_is_reduced_to_what_safe_harbor_lets_stand():
    metadata = {"visit_date": "2021-03-14", "dob": "1929-03-14", "zip": "45402", "city": "Dayton", "nested": {"mrn": "4482913", "stage": "II"}}  # fmt: skip
    row, _ = PHIRedactor(key=KEY).redact_record({"text": "Well.", "metadata": metadata})
    assert row["metadata"] == {"visit_date": "[DATE 2021]", "dob": "[DATE]", "zip": "[LOCATION 454]", "nested": {"stage": "II"}}  # fmt: skip


# ---------------------------------------------------------------- validation


def test_values_that_were_removed_are_looked_for_everywhere_and_not_quoted():
    row = {"text": "MARTHA  Collins", "metadata": {"n": 4482913, "ok": "[NAME]"}, "label": "Collinson"}
    left = surviving_values([("NAME", "martha collins"), ("MRN", "4482913"), ("NAME", "Collins")], row)
    assert left == [("text", "NAME"), ("metadata.n", "MRN")] and surviving_values([], row) == []


def test_the_share_of_rows_with_a_clinical_concept_is_reported():
    rows = [{"id": "1", "text": "Pneumonia."}, {"id": "2", "text": "The train was late."}]
    assert ComplianceChecker().validate_dataset(rows)["medical_share"] == 0.5


@pytest.mark.parametrize(
    "text",
    ["Seen 3/14/2021", "on March 3", "Dr. Kumar", "MRN 44829", "call 614-555-8142", "a@b.org", "www.x.org", "12 Oak Street", "94 years old", "OH 45402", "id 12345678", "Jennifer Okonkwo was well", "3/2021"],
)  # fmt: skip
def test_the_validator_sees_what_looks_like_an_identifier(text):
    assert PHIValidator(strict_mode=True).contains_phi(text)


def test_the_validator_is_independent_of_the_detector():
    import medai_nb.phi.validate as module

    source = Path(module.__file__).read_text(encoding="utf8")
    assert "phi.detect" not in source.replace("`detect`", "") and "phi.redact" not in source


@pytest.mark.parametrize("method", METHODS)
def test_the_validator_passes_what_the_redactor_wrote(method):
    redactor, validator = PHIRedactor(method, key=KEY), PHIValidator(surrogates=method == "surrogate")
    for text in texts(60, seed=10):
        assert validator.find(redactor.redact_phi(text)) == []


def test_standard_mode_is_laxer_than_strict_mode():
    assert PHIValidator(strict_mode=False).find("on March 3, a 94 years old") == []


def test_compliance_violations_name_row_column_and_kind_but_no_text():
    rows = [
        {"id": "1", "text": "Pneumonia."},
        {"id": "1", "text": "Dr. Kumar", "messages": [{"role": "robot", "content": " "}]},
    ]
    report = ComplianceChecker().validate_dataset(
        rows, check_phi=True, check_format=True, check_medical_terms=True
    )
    assert not report["passed"] and "Kumar" not in json.dumps(report)
    assert {(item["row"], item["column"], item["kind"]) for item in report["violations"]} >= {
        (1, "text", "title and name"),
        (1, "id", "duplicate id"),
        (1, "messages[0].role", "unknown role"),
        (1, "messages[0].content", "empty message"),
    }


def test_a_data_set_without_medicine_is_a_violation():
    rows = [{"id": str(number), "text": "The train was late again."} for number in range(20)]
    assert not ComplianceChecker().validate_dataset(rows)["passed"]
    assert ComplianceChecker().validate_dataset(rows, check_medical_terms=False)["passed"]


# ---------------------------------------------------------------- audit


def audit_log(folder: Path) -> AuditLog:
    log = AuditLog(folder / "audit.jsonl")
    log.extend([{"event": "redacted", "row": row, "labels": {"NAME": 1}} for row in range(5)])
    return log


def test_an_intact_log_is_valid_and_can_be_continued(tmp_path):
    log = audit_log(tmp_path)
    AuditLog(log.path).append({"event": "finished"})
    assert verify_audit(log.path)["valid"] and verify_audit(log.path)["lines"] == 6


@pytest.mark.parametrize(
    "tamper, line",
    [
        (lambda lines: [*lines[:2], lines[2].replace('"row": 2', '"row": 9'), *lines[3:]], 3),
        (lambda lines: [*lines[:2], *lines[3:]], 3),
        (lambda lines: [*lines[:2], lines[1], *lines[2:]], 3),
        (lambda lines: [lines[1], lines[0], *lines[2:]], 1),
        (lambda lines: [*lines[:4], "not json\n"], 5),
        (lambda lines: lines[:3], 4),
    ],
    ids=["changed", "removed", "inserted", "moved", "garbage", "cut at the end"],
)
def test_tampering_with_the_log_is_found_and_the_line_named(tmp_path, tamper, line):
    log = audit_log(tmp_path)
    log.path.write_text("".join(tamper(log.path.read_text().splitlines(keepends=True))))
    report = verify_audit(log.path, log.head, log.count)
    assert not report["valid"] and report["line"] == line


def write_events(path: str, writer: int, count: int) -> None:
    for number in range(count):
        AuditLog(path).append({"event": "redacted", "writer": writer, "number": number})


def test_concurrent_writers_lose_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    path = str(tmp_path / "audit.jsonl")
    writers = [context.Process(target=write_events, args=(path, writer, 15)) for writer in range(3)]
    [writer.start() for writer in writers]
    [writer.join() for writer in writers]
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    assert verify_audit(path)["valid"] and len(lines) == 45
    for writer in range(3):
        assert [line["number"] for line in lines if line["writer"] == writer] == list(range(15))


def test_a_log_that_others_write_to_is_continued_behind_their_lines(tmp_path):
    one, two = audit_log(tmp_path), AuditLog(tmp_path / "audit.jsonl")
    two.append({"event": "other"})
    one.append({"event": "one"})
    assert verify_audit(one.path)["valid"] and (one.count, two.count) == (7, 6)


@pytest.mark.parametrize("cut", [1, 40, 0.5])
def test_a_kill_in_mid_line_loses_that_line_alone(tmp_path, cut):
    log = audit_log(tmp_path)
    whole = log.path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    torn = last[: cut if cut > 1 else int(len(last) * cut) if cut < 1 else 1]
    log.path.write_bytes(whole[: -len(last)] + torn)
    assert not verify_audit(log.path)["valid"] and "torn" in verify_audit(log.path)["problem"]
    AuditLog(log.path).append({"event": "goes on"})
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert verify_audit(log.path)["valid"] and [line["event"] for line in lines[4:]] == [
        "torn line set aside",
        "goes on",
    ]
    assert (tmp_path / lines[4]["file"]).read_bytes() == torn + b"\n" and lines[4]["bytes"] == len(torn)


def test_a_line_without_its_end_is_completed_and_a_changed_last_line_stops_the_writer(tmp_path):
    log = audit_log(tmp_path)
    log.path.write_bytes(log.path.read_bytes()[:-1])
    assert verify_audit(log.path)["valid"]
    log.append({"event": "goes on"})
    assert verify_audit(log.path)["lines"] == 6
    log.path.write_text(log.path.read_text().replace("goes on", "went on"))
    with pytest.raises(AuditError, match="last line"):
        log.append({"event": "more"})
    log.path.unlink()
    with pytest.raises(AuditError, match="removed"):
        log.append({"event": "more"})


def test_a_writer_that_is_killed_leaves_a_log_that_can_be_continued(tmp_path):
    path = tmp_path / "audit.jsonl"
    process = multiprocessing.get_context("fork").Process(target=write_events, args=(str(path), 0, 10_000))
    process.start()
    while not path.exists() or path.stat().st_size < 5_000:
        time.sleep(0.01)
    process.kill()
    process.join()
    AuditLog(path).append({"event": "goes on"})
    assert verify_audit(path)["valid"] and verify_audit(path)["lines"] > 10


def test_the_certificate_beside_a_log_says_where_it_ends(tmp_path):
    protect_dataset(splits(), PHIConfig(), tmp_path)
    log = tmp_path / "audit.jsonl"
    assert verify_audit(log, **certified_end(log))["valid"]
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    assert verify_audit(log)["valid"] and not verify_audit(log, **certified_end(log))["valid"]
    assert audit_summary(log)["events"]["redacted"] == 12


def test_events_that_would_hold_text_are_refused_and_damaged_logs_not_continued(tmp_path):
    log = audit_log(tmp_path)
    with pytest.raises(AuditError, match="text"):
        log.append({"event": "redacted", "text": "Dr. Kumar"})
    with pytest.raises(AuditError, match="value"):
        log.append({"event": "redacted", "spans": [{"start": 1, "value": "Dr. Kumar"}]})
    log.path.write_text(log.path.read_text().replace('"row": 0', '"row": 7'))
    with pytest.raises(AuditError, match="line 1"):
        AuditLog(log.path)


# ---------------------------------------------------------------- scoring


def test_a_span_counts_only_when_covered_whole_whatever_its_label():
    gold = [[{"start": 0, "end": 9, "label": "NAME"}], [{"start": 0, "end": 4, "label": "DATE"}]]
    found = [
        [{"start": 0, "end": 4, "label": "NAME"}, {"start": 5, "end": 9, "label": "LOCATION"}],
        [{"start": 0, "end": 3, "label": "DATE"}],
    ]
    score = score_detection(gold, found, ["Anna Roe1", "2021"])
    assert (
        score["by_label"]["NAME"]["recall"]["value"] == 1
        and score["by_label"]["DATE"]["recall"]["value"] == 0
    )
    assert score["leaking_documents"]["value"] == 0.5 and score["precision"]["value"] == 1


def test_wilson_interval_agrees_with_the_published_formula():
    interval = score_detection(
        [[{"start": 0, "end": 1, "label": "NAME"}]] * 10, [[{"start": 0, "end": 1, "label": "NAME"}]] * 10
    )["recall"]
    # 10 of 10: the lower end is n / (n + z^2).
    assert interval["low"] == pytest.approx(10 / (10 + 1.959964**2), abs=1e-4) and interval[
        "high"
    ] == pytest.approx(1)


def test_bounds_labels_and_characters_are_counted_apart():
    text = "Dr. Anna Roe, Ely. 3/14"
    gold = [[(4, 12, "NAME"), (14, 17, "LOCATION"), (19, 23, "DATE")]]
    found = [[(4, 12, "NAME"), (13, 18, "NAME"), (19, 21, "DATE"), (0, 2, "NAME")]]
    as_spans = [
        [[dict(zip(("start", "end", "label"), span, strict=True)) for span in spans] for spans in side]
        for side in (gold, found)
    ]
    score = score_detection(*as_spans, [text])
    counted = {
        name: (score[name]["recall"]["count"], score[name]["precision"]["count"])
        for name in ("overlapping", "exact", "strict", "characters")
    }
    # "Ely." has the bounds of "Ely": signs at the edges do not count, the label does; "3/" is a part of "3/14".
    assert counted == {"overlapping": (3, 3), "exact": (2, 2), "strict": (1, 1), "characters": (11, 11)}
    assert (score["recall"]["count"], score["precision"]["total"]) == (2, 4)
    assert (score["same_label"]["count"], score["same_label"]["total"]) == (1, 2)
    assert score["characters"]["recall"]["total"] == 13 and score["characters"]["precision"]["total"] == 13
    assert score["by_label"]["DATE"]["strict"]["recall"]["count"] == 0


def test_leaking_documents_are_those_with_identifiers_and_touched_ones_those_without():
    one, none = [{"start": 0, "end": 3, "label": "NAME"}], []
    score = score_detection([one, one, none, none, none], [one, none, none, one, none])
    assert (score["leaking_documents"]["count"], score["leaking_documents"]["total"]) == (1, 2)
    assert (score["clean_touched"]["count"], score["clean_touched"]["total"]) == (1, 3)
    nothing = score_detection([none], [none])
    assert nothing["recall"]["value"] is None and nothing["f1"] is None
    assert score_detection([], [])["recall"]["total"] == 0


def test_an_interval_knows_that_errors_come_in_the_same_document():
    spans = [{"start": place, "end": place + 1, "label": "NAME"} for place in range(10)]
    spread = score_detection([spans] * 20, [spans[1:]] * 20)["recall"]
    together = score_detection([spans] * 20, [spans] * 18 + [[]] * 2)["recall"]
    assert spread["value"] == together["value"] == 0.9
    assert together["low"] < spread["low"] - 0.05 and together["high"] > spread["high"]
    assert score_detection([spans] * 20, [spans] * 18 + [[]] * 2)["recall"] == together


def test_unequal_numbers_of_documents_are_refused():
    with pytest.raises(UserError, match="2 documents"):
        score_detection([[], []], [[]])


# ---------------------------------------------------------------- the stage


def gold(text: str, values: dict[str, str]) -> list[dict]:
    return [
        {"start": text.index(value), "end": text.index(value) + len(value), "label": label}
        for value, label in values.items()
    ]


def splits(rows: int = 6) -> DatasetDict:
    text = "Martha Collins, 93 yo, seen 3/14/2021 by Dr. Kumar. MRN: 4482913. Call 614-555-8142. Crohn's disease."
    spans = gold(
        text,
        {
            "Martha Collins": "NAME",
            "93": "AGE",
            "3/14/2021": "DATE",
            "Kumar": "NAME",
            "4482913": "MRN",
            "614-555-8142": "PHONE",
        },
    )
    table = {
        "id": [f"MRN-4482913-{row}" for row in range(rows)],
        "patient_id": [f"MRN-448291{row // 2}" for row in range(rows)],
        "text": [text] * rows,
        "messages": [
            [
                {"role": "user", "content": text},
                {"role": "assistant", "content": "Collins has Crohn's disease."},
            ]
        ]
        * rows,
        "label": ["K50"] * rows,
        "metadata": [{"age": 93, "patient_name": "Martha Collins", "category": "K50"}] * rows,
        "phi_spans": [spans] * rows,
    }
    return DatasetDict(
        {
            "train": Dataset.from_dict(table),
            "test": Dataset.from_dict(
                {**table, "label": [None] * rows}, features=Dataset.from_dict(table).features
            ),
        }
    )


def everything_written(folder: Path) -> str:
    return "".join(
        path.read_bytes().decode("utf8", errors="ignore") for path in folder.rglob("*") if path.is_file()
    )


@pytest.mark.parametrize("method", METHODS)
def test_no_raw_identifier_is_in_any_file_of_the_stage(tmp_path, monkeypatch, method):
    monkeypatch.setenv("PHI_HASH_KEY", "a key for tests, nothing else")
    certificate = protect_dataset(splits(), PHIConfig(redaction_method=method), tmp_path / "protected")
    written = everything_written(tmp_path)
    assert [
        value
        for value in (
            "Martha",
            "Collins",
            "Kumar",
            "4482913",
            "3/14/2021",
            "MRN-448",
            "phi_spans",
        )
        if value in written
    ] == []
    # Four digits may stand in a checksum by chance.
    assert not re.search(r"(?<![0-9a-f])8142(?![0-9a-f])", written)
    assert certificate["passed"] and certificate["detection"]["recall"]["value"] == 1.0


def test_the_certificate_matches_the_data_and_the_audit_log(tmp_path):
    certificate = protect_dataset(splits(), PHIConfig(), tmp_path)
    assert require_certificate(tmp_path) == certificate
    assert certificate["fingerprint"] == dataset_fingerprint(load_from_disk(str(tmp_path)))
    assert verify_audit(
        tmp_path / "audit.jsonl", certificate["audit"]["head"], certificate["audit"]["lines"]
    )["valid"]
    assert certificate["counts"]["NAME"] >= 24 and certificate["records"] == {"train": 6, "test": 6}


def test_the_certificate_says_what_looked_by_which_rule_with_what_result(tmp_path):
    certificate = protect_dataset(splits(), PHIConfig(), tmp_path)
    assert certificate["safe_harbor"] and certificate["rule"].startswith("Safe Harbor")
    assert set(certificate["detectors"]) == {"package", "rules", "lists_and_models", "validator"}
    recall = certificate["detection"]["recall"]
    assert (
        recall["low"] <= recall["value"] <= recall["high"]
        and certificate["validation"]["medical_share"] == 1.0
    )


def test_an_audit_event_names_places_and_codes(tmp_path):
    protect_dataset(splits(), PHIConfig(), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    span = dict(zip(lines[0]["span"], lines[1]["spans"][0]))
    assert set(span) == {"field", "start", "end", "label", "score", "detector", "code"}
    assert lines[1]["policy"] == lines[0]["policy_version"] and len(span["code"]) == 16


def test_shifted_dates_are_certified_as_not_safe_harbor(tmp_path):
    redactor = PHIRedactor("surrogate", key=KEY, date_shift=90)
    certificate = protect_dataset(
        splits(), PHIConfig(redaction_method="surrogate"), tmp_path, redactor=redactor
    )
    assert not certificate["safe_harbor"] and certificate["rule"].startswith("not Safe Harbor")
    assert certificate["dates"] == "shifted by up to 90 days" and "3/14/2021" not in everything_written(
        tmp_path
    )


def test_metadata_that_identifies_by_content_goes_with_its_schema(tmp_path):
    records = splits()
    people = ["Ann Lee", "Hugo Perez", "Ruth Mayer"]
    for name, rows in records.items():
        changed = [
            {**row, "metadata": {**row["metadata"], "who": people[place % 3], "visit_date": "2021-03-14"}}
            for place, row in enumerate(rows)
        ]
        records[name] = Dataset.from_list(changed)
    certificate = protect_dataset(records, PHIConfig(), tmp_path)
    assert certificate["metadata_by_content"] == {"who": "NAME"}
    train = load_from_disk(str(tmp_path))["train"]
    assert train[0]["metadata"] == {"age": 90, "category": "K50", "visit_date": "[DATE 2021]"}
    assert [person for person in people if person in everything_written(tmp_path)] == []


def test_grouping_types_and_clinical_content_survive(tmp_path):
    protect_dataset(splits(), PHIConfig(), tmp_path)
    train = load_from_disk(str(tmp_path))["train"]
    assert len(set(train["patient_id"])) == 3 and len(set(train["id"])) == 6
    assert "patient_name" not in train.features["metadata"]
    assert train[0]["metadata"] == {"age": 90, "category": "K50"} and "Crohn's disease" in train[0]["text"]
    assert load_from_disk(str(tmp_path))["test"].features == train.features


def test_the_same_data_gives_the_same_fingerprint_with_one_or_two_processes(tmp_path):
    one = protect_dataset(splits(70), PHIConfig(), tmp_path / "one")
    two = protect_dataset(splits(70), PHIConfig(), tmp_path / "two", num_proc=2)
    assert one["fingerprint"] == two["fingerprint"] and one["counts"] == two["counts"]


def test_training_refuses_data_without_certificate(tmp_path):
    splits().save_to_disk(str(tmp_path))
    with pytest.raises(UnprotectedDataError, match="no certificate"):
        require_certificate(tmp_path)
    assert require_certificate(tmp_path, allow_unprotected=True)["unprotected"]


@pytest.mark.parametrize(
    "tamper, message",
    [
        (
            lambda folder: (folder / "certificate.json").write_text(
                (folder / "certificate.json").read_text().replace('"strict"', '"standard"', 1)
            ),
            "changed",
        ),
        (lambda folder: (folder / "certificate.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "certificate.json").write_text("[]"), "changed"),
        (lambda folder: (folder / "certificate.json").unlink(), "no certificate"),
    ],
    ids=["edited", "truncated", "other content", "removed"],
)
def test_a_tampered_certificate_closes_the_gate(tmp_path, tamper, message):
    protect_dataset(splits(), PHIConfig(), tmp_path)
    tamper(tmp_path)
    with pytest.raises(UnprotectedDataError, match=message):
        require_certificate(tmp_path)


def test_one_changed_character_of_the_data_closes_the_gate(tmp_path):
    certificate = protect_dataset(splits(), PHIConfig(), tmp_path / "protected")
    changed = load_from_disk(str(tmp_path / "protected"))
    changed["train"] = changed["train"].map(
        lambda row: {"label": row["label"] + "!"}, load_from_cache_file=False
    )
    changed.save_to_disk(str(tmp_path / "other"))
    write_certificate(tmp_path / "other", certificate)
    with pytest.raises(UnprotectedDataError, match="fingerprints differ"):
        require_certificate(tmp_path / "other")


def test_a_certificate_that_says_failed_closes_the_gate(tmp_path):
    data = splits()
    data.save_to_disk(str(tmp_path))
    write_certificate(tmp_path, {"passed": False, "fingerprint": dataset_fingerprint(data)})
    with pytest.raises(UnprotectedDataError, match="protection failed"):
        require_certificate(tmp_path)


def test_strict_validation_stops_the_stage_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("medai_nb.phi.redact.detect", lambda text, **settings: [])
    with pytest.raises(ProtectionFailed) as caught:
        protect_dataset(splits(), PHIConfig(), tmp_path / "protected")
    message = str(caught.value)
    assert "train row 0, text: " in message and "title and name" in message
    assert [value for value in RAW if value in message] == [] and not (tmp_path / "protected").exists()
    assert [value for value in RAW if value in json.dumps(caught.value.violations)] == []


def test_lenient_validation_reports_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("medai_nb.phi.redact.detect", lambda text, **settings: [])
    certificate = protect_dataset(splits(), PHIConfig(validation_strict=False), tmp_path)
    assert certificate["validation"]["suspicious_places"] > 0 and not certificate["validation"]["enforced"]


def test_disabled_protection_leaves_no_certificate(tmp_path):
    result = protect_dataset(splits(), PHIConfig(enabled=False), tmp_path)
    assert not result["passed"] and not (tmp_path / "certificate.json").exists()
    with pytest.raises(UnprotectedDataError):
        require_certificate(tmp_path)


def test_a_failed_second_run_does_not_leave_the_first_certificate_on_other_data(tmp_path):
    protect_dataset(splits(), PHIConfig(), tmp_path)
    protect_dataset(splits(), PHIConfig(enabled=False), tmp_path)
    with pytest.raises(UnprotectedDataError):
        require_certificate(tmp_path)


def test_the_environment_can_make_a_run_stricter_never_laxer(monkeypatch):
    monkeypatch.setenv("PHI_PROTECTION_LEVEL", "standard")
    assert protection_level(PHIConfig(protection_level="strict")) == "strict"
    monkeypatch.setenv("PHI_PROTECTION_LEVEL", "strict")
    assert protection_level(PHIConfig(protection_level="standard")) == "strict"
    monkeypatch.setenv("PHI_PROTECTION_LEVEL", "none")
    with pytest.raises(UserError, match="choose strict"):
        protection_level(PHIConfig())


def test_audit_logging_can_be_switched_and_the_certificate_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PHI_AUDIT_LOGGING", "false")
    assert (
        protect_dataset(splits(), PHIConfig(), tmp_path)["audit"] is None
        and not (tmp_path / "audit.jsonl").exists()
    )
    monkeypatch.setenv("PHI_AUDIT_LOGGING", "true")
    assert protect_dataset(splits(), PHIConfig(audit_logging=False), tmp_path)["audit"]["lines"] == 14


def test_metadata_of_nothing_but_identifiers_disappears(tmp_path):
    table = {
        "id": ["1"],
        "patient_id": [None],
        "text": ["Asthma."],
        "label": ["J45"],
        "metadata": [{"name": "Ann Lee", "mrn": "1234"}],
    }
    protect_dataset(DatasetDict({"train": Dataset.from_dict(table)}), PHIConfig(), tmp_path)
    assert "metadata" not in load_from_disk(str(tmp_path))["train"].column_names


# ---------------------------------------------------------------- real text, where it is present

DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.mark.skipif(not (DATA / "aci_bench").is_dir(), reason="real text (shared/data/aci_bench) is not here")
def test_patients_names_are_gone_from_real_visit_notes():
    import csv
    import re

    redactor, left, total = PHIRedactor(), 0, 0
    with (DATA / "aci_bench/valid_metadata.csv").open(encoding="utf8") as file:
        people = {row["encounter_id"]: row for row in csv.DictReader(file)}
    with (DATA / "aci_bench/valid.csv").open(encoding="utf8") as file:
        for row in csv.DictReader(file):
            redacted = redactor.redact_phi(row["note"])
            for name in (
                people[row["encounter_id"]][key].strip()
                for key in ("patient_firstname", "patient_familyname")
            ):
                if name:
                    total += len(re.findall(rf"\b{name}\b", row["note"]))
                    left += len(re.findall(rf"\b{name}\b", redacted))
    assert total > 10 and left == 0


@pytest.mark.skipif(
    not (DATA / "mts_dialog").is_dir(), reason="real text (shared/data/mts_dialog) is not here"
)
def test_real_dialogues_come_through_strictly():
    import csv

    redactor, validator = PHIRedactor(), PHIValidator()
    with sorted((DATA / "mts_dialog").glob("*.csv"))[0].open(encoding="utf8", errors="replace") as file:
        rows = list(csv.DictReader(file))[:200]
    assert [row["ID"] for row in rows if validator.contains_phi(redactor.redact_phi(row["dialogue"]))] == []
    characters = sum(len(row["dialogue"]) for row in rows)
    hidden = sum(span.end - span.start for row in rows for span in detect(row["dialogue"]))
    assert hidden / characters < 0.01, "so much redaction would take the clinical content away"


def test_metadata_that_may_identify_is_left_out_for_everybody_and_reported(tmp_path):
    """A field that is no identifier by name, whose values the validator suspects: the stage goes on without it."""
    records = splits()
    for name, rows in records.items():
        changed = [
            {
                **row,
                "metadata": {**row["metadata"], "file": f"scans_A/{7000123 + row['metadata']['age']}_1.xml"},
            }
            for row in rows
        ]
        records[name] = Dataset.from_list(changed)
    certificate = protect_dataset(records, PHIConfig(), tmp_path)
    assert certificate["passed"] and certificate["metadata_left_out"] == ["metadata.file"]
    assert set(load_from_disk(str(tmp_path))["train"].features["metadata"]) == {"age", "category"}
    assert "7000" not in everything_written(tmp_path)


def test_text_that_may_identify_still_stops_the_stage(tmp_path, monkeypatch):
    monkeypatch.setattr("medai_nb.phi.redact.detect", lambda text, **settings: [])
    records = splits().map(lambda row: {"metadata": {**row["metadata"], "patient_name": None}})
    with pytest.raises(ProtectionFailed):
        protect_dataset(records, PHIConfig(), tmp_path)
    assert not (tmp_path / "certificate.json").exists()


def test_settings_of_a_run_reach_the_redactor(tmp_path):
    from medai_nb.config import RunConfig

    rows = [
        {
            "id": "1",
            "patient_id": "p1",
            "text": "Dr. Kumar and Dr. Okafor met Mr. Kumar on March 3, 2021.",
            "label": "a",
        }
    ]
    splits = {"train": Dataset.from_list(rows)}
    config = RunConfig.load({"phi": {"number_persons": True, "date_shift": 30, "validation_strict": False}})
    certificate = protect_dataset(DatasetDict(splits), config.phi, tmp_path / "protected")
    text = load_from_disk(str(tmp_path / "protected"))["train"][0]["text"]
    assert text.count("[NAME 001]") == 2 and text.count("[NAME 002]") == 1
    assert certificate["safe_harbor"] is False and "March 3, 2021" not in text
