"""Two files in, two protected and tokenized data sets out; and where caches and outputs go."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from medai_nb.config import RunConfig, UserError
from medai_nb.data_processor import DataProcessor
from medai_nb.models import model_cache_dir
from medai_nb.tables import data_cache_dir, scratch_file

NAMES = ["Adams", "Baker", "Clark", "Davis", "Evans"]
WORDS = ["cough", "fever", "headache", "nausea", "rash", "fatigue", "dyspnea", "vertigo", "edema", "pain"]


def visits(first: int, count: int) -> list[dict]:
    return [
        {
            "id": f"v{number}",
            "text": f"Patient: John {NAMES[number % 5]}, MRN 84{number:05d}. Complains of {WORDS[number % 10]} and "
            f"{WORDS[number // 10 % 10]} since {number % 7 + 2} days.",
            "label": ["acute", "chronic"][number % 2],
            "metadata": {"patient_id": f"P{number}", "age": 40},
        }
        for number in range(first, first + count)
    ]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text(json.dumps({"data": rows}), encoding="utf8")
    return path


@pytest.fixture
def files(tmp_path):
    return write(tmp_path / "train.json", visits(0, 40)), write(tmp_path / "val.json", visits(40, 10))


def test_files_become_protected_token_ids_that_a_data_loader_takes(files, tiny_llama):
    from torch.utils.data import DataLoader

    processor = DataProcessor(max_length=256, tokenizer_name=str(tiny_llama), enable_phi_protection=True)
    train, validation = processor.load_and_preprocess(train_file=files[0], validation_file=files[1])
    assert (len(train), len(validation)) == (40, 10)
    assert set(train.column_names) == {"input_ids", "attention_mask", "labels", "length"}
    texts = " ".join(
        processor.tokenizer.decode(row) for row in [*train["input_ids"], *validation["input_ids"]]
    )
    assert not any(name in texts for name in NAMES) and "8400001" not in texts and "cough" in texts
    assert processor.certificate["passed"] and processor.labels == ["acute", "chronic"]
    batch = next(iter(DataLoader(train, batch_size=4, collate_fn=processor.collator)))
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert ((batch["labels"] != -100).sum(dim=1) > 0).all()


def test_protection_can_be_switched_off_and_validation_is_held_out_of_training(files, tiny_llama):
    processor = DataProcessor(256, str(tiny_llama), enable_phi_protection=False)
    train, validation = processor.load_and_preprocess(files[0])
    assert (len(train), len(validation)) == (36, 4) and processor.certificate is None
    assert any(name in processor.tokenizer.decode(train[0]["input_ids"]) for name in NAMES)


def test_files_that_share_a_patient_are_refused(files, tiny_llama, tmp_path):
    shared = write(tmp_path / "shared.json", visits(39, 3))
    with pytest.raises(UserError, match="same patient_id in 1 cases"):
        DataProcessor(256, str(tiny_llama)).load_and_preprocess(files[0], shared)


def test_unknown_settings_name_the_nearest():
    with pytest.raises(UserError, match="did you mean"):
        DataProcessor(colums={"text": "note"})
    with pytest.raises(UserError, match="redaction_method"):
        DataProcessor(phi_redaction_method="blur")


MAPPED = """
from datasets import Dataset
from medai_nb.data_processor import DataProcessor
rows = Dataset.from_list([
    {"text": "Mr. John Smith called from 212-555-0147.", "doctor_name": "Dr. Mary Jones", "patient_id": "p1"},
    {"text": "Mr. John Smith was seen. No fever.", "doctor_name": None, "patient_id": "p1"},
])
done = rows.map(DataProcessor().protect, with_indices=True, num_proc=2)[:]
assert "Smith" not in str(done) and "Jones" not in str(done) and "0147" not in str(done)
assert done["patient_id"][0] == done["patient_id"][1] != "p1"
"""


def test_protection_works_inside_map_in_two_processes():
    environment = {name: value for name, value in os.environ.items() if name != "PHI_HASH_KEY"}
    result = subprocess.run(
        [sys.executable, "-c", MAPPED], env=environment, capture_output=True, text=True, timeout=400
    )
    assert result.returncode == 0, result.stderr[-2000:]


def test_strict_validation_stops_a_map_with_the_row_and_without_the_value(monkeypatch):
    from datasets import Dataset

    processor = DataProcessor(phi_validation_strict=True)
    monkeypatch.setattr(processor._redactor, "redact_record", lambda record: (dict(record), []))
    rows = Dataset.from_list([{"text": "Call 212-555-0147."}])
    with pytest.raises(UserError, match=r"row 0 still has .*text: phone number") as caught:
        rows.map(processor.protect, with_indices=True)
    assert "0147" not in str(caught.value)


def test_caches_and_outputs_follow_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MODEL_CACHE_DIR", str(tmp_path / "models"))
    monkeypatch.setenv("DATA_CACHE_DIR", str(tmp_path / "data_cache"))
    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path / "outputs"))
    assert model_cache_dir() == tmp_path / "models"
    assert data_cache_dir() == tmp_path / "data_cache"
    assert RunConfig.load({"name": "visit"}).run_dir == tmp_path / "outputs" / "visit"
    with scratch_file() as file:
        assert str(tmp_path / "data_cache") in os.readlink(f"/proc/self/fd/{file.fileno()}")


def test_hub_data_sets_are_kept_in_the_data_cache(monkeypatch, tmp_path):
    import datasets

    from medai_nb.records import load_records

    asked = {}

    def load_dataset(name, cache_dir=None):
        asked.update(name=name, cache_dir=cache_dir)
        return datasets.DatasetDict(train=datasets.Dataset.from_list([{"text": "a", "label": "x"}]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("DATA_CACHE_DIR", str(tmp_path))
    assert len(load_records("someone/notes").dataset) == 1
    assert asked == {"name": "someone/notes", "cache_dir": str(tmp_path)}
