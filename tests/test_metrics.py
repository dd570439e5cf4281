"""Figures agree with scikit-learn and with arithmetic on paper, and intervals cover what they should."""

import json
import time

import matplotlib
import numpy as np
import pytest
import sklearn.metrics

from medai_nb import metrics
from medai_nb.config import UserError

matplotlib.use("Agg")


def random_case(seed, rows=120, classes=6, patients=40, empty_class=False):
    generator = np.random.default_rng(seed)
    names = [f"class {code}" for code in range(classes)]
    truth = generator.integers(classes - empty_class, size=rows)
    logits = np.round(generator.normal(size=(rows, classes)) + 1.2 * np.eye(classes)[truth], 1)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    predicted = probabilities.argmax(axis=1)
    owners = [f"p{code}" for code in generator.integers(patients, size=rows)]
    return names, truth, predicted, probabilities, owners


def report_of(case, **options):
    names, truth, predicted, probabilities, owners = case
    return metrics.classification_report(
        [names[code] for code in truth],
        [names[code] for code in predicted],
        names,
        probabilities,
        owners,
        resamples=200,
        **options,
    )


@pytest.mark.parametrize("seed", range(3))
def test_point_figures_are_those_of_scikit_learn(seed):
    case = random_case(seed)
    names, truth, predicted, probabilities, _ = case
    overall = {name: figure["value"] for name, figure in report_of(case)["overall"].items()}
    expected = {
        "accuracy": sklearn.metrics.accuracy_score(truth, predicted),
        "balanced_accuracy": sklearn.metrics.balanced_accuracy_score(truth, predicted),
        "macro_precision": sklearn.metrics.precision_score(truth, predicted, average="macro"),
        "macro_f1": sklearn.metrics.f1_score(truth, predicted, average="macro"),
        "weighted_f1": sklearn.metrics.f1_score(truth, predicted, average="weighted"),
        "auc_roc": sklearn.metrics.roc_auc_score(truth, probabilities, multi_class="ovr", average="macro"),
        "auprc": sklearn.metrics.average_precision_score(np.eye(6)[truth], probabilities, average="macro"),
        "micro_f1": sklearn.metrics.f1_score(truth, predicted, average="micro"),
        "mcc": sklearn.metrics.matthews_corrcoef(truth, predicted),
        "kappa": sklearn.metrics.cohen_kappa_score(truth, predicted),
    }
    for name, value in expected.items():
        assert overall[name] == pytest.approx(value), name
    for places in (3, 5):
        best = np.argsort(-probabilities, axis=1, kind="stable")[:, :places]
        assert overall[f"top_{places}_accuracy"] == pytest.approx((best == truth[:, None]).any(axis=1).mean())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("empty_class", [False, True])
def test_each_resample_is_what_scikit_learn_computes_with_these_weights(seed, empty_class):
    _, truth, predicted, probabilities, owners = random_case(seed, rows=60, empty_class=empty_class)
    clusters = metrics.cluster_codes(owners, len(truth))
    weights = next(metrics.cluster_weights(clusters, resamples=5, seed=seed))
    ours = metrics.weighted_metrics(truth, predicted, 6, probabilities, weights)
    for row, weight in enumerate(weights):
        kept = weight > 0
        present = sorted(set(truth[kept]))
        shared = {"labels": present, "sample_weight": weight, "zero_division": 0, "average": "macro"}
        assert ours["accuracy"][row] == pytest.approx(
            sklearn.metrics.accuracy_score(truth, predicted, sample_weight=weight)
        )
        assert ours["macro_f1"][row] == pytest.approx(sklearn.metrics.f1_score(truth, predicted, **shared))
        assert ours["macro_precision"][row] == pytest.approx(
            sklearn.metrics.precision_score(truth, predicted, **shared)
        )
        assert ours["balanced_accuracy"][row] == pytest.approx(
            sklearn.metrics.recall_score(truth, predicted, **shared)
        )
        areas = [
            sklearn.metrics.roc_auc_score(
                truth[kept] == one, probabilities[kept, one], sample_weight=weight[kept]
            )
            for one in present
        ]
        assert ours["auc_roc"][row] == pytest.approx(np.mean(areas))
        precisions = [
            sklearn.metrics.average_precision_score(truth == one, probabilities[:, one], sample_weight=weight)
            for one in present
        ]
        assert ours["auprc"][row] == pytest.approx(np.mean(precisions))
        for name, function in (
            ("mcc", sklearn.metrics.matthews_corrcoef),
            ("kappa", sklearn.metrics.cohen_kappa_score),
        ):
            assert ours[name][row] == pytest.approx(function(truth, predicted, sample_weight=weight)), name
        for one in range(6):
            no = {"sample_weight": weight, "pos_label": False, "zero_division": np.nan}
            expected = {
                "class_specificity": sklearn.metrics.recall_score(truth == one, predicted == one, **no),
                "class_npv": sklearn.metrics.precision_score(truth == one, predicted == one, **no),
            }
            for name, value in expected.items():
                assert ours[name][row, one] == pytest.approx(value, nan_ok=True), name
        assert ours["macro_specificity"][row] == pytest.approx(ours["class_specificity"][row][present].mean())
        assert ours["macro_npv"][row] == pytest.approx(ours["class_npv"][row][present].mean())


def test_the_report_equals_a_hand_computed_one():
    report = metrics.classification_report(
        ["a", "a", "a", "b", "b", "c"], ["a", "a", "b", "b", "c", "c"], ["a", "b", "c", "d"], resamples=100
    )
    figures = report["per_class"]
    assert figures["a"]["precision"]["value"] == 1 and figures["a"]["recall"]["value"] == pytest.approx(2 / 3)
    assert figures["b"]["precision"]["value"] == figures["b"]["recall"]["value"] == 0.5
    assert figures["c"]["precision"]["value"] == 0.5 and figures["c"]["recall"]["value"] == 1
    assert figures["d"]["recall"]["value"] is None and figures["d"]["support"] == 0
    assert report["overall"]["macro_f1"]["value"] == pytest.approx((0.8 + 0.5 + 2 / 3) / 3)
    assert report["confusion"] == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert "'d'" in report["notes"][0]


def test_kappa_is_that_of_the_published_example():
    # Fleiss, Cohen and Everitt 1969, table 1: two psychiatrists and 200 patients; kappa is given as .429.
    counts = np.array([[106, 10, 4], [22, 28, 10], [2, 12, 6]])
    names = ["personality disorder", "neurosis", "psychosis"]
    first, second = (
        [names[code] for code in np.repeat(axis.ravel(), counts.ravel())] for axis in np.indices((3, 3))
    )
    kappa = metrics.classification_report(first, second, names)["overall"]["kappa"]
    assert kappa["value"] == pytest.approx(0.429, abs=5e-4)
    # The paper's standard error, .054, gives this interval; the bootstrap should not be far from it.
    assert kappa["low"] == pytest.approx(0.429 - 1.96 * 0.054, abs=0.02)
    assert kappa["high"] == pytest.approx(0.429 + 1.96 * 0.054, abs=0.02)


@pytest.mark.parametrize(
    "truth, predicted, mcc, kappa",
    [
        ([0, 0, 1, 1], [0, 0, 0, 0], 0.0, 0.0),
        ([0, 0, 0, 0], [0, 1, 0, 1], 0.0, 0.0),
        ([0, 0, 0, 0], [1, 1, 1, 1], 0.0, 0.0),
        ([0, 0, 0, 0], [0, 0, 0, 0], None, None),
        ([0, 1, 0, 1], [1, 0, 1, 0], -1.0, -1.0),
        ([0, 1, 0, 1], [0, 1, 0, 1], 1.0, 1.0),
    ],
)
def test_agreement_beyond_chance_has_a_stated_value_in_every_corner(truth, predicted, mcc, kappa):
    texts = [["ab"[code] for code in codes] for codes in (truth, predicted)]
    overall = metrics.classification_report(*texts, ["a", "b"], resamples=100)["overall"]
    weighted = metrics.weighted_metrics(np.array(truth), np.array(predicted), 2, None, np.ones((1, 4)))
    for name, value in (("mcc", mcc), ("kappa", kappa)):
        assert overall[name]["value"] == (value if value is None else pytest.approx(value)), name
        assert weighted[name][0] == pytest.approx(np.nan if value is None else value, nan_ok=True), name


def test_equal_scores_cannot_order_records():
    positive, equal = np.arange(10) < 3, np.full(10, 0.5)
    area, precision = metrics.weighted_areas(positive, equal, np.ones((1, 10)))
    assert area[0] == 0.5 and precision[0] == pytest.approx(0.3), "chance gets the share of the class"


def test_areas_without_both_kinds_of_records_are_not_defined():
    scores, weights = np.array([0.1, 0.9]), np.array([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    for positive, defined in (([True, True], []), ([False, False], []), ([True, False], [0])):
        for area in metrics.weighted_areas(np.array(positive), scores, weights):
            assert np.flatnonzero(np.isfinite(area)).tolist() == defined


def test_a_perfect_specificity_is_not_printed_as_certainty():
    truth, predicted = ["a"] * 10 + ["b"] * 20, ["a"] * 10 + ["b"] * 20
    figures = metrics.classification_report(truth, predicted, ["a", "b"])["per_class"]["a"]
    for name, trials in (("specificity", 20), ("npv", 20), ("recall", 10)):
        assert figures[name]["interval"] == "wilson", name
        assert figures[name]["low"] == pytest.approx(metrics.wilson_interval(trials, trials)[0]), name


def test_the_places_of_top_k_are_chosen_by_the_caller():
    case = random_case(4)
    overall = report_of(case, top=(1, 2))["overall"]
    assert overall["top_1_accuracy"]["value"] == overall["accuracy"]["value"] == overall["micro_f1"]["value"]
    assert overall["top_2_accuracy"]["value"] > overall["top_1_accuracy"]["value"]
    assert "top_3_accuracy" not in overall
    assert report_of(case, top=(6,))["overall"]["top_6_accuracy"]["value"] == 1, "as many places as classes"
    with pytest.raises(UserError, match="at least 1"):
        report_of(case, top=(0,))


def test_all_figures_have_a_paired_difference():
    names, truth, predicted, probabilities, owners = random_case(3)
    texts = [[names[code] for code in codes] for codes in (truth, predicted)]
    result = metrics.compare_classifiers(
        texts[0], texts[1], texts[1], names, probabilities, probabilities, owners, resamples=100
    )
    assert result["difference"].keys() == result["tuned"]["overall"].keys()
    assert {figure["value"] for figure in result["difference"].values()} == {0.0}


def test_the_bootstrap_of_any_statistic_is_that_of_the_report():
    names, truth, predicted, _, owners = random_case(6)
    right = (truth == predicted).astype(float)

    def shares(weights):
        return {"accuracy": weights @ right / weights.sum(axis=1), "both": np.stack([weights @ right] * 2, 1)}

    figures = metrics.bootstrap(shares, len(right), owners, resamples=200)
    report = report_of((names, truth, predicted, None, owners))["overall"]["accuracy"]
    assert figures["accuracy"] == pytest.approx(report)
    assert len(figures["both"]) == 2 and figures["both"][0]["value"] == right.sum()


def test_any_figures_per_record_have_a_paired_difference():
    generator = np.random.default_rng(0)
    luck = generator.normal(size=100)
    base, tuned = luck.tolist(), (luck + 0.1).tolist()
    owners = [str(row // 2) for row in range(100)]
    result = metrics.paired_bootstrap({"loss": base}, {"loss": tuned}, owners, resamples=200)
    assert result["difference"]["loss"]["value"] == pytest.approx(0.1)
    assert result["difference"]["loss"]["low"] is None, "the same gain everywhere does not vary"
    assert result["tuned"]["loss"]["low"] < result["base"]["loss"]["high"], "unpaired, nothing could be said"


@pytest.mark.parametrize(
    "base, tuned, message",
    [
        ({"loss": [1.0]}, {"gain": [1.0]}, "the same figures"),
        ({"loss": [1.0]}, {"loss": [1.0, 2.0]}, "1 against 2 records"),
        ({"loss": [np.nan]}, {"loss": [1.0]}, "base/loss, row 0: not a finite number"),
        ({"loss": []}, {"loss": []}, "cannot average"),
    ],
)
def test_what_cannot_be_paired_is_refused_in_words(base, tuned, message):
    with pytest.raises(UserError, match=message):
        metrics.paired_bootstrap(base, tuned)


def test_calibration_error_equals_a_hand_computed_one():
    correct = np.array([True, False, True, True])
    confidence = np.array([0.85, 0.85, 0.35, 0.35])
    # Bin 0.8-0.9: accuracy 0.5 against 0.85; bin 0.3-0.4: accuracy 1 against 0.35; each holds half of the records.
    assert metrics.calibration_error(correct, confidence)[0] == pytest.approx(0.5 * 0.35 + 0.5 * 0.65)


def test_ties_among_the_top_classes_are_broken_in_order():
    equal = np.full((1, 4), 0.25)
    assert metrics.among_top(np.array([2]), equal, 3)[0]
    assert not metrics.among_top(np.array([3]), equal, 3)[0]


def test_notes_of_one_patient_widen_the_interval():
    generator = np.random.default_rng(0)
    right = np.repeat(generator.random(40) < 0.6, 10)  # ten notes a patient, all right or all wrong
    truth, predicted = ["a"] * 400, ["a" if hit else "b" for hit in right]
    owners = [str(row // 10) for row in range(400)]
    by_patient = metrics.classification_report(truth, predicted, ["a", "b"], patients=owners)["overall"][
        "accuracy"
    ]
    by_record = metrics.classification_report(truth, predicted, ["a", "b"])["overall"]["accuracy"]
    widths = [figure["high"] - figure["low"] for figure in (by_patient, by_record)]
    assert widths[0] / widths[1] == pytest.approx(np.sqrt(10), rel=0.15)


def test_the_interval_covers_the_true_accuracy_as_often_as_it_says():
    generator = np.random.default_rng(3)
    covered = 0
    for trial in range(100):
        by_patient = generator.beta(7, 3, size=50)  # mean 0.7
        right = generator.random((50, 4)) < by_patient[:, None]
        report = metrics.mean_report(
            {"accuracy": right.ravel()}, [str(row // 4) for row in range(200)], resamples=300, seed=trial
        )
        covered += report["accuracy"]["low"] <= 0.7 <= report["accuracy"]["high"]
    assert 87 <= covered <= 99


def test_a_perfect_score_is_not_printed_as_certainty():
    report = metrics.classification_report(["a", "b"] * 10, ["a", "b"] * 10, ["a", "b"])
    assert report["overall"]["accuracy"]["interval"] == "wilson"
    assert report["overall"]["accuracy"]["low"] == pytest.approx(0.839, abs=0.001)
    assert report["overall"]["macro_f1"]["low"] is None


def test_one_patient_gives_no_interval_from_nothing():
    report = metrics.classification_report(["a", "a", "b"], ["a", "b", "b"], ["a", "b"], patients=["p"] * 3)
    assert report["patients"] == 1
    assert report["overall"]["macro_f1"]["low"] is None


def test_a_single_class_has_no_auc_and_says_so():
    report = metrics.classification_report(["a", "a"], ["a", "a"], ["a", "b"], [[0.9, 0.1], [0.6, 0.4]])
    assert report["overall"]["auc_roc"] == {
        "value": None,
        "low": None,
        "high": None,
        "interval": "not defined",
    }


def test_the_report_is_json_without_nan():
    json.dumps(report_of(random_case(1, empty_class=True)), allow_nan=False)


def test_a_thousand_resamples_of_200_rows_and_22_classes_take_under_a_second():
    case = random_case(5, rows=200, classes=22)
    names, truth, predicted, probabilities, owners = case
    arguments = (
        [names[code] for code in truth],
        [names[code] for code in predicted],
        names,
        probabilities,
        owners,
    )
    metrics.classification_report(*arguments, resamples=100)  # imports
    started = time.perf_counter()
    metrics.classification_report(*arguments, resamples=1000)
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize(
    "truth, predicted, labels, probabilities, patients, message",
    [
        ([], [], ["a"], None, None, "empty"),
        (["a"], ["a", "a"], ["a"], None, None, "1 true labels but 2 predictions"),
        (["a", "z"], ["a", "a"], ["a"], None, None, "truth, row 1: 'z'"),
        (["a"], ["z"], ["a"], None, None, "predicted, row 0: 'z'"),
        (["a", None], ["a", "a"], ["a"], None, None, "row 1: None"),
        (["a"], ["a"], ["a", "a"], None, None, "listed twice"),
        (["a", "b"], ["a", "b"], ["a", "b"], [[1, 0], [np.nan, 1]], None, "row 1: NaN"),
        (["a", "b"], ["a", "b"], ["a", "b"], [[1, 0], [0.5, 0.2]], None, "the sum is 0.7000"),
        (["a", "b"], ["a", "b"], ["a", "b"], [[1, 0]], None, "shape"),
        (["a", "b"], ["a", "b"], ["a", "b"], None, ["p"], "1 patient ids for 2 records"),
    ],
)
def test_bad_input_is_refused_in_words(truth, predicted, labels, probabilities, patients, message):
    with pytest.raises(UserError, match=message):
        metrics.classification_report(truth, predicted, labels, probabilities, patients)


def test_the_difference_uses_the_same_resamples_for_both_models():
    names, truth, predicted, _, owners = random_case(2, rows=300)
    worse = predicted.copy()
    worse[::10] = (truth[::10] + 1) % 6
    texts = [[names[code] for code in codes] for codes in (truth, worse, predicted)]
    result = metrics.compare_classifiers(*texts, names, patients=owners)
    gain = result["difference"]["accuracy"]
    assert gain["value"] == pytest.approx((predicted == truth).mean() - (worse == truth).mean())
    assert gain["low"] > 0, "a paired interval excludes zero although the single ones overlap"
    assert result["base"]["overall"]["accuracy"]["high"] > result["tuned"]["overall"]["accuracy"]["low"]


def test_mcnemar_equals_the_binomial_by_hand():
    base = np.array([True, False, False, False, False, False, True])
    tuned = np.array([False, True, True, True, True, True, True])
    result = metrics.mcnemar(base, tuned)
    assert (result["base_only_correct"], result["tuned_only_correct"]) == (1, 5)
    assert result["p_value"] == pytest.approx(2 * (1 + 6) / 2**6)


@pytest.mark.parametrize(
    "answer, reference, overlap, sequence",
    [
        ("No acute distress.", "no acute distress", 1.0, 1.0),
        ("distress acute no", "no acute distress", 1.0, 1 / 3),
        ("", "", 1.0, 1.0),
        ("", "pain", 0.0, 0.0),
        ("pain", "", 0.0, 0.0),
        ("a b c d", "b x d", 4 / 7, 4 / 7),
        ("pain pain pain", "pain", 0.5, 0.5),
    ],
)
def test_overlap_of_answers_by_hand(answer, reference, overlap, sequence):
    assert metrics.token_f1(answer, reference) == pytest.approx(overlap)
    assert metrics.rouge_l(answer, reference) == pytest.approx(sequence)


def test_rouge_l_equals_the_textbook_recursion_on_random_texts():
    def longest(left, right):
        table = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
        for i, one in enumerate(left):
            for j, other in enumerate(right):
                table[i + 1][j + 1] = (
                    table[i][j] + 1 if one == other else max(table[i][j + 1], table[i + 1][j])
                )
        return table[-1][-1]

    generator = np.random.default_rng(0)
    for _ in range(50):
        left, right = (
            [str(word) for word in generator.integers(5, size=size)] for size in generator.integers(1, 15, 2)
        )
        expected = 2 * longest(left, right) / (len(left) + len(right))
        assert metrics.rouge_l(" ".join(left), " ".join(right)) == pytest.approx(expected)


def test_both_figures_are_drawn_also_without_a_base_model_and_with_long_names(tmp_path):
    names, truth, predicted, probabilities, owners = random_case(1, empty_class=True)
    names = [name * 10 for name in names]
    report = report_of((names, truth, predicted, probabilities, owners))
    metrics.plot_confusion(report).savefig(tmp_path / "confusion.png")
    metrics.plot_comparison(None, report).savefig(tmp_path / "comparison.png")
    assert min(path.stat().st_size for path in tmp_path.iterdir()) > 5000
