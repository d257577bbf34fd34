"""Entries that read rows, scores, laws and tables, configs and command lines."""

import contextlib
import dataclasses
import functools
import io
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

from experiments import report_page
from experiments.launching import states
from experiments.launching.cells import Cell
from tests.fuzz import hostile
from tests.result_rows import row
from tests.scaling.tables import PUBLISHED
from vlm_jax import cli, export, fit_law, plan, predict
from vlm_jax.config import arguments, resolve, sweep
from vlm_jax.core import text
from vlm_jax.core.errors import UserError
from vlm_jax.evaluation import results
from vlm_jax.scaling import fit, frontier, lawfile, offsets, page, plots, report, scores
from vlm_jax.scaling.budgets import Budget
from vlm_jax.sizing import calibration
from vlm_jax.sizing.roofline import Request
from vlm_jax.training import metrics

ROOT = Path(__file__).parents[2]
_LAWS = (ROOT / "experiments/published_law/law.json", ROOT / "experiments/size_by_tokens/law.json")


@functools.cache
def _law(path: Path) -> Any:
    """A law file with few draws."""
    values = json.loads(path.read_text())
    for family in values["families"].values():
        for form in family["forms"].values():
            form["draws"] = {name: draws[:8] for name, draws in form["draws"].items()}
        family["d_profile"] = family["d_profile"][:2]
    return values


@functools.cache
def _rows() -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (ROOT / "experiments/size_by_tokens/rows.jsonl").read_text().splitlines()]
    return [one for one in rows if one["family"] == "facts"][:12]


def rows(rng: random.Random, path: Path) -> None:
    """Result rows."""
    file, lines = path / "rows.jsonl", [json.dumps(one).encode() for one in _rows()]
    for _ in range(rng.choice((1, 1, 2))):
        i = rng.randrange(len(lines))
        if rng.random() < 0.6:
            lines[i] = json.dumps(hostile.changed(_rows()[i], rng)).encode() if rng.random() < 0.9 else b"9" * 5000
        else:
            lines[i] = hostile.json_bytes(_rows()[i], rng)
    if rng.random() < 0.1:
        hostile.no_file(path / "rows.jsonl.lock", rng)
    found = scores.read(hostile.maybe_no_file(hostile.write(file, b"\n".join(lines)), rng))
    results.done(file)
    if rng.random() < 0.2:
        fit.fit(found, "multiplicative", bootstraps=20)


def score_table(rng: random.Random, path: Path) -> None:
    """A table of scores, fitted."""
    header, *table = [line.split(",") for line in PUBLISHED.read_text().splitlines()]
    width, height = rng.choice((4, 4, len(header))), rng.choice((4, 28, len(table)))
    content = hostile.csv_bytes(header[:width], [line[:width] for line in table[:height]], rng)
    found = scores.read(hostile.maybe_no_file(hostile.write(path / "scores.csv", content), rng))
    how = dict(loss=rng.choice(fit.LOSSES), floor=rng.choice(("none", "none", "none", "blind")))
    fit.fit(found, rng.choice(("multiplicative", "semilog")), bootstraps=20, **how)


def _use(law: Any, rng: random.Random, path: Path) -> None:
    """Prints a law, and plans from it."""
    console = report.console()
    report.print_law(law, console)
    family = rng.choice(list(law.families))
    budget = Budget("tflops", rng.choice((0.0003, 0.5, 20)))
    request = Request(50, 20)
    found = frontier.plan(law, budget, request, family=family, top=3)
    report.print_plan(found, budget, request, "full", console)
    json.loads(report.plan_json(found, budget, request, "full"))


def law_file(rng: random.Random, path: Path) -> None:
    """law.json, printed and planned from."""
    content = hostile.json_bytes(_law(rng.choice(_LAWS)), rng)
    _use(lawfile.read(hostile.maybe_no_file(hostile.write(path / "law.json", content), rng)), rng, path)


def law_values(rng: random.Random, path: Path) -> None:
    """One number or name of a family changed, which often stays a law."""
    values = json.loads(json.dumps(_law(rng.choice(_LAWS))))
    family = rng.choice(list(values["families"].values()))
    part = rng.choice((family["rows"], rng.choice(family["models"]), family["ratio"], family["difference"], family,
                       rng.choice(list(family["forms"].values()))))  # fmt: skip
    for _ in range(5):
        inner = [one for one in part.values() if isinstance(one, dict) and one]
        if not inner or rng.random() < 0.4:
            break
        part = rng.choice(inner)
    key = rng.choice(list(part))
    part[key] = rng.choice(
        (hostile.value(rng), 1, 2, 3, 16, 10**6, 10**12, 0.5, 1e-9, "a", hostile.text(rng), None, [], [1, 2])
    )
    try:
        content = json.dumps(values)
    except ValueError:
        return
    (path / "law.json").write_text(content)
    _use(lawfile.read(path / "law.json"), rng, path)


def offset_table(rng: random.Random, path: Path) -> None:
    table = [["tokenpacker", "4", "50", "1200"], ["quecc", "4", "52", "1300"], ["pool", "4", "", "900"]]
    content = hostile.csv_bytes(["method", "visual_tokens", "gqa", "mme"], table, rng)
    found = offsets.read(hostile.maybe_no_file(hostile.write(path / "offsets.csv", content), rng))
    law = lawfile.read(hostile.write(path / "law.json", json.dumps(_law(_LAWS[0])).encode()))
    frontier.plan(law, Budget("tflops", 2), Request(50, 20), family="ocr", offsets=found)


def calibration_table(rng: random.Random, path: Path) -> None:
    table = [["v6e", "1", "1e15", "1e9", "2"], ["v6e", "4", "1e12", "1e12", "1.5"]]
    content = hostile.csv_bytes(list(calibration.CALIBRATION), table, rng)
    found = calibration.calibrate(hostile.maybe_no_file(hostile.write(path / "measured.csv", content), rng))
    assert all(0 < share <= 1 for share in (found.compute, found.bandwidth))


def names(rng: random.Random, path: Path) -> None:
    """Names of families in paths, pages, tables and figures."""
    name = rng.choice((hostile.text(rng), "".join(hostile.text(rng) for _ in range(3))))
    for folded in (text.slug(name), text.slug(name + "x")):
        assert re.fullmatch(r"[\w+=,-][\w.+=,-]{0,63}", folded, re.ASCII)
        (path / folded).write_text("")
    assert len(list(path.iterdir())) == 2
    assert not set("<>\"'") & set(text.to_html(name))
    assert "<img" not in report_page.html_table([[name], [name]])
    if text.is_printable(name) and rng.random() < 0.1:
        values = json.loads(json.dumps(_law(_LAWS[0])))
        values["families"] = {name: values["families"]["ocr"]}
        law = lawfile.read(hostile.write(path / "law.json", json.dumps(values).encode()))
        report.print_law(law, report.console())
        plots.cost_frontier(law, None, name, path / f"{text.slug(name)}.png", (50,))
        page.write(path / "page.html", law, name, Budget("tflops", 2), Request(50, 20), {"llms": ("qwen1.5-0.5b",)})
        assert "<img src=x" not in (path / "page.html").read_text()


def append(rng: random.Random, path: Path) -> None:
    """A row is written so that it can be read again, or not at all."""
    field = rng.choice([field.name for field in dataclasses.fields(row()) if field.name != "model"])
    value = hostile.value(rng)
    kind = type(getattr(row(), field))
    if field not in ("encoder", "llm", "compressor", "visual_tokens") and type(value) is kind:
        results.append(path / "rows.jsonl", row(**{field: value}))
        results.read(path / "rows.jsonl")


_ARGUMENTS = ("llm", "tokens", "compressor", "family", "recipe", "smoke", "data", "steps", "lr", "stages", "seed", "x")
_FIELDS = (
    "seed", "optim.clip_norm", "optim.lr_scale", "optim.lr_scale.0.1", "stages.0.train.0", "compute.mesh.0", "stages",
    "compute.mesh", "model.llm", "model.compressor.tokens", "data.text_tokens", "evaluation.examples", "stages.²",
    "optim",
    "data.batch_examples", "optim.peak_lr", "optim.b1", "bad_step.policy", "compute.strategy", "model.taps", "", "..",
    "a.b",
)  # fmt: skip


def config(rng: random.Random, path: Path) -> None:
    """Arguments and overrides of a config."""
    parts = []
    for _ in range(rng.choice((0, 1, 2, 3))):
        parts.append(
            rng.choice(_ARGUMENTS) + rng.choice(("", "=", "==")) + rng.choice((hostile.text(rng), "d48", "4", "-1"))
        )
    values = (
        "[1]",
        "(1,)",
        "{}",
        "None",
        "-1",
        "nan",
        "1e400",
        "0",
        "'a'",
        "[" * 200,
        "1+1",
        "().__class__",
        "lambda: 0",
        "9" * 5000,
    )
    overrides = {rng.choice(_FIELDS): rng.choice((*values, hostile.text(rng))) for _ in range(rng.choice((0, 1, 2)))}
    resolve.resolve(arguments.load_config(f"{ROOT / 'configs/vlm.py'}:{','.join(parts)}", overrides))


_SOURCES = (
    "", "def get_config(arg):\n    return None\n", "def get_config(:\n", "import missing_module\n",
    "def get_config():\n    return 1\n",
    "def get_config(arg):\n    raise ValueError('x' * 9000)\n", "get_config = 3\n",
    "def get_config(arg):\n    return {}['a']\n",
    "def get_config(arg):\n    from ml_collections import ConfigDict\n    return ConfigDict({'model': 1})\n", "\0",
    "x = '\ud800'",
    "def get_config(arg):\n    return get_config(arg)\n", "raise SystemExit\n",
    "def get_grid(arg):\n    return None\n", "(" * 500,
    "def get_config(arg):\n    from ml_collections import ConfigDict\n    return ConfigDict()\n",
    "# -*- coding: nope -*-\n", "1/0\n",
)  # fmt: skip


def config_file(rng: random.Random, path: Path) -> None:
    """Config and grid files with mistakes."""
    file = path / "config.py"
    content = rng.choice(_SOURCES) + rng.choice(("", "", hostile.text(rng)))
    hostile.maybe_no_file(hostile.write(file, content.encode("utf-8", "surrogatepass")), rng)
    if rng.random() < 0.7:
        resolve.resolve(arguments.load_config(f"{file}:{rng.choice(('', 'a=1', hostile.text(rng)))}"))
    else:
        sweep.load_grid(str(file))


def states_of_cells(rng: random.Random, path: Path) -> None:
    """The files of a cell of a grid."""
    cell = Cell(0, "cell", None, "hash", ("hash",), 1.0, path)
    progress = {"doing": "training", "share": 0.5, "host": "a", "pid": 1, "time": 1.0}
    names = {"progress.json": progress, "summary.json": {"step": 1}, "error.txt": "a", "job.txt": "1"}
    for name in rng.sample(sorted(names), 2):
        hostile.maybe_no_file(hostile.write(path / name, hostile.json_bytes(names[name], rng)), rng, 0.15)
    states.state_of(cell)


def metrics_file(rng: random.Random, path: Path) -> None:
    """metrics.jsonl of a run that resumes."""
    lines = [json.dumps({"step": step, "loss": 1.0}).encode() for step in range(3)]
    lines[rng.randrange(3)] = hostile.json_bytes({"step": 1, "loss": 2.0}, rng)
    hostile.maybe_no_file(hostile.write(path / "metrics.jsonl", b"\n".join(lines)), rng)
    metrics.MetricWriter(path, rng.choice((0, 1, 2))).close()


_FLAGS = {
    fit_law: ("--rows", "--out", "--family", "--form", "--loss", "--floor", "--fixed-d", "--bootstraps", "--seed"),
    plan: ("--law", "--family", "--tflops", "--latency-ms", "--chip", "--chips", "--batch", "--calibrate", "--llms",
    "--tokens",
           "--top", "--mode", "--question-tokens", "--answer-tokens", "--encoders", "--compressors", "--offsets",
           "--json"),
    predict: ("--model", "--image", "--prompt", "--tokens", "--seed", "--temperature", "--show-tokens", "--top-p"),
    export: ("--model", "--out", "--part", "--dtype", "--max-shard-gb"),
}  # fmt: skip


def command(rng: random.Random, path: Path) -> None:
    """Command lines."""
    (path / "law.json").write_text(json.dumps(_law(_LAWS[0])))
    (path / "scores.csv").write_text(PUBLISHED.read_text())
    module = rng.choice(list(_FLAGS))
    argv = {fit_law: ["--rows", "scores.csv", "--out", "out.json", "--form", "semilog", "--bootstraps", "20"],
            plan: ["--law", "law.json", "--family", "ocr", "--tflops", "2"],
            predict: ["--model", "missing", "--prompt", "hi"], export: ["--model", "missing", "--out",
            "out"]}[module]  # fmt: skip
    for _ in range(rng.choice((1, 1, 2, 3))):
        argv += [rng.choice(_FLAGS[module]), rng.choice((hostile.text(rng), str(rng.choice(hostile.NUMBERS[:-2]))))]
    argv = [one.replace("\0", "").replace("/", "_") for one in argv]  # no NUL, and no other folder to write to
    errors, code = io.StringIO(), 0
    sys.argv = ["command", *argv]
    with contextlib.redirect_stderr(errors):
        try:
            cli.run_main((lambda argv: predict._parse(argv) and 0) if module is predict else module.main)
        except SystemExit as stop:
            code = stop.code
    if code == 2:
        raise UserError(errors.getvalue().removeprefix("error: "))


ENTRIES = {
    "result rows": rows, "scores": score_table, "law.json": law_file, "values of a law": law_values,
    "offsets": offset_table, "calibration": calibration_table, "names": names, "appended rows": append,
    "config": config,
    "config files": config_file, "cells of a grid": states_of_cells, "metrics.jsonl": metrics_file, "commands": command,
}  # fmt: skip
