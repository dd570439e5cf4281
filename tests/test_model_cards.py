"""Both cards say what was measured, what was not, and what was opened by hand; no more and nothing else."""

import hashlib
import json
import re
from xml.etree import ElementTree

import pytest
import yaml
from huggingface_hub import ModelCard
from releases import (
    HOSPITAL_FOLDER,
    PATIENT_TEXT,
    all_figures,
    few_figures,
    opened,
    write_run,
    written_figures,
)

from medai_nb import export, model_cards
from medai_nb.config import RunConfig
from medai_nb.evaluator import SHOWN_NAMES, format_figure
from medai_nb.release_files import CHAI_NAMESPACE, chai_problems, verify_release
from medai_nb.run_folder import read_json, write_json_atomic
from medai_nb.safety_report import RATES

# Fields that the hub documents for the front matter of a model card.
HUB_FIELDS = {
    "language", "license", "license_name", "license_link", "library_name", "tags", "datasets", "metrics",
    "base_model", "base_model_relation", "pipeline_tag", "thumbnail", "inference", "new_version", "model-index",
}  # fmt: skip
STATED = {
    "developer": 'Ward 7 <b>&</b> "friends"',
    "contact": "a@b.example",
    "clinical_risk": "low | judged by QA",
}


@pytest.fixture(scope="module")
def released(tmp_path_factory, small_llama, tuned):
    """(metadata, folder of the release, folder of the run) of a run in which everything was measured."""
    folder = tmp_path_factory.mktemp("cards")
    config = write_run(folder / "run", small_llama, tuned, all_figures(), card=STATED, lora={"r": 4})
    return export.export_release(config, folder / "run", folder / "release"), folder / "release", folder


def sections(card: str) -> dict[str, str]:
    """Title -> text of a Markdown card."""
    parts = card.split("\n## ")[1:]
    return {part.partition("\n")[0]: part.partition("\n")[2] for part in parts}


def table_rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def text_of(card: str, name: str) -> str:
    return ElementTree.fromstring(card).find(f".//{{{CHAI_NAMESPACE}}}{name}").text


def results_of(card: str, metric: str) -> dict[str, dict]:
    """Label -> value of one of the three key metrics."""
    element = ElementTree.fromstring(card).find(f".//{{{CHAI_NAMESPACE}}}{metric}")
    items = element.iter(f"{{{CHAI_NAMESPACE}}}MetricResult")
    return {item[0].text: json.loads(item[1].text) for item in items}


def estimate(figure: dict) -> dict:
    if figure["low"] is None:
        return {"kind": "single", "value": figure["value"]}
    ends = {"lower": figure["low"], "upper": figure["high"], "level": 95}
    return {"kind": "estimate_ci", "estimate": figure["value"], **ends}


def test_every_figure_of_the_evaluation_stands_in_the_card(released):
    _, folder, run = released
    figures = read_json(run / "run" / "evaluation" / "metrics.json")
    found = sections((folder / "README.md").read_text())
    reports = figures["classification"]
    rows = {row[0]: row[1:] for row in table_rows(found["Evaluation"])}
    for name, figure in reports["tuned"]["overall"].items():
        if name in SHOWN_NAMES:
            expected = [format_figure(reports["base"]["overall"][name]), format_figure(figure)]
            assert rows[SHOWN_NAMES[name]] == [
                *expected,
                format_figure(reports["difference"][name], signed=True),
            ]
    rows = {row[0]: row[1:] for row in table_rows(found["Calibration"])}
    for name, figure in figures["calibration"]["scaled"]["overall"].items():
        if name in SHOWN_NAMES:
            assert rows[SHOWN_NAMES[name]][1] == format_figure(figure)
    assert f"Temperature {figures['calibration']['temperature']['temperature']:.3f}" in found["Calibration"]
    selective = figures["selective"]
    values = [row[1] for row in table_rows(found["Abstaining"])[2:]]
    chosen = selective["at_threshold"]
    asked = ["error_rate", "coverage_at_risk", "area"]
    assert values == [format_figure(selective[name]) for name in asked] + [
        format_figure(chosen["coverage"]),
        format_figure(chosen["risk"]),
    ]
    groups = figures["fairness"]["columns"]["gender"]["groups"]
    rows = {row[1]: row[2:] for row in table_rows(found["Subgroups"])}
    for name in ("F", "M"):
        own = groups[name]["overall"]
        assert rows[name][:3] == [str(groups[name]["patients"])] + [
            format_figure(own[key]) for key in ("accuracy", "macro_f1")
        ]
    rows = {row[0]: row[1:] for row in table_rows(found["Safety"])}
    for name, shown in RATES.items():
        figure = figures["safety"]["tuned"]["rates"][name]
        assert rows[shown] == [str(figure["total"]), format_figure(figure)]


def test_the_register_gets_the_same_figures_with_their_intervals(released):
    _, folder, run = released
    figures = read_json(run / "run" / "evaluation" / "metrics.json")
    card = (folder / "applied_model_card.xml").read_text()
    reports = figures["classification"]
    expected = {
        f"{SHOWN_NAMES[name]}{which}": estimate(reports[model]["overall"][name])
        for model, which in (("tuned", ""), ("base", " (base model)"))
        for name in SHOWN_NAMES
        if reports[model]["overall"].get(name, {"value": None})["value"] is not None
    }
    assert results_of(card, "UsefulnessUsabilityEfficacy") == expected
    report = figures["fairness"]["columns"]["gender"]
    names = {"accuracy": "accuracy", "macro F1": "macro_f1"}
    expected = {
        f"{key.replace('_', ' ')}, gender: {group}": estimate(report["groups"][group]["overall"][key])
        for group in ("F", "M")
        for key in names.values()
    } | {
        f"{key.replace('_', ' ')}, gender: largest gap between groups": estimate(report["gap"][key])
        for key in names.values()
    }
    assert results_of(card, "FairnessEquity") == expected
    chosen = figures["selective"]["at_threshold"]
    rates = figures["safety"]["tuned"]["rates"]
    expected = {shown: estimate(rates[name]) for name, shown in RATES.items()}
    expected["leakage gate"] = {"kind": "single", "value": "passed"}
    error = figures["calibration"]["as_is"]["overall"]["expected_calibration_error"]
    expected["expected calibration error"] = estimate(error)
    expected["share answered above the threshold"] = estimate(chosen["coverage"])
    expected["error rate above the threshold"] = estimate(chosen["risk"])
    assert results_of(card, "SafetyReliability") == expected


def test_the_hub_gets_the_measured_results_and_only_fields_that_it_documents(released):
    metadata, folder, _ = released
    header = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    assert set(header) <= HUB_FIELDS and header["pipeline_tag"] == "text-generation"
    card = ModelCard.load(folder / "README.md")
    tuned = metadata["evaluation"]["classification"]["tuned"]["overall"]
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    names = {SHOWN_NAMES[name]: name for name in model_cards.HUB_METRICS}
    assert {"accuracy", "macro F1"} <= found.keys()
    assert found == {name: tuned[names[name]]["value"] for name in found}
    assert {result.dataset_split for result in card.data.eval_results} == {"test"}


@pytest.mark.parametrize(
    "figures, missing",
    [
        (few_figures, {"Calibration", "Abstaining", "Subgroups", "Safety"}),
        (written_figures, {"Calibration", "Abstaining", "Subgroups", "Safety"}),
        (dict, {"Evaluation", "Calibration", "Abstaining", "Subgroups", "Safety"}),
    ],
    ids=["labels only", "answers only", "nothing"],
)
def test_what_was_not_measured_is_called_that_in_both_cards(released, figures, missing):
    metadata = released[0] | {"evaluation": figures()}
    found = sections(model_cards.model_card(metadata))
    assert {title for title, text in found.items() if "Not measured" in text} == missing
    card = model_cards.chai_card(metadata)
    assert chai_problems(card) == []
    assert results_of(card, "FairnessEquity") == {"not measured": {"kind": "single", "value": "not measured"}}
    assert text_of(card, "KnownBiasesOrEthicalConsiderations").startswith("Not measured")
    if figures is dict:
        assert list(results_of(card, "UsefulnessUsabilityEfficacy")) == ["not measured"]
    else:
        assert "not measured" not in results_of(card, "UsefulnessUsabilityEfficacy")


def test_written_answers_stand_in_both_cards(released):
    figures = written_figures()
    metadata = released[0] | {"evaluation": figures, "labels": None}
    rows = {row[0]: row[2] for row in table_rows(sections(model_cards.model_card(metadata))["Evaluation"])}
    assert rows["ROUGE-L"] == format_figure(figures["generation"]["tuned"]["rouge_l"])
    results = results_of(model_cards.chai_card(metadata), "UsefulnessUsabilityEfficacy")
    assert results["ROUGE-L"] == estimate(figures["generation"]["tuned"]["rouge_l"])
    assert text_of(model_cards.chai_card(metadata), "OutcomesAndOutputs") == "For each text a written answer."


def test_a_small_group_is_named_without_its_figures(released):
    metadata, folder, _ = released
    small = metadata["evaluation"]["fairness"]["columns"]["gender"]["groups"]["X"]
    assert small["small"] and small["patients"] == 5
    rows = {row[1]: row[2:] for row in table_rows(sections((folder / "README.md").read_text())["Subgroups"])}
    assert rows["X"] == ["fewer than 10", "–", "–", "–"]
    assert not any(
        "gender: X" in label
        for label in results_of((folder / "applied_model_card.xml").read_text(), "FairnessEquity")
    )


def test_no_patient_and_no_folder_of_the_hospital_stands_in_a_paper(released, small_llama):
    _, folder, run = released
    assert PATIENT_TEXT in (run / "run" / "evaluation" / "metrics.json").read_text()
    for name in ("README.md", "applied_model_card.xml", "sbom.cdx.json"):
        text = (folder / name).read_text()
        for secret in (
            PATIENT_TEXT,
            HOSPITAL_FOLDER,
            str(run),
            str(small_llama.parent),
            "file://",
            "Zwingenberger",
        ):
            assert secret not in text, f"{secret} in {name}"


def test_what_the_hospital_states_stands_in_both_cards_whatever_its_characters(released):
    _, folder, _ = released
    rows = dict(
        row[:2]
        for row in table_rows(sections((folder / "README.md").read_text())["Intended use"])
        if len(row) == 2
    )
    assert rows["developer"] == STATED["developer"] and rows["consent"] == "not stated"
    assert "low \\| judged by QA" in (folder / "README.md").read_text(), "a bar would end the cell"
    card = (folder / "applied_model_card.xml").read_text()
    assert text_of(card, "ModelDeveloper") == STATED["developer"]
    assert text_of(card, "ClinicalRiskLevel") == STATED["clinical_risk"]
    assert text_of(card, "FundingSource") == "not stated"


@pytest.mark.parametrize("name", ["]]>", "a\x00b\x0bc", "\ud83d", "<!-- x -->", "Ärzte & Söhne", "&#x1;"])
def test_any_text_makes_well_formed_xml(released, name):
    metadata = released[0] | {"labels": [name, "Eye"]}
    metadata["card"] = metadata["card"] | {"developer": name}
    card = model_cards.chai_card(metadata)
    assert chai_problems(card) == []
    readable = name.replace("\x00", "\ufffd").replace("\x0b", "\ufffd").replace("\ud83d", "\ufffd")
    assert text_of(card, "ModelDeveloper") == readable


def test_gates_opened_by_hand_stand_at_the_head_of_both_cards(tmp_path, small_llama, tuned):
    config = write_run(tmp_path / "run", small_llama, tuned)
    (tmp_path / "run" / "protected" / "certificate.json").unlink()
    leakage = tmp_path / "run" / "evaluation" / "leakage.json"
    write_json_atomic(leakage, read_json(leakage) | {"verdict": "failed", "reasons": ["6.2 bits"]})
    export.export_release(opened(config), tmp_path / "run", tmp_path / "release")
    text = (tmp_path / "release" / "README.md").read_text()
    head = text[: text.index("## Intended use")]
    card = (tmp_path / "release" / "applied_model_card.xml").read_text()
    for place in (head, text_of(card, "Summary"), text_of(card, "KnownRisksAndLimitations")):
        assert "A gate was opened by hand: phi.allow_unprotected" in place
        assert "A gate was opened by hand: export.ignore_leakage_gate" in place and "6.2 bits" in place
        assert str(tmp_path) not in place
    assert "trained on **unprotected** clinical text" in text_of(card, "Summary")
    assert results_of(card, "SafetyReliability")["leakage gate"]["value"] == "failed"
    assert verify_release(tmp_path / "release") == []


def test_no_gate_is_mentioned_where_none_was_opened(released):
    _, folder, _ = released
    assert "opened by hand" not in (folder / "README.md").read_text()
    assert "opened by hand" not in (folder / "applied_model_card.xml").read_text()


def test_the_card_says_how_to_do_it_again(released):
    metadata, folder, run = released
    text = sections((folder / "README.md").read_text())["How to reproduce"]
    assert hashlib.sha256((run / "run" / "run.yaml").read_bytes()).hexdigest() in text
    assert "medai run --config run.yaml" in text and "Seed 42" in text
    assert all(f"| {name} | {version} |" in text for name, version in metadata["versions"].items() if version)
    assert metadata["git_commit"] is None or metadata["git_commit"] in text
    assert "`lora.r: 4`" in text and "learning_rate" not in text, "only what is not the default"
    assert "sha256:1" in text, "what the training stage wrote"


def test_every_statement_of_the_hospital_has_a_default_that_claims_nothing():
    card = RunConfig().card.model_dump()
    stated = {name: value for name, value in card.items() if value not in ("not stated", None)}
    assert stated.keys() == {"intended_use", "release_stage"} and card["release_stage"] == "research"


def test_a_card_with_elements_missing_swapped_or_empty_is_found(released):
    _, folder, _ = released
    card = (folder / "applied_model_card.xml").read_text()
    assert chai_problems(card) == []
    without = card.replace("<FundingSource>not stated</FundingSource>", "")
    assert len(chai_problems(without)) == 1 and "TransparencyInformation holds" in chai_problems(without)[0]
    swapped = re.sub("(<ModelDeveloper>.*</ModelDeveloper>)\\s*(<DeveloperContact>.*>)", r"\2\1", card)
    assert swapped != card and "BasicInfo holds" in chai_problems(swapped)[0]
    empty = card.replace("<FundingSource>not stated<", "<FundingSource> <")
    assert chai_problems(empty) == ["TrustIngredients/TransparencyInformation/FundingSource is empty"]
    broken = card.replace('{"kind"', "{kind", 1)
    assert "KeyMetrics/UsefulnessUsabilityEfficacy/Results" in chai_problems(broken)[0]
    assert "not well-formed" in chai_problems(card[:-20])[0]
    assert "document type" in chai_problems('<!DOCTYPE a [<!ENTITY b "c">]><a/>')[0]
    assert "v0.1" in chai_problems(card.replace("v0.2", "v0.1"))[0]
