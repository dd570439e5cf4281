"""Hostfiles and SLURM scripts: what SLURM, bash and DeepSpeed make of them."""

import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medai_nb.cluster import parse_array, render_slurm
from medai_nb.config import ConfigError
from medai_nb.hosts import parse_hostfile, render_hostfile, srun_command


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


@pytest.mark.parametrize("modules", [[], ["cuda/12.4", "apptainer"]], ids=["plain", "modules"])
@pytest.mark.parametrize("array", [[], ["lora.r=8,16", "seed=1,2"]], ids=["single", "array"])
@pytest.mark.parametrize("container", [None, "docker://ward/medai:1"], ids=["host", "container"])
@pytest.mark.parametrize("nodes, gpus", itertools.product([1, 2], [0, 4]))
def test_no_script_gives_bash_or_shellcheck_anything_to_say(nodes, gpus, container, array, modules):
    options = {"modules": modules, "array": array, "container": container}
    if container and nodes > 1:
        with pytest.raises(ConfigError, match="nothing inside the image can start ranks on the others"):
            render_slurm("quickstart", nodes, gpus, **options)
        return
    script = render_slurm("quickstart", nodes, gpus, **options)
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "not installed: it belongs to the extra `dev`"
    for command in (["bash", "-n"], [shellcheck, "--severity=style", "-"]):
        checked = subprocess.run(command, input=script, text=True, capture_output=True)
        assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", ""), script


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
    [
        {"time": "tomorrow"},
        {"partition": "gpu\n#SBATCH --uid=0"},
        {"account": "a b"},
        {"memory": "lots"},
        {"modules": ["cuda; rm -r x"]},
        {"modules": ["--force"]},
        {"container": "ftp://host/image"},
        {"container": "no-such-image.sif"},
        {"array": ["lora.r="]},
        {"array": ["lora.r=8,8"]},
        {"array": ["lora.r=8", "lora_r=16"]},
        {"array": ["name=a,b"]},
        {"array": ["launch.hostfile=a,b"]},
        {"array": ["seed=" + ",".join(map(str, range(1001)))]},
        {"array": ["model.name=a b,a/b"]},
        {"array_limit": 2},
        {"array_limit": 0, "array": ["seed=1,2"]},
    ],
)
def test_value_that_slurm_would_misread_is_refused(setting):
    with pytest.raises(ConfigError, match=f"^{next(iter(setting)).removesuffix('s')}"):
        render_slurm("quickstart", **setting)


@pytest.mark.parametrize(
    "array, message", [("lora.rank_=8", "unknown setting"), ("lora.r=8,eight", "lora.r: .*'eight'")]
)
def test_array_with_a_value_that_the_configuration_refuses_is_refused_before_the_queue(array, message):
    with pytest.raises(ConfigError, match=message):
        render_slurm("quickstart", array=[array])


def test_several_settings_are_a_grid_and_a_list_is_one_value():
    assert parse_array(["lora.r=8, 16", "target_modules=[q_proj,v_proj],[q_proj]"]) == [
        {"lora.r": "8", "lora.target_modules": "[q_proj,v_proj]"},
        {"lora.r": "8", "lora.target_modules": "[q_proj]"},
        {"lora.r": "16", "lora.target_modules": "[q_proj,v_proj]"},
        {"lora.r": "16", "lora.target_modules": "[q_proj]"},
    ]


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


PROGRAMS = {
    "scontrol": 'echo "$@" >> asked\nif [ "$1" = show ]; then echo node-a; echo node-b; fi\n',
    "apptainer": 'printf "%s\\n" "$@" > apptainer-arguments\n'
    'while [ "$1" != medai ]; do shift; done\nexec "$@"\n',
}


@pytest.fixture
def pretended_cluster(tmp_path, monkeypatch):
    """A script with stand-ins for the cluster's commands; start(body of medai, options of the script) gives the process."""
    monkeypatch.chdir(tmp_path)

    def start(medai: str, options: dict | None = None, **environment: str):
        programs = {**PROGRAMS, "medai": f'printf "%s\\n" "$@" > medai-arguments\n{medai}\n'}
        environment_folder = tmp_path / "venv" / "bin"
        environment_folder.mkdir(parents=True, exist_ok=True)
        for name, body in programs.items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{body}")
            (tmp_path / name).chmod(0o755)
        script = render_slurm("quickstart", **(options or {"nodes": 2, "gpus_per_node": 4}))
        # the stand-ins have to come before the medai of this environment
        (environment_folder / "activate").write_text('echo activate >> order\nPATH="$STANDINS:$PATH"\n')
        script = re.sub(r"(?m)^source .*/bin/activate$", f"source {environment_folder}/activate", script)
        (tmp_path / "job.sh").write_text(script)
        variables = {
            "SLURM_JOB_ID": "7",
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_JOB_NODELIST": "node-[a-b]",
            "STANDINS": str(tmp_path),
            # as the shell of a cluster passes it on
            "BASH_FUNC_module%%": '() { echo "module $*" >> order; : "$NOT_SET_BY_ANYONE"; }',
        }
        variables["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
        return subprocess.Popen(
            ["bash", tmp_path / "job.sh"], env=os.environ | variables | environment, cwd=tmp_path
        )

    return start


def test_job_writes_the_hostfile_and_reports_the_exit_code_of_the_run(pretended_cluster, tmp_path):
    job = pretended_cluster(f"cat {tmp_path}/hostfile-7 > {tmp_path}/copy\nexit 3")
    assert job.wait(timeout=20) == 3
    assert parse_hostfile((tmp_path / "copy").read_text()) == {"node-a": 4, "node-b": 4}
    assert not (tmp_path / "hostfile-7").exists(), "the hostfile is removed at the end"
    assert "requeue" not in (tmp_path / "asked").read_text(), "a run that fails by itself is not repeated"


SLEEPER = "trap 'sleep 0.3; exit 143' TERM; touch {folder}/ready; while true; do sleep 0.05; done"


def wait_until_ready(folder):
    deadline = time.monotonic() + 10
    while not (folder / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("restarts, again", [("0", True), ("10", False)])
def test_time_limit_stops_the_run_politely_and_queues_the_job_again(
    pretended_cluster, tmp_path, restarts, again
):
    job = pretended_cluster(SLEEPER.format(folder=tmp_path), SLURM_RESTART_COUNT=restarts)
    wait_until_ready(tmp_path)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=20) == 143
    assert ("requeue 7" in (tmp_path / "asked").read_text()) == again


GRID = {"array": ["lora.r=8,16", "learning_rate=1e-4,2e-4"], "gpus_per_node": 0}


@pytest.mark.parametrize("nodes", [1, 2])
def test_each_task_of_an_array_runs_its_own_combination_in_its_own_folder(pretended_cluster, tmp_path, nodes):
    from medai_nb.cli import _overrides, build_parser
    from medai_nb.config import RunConfig

    seen = set()
    for task, (r, rate) in enumerate(itertools.product([8, 16], [1e-4, 2e-4])):
        job = pretended_cluster(
            "ls hostfile-* 2> /dev/null > hostfiles || true",
            {**GRID, "nodes": nodes},
            SLURM_ARRAY_JOB_ID="5",
            SLURM_ARRAY_TASK_ID=str(task),
        )
        assert job.wait(timeout=20) == 0
        options = build_parser().parse_args((tmp_path / "medai-arguments").read_text().splitlines())
        config = RunConfig.load(options.config, _overrides(options))
        assert (config.lora.r, config.training.learning_rate) == (r, rate)
        assert (tmp_path / "hostfiles").read_text().split() == [f"hostfile-5_{task}"] * (nodes > 1)
        seen.add(config.run_dir)
    assert len(seen) == 4, seen


def test_run_folder_that_the_configuration_names_is_one_for_each_task(tmp_path):
    config = tmp_path / "run.json"
    config.write_text(f'{{"name": "ward", "output_dir": "{tmp_path}/out/", "dataset_path": "demo"}}')
    script = render_slurm(config, array=["seed=1,2"])
    assert f"output_dir={tmp_path}/out-seed-1" in script and f"output_dir={tmp_path}/out-seed-2" in script


def test_task_that_an_array_does_not_have_says_so(pretended_cluster, tmp_path):
    job = pretended_cluster("", GRID, SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="4")
    assert job.wait(timeout=20) == 2 and not (tmp_path / "medai-arguments").exists()


def test_interrupted_task_of_an_array_is_put_back_alone(pretended_cluster, tmp_path):
    """One task has the number of the whole array: to put that number back would repeat all of them."""
    body = SLEEPER.format(folder=tmp_path)
    job = pretended_cluster(body, GRID, SLURM_JOB_ID="5", SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="3")
    wait_until_ready(tmp_path)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=20) == 143
    assert (tmp_path / "asked").read_text() == "requeue 5_3\n"


def test_modules_are_loaded_before_the_environment_even_by_a_module_system_with_unset_variables(
    pretended_cluster, tmp_path
):
    options = {"modules": ["gcc/12.2", "cuda/12.4"]}
    assert pretended_cluster("", options).wait(timeout=20) == 0
    expected = ["module load gcc/12.2 cuda/12.4"] + ["activate"] * (sys.prefix != sys.base_prefix)
    assert (tmp_path / "order").read_text().splitlines() == expected


def test_module_that_does_not_exist_ends_the_job_before_the_run(pretended_cluster, tmp_path):
    broken = {"BASH_FUNC_module%%": "() { return 1; }"}
    assert pretended_cluster("", {"modules": ["cuda/0"]}, **broken).wait(timeout=20) == 1
    assert not (tmp_path / "medai-arguments").exists()


@pytest.mark.parametrize("gpus", [0, 2])
def test_container_runs_the_command_with_the_folders_it_needs(
    pretended_cluster, tmp_path, tmp_path_factory, monkeypatch, gpus
):
    elsewhere = tmp_path_factory.mktemp("else where")
    (elsewhere / "notes.csv").write_text("text,label\n")
    monkeypatch.setenv("MODEL_CACHE_DIR", str(elsewhere / "models"))
    image = tmp_path / "medai.sif"
    image.touch()
    settings = [f"output_dir={elsewhere}/runs/one", f"data.train_file={elsewhere}/notes.csv", "dataset_path="]
    options = {"container": "medai.sif", "gpus_per_node": gpus, "overrides": settings, "array": ["seed=1,2"]}
    body = 'echo "$VIRTUAL_ENV" > environment'
    job = pretended_cluster(
        body, options, SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="1", VIRTUAL_ENV="not activated"
    )
    assert job.wait(timeout=20) == 0
    arguments = (tmp_path / "apptainer-arguments").read_text().splitlines()
    before, command = arguments[: arguments.index("medai")], arguments[arguments.index("medai") :]
    assert before[:4] == ["exec", "--pwd", str(tmp_path), "--bind"] and before[-1] == str(image)
    assert ("--nv" in before) == (gpus > 0)
    bound = {value for flag, value in zip(before, before[1:]) if flag == "--bind"}
    needed = {elsewhere / "models", elsewhere / "runs" / "one-seed-2", elsewhere}
    assert {str(tmp_path), *map(str, needed)} <= bound
    assert all(Path(folder).is_dir() for folder in bound), "apptainer refuses to bind what is not there"
    assert command[:4] == ["medai", "run", "--config", "quickstart"] and command[-1].endswith("one-seed-2")
    assert (tmp_path / "environment").read_text() == "not activated\n"


def test_container_is_not_bound_to_a_folder_that_apptainer_would_read_as_two(tmp_path):
    (tmp_path / "a:b").mkdir()
    with pytest.raises(ConfigError, match="divides at , and :"):
        render_slurm(
            "quickstart", container="docker://ward/medai:1", overrides=[f"model.name={tmp_path / 'a:b'}"]
        )


def test_command_line_passes_every_option_on(capsys):
    from medai_nb.cli import main

    options = ["--array", "lora.r=8,16", "--array", "seed=1,2", "--array_limit", "2", "--module", "gcc"]
    options += ["--module", "cuda/12.4", "--container", "docker://ward/medai:1"]
    assert main(["slurm", "--config", "quickstart", *options]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --array=0-3%2" in script and "#SBATCH --output=%x-%A_%a.out" in script
    assert "module load gcc cuda/12.4" in script and "docker://ward/medai:1 medai run" in script
    assert main(["slurm", "--config", "quickstart", "--container", "x.sif", "--nodes", "2"]) == 2
    assert "use one node" in capsys.readouterr().err
