"""Ranks on two machines of a hostfile: real launchers, kernels and training, on two loopback addresses of this machine.

Only the way to a machine is a stand-in. What comes by ssh finds the bare environment of a login there, and what it started goes on
when the connection ends; a step of SLURM has the environment of the job and is ended as a whole."""

import json
import os
import signal
import sys
import time

import pytest
from sandbox import Sandbox

pytestmark = pytest.mark.slow
NODES = ["127.0.0.2", "127.0.0.3"]

# One program under three names. A machine is known by NODE in the environment of its processes.
STANDIN = """#!{python}
import os, signal, subprocess, sys, threading
from pathlib import Path

import psutil

MARKER = os.environ["FAULT_MARKER"]


def processes_of(node):
    for process in psutil.process_iter():
        try:
            found = process.environ()
            if found.get("NODE") == node and found.get("FAULT_MARKER") == MARKER:
                yield process
        except (psutil.Error, OSError):
            continue


def begin(node, command, environment):
    log = open({folder!r} + "/reached", "a")
    print(Path(sys.argv[0]).name, node, file=log, flush=True)
    # What is set on every machine, and in no way carried to it.
    login = {{name: os.environ[name] for name in ("HOME", "FAULT", "FAULT_MARKER") if name in os.environ}}
    process = subprocess.Popen(
        command, env={{**environment, **login, "NODE": node}}, cwd="/", start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )

    def repeat():
        for line in process.stdout:
            print(f"{{node}}: {{line}}", end="", flush=True)

    threading.Thread(target=repeat).start()
    return process


def code_of(process):
    return process.wait() if process.returncode is None or process.returncode >= 0 else 128 - process.returncode


def ssh(arguments):
    while arguments[0].startswith("-"):
        arguments = arguments[2:]
    print(arguments[0])


def pdsh(arguments):
    position = arguments.index("-w")
    nodes, command = arguments[position + 1].split(","), " ".join(arguments[position + 2 :])
    if command.startswith("pkill -f "):
        for node in nodes:
            for process in processes_of(node):
                if "deepspeed.launcher.launch" in process.cmdline():
                    process.terminate()
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first one only asks for the state
    bare = {{"PATH": "/usr/bin:/bin"}}
    started = [
        begin(node, ["bash", "-c", command.replace("%n", str(number))], bare) for number, node in enumerate(nodes)
    ]
    os._exit(max(code_of(process) for process in started))


def srun(arguments):
    nodes = os.environ["NODES"].split(",")
    position = next(number for number, item in enumerate(arguments) if not item.startswith("--"))
    options, command = arguments[:position], arguments[position:]
    assert f"--nodes={{len(nodes)}}" in options and "--kill-on-bad-exit=1" in options

    def end(*_):
        for node in nodes:
            for process in processes_of(node):
                process.kill()

    signal.signal(signal.SIGTERM, end)
    # On another machine the run could not find its processes by this.
    job = {{name: value for name, value in os.environ.items() if name != "MEDAI_STAGE_TOKEN"}}
    started = [
        begin(node, command, {{**job, "SLURM_NODEID": str(number)}}) for number, node in enumerate(nodes)
    ]
    while any(process.poll() is None for process in started):
        if any(process.poll() for process in started):
            end()
        try:
            started[0].wait(0.2)
        except subprocess.TimeoutExpired:
            pass
    os._exit(max(code_of(process) for process in started))


globals()[Path(sys.argv[0]).name](sys.argv[1:])
"""


class TwoNodes(Sandbox):
    """A sandbox whose ranks run on the machines of a hostfile."""

    command = "train"

    def add_machines(self) -> None:
        programs = self.folder / "programs"
        programs.mkdir()
        for name in ("ssh", "pdsh", "srun"):
            (programs / name).write_text(STANDIN.format(python=sys.executable, folder=str(self.folder)))
            (programs / name).chmod(0o755)
        (self.folder / "hosts").write_text("".join(f"{node} slots=1\n" for node in NODES))

    def start(self, *arguments: str, **variables: str):
        path = f"{self.folder / 'programs'}:{os.environ['PATH']}"
        arguments = ("--hostfile", str(self.folder / "hosts"), *arguments)
        return super().start(*arguments, PATH=path, NODES=",".join(NODES), **variables)

    def reached(self) -> list[str]:
        return sorted((self.folder / "reached").read_text().splitlines())

    def assert_trained_on_both(self) -> None:
        ranks = self.state["stages"]["train"]["ranks"]
        assert [(item["rank"], item["world_size"], item["state"]) for item in ranks] == [
            (0, 2, "completed"),
            (1, 2, "completed"),
        ]
        assert json.loads((self.run / "train" / "training_report.json").read_text())["world_size"] == 2
        assert (self.run / "train" / "lora_adapter" / "adapter_model.safetensors").stat().st_size > 0


@pytest.fixture
def nodes(completed_run, tmp_path_factory, tiny_llama) -> TwoNodes:
    """A run whose first three stages have completed."""
    own = TwoNodes(tmp_path_factory.mktemp("two nodes"), tiny_llama)
    own.add_machines()
    own.continue_from(completed_run, without=("train", "evaluate", "export"))
    return own


def wait_until_nothing_runs(nodes: TwoNodes) -> None:
    """What a run starts elsewhere ends without it looking on."""
    deadline = time.monotonic() + 20
    while nodes.processes() and time.monotonic() < deadline:
        time.sleep(0.2)


def test_a_run_by_ssh_trains_on_two_machines(nodes):
    code, output = nodes.execute()
    assert code == 0, output + (nodes.run / "logs" / "04_train.log").read_text()
    assert nodes.state["state"] == "completed"
    nodes.assert_trained_on_both()
    assert nodes.reached() == [f"pdsh {node}" for node in NODES]
    wait_until_nothing_runs(nodes)
    assert nodes.processes() == []


def test_a_job_of_slurm_trains_on_two_machines_without_ssh(nodes):
    code, output = nodes.execute(SLURM_JOB_ID="7")
    assert code == 0, output
    nodes.assert_trained_on_both()
    assert nodes.reached() == [f"srun {node}" for node in NODES]


def test_rank_that_fails_on_the_second_machine_fails_the_run_and_is_named(nodes):
    code, output = nodes.execute(FAULT="raise")
    assert code == 1, output
    wait_until_nothing_runs(nodes)
    nodes.assert_truthful("failed")
    assert "stage train failed on rank 1, cell" in output and "RuntimeError: injected failure" in output
    assert "04_train.rank1.ipynb" in output


def test_signal_to_the_run_stops_the_ranks_on_both_machines(nodes):
    process = nodes.start("-p", "launch.stop_seconds=1", FAULT="hold")
    nodes.wait_for_training(process)
    kernels = [item.environ() for item in nodes.processes() if "ipykernel_launcher" in item.cmdline()]
    assert sorted(found["NODE"] for found in kernels) == NODES
    for found in kernels:  # ssh carries none of these
        told = [found.get(name) for name in ("MEDAI_LAUNCHED", "HF_HUB_OFFLINE", "OMP_NUM_THREADS")]
        assert told == ["train", "1", "1"] and "MEDAI_STAGE_TOKEN" not in found
    process.send_signal(signal.SIGTERM)
    code, output = nodes.finish(process, timeout=60)
    assert code == 143, output
    wait_until_nothing_runs(nodes)
    nodes.assert_truthful("interrupted")
