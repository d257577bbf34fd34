"""The interactive page of a plan: one self-contained HTML file that needs no network.

Error against cost of every candidate with the frontiers of measured and of all candidates, and tabs for question
length, batch and cost axis. The page selects one of the tables computed here.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.core.errors import UserError
from vlm_jax.core.files import write_text
from vlm_jax.core.reading import reason
from vlm_jax.core.text import to_html
from vlm_jax.scaling import candidates, frontier
from vlm_jax.scaling.candidates import Candidate
from vlm_jax.scaling.fitted import FamilyFit, LawFit
from vlm_jax.scaling.scores import params_label
from vlm_jax.sizing import chips
from vlm_jax.sizing.cost import PARTS
from vlm_jax.sizing.roofline import Request

QUESTIONS = (0, 50, 200, 1000)
BATCHES = (1, 8, 32)
CHIP = "v6e"  # default


def write(path: str | Path, law: LawFit, family: str | None, request: Request, limits: Mapping[str, Any]) -> None:
    """Writes the page for every question length and batch, the request's included. Raises `UserError` if it cannot."""
    from plotly.offline import get_plotlyjs

    fitted = law.family(family)
    name = family or next(iter(law.families))
    on = request.on or chips.chip(CHIP)
    questions = sorted({*QUESTIONS, request.question_tokens})
    batches = sorted({*BATCHES, request.batch})
    offsets = limits.get("offsets", {})
    found = candidates.candidates(fitted, law.unit["params_are"], **candidates.names_of(limits))
    tables = {
        f"{question:g}/{batch}": _table(
            fitted, found, dataclasses.replace(request, question_tokens=question, batch=batch, on=on), offsets
        )
        for question in questions
        for batch in batches
    }
    data = {
        "tables": tables, "questions": [f"{q:g}" for q in questions], "batches": [str(b) for b in batches],
        "question": f"{request.question_tokens:g}", "batch": str(request.batch), "parts": PARTS,
    }  # fmt: skip
    title = f"{name}: error against cost, {request.answer_tokens:g} answer tokens, {request.chips} x {on.name}"
    parts = {
        "$TITLE": to_html(title), "$NOTE": to_html(_note(fitted)), "$PLOTLY": get_plotlyjs(),
        "$DATA": json.dumps(data, allow_nan=False).replace("<", "\\u003c"),  # no tag ends or starts in a script
    }  # fmt: skip
    # All at once: a name may contain "$DATA".
    text = re.sub(r"\$(TITLE|NOTE|PLOTLY|DATA)", lambda match: parts[match[0]], _PAGE)
    try:
        write_text(Path(path), text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {reason(error)}") from error


def _note(fitted: FamilyFit) -> str:
    sizes, tokens = fitted.rows["sizes"], fitted.rows["tokens"]
    claims = ". ".join(text for text in (fitted.verdict, fitted.extrapolation) if text)
    if fitted.predicts == "cells":
        return f"{claims}. Points are measured cells, with {fitted.measured_with}."
    return (
        f"{claims}. Law: {fitted.chosen}, fitted from N = {params_label(sizes[0])} to {params_label(sizes[-1])} and"
        f" V = {tokens[0]} to {tokens[-1]}, with {fitted.measured_with};"
        " hollow points extrapolate."
    )


def _table(
    fitted: FamilyFit, found: Sequence[Candidate], request: Request, offsets: frontier.Offsets
) -> dict[str, Sequence[Any]]:
    """Columns of one tab: measured candidates first, each in ascending error."""
    priced = frontier.price_all(fitted, list(found), request, offsets)
    fits = priced.each("memory_bytes") <= request.on.memory_bytes * request.chips
    order = frontier.ranked(priced, priced.each("secs"), fits)
    choices = frontier.choices(fitted, priced, order, request, offsets)
    return {
        "llm": [to_html(c.llm) for c in choices],  # shown by Plotly, which reads some HTML
        "n": _short([c.llm_params_billion for c in choices]),
        "v": [c.visual_tokens for c in choices],
        "side": [to_html(f"{c.encoder} + {c.compressor}") for c in choices],
        "error": _short([c.predicted_error for c in choices]),
        "low": _short([c.low for c in choices]),
        "high": _short([c.high for c in choices]),
        "tflops": _short([c.flops / 1e12 for c in choices]),
        "ms": _short([c.latency_ms for c in choices]),
        "mb": _short([c.cache_bytes / 1e6 for c in choices]),
        "binds": [c.binds for c in choices],
        "outside": [", ".join(c.extrapolates) for c in choices],
        "share": [[round(100 * value / c.flops) for value in c.flops_by_part.values()] for c in choices],
    }


def _short(values: Any) -> list[float]:
    return [float(f"{value:.4g}") for value in np.asarray(values, float)]


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$TITLE</title>
<style>
  body { font: 15px/1.45 system-ui, sans-serif; color: #222; margin: 24px auto; max-width: 1080px; padding: 0 16px; }
  h1 { font-size: 19px; margin: 0 0 4px; }
  p { color: #666; margin: 4px 0 14px; }
  .tabs { display: inline-flex; align-items: center; gap: 4px; margin: 0 22px 8px 0; }
  .tabs span { color: #666; margin-right: 4px; }
  button { font: inherit; padding: 3px 11px; border: 1px solid #ccc; border-radius: 5px; background: #fff; }
  button.on { background: #2468a2; border-color: #2468a2; color: #fff; }
  #plot { height: 600px; }
</style></head><body>
<h1>$TITLE</h1><p>$NOTE</p>
<div id="controls"></div><div id="plot"></div>
<script>$PLOTLY</script>
<script>
const data = $DATA;
const state = {question: data.question, batch: data.batch, x: "tflops"};
const axes = {tflops: "TFLOPs a request", ms: "milliseconds a batch"};
function tabs(label, key, values, texts) {
  const box = document.createElement("div"); box.className = "tabs";
  const name = document.createElement("span"); name.textContent = label; box.append(name);
  values.forEach((value, i) => {
    const button = document.createElement("button");
    button.textContent = (texts || values)[i];
    button.onclick = () => { state[key] = value; draw(); };
    button.dataset.key = key; button.dataset.value = value; box.append(button);
  });
  document.getElementById("controls").append(box);
}
tabs("question tokens Q", "question", data.questions);
tabs("batch", "batch", data.batches);
tabs("cost", "x", ["tflops", "ms"], ["FLOPs", "latency"]);
function hover(t, i) {
  const parts = data.parts.map((part, k) => [part, t.share[i][k]]).filter(pair => pair[1]);
  return [
    `<b>${t.llm[i]}, V = ${t.v[i]}</b>`, t.side[i], `error ${t.error[i]} [${t.low[i]}, ${t.high[i]}]`,
    `${t.tflops[i]} TFLOPs: ${parts.map(pair => `${pair[0]} ${pair[1]} %`).join(", ")}`,
    `${t.ms[i]} ms a batch, bound by ${t.binds[i]}`, `cache ${t.mb[i]} MB a request`,
  ].concat(t.outside[i] ? [`<i>extrapolates ${t.outside[i]}</i>`] : []).join("<br>");
}
const bar = {
  title: {text: "V"}, thickness: 12, len: .6,
  tickvals: [0, 2, 4, 6, 8, 10], ticktext: ["1", "4", "16", "64", "256", "1024"],
};
function points(t, x, rows, name, symbol, showscale) {
  return {
    x: rows.map(i => x[i]), y: rows.map(i => t.error[i]), text: rows.map(i => hover(t, i)), name,
    mode: "markers", type: "scatter", hovertemplate: "%{text}<extra></extra>",
    marker: {
      symbol, size: 7, opacity: .85, color: rows.map(i => Math.log2(t.v[i])), cmin: 0, cmax: 10, showscale,
      colorscale: [[0, "#a9cfe8"], [.5, "#2468a2"], [1, "#0b2a4f"]], colorbar: bar,
    },
  };
}
function frontier(t, x, rows, name, dash) {
  let best = Infinity;
  const kept = [...rows].sort((a, b) => x[a] - x[b] || t.error[a] - t.error[b])
    .filter(i => t.error[i] < best && ((best = t.error[i]), true));
  return {
    x: kept.map(i => x[i]), y: kept.map(i => t.error[i]), name, mode: "lines", type: "scatter", hoverinfo: "skip",
    line: {shape: "hv", color: "#d1603d", width: 1.8, dash},
  };
}
function draw() {
  document.querySelectorAll("button").forEach(b => b.classList.toggle("on", state[b.dataset.key] === b.dataset.value));
  const t = data.tables[state.question + "/" + state.batch], x = t[state.x] || [], rows = t.n.map((_, i) => i);
  const inside = rows.filter(i => !t.outside[i]), outside = rows.filter(i => t.outside[i]);
  Plotly.react("plot", [
    points(t, x, inside, "measured", "circle", true),
    points(t, x, outside, "extrapolated", "circle-open", false),
    frontier(t, x, inside, "frontier, measured", "solid"), frontier(t, x, rows, "frontier, all", "dot"),
  ], {
    margin: {l: 64, r: 20, t: 10, b: 56}, hovermode: "closest", plot_bgcolor: "#fff",
    font: {family: "system-ui, sans-serif", color: "#222"}, legend: {orientation: "h", y: 1.06, x: 0},
    xaxis: {type: "log", title: {text: axes[state.x]}, gridcolor: "#eee", dtick: 1},
    yaxis: {title: {text: "predicted error"}, gridcolor: "#eee", zeroline: false},
  }, {responsive: true, displaylogo: false});
}
draw();
</script></body></html>
"""
