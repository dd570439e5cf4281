"""Public benchmarks are read from local files, checked row by row, and answered as lm-eval answers them."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from medai_nb import public_benchmarks as benchmarks
from medai_nb.cli import main
from medai_nb.config import EvaluationConfig, RunConfig, UserError
from medai_nb.evaluator import ClinicalEvaluator, score_rows
from medai_nb.public_benchmarks import evaluate_benchmark, option_log_likelihoods, read_benchmark

PUBMEDQA = Path(__file__).parents[2] / "shared" / "data" / "pubmedqa" / "pubmedqa_train500.json"

ROWS = {
    "pubmedqa": {"QUESTION": "Does it help?", "CONTEXTS": ["First.", "Second."], "final_decision": "maybe"},
    "medqa": {
        "question": "Which?",
        "options": {"A": "one", "B": "two", "C": "three", "D": "four"},
        "answer": "three",
        "answer_idx": "C",
    },
    "medmcqa": {
        "id": "x",
        "question": "Which?",
        "opa": "one",
        "opb": "two",
        "opc": "three",
        "opd": "four",
        "cop": 3,
    },
    "mmlu_medical": {
        "question": "Which?",
        "choices": ["one", "two", "three", "four"],
        "answer": 2,
        "subject": "college_medicine",
    },
}
LISTED = "A. one\nB. two\nC. three\nD. four\nAnswer:"
PROMPTS = {
    "pubmedqa": "Abstract: First.\nSecond.\nQuestion: Does it help?\nAnswer:",
    "medqa": f"Question: Which?\n{LISTED}",
    "medmcqa": f"Question: Which?\nChoices:\n{LISTED}",
    "mmlu_medical": "The following are multiple choice questions (with answers) about college medicine.\n\nWhich?\n"
    + LISTED,
}


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ROWS)
def test_a_row_becomes_the_prompt_that_lm_eval_shows(name, tmp_path):
    (question,) = read_benchmark(name, lines(tmp_path / "rows.jsonl", [ROWS[name]]))
    assert question.prompt == PROMPTS[name]
    assert question.answer == 2 and question.options == (
        ("yes", "no", "maybe") if name == "pubmedqa" else ("A", "B", "C", "D")
    )


def test_the_files_as_they_are_distributed_are_read(tmp_path):
    pubmedqa = tmp_path / "ori_pqal.json"
    pubmedqa.write_text(json.dumps({"1001": ROWS["pubmedqa"], "1002": ROWS["pubmedqa"]}))
    assert [question.id for question in read_benchmark("pubmedqa", pubmedqa)] == ["1001", "1002"]
    mmlu = tmp_path / "professional_medicine_test.csv"
    with mmlu.open("w", newline="") as stream:
        csv.writer(stream).writerows(
            [["Which, of\nthese?", "one", "two", "three", "four", "D"], ["Why?", "1", "2", "3", "4", "A"]]
        )
    first, second = read_benchmark("mmlu_medical", mmlu)
    assert first.prompt.startswith(
        "The following are multiple choice questions (with answers) about professional medicine."
    )
    assert (first.answer, second.answer) == (3, 0) and "Which, of\nthese?" in first.prompt
    table = tmp_path / "dev.csv"
    pd.DataFrame([ROWS["medmcqa"], ROWS["medmcqa"] | {"cop": 4}]).to_csv(table, index=False)
    assert [question.answer for question in read_benchmark("medmcqa", table)] == [2, 3]


def test_the_right_option_of_medmcqa_is_counted_from_one_or_from_zero(tmp_path):
    def answers(*counted):
        rows = [ROWS["medmcqa"] | {"cop": number} for number in counted]
        return [
            question.answer for question in read_benchmark("medmcqa", lines(tmp_path / "rows.jsonl", rows))
        ]

    assert answers(1, 4) == [0, 3] and answers(0, 3) == [0, 3] and answers(1, 2) == [0, 1]
    with pytest.raises(UserError, match="from 0 in some rows and from 1 in others"):
        answers(0, 4)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("pubmedqa", {"final_decision": "perhaps"}, "row 2: 'final_decision' is none of yes, no, maybe"),
        ("pubmedqa", {"CONTEXTS": "First."}, "row 2: 'CONTEXTS' is no list of paragraphs"),
        ("pubmedqa", {"QUESTION": None}, "row 2: no 'QUESTION', which pubmedqa has"),
        ("medqa", {"options": {"A": "one", "B": "two"}}, "row 2: 'options' are not A, B, C, D"),
        ("medqa", {"answer_idx": "E"}, "row 2: 'answer_idx' is none of A, B, C, D"),
        ("medmcqa", {"cop": 7}, "row 2: 'cop' is no number from 1 to 4"),
        ("medmcqa", {"opb": " "}, "row 2: 'opb' is no text"),
        ("mmlu_medical", {"choices": ["one"]}, "row 2: 'choices' are not four"),
    ],
)
def test_a_row_that_does_not_fit_is_named_with_file_and_key(name, changes, message, tmp_path):
    path = lines(tmp_path / "rows.jsonl", [ROWS[name], ROWS[name] | changes])
    with pytest.raises(UserError, match=f"rows.jsonl, {message}"):
        read_benchmark(name, path)


def test_wrong_names_and_files_are_refused_in_words(tmp_path):
    path = lines(tmp_path / "medqa.jsonl", [ROWS["medqa"]])
    with pytest.raises(UserError, match="unknown benchmark 'PubMedQ': did you mean 'pubmedqa'"):
        read_benchmark("PubMedQ", path)
    with pytest.raises(UserError, match=r"no file .*medqa.json: did you mean .*medqa.jsonl\?"):
        read_benchmark("medqa", tmp_path / "medqa.json")
    with pytest.raises(UserError, match="read from files on this machine"):
        read_benchmark("medqa", "bigbio/med_qa")
    with pytest.raises(UserError, match="looks like medqa: give --benchmark medqa"):
        read_benchmark("mmlu_medical", path)
    with pytest.raises(UserError, match="row 2: not valid JSON"):
        path.write_text(json.dumps(ROWS["medqa"]) + "\n{broken\n")
        read_benchmark("medqa", path)
    with pytest.raises(UserError, match="no questions"):
        read_benchmark("medqa", lines(tmp_path / "none.jsonl", []))


@pytest.fixture(scope="module")
def tokenizer(embedded_folder):
    return AutoTokenizer.from_pretrained(embedded_folder)


@pytest.fixture(scope="module")
def model(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1)
    return model


def questions(count=9):
    return [
        benchmarks.pubmedqa_question(
            ROWS["pubmedqa"] | {"QUESTION": f"Does {'very ' * number}early therapy help?", "id": str(number)}
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("prompt", ["plain", "chat"])
def test_an_option_scores_what_the_model_gives_it_in_a_row_of_its_own(model, tokenizer, prompt):
    evaluator = ClinicalEvaluator(model, tokenizer, settings=EvaluationConfig(batch_size=4))
    scores, lengths, cut = option_log_likelihoods(evaluator, questions(), prompt)
    assert cut == 0 and scores.std() > 0.2
    for row, question in enumerate(questions()):
        ids, options = benchmarks._encoded(question, tokenizer, prompt)
        assert [len(option) for option in options] == lengths[row].tolist()
        alone = [score_rows(model, [(ids, option)], 0)[0].item() for option in options]
        assert scores[row] == pytest.approx(alone, abs=1e-4)
    if prompt == "chat":
        assert (lengths > 1).all(), "the end of the turn is part of the option"


def test_a_question_longer_than_the_context_loses_its_beginning_and_is_counted(model, tokenizer):
    long = benchmarks.pubmedqa_question(ROWS["pubmedqa"] | {"CONTEXTS": ["word " * 3000]})
    scores, _, cut = option_log_likelihoods(ClinicalEvaluator(model, tokenizer), [long, questions(1)[0]])
    assert cut == 1 and np.isfinite(scores).all()


def run_config(folder, **evaluation):
    settings = {"bootstrap_samples": 100, **evaluation}
    return RunConfig.load({"model": {"name": str(folder), "precision": "fp32"}, "evaluation": settings})


def test_base_and_adapter_are_measured_beside_the_majority(tiny_llama, tmp_path, capsys):
    answers = ["yes", "yes", "yes", "no", "no", "maybe"] * 2
    rows = {
        str(n): ROWS["pubmedqa"] | {"QUESTION": f"Does {n} help?", "final_decision": answer}
        for n, answer in enumerate(answers)
    }
    (tmp_path / "data.json").write_text(json.dumps(rows))
    peft = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama),
        LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    peft.save_pretrained(tmp_path / "run" / "train" / "lora_adapter")
    command = [
        "evaluate",
        "--benchmark",
        "pubmedqa",
        "--data",
        str(tmp_path / "data.json"),
        "--model_name",
        str(tiny_llama),
    ]
    command += ["-p", "evaluation.bootstrap_samples=100", "-p", "model.precision=fp32"]
    assert main([*command, "--adapter", str(tmp_path / "run"), "--output_dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "always 'yes'" in printed and "macro F1" in printed
    result = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert result["majority"]["overall"]["accuracy"]["value"] == 0.5
    assert result["difference"]["accuracy"]["value"] == 0, "an untrained adapter changes nothing"
    frame = pd.read_parquet(tmp_path / "out" / "predictions.parquet")
    assert frame["model"].tolist() == ["base"] * 12 + ["tuned"] * 12
    likeliest = frame.filter(like="log_likelihood/").to_numpy().argmax(axis=1)
    assert [["yes", "no", "maybe"][place] for place in likeliest] == frame["predicted"].tolist()
    right = (frame["answer"] == frame["predicted"])[frame["model"] == "tuned"].mean()
    assert result["tuned"]["overall"]["accuracy"]["value"] == pytest.approx(right)
    command[command.index("--model_name") + 1] = "embedded"
    assert main([*command, "--adapter", str(tmp_path / "run")]) == 2
    assert "was trained on" in capsys.readouterr().err
    assert main([*command, "--adapter", str(tmp_path / "nothing")]) == 2
    assert "holds no adapter" in capsys.readouterr().err


def test_without_lm_eval_the_extra_is_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    monkeypatch.setattr(benchmarks, "load_model", lambda *_: pytest.fail("a model was loaded"))
    (tmp_path / "pubmedqa.json").write_text(json.dumps({"1": ROWS["pubmedqa"]}))
    with pytest.raises(UserError, match=r"pip install 'medai_nb\[lm_eval\]'"):
        evaluate_benchmark("pubmedqa", tmp_path / "pubmedqa.json", with_lm_eval=True)


@pytest.mark.skipif(not PUBMEDQA.is_file(), reason="PubMedQA (shared/data/pubmedqa) is not here")
def test_lm_eval_gives_the_same_answer_to_every_question(tiny_llama, model, tokenizer, tmp_path):
    pytest.importorskip("lm_eval", reason="the extra lm_eval is not installed")
    from lm_eval.tasks.pubmedqa.preprocess_pubmedqa import doc_to_text

    rows = json.loads(PUBMEDQA.read_text())
    asked = read_benchmark("pubmedqa", PUBMEDQA)
    assert [question.prompt for question in asked] == [doc_to_text(row) for row in rows.values()]
    asked = asked[::8][:60]
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "some.json").write_text(json.dumps({question.id: rows[question.id] for question in asked}))
    result = evaluate_benchmark(
        "pubmedqa", tmp_path / "some.json", run_config(tmp_path / "model"), with_lm_eval=True
    )
    beside = result["lm_eval"]
    assert beside["same_answers"] == beside["questions"] == 60 and beside["different"] == []
    assert beside["largest_difference"] < 1e-3
    assert beside["accuracy"] == pytest.approx(result["base"]["overall"]["accuracy"]["value"])
