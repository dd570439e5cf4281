"""Hostfiles and SLURM scripts: what SLURM, bash and DeepSpeed make of them."""

import os
import shlex
import signal
import subprocess
import time

import pytest

from medai_nb.cluster import parse_hostfile, render_hostfile, render_slurm, srun_command
from medai_nb.config import ConfigError


def test_hostfile_is_read_by_deepspeed_as_by_us():
    from deepspeed.launcher.runner import _parse_hostfile

    text = "# two machines\n\nnode-a slots=4\nnode-b   slots=2\n"
    assert dict(_parse_hostfile(text.splitlines())) == parse_hostfile(text) == {"node-a": 4, "node-b": 2}
    assert parse_hostfile(render_hostfile({"b": 1, "a": 2})) == {"b": 1, "a": 2}
    assert list(parse_hostfile(render_hostfile({"b": 1, "a": 2}))) == ["b", "a"], (
        "the first host is the master"
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ("node-a slots=4\nnode-b\n", r"hostfile, line 2: expected `name slots=N`, found 'node-b'"),
        ("node-a slots=0\n", r"line 1"),
        ("node-a slots=1\nnode-a slots=1\n", r"line 2: node-a is there twice"),
        ("# nothing\n", r"no hosts"),
    ],
)
def test_bad_hostfile_is_refused_by_line(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_hostfile(text)


@pytest.mark.parametrize("hosts", [{}, {"a b": 1}, {"a": 0}])
def test_hostfile_that_could_not_be_read_is_not_written(hosts):
    with pytest.raises(ConfigError):
        render_hostfile(hosts)


@pytest.mark.parametrize("nodes, gpus", [(1, 0), (1, 8), (4, 4)])
def test_script_is_bash_and_asks_for_what_was_wanted(nodes, gpus):
    script = render_slurm(
        "quickstart",
        nodes,
        gpus,
        "2-00:00:00",
        partition="gpu",
        account="ward-7",
        cpus_per_task=16,
        memory="190G",
    )
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr
    directives = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert script.splitlines()[0] == "#!/bin/bash"
    assert script.splitlines()[1 : 1 + len(directives)] == directives, (
        "SLURM stops reading at the first command"
    )
    assert f"#SBATCH --nodes={nodes}" in directives and "#SBATCH --requeue" in directives
    assert "#SBATCH --signal=B:TERM@120" in directives
    assert (f"#SBATCH --gpus-per-node={gpus}" in directives) == (gpus > 0)
    assert {"#SBATCH --account=ward-7", "#SBATCH --mem=190G", "#SBATCH --cpus-per-task=16"} <= set(directives)
    assert f"--num_accelerators {nodes * max(1, gpus)}" in script
    assert ("--hostfile" in script) == (nodes > 1)


def test_command_of_the_script_is_one_that_medai_understands(tmp_path):
    from medai_nb.cli import build_parser

    config = tmp_path / "my run.yaml"
    config.write_text("name: ward\ndataset_path: demo\n")
    script = render_slurm(config, nodes=2, gpus_per_node=2, overrides=["lora.r=8"])
    line = next(line for line in script.splitlines() if line.startswith("medai run"))
    options = build_parser().parse_args(shlex.split(line.removesuffix("&"))[1:])
    assert options.config == str(config)
    assert "#SBATCH --job-name=ward" in script


@pytest.mark.parametrize(
    "setting",
    [{"time": "tomorrow"}, {"partition": "gpu\n#SBATCH --uid=0"}, {"account": "a b"}, {"memory": "lots"}],
)
def test_value_that_slurm_would_misread_is_refused(setting):
    with pytest.raises(ConfigError, match=f"^{next(iter(setting))}: "):
        render_slurm("quickstart", **setting)


def test_configuration_that_does_not_exist_is_refused_before_the_queue():
    with pytest.raises(ConfigError, match="not found"):
        render_slurm("no-such-configuration")


def test_each_node_starts_deepspeed_with_its_own_rank(tmp_path, monkeypatch):
    from deepspeed.launcher.runner import parse_args

    seen = tmp_path / "seen"
    programs = {
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done\n'
        'for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done\n',
        "launcher": f'printf "%s\\n" "$*" >> {seen}\n',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    arguments = [
        "--no_local_rank",
        "--hostfile",
        "hosts",
        "--module",
        "medai_nb.launch",
        "--parameter",
        "run_dir=a b",
    ]
    subprocess.run(srun_command(["launcher", *arguments], nodes=2, master_addr="node-a"), check=True)
    lines = seen.read_text().splitlines()
    assert len(lines) == 2
    for node, line in enumerate(lines):
        options = parse_args(line.split())
        assert (options.no_ssh, options.node_rank, options.master_addr) == (True, node, "node-a")
        assert (options.module, options.user_script) == (True, "medai_nb.launch")
        assert line.endswith("run_dir=a b")


@pytest.fixture
def pretended_cluster(tmp_path):
    """A script with stand-ins for `scontrol` and `medai`; start(body of medai) gives the process and its folder."""

    def start(medai: str, **environment: str):
        programs = {
            "scontrol": f'echo "$@" >> {tmp_path}/asked\nif [ "$1" = show ]; then echo node-a; echo node-b; fi\n',
            "medai": f'echo "$@" > {tmp_path}/medai-arguments\n{medai}\n',
        }
        for name, body in programs.items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{body}")
            (tmp_path / name).chmod(0o755)
        script = render_slurm("quickstart", nodes=2, gpus_per_node=4)
        # the stand-ins have to come before the medai of this environment
        script = "\n".join(line for line in script.splitlines() if not line.startswith("source ")) + "\n"
        (tmp_path / "job.sh").write_text(script)
        variables = {
            "SLURM_JOB_ID": "7",
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_JOB_NODELIST": "node-[a-b]",
        }
        variables["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
        return subprocess.Popen(["bash", tmp_path / "job.sh"], env=os.environ | variables | environment)

    return start


def test_job_writes_the_hostfile_and_reports_the_exit_code_of_the_run(pretended_cluster, tmp_path):
    job = pretended_cluster(f"cat {tmp_path}/hostfile-7 > {tmp_path}/copy\nexit 3")
    assert job.wait(timeout=20) == 3
    assert parse_hostfile((tmp_path / "copy").read_text()) == {"node-a": 4, "node-b": 4}
    assert not (tmp_path / "hostfile-7").exists(), "the hostfile is removed at the end"
    assert "requeue" not in (tmp_path / "asked").read_text(), "a run that fails by itself is not repeated"


SLEEPER = "trap 'sleep 0.3; exit 143' TERM; touch {folder}/ready; while true; do sleep 0.05; done"


@pytest.mark.parametrize("restarts, again", [("0", True), ("10", False)])
def test_time_limit_stops_the_run_politely_and_queues_the_job_again(
    pretended_cluster, tmp_path, restarts, again
):
    job = pretended_cluster(SLEEPER.format(folder=tmp_path), SLURM_RESTART_COUNT=restarts)
    deadline = time.monotonic() + 10
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=20) == 143
    assert ("requeue 7" in (tmp_path / "asked").read_text()) == again
