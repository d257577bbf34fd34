"""Measurements for a law, read from result rows (.jsonl) or from a table of scores (.csv) with the columns

    family,llm_params_billion,visual_tokens,mean_score
    encoder,compressor,llm                                optional: names in the zoo and the catalog
    seed,stderr,questions                                 optional: replicates; noise of a score, or its questions

Other columns are kept in `Measurement.extra`; `harness` goes into the law. Models of a CSV have the sizes of
`catalog.model_spec`; without their names a plan needs --encoders, --compressors and --llms.

N is the number of non-embedding parameters in result rows and the nominal size of the model's name in tables;
`Scores.params_are` records which.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from vlm_jax.compress import catalog
from vlm_jax.core import reading, text
from vlm_jax.core.errors import UserError, unknown
from vlm_jax.core.rows import ResultRow
from vlm_jax.core.specs import ModelSpec
from vlm_jax.evaluation import results
from vlm_jax.sizing import zoo

COLUMNS = ("family", "llm_params_billion", "visual_tokens", "mean_score")
BILLION = 1e9
MIN_PARAMS, MAX_PARAMS = 1e-9, 1e6  # N, in billions
MAX_TOKENS = 10**7  # V


class Measurement(NamedTuple):
    """One cell of a grid, measured once."""

    family: str
    params: float  # N, in billions
    tokens: int  # V; 0 is the blind baseline
    error: float  # in [0, 1]
    stderr: float | None
    seed: int | None  # None: unknown, so a second row of the cell counts as a duplicate, not a replicate
    where: str  # "file:line", for messages
    extra: Mapping[str, str]
    model: ModelSpec | None = None  # None: not given


class Scores(NamedTuple):
    """All measurements of one file."""

    cells: tuple[Measurement, ...]
    params_are: Literal["non_embedding", "nominal"]

    def families(self) -> list[str]:
        return sorted({cell.family for cell in self.cells})

    def of(self, family: str) -> "Scores":
        """The cells of one family. Raises `UserError` with a suggestion."""
        if family not in self.families():
            raise unknown("family", family, self.families())
        return self._replace(cells=tuple(cell for cell in self.cells if cell.family == family))


def read(path: str | Path) -> Scores:
    """Measurements of a .jsonl or .csv file. Raises `UserError` naming file, row and fix."""
    suffix = Path(path).suffix.lower()
    if suffix == ".jsonl":
        pairs = results.read_lines(path)
        rows = [(results.parse(values, f"{path}:{number}"), f"{path}:{number}") for number, values in pairs]
        scores = Scores(tuple(from_row(row, where) for row, where in rows), "non_embedding")
    elif suffix == ".csv":
        scores = Scores(tuple(_read_csv(path)), "nominal")
    else:
        raise UserError(f"{path}: expected .jsonl (result rows) or .csv ({','.join(COLUMNS)})")
    if not scores.cells:
        raise UserError(f"{path}: no rows")
    return scores


def of_rows(rows: "Iterable[ResultRow] | Scores") -> Scores:
    """Result rows as scores; scores are returned unchanged."""
    if isinstance(rows, Scores):
        return rows
    return Scores(tuple(from_row(row, f"row {row.cell!r}") for row in rows), "non_embedding")


def from_row(row: ResultRow, where: str) -> Measurement:
    """A result row as a measurement."""
    params = row.llm_params / BILLION
    _check_params(params, "llm_params in billions", where)
    if not 0 <= row.visual_tokens <= MAX_TOKENS:
        raise UserError(f"{where}: expected visual_tokens of 0 or more, got {row.visual_tokens}")
    _check_fraction(row.error, "error", where)
    _check_fraction(row.stderr, "stderr", where)
    stderr = row.stderr or binomial_stderr(row.error, row.images)
    return Measurement(row.family, params, row.visual_tokens, row.error, stderr, row.seed, where, {}, row.model)


def _read_csv(path: str | Path) -> Iterable[Measurement]:
    for where, row in reading.read_csv(path, COLUMNS):
        _check_name(row["family"], where)
        params, tokens, score = (_number(row[name], name, where) for name in COLUMNS[1:])
        _check_params(params, "llm_params_billion", where)
        if not 0 <= tokens <= MAX_TOKENS or tokens != int(tokens):
            raise UserError(f"{where}: expected an integer visual_tokens (0: blind baseline), got {tokens:g}")
        _check_fraction(score, "mean_score", where)
        extra = {name: value for name, value in row.items() if name not in COLUMNS}
        seed = int(_number(extra["seed"], "seed", where)) if extra.get("seed") else None
        stderr = _number(extra["stderr"], "stderr", where) if extra.get("stderr") else None
        _check_fraction(stderr or 0, "stderr", where)
        if not stderr and extra.get("questions"):
            stderr = binomial_stderr(1 - score, _number(extra["questions"], "questions", where))
        _check_name(extra.get("harness", ""), where)
        model = _model(extra, params, int(tokens), where)
        yield Measurement(row["family"], params, int(tokens), 1 - score, stderr, seed, where, extra, model)


def _model(row: Mapping[str, str], params: float, tokens: int, where: str) -> ModelSpec | None:
    """The model that a line names, if any."""
    names = [row.get(kind) or "" for kind in ("encoder", "compressor", "llm")]
    if not any(names):
        return None
    if not all(names):
        raise UserError(f"{where}: expected encoder, compressor and llm, or none of them; got {','.join(names)}")
    encoder, compressor, llm = names
    try:
        if zoo.nominal_params(llm) != params * BILLION:
            raise UserError(
                f"llm {llm}: expected llm_params_billion={zoo.nominal_params(llm) / BILLION:g}, got {params:g}"
            )
        return catalog.model_spec(zoo.encoder(encoder), compressor if tokens else "blind", tokens, zoo.decoder(llm))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def binomial_stderr(error: float, count: int | float) -> float | None:
    """Standard error of an error over `count` independent questions, of which half a one is added to each side so that
    it is not 0 at an error of 0 or 1; None without questions."""
    if count < 1:
        return None
    share = (error * count + 0.5) / (count + 1)
    return math.sqrt(share * (1 - share) / count)


def _number(field: str, name: str, where: str) -> float:
    try:
        value = float(field)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{where}: expected a finite number as {name}, got {field!r}")
    return value


def _check_params(params: int | float, name: str, where: str) -> None:
    if params <= 0:
        raise UserError(f"{where}: expected {name} above 0, got {params:g}")
    if not MIN_PARAMS <= params <= MAX_PARAMS:
        raise UserError(f"{where}: expected {name} from {MIN_PARAMS:g} to {MAX_PARAMS:g}, got {params:g}")


def _check_name(name: str, where: str) -> None:
    if len(name) > text.MAX_NAME or not text.is_printable(name):
        raise UserError(f"{where}: expected printable text of at most {text.MAX_NAME} characters, got {name!r}")


def _check_fraction(value: int | float, name: str, where: str) -> None:
    if not 0 <= value <= 1:
        fix = " (a percentage? divide by 100)" if 1 < value <= 100 else ""
        raise UserError(f"{where}: expected {name} between 0 and 1, got {value:g}{fix}")


def seen(cells: Iterable[Measurement]) -> tuple[Measurement, ...]:
    """The cells with visual tokens."""
    return tuple(cell for cell in cells if cell.tokens > 0)


def cell_means(cells: Iterable[Measurement]) -> list[tuple[float, int, float, float]]:
    """(N, V, mean error, its standard error) of every cell with visual tokens, ascending.

    The standard error is that between replicates, or that of the measurements if it is larger.
    """
    groups: dict[tuple[float, int], list[Measurement]] = {}
    for cell in seen(cells):
        groups.setdefault((cell.params, cell.tokens), []).append(cell)
    out = []
    for (params, tokens), group in sorted(groups.items()):
        errors = np.array([cell.error for cell in group])
        own = np.sqrt(sum((cell.stderr or 0.0) ** 2 for cell in group)) / len(group)
        between = errors.std(ddof=1) / np.sqrt(len(group)) if len(group) > 1 else 0.0
        out.append((params, tokens, float(errors.mean()), float(max(own, between))))
    return out


def blind_errors(cells: Iterable[Measurement]) -> dict[float, float]:
    """Mean error of the blind baseline by N."""
    sums: dict[float, list[float]] = {}
    for cell in cells:
        if cell.tokens == 0:
            sums.setdefault(cell.params, []).append(cell.error)
    return {params: sum(values) / len(values) for params, values in sorted(sums.items())}


def above_blind(scores: Scores) -> Scores:
    """Scores relative to the blind baseline of the same LLM, (score - blind) / (1 - blind); blind rows are unchanged.

    Raises `UserError` if a size has no blind row, or one without errors.
    """
    cells = []
    for cell in scores.cells:
        blind = blind_errors(other for other in scores.cells if other.family == cell.family).get(cell.params)
        if not blind:
            raise UserError(
                f"{cell.where}: --floor blind: expected a row with visual_tokens=0 and an error above 0 for family"
                f" {cell.family!r} at N={cell.params:g} billion, got none"
            )
        stderr = None if cell.stderr is None else cell.stderr / blind
        cells.append(cell if cell.tokens == 0 else cell._replace(error=cell.error / blind, stderr=stderr))
    return scores._replace(cells=tuple(cells))


def params_label(params: int | float) -> str:
    """N in billions as a label: 7 -> "7B", 0.5 -> "0.5B", 5.6e-05 -> "56k"."""
    for scale, letter, least in ((1.0, "B", 0.5), (1e-3, "M", 1.0), (1e-6, "k", 1.0)):
        if params >= scale * least:
            return f"{params / scale:.3g}{letter}"
    return f"{params * BILLION:.0f}"
