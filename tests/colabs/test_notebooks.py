"""The notebooks run from top to bottom, and what is stored in them is of their present cells."""

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from colabs import execute

pytestmark = pytest.mark.xdist_group("notebooks")  # of one cache
ROOT = Path(__file__).parents[2]
MAX_BYTES = 500_000
each_notebook = pytest.mark.parametrize("name", execute.NAMES)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of data sets and features, which the notebooks share."""
    return tmp_path_factory.mktemp("notebooks")


def stored(name: str) -> NotebookNode:
    return nbformat.read(ROOT / "colabs" / f"{name}.ipynb", 4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell: NotebookNode) -> set[str]:
    """What a cell shows: text, or the formats of pictures and pages."""
    return {kind for output in cell.outputs for kind in output.get("data", {output.output_type: None})}


@each_notebook
def test_a_notebook_runs_from_its_own_folder(name: str, cache: Path) -> None:
    settings = {"NOTEBOOK_QUICK": "1", "VLM_JAX_CACHE": str(cache), "JAX_PLATFORMS": "cpu"}
    settings["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    ran = execute.executed(name, {**os.environ, **settings})  # raises where a cell fails
    for cell, as_stored in zip(code_cells(ran), code_cells(stored(name)), strict=True):
        assert not [output for output in cell.outputs if output.get("name") == "stderr"], cell.outputs
        assert bool(cell.outputs) == bool(as_stored.outputs), cell.source
        assert kinds(as_stored) <= kinds(cell), cell.source  # the first run also shows the progress of making data


@each_notebook
def test_outputs_are_stored_in_order_and_small(name: str) -> None:
    cells = code_cells(stored(name))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.get("name") == "stderr"]
    assert (ROOT / "colabs" / f"{name}.ipynb").stat().st_size < MAX_BYTES


@each_notebook
def test_a_notebook_begins_with_its_title_badge_and_setup(name: str) -> None:
    title, setup, *_ = stored(name).cells
    assert title.source.startswith("# ")
    assert f"/blob/main/colabs/{name}.ipynb)" in title.source
    assert setup.source == stored(execute.NAMES[0]).cells[1].source


def test_every_address_is_that_of_the_citation() -> None:
    """CITATION.cff names the repository; badges of Colab and the notebooks' clone command repeat it."""
    (address,) = re.findall(r'^repository-code: "?https://github\.com/([\w./-]+?)"?$', citation(), flags=re.M)
    pages = [ROOT / "README.md", ROOT / "docs" / "quickstart.md", *(ROOT / "colabs").glob("*.ipynb")]
    for page in pages:
        text = page.read_text()
        badges = re.findall(
            r"colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/blob/main/colabs/(\w+)\.ipynb", text
        )
        assert badges, page
        assert {repository for repository, _ in badges} == {address}, page
        assert {name for _, name in badges} == ({page.stem} if page.suffix == ".ipynb" else set(execute.NAMES)), page
        if page.suffix == ".ipynb":
            assert f"https://github.com/{address}" in text


def citation() -> str:
    return (ROOT / "CITATION.cff").read_text()
