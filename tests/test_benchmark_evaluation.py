"""Scoring labels is measured beside the prompt repeated for each label, on the same records and with the same figures."""

import pytest

from medai_nb.benchmark import benchmark_evaluation, evaluation_table
from medai_nb.config import RunConfig, UserError


def settings(model, **data):
    return RunConfig.load(
        {
            "model": {"name": str(model), "precision": "fp32"},
            "data": {"dataset_path": "demo", "max_records": 120, "max_length": 160, **data},
            "evaluation": {"max_records": 5, "batch_size": 3},
        }
    )


def test_both_ways_give_the_same_likelihoods_and_the_shared_one_is_faster(tiny_llama):
    result = benchmark_evaluation(settings(tiny_llama), repetitions=1)
    assert (
        result["records"] == 5
        and result["labels"] > 10
        and result["precision"] == "fp32"
        and 0 < result["peak_share"] < 1
    )
    assert result["difference"] < 1e-3
    assert result["repeated"] > 1.5 * result["shared"]
    lines = evaluation_table(result)
    assert f"{500 * result['shared'] / 5:.1f} s, extrapolated" in lines["500 records"]
    assert (
        f"{result['repeated'] / result['shared']:.1f} x the time" in lines["prompt repeated for each label"]
    )


def test_data_without_labels_is_refused(tiny_llama, tmp_path):
    rows = "".join(f'{{"instruction": "What is {n}?", "response": "Number {n}."}}\n' for n in range(40))
    (tmp_path / "chats.jsonl").write_text(rows)
    config = settings(tiny_llama, dataset_path=str(tmp_path / "chats.jsonl"), group_by=[], near_copies=None)
    with pytest.raises(UserError, match="give data with text and label"):
        benchmark_evaluation(config)
