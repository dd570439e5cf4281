"""Probabilities are measured as scikit-learn and the papers do; what is chosen on validation changes no answer."""

import json

import matplotlib
import numpy as np
import pytest
import sklearn.calibration
import sklearn.metrics

from medai_nb import calibration
from medai_nb.config import UserError
from medai_nb.metrics import calibration_error, cluster_codes, cluster_weights

matplotlib.use("Agg")


def drawn_case(seed, rows=400, classes=4, sharpness=1.0):
    """(log-likelihoods, truth): labels drawn from softmax(scores), and scores * sharpness given as likelihoods."""
    generator = np.random.default_rng(seed)
    scores = generator.normal(scale=1.5, size=(rows, classes))
    truth = (scores + generator.gumbel(size=scores.shape)).argmax(axis=1)
    return scores * sharpness - generator.uniform(5, 30, size=(rows, 1)), truth


def answers_case(seed, rows=200):
    likelihoods, truth = drawn_case(seed, rows)
    probabilities = calibration.apply_temperature(likelihoods, 1.0)
    return probabilities.max(axis=1), probabilities.argmax(axis=1) == truth


def some_weights(rows, seed=0, resamples=4):
    clusters = cluster_codes([str(row // 3) for row in range(rows)], rows)
    return next(cluster_weights(clusters, resamples, seed))


def test_probabilities_that_are_right_as_often_as_they_say_have_no_error():
    confidence = np.repeat([0.25, 0.5, 0.75, 0.95], 20)
    correct = np.concatenate([np.arange(20) < 20 * share for share in (0.25, 0.5, 0.75, 0.95)])
    assert calibration_error(correct, confidence)[0] == pytest.approx(0, abs=1e-12)
    assert calibration.adaptive_calibration_error(correct, confidence)[0] == pytest.approx(0, abs=1e-12)
    parts = calibration.brier_decomposition(correct, confidence)
    assert parts["reliability"][0] == pytest.approx(0, abs=1e-12)


def test_bins_of_equal_mass_hold_equally_many_and_never_part_equal_confidences():
    generator = np.random.default_rng(0)
    assert np.bincount(calibration.equal_mass_bins(generator.random(100), 10)).tolist() == [10] * 10
    tied = np.round(generator.random(100), 1)
    bins = calibration.equal_mass_bins(tied, 10)
    assert all(len(set(bins[tied == value])) == 1 for value in set(tied))
    assert calibration.equal_mass_bins(np.full(7, 0.4)).tolist() == [0] * 7


def test_the_order_of_records_does_not_change_the_adaptive_error():
    confidence, correct = answers_case(1)
    order = np.random.default_rng(1).permutation(len(correct))
    tied = np.round(confidence, 1)
    errors = [
        calibration.adaptive_calibration_error(correct[rows], tied[rows])[0] for rows in (slice(None), order)
    ]
    assert errors[0] == pytest.approx(errors[1])


@pytest.mark.parametrize("seed", range(3))
def test_brier_scores_are_those_of_scikit_learn_with_and_without_weights(seed):
    likelihoods, truth = drawn_case(seed)
    probabilities = calibration.apply_temperature(likelihoods, 1.0)
    terms = calibration.brier_terms(truth, probabilities)
    weights = some_weights(len(truth), seed)
    for one in range(4):
        expected = sklearn.metrics.brier_score_loss(truth == one, probabilities[:, one])
        assert terms[:, one].mean() == pytest.approx(expected)
        parts = calibration.brier_decomposition(truth == one, probabilities[:, one], weights)
        for row, weight in enumerate(weights):
            weighted = sklearn.metrics.brier_score_loss(
                truth == one, probabilities[:, one], sample_weight=weight
            )
            assert parts["brier"][row] == pytest.approx(weighted)
    several = sklearn.metrics.brier_score_loss(truth, probabilities, labels=range(4), scale_by_half=False)
    assert terms.sum(axis=1).mean() == pytest.approx(several)


def test_the_parts_of_the_brier_score_make_the_score_of_binned_forecasts():
    confidence, correct = answers_case(3)
    weights = some_weights(len(correct))
    parts = calibration.brier_decomposition(correct, confidence, weights)
    for row, weight in enumerate(weights.astype(int)):
        repeated = calibration.brier_decomposition(np.repeat(correct, weight), np.repeat(confidence, weight))
        for name, values in repeated.items():
            assert parts[name][row] == pytest.approx(values[0]), name
    bins = np.floor(confidence * 10)
    binned = np.array([confidence[bins == one].mean() for one in bins])
    whole = calibration.brier_decomposition(correct, confidence)
    of_bins = whole["reliability"] - whole["resolution"] + whole["uncertainty"]
    assert of_bins[0] == pytest.approx(sklearn.metrics.brier_score_loss(correct, binned))
    assert calibration.brier_decomposition(correct, binned)["within_bins"][0] == pytest.approx(0, abs=1e-12)


def test_the_reliability_table_is_scikit_learns_calibration_curve_with_counts_and_intervals():
    confidence, correct = answers_case(4)
    owners = [str(row // 2) for row in range(len(correct))]
    rows = calibration.reliability_table(correct, confidence, owners)
    shares, means = sklearn.calibration.calibration_curve(correct, confidence, n_bins=10)
    assert [row["accuracy"] for row in rows] == pytest.approx(shares)
    assert [row["confidence"] for row in rows] == pytest.approx(means)
    assert sum(row["records"] for row in rows) == len(correct)
    assert all(row["low"] <= row["accuracy"] <= row["high"] for row in rows if row["patients"] > 20)
    alone = calibration.reliability_table(correct, confidence)
    widths = [[row["high"] - row["low"] for row in table] for table in (rows, alone)]
    assert sum(widths[0]) > sum(widths[1]), "fewer patients than records leave more open"


# --- temperature -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 4.0])
def test_the_temperature_is_where_scikit_learns_log_loss_is_smallest(sharpness):
    likelihoods, truth = drawn_case(5, rows=300, sharpness=sharpness)
    temperature = calibration.fit_temperature(likelihoods, truth)
    assert temperature == pytest.approx(sharpness, rel=0.25)

    def loss(value):
        return sklearn.metrics.log_loss(truth, calibration.apply_temperature(likelihoods, value))

    assert loss(temperature) == pytest.approx(calibration.log_loss(likelihoods, truth, temperature).mean())
    around = [loss(temperature * factor) for factor in (0.98, 0.999, 1.001, 1.02)]
    assert loss(temperature) < min(around)


def test_a_temperature_changes_no_answer():
    likelihoods, _ = drawn_case(6, rows=500, classes=20)
    for temperature in (0.05, 0.7, 1.0, 3.0, 20.0):
        scaled = calibration.apply_temperature(likelihoods, temperature)
        assert (scaled.argmax(axis=1) == likelihoods.argmax(axis=1)).all()
        assert np.allclose(scaled.sum(axis=1), 1)


def test_likelihoods_and_normalized_probabilities_have_the_same_temperature():
    likelihoods, truth = drawn_case(7, sharpness=2.0)
    normalized = np.log(calibration.apply_temperature(likelihoods, 1.0))
    both = [calibration.fit_temperature(scores, truth) for scores in (likelihoods, normalized)]
    assert both[0] == pytest.approx(both[1], rel=1e-4)


@pytest.mark.parametrize(
    "scores, truth, expected",
    [
        ([[1.0, 0.0], [0.0, 1.0]], [0, 1], 0.05),  # all right: sharper is always better
        ([[1.0, 0.0], [0.0, 1.0]], [1, 0], 20.0),  # all wrong: flatter is always better
        ([[3.0, 3.0], [3.0, 3.0]], [0, 1], 1.0),  # undecided: no temperature changes anything
        ([[1e4, 0.0], [0.0, 1e4]], [0, 1], 1.0),  # certain already
    ],
)
def test_where_no_temperature_is_best_the_result_is_a_stated_one(scores, truth, expected):
    report = calibration.temperature_report(np.array(scores), np.array(truth))
    assert report["temperature"] == pytest.approx(expected)
    assert report["at_the_end_of_the_range"] == (expected != 1.0)
    assert report["log_loss_after"] <= report["log_loss_before"]


@pytest.mark.parametrize(
    "scores, truth, message",
    [
        (np.empty((0, 3)), [], "no validation records"),
        ([[0.0], [0.0]], [0, 0], "two classes"),
        ([[0.0, 1.0], [0.0, 1.0]], [0, 0], "the same label"),
        ([[0.0, 1.0], [0.0, np.nan]], [0, 1], "row 1: NaN or infinite"),
        ([[-np.inf, 1.0], [0.0, 1.0]], [0, 1], "row 0: NaN or infinite"),
        ([[0.0, 1.0], [0.0, 1.0]], [0, 2], "row 1: 2 is no code"),
        ([[0.0, 1.0]], [0, 1], "shape"),
    ],
)
def test_a_temperature_that_cannot_be_fitted_is_refused_in_words(scores, truth, message):
    with pytest.raises(UserError, match=message):
        calibration.fit_temperature(np.array(scores), np.array(truth, dtype=int))


@pytest.mark.parametrize("temperature", [0, -1, np.nan, np.inf])
def test_an_impossible_temperature_is_refused(temperature):
    with pytest.raises(UserError, match="above 0"):
        calibration.apply_temperature(np.zeros((1, 2)), temperature)


# --- decision curve --------------------------------------------------------------------------------


def test_net_benefit_is_that_of_the_published_example():
    # Vickers and Elkin 2006, table 1: 902 men, 65 true and 225 false positives at 10% give 0.0443.
    positive, probability = np.arange(902) < 87, np.zeros(902)
    probability[:65] = probability[87:312] = 0.1
    assert calibration.net_benefit(positive, probability, [0.1])[0, 0] == pytest.approx(0.0443, abs=5e-5)


def test_treating_all_has_the_published_net_benefit():
    # PMC6993280, table 4: the column "intervention to all patients", where 30% have the disease.
    published = {0.03: 0.278, 0.1: 0.222, 0.2: 0.125, 0.3: 0.0, 0.5: -0.4, 0.9: -6.0}
    curve = calibration.decision_curve(np.arange(100) < 30, np.full(100, 0.3), list(published), resamples=100)
    assert [figure["value"] for figure in curve["treat_all"]] == pytest.approx(
        list(published.values()), abs=6e-4
    )


def test_the_gain_is_over_the_better_of_treating_all_and_none():
    likelihoods, truth = drawn_case(8)
    probability = calibration.apply_temperature(likelihoods, 1.0)[:, 0]
    curve = calibration.decision_curve(truth == 0, probability, resamples=100)
    model, everyone, gain = (
        np.array([figure["value"] for figure in curve[name]]) for name in ("model", "treat_all", "gain")
    )
    assert np.allclose(gain, model - np.maximum(everyone, 0))
    assert all(figure["low"] <= figure["value"] <= figure["high"] for figure in curve["model"])
    nobody = calibration.net_benefit(truth == 0, np.zeros(len(truth)))
    assert (nobody == 0).all()


def test_resampling_weights_mean_what_repeating_records_means():
    confidence, correct = answers_case(9)
    weights = some_weights(len(correct))
    benefit = calibration.net_benefit(correct, confidence, weights=weights)
    curves = calibration.area_under_risk_coverage(correct, confidence, weights)
    coverage = calibration.coverage_at_risk(correct, confidence, 0.2, weights)
    for row, weight in enumerate(weights.astype(int)):
        right, sure = np.repeat(correct, weight), np.repeat(confidence, weight)
        assert benefit[row] == pytest.approx(calibration.net_benefit(right, sure)[0])
        assert curves[row] == pytest.approx(calibration.area_under_risk_coverage(right, sure)[0])
        assert coverage[row] == pytest.approx(calibration.coverage_at_risk(right, sure, 0.2)[0])


@pytest.mark.parametrize("thresholds", [[0.0], [1.0], [0.5, np.nan], [-0.1]])
def test_a_threshold_without_odds_is_refused(thresholds):
    with pytest.raises(UserError, match="between 0 and 1"):
        calibration.net_benefit(np.array([True]), np.array([0.5]), thresholds)


# --- selective prediction --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_the_curve_is_the_one_of_counting_and_ends_at_the_error_rate(seed):
    confidence, correct = answers_case(seed)
    curve = calibration.risk_coverage(correct, confidence)
    for place, threshold in enumerate(curve["threshold"]):
        answered = confidence >= threshold
        assert curve["coverage"][0, place] == pytest.approx(answered.mean())
        assert curve["risk"][0, place] == pytest.approx(1 - correct[answered].mean())
    assert curve["coverage"][0, -1] == 1 and curve["risk"][0, -1] == pytest.approx(1 - correct.mean())
    order = np.argsort(-confidence)
    by_hand = np.cumsum(~correct[order]) / np.arange(1, len(correct) + 1)
    assert calibration.area_under_risk_coverage(correct, confidence)[0] == pytest.approx(by_hand.mean())


def test_equal_confidences_are_answered_together():
    curve = calibration.risk_coverage(np.array([True, False, True, False]), np.array([0.9, 0.5, 0.5, 0.5]))
    assert curve["coverage"][0].tolist() == [0.25, 1.0] and curve["risk"][0].tolist() == [0.0, 0.5]


def test_the_threshold_holds_the_accepted_risk_where_it_was_chosen_and_no_lower_one_does():
    confidence, correct = answers_case(10)
    threshold = calibration.abstention_threshold(correct, confidence, risk=0.2)
    assert (~correct[confidence >= threshold]).mean() <= 0.2
    for lower in np.unique(confidence[confidence < threshold]):
        assert (~correct[confidence >= lower]).mean() > 0.2
    covered = calibration.coverage_at_risk(correct, confidence, 0.2)[0]
    assert covered == pytest.approx((confidence >= threshold).mean())


def test_where_every_answer_is_wrong_nothing_is_answered():
    wrong, sure = np.zeros(5, dtype=bool), np.linspace(0.5, 0.9, 5)
    assert calibration.abstention_threshold(wrong, sure, risk=0.1) is None
    assert calibration.coverage_at_risk(wrong, sure, 0.1)[0] == 0
    assert calibration.area_under_risk_coverage(wrong, sure)[0] == 1


@pytest.mark.parametrize(
    "correct, confidence, risk, message",
    [
        ([True], [0.5], 1.5, "between 0 and 1"),
        ([], [], 0.1, "one for each record"),
        ([True], [0.5, 0.6], 0.1, "one for each record"),
        ([True, True], [0.5, np.nan], 0.1, "row 1: not a finite number"),
    ],
)
def test_what_gives_no_threshold_is_refused_in_words(correct, confidence, risk, message):
    with pytest.raises(UserError, match=message):
        calibration.abstention_threshold(np.array(correct), np.array(confidence), risk)


# --- the report ------------------------------------------------------------------------------------

NAMES = ["heart", "lung", "skin", "eye"]
QUICK = {"resamples": 100, "seed": 1}


def test_what_was_chosen_on_validation_is_measured_on_test_records():
    likelihoods, truth = drawn_case(11, rows=900, sharpness=3.0)
    sections = calibration.probability_sections(
        truth[:300],
        likelihoods[:300],
        NAMES,
        [str(row // 2) for row in range(300)],
        (truth[300:], likelihoods[300:]),
        accepted_risk=0.3,
        **QUICK,
    )
    report = sections["calibration"]
    assert report["temperature"]["temperature"] == calibration.fit_temperature(likelihoods[300:], truth[300:])
    probabilities = calibration.apply_temperature(likelihoods[:300], report["temperature"]["temperature"])
    loss = report["scaled"]["overall"]["log_loss"]["value"]
    assert loss == pytest.approx(sklearn.metrics.log_loss(truth[:300], probabilities))
    difference = report["difference"]["overall"]
    assert difference["log_loss"]["value"] == pytest.approx(
        loss - report["as_is"]["overall"]["log_loss"]["value"]
    )
    assert difference["expected_calibration_error"]["high"] < 0 and report["notes"] == []
    for label, column in zip(NAMES, range(4), strict=True):
        expected = sklearn.metrics.brier_score_loss(truth[:300] == column, probabilities[:, column])
        assert report["scaled"]["per_class"][label]["brier_score"]["value"] == pytest.approx(expected)
    chosen = sections["selective"]["at_threshold"]
    answered = probabilities.max(axis=1) >= chosen["threshold"]
    assert chosen["coverage"]["value"] == pytest.approx(answered.mean())
    assert chosen["coverage"]["low"] < chosen["coverage"]["value"] < chosen["coverage"]["high"]
    wrong = probabilities.argmax(axis=1) != truth[:300]
    assert sections["selective"]["error_rate"]["value"] == pytest.approx(wrong.mean())
    assert sections["selective"]["curve"]["risk"][-1] == sections["selective"]["error_rate"]
    assert sorted(sections["decision_curve"]["classes"]) == sorted(NAMES)
    json.dumps(sections, allow_nan=False)


@pytest.mark.parametrize(
    "validation, note",
    [
        (None, "no validation records"),
        ((np.array([1, 1]), np.array([[0.0, 1.0, 0.0, 0.0]] * 2)), "the same label"),
        ((np.empty(0, dtype=int), np.empty((0, 4))), "no validation records"),
        ((np.array([0, 1]), np.array([[5.0, 0, 0, 0], [0, 5.0, 0, 0]])), "the end of the range"),
        ((np.array([0, 1]), np.array([[0, 5.0, 0, 0], [5.0, 0, 0, 0]])), "no confidence leaves"),
    ],
)
def test_what_validation_cannot_give_is_said_in_the_notes(validation, note):
    likelihoods, truth = drawn_case(12, rows=60)
    sections = calibration.probability_sections(truth, likelihoods, NAMES, None, validation, **QUICK)
    assert any(note in line for line in sections["calibration"]["notes"])
    if "end of the range" not in note and "no confidence" not in note:
        assert sections["calibration"]["temperature"] is None and "scaled" not in sections["calibration"]
        assert sections["selective"]["probabilities"] == "as the model gives them"
    json.dumps(sections, allow_nan=False)


def test_a_label_that_the_model_does_not_know_counts_as_an_error_and_not_as_an_infinite_loss():
    likelihoods, truth = drawn_case(13, rows=80)
    unknown = np.pad(likelihoods, ((0, 0), (0, 1)), constant_values=-np.inf)
    truth[:8] = 4
    sections = calibration.probability_sections(truth, unknown, [*NAMES, "new"], **QUICK, classes=5)
    figures = sections["calibration"]["as_is"]["overall"]
    probabilities = calibration.apply_temperature(likelihoods, 1.0)
    assert figures["log_loss"]["value"] == pytest.approx(
        sklearn.metrics.log_loss(truth[8:], probabilities[8:], labels=range(4))
    )
    wrong = (probabilities.argmax(axis=1) != truth).mean()
    assert wrong >= 0.1 and sections["selective"]["error_rate"]["value"] == pytest.approx(wrong)
    json.dumps(sections, allow_nan=False)


def test_a_single_record_has_figures_without_intervals_from_nothing():
    sections = calibration.probability_sections(np.array([0]), np.array([[-1.0, -2.0]]), ["a", "b"], **QUICK)
    figures = sections["calibration"]["as_is"]["overall"]
    assert figures["brier_score"]["low"] is None and sections["selective"]["error_rate"]["value"] == 0
    calibration.probability_plots(sections)


def test_all_three_plots_are_drawn(tmp_path):
    likelihoods, truth = drawn_case(14, rows=200, sharpness=2.0)
    sections = calibration.probability_sections(
        truth[:100], likelihoods[:100], NAMES, None, (truth[100:], likelihoods[100:]), 0.3, **QUICK
    )
    for name, figure in calibration.probability_plots(sections).items():
        figure.savefig(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 8000
    assert len(list(tmp_path.iterdir())) == 3
