"""The folder OUT of a suite's evaluation, and everything about it that needs no model.

OUT/run.json                     the model, the suite with its options, the cost of each benchmark
OUT/answers/gqa.jsonl            raw answers (`answers`); OUT/answers_blind/ without images
OUT/scores.json                  scores with sub-scores, standard errors, parse failures, baselines
OUT/rows.jsonl                   result rows for `fit_law --rows`
OUT/submissions/                 files for the servers of hidden answers
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_jax.core import reading, specs, text
from vlm_jax.core.errors import UserError
from vlm_jax.core.files import write_json, write_text
from vlm_jax.core.specs import ModelSpec
from vlm_jax.evaluation import benchmarks, results, submissions, suite_scores, suites
from vlm_jax.evaluation.answers import AnswerFile
from vlm_jax.evaluation.benchmarks.items import Loaded
from vlm_jax.evaluation.suite_scores import BenchmarkScore
from vlm_jax.evaluation.suites import Suite
from vlm_jax.sizing.compression import check_stages

KINDS = ("answers", "answers_blind")
_RECORD = {"suite": str, "options": dict, "model": dict, "costs": dict}  # run.json


def load(suite: Suite, data: Path, limit: int) -> dict[str, Loaded]:
    """The items of each benchmark, the first `limit` (0: all). Raises one `UserError` for all that cannot be read."""
    if not data.is_dir():
        raise UserError(f"--data {data}: expected a folder of benchmarks, got none")
    out, errors = {}, []
    for name in suite.benchmarks:
        try:
            loaded = benchmarks.load(benchmarks.find(name), data, suite.options)
            out[name] = loaded._replace(items=loaded.items[:limit] if limit else loaded.items)
        except UserError as error:
            errors.append(str(error))
    if errors:
        limit = (text.MAX_MESSAGE - 60) // len(errors)  # all of them are named
        errors = [text.shorten(error, max(limit, 40)) for error in errors]
        raise UserError("; ".join(errors) + (" (--benchmarks evaluates some of the suite)" if len(errors) > 1 else ""))
    return out


def answer_file(out: Path, kind: str, name: str) -> AnswerFile:
    return AnswerFile(out / kind / f"{name}.jsonl")


def begin(out: Path, suite: Suite, model: Mapping[str, Any]) -> None:
    """Records model and options in a new folder, or checks that an existing one holds answers of the same. Raises
    `UserError` with what differs; options that only concern scoring may.
    """
    given = {"suite": suite.name, "options": dataclasses.asdict(suite.options), "model": dict(model), "costs": {}}
    stored = read_record(out)
    if stored is not None:
        differing = (
            [f"suite: expected {stored['suite']!r}, got {suite.name!r}"] if stored["suite"] != suite.name else []
        )
        for name, value in given["options"].items():
            if name in suites.ASKING and stored["options"].get(name, value) != value:
                differing.append(f"option {name}: expected {stored['options'][name]!r}, got {value!r}")
        if any(stored["model"].get(name) != json_of(model)[name] for name in ("params_sha256", "model")):
            differing.append(f"model: expected the weights and spec of {stored['model']['cell']!r}")
        if differing:
            raise UserError(f"{out} holds answers of another evaluation ({'; '.join(differing)}): choose another --out")
        given["costs"] = stored["costs"]
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "run.json", json_of(given))
    except OSError as error:
        raise UserError(f"{out}: cannot write here ({error.strerror}): choose another --out") from error


def json_of(values: Any) -> Any:
    return json.loads(json.dumps(values, default=specs.to_dict))


def read_record(out: Path) -> dict[str, Any] | None:
    """run.json, or None. Raises `UserError` for a broken one."""
    path = out / "run.json"
    if not reading.kind(path):
        return None
    record = reading.read_object(path)
    for name, kind in _RECORD.items():
        if not isinstance(record.get(name), kind):
            what = "a text" if kind is str else "an object"
            raise UserError(f"{path}: {name}: expected {what}, got {record.get(name)!r}: choose another --out")
    model, costs = record["model"], record["costs"]
    if missing := [name for name in ("cell", "params_sha256", "model", "blind") if name not in model]:
        raise UserError(f"{path}: model: expected {', '.join(missing)}, got none: choose another --out")
    kinds = [kind if isinstance(kind, dict) else {"": None} for kind in costs.values()]
    if not all(
        isinstance(part, dict) for part in (model["blind"], *(cost for kind in kinds for cost in kind.values()))
    ):
        raise UserError(f"{path}: costs: expected an object for each benchmark: choose another --out")
    return {name: record[name] for name in _RECORD}


def add_costs(out: Path, kind: str, costs: Mapping[str, Mapping[str, float]]) -> None:
    """Records the tokens and FLOPs of benchmarks."""
    record = read_record(out)
    assert record is not None, "begin() comes first"
    record["costs"][kind] = record["costs"].get(kind, {}) | json_of(costs)
    write_json(out / "run.json", record)


def finish(suite: Suite, loaded: Mapping[str, Loaded], data: Path, out: Path, limit: int) -> list[str]:
    """Scores all answers; writes scores.json, rows.jsonl and submissions. Returns lines that describe the scores.

    Without run.json, for answers of another program, there are no rows. Raises `UserError` for missing answers.
    """
    record, report, lines, rows = read_record(out), {}, [], []
    for kind in KINDS:
        answers = {name: answer_file(out, kind, name).matched(one.items) for name, one in loaded.items()}
        if kind != KINDS[0] and any(len(answers[name]) < len(one.items) for name, one in loaded.items()):
            lines += [f"note: {out / kind} is incomplete (--blind goes on)"] if any(answers.values()) else []
            continue
        scores = []
        for name, one in loaded.items():
            scores.append(suite_scores.score(benchmarks.find(name), one, answers[name], suite.options))
            if kind == KINDS[0] and (path := submissions.write(name, one, answers[name], data, out / "submissions")):
                lines.append(f"wrote {path}")
        total = suite_scores.mean(suite, scores)
        report[kind] = {
            "benchmarks": {one.benchmark: one._asdict() for one in scores},
            "mean": total and total[0],
            "mean_stderr": total and total[1],
        }
        if record and set(loaded) <= set(record["costs"].get(kind, {})):
            model = _model_fields(record["model"], kind)
            rows += suite_scores.rows(suite, scores, model, record["costs"][kind], limit)
        label = "" if kind == KINDS[0] else ", without images"
        lines += [_line(one, label) for one in scores]
        if total:
            lines.append(f"{suite.name:14}{100 * total[0]:7.2f} ± {100 * total[1]:.2f}  mean{label}")
    head = {"suite": suite.name, "is_part": suite.is_part, "limit": limit, "options": dataclasses.asdict(suite.options)}
    write_json(out / "scores.json", head | {"model": record and record["model"]} | report)
    if record:
        write_text(out / "rows.jsonl", "".join(results.to_line(row, out / "rows.jsonl") for row in rows))
        lines.append(f"wrote {len(rows)} rows to {out / 'rows.jsonl'}")
    return [*lines, f"wrote {out / 'scores.json'}"]


def _model_fields(model: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Fields of a `ResultRow` about the model; without images, those of the blind one."""
    blind = model["blind"] if kind != KINDS[0] else {}
    fields = {name: value for name, value in model.items() if name != "blind"} | blind
    spec = specs.from_dict(ModelSpec, fields["model"], "run.json: model.")
    check_stages(spec, "run.json: model.")
    return fields | {"model": spec}


def _line(one: BenchmarkScore, label: str) -> str:
    count = f"{one.questions:,} questions" + (
        "" if one.questions in (one.official_questions or (one.questions,)) else ", a part"
    )
    if one.score is None:
        return f"{one.benchmark:14}   hidden answers  {count}{label}"
    stderr = f" ± {100 * one.stderr:.2f}" if one.stderr is not None else ""
    return f"{one.benchmark:14}{100 * one.score:7.2f}{stderr}  {count}, {one.parse_failures:.1%} unreadable{label}"
