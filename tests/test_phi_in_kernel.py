"""Workers of a notebook: a kernel has threads, and torch has its own, when processes are forked from it."""

import nbformat
import pytest

PARENT_REDACTS = 'assert "Kumar" not in redactor.redact_phi(note)'
CELLS = [
    """
import torch
from datasets import Dataset
from medai_nb.phi.files import deidentify
from medai_nb.phi.redact import PHIRedactor

# Now torch has a thread for each core, which a forked process does not have.
torch.set_num_threads(2)
assert torch.isfinite(torch.randn(1500, 1500) @ torch.randn(1500, 1500)).all()
redactor = PHIRedactor()
note = "Dr. Kumar saw her on 3/14/2021. MRN: 4482913. Cough, day "
""",
    """
notes = Dataset.from_dict({"text": [f"{note}{day}" for day in range(8)]})
clean = notes.map(lambda row: {"text": redactor.redact_phi(row["text"])}, num_proc=2, load_from_cache_file=False)
assert len(clean) == 8 and not any("Kumar" in text or "4482913" in text for text in clean["text"])
""",
    """
from pathlib import Path
folder = Path("notes")
folder.mkdir()
for day in range(4):
    (folder / f"{day}.txt").write_text(f"{note}{day}")
done = deidentify(folder, "clean", redactor, jobs=2)
written = [path.read_text() for path in Path("clean").iterdir()]
assert done.documents == len(written) == 4 and not any("Kumar" in text for text in written)
""",
]


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "before",
    [
        PARENT_REDACTS,
        "",
    ],
    ids=["the kernel has redacted", "the workers are the first"],
)
def test_workers_of_a_kernel_in_which_torch_has_computed_come_to_an_end(tmp_path, monkeypatch, before):
    from nbclient import NotebookClient

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cells = [CELLS[0], before, *CELLS[1:]]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
