"""What happens when something goes wrong in a run: run.json tells the truth, the exit code is not 0, no process is left
behind, no half-written stage folder is taken for whole, and running again continues.

Each test starts the real `medai run`: real deepspeed launchers, real kernels, real training of a tiny random model."""

import json
import os
import signal
import subprocess
import time

import nbformat
import pytest
from sandbox import MEDAI, Sandbox

from medai_nb.checkpoints import checkpoint_problem

pytestmark = pytest.mark.slow


@pytest.fixture
def sandbox(completed_run, tmp_path, tiny_llama) -> Sandbox:
    """A run of its own whose first three stages have completed."""
    own = Sandbox(tmp_path, tiny_llama)
    own.continue_from(completed_run, without=("train", "evaluate", "export"))
    return own


def test_rank_that_raises_fails_the_stage_and_names_rank_cell_error_and_notebook(sandbox):
    code, output = sandbox.execute("--from", "train", "--num_accelerators", "2", FAULT="raise")
    assert code == 1
    sandbox.assert_truthful("failed")
    assert "stage train failed on rank 1, cell" in output and "RuntimeError: injected failure" in output
    assert "04_train.rank1.ipynb" in output
    states = {status["rank"]: status["state"] for status in sandbox.state["stages"]["train"]["ranks"]}
    assert states[1] == "failed" and states[0] != "completed"


def test_killed_kernel_fails_the_stage_and_its_notebook_does_not_claim_success(sandbox):
    process = sandbox.start("--from", "train", FAULT="hold")
    os.kill(sandbox.wait_for_training(process), signal.SIGKILL)
    code, output = sandbox.finish(process)
    assert code == 1 and "the kernel died" in output
    sandbox.assert_truthful("failed")
    notebook = nbformat.read(sandbox.run / "notebooks" / "04_train.ipynb", 4)
    states = [cell.metadata.papermill.status for cell in notebook.cells if cell.cell_type == "code"]
    assert "failed" in states and states[-1] == "pending"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_the_run_stops_everything(sandbox, signum):
    """A training step that hangs is not waited for longer than launch.stop_seconds."""
    process = sandbox.start("--from", "train", "-p", "launch.stop_seconds=2", FAULT="hold")
    sandbox.wait_for_training(process)
    process.send_signal(signum)
    code, output = sandbox.finish(process, timeout=60)
    assert code == 128 + signum, output
    assert "saving a checkpoint, at most 2 s" in output
    sandbox.assert_truthful("interrupted")


def test_second_signal_does_not_wait(sandbox):
    process = sandbox.start("--from", "train", FAULT="hold")
    sandbox.wait_for_training(process)
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    code, _ = sandbox.finish(process, timeout=20)
    assert code == 143
    sandbox.assert_truthful("interrupted")


def test_a_run_that_is_asked_to_stop_saves_and_the_same_command_goes_on(sandbox):
    process = sandbox.start("--only", "train", "--num_accelerators", "2", FAULT="slow")
    sandbox.wait_for_training(process)
    process.send_signal(signal.SIGTERM)
    code, output = sandbox.finish(process, timeout=60)
    assert code == 143, output
    sandbox.assert_truthful("interrupted")
    partial = sandbox.run / ".train.partial"
    assert [path.name for path in partial.iterdir()] == ["checkpoint-3"]
    assert checkpoint_problem(partial / "checkpoint-3") is None
    code, output = sandbox.execute("--only", "train", "--num_accelerators", "2")
    assert code == 0, output
    steps = [
        entry["step"]
        for entry in json.loads((sandbox.run / "train/trainer_state.json").read_text())["log_history"]
        if "loss" in entry
    ]
    assert steps == [1, 2, 3, 4]


def test_killed_launcher_is_a_failure(sandbox):
    process = sandbox.start("--from", "train", FAULT="hold")
    sandbox.wait_for_training(process)
    launchers = [item for item in sandbox.processes() if "deepspeed.launcher.launch" in item.cmdline()]
    assert len(launchers) == 1
    launchers[0].kill()
    code, output = sandbox.finish(process, timeout=60)
    assert code == 1, output
    sandbox.assert_truthful("failed")


def test_killed_run_leaves_no_process_and_is_shown_as_interrupted(sandbox):
    process = sandbox.start("--from", "train", FAULT="hold")
    sandbox.wait_for_training(process)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while sandbox.processes() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert sandbox.processes() == []
    assert not (sandbox.run / "train").exists()
    listing = subprocess.run([MEDAI, "runs", str(sandbox.folder)], capture_output=True, text=True)
    assert "interrupted" in listing.stdout
    sandbox.assert_continues()


def test_misspelt_setting_starts_nothing(sandbox):
    before = sandbox.state
    code, output = sandbox.execute("-p", "training.max_stepz=3")
    assert code == 2
    assert "unknown setting 'training.max_stepz'" in output and "training.max_steps" in output
    assert sandbox.state == before


@pytest.mark.parametrize("content", [None, b"\x00\x01\x02 no table"])
def test_missing_or_unreadable_data_file_is_named(sandbox, tmp_path, content):
    broken = tmp_path / "broken.csv"
    if content is not None:
        broken.write_bytes(content)
    code, output = sandbox.execute("-p", f"data.train_file={broken}")
    assert code != 0
    assert str(broken) in output or "broken.csv" in output
    assert "Traceback" not in output
    assert sandbox.state["stages"]["prepare_data"]["state"] != "running"
    assert sandbox.processes() == []


def test_two_runs_into_one_folder_the_second_is_refused(sandbox):
    first = sandbox.start("--from", "train", "-p", "launch.stop_seconds=1", FAULT="hold")
    sandbox.wait_for_training(first)
    code, output = sandbox.execute()
    assert code == 2 and f"in use by process {first.pid}" in output
    assert sandbox.state["stages"]["train"]["state"] == "running", "the first run is not disturbed"
    first.terminate()
    sandbox.finish(first)


def test_full_disk_while_a_stage_writes_fails_the_stage(sandbox):
    """A limit on file size makes the adapter's write fail halfway, as a full disk does."""
    limited = [
        "bash", "-c", 'ulimit -f 100; exec "$@"', "limited", MEDAI, "run",
        "--config", str(sandbox.config), "--from", "train",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FAULT_MARKER": str(sandbox.marker)}
    result = subprocess.run(
        limited, env=environment, cwd=sandbox.folder, capture_output=True, text=True, timeout=400
    )
    assert result.returncode == 1, result.stdout + result.stderr
    sandbox.assert_truthful("failed")
    sandbox.assert_continues()


def test_failed_gate_stops_before_training(sandbox):
    """Data that changed after its certificate was written is refused."""
    (sandbox.run / "protected" / "certificate.json").unlink()
    code, output = sandbox.execute("--only", "train")
    assert code == 1 and "certificate" in output
    sandbox.assert_truthful("failed")
