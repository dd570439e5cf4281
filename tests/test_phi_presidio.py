"""Presidio in both directions. With a stand-in everywhere; with Presidio itself where the extra is installed."""

import importlib.util
import pickle
import re
from types import SimpleNamespace

import pytest

from medai_nb.config import UserError
from medai_nb.phi.patterns import PHI_LABELS
from medai_nb.phi.presidio import FROM_PRESIDIO, TO_PRESIDIO, PresidioLayer, medai_recognizer
from medai_nb.phi.redact import METHODS, PHIRedactor

KEY = b"a key for tests, nothing else"
with_presidio = pytest.mark.skipif(
    not importlib.util.find_spec("presidio_analyzer"), reason="the extra presidio is not installed"
)


class Birds:
    """What a recognizer of Presidio looks like from outside."""

    supported_entities = ["PERSON", "NRP"]

    def __init__(self, pattern: str = r"\b(heron|wren)\b", entity: str = "PERSON", score: float = 0.6):
        self.pattern, self.entity, self.score = pattern, entity, score

    def analyze(self, text, entities, nlp_artifacts):
        assert nlp_artifacts is None and set(entities) <= set(self.supported_entities)
        return [
            SimpleNamespace(entity_type=self.entity, start=match.start(), end=match.end(), score=self.score)
            for match in re.finditer(self.pattern, text)
        ]


def test_every_label_has_an_entity_and_comes_back():
    assert all(FROM_PRESIDIO[TO_PRESIDIO[label]] == label for label in PHI_LABELS)


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_adds_to_what_is_found_and_twice_is_still_once(method):
    redactor = PHIRedactor(method, key=KEY, layers=[PresidioLayer(Birds())])
    redacted, spans = redactor.redact_text("heron told Dr. Kumar of a wren")
    assert [span.label for span in spans] == ["NAME"] * 3
    assert [span.detector == "presidio" for span in spans] == [True, False, True]
    assert not any(value in redacted for value in ("heron", "Kumar", "wren"))
    assert redactor.redact_phi(redacted) == redacted


def test_a_layer_does_not_reach_into_placeholders():
    redactor = PHIRedactor(layers=[PresidioLayer(Birds(r"\S+ heron|NAME|\S+ wren"))])
    once = redactor.redact_phi("Dr. Kumar heron and [NAME] wren")
    assert once == "Dr. [NAME] and [NAME] [NAME]" and redactor.redact_phi(once) == once


def test_scores_entities_and_groups_are_respected():
    assert PresidioLayer(Birds(score=0.3), min_score=0.5)("heron") == []
    assert PresidioLayer(Birds(entity="NRP"))("heron") == [], "a religion identifies nobody"
    assert PresidioLayer(Birds(entity="XY_TAX"))("heron")[0].label == "OTHER_ID"
    engine = SimpleNamespace(
        analyze=lambda text, entities, language: [
            SimpleNamespace(entity_type="GPE", start=0, end=5, score=0.85) for _ in [entities, language]
        ]
    )
    assert {span.label for span in PresidioLayer(engine, ["GPE"])("heron")} == {"LOCATION"}
    with pytest.raises(UserError, match="analyze"):
        PresidioLayer(object())


def test_a_redactor_with_a_layer_goes_to_worker_processes():
    redactor = pickle.loads(pickle.dumps(PHIRedactor(layers=[PresidioLayer(Birds())])))
    assert redactor.redact_phi("heron") == "[NAME]"


def test_without_presidio_the_recognizer_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "presidio_analyzer", None)
    with pytest.raises(UserError, match=r"medai_nb\[presidio\]"):
        medai_recognizer()


# ---------------------------------------------------------------- with Presidio itself


@pytest.fixture
def engine():
    spacy = pytest.importorskip("spacy")
    from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
    from presidio_analyzer.nlp_engine import SpacyNlpEngine

    class BlankEngine(SpacyNlpEngine):
        def __init__(self):
            super().__init__()
            self.nlp = {"en": spacy.blank("en")}

    registry = RecognizerRegistry(recognizers=[medai_recognizer()])
    return AnalyzerEngine(registry=registry, nlp_engine=BlankEngine(), supported_languages=["en"])


@with_presidio
def test_our_detection_answers_in_an_engine_of_presidio(engine):
    text = "Seen by Dr. Kumar on 3/14/2021, MRN: 4482913."
    results = engine.analyze(text, language="en", return_decision_process=True)
    found = {(result.entity_type, text[result.start : result.end]) for result in results}
    assert found == {("PERSON", "Kumar"), ("DATE_TIME", "3/14/2021"), ("MRN", "4482913")}
    assert all(result.recognition_metadata["recognizer_name"] == "medai_nb" for result in results)
    assert "title" in results[0].analysis_explanation.textual_explanation or len(results) == 3
    only = engine.analyze(text, language="en", entities=["PERSON"])
    assert [result.entity_type for result in only] == ["PERSON"]


@with_presidio
def test_a_recognizer_of_presidio_is_a_layer_of_ours(engine):
    from presidio_analyzer import Pattern, PatternRecognizer
    from presidio_analyzer.predefined_recognizers import EmailRecognizer, IbanRecognizer

    assert [span.label for span in PresidioLayer(IbanRecognizer())("from DE89370400440532013000")] == [
        "ACCOUNT"
    ]
    assert [span.label for span in PresidioLayer(EmailRecognizer())("a.b@example.com")] == ["EMAIL"]
    birds = PatternRecognizer("PERSON", patterns=[Pattern("bird", r"\bheron\b", 0.8)])
    redactor = PHIRedactor(layers=[PresidioLayer(birds), PresidioLayer(engine)])
    assert redactor.redact_phi("heron saw Dr. Kumar") == "[NAME] saw Dr. [NAME]"
    assert (
        pickle.loads(pickle.dumps(PHIRedactor(layers=[PresidioLayer(birds)]))).redact_phi("heron") == "[NAME]"
    )
