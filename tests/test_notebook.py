"""Claims about notebooks/llm_jepa.ipynb: it runs from top to bottom, the answers to its exercises
too, every assert in it holds, and what is committed of it is small and was run in order."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="pip install -r requirements-notebook.txt")
nbclient = pytest.importorskip("nbclient", reason="pip install -r requirements-notebook.txt")
pytest.importorskip("ipykernel", reason="pip install -r requirements-notebook.txt")

NOTEBOOK = Path(__file__).parent.parent / "notebooks/llm_jepa.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def exercises(notebook):
    """The code in the answers that are folded away."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_what_is_committed_was_run_in_order_and_is_small(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data"}  # no errors
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert NOTEBOOK.stat().st_size < 400_000
    for line in NOTEBOOK.read_text(encoding="utf-8").splitlines():
        assert "image/png" in line or not re.search(r"/(home|tmp|root|work|Users)/|[A-Z]:\\", line)


def test_every_section_ends_in_an_assert(notebook):
    sections, last = {}, None
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and (name := re.match(r"## (\d+\. .*)", cell.source)):
            last = name[1]
        elif last and cell.cell_type == "code":
            sections[last] = cell.source
    assert len(sections) == 9
    for name, source in sections.items():
        assert "assert " in source, f"section {name} ends without one"
    assert len(exercises(notebook)) == 3 == sum("assert " in code for code in exercises(notebook))


def test_it_runs_and_every_claim_holds(notebook):
    before = {*NOTEBOOK.parent.iterdir()}
    notebook.cells += map(nbformat.v4.new_code_cell, exercises(notebook))
    folder = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=1200, kernel_name="python3",
                            resources=folder).execute()  # fmt: skip
    assert "ten lines" in "".join(o.get("text", "") for cell in code_cells(notebook)
                                  for o in cell.outputs)  # fmt: skip
    assert {*NOTEBOOK.parent.iterdir()} == before  # nothing is written
