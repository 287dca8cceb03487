"""The notebook in examples/ runs from its first cell to its last, and shows what it says."""

import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "first_steps.ipynb"


@pytest.mark.pages
def test_the_notebook_runs(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not [cell for cell in notebook.cells if cell.get("outputs")], "kept without what it printed"
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = [output for cell in cells for output in cell.outputs if output.output_type == "execute_result"]
    assert len(shown) == 3 and all("<table>" in output.data["text/html"] for output in shown)
    assert all(len(output.data["text/plain"]) < 300 for output in shown)
    printed = "".join(output.text for cell in cells for output in cell.outputs if output.output_type == "stream")
    assert "decompose small: " in printed and "distill healed: " in printed
    assert "torch.Size([1])" in printed
    figures = [float(figure) for figure in re.findall(r"top1 (\d\.\d+)", printed)]
    assert len(figures) == 3 and min(figures) > 0.7, "it learns, and a third of the weights is enough"
