"""Rows for a law: the project's result rows (jsonl), or a plain table of published scores (CSV), as one kind of cell.

    family,llm_params_billion,visual_tokens,mean_score        the CSV's columns
    encoder,compressor,llm                                    names in the zoo and the catalog: what was measured

Other columns are kept in `Measurement.extra`; `harness`, what scored the answers, goes into the law. A CSV's models
have the sizes of `catalog.model_spec`; without those three columns a plan must be told what to choose from.

Two counts of N meet here and are never mixed: result rows count non-embedding parameters, a published table gives the
nominal size in a model's name. `Scores.params_are` says which, and the planner follows it.
"""

import csv
import io
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.rows import ResultRow
from vlm_jax.core.specs import ModelSpec
from vlm_jax.evaluation import results
from vlm_jax.sizing import zoo

COLUMNS = ("family", "llm_params_billion", "visual_tokens", "mean_score")
BILLION = 1e9


class Measurement(NamedTuple):
    """One measurement."""

    family: str
    params: float  # N, in billions
    tokens: int  # V; 0 is the blind baseline
    error: float  # in [0, 1]
    stderr: float | None
    seed: int | None  # None: the table does not say, so a second row of one cell is a duplicate and not a replicate
    where: str  # "file:line", for messages
    extra: Mapping[str, str]
    model: ModelSpec | None = None  # what was measured, where the file says


class Scores(NamedTuple):
    """All measurements of one file."""

    cells: tuple[Measurement, ...]
    params_are: Literal["non_embedding", "nominal"]

    def families(self) -> list[str]:
        return sorted({cell.family for cell in self.cells})

    def of(self, family: str) -> "Scores":
        """One family's cells. Raises `UserError` that suggests the nearest."""
        if family not in self.families():
            raise unknown("family", family, self.families())
        return self._replace(cells=tuple(cell for cell in self.cells if cell.family == family))


def read(path: str | Path) -> Scores:
    """A rows file of either kind, told apart by its ending. Raises `UserError` naming file, row and fix."""
    suffix = Path(path).suffix.lower()
    if suffix == ".jsonl":
        pairs = results.read_lines(path)
        rows = [(results.parse(values, f"{path}:{number}"), f"{path}:{number}") for number, values in pairs]
        scores = Scores(tuple(from_row(row, where) for row, where in rows), "non_embedding")
    elif suffix == ".csv":
        scores = Scores(tuple(_read_csv(path)), "nominal")
    else:
        raise UserError(f"{path}: rows are read from .jsonl (result rows) or .csv ({','.join(COLUMNS)})")
    if not scores.cells:
        raise UserError(f"{path}: no rows")
    return scores


def of_rows(rows: "Iterable[ResultRow] | Scores") -> Scores:
    """Result rows already in memory, as scores; scores stay as they are."""
    if isinstance(rows, Scores):
        return rows
    return Scores(tuple(from_row(row, f"row {row.cell!r}") for row in rows), "non_embedding")


def from_row(row: ResultRow, where: str) -> Measurement:
    """A result row as a cell: N is the decoder's non-embedding parameters."""
    if row.llm_params <= 0 or row.visual_tokens < 0:
        raise UserError(f"{where}: llm_params={row.llm_params}, visual_tokens={row.visual_tokens} cannot be")
    _check_fraction(row.error, "error", where)
    params = row.llm_params / BILLION
    return Measurement(row.family, params, row.visual_tokens, row.error, row.stderr, row.seed, where, {}, row.model)


def _read_csv(path: str | Path) -> Iterable[Measurement]:
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    reader = csv.DictReader(io.StringIO(text))
    if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
        raise UserError(f"{path}: missing column(s) {', '.join(missing)}; the header must have {','.join(COLUMNS)}")
    for row in reader:
        where = f"{path}:{reader.line_num}"
        if None in row or any(value is None for value in row.values()):
            raise UserError(f"{where}: this line does not have as many fields as the header")
        params, tokens, score = (_number(row[name], name, where) for name in COLUMNS[1:])
        if params <= 0:
            raise UserError(f"{where}: llm_params_billion={params:g} must be above 0")
        if tokens < 0 or tokens != int(tokens):
            raise UserError(f"{where}: visual_tokens={tokens:g} must be a whole number, 0 for the blind baseline")
        _check_fraction(score, "mean_score", where)
        extra = {name: value for name, value in row.items() if name not in COLUMNS}
        seed = int(_number(extra["seed"], "seed", where)) if extra.get("seed") else None
        stderr = _number(extra["stderr"], "stderr", where) if extra.get("stderr") else None
        model = _model(extra, params, int(tokens), where)
        yield Measurement(row["family"], params, int(tokens), 1 - score, stderr, seed, where, extra, model)


def _model(row: Mapping[str, str], params: float, tokens: int, where: str) -> ModelSpec | None:
    """What a line names, or None where it names nothing."""
    names = [row.get(kind) or "" for kind in ("encoder", "compressor", "llm")]
    if not any(names):
        return None
    if not all(names):
        raise UserError(f"{where}: expected encoder, compressor and llm, or none of them; got {','.join(names)}")
    from vlm_jax.compress import catalog  # brings jax along, which a table without names does not need

    encoder, compressor, llm = names
    try:
        if zoo.nominal_params(llm) != params * BILLION:
            raise UserError(f"llm {llm} has {zoo.nominal_params(llm) / BILLION:g} billion, not {params:g}")
        return catalog.model_spec(zoo.encoder(encoder), compressor if tokens else "blind", tokens, zoo.decoder(llm))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _number(text: str, name: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{where}: {name} is {text!r}; it must be a finite number")
    return value


def _check_fraction(value: int | float, name: str, where: str) -> None:
    if not math.isfinite(value):
        raise UserError(f"{where}: {name} is {value}; it must be a number between 0 and 1")
    if 1 < value <= 100:
        raise UserError(f"{where}: {name}={value:g} looks like a percentage; divide by 100, it must be between 0 and 1")
    if not 0 <= value <= 1:
        raise UserError(f"{where}: {name}={value:g} must be between 0 and 1")


def seen(cells: Iterable[Measurement]) -> tuple[Measurement, ...]:
    """The cells with an image."""
    return tuple(cell for cell in cells if cell.tokens > 0)


def blind_errors(cells: Iterable[Measurement]) -> dict[float, float]:
    """Mean error without an image, by N."""
    sums: dict[float, list[float]] = {}
    for cell in cells:
        if cell.tokens == 0:
            sums.setdefault(cell.params, []).append(cell.error)
    return {params: sum(values) / len(values) for params, values in sorted(sums.items())}


def above_blind(scores: Scores) -> Scores:
    """Scores counted from what the same LLM reaches without an image: (score - blind) / (1 - blind), so that blind is
    error 1.

    The blind rows stay. Raises `UserError` where a size has no blind row, or a perfect one.
    """
    cells = []
    for cell in scores.cells:
        blind = blind_errors(other for other in scores.cells if other.family == cell.family).get(cell.params)
        if not blind:
            raise UserError(
                f"{cell.where}: --floor blind needs a row with visual_tokens=0 and an error above 0 for family"
                f" {cell.family!r} at N={cell.params:g} billion"
            )
        stderr = None if cell.stderr is None else cell.stderr / blind
        cells.append(cell if cell.tokens == 0 else cell._replace(error=cell.error / blind, stderr=stderr))
    return scores._replace(cells=tuple(cells))


def params_label(params: int | float) -> str:
    """N in billions as people say it: 7 -> "7B", 0.5 -> "0.5B", 5.6e-05 -> "56k"."""
    for scale, letter, least in ((1.0, "B", 0.5), (1e-3, "M", 1.0), (1e-6, "k", 1.0)):
        if params >= scale * least:
            return f"{params / scale:.3g}{letter}"
    return f"{params * BILLION:.0f}"
