"""Training texts: marks, other identifiers in the same places, tags, and a training that learns."""

import random
import re

import pytest

from medai_nb.demo_corpus import Passage
from medai_nb.phi.model import CONTEXT, TAGS, Model, Reading
from medai_nb.phi.score import read_marked
from medai_nb.phi.train import (
    AUTHORS,
    NameSource,
    carriers,
    collate_rows,
    other_code,
    other_date,
    other_email,
    other_name,
    other_phone,
    other_place,
    render,
    tags_of,
    train_model,
    training_rows,
    training_texts,
)

# --- marked texts ------------------------------------------------------------------------------------


def test_marks_become_spans():
    assert read_marked("Call {{NAME:Ludo}}\nin {{LOCATION:Ely}}.\n%%\n\n%%\nNo fever.\n") == [
        Passage("Call Ludo\nin Ely.", ((5, 9, "NAME"), (13, 16, "LOCATION"))),
        Passage("No fever."),
    ]


def test_an_unknown_label_is_refused_with_the_number_of_the_text():
    with pytest.raises(ValueError, match="text 2 has a mark PERSON"):
        read_marked("Fine.\n%%\n{{PERSON:x}}")


@pytest.mark.parametrize("author", AUTHORS)
def test_every_author_wrote_texts_that_are_marked_throughout(author):
    texts = carriers(author)
    assert len(texts) >= 170 or sum(len(text.text) for text in texts) > 100_000
    assert 0.3 * len(texts) < sum(not text.spans for text in texts)
    assert not any("{{" in text.text or "}}" in text.text for text in texts)
    for text in texts:
        assert all(text.text[start:end].strip() == text.text[start:end] != "" for start, end, _ in text.spans)


# --- other identifiers ---------------------------------------------------------------------------------


def test_rendered_spans_lie_on_the_new_words():
    source = NameSource(random.Random(1))
    passage = read_marked(
        "Dear {{NAME:Ana Perez}}, MRN {{MRN:4471}}, of {{LOCATION:Ely}}: {{NAME:Ana Perez}}."
    )[0]
    for _ in range(50):
        other = render(passage, source, keep=0)
        if "\ufffc" in other.text:  # redacted before
            continue
        values = [other.text[start:end] for start, end, _ in other.spans]
        assert [label for _, _, label in other.spans] == ["NAME", "MRN", "LOCATION", "NAME"]
        assert len(values[0]) == len(values[3])
        rest = other.text
        for start, end, _ in reversed(other.spans):
            rest = rest[:start] + rest[end:]
        assert len(rest) == len("Dear , MRN , of : .")


def test_what_was_redacted_before_is_no_identifier():
    source = NameSource(random.Random(1))
    passage = read_marked("{{NAME:Ana Perez}} and {{NAME:Ben Ruiz}} came on {{DATE:3/14/2021}}.")[0]
    redacted = [other for _ in range(60) if "\ufffc" in (other := render(passage, source)).text]
    assert redacted
    for other in redacted:
        assert not any("\ufffc" in other.text[start:end] for start, end, _ in other.spans)


def test_rendering_is_reproducible():
    def texts():
        return training_texts(carriers("c")[:10], seed=4, times=2, corpus_notes=0, icd_texts=5)

    assert texts() == texts()


def test_the_form_of_a_name_stays():
    source = NameSource(random.Random(2))
    for _ in range(30):
        assert len(other_name("TWK", "subject ", source)) == 3
        assert other_name("K", "Mrs. ", source).isupper()
        assert other_name("okafor", "dr ", source).islower()
        assert other_place("60614", source) in source.zip_codes
        assert other_place("Cook County", source).endswith(" County")


def test_names_for_tests_are_not_those_of_training():
    train, test = (NameSource(random.Random(3), part) for part in ("train", "test"))
    assert not {train.county() for _ in range(2000)} & {test.county() for _ in range(2000)}


@pytest.mark.parametrize(
    "old, form",
    [
        ("20210314", r"(19|20)\d{6}"),
        ("20210314082255", r"(19|20)\d{12}"),
        ("2021-03-14T08:22Z", r"\d{4}-\d\d-\d\dT\d\d:\d\d(:\d\d|Z)?"),
        ("the fourteenth of march", r"[a-z -]+"),
        ("Thanksgiving", r"(the )?[A-Za-z].+"),
        ("a fortnight hence", r"a fortnight hence"),
    ],
)
def test_a_date_stays_a_date_of_its_sort(old, form):
    rng = random.Random(7)
    for _ in range(100):
        assert re.fullmatch(form, other_date(old, rng))


def test_every_form_of_a_date_is_written_in_full():
    rng = random.Random(8)
    for old in ("3/14/2021", "3/14", "March 14", "the third", "mid-April"):
        for _ in range(300):
            assert not re.search(r"[{}]|None", other_date(old, rng))


def test_numbers_codes_and_addresses_keep_their_kind():
    rng = random.Random(9)
    for _ in range(50):
        assert len(re.sub(r"\D", "", other_phone("(417) 555-0193", rng)).removeprefix("1")) >= 9
        assert re.fullmatch(r"[A-Z]{2}-\d{4}/medtronic", other_code("PB-7730/medtronic", rng))
        assert other_phone("four one seven", rng) == "four one seven"
        assert re.fullmatch(r"[\w.-]+@[\w.]+", other_email("a@b.example", NameSource(rng)))
    assert other_code("SIGNATURE", rng) == "SIGNATURE"


# --- tags and training -----------------------------------------------------------------------------------


def test_tags_begin_and_continue_an_identifier():
    passage = read_marked("Ana {{NAME:van Perez}}, {{MRN:44}}, {{LOCATION:4 Oak St}}")[0]
    tags = [TAGS[tag] for tag in tags_of(Reading(passage.text), passage.spans)]
    assert tags == ["O", "B-NAME", "I-NAME", "O", "B-MRN", "O", "B-LOCATION", "I-LOCATION", "I-LOCATION"]


@pytest.mark.parametrize("author", AUTHORS)
def test_every_mark_has_a_tag(author):
    for passage in carriers(author):
        reading = Reading(passage.text)
        tags = tags_of(reading, passage.spans)
        for start, end, label in passage.spans:
            inside = {
                TAGS[tag][2:]
                for (first, last), tag in zip(reading.offsets, tags, strict=True)
                if first < end and start < last
            }
            assert label in inside, passage.text[start:end]


def test_a_batch_asks_for_tags_of_pieces_only():
    rows = training_rows(read_marked("Ana {{NAME:Perez}} came.\n%%\nNo fever"))
    batch = collate_rows(rows)
    assert batch["labels"].shape == batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["labels"][0].tolist() == [-100, 0, TAGS.index("B-NAME"), 0, 0, -100]
    assert batch["labels"][1].tolist() == [-100, 0, 0, -100, -100, -100]


def test_half_of_the_windows_are_cut_as_the_gate_cuts():
    passage = read_marked(" ".join("{{NAME:Perez}} sleeps well" for _ in range(50)))[0]
    whole = len(Reading(passage.text).ids)
    rows = training_rows([passage] * 200)
    lengths = [len(row["input_ids"]) for row in rows]
    assert 70 < sum(length < whole for length in lengths) < 130
    assert min(lengths) >= 2 * CONTEXT and rows[0].keys() == {"input_ids", "signs", "labels"}
    for row in rows:
        assert len(row["signs"]) == len(row["labels"]) == len(row["input_ids"])
        assert abs(sum(row["labels"] > 0) - len(row["labels"]) / 3) <= 1
    again = training_rows([passage] * 200)
    assert [row["input_ids"] for row in rows] == [row["input_ids"] for row in again]


def test_training_learns(tmp_path):
    passages = [passage for passage in carriers("c") if passage.spans and len(passage.text) < 300][:24]
    texts = training_texts(passages, times=12, corpus_notes=0, icd_texts=4)
    shown = train_model(tmp_path, texts, batch_size=8)
    assert shown["windows"] == 24 * 12 + 4
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    model = Model(tmp_path)
    hits = [
        any(span.start <= start and end <= span.end for span in seen)
        for passage in passages
        for seen in [list(model.see(passage.text).spans())]
        for start, end, _ in passage.spans
    ]
    assert len(hits) > 30 and sum(hits) > 0.6 * len(hits)
