"""The stage notebooks as a person meets them in JupyterLab: one process, top to bottom."""

import json
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

JOBS = Path(__file__).parents[1] / "nbs" / "jobs"
pytestmark = pytest.mark.slow


def execute(notebook: Path, folder: Path, config: str = "notebook") -> nbformat.NotebookNode:
    """Run every cell in one fresh kernel whose working folder is `folder`. Raises on the first cell that fails."""
    content = nbformat.read(notebook, as_version=4)
    parameters = next(cell for cell in content.cells if "parameters" in cell.metadata.get("tags", []))
    assert 'config = "notebook"' in parameters.source
    parameters.source = parameters.source.replace('"notebook"', repr(config), 1)
    place = {"metadata": {"path": str(folder)}}
    return NotebookClient(content, timeout=600, kernel_name="python3", resources=place).execute()


@pytest.mark.timeout(1200)
def test_stage_notebooks_run_one_after_the_other(tmp_path, monkeypatch, tiny_llama):
    """With the settings that they are opened with, but for a tiny model and less to measure: a minute instead of many."""
    settings = yaml.safe_load((JOBS.parents[1] / "medai_nb" / "configs" / "notebook.yaml").read_text())
    config = tmp_path / "notebook.yaml"
    settings["evaluation"] |= {"max_new_tokens": 8, "safety_requests": 2, "bootstrap_samples": 100}
    settings["leakage"] |= {"samples": 2}
    settings["data"] |= {"max_records": 120}
    config.write_text(yaml.safe_dump(settings | {"model": {"name": str(tiny_llama)}}))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OUTPUT_DIR"):
        monkeypatch.delenv(name, raising=False)
    notebooks = sorted(JOBS.glob("*.ipynb"))
    assert len(notebooks) == 6
    for notebook in notebooks:
        executed = execute(notebook, tmp_path, str(config))
        shown = [output for cell in executed.cells for output in cell.get("outputs", [])]
        assert any(output.output_type in ("execute_result", "display_data") for output in shown), (
            notebook.name
        )
    run = tmp_path / "runs" / "notebook"
    stages = json.loads((run / "run.json").read_text())["stages"]
    assert {stage["state"] for stage in stages.values()} == {"completed"} and len(stages) == 6
    assert (run / "release" / "README.md").is_file()
    assert list(run.glob(".*.partial")) == []


def test_stage_notebook_opened_too_early_says_what_to_run_first(tmp_path, monkeypatch):
    monkeypatch.delenv("OUTPUT_DIR", raising=False)
    with pytest.raises(Exception, match="run notebook 01_prepare_data first"):
        execute(JOBS / "02_protect_phi.ipynb", tmp_path)


def test_notebook_opened_in_its_folder_writes_to_the_runs_of_the_project(tmp_path, monkeypatch):
    """JupyterLab's kernels start in nbs/jobs; nothing of a run may land under nbs/."""
    from medai_nb.run_folder import open_stage

    (tmp_path / "run.yaml").write_text("name: elsewhere\ndata: {dataset_path: demo}\n")
    monkeypatch.chdir(JOBS)
    open_stage("prepare_data", run_dir=tmp_path)
    assert Path.cwd() == JOBS.parents[1]
