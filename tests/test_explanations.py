"""The spans that carried a decision are found where the reasons are known; what is shown is escaped and without identifiers."""

import html
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from medai_nb.config import DataConfig, UserError
from medai_nb.evaluator import ClinicalEvaluator
from medai_nb.explanations import explain_decision, log_odds, sentence_spans, without_span, word_spans

WEIGHTS = {"pain": 2.0, "rash": -1.0, "exertion": 0.5}


class BagForSequenceClassification(torch.nn.Module):
    """Two classes whose log-odds are the sum of the weights of the words: each contribution is known."""

    config = SimpleNamespace(label2id={"heart": 0, "skin": 1})
    device = torch.device("cpu")

    def forward(self, input_ids, attention_mask):
        weights = torch.tensor([0.0, *WEIGHTS.values()])
        for_heart = (weights[input_ids] * attention_mask).sum(dim=1)
        return SimpleNamespace(logits=torch.stack([for_heart, torch.zeros(len(input_ids))], dim=1))


class WordTokenizer:
    model_max_length = 512

    def __call__(self, text, **options):
        known = {word: place for place, word in enumerate(WEIGHTS, start=1)}
        return {"input_ids": [known.get(word, 0) for word in re.findall(r"\w+", text.lower())]}

    def pad(self, rows, return_tensors):
        longest = max(map(len, rows["input_ids"]))
        ids = [row + [0] * (longest - len(row)) for row in rows["input_ids"]]
        return {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.ones(len(ids), longest, dtype=torch.long),
        }


@pytest.fixture(scope="module")
def bag():
    data = DataConfig(task="classification", max_length=64)
    return ClinicalEvaluator(
        BagForSequenceClassification(), WordTokenizer(), data=data, labels=["heart", "skin"]
    )


TEXT = "No fever since May.  Chest pain on exertion!\nA faint rash."


def test_each_span_contributes_exactly_its_weight(bag):
    explanation = explain_decision(bag, {"text": TEXT})
    assert (explanation.label, explanation.cut) == ("heart", False)
    assert explanation.log_odds == pytest.approx(1.5) and explanation.probability == pytest.approx(
        1 / (1 + np.exp(-1.5))
    )
    sentences = {TEXT[one.start : one.end]: one.value for one in explanation.sentences}
    assert sentences == pytest.approx(
        {"No fever since May.": 0, "Chest pain on exertion!": 2.5, "A faint rash.": -1}, abs=1e-5
    )
    words = {TEXT[one.start : one.end]: one.value for one in explanation.words}
    assert words == pytest.approx({"Chest": 0, "pain": 2, "on": 0, "exertion": 0.5}, abs=1e-5)


def test_another_label_is_explained_from_its_own_side(bag):
    other = explain_decision(bag, {"text": TEXT}, label="skin", words=False)
    assert other.log_odds == pytest.approx(-1.5) and other.words == []
    assert [one.value for one in other.sentences] == pytest.approx([0, -2.5, 1], abs=1e-5)


def test_of_a_single_sentence_the_words_are_explained(bag):
    explanation = explain_decision(bag, {"text": "chest pain, rash"}, words=False)
    assert explanation.sentences == [] and [one.value for one in explanation.words] == pytest.approx(
        [0, 2, -1], abs=1e-5
    )


def test_contributions_of_a_label_scorer_can_be_recomputed(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    labels = ["Circulatory system", "Respiratory system", "Skin"]
    evaluator = ClinicalEvaluator(
        model, AutoTokenizer.from_pretrained(tiny_llama), data=DataConfig(max_length=160), labels=labels
    )
    record = {"text": TEXT, "label": "Skin"}
    explanation = explain_decision(evaluator, record)
    place = labels.index(explanation.label)
    assert explanation.label == labels[int(evaluator.score_labels([record]).argmax())]
    for one in [*explanation.sentences, *explanation.words]:
        alone = evaluator.score_labels([record | {"text": without_span(TEXT, one.start, one.end)}])
        assert one.value == pytest.approx(explanation.log_odds - log_odds(alone, place)[0], abs=1e-3)
    assert len({round(one.value, 3) for one in explanation.sentences}) == 3
    long = explain_decision(evaluator, {"text": "Chest pain. " * 100}, words=False)
    assert long.cut and "its middle was not seen" in long.to_html() and "its middle was not seen" in str(long)


def test_log_odds_stay_exact_where_a_label_is_nearly_certain():
    scores = np.array([[0.0, -60.0, -61.0]])
    probabilities = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    assert log_odds(probabilities, 0)[0] == pytest.approx(60 - np.log1p(np.exp(-1)), abs=1e-9)


@pytest.mark.parametrize(
    "text, sentences",
    [
        ("Seen by Dr. Lee. Temp 38.5 today. OK?", ["Seen by Dr. Lee.", "Temp 38.5 today.", "OK?"]),
        ("- cough\n\n- rash, e.g. on\narms", ["- cough", "- rash, e.g. on", "arms"]),
        ("  One.  ", ["One."]),
        ("Pt. J. Smith is well. He left", ["Pt. J. Smith is well.", "He left"]),
        ("", []),
        ("no stop at all", ["no stop at all"]),
    ],
)
def test_sentences_end_where_a_reader_ends_them(text, sentences):
    spans = sentence_spans(text)
    assert [text[start:end] for start, end in spans] == sentences
    assert all(first[1] <= second[0] for first, second in zip(spans, spans[1:]))


def test_words_are_found_between_offsets_and_leaving_out_takes_the_space_behind():
    assert [TEXT[start:end] for start, end in word_spans("x" * 0 + TEXT, 21, 44)] == [
        "Chest",
        "pain",
        "on",
        "exertion",
    ]
    assert without_span("a  b c", 0, 1) == "b c" and without_span("a b c", 4, 5) == "a b "


def test_what_is_shown_is_escaped_marked_without_colour_and_free_of_identifiers(bag):
    text = "Mary Jones, MRN 4471893, called on 03/14/2024. <script>pain</script> & rash."
    explanation = explain_decision(bag, {"text": text})
    page, plain = explanation._repr_html_(), str(explanation)
    for shown in (page, plain):
        assert not re.search("Mary|Jones|4471893|03/14", shown) and "[NAME]" in shown
    assert "<script" not in page
    marked = re.findall(r'<span style="([^"]*)" title="([^"]*)">([^<]*)</span>', page)
    strongest = {content: (style, float(value)) for style, value, content in marked}
    assert strongest["pain"][1] == pytest.approx(2) and "underline" not in strongest["pain"][0]
    assert strongest["rash"][1] == pytest.approx(-1) and "underline" in strongest["rash"][0]
    open_page = explanation.to_html(redact=False)
    assert "<script" not in open_page
    assert text in html.unescape(re.sub("<[^>]*>", "", open_page)), "nothing of the text is lost or doubled"
    assert "Mary" not in json.dumps(explanation.to_dict())


@pytest.mark.parametrize(
    "record, label, message",
    [
        ({}, None, "two words or more"),
        ({"text": "pain!"}, None, "two words"),
        ({"text": TEXT}, "bone", "'bone' is not among"),
    ],
)
def test_what_cannot_be_explained_is_refused_in_words(bag, record, label, message):
    with pytest.raises(UserError, match=message):
        explain_decision(bag, record, label)
    with pytest.raises(UserError, match="between two labels or more"):
        explain_decision(ClinicalEvaluator(bag.model, bag.tokenizer), {"text": TEXT})
