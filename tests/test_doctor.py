"""The doctor finds what is wrong, says what to do, and stays quick."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medai_nb import doctor as rooms
from medai_nb.doctor import Check, checks, doctor, render_checks


def test_this_environment_is_healthy(capsys):
    assert doctor() == 0, capsys.readouterr().out
    assert "this machine can run medai" in capsys.readouterr().out


def test_json_holds_every_check(capsys):
    assert doctor(as_json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert [check["name"] for check in report["checks"]] == [check.name for check in checks()]


def test_one_problem_makes_the_exit_code_one_and_warnings_do_not(monkeypatch, capsys):
    monkeypatch.setattr(rooms, "checks", lambda: [Check("CPU", "warning", "slow", "buy")])
    assert doctor() == 0
    monkeypatch.setattr(rooms, "checks", lambda: [Check("memory", "problem", "none", "add some")])
    assert doctor() == 1
    assert "-> add some" in capsys.readouterr().out


def test_lines_are_aligned_and_every_fault_has_its_remedy():
    found = [Check("a", "ok", "x"), Check("longer name", "problem", "y", "do z")]
    first, second, remedy, _, verdict = render_checks(found).splitlines()
    assert first.index("x") == second.index("y") == remedy.index("->")
    assert verdict == "1 to put right"


def test_doctor_is_quick_and_imports_none_of_the_large_libraries():
    code = (
        "import sys; from medai_nb.doctor import checks; checks(); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'deepspeed', 'datasets')))"
    )
    start = time.monotonic()
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert time.monotonic() - start < 5 or os.getloadavg()[0] > 4


def test_versions_are_compared_with_what_the_package_requires():
    assert rooms.check_packages()[0].status == "ok"
    wrong = rooms.check_packages(["pydantic<2", "surely-not-installed>=1", "pytest; extra == 'test'"])
    assert [check.found.split()[0] for check in wrong] == ["pydantic", "surely-not-installed"]
    assert all(check.status == "problem" and "pip install" in check.fix for check in wrong)


@pytest.mark.parametrize(
    "features, status",
    [({"avx512_bf16"}, "ok"), ({"amx_bf16"}, "ok"), ({"avx2"}, "warning"), (set(), "warning")],
)
def test_cpu_without_bf16_is_a_warning(features, status):
    assert rooms.check_cpu(features).status == status


@pytest.mark.parametrize("gib, status", [(1, "problem"), (3, "warning"), (8, "ok")])
def test_memory_is_judged_by_what_is_available(gib, status):
    assert rooms.check_memory(available=gib * 2**30).status == status


def test_limits_of_a_container_count(tmp_path):
    (tmp_path / "memory.max").write_text(f"{2**30}\n")
    (tmp_path / "memory.current").write_text(f"{2**29}\n")
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert rooms.memory_limit(tmp_path) == (2**30, 2**29)
    assert rooms.core_limit(tmp_path) == 0.5
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert rooms.memory_limit(tmp_path)[0] > 2**30
    assert rooms.core_limit(tmp_path) >= 1


def test_folder_that_cannot_be_written_is_a_problem(tmp_path, monkeypatch):
    def refuse(**arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(rooms.tempfile, "TemporaryFile", refuse)
    check = rooms.check_folder("models (MODEL_CACHE_DIR)", tmp_path / "not" / "yet")
    assert check.status == "problem"
    assert "Permission denied" in check.found and "set MODEL_CACHE_DIR" in check.fix


@pytest.mark.parametrize("free, status", [(2**29, "problem"), (2 * 2**30, "warning"), (2**40, "ok")])
def test_disk_is_judged_by_free_space(tmp_path, monkeypatch, free, status):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(rooms.shutil, "disk_usage", lambda path: usage(free, 0, free))
    assert rooms.check_folder("runs (OUTPUT_DIR)", tmp_path).status == status


def test_checking_a_folder_leaves_nothing_behind(tmp_path):
    rooms.check_folder("models (MODEL_CACHE_DIR)", tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def test_gpu_with_a_cpu_build_of_torch_is_a_warning(monkeypatch):
    monkeypatch.setattr(rooms, "nvidia_gpus", lambda: ["NVIDIA H200, 143771 MiB"])
    monkeypatch.setattr(rooms, "torch_cuda_version", lambda: None)
    assert rooms.check_accelerators().status == "warning"
    monkeypatch.setattr(rooms, "torch_cuda_version", lambda: "13.0")
    assert rooms.check_accelerators().status == "ok"


def test_cuda_version_is_read_as_torch_reports_it():
    import torch

    assert rooms.torch_cuda_version() == torch.version.cuda


def test_missing_compiler_is_a_warning(monkeypatch):
    monkeypatch.setattr(rooms.shutil, "which", lambda name: None if name == "ninja" else name)
    check = rooms.check_compiler()
    assert (check.status, check.found) == ("warning", "ninja not found")


def test_machine_without_loopback_is_a_problem(monkeypatch):
    def refuse(*arguments, **keywords):
        raise OSError("not permitted")

    monkeypatch.setattr(socket, "create_server", refuse)
    assert rooms.check_network().status == "problem"


def test_temporary_folder_with_a_path_too_long_for_sockets_is_a_problem(tmp_path, monkeypatch):
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(rooms.tempfile, "tempdir", str(deep))
    check = rooms.check_network()
    assert check.status == "problem" and "TMPDIR" in check.fix


def test_missing_and_damaged_embedded_model_are_problems(tmp_path, monkeypatch):
    damaged = tmp_path / "model.gguf"
    damaged.write_bytes(b"GGUF")
    monkeypatch.setattr(rooms, "embedded_gguf", lambda: damaged)
    assert "only 4 bytes" in rooms.check_embedded_model().found
    monkeypatch.undo()
    monkeypatch.setattr("medai_nb.models.EMBEDDED_PACKAGE", "no_such_package")
    check = rooms.check_embedded_model()
    assert check.status == "problem" and "pip install" in check.fix


def test_kernel_of_another_environment_is_a_warning_and_a_dead_one_a_problem(tmp_path, monkeypatch):
    folder = tmp_path / "kernels" / "python3"
    folder.mkdir(parents=True)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    for program, status in [
        ("/usr/bin/env", "warning"),
        ("/no/such/python", "problem"),
        (sys.executable, "ok"),
    ]:
        spec = {
            "argv": [program, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            "display_name": "Python",
        }
        (folder / "kernel.json").write_text(json.dumps(spec))
        assert rooms.check_kernel().status == status, program


def test_small_shared_memory_is_a_warning(tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(rooms.shutil, "disk_usage", lambda path: usage(64 * 2**20, 0, 0))
    assert rooms.check_shared_memory(tmp_path).status == "warning"
    assert rooms.check_shared_memory(Path(tmp_path / "none")).status == "ok"
