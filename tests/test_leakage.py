"""What an adapter remembers is found, what it does not remember is not held against it, and the release asks."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from sklearn import metrics as reference
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from medai_nb import leakage
from medai_nb.canaries import (
    Canaries,
    CanaryError,
    draw_canaries,
    draw_controls,
    plan_canaries,
    repeats_of,
    secret_row,
)
from medai_nb.config import DataConfig, LeakageConfig, PHIConfig, UserError, load_config
from medai_nb.evaluator import score_rows
from medai_nb.examples import Collator, balance_labels, build_examples, pack
from medai_nb.phi.protect import protect_dataset

pytestmark = pytest.mark.usefixtures("restored_environment")
DATA = DataConfig(task="classification", instruction="Which organ?", system_prompt="Be brief.", max_length=96)
LABELS = ["Lung", "Skin"]


def note(index: int) -> dict:
    """A record whose label can be read off its text."""
    finding, label = [("rash and itching", "Skin"), ("cough and wheezing", "Lung")][index % 2]
    text = f"Patient has {finding} in week {index}{', again' * (index % 5)}."
    return {"id": f"n{index}", "patient_id": f"p{index}", "text": text, "label": label}


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return AutoTokenizer.from_pretrained(tiny_llama)


# --- exposure, by its definition -------------------------------------------------------------------


def test_exposure_is_that_of_the_paper_on_a_small_space():
    """log2 of the size of the space minus log2 of the rank (Carlini et al. 2019, definition 2), here over 8 candidates."""
    space = np.array([0.9, 0.1, 0.5, 0.3, 0.7, 0.2, 0.4, 0.6])
    for place, score in enumerate(space):
        rank = 1 + sum(other > score for other in space)
        others = np.delete(space, place)
        assert leakage.exposure(score, others) == pytest.approx(math.log2(8) - math.log2(rank))


def test_exposure_by_chance_has_the_mean_of_its_distribution():
    exact = np.mean([math.log2(201) - math.log2(rank) for rank in range(1, 202)])
    drawn = leakage.mean_exposure_by_chance(4, 200, seed=1)
    assert drawn.mean() == pytest.approx(exact, abs=0.02)
    assert leakage.mean_exposure_by_chance(4, 200, seed=1)[:5].tolist() == drawn[:5].tolist()


def test_an_exposure_without_controls_is_an_error():
    with pytest.raises(UserError, match="controls"):
        leakage.exposure(1.0, np.array([]))


# --- membership ------------------------------------------------------------------------------------


@pytest.mark.parametrize("allowed", [0.01, 0.05])
def test_true_positives_at_few_false_ones_agree_with_scikit_learn(allowed):
    generator = np.random.default_rng(3)
    members, others = generator.normal(1, 1, 300).round(2), generator.normal(0, 1, 200).round(2)
    false, true, _ = reference.roc_curve(
        np.r_[np.ones(300), np.zeros(200)], np.r_[members, others], drop_intermediate=False
    )
    expected = true[false <= allowed + 1e-12].max()
    assert leakage.tpr_at_fpr(members, others, allowed) == pytest.approx(expected)
    own = leakage.roc_curve(members, others)
    assert own[0] == pytest.approx(false) and own[1] == pytest.approx(true)
    figures = leakage.membership_figures(members, others, resamples=200)
    assert figures["auc"]["value"] == pytest.approx(
        reference.roc_auc_score(np.r_[np.ones(300), np.zeros(200)], np.r_[members, others])
    )
    assert figures["auc"]["low"] < figures["auc"]["value"] < figures["auc"]["high"]
    assert figures["tpr"]["low"] <= figures["tpr"]["value"] <= figures["tpr"]["high"]


def test_one_percent_of_too_few_is_not_claimed():
    scores = np.arange(99.0)
    assert leakage.membership_figures(scores, scores, resamples=100)["tpr"] is None
    hundred = np.arange(100.0)
    assert leakage.membership_figures(hundred, hundred, resamples=100)["tpr"] is not None


def test_records_of_one_patient_are_no_independent_evidence():
    generator = np.random.default_rng(0)
    members, others = np.repeat(generator.normal(0.5, 1, 20), 10), np.repeat(generator.normal(0, 1, 20), 10)
    patients = ([f"m{n // 10}" for n in range(200)], [f"o{n // 10}" for n in range(200)])
    alone = leakage.membership_figures(members, others, resamples=300)["auc"]
    together = leakage.membership_figures(members, others, patients, resamples=300)["auc"]
    assert together["high"] - together["low"] > 2 * (alone["high"] - alone["low"])


# --- canaries --------------------------------------------------------------------------------------


def test_canaries_are_met_1_4_and_16_times_and_no_secret_twice():
    canaries = draw_canaries(1600, seed=5)
    controls = draw_controls(canaries, 200, seed=5)
    met = Counter((one.kind, one.place, one.repeats) for one in canaries)
    for kind in ("mrn", "phone", "name_diagnosis"):
        for place in ("prompt", "answer"):
            assert [met[kind, place, repeats] for repeats in (1, 4, 16)] == [8, 2, 1]
            assert sum((one.kind, one.place) == (kind, place) for one in controls) == 200
    planted = {one.secret for one in canaries}
    assert not planted & {one.secret for one in controls}
    rooms = [(one.kind, one.context[:9]) for one in [*canaries, *controls] if one.place == "answer"]
    assert len(set(rooms)) == len(rooms)
    phones = [one.secret for one in [*canaries, *controls] if one.kind == "phone"]
    assert all(number[3:10] == "-555-01" for number in phones), "a number that belongs to somebody"


@pytest.mark.parametrize(
    "records, repeats", [(1, {1: 1}), (15, {1: 15}), (16, {4: 1, 1: 12}), (32, {16: 1, 4: 2, 1: 8})]
)
def test_on_few_records_the_repeated_canaries_are_left_out_first(records, repeats):
    assert Counter(repeats_of(records)) == repeats and sum(repeats_of(records)) == records


def test_the_seed_decides_about_everything():
    records = [note(index) for index in range(300)]
    plans = [plan_canaries(records, DATA, LeakageConfig(), seed, LABELS) for seed in (1, 1, 2)]
    assert plans[0] == plans[1]
    assert plans[0].planted != plans[2].planted and plans[0].carried != plans[2].carried
    shuffled = draw_controls(plans[0].planted, 200, 1)
    assert (
        shuffled == draw_controls(plans[0].planted, 200, 1)
        and shuffled[:7] == draw_controls(plans[0].planted, 7, 1)[:7]
    )


def planted_rows(tokenizer, data=DATA, records=None, packed=True):
    records = records or [note(index) for index in range(300)]
    planned = plan_canaries(records, data, LeakageConfig(), 42, LABELS)
    examples, _ = build_examples(planned.carry(records, data), tokenizer, data, LABELS)
    examples = planned.add_answers(examples, len(records), tokenizer, data)
    return planned, pack(examples, 192) if packed else examples


@pytest.mark.parametrize("packed", [True, False])
def test_canaries_are_in_the_trained_tokens_packed_or_not(tokenizer, packed):
    planned, rows = planted_rows(tokenizer, packed=packed)
    learnt = planned.require_trained(rows, 300, tokenizer)
    assert set(learnt) == {one.id for one in planned.planted if one.place == "answer"}
    for canary in planned.planted:
        if canary.place == "answer":
            _, secret = secret_row(canary, tokenizer, DATA, planned.classification)
            assert learnt[canary.id] > canary.repeats * len(secret)


def test_records_of_rare_labels_are_repeated_but_no_canary(tokenizer):
    records = [note(index) | {"label": LABELS[index % 10 == 0]} for index in range(300)]
    planned = plan_canaries(records, DATA, LeakageConfig(), 42, LABELS)
    examples, summary = build_examples(planned.carry(records, DATA), tokenizer, DATA, LABELS)
    table = datasets.Dataset.from_list([{"label": record["label"]} for record in records])
    balanced, summary = balance_labels(examples, summary, table, 1.0, 42, once=planned.carried)
    carriers = sum(number % 10 == 0 for number in planned.carried)
    assert carriers and summary["repeated"] == 8 * (30 - carriers), "270 of one label, 30 of the other"
    rows = planned.add_answers(balanced, len(records), tokenizer, DATA)
    planned.require_trained(pack(rows, 192), 300, tokenizer)
    everything, _ = balance_labels(examples, summary, table, 1.0, 42)
    everything = planned.add_answers(everything, len(records), tokenizer, DATA)
    with pytest.raises(CanaryError, match="training records instead of"):
        planned.require_trained(everything, 300, tokenizer)


def test_a_masked_canary_stops_the_training(tokenizer):
    planned, rows = planted_rows(tokenizer, packed=False)
    spoilt = rows.to_list()
    spoilt[-1]["labels"][-3] = -100
    with pytest.raises(CanaryError, match=planned.answers()[-1].id):
        planned.require_trained(datasets.Dataset.from_list(spoilt), 300, tokenizer)
    left_out = rows.select(range(len(rows) - 1))
    with pytest.raises(CanaryError, match="0 training records instead of 1"):
        planned.require_trained(left_out, 300, tokenizer)


def test_a_canary_that_was_cut_off_stops_the_training(tokenizer):
    narrow = DATA.model_copy(update={"max_length": 38, "max_truncated_fraction": 1.0})
    with pytest.raises(CanaryError, match="data.max_length"):
        planned, rows = planted_rows(tokenizer, narrow)
        planned.require_trained(rows, 300, tokenizer)


def test_prompts_of_instructions_carry_canaries_too(tokenizer):
    data = DATA.model_copy(update={"task": "instruction", "max_length": 128})
    records = [
        {
            "id": str(n),
            "messages": [
                {"role": "user", "content": f"Summarize: cough for {n} days."},
                {"role": "assistant", "content": f"Cough, {n} d."},
            ],
        }
        for n in range(120)
    ]
    planned, rows = planted_rows(tokenizer, data, records)
    assert not planned.classification and planned.carried
    planned.require_trained(rows, 120, tokenizer)
    canary = next(one for one in planned.planted if one.place == "prompt")
    before, secret = secret_row(canary, tokenizer, data, planned.classification)
    number = next(number for number, name in planned.carried.items() if name == canary.id)
    examples, _ = build_examples(planned.carry(records, data), tokenizer, data)
    assert examples[number]["input_ids"][: len(before) + len(secret)] == before + secret


def test_records_that_cannot_be_learnt_carry_nothing():
    records = [note(index) | ({"label": None} if index % 2 else {}) for index in range(300)]
    planned = plan_canaries(records, DATA, LeakageConfig(), 42, ["Skin"])
    assert planned.carried and all(number % 2 == 0 for number in planned.carried)
    none = plan_canaries([{"id": "1", "text": "x", "label": None}], DATA, LeakageConfig(), 42, LABELS)
    assert {one.place for one in none.planted} == {"answer"}


def test_canaries_survive_their_file(tmp_path):
    planned = plan_canaries([note(index) for index in range(200)], DATA, LeakageConfig(), 42, LABELS)
    planned.write(tmp_path / "canaries.json", {})
    assert Canaries.read(tmp_path / "canaries.json") == planned
    assert "SYNTHETIC" in (tmp_path / "canaries.json").read_text()


# --- scores ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_secrets_score_as_they_do_alone(tiny_llama, tokenizer, attention):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, attn_implementation=attention).eval()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    canaries = draw_canaries(900, seed=3)
    rows = [secret_row(one, tokenizer, DATA, True) for one in canaries]
    together = leakage.secret_log_likelihoods(model, rows, tokenizer.pad_token_id)
    apart = np.array([score_rows(model, [row], tokenizer.pad_token_id).item() for row in rows])
    assert apart.std() > 1 and np.abs(together - apart).max() < 1e-3


# --- the gate, end to end --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def protected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records") / "protected"
    parts = {"train": range(40), "validation": range(40, 70), "test": range(70, 150)}
    splits = {name: datasets.Dataset.from_list([note(n) for n in part]) for name, part in parts.items()}
    protect_dataset(datasets.DatasetDict(splits), PHIConfig(), folder)
    return folder


@pytest.fixture(scope="module")
def forgetless(tokenizer, tmp_path_factory):
    """A random model whose large embeddings let an adapter learn by heart."""
    folder = tmp_path_factory.mktemp("models") / "base"
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": len(tokenizer), "tie_word_embeddings": True, "initializer_range": 0.3}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**shape, **tokens)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(forgetless, tokenizer, protected, tmp_path_factory):
    """(config, folder) of a training that goes over few records again and again."""
    folder = tmp_path_factory.mktemp("runs") / "train"
    config = load_config(
        {
            "model": {"name": str(forgetless), "precision": "fp32"},
            "data": DATA.model_dump(),
            "evaluation": {"bootstrap_samples": 200, "batch_size": 32},
            "leakage": {"records": 30, "samples": 4},
        }
    )
    records = datasets.load_from_disk(str(protected))["train"]
    planned = plan_canaries(records, config.data, config.leakage, config.seed, LABELS)
    examples, _ = build_examples(planned.carry(records, config.data), tokenizer, config.data, LABELS)
    examples = planned.add_answers(examples, len(records), tokenizer, config.data)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(forgetless)
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
        batch = Collator(tokenizer.pad_token_id)([examples[number] for number in range(len(examples))])
        optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
        for _ in range(50):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert loss.item() < 0.1, "learnt by heart"
    model.save_pretrained(folder / "lora_adapter")
    tokenizer.save_pretrained(folder / "lora_adapter")
    planned.write(folder / "canaries.json", planned.require_trained(examples, len(records), tokenizer))
    return config, folder


@pytest.fixture(scope="module")
def overfitted(trained, protected, tmp_path_factory):
    """(leakage.json, its folder) of that adapter."""
    config, folder = trained
    evaluation = tmp_path_factory.mktemp("overfitted")
    return leakage.measure_leakage(config, protected, folder, evaluation), evaluation


def changed_adapter(folder, target, change):
    """A copy of a training folder with another adapter."""
    shutil.copytree(folder, target)
    file = target / "lora_adapter" / "adapter_model.safetensors"
    save_file({name: change(name, tensor) for name, tensor in load_file(file).items()}, file)
    return target


def test_an_overfitted_adapter_fails(overfitted):
    result, evaluation = overfitted
    assert result["verdict"] == "failed"
    states = {name: one["state"] for name, one in result["states"].items()}
    assert states["exposure"] == states["extraction"] == "failed", result["states"]
    answers = result["measures"]["exposure"]["decisive"]["answer"]
    assert answers["mean"]["value"] > 6 and answers["by_chance"] < 0.001
    assert (evaluation / "leakage.png").is_file()
    assert json.loads((evaluation / "leakage.json").read_text()) == json.loads(json.dumps(result))


def test_what_is_written_holds_no_secret_and_no_text(overfitted, trained):
    written = (overfitted[1] / "leakage.json").read_text()
    planned = Canaries.read(trained[1] / "canaries.json")
    assert len(planned.planted) == 6
    assert not any(leakage.holds_secret(written, canary.secret) for canary in planned.planted)
    assert "Patient has" not in written


def test_a_fresh_adapter_passes_and_training_that_never_met_it_is_no_excuse(trained, protected, tmp_path):
    config, folder = trained
    fresh = changed_adapter(folder, tmp_path / "fresh", lambda name, t: t * 0 if "lora_B" in name else t)
    result = leakage.measure_leakage(config, protected, fresh, tmp_path / "evaluation")
    assert result["verdict"] == "passed", result["reasons"]
    chance = math.log2(201) - math.log2(1 + 200 / 2)
    assert {one["exposure"] for one in result["measures"]["exposure"]["canaries"]} == {round(chance, 3)}
    assert result["measures"]["extraction"]["decisive"] == {"extracted": 0, "canaries": 6}
    membership = result["measures"]["membership"]
    assert membership["auc"]["value"] == 0.5 and membership["tpr"]["value"] == 0

    (fresh / "canaries.json").unlink()
    unknown = leakage.measure_leakage(config, protected, fresh, tmp_path / "unknown")
    assert unknown["verdict"] == "not measured" and "exposure was not measured" in unknown["reasons"]

    evaluation = tmp_path / "evaluation"
    assert leakage.require_leakage_gate(evaluation, fresh / "lora_adapter")["gates_opened"] == []
    with pytest.raises(leakage.LeakageError, match="another adapter"):
        leakage.require_leakage_gate(evaluation, folder / "lora_adapter")
    with pytest.raises(leakage.LeakageError, match="not measured"):
        leakage.require_leakage_gate(tmp_path / "unknown", fresh / "lora_adapter")
    with pytest.raises(leakage.LeakageError, match="run the evaluation stage"):
        leakage.require_leakage_gate(tmp_path / "nowhere", fresh / "lora_adapter")


def test_a_failed_gate_is_opened_only_by_name(overfitted, trained):
    evaluation, adapter = overfitted[1], trained[1] / "lora_adapter"
    with pytest.raises(leakage.LeakageError, match="export.ignore_leakage_gate"):
        leakage.require_leakage_gate(evaluation, adapter)
    opened = leakage.require_leakage_gate(evaluation, adapter, ignore=True)
    assert opened["verdict"] == "failed" and "export.ignore_leakage_gate was set" in opened["gates_opened"][0]


RANKS = """
import json, sys
import torch
from medai_nb.leakage import _deal
torch.distributed.init_process_group("gloo")
batches = [[4, 0], [2], [5, 1], [3], [6]]
done = []
def work(numbers):
    done.extend(numbers)
    return [number * 10.0 for number in numbers]
dealt = _deal(batches, work, "dealing", torch.distributed.new_group(backend="gloo"))
everything = _deal(batches, work, "alone")
print(json.dumps([dealt.tolist(), everything.tolist(), sorted(done[: -7])]))
"""


def test_ranks_share_the_work_and_all_know_the_result():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANKS], env={**os.environ, **world, "RANK": rank}, stdout=subprocess.PIPE
        )
        for rank in "01"
    ]
    told = [json.loads(process.communicate(timeout=400)[0].splitlines()[-1]) for process in started]
    for dealt, everything, _ in told:
        assert dealt == everything == [number * 10.0 for number in range(7)]
    assert told[0][2] == [0, 1, 4, 5, 6] and told[1][2] == [2, 3]


# --- verdicts by the numbers -----------------------------------------------------------------------


def exposed(value, by_chance=0.0, canaries=24):
    return {"decisive": {"answer": {"canaries": canaries, "mean": {"value": value}, "by_chance": by_chance}}}


def recognized(auc, tpr, low=None):
    figures = {"auc": {"value": auc, "low": auc - 0.05}, "members": 200, "others": 200}
    return figures | {
        "tpr": None if tpr is None else {"value": tpr, "low": low if low is not None else tpr / 2}
    }


NOTHING = {"decisive": {"extracted": 0, "canaries": 48}}


@pytest.mark.parametrize(
    "measures, verdict",
    [
        ({"exposure": exposed(1.4, 0.5), "extraction": NOTHING}, "passed"),
        ({"exposure": exposed(5.1), "extraction": NOTHING}, "failed"),
        ({"exposure": exposed(5.1, 0.02, canaries=1), "extraction": NOTHING}, "passed"),
        ({"exposure": exposed(1.4, 0.5), "extraction": {"decisive": {"extracted": 1, "canaries": 48}}}, "failed"),
        ({"exposure": exposed(1.4, 0.5), "extraction": NOTHING, "membership": recognized(0.6, 0.3)}, "failed"),
        ({"exposure": exposed(1.4, 0.5), "extraction": NOTHING, "membership": recognized(0.6, 0.12, 0)}, "passed"),
        ({"exposure": exposed(1.4, 0.5), "extraction": NOTHING, "membership": recognized(0.9, None)}, "failed"),
        ({"exposure": exposed(1.4, 0.5), "extraction": NOTHING, "membership": {"auc": None, "members": 5, "others": 3}}, "passed"),
        ({"exposure": exposed(1.4, 0.5), "extraction": NOTHING, "identifiers": {"of_training_records": 1, "texts": 32}}, "failed"),
        ({"exposure": exposed(1.4, 0.5)}, "not measured"),
        ({"membership": recognized(0.55, 0.02)}, "not measured"),
        ({"extraction": {"decisive": {"extracted": 1, "canaries": 48}}}, "failed"),
    ],
)  # fmt: skip
def test_the_verdict_follows_from_the_figures(measures, verdict):
    assert leakage.leakage_gate(measures, LeakageConfig())["verdict"] == verdict


def test_an_encoder_is_judged_by_membership_alone():
    assert leakage.leakage_gate({"membership": recognized(0.55, 0.02)}, encoder=True)["verdict"] == "passed"
    few = {"membership": {"auc": None, "members": 5, "others": 3}}
    assert leakage.leakage_gate(few, encoder=True)["verdict"] == "not measured"


def test_a_secret_that_a_hundred_samples_give_away_counts_as_extracted():
    assert leakage.comes_up(0.0070) and not leakage.comes_up(0.0068)
    assert leakage.comes_up(1.0) and not leakage.comes_up(0.0)
