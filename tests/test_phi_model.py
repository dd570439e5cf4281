"""The trained model: what it is fed, what it finds, and that it does so the same way everywhere."""

import math
import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib import resources

import numpy as np
import pytest
import torch

import medai_nb.phi.model
from medai_nb.phi.model import (
    CONTEXT,
    SIGNS,
    STEP,
    TAGS,
    WINDOW,
    Model,
    Reading,
    RowReader,
    Seen,
    TokenClassifier,
    collate,
    pack,
    shipped_model,
    windows,
)
from medai_nb.phi.patterns import PHI_LABELS
from medai_nb.phi.score import evaluation_texts
from medai_nb.phi.train import carriers

ADAPTER = resources.files("medai_nb").joinpath("assets/phi_model")


def found(text):
    return [text[span.start : span.end] for span in shipped_model().see(text).spans()]


def thought(text, tags):
    """What a model would have seen that is certain of a tag for each piece, `(tag, probability)`."""
    reading = Reading(text)
    assert len(reading.ids) == len(tags)
    probabilities = np.zeros((len(tags), len(TAGS)), dtype=np.float32)
    for place, (tag, probability) in enumerate(tags):
        probabilities[place, TAGS.index(tag)] = probability
        probabilities[place, 0] += 1 - probability
    return Seen(reading, probabilities)


# --- what the model sees -------------------------------------------------------------------------------


def test_every_letter_and_digit_belongs_to_a_piece():
    for passage in carriers("c")[:60]:
        reading = Reading(passage.text)
        covered = {place for start, end in reading.offsets for place in range(start, end)}
        assert not [
            char for place, char in enumerate(passage.text) if char.isalnum() and place not in covered
        ]
        assert reading.signs.shape == (len(reading.ids), len(SIGNS))


def test_case_lines_and_lengths_of_numbers_are_seen():
    text = "Will will\nWILL 45402 4/5"
    reading = Reading(text)
    signs = [{SIGNS[sign] for sign in np.flatnonzero(row)} for row in reading.signs]
    assert "title case" in signs[0] and "lower" in signs[1] and {"caps", "begins a line"} <= signs[2]
    assert any({"5 digits", "ZIP code"} <= row for row in signs)
    assert "joined" in signs[-1] and "1 digits" in signs[-1]


def test_windows_cover_every_piece_and_overlap():
    for length in (1, WINDOW, WINDOW + 1, 1000):
        ranges = windows(length)
        assert {place for first, end in ranges for place in range(first, end)} == set(range(length))
        assert all(end - first <= WINDOW for first, end in ranges)
        assert all(following[0] < before[1] for before, following in zip(ranges, ranges[1:], strict=False))


def test_padding_changes_no_answer():
    network = shipped_model().network
    short, long = Reading("Seen by Dr. Okafor."), Reading("A longer text. " * 9)
    alone = network(**collate([(short.ids, short.signs)]))["logits"][0]
    beside = network(**collate([(short.ids, short.signs), (long.ids, long.signs)]))["logits"][0]
    torch.testing.assert_close(alone, beside[: len(alone)], atol=0.1, rtol=0.02)


def test_the_merged_adapter_is_what_peft_merges():
    from peft import PeftModel

    merged = PeftModel.from_pretrained(TokenClassifier(), str(ADAPTER)).merge_and_unload()
    ours = Model(ADAPTER).network
    dtype = next(ours.parameters()).dtype
    for (name, one), other in zip(
        merged.to(dtype).state_dict().items(), ours.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name


def changed_adapter(folder, change):
    from safetensors.torch import load_file, save_file

    weights = load_file(str(ADAPTER / "adapter_model.safetensors"))
    change(weights)
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text((ADAPTER / "adapter_config.json").read_text())
    return folder


def test_weights_of_another_network_are_refused(tmp_path):
    more = changed_adapter(
        tmp_path, lambda weights: weights.update({"base_model.model.tail.weight": torch.zeros(2)})
    )
    with pytest.raises(ValueError, match="tail.weight belongs to another network"):
        Model(more)


def test_weights_that_are_missing_are_named(tmp_path):
    less = changed_adapter(tmp_path, lambda weights: weights.pop("base_model.model.gate.out.bias"))
    with pytest.raises(ValueError, match="gate.out.bias is missing"):
        Model(less)


# --- the gate, and parts in a row ------------------------------------------------------------------------


def test_parts_in_a_row_are_read_as_if_each_were_alone():
    network = TokenClassifier().eval()
    readings = [Reading("Seen by Dr. Okafor."), Reading("no fever, sleeps well"), Reading("Ely, 3/14")]
    parts = [(reading.ids, reading.signs) for reading in readings]
    row = pack(parts)
    with torch.inference_mode():
        together, read = network(**row)["logits"][0], RowReader(network)(**row)
        position = 0
        for part in parts:
            alone = network(**collate([part]))["logits"][0]
            for logits in (together, read):
                own = logits[position : position + len(alone)]
                torch.testing.assert_close(own, alone, atol=1e-4, rtol=1e-4)
            position += len(alone)
    assert position < len(together) == len(read) == STEP * math.ceil(position / STEP)


@pytest.mark.parametrize("words", [1, 3, 60, 200])
def test_the_gate_opens_as_it_was_trained_to(words):
    network = TokenClassifier().eval()
    reading = Reading("seen by bronwyn okonjo at 3 Elm Street, " * words)
    with torch.inference_mode():
        trained = network.gate(
            network.embed(torch.tensor([reading.ids]), torch.from_numpy(reading.signs[None]))
        )
        opened = torch.from_numpy(RowReader(network).gate(reading))
    torch.testing.assert_close(opened, trained[0].sigmoid(), atol=1e-5, rtol=1e-4)


def read_pieces(model, text, monkeypatch):
    """How many pieces the encoder reads, with their ends, to see a text."""
    read = []
    pack = medai_nb.phi.model.pack
    with monkeypatch.context() as patched:
        patched.setattr(
            medai_nb.phi.model,
            "pack",
            lambda parts: read.extend(len(ids) + 2 for ids, _ in parts) or pack(parts),
        )
        model._read(text, None)
    return sum(read)


def test_only_surroundings_of_what_may_be_an_identifier_are_read(monkeypatch):
    model = shipped_model()
    line = "the wound is clean and dry, the dressing was changed, there is no fever. "
    assert read_pieces(model, 40 * line, monkeypatch) == 0
    assert model._read(40 * line, None).scores.max() == 0
    named = 20 * line + "discussed with bronwyn okonjo. " + 20 * line
    pieces = len(Reading(named).ids)
    assert 2 * CONTEXT < read_pieces(model, named, monkeypatch) < pieces / 4
    everything = Model(ADAPTER, candidate=0)
    assert read_pieces(everything, named, monkeypatch) > pieces


def test_the_gate_keeps_no_identifier_back():
    everything = Model(ADAPTER, candidate=0)
    compared = 0
    for passage in [passage for passage in evaluation_texts("hard") if passage.spans][:60]:
        whole, gated = ([*model.see(passage.text).spans()] for model in (everything, shipped_model()))
        for start, end, _ in passage.spans:
            seen = [any(span.start < end and start < span.end for span in spans) for spans in (whole, gated)]
            compared += seen[0]
            assert seen[1] or not seen[0], passage.text[start:end]
    assert compared > 300


def test_ranges_lie_within_the_text_and_hold_their_surroundings():
    model = Model(ADAPTER, candidate=0.5)
    for passage in carriers("m")[:30]:
        reading = Reading(passage.text)
        with torch.inference_mode():
            ranges = model._ranges(reading)
        assert all(0 <= begin < end <= len(reading.ids) for begin, end in ranges)
        assert all(end - begin <= WINDOW for begin, end in ranges)
        assert all(end - begin > CONTEXT or end - begin == len(reading.ids) for begin, end in ranges)


# --- from probabilities to spans -----------------------------------------------------------------------


def spans(text, tags, **settings):
    return [(text[span.start : span.end], span.label) for span in thought(text, tags).spans(**settings)]


def test_a_span_reaches_over_weak_neighbours_and_not_beyond():
    text = "the seventh and the eighth came"
    weak, sure, none = ("I-DATE", 0.04), ("I-DATE", 0.9), ("O", 0)
    assert spans(text, [none, sure, weak, weak, sure, none]) == [("seventh and the eighth", "DATE")]
    assert spans(text, [none, sure, none, none, sure, none]) == [("seventh", "DATE"), ("eighth", "DATE")]
    assert spans(text, [weak] * 6) == []


def test_another_kind_or_another_beginning_ends_a_span():
    text = "ana perez june ben"
    tags = [("B-NAME", 0.9), ("I-NAME", 0.9), ("B-DATE", 0.9), ("B-NAME", 0.9)]
    assert spans(text, tags) == [("ana perez", "NAME"), ("june", "DATE"), ("ben", "NAME")]


def test_a_bracket_between_two_kinds_belongs_to_neither():
    text = "perez (44)"
    tags = [("B-NAME", 0.9), ("I-NAME", 0.06), ("B-MRN", 0.9), ("O", 0)]
    assert spans(text, tags) == [("perez", "NAME"), ("44", "MRN")]


@pytest.mark.parametrize("between", ["\n", "\t", " \n ", " \t"])
def test_a_line_end_or_a_tab_ends_a_span(between):
    tags = [("B-NAME", 0.9), ("I-NAME", 0.9)]
    assert spans(f"ana{between}perez", tags) == [("ana", "NAME"), ("perez", "NAME")]


def test_a_word_goes_whole_when_one_of_its_pieces_does():
    reading = Reading("Xyloqwertz came")
    pieces = len(reading.ids)
    assert pieces > 2
    tags = [("O", 0)] * (pieces - 1)
    tags[1] = ("I-NAME", 0.8)
    assert spans("Xyloqwertz came", [*tags, ("O", 0)]) == [("Xyloqwertz", "NAME")]


@pytest.mark.parametrize(
    "text, label",
    [
        ("Ohio", "LOCATION"),
        ("new zealand", "LOCATION"),
        ("89", "AGE"),
        ("2019", "DATE"),
        ("nineteen eighty five", "DATE"),
        ("two thousand and seven", "DATE"),
    ],
)
def test_what_safe_harbor_lets_stand_is_no_span(text, label):
    tags = [(f"B-{label}", 0.99), *[(f"I-{label}", 0.99)] * (len(Reading(text).ids) - 1)]
    assert spans(text, tags) == []


def test_a_placeholder_is_never_part_of_a_span():
    text = "ana \ufffc\ufffc\ufffc perez"
    assert spans(text, [("B-NAME", 0.9), ("I-NAME", 0.9), ("I-NAME", 0.9)]) == [
        ("ana", "NAME"),
        ("perez", "NAME"),
    ]


def test_signs_without_letters_are_no_span():
    assert spans("-- !!", [("B-NAME", 0.9)] * len(Reading("-- !!").ids)) == []


# --- the shipped model ---------------------------------------------------------------------------------

FOUND = [
    ("pt moved here from brockhurst", "brockhurst"),
    ("pls tell mavis that her results are ok", "mavis"),
    ("Nurse Comfort says the wound vac keeps alarming.", "Comfort"),
    ("1. Szpak - DKA closed gap, eating", "Szpak"),
    ("Discussed with Bronwyn (case manager).", "Bronwyn"),
    ("She named the baby Aurelio.", "Aurelio"),
    ("Staying with cousin Tay for now.", "Tay"),
    ("she works at harlow mills and her boss said ok", "harlow mills"),
    ("he was discharged on the morning of the 21st", "21st"),
    ("my grandmother is ninety-four and lives alone", "ninety-four"),
    ("reach me on four one seven, five five five, oh one nine three", "five five five"),
]
LEFT_ALONE = [
    "",
    " \n",
    "Hawkins sign positive, Fournier gangrene excluded.",
    "Start Eliquis 5 mg BID, stop Xarelto.",
    "Weber B fracture, Braden 17, Morse 45.",
    "Born in the Philippines, moved to North Carolina as a child.",
    "follow up in 6 wk, o2 sat 97%, tramadol prn",
    "Influenza peaks between December and February in temperate climates.",
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
        for span in shipped_model().see(passage.text).spans():
            assert end <= span.start < span.end <= len(passage.text)
            assert span.detector == "model" and 0 < span.score <= 1
            assert span.reason == f"trained model, p={span.score:.2f}"
            assert span.label in PHI_LABELS
            end = span.end


def test_beside_placeholders_nothing_is_suspected():
    assert found("Nurse \ufffc\ufffc\ufffc says hello to \ufffc\ufffc.") == []


def test_a_long_text_is_found_in_from_end_to_end():
    line = "The wound is clean and dry, dressing changed, no fever. "
    text = "Seen with Bronwyn Okonjo. " + 120 * line + "Discussed with Bronwyn Okonjo."
    values = found(text)
    assert values[0] == values[-1] == "Bronwyn Okonjo"


def test_workers_and_threads_find_the_same():
    texts = [passage.text for passage in carriers("c")[:12]]
    expected = [found(text) for text in texts]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(found, texts)) == expected
    with multiprocessing.get_context("fork").Pool(2) as workers:
        assert workers.map(found, texts) == expected
        workers.close()
        workers.join()


def test_a_worker_can_be_forked_while_another_thread_opens_the_model():
    from medai_nb.phi import model

    opened = threading.Event()
    with model._lock, multiprocessing.get_context("fork").Pool(1) as workers:
        opened.set()
        assert workers.apply(found, ("Discussed with Bronwyn.",)) == ["Bronwyn"]
        workers.close()
        workers.join()


def test_the_model_opens_whole_while_training_under_zero_3_goes_on_and_draws_no_random_numbers():
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

    alive = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    before = torch.get_rng_state()
    try:
        assert is_deepspeed_zero3_enabled() and alive.is_zero3()
        model = Model(ADAPTER)
    finally:
        unset_hf_deepspeed_config()
    assert torch.equal(torch.get_rng_state(), before)
    parameters = dict(model.network.named_parameters())
    assert all(parameter.numel() and not hasattr(parameter, "ds_id") for parameter in parameters.values())
    text = "Seen by Dr. Angela Whitcombe in clinic."
    assert list(model.see(text).spans()) == list(shipped_model().see(text).spans())
