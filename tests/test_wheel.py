"""The wheel, installed outside the source tree, has everything that the source tree has."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from the tracked files alone: what is not in git must not be needed."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    files = [name for name in tracked.decode().split("\0") if name]
    subprocess.run(["tar", "cf", source / "tree.tar", *files], cwd=ROOT, check=True)
    subprocess.run(["tar", "xf", "tree.tar"], cwd=source, check=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        target,
        source,
    ]
    subprocess.run(command, check=True, capture_output=True)
    return next(target.glob("*.whl"))


def test_wheel_has_every_module_config_and_stage_notebook(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "medai_nb"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    # jobs is a link in the source tree; its notebooks are files in the wheel.
    expected = {name for name in tracked.stdout.split() if name != "medai_nb/jobs"}
    expected |= {f"medai_nb/jobs/{path.name}" for path in (ROOT / "nbs" / "jobs").glob("*.ipynb")}
    assert expected - packed == set()


def test_installed_wheel_works_outside_the_source_tree(wheel, tmp_path):
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "-q", "--target", site, wheel],
        check=True,
        capture_output=True,
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    # -P and PYTHONPATH: the editable installation of the source tree must not answer in its place.
    program = (
        "import medai_nb, pkgutil, importlib, sys\n"
        "assert medai_nb.__file__.startswith(sys.argv[1]), medai_nb.__file__\n"
        "for module in pkgutil.walk_packages(medai_nb.__path__, 'medai_nb.'):\n"
        "    importlib.import_module(module.name)\n"
        "from medai_nb.cli import main\n"
        "sys.exit(main(['run', '--config', 'quickstart', '--dry_run']))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", program, str(site)],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "prepare_data" in result.stdout
