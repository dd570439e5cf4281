"""The command line: quick, helpful, and one clear answer to wrong input."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from medai_nb.cli import _serving_lines, build_parser, main

COMMANDS = [
    "quickstart",
    "run",
    "train",
    "config",
    "deid",
    "audit",
    "doctor",
    "benchmark",
    "slurm",
    "runs",
    "validate-model",
]
HEAVY = (
    "torch",
    "transformers",
    "deepspeed",
    "datasets",
    "pandas",
    "matplotlib",
    "pydantic",
    "papermill",
    "sklearn",
)


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_answers_without_heavy_imports(arguments):
    program = (
        "import sys\n"
        "from medai_nb.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        f"loaded = [name for name in {HEAVY} if name in sys.modules]\n"
        "assert not loaded, loaded\n"
    )
    result = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "usage: medai" in result.stdout


def test_every_command_is_listed():
    assert all(name in build_parser().format_help() for name in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["run", "--config", "nowhere.yaml"], "configuration 'nowhere.yaml' not found"),
        (["run", "--config", "quickstart", "-p", "lora.rank=3"], "command line: unknown setting"),
        (["run", "--config", "quickstart", "-p", "lora.r=three"], "command line: lora.r: "),
        (["run", "--config", "quickstart", "-p", "lora.r"], "write key=value"),
        (["run", "--config", "quickstart", "--only", "trian"], "unknown stage 'trian'"),
        (["run", "--config", "quickstart", "--dry_run", "--from", "trian"], "unknown stage 'trian'"),
        (["deid", "no_such_note.txt"], "no_such_note.txt"),
        (["benchmark", "--benchmark_type", "lunch"], "unknown benchmark"),
        (["config", "no_such.yaml"], "not found"),
        (["train", "--config", "no_such.json"], "not found"),
        (["train"], "no data"),
    ],
)
def test_wrong_input_has_one_answer_and_no_traceback(arguments, answer, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert answer in captured.err
    assert "Traceback" not in captured.err
    assert list(tmp_path.iterdir()) == [], "wrong input leaves nothing behind"


def test_model_that_is_not_there_is_reported_with_what_to_do(capsys):
    assert main(["validate-model", "no/such-model"]) == 1
    assert "problem" in capsys.readouterr().out


def test_deid_writes_text_without_its_identifiers(tmp_path, capsys):
    note = tmp_path / "note.txt"
    note.write_text("Dr. Eleanor Whitfield saw the patient on 03/14/2024. MRN: 48213377.\n")
    assert main(["deid", str(note)]) == 0
    redacted = capsys.readouterr().out
    assert not any(value in redacted for value in ("Whitfield", "03/14", "48213377"))
    assert redacted.endswith("\n")


def test_deepspeed_file_given_as_config_is_taken_as_such(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 2}}')
    (tmp_path / "records.csv").write_text("")
    seen = {}
    monkeypatch.setattr(
        "medai_nb.cli._run",
        lambda config, options, stop_after: seen.update(config=config, stop=stop_after) or 0,
    )
    assert main(["train", "--config", "zero.json", "--dataset_path", "records.csv", "--epochs", "2"]) == 0
    assert seen["config"].training.deepspeed == "zero.json" and seen["config"].training.num_train_epochs == 2
    assert seen["stop"] == "train"


def test_figures_older_than_the_training_are_not_shown(tmp_path):
    """After `--only train` the evaluation of the earlier adapter lies there still; it is not this adapter's."""
    from medai_nb.cli import outcome_lines
    from medai_nb.run_folder import STAGES, write_json_atomic

    def state(trained: str) -> dict:
        ended = dict.fromkeys(STAGES, "2026-01-01T10:00:00+00:00") | {"train": trained}
        return {
            "stages": {name: {"state": "completed", "ended": ended[name], "summary": {}} for name in STAGES}
        }

    write_json_atomic(tmp_path / "run.json", state("2026-01-01T10:00:00+00:00"))
    assert any("Release:" in line for line in outcome_lines(tmp_path))
    write_json_atomic(tmp_path / "run.json", state("2026-01-02T10:00:00+00:00"))
    assert not any("Release:" in line for line in outcome_lines(tmp_path))


def test_commands_that_the_quickstart_prints_are_found_by_the_shell(tmp_path, monkeypatch):
    """`make quickstart` activates nothing: where `medai` is not on the PATH, its place is printed."""
    folder = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    assert _serving_lines(Path("runs/x/release"))[0].split() == ["medai", "serve", "runs/x/release"]
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    for place in (tmp_path, folder.parent):
        monkeypatch.chdir(place)
        command = f"{_serving_lines(Path('nothing'))[0]}"
        ended = subprocess.run(command, shell=True, capture_output=True, text=True)
        assert ended.returncode == 2 and "nothing is no release" in ended.stderr
    assert command.split()[0] == "bin/medai"


def test_a_reader_that_has_seen_enough_gets_no_traceback(tmp_path):
    """As `medai config | head -1`."""
    program = (
        "import sys, time; from medai_nb.cli import main; time.sleep(0.5); raise SystemExit(main(['config']))"
    )
    command = f'"{sys.executable}" -c "{program}" | true; echo ${{PIPESTATUS[0]}}'
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert ended.stdout.strip() == "141" and ended.stderr == ""
