"""The embedded corpus: the same everywhere, every identifier marked, nothing shared between blocks."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from medai_nb.demo_corpus import (
    CHAPTER_LABELS,
    IDENTIFIER_PHRASES,
    Passage,
    dea_number,
    demo_records,
    fill,
    icd_statements,
    identifier,
    luhn_check_digit,
    npi_number,
    slip,
    vehicle_number,
)


@pytest.fixture(scope="module")
def corpus():
    return demo_records()


def test_corpus_has_the_promised_size_and_even_chapters(corpus):
    assert len(corpus) == 2000
    assert len(set(corpus["patient_id"])) == 600
    assert len(set(corpus["id"])) == len(set(corpus["text"])) == 2000
    counts = Counter(corpus["label"])
    assert set(counts) == set(CHAPTER_LABELS.values())
    assert set(counts.values()) <= {95, 96}


def test_every_gold_span_covers_an_identifier_and_spans_do_not_overlap(corpus):
    for record in corpus:
        spans = sorted(record["phi_spans"], key=lambda span: span["start"])
        for span, following in zip(spans, spans[1:] + [None]):
            covered = record["text"][span["start"] : span["end"]]
            assert covered and covered == covered.strip()
            assert following is None or span["end"] <= following["start"]


def test_all_safe_harbor_kinds_occur_often_enough_to_measure_recall(corpus):
    counts = Counter(span["label"] for record in corpus for span in record["phi_spans"])
    assert set(counts) == set(IDENTIFIER_PHRASES)
    assert min(counts.values()) >= 70


def test_ages_are_identifiers_above_89_only(corpus):
    for record in corpus:
        ages = [
            record["text"][span["start"] : span["end"]]
            for span in record["phi_spans"]
            if span["label"] == "AGE"
        ]
        assert all(age == str(record["metadata"]["age"]) and int(age) > 89 for age in ages)
    assert any(record["metadata"]["age"] > 89 for record in corpus)


def test_numbers_can_belong_to_nobody(corpus):
    for record in corpus:
        for span in record["phi_spans"]:
            value = record["text"][span["start"] : span["end"]].lower()
            if span["label"] in ("PHONE", "FAX"):
                assert "555" in value and value[-4:-2] == "01"
            elif span["label"] == "SSN":
                assert value.startswith("9")
            elif span["label"] in ("EMAIL", "URL"):
                assert "example.org" in value or "example.com" in value
            elif span["label"] == "IP":
                assert value.startswith(("192.0.2.", "198.51.100.", "203.0.113.", "2001:db8:"))


def test_identifiers_of_one_patient_are_the_same_in_all_notes(corpus):
    numbers: dict[str, set] = {}
    for record in corpus:
        for span in record["phi_spans"]:
            if span["label"] == "MRN":
                value = record["text"][span["start"] : span["end"]].upper()
                numbers.setdefault(record["patient_id"], set()).add(value)
    assert max(map(len, numbers.values())) == 1
    assert len(numbers) > 100


def test_diagnoses_are_official_statements_of_their_chapter(corpus):
    official = {statement.code: statement for statement in icd_statements()}
    for record in corpus:
        statement = official[record["metadata"]["code"]]
        assert (statement.label, statement.category) == (record["label"], record["metadata"]["category"])
        assert record["messages"][1]["content"].startswith(statement.description)
        assert record["messages"][0]["content"].endswith(record["text"])


def test_pregnancies_and_newborns_belong_to_patients_who_can_have_them(corpus):
    for record in corpus:
        age, gender = record["metadata"]["age"], record["metadata"]["gender"]
        if record["label"] == "Pregnancy and childbirth":
            assert gender == "F" and 18 <= age <= 45
        if record["label"] == "Newborn conditions":
            assert age == 0


def test_no_two_blocks_share_a_category_or_a_patient(corpus):
    from medai_nb.splits import connected_groups

    keys = [[record["patient_id"], record["metadata"]["category"]] for record in corpus]
    sizes = Counter(connected_groups(keys).tolist())
    assert len(sizes) >= 40
    assert max(sizes.values()) <= 60


def test_notes_are_short_enough_for_training_on_a_cpu(corpus):
    lengths = sorted(len(text) for text in corpus["text"])
    assert lengths[0] > 60 and lengths[-1] < 320
    assert 150 < sum(lengths) / len(lengths) < 200


@pytest.mark.slow
def test_corpus_is_the_same_in_every_process():
    program = (
        "import json, sys; from medai_nb.demo_corpus import demo_records; "
        "json.dump(demo_records(patients=60, notes=200).to_list(), sys.stdout)"
    )
    environment = dict(os.environ, PYTHONHASHSEED="12345", HF_HUB_OFFLINE="1")
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == demo_records(patients=60, notes=200).to_list()


def test_another_seed_gives_other_notes_and_the_same_seed_the_same(corpus):
    small = demo_records(seed=1, patients=60, notes=200)
    assert small.to_list() == demo_records(seed=1, patients=60, notes=200).to_list()
    assert small["text"] != demo_records(seed=2, patients=60, notes=200)["text"]
    assert len(set(small["patient_id"])) <= 60


@pytest.mark.parametrize(("patients", "notes"), [(29, 100), (100, 99)])
def test_sizes_that_cannot_be_divided_are_refused(patients, notes):
    with pytest.raises(ValueError, match="at least 30 patients"):
        demo_records(patients=patients, notes=notes)


def test_spans_move_with_their_passage():
    inner = fill("Dr. {name}", name=identifier("Sato", "NAME"))
    outer = fill("{{{date}}} {inner}, {inner}", date=identifier("3/4", "DATE"), inner=inner)
    assert outer.text == "{3/4} Dr. Sato, Dr. Sato"
    assert [outer.text[start:end] for start, end, _ in outer.spans] == ["3/4", "Sato", "Sato"]
    assert fill("plain") == Passage("plain")


def test_check_digits_follow_their_standards():
    import random

    assert luhn_check_digit("80840" + "123456789") == 3
    assert luhn_check_digit("7992739871") == 3
    rng = random.Random(0)
    for _ in range(50):
        npi = npi_number(rng)
        assert len(npi) == 10 and luhn_check_digit("80840" + npi[:9]) == int(npi[9])
        digits = [int(digit) for digit in dea_number(rng, "Okafor")[2:]]
        assert (digits[0] + digits[2] + digits[4] + 2 * (digits[1] + digits[3] + digits[5])) % 10 == digits[6]
        assert len(vehicle_number(rng)) == 17


def test_slips_keep_the_first_and_last_letter():
    import random

    for number in range(50):
        slipped = slip("hypertension", random.Random(number))
        assert slipped[0] == "h" and slipped[-1] == "n" and 11 <= len(slipped) <= 12
