"""Written answers are compared by text, by numbers with their units, by common words, and by meaning."""

import math

import numpy as np
import pandas as pd
import pytest

from medai_nb.answer_scores import embed_texts, embedding_similarity, exact_match, numbers_agree, quantities
from medai_nb.config import EvaluationConfig
from medai_nb.evaluation import comparison_table, generation_figures
from medai_nb.evaluator import ClinicalEvaluator
from medai_nb.metrics import rouge_l


@pytest.mark.parametrize(
    "one, other",
    [
        ("1,000 mg", "1000mg"),
        ("1,000 mg", "1 gram"),
        ("0.25 mg", ".25 milligrams"),
        ("250 µg", "0.250 mg"),
        ("250 μg", "250 micrograms"),  # two letters of Unicode that look alike
        ("5 mg/kg/day", "5 mg per kg per day"),
        ("90 mg/dL", "0.9 g/L"),
        ("1 week", "7 days"),
        ("5–10 ml", "5 mL to 10 mL"),
        ("BP 120/80", "120/80"),
        ("37 °C", "37°C"),
        ("1) 5 mg\n2) 7 mg", "5 mg, 7 mg"),
        ("7.50 %", "7.5 percent"),
        ("dose of 5 mg.", "5 mg"),
    ],
)
def test_one_quantity_has_many_spellings(one, other):
    assert quantities(one) == quantities(other) != []


@pytest.mark.parametrize(
    "one, other",
    [
        ("5 mg", "50 mg"),
        ("5 mg", "5 mcg"),
        ("5 mg", "5"),
        ("5 mg/kg", "5 mg"),
        ("-2 °C", "2 °C"),
        ("1.5 L", "15 L"),
    ],
)
def test_different_quantities_stay_different(one, other):
    assert quantities(one) != quantities(other)


@pytest.mark.parametrize(
    "text", ["vitamin B12", "COVID-19", "L4-L5", "the 2nd visit", "the 4th", "two tablets", ""]
)
def test_numbers_of_a_name_and_words_are_no_quantities(text):
    assert quantities(text) == []


@pytest.mark.parametrize(
    "answer, reference, agrees",
    [
        ("Give 1 g twice, for 5 days", "1000 mg", 1),
        ("Give 100 mg", "1000 mg", 0),
        ("Give 1000", "1000 mg", 0),
        ("Give 1000 mg or 500 mg", "1000 mg", 0),
        ("Give 500 mg", "500 mg for 7 days", 0),
        ("BP was 150/90, pulse 80", "150/90", 0),  # 80 is another bare number: it may be the pulse or a slip
        ("BP was 150/90 mmHg, pulse 80", "150/90 mmHg", 1),
        ("Rest.", "Rest.", math.nan),
        ("Take 5 mg.", "Rest.", math.nan),
        ("", "5 mg", 0),
    ],
)
def test_an_answer_agrees_when_no_quantity_is_missing_or_contradicted(answer, reference, agrees):
    assert numbers_agree(answer, reference) == pytest.approx(agrees, nan_ok=True)


def test_only_case_white_space_and_outer_punctuation_may_differ_in_an_exact_match():
    assert exact_match("Yes.", "yes") == exact_match("a\n b", "A B") == 1
    assert exact_match("0.5 mg", "05 mg") == exact_match("yes, no", "yes no") == exact_match("", "yes") == 0


@pytest.mark.parametrize(
    "answer, reference, score",
    [
        (
            "police killed the gunman",
            "police kill the gunman",
            2 * 3 / 8,
        ),  # Lin 2004, section 3: 3 of 4 words in order
        ("the gunman kill police", "police kill the gunman", 2 * 2 / 8),
        ("a b c", "x y z", 0),
        ("a b c d", "a c", 2 * 2 / 6),
        ("", "", 1),
        ("", "a", 0),
    ],
)
def test_rouge_l_gives_what_is_counted_by_hand(answer, reference, score):
    assert rouge_l(answer, reference) == pytest.approx(score)


def test_meaning_is_closer_for_paraphrases_whatever_stands_in_the_same_batch():
    reference = "The patient was given an antibiotic for pneumonia."
    answers = [
        "Pneumonia was treated with amoxicillin.",
        "The patient was given a wheelchair.",
        "Prices rose last year.",
        "",
    ]
    similar = embedding_similarity(answers, [reference] * 4)
    assert similar[0] > similar[1] > similar[2] and similar[3] == 0
    assert embedding_similarity(["", reference], ["", reference]) == pytest.approx([1, 1])
    alone = [embedding_similarity([answer], [reference])[0] for answer in answers]
    assert similar == pytest.approx(alone, abs=1e-5), "padding must not count"
    vectors = embed_texts([reference, "word " * 2000])
    assert vectors.shape == (2, 384) and np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1])


def frame(agree):
    count = len(agree)
    scores = {"exact_match": 0.0, "token_f1": 0.5, "rouge_l": 0.5, "similarity": 0.5, "answer_nll": 1.0}
    return pd.DataFrame({"patient_id": [f"p{row}" for row in range(count)], "numbers_agree": agree, **scores})


def test_agreement_of_numbers_is_averaged_over_the_references_that_have_some():
    evaluator = ClinicalEvaluator(None, None, settings=EvaluationConfig(bootstrap_samples=100))
    base, tuned = frame([0, math.nan, 1, 0]), frame([1, math.nan, 1, 0])
    figures = generation_figures({"base": base, "tuned": tuned}, evaluator)
    assert (figures["records"], figures["records_with_numbers"]) == (4, 3)
    assert figures["tuned"]["numbers_agree"]["value"] == pytest.approx(2 / 3)
    assert figures["difference"]["numbers_agree"]["value"] == pytest.approx(1 / 3)
    assert "numbers and units agree" in comparison_table({"generation": figures}).index
    without = generation_figures({"tuned": frame([math.nan] * 3)}, evaluator)
    assert "numbers_agree" not in without["tuned"] and without["records_with_numbers"] == 0
