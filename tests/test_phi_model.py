"""The trained model: what it is fed, what it finds, and that it does so the same way everywhere."""

import multiprocessing
import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from medai_nb.demo_corpus import Passage
from medai_nb.phi.model import (
    AUTHORS,
    Model,
    NameSource,
    Reader,
    carriers,
    compare,
    model_spans,
    other_name,
    other_place,
    read_marked,
    render,
    sentences,
    tags_of,
    tokens_of,
    train_model,
    training_texts,
    using,
)
from medai_nb.phi.words import words_of


def found(text):
    return [text[span.start : span.end] for span in model_spans(text, words_of(text))]


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
def test_every_author_wrote_texts_with_and_without_identifiers(author):
    texts = carriers(author)
    assert sum(bool(text.spans) for text in texts) >= 90
    assert sum(not text.spans for text in texts) >= 80
    assert not any("{{" in text.text or "}}" in text.text for text in texts)


# --- other names -------------------------------------------------------------------------------------


def test_rendered_spans_lie_on_the_new_words():
    source = NameSource(random.Random(1))
    passage = read_marked(
        "Dear {{NAME:Ana Perez}}, MRN {{MRN:4471}}, of {{LOCATION:Ely}}: {{NAME:Ana Perez}}."
    )[0]
    for _ in range(50):
        other = render(passage, source, keep=0)
        values = [other.text[start:end] for start, end, _ in other.spans]
        assert [label for _, _, label in other.spans] == ["NAME", "MRN", "LOCATION", "NAME"]
        assert len(values[0]) == len(values[3])
        rest = other.text
        for start, end, _ in reversed(other.spans):
            rest = rest[:start] + rest[end:]
        assert len(rest) == len("Dear , MRN , of : .")


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


# --- tokens, sentences, tags --------------------------------------------------------------------------


def test_tokens_cover_every_sign():
    for passage in carriers("c")[:30]:
        tokens = tokens_of(passage.text, words_of(passage.text))
        covered = {place for token in tokens for place in range(token.start, token.end)}
        left = {char for place, char in enumerate(passage.text) if place not in covered}
        assert left <= set(" \t'’sS")  # a possessive belongs to no token


def test_sentences_without_a_candidate_are_not_read():
    text = "no fever, no chills. mavis called. take it with food"
    tokens = tokens_of(text, words_of(text))
    assert [text[tokens[first].start : tokens[end - 1].end] for first, end in sentences(tokens)] == [
        "mavis called."
    ]


def test_a_title_does_not_end_a_sentence():
    text = "Saw Dr. Okafor today."
    assert [*sentences(tokens_of(text, words_of(text)))] == [(0, 6)]


def test_tags_begin_and_continue_an_identifier():
    passage = read_marked("Ana {{NAME:van Perez}}, {{MRN:44}}, {{LOCATION:4 Oak St}}")[0]
    tags = tags_of(tokens_of(passage.text, words_of(passage.text)), passage.spans)
    assert tags == ["O", "B-NAME", "I-NAME", "O", "O", "O", "B-LOCATION", "I-LOCATION", "I-LOCATION"]


def test_a_name_is_no_feature_by_itself():
    texts = ("Spoke with Okonjowe today", "Spoke with Wexlerowe today")
    rows = [Reader(text, words_of(text)).features(0, 4)[2] for text in texts]
    differing = set(rows[0]) ^ set(rows[1])
    assert all(feature.startswith(("begins=", "ends=", "length=")) for feature in differing)


# --- training ----------------------------------------------------------------------------------------


def test_training_is_deterministic_and_learns(tmp_path):
    texts = training_texts(carriers("c")[:40], times=3, corpus_notes=0, icd_texts=10)
    for name in ("one", "two"):
        shown = train_model(tmp_path / name, texts, iterations=30)
    assert shown["texts"] == 130
    data = (tmp_path / "one").read_bytes()
    assert data == (tmp_path / "two").read_bytes()
    counts = compare(carriers("c")[:40], lambda text: [], Model(data))
    assert counts["identifiers"] > 50 and counts["model"] > 0.6 * counts["identifiers"]


# --- the shipped model --------------------------------------------------------------------------------

FOUND = [
    ("pt moved here from brockhurst", "brockhurst"),
    ("pls tell mavis that her results are ok", "mavis"),
    ("Nurse Comfort says the wound vac keeps alarming.", "Comfort"),
    ("1. Szpak - DKA closed gap, eating", "Szpak"),
    ("Discussed with Bronwyn (case manager).", "Bronwyn"),
    ("She named the baby Aurelio.", "Aurelio"),
    ("Staying with cousin Tay for now.", "Tay"),
    ("she works at harlow mills and her boss said ok", "harlow mills"),
]
LEFT_ALONE = [
    "",
    " \n",
    "Hawkins sign positive, Fournier gangrene excluded.",
    "Start Eliquis 5 mg BID, stop Xarelto.",
    "Weber B fracture, Braden 17, Morse 45.",
    "Born in the Philippines, moved to North Carolina as a child.",
    "follow up in 6 wk, o2 sat 97%, tramadol prn",
]


@pytest.mark.parametrize("text, name", FOUND)
def test_found(text, name):
    assert any(name in value for value in found(text))


@pytest.mark.parametrize("text", LEFT_ALONE)
def test_left_alone(text):
    assert found(text) == []


def test_spans_are_ordered_disjoint_and_explained_without_the_text():
    for passage in carriers("c")[:60]:
        end = 0
        for span in model_spans(passage.text, words_of(passage.text)):
            assert end <= span.start < span.end <= len(passage.text)
            assert span.detector == "model" and 0 < span.score <= 1
            assert span.reason == f"trained model, p={span.score:.2f}"
            assert span.label in ("NAME", "LOCATION")
            end = span.end


def test_a_placeholder_is_no_name():
    text = "Nurse \ufffc\ufffc\ufffc says hello to \ufffc\ufffc."
    assert found(text) == []


def test_a_scanned_name_goes_as_a_whole():
    text = "D/w pt and wife Estel1e at bedside"
    values = found(text)
    assert not any(value.startswith("Estel") and value != "Estel1e" for value in values)


def test_workers_and_threads_find_the_same():
    texts = [passage.text for passage in carriers("c")[:20]]
    expected = [found(text) for text in texts]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(found, texts)) == expected
    with multiprocessing.get_context("fork").Pool(2) as workers:
        assert workers.map(found, texts) == expected


def test_another_model_is_used_within_its_block_only():
    text = FOUND[0][0]
    expected = found(text)
    with using(None):
        assert found(text) == []
    assert found(text) == expected
