"""Gaps between groups are those of exact cases by hand and of Fairlearn's definitions; small groups are flagged, not hidden."""

import itertools
import json

import matplotlib
import numpy as np
import pandas as pd
import pytest
import sklearn.metrics

from medai_nb import fairness, metrics
from medai_nb.config import UserError

matplotlib.use("Agg")

LABELS = ["heart", "lung", "skin"]


def random_case(seed=0, rows=240, people=120):
    generator = np.random.default_rng(seed)
    codes = generator.integers(3, size=rows)
    scores = generator.normal(size=(rows, 3)) + 1.5 * np.eye(3)[codes]
    chances = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    frame = pd.DataFrame(
        {
            "id": [str(row) for row in range(rows)],
            "patient_id": [f"p{row % people}" for row in range(rows)],
            "label": [LABELS[code] for code in codes],
            "predicted": [LABELS[code] for code in chances.argmax(axis=1)],
            "probability": chances.max(axis=1),
            "age": [["12", 30, "50 years", "70", "90+"][row % 5] for row in range(rows)],
            "gender": [["F", "M"][row % people % 2] for row in range(rows)],
        }
    )
    return frame, chances


# --- groups ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, band",
    [
        (0, "0-17"),
        (17, "0-17"),
        (17.9, "0-17"),
        (18, "18-39"),
        (np.int64(64), "40-64"),
        ("65", "65-79"),
        (" 45 years old", "40-64"),
        ("45-year-old", "40-64"),
        ("45yo", "40-64"),
        ("67 y", "65-79"),
        ("90+", "80 and over"),
        ("90 or older", "80 and over"),
        ("90 years and over", "80 and over"),
        (">89", "80 and over"),
        ("over 89", "80 and over"),
        (">= 80", "80 and over"),
        ("<18", "0-17"),
        ("under 18 years", "0-17"),
        ("40-49", "40-64"),
        ("40–49", "40-64"),
        ("6 months", "0-17"),
        ("3 days old", "0-17"),
        ("", "not stated"),
        (None, "not stated"),
        (float("nan"), "not stated"),
        ("60-69", "not readable"),  # in two bands
        (">50", "not readable"),
        ("49-40", "not readable"),
        ("elderly", "not readable"),
        (-1, "not readable"),
        (131, "not readable"),
        ("1945", "not readable"),
        (True, "not readable"),
        ([45], "not readable"),
    ],
)
def test_an_age_is_placed_in_the_band_that_holds_all_of_it(value, band):
    assert fairness.age_bands([value]) == [band]


def test_the_bands_are_the_callers_and_must_ascend():
    assert fairness.age_bands([49, 50, "51"], begins=[50]) == ["0-49", "50 and over", "50 and over"]
    for begins in ([], [40, 18], [18, 18], [0, 18]):
        with pytest.raises(UserError, match="ascending"):
            fairness.age_bands([1], begins)


def test_only_columns_of_ages_become_bands():
    assert fairness.group_names([45, 46], "maternal_age") == ["40-64", "40-64"]
    assert fairness.group_names([45, 46], "stage") == ["45", "46"]
    assert fairness.group_names(["adult", "child"], "age") == ["adult", "child"]


def test_spelling_makes_no_groups_and_a_missing_value_makes_one():
    values = ["Female", "female ", "FEMALE", "Male", None, float("nan"), "Female"]
    assert fairness.group_names(values, "gender") == ["Female"] * 3 + [
        "Male",
        "not stated",
        "not stated",
        "Female",
    ]
    assert fairness.group_names([1.0, 2.0, float("nan")], "ward") == ["1", "2", "not stated"]


def test_very_many_values_are_united_and_counted():
    values = [f"ward {row}" for row in range(50)] + ["ward 3"] * 5 + [None]
    names = fairness.group_names(values, "ward")
    assert len(names) == 56 and len(set(names)) == 21, "19 wards, the others, and those without one"
    assert names.count("ward 3") == 6 and names.count("other (31 values)") == 31 and "not stated" in names


# --- figures ---------------------------------------------------------------------------------------


def test_figures_of_a_group_are_those_of_its_records_alone():
    frame, chances = random_case(1)
    report = fairness.fairness_report(frame, LABELS, chances, resamples=100)
    for column, group in (("gender", "F"), ("age", "80 and over")):
        inside = np.array([name == group for name in fairness.group_names(list(frame[column]), column)])
        part = frame[inside]
        figures = report["columns"][column]["groups"][group]
        alone = metrics.classification_report(
            list(part["label"]), list(part["predicted"]), LABELS, chances[inside], resamples=100
        )
        for name, figure in alone["overall"].items():
            assert figures["overall"][name]["value"] == pytest.approx(figure["value"]), name
        rest = frame[~inside]
        difference = (part["label"] == part["predicted"]).mean() - (rest["label"] == rest["predicted"]).mean()
        assert figures["against_rest"]["accuracy"]["value"] == pytest.approx(difference)
        over = chances[inside].max(axis=1).mean() - (part["label"] == part["predicted"]).mean()
        assert figures["overall"]["overconfidence"]["value"] == pytest.approx(over)
        assert figures["records"] == inside.sum() and figures["patients"] == part["patient_id"].nunique()
    everyone = metrics.classification_report(
        list(frame["label"]),
        list(frame["predicted"]),
        LABELS,
        chances,
        list(frame["patient_id"]),
        resamples=100,
    )["overall"]["accuracy"]
    assert report["overall"]["accuracy"] == pytest.approx(everyone)


def test_gaps_are_largest_minus_smallest():
    frame, chances = random_case(2)
    report = fairness.fairness_report(frame, LABELS, chances, ["age"], resamples=100)["columns"]["age"]
    for name in ("accuracy", "macro_f1", "auc_roc", "expected_calibration_error", "overconfidence"):
        values = [group["overall"][name]["value"] for group in report["groups"].values()]
        assert report["gap"][name]["value"] == pytest.approx(max(values) - min(values)), name
        assert report["gap"][name]["low"] >= 0


def rates_by_hand(truth, predicted, groups, one):
    """True and false positive rate of a class against the rest, by group, from scikit-learn's confusion matrix."""
    rates = {}
    for group in set(groups):
        inside = np.array(groups) == group
        cells = sklearn.metrics.confusion_matrix(
            np.array(truth)[inside] == one, np.array(predicted)[inside] == one, labels=[False, True]
        )
        rates[group] = cells[1, 1] / cells[1].sum(), cells[0, 1] / cells[0].sum()
    return rates


def test_equalized_odds_follow_fairlearns_definition():
    # Fairlearn 0.10, equalized_odds_difference: the greater of the two metrics true_positive_rate_difference and
    # false_positive_rate_difference, each the largest difference between any two groups.
    frame, chances = random_case(3, rows=600, people=600)
    report = fairness.fairness_report(frame, LABELS, chances, ["age"], resamples=100)["columns"]["age"]
    groups = fairness.group_names(list(frame["age"]), "age")
    odds = report["equalized_odds"]
    expected = {}
    for one in LABELS:
        rates = rates_by_hand(frame["label"], frame["predicted"], groups, one)
        pairs = list(itertools.combinations(rates.values(), 2))
        differences = [max(abs(left[side] - right[side]) for left, right in pairs) for side in (0, 1)]
        expected[one] = max(differences)
        for name, value in zip(("true_positive_rate", "false_positive_rate"), differences, strict=True):
            assert odds[name]["per_class"][one]["value"] == pytest.approx(value)
        assert odds["equalized_odds_difference"]["per_class"][one]["value"] == pytest.approx(expected[one])
    worst = odds["equalized_odds_difference"]
    assert worst["worst"]["value"] == pytest.approx(max(expected.values()))
    assert worst["macro"]["value"] == pytest.approx(np.mean(list(expected.values())))
    assert worst["worst_class"] == max(expected, key=expected.get)


def test_an_exact_case_by_hand():
    # Class a. Women: 3 of 4 found, 1 of 4 others wrongly called a. Men: 1 of 4 found, 3 of 4 others wrongly called a.
    truth = (["a"] * 4 + ["b"] * 4) * 2
    predicted = list("aaab" + "abbb" + "abbb" + "aaab")
    groups = ["F"] * 8 + ["M"] * 8
    report = fairness.group_report(truth, predicted, ["a", "b"], groups, minimum_patients=1, resamples=100)
    odds = report["equalized_odds"]
    assert odds["true_positive_rate"]["per_class"]["a"]["value"] == 0.5
    assert odds["false_positive_rate"]["per_class"]["a"]["value"] == 0.5
    assert odds["equalized_odds_difference"]["worst"]["value"] == 0.5
    women = report["groups"]["F"]
    assert women["overall"]["accuracy"]["value"] == 0.75
    assert women["against_rest"]["accuracy"]["value"] == 0.5
    assert women["per_class"]["a"]["true_positive_rate"]["value"] == 0.5
    assert women["per_class"]["a"]["false_positive_rate"]["value"] == -0.5
    assert report["groups"]["M"]["per_class"]["a"]["false_positive_rate"]["value"] == 0.5


def test_groups_served_alike_differ_by_nothing():
    frame, chances = random_case(4, rows=100, people=100)
    twice = pd.concat([frame.assign(gender="F"), frame.assign(gender="M")], ignore_index=True)
    twice["patient_id"] = [f"p{row}" for row in range(200)]
    report = fairness.fairness_report(twice, LABELS, np.tile(chances, (2, 1)), ["gender"], resamples=200)
    women = report["columns"]["gender"]["groups"]["F"]["against_rest"]
    for name, figure in women.items():
        assert figure["value"] == pytest.approx(0, abs=1e-12), name
        # Among three classes the right one is always among the first three.
        assert name.startswith("top_") or figure["low"] < 0 < figure["high"], name
    odds = report["columns"]["gender"]["equalized_odds"]["equalized_odds_difference"]
    assert odds["worst"]["value"] == 0


def test_a_group_that_is_served_worse_is_found():
    frame, chances = random_case(5, rows=400, people=400)
    wrong = frame.index[(frame["gender"] == "M") & (frame.index % 3 == 0)]
    frame.loc[wrong, "predicted"] = [
        LABELS[(LABELS.index(label) + 1) % 3] for label in frame.loc[wrong, "label"]
    ]
    report = fairness.fairness_report(frame, LABELS, None, ["gender"], resamples=200)
    men = report["columns"]["gender"]["groups"]["M"]
    assert men["against_rest"]["accuracy"]["high"] < 0
    assert all(rates["true_positive_rate"]["value"] < 0 for rates in men["per_class"].values())
    assert "overconfidence" not in men["overall"], "without probabilities nothing is said about them"


def test_chance_alone_excludes_zero_about_as_often_as_the_report_says():
    found = 0
    for seed in range(100):
        frame, _ = random_case(seed, rows=200, people=200)
        report = fairness.fairness_report(frame, LABELS, None, ["gender"], resamples=200, seed=seed)
        figure = report["columns"]["gender"]["groups"]["F"]["against_rest"]["accuracy"]
        found += not figure["low"] <= 0 <= figure["high"]
    assert 1 <= found <= 12, "five of a hundred are to be expected"
    intervals = [
        figure
        for group in report["columns"]["gender"]["groups"].values()
        for figure in group["against_rest"].values()
    ]
    assert report["method"]["comparisons"] == len(intervals) == 20
    assert report["method"]["expected_by_chance"] == 1.0


# --- small, missing and degenerate -----------------------------------------------------------------


def test_small_groups_are_flagged_and_shown_and_do_not_make_the_gap():
    frame, chances = random_case(6)
    frame.loc[:4, "gender"] = "X"
    frame.loc[:4, "predicted"] = frame.loc[:4, "label"]
    frame.loc[5:40, "gender"] = None
    report = fairness.fairness_report(frame, LABELS, chances, ["gender"], resamples=100)["columns"]["gender"]
    assert list(report["groups"]) == ["F", "M", "X", "not stated"], "what is not known stands last"
    assert [group["small"] for group in report["groups"].values()] == [False, False, True, False]
    assert "X" in report["notes"][0] and "10 patients" in report["notes"][0]
    accuracy = {name: group["overall"]["accuracy"] for name, group in report["groups"].items()}
    assert (
        accuracy["X"]["value"] == 1 and accuracy["X"]["interval"] == "wilson" and accuracy["X"]["low"] < 0.6
    )
    gap = abs(accuracy["F"]["value"] - accuracy["M"]["value"])
    assert report["gap"]["accuracy"]["value"] == pytest.approx(gap)


def test_many_notes_of_few_patients_are_a_small_group():
    frame, chances = random_case(7)
    frame["patient_id"] = [
        "one" if gender == "F" else f"p{row}" for row, gender in enumerate(frame["gender"])
    ]
    report = fairness.fairness_report(frame, LABELS, chances, ["gender"], resamples=100)["columns"]["gender"]
    assert report["groups"]["F"]["records"] == 120 and report["groups"]["F"]["patients"] == 1
    assert report["groups"]["F"]["small"] and report["gap"] == {} and report["equalized_odds"] == {}
    assert any("no gaps" in note for note in report["notes"])


def test_classes_with_too_few_patients_in_a_group_do_not_make_the_worst_difference():
    frame, chances = random_case(8, rows=300, people=300)
    rare = (frame["label"] == "skin") & (frame["gender"] == "F")
    frame = frame[~rare | (rare.cumsum() <= 3)].reset_index(drop=True)
    report = fairness.fairness_report(frame, LABELS, None, ["gender"], resamples=100)["columns"]["gender"]
    assert set(report["equalized_odds"]["true_positive_rate"]["per_class"]) == {"heart", "lung"}
    assert set(report["groups"]["F"]["per_class"]) == {"heart", "lung"}
    assert "1 of 3 classes" in report["notes"][-1]


def test_a_column_with_one_group_has_figures_and_no_differences():
    frame, chances = random_case(9, rows=60)
    report = fairness.fairness_report(frame.assign(site="A"), LABELS, chances, ["site"], resamples=100)
    group = report["columns"]["site"]["groups"]["A"]
    assert group["overall"]["accuracy"]["value"] > 0 and group["against_rest"] == {} == group["per_class"]
    assert report["method"]["comparisons"] == 0
    json.dumps(report, allow_nan=False)


def test_records_without_patients_count_for_themselves():
    frame, chances = random_case(10, rows=60)
    frame["patient_id"] = None
    report = fairness.fairness_report(frame, LABELS, chances, ["gender"], resamples=100)
    assert report["columns"]["gender"]["groups"]["F"]["patients"] == 30


def test_a_missing_column_is_refused_beside_those_that_exist():
    frame, chances = random_case(0, rows=30)
    with pytest.raises(UserError, match="no column 'ward' to divide by; there is age, gender$"):
        fairness.fairness_report(frame, LABELS, chances, ["age", "ward"])
    with pytest.raises(UserError, match="there is none$"):
        fairness.fairness_report(frame.drop(columns=["age", "gender"]), LABELS, chances, ["ward"])
    with pytest.raises(UserError, match="give one for each record"):
        fairness.group_report(["heart"], ["heart"], LABELS, ["F", "M"])


def test_the_report_is_json_without_nan_and_is_drawn(tmp_path):
    frame, chances = random_case(11)
    frame.loc[:3, "gender"] = "X"
    frame.loc[:1, "age"] = "unknown to all"
    report = fairness.fairness_report(frame, LABELS, chances, resamples=100)
    json.dumps(report, allow_nan=False)
    figure = fairness.plot_subgroups(report)
    figure.savefig(tmp_path / "subgroups.png")
    assert (tmp_path / "subgroups.png").stat().st_size > 8000
    rows = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert rows[0] == "age" and any(row.startswith("X  (") for row in rows)
    fills = {line.get_markerfacecolor() for line in figure.axes[0].lines if line.get_marker() == "o"}
    assert fills == {"white", "#30506e"}, "groups that are small look different"
