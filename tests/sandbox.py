"""A run with its own data, notebooks and configuration, started as a user starts it."""

import csv
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil

from medai_nb.checkpoints import checkpoint_problem

ROOT = Path(__file__).parents[1]
MEDAI = str(Path(sys.executable).parent / "medai")

STAGE_FOLDERS = {
    "prepare_data": "data",
    "protect_phi": "protected",
    "plan_lora": "lora",
    "train": "train",
    "evaluate": "evaluation",
    "export": "release",
}

# Put before the training cell of the stage notebook. Without FAULT in the environment it does nothing, so that
# the same notebook, and with it the same stage key, serves the broken run and the one that continues.
INJECTION = """
import os
import time
from pathlib import Path

import transformers

fault, marker = os.environ.get("FAULT", ""), os.environ.get("FAULT_MARKER", "")
if fault:
    training_step = transformers.Trainer.training_step

    def broken_step(trainer, *args, **kwargs):
        if trainer.state.global_step == 2:
            if fault == "raise" and int(os.environ["RANK"]) == 1:
                raise RuntimeError("injected failure")
            if fault == "slow":
                Path(marker).write_text(str(os.getpid()))
                time.sleep(5)
            if fault == "hold":
                Path(marker).write_text(str(os.getpid()))
                time.sleep(600)
        return training_step(trainer, *args, **kwargs)

    transformers.Trainer.training_step = broken_step
"""


def write_records(file: Path, rows: int = 60) -> None:
    """Short classification records of three labels, without identifiers."""
    generator = random.Random(7)
    words = {
        "cardiac": ["chest", "heart", "valve"],
        "renal": ["kidney", "urine", "stone"],
        "skin": ["rash", "itch", "burn"],
    }
    with file.open("w", newline="", encoding="utf8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["id", "text", "label", "patient_id"])
        for number in range(rows):
            label = list(words)[number % 3]
            text = " ".join(generator.choice(words[label]) for _ in range(6)) + f" noted {number} times"
            writer.writerow([f"r{number}", text, label, f"p{number // 2}"])


class Sandbox:
    """A run folder with its own data, notebooks and configuration."""

    command = "run"

    def __init__(self, folder: Path, model: Path):
        self.folder, self.run = folder, folder / "run"
        self.data, self.jobs, self.config = folder / "data.csv", folder / "jobs", folder / "run.yaml"
        self.marker = folder / "marker"
        self.model = model

    def prepare(self) -> None:
        write_records(self.data)
        shutil.copytree(ROOT / "nbs" / "jobs", self.jobs)
        notebook = nbformat.read(self.jobs / "04_train.ipynb", 4)
        position = next(
            index
            for index, cell in enumerate(notebook.cells)
            if "train(" in cell.source and cell.cell_type == "code"
        )
        notebook.cells.insert(position, nbformat.v4.new_code_cell(INJECTION))
        nbformat.write(notebook, self.jobs / "04_train.ipynb")
        settings = {
            "name": "fault",
            "output_dir": str(self.run),
            "data": {"train_file": str(self.data), "max_length": 64},
            "model": {"name": str(self.model)},
            "lora": {"r": 4},
            "training": {
                "max_steps": 4,
                "per_device_train_batch_size": 2,
                "pack_length": 64,
                "logging_steps": 1,
                "zero_stage": 2,
            },
            "evaluation": {"bootstrap_samples": 100, "safety_requests": 2, "max_new_tokens": 8},
            "leakage": {"records": 20, "samples": 2},
            "export": {"parity_records": 4},
            "launch": {"jobs_folder": str(self.jobs)},
        }
        self.config.write_text(json.dumps(settings))

    def continue_from(self, completed: "Sandbox", without: tuple[str, ...]) -> None:
        """Take a copy of a completed run but for these stages; data and notebooks stay shared."""
        shutil.copytree(completed.run, self.run)
        for stage in without:
            shutil.rmtree(self.run / STAGE_FOLDERS[stage])
        state = self.state
        state["stages"] = {name: stage for name, stage in state["stages"].items() if name not in without}
        (self.run / "run.json").write_text(json.dumps(state))
        settings = json.loads(completed.config.read_text())
        settings["output_dir"] = str(self.run)
        self.config.write_text(json.dumps(settings))

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen:
        """`medai run`, or another command, in a session of its own, as a shell would start it."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "FAULT_MARKER": str(self.marker), **variables}
        return subprocess.Popen(
            [MEDAI, self.command, "--config", str(self.config), *arguments],
            env=environment, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip

    def finish(self, process: subprocess.Popen, timeout: float = 560) -> tuple[int, str]:
        output, _ = process.communicate(timeout=timeout)
        return process.returncode, output

    def execute(self, *arguments: str, **variables: str) -> tuple[int, str]:
        return self.finish(self.start(*arguments, **variables))

    def wait_for_training(self, process: subprocess.Popen) -> int:
        """The pid of the kernel that is in the middle of the training loop."""
        deadline = time.monotonic() + 240
        while not (self.marker.is_file() and self.marker.read_text()):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "training did not begin"
            time.sleep(0.1)
        return int(self.marker.read_text())

    @property
    def state(self) -> dict:
        return json.loads((self.run / "run.json").read_text())

    def processes(self) -> list[psutil.Process]:
        """Whatever still works for this run: it names the run folder in its command or its environment."""
        found = []
        for process in psutil.process_iter():
            try:
                marked = process.environ().get("FAULT_MARKER") == str(self.marker)
                if marked and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def assert_truthful(self, state: str, stage: str = "train") -> None:
        """What has to hold after every fault."""
        assert self.state["state"] == state
        assert self.state["stages"][stage]["state"] == state
        assert self.processes() == []
        folder = STAGE_FOLDERS[stage]
        assert not (self.run / folder).exists(), "a folder that looks whole"
        partial = self.run / f".{folder}.partial"
        if partial.exists():  # only training leaves something: whole checkpoints, and nothing else
            assert stage == "train" and list(partial.iterdir())
            assert [checkpoint_problem(path) for path in partial.iterdir() if checkpoint_problem(path)] == []

    def assert_continues(self, *arguments: str) -> None:
        """The next run skips what is finished and completes."""
        code, output = self.execute("--only", "train", *arguments)
        assert code == 0, output
        assert self.state["stages"]["train"]["state"] == "completed"
        assert (self.run / "train" / "lora_adapter" / "adapter_model.safetensors").stat().st_size > 0
