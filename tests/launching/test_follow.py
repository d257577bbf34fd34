"""What is shown of a grid while it runs and when it has ended."""

import io
from pathlib import Path

from rich.console import Console

from experiments.launching import states
from experiments.launching.cells import Cell, write_row
from experiments.launching.follow import conclude, follow
from tests.launching.conftest import row
from vlm_jax.evaluation import results


def test_ended_cells_are_printed_once_and_gathered(cells: list[Cell], workdir: Path) -> None:
    """One cell ends at each look; another launch has one of them."""
    said, looks = io.StringIO(), []

    def going() -> bool:
        looks.append(len(results.done(workdir / "rows.jsonl")))
        if len(looks) == 1:
            write_row(cells[2], row(cells[2]))
        if len(looks) == 2:
            states.fail(cells[0], "KeyError: '[red]'")
        return len(looks) < 3

    follow(cells, workdir, going, Console(file=said, width=200), 0.0)
    assert looks == [0, 1, 1]
    lines = [line for line in said.getvalue().splitlines() if "llm=" in line]
    assert lines == [f"error 0.250 ± 0.250 {cells[2].name}", f"failed {cells[0].name}"]
    assert "2/3 cells" in said.getvalue()


def test_at_the_end_failures_come_with_their_last_lines(cells: list[Cell], workdir: Path) -> None:
    states.fail(cells[0], "Traceback\n  one\n  two\n  three [/tmp]\nValueError: [no] such [red] thing")
    said = io.StringIO()
    assert conclude(cells[:2], workdir, Console(file=said, width=200)) == 1
    text = said.getvalue()
    assert "ValueError: [no] such [red] thing" in text
    assert "three [/tmp]" in text
    assert "Traceback" not in text
    assert f"{cells[0].folder / 'error.txt'}" in text
    assert "cut off: 1" in text
    assert conclude([], workdir, Console(file=said)) == 0
