"""What holds for every document: no identifier survives, nothing else changes, twice is once, and nothing raw is logged.

300 random documents here; MEDAI_PROPERTY_DOCUMENTS=10000 asks for more."""

import json
import logging
import os
import re
import warnings
from importlib import resources
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medai_nb.cli import main
from medai_nb.config import PHIConfig, UserError
from medai_nb.phi.protect import protect_dataset
from medai_nb.phi.redact import METHODS, PHIRedactor
from medai_nb.phi.words import FUNCTION, ORDINARY, REGION, word_flags

KEY = b"a key for tests, nothing else"
DOCUMENTS = int(os.environ.get("MEDAI_PROPERTY_DOCUMENTS", "300"))
EACH_METHOD = settings(
    max_examples=-(-DOCUMENTS // len(METHODS)),
    deadline=None,
    derandomize=DOCUMENTS
    <= 300,  # the same documents in every run of the suite, others when more are asked for
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

# ---------------------------------------------------------------- documents

CARRIERS = """Lungs are clear to auscultation bilaterally.|BP 120/80, HR 72, SpO2 98% on room air.|Crohn's disease in remission on 50 mg daily.
Denies chest pain, nausea or vomiting.|pain 3/10, worse at night|Hgb 13.2, WBC 7.4, INR 2.5.|Parkinson's disease, Hoehn and Yahr 2.
Foley catheter removed on day 3.|ICD-10 J45.909; CPT 99213.|takes metformin 500 mg bid and lisinopril 10 mg|follow-up in 2 weeks
EKG: normal sinus rhythm at 80 bpm.|é ü 漢字 🙂|[unknown]|{not a placeholder}|a 45-year-old with asthma|born in 1961""".replace("\n", "|").split("|")  # fmt: skip
SEPARATORS = [". ", "\n", "\r\n", "; ", "\n\n", " \t", "  "]
GIVEN = "Martha Jennifer Robert Andrew Priya Mohammed Ingrid Wei Oluwaseun Dmitri Fatima Siobhan".split()
UNUSUAL = "Collins Okafor Kowalczyk Nguyen Fernandez Whitfield O'Brien Smith-Jones Yamamoto Haddad Lindqvist Banerjee".split()
STREETS = "Maple Elmwood Jefferson Lakeview Sycamore Chestnut".split()
KINDS = "Street Avenue Road Boulevard Lane Drive".split()
CITIES = ["Dayton, OH 45402", "Springfield, IL 62704", "Houston, TX 77201", "Fresno, CA 93721"]
MONTHS = "January February March April June July August September October November December".split()


def digits(count: int, first: str = "123456789") -> st.SearchStrategy[str]:
    return st.builds(
        lambda head, rest: head + rest,
        st.sampled_from(first),
        st.text("0123456789", min_size=count - 1, max_size=count - 1),
    )


def shaped(pattern: str, *parts: st.SearchStrategy) -> st.SearchStrategy[str]:
    return st.builds(lambda *values: pattern.format(*values), *parts)


def labelled(value: st.SearchStrategy[str], *frames: str) -> st.SearchStrategy[tuple[str, str]]:
    """(sentence, value in it)."""
    return st.builds(lambda frame, item: (frame.format(item), item), st.sampled_from(frames), value)


_LINES = resources.files("names").joinpath("dist.all.last").read_text(encoding="utf8").splitlines()[:4000]
SURNAMES = [
    name
    for line in _LINES
    if len(name := line.split()[0].capitalize()) > 3 and not word_flags(name) & FUNCTION
]
surname, given_name = st.one_of(st.sampled_from(SURNAMES), st.sampled_from(UNUSUAL)), st.sampled_from(GIVEN)
letters = st.text("ABCDEFGHJKLMNPRSTVWY", min_size=2, max_size=3)
day, two, year = st.integers(2, 28), st.integers(10, 12), st.integers(1960, 2024)
phone = shaped("{}-{}-{}", digits(3, "2346789"), digits(3, "2346789"), digits(4))
GOLD = {
    "NAME": st.one_of(
        labelled(surname, "seen by Dr. {}", "Mrs. {} is well", "cc: Dr. {}", "Mr. {} coughs"),
        labelled(shaped("{} {}", given_name, surname), "Patient name: {}", "Dr. {} agreed", "Mr. {} called"),
    ),
    "DATE": labelled(
        st.one_of(
            shaped("{}/{}/{}", two, day, year),
            shaped("{}-{:02d}-{:02d}", year, two, day),
            shaped("{} {}, {}", st.sampled_from(MONTHS), day, year),
        ),
        "Seen on {}",
        "Date of admission: {}",
        "DOB: {}",
    ),
    "AGE": labelled(shaped("{}", st.integers(91, 109)), "a {}-year-old woman", "{} years old", "Age: {}"),
    "LOCATION": labelled(
        shaped("{} {} {}, {}", digits(3), st.sampled_from(STREETS), st.sampled_from(KINDS), st.sampled_from(CITIES)),
        "Address: {}",
        "lives at {}",
    ),
    "PHONE": labelled(phone, "call {}", "Phone: {}", "Tel. {}"),
    "FAX": labelled(phone, "Fax: {}", "faxed to {}"),
    "EMAIL": labelled(shaped("{}.{}@{}.com", letters, digits(3), letters), "Email: {}", "write to {}"),
    "SSN": labelled(shaped("{}-{}-{}", digits(3, "1234567"), digits(2), digits(4)), "SSN {}", "SSN: {}"),
    "MRN": labelled(digits(7), "MRN: {}", "MRN {}", "medical record number {}", "\nSeen | MRN\nno | {}\n"),
    "HEALTH_PLAN": labelled(shaped("{}{}", letters, digits(8)), "Member ID: {}", "policy number {}"),
    "ACCOUNT": labelled(digits(9), "Account number: {}", "acct# {}"),
    "LICENSE": labelled(shaped("{}{}", letters, digits(7)), "License number: {}", "driver's license {}"),
    "VEHICLE": labelled(shaped("{}{}", digits(3), letters), "license plate {}"),
    "DEVICE": labelled(shaped("{}-{}", letters, digits(6)), "serial number {}", "Device ID: {}"),
    "URL": labelled(shaped("https://portal.example.com/{}", digits(6)), "see {}", "Portal: {}"),
    "IP": labelled(shaped("10.{}.{}.{}", two, day, two), "IP address {}", "login from {}"),
    "BIOMETRIC": labelled(shaped("{}{}", letters, digits(6)), "fingerprint template {}", "biometric ID {}"),
    "PHOTO": labelled(shaped("IMG_{}.jpg", digits(4)), "photo {}"),
    "OTHER_ID": labelled(shaped("{}-{}", letters, digits(6)), "Accession number: {}", "specimen ID {}"),
}  # fmt: skip


@st.composite
def documents(draw) -> tuple[str, list[tuple[str, str]]]:
    """A text, and (label, value) of what must not stay in it."""
    pieces, gold = [], []
    for _ in range(draw(st.integers(1, 4))):
        pieces.append(draw(st.sampled_from(CARRIERS)))
        label = draw(st.sampled_from(sorted(GOLD)))
        sentence, value = draw(GOLD[label])
        pieces.append(sentence)
        gold.append((label, value))
    separators = [draw(st.sampled_from(SEPARATORS)) for _ in pieces]
    return "".join(piece + separator for piece, separator in zip(pieces, separators)), gold


def stays(value: str, text: str) -> bool:
    return bool(re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text))


def unchanged_outside(text: str, redacted: str, spans: list) -> bool:
    """Is the result the text with something else in place of each span, and only there?"""
    edges = [0, *(edge for span in spans for edge in (span.start, span.end)), len(text)]
    outside = [text[start:end] for start, end in zip(edges[::2], edges[1::2])]
    if len(outside) == 1:
        return redacted == text
    pattern = "[^\0]+?".join(map(re.escape, outside))
    return re.fullmatch(pattern, redacted) is not None


# ---------------------------------------------------------------- what holds for all of them


@pytest.mark.parametrize("method", METHODS)
@EACH_METHOD
@given(document=documents())
def test_no_gold_value_survives_nothing_else_changes_and_twice_is_once(method, document):
    text, gold = document
    redactor = PHIRedactor(method, key=KEY)
    redacted, spans = redactor.redact_text(text)
    assert [label for label, value in gold if label != "AGE" and stays(value, redacted)] == []
    assert [value for label, value in gold if label == "AGE" and f"{value}-year-old" in redacted] == []
    assert unchanged_outside(text, redacted, spans)
    assert redactor.redact_phi(redacted) == redacted


@EACH_METHOD
@given(document=documents(), numbered=st.booleans(), structure=st.booleans())
def test_settings_of_replacement_change_neither(document, numbered, structure):
    text, gold = document
    redactor = PHIRedactor(
        "replacement", structure, key=KEY, number_persons=numbered, date_shift=0 if structure else 99
    )
    redacted, spans = redactor.redact_text(text)
    assert [label for label, value in gold if label not in ("AGE", "DATE") and stays(value, redacted)] == []
    assert unchanged_outside(text, redacted, spans) and redactor.redact_phi(redacted) == redacted


@EACH_METHOD
@given(document=documents(), place=st.integers(0, 2))
def test_no_value_of_a_row_survives_in_another_of_its_fields(document, place):
    """The value stands bare in a field where nothing gives it away, and with its label in another.

    Names that are ordinary words ("Wise") are left out: bare, they are words."""
    text, gold = document
    known = [
        (label, value)
        for label, value in gold
        if label not in ("AGE", "DATE", "LOCATION")
        and not (label == "NAME" and word_flags(value.split()[-1]) & (ORDINARY | REGION))
    ]
    fields = [text, "see " + ", ".join(value for _, value in known), "no change"]
    names = ["a", "b", "c"]
    row = dict(zip(names[place:] + names[:place], fields))
    done = PHIRedactor(key=KEY).process_row({"note": row})
    assert [label for label, value in known if stays(value, json.dumps(done.row, ensure_ascii=False))] == []


# ---------------------------------------------------------------- nothing raw anywhere else

SECRETS = {"Okonkwo": "Dr. Okonkwo", "4482913": "MRN: 4482913", "614-555-8142": "call 614-555-8142", "3/14/2021": "seen 3/14/2021", "q.okonkwo": "q.okonkwo@mail.com", "Zyxwicz": "Mrs. Zyxwicz"}  # fmt: skip
SECRET_TEXT = "; ".join(SECRETS.values()) + ". Crohn's disease."


def splits() -> DatasetDict:
    row = {
        "id": "MRN-4482913",
        "patient_id": "4482913",
        "text": SECRET_TEXT,
        "label": "K50",
        "metadata": {"patient_name": "Ada Zyxwicz", "comment": "okonkwo and Zyxwicz"},
    }
    return DatasetDict({"train": Dataset.from_list([row] * 3), "test": Dataset.from_list([row])})


def test_no_output_log_error_or_audit_file_holds_a_raw_value(tmp_path, monkeypatch, capfd, caplog):
    """A run that succeeds, one that validation stops, files that are whole, and files that are broken."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("PHI_HASH_KEY", KEY.decode())
    inputs, outputs = tmp_path / "in", tmp_path / "out"
    inputs.mkdir()
    outputs.mkdir()
    (inputs / "whole").mkdir()
    (inputs / "whole/okonkwo.txt").write_text(SECRET_TEXT)
    (inputs / "whole/rows.jsonl").write_text(json.dumps({"mrn": 4482913, "note": SECRET_TEXT}) + "\n")
    (inputs / "broken.jsonl").write_text('{"note": "' + SECRET_TEXT + "\n")
    (inputs / "broken.csv").write_text(f'note,x\n1,2\n"{SECRET_TEXT}"\n')
    (inputs / "latin.txt").write_bytes((SECRET_TEXT + "é").encode("latin-1"))
    said = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        protect_dataset(splits(), PHIConfig(), outputs / "protected")
        for method in METHODS:
            arguments = [
                "--method",
                method,
                "--report",
                str(outputs / f"{method}.html"),
                "--audit",
                str(outputs / "audit.jsonl"),
            ]
            assert main(["deid", str(inputs / "whole"), "-o", str(outputs / method), *arguments]) == 0
        for name in ("broken.jsonl", "broken.csv", "latin.txt"):
            assert main(["deid", str(inputs / name), "-o", str(outputs / name)]) == 2
        assert main(["audit", "show", str(outputs / "audit.jsonl")]) == 0
        monkeypatch.setattr("medai_nb.phi.redact.detect", lambda text, **settings: [])
        with pytest.raises(UserError) as stopped:
            protect_dataset(splits(), PHIConfig(), outputs / "stopped")
        said += [str(stopped.value), repr(stopped.value), json.dumps(stopped.value.violations)]
        assert (
            main(["deid", str(inputs / "whole/rows.jsonl"), "-o", str(outputs / "s.jsonl"), "--strict"]) == 2
        )
    captured = capfd.readouterr()
    said += [captured.out, captured.err, caplog.text, *(str(warning.message) for warning in warned)]
    said += [
        path.read_bytes().decode("utf8", errors="ignore") for path in outputs.rglob("*") if path.is_file()
    ]
    said += [str(path.relative_to(outputs)) for path in outputs.rglob("*")]
    assert [value for value in (*SECRETS, "okonkwo", "zyxwicz") for text in said if value in text] == []
    assert sum(map(len, said)) > 5_000 and (outputs / "protected/certificate.json").is_file()


def test_the_grep_above_would_find_a_leak(tmp_path):
    (tmp_path / "x.txt").write_text(SECRET_TEXT)
    written = Path(tmp_path / "x.txt").read_text()
    assert [value for value in SECRETS if value not in written] == []
