"""The interactive page of a plan: one self-contained HTML file that needs no network.

Error against cost for every LLM and V (with the cheapest encoder and compressor of each), the frontier through them,
tabs for the length of the question, the batch and the axis. Everything is computed here; the page only picks one of
the computed tables.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.core.errors import UserError
from vlm_jax.core.files import write_text
from vlm_jax.scaling import catalogue, frontier
from vlm_jax.scaling.catalogue import Grid
from vlm_jax.scaling.fitted import FamilyFit, LawFit
from vlm_jax.scaling.latency import PARTS, Request
from vlm_jax.scaling.table import params_label
from vlm_jax.sizing import chips

QUESTIONS = (0, 50, 200, 1000)
BATCHES = (1, 8, 32)
CHIP = "v6e"  # where the request names none


def write(path: str | Path, law: LawFit, family: str | None, request: Request, limits: Mapping[str, Any]) -> None:
    """Writes the page for every Q of `QUESTIONS` (and the request's own) and every batch. Raises `UserError` if it
    cannot be written."""
    from plotly.offline import get_plotlyjs

    fitted = law.family(family)
    name = family or next(iter(law.families))
    on = request.on or chips.chip(CHIP)
    questions = sorted({*QUESTIONS, request.question_tokens})
    batches = sorted({*BATCHES, request.batch})
    encoders, llms, compressors = catalogue.names(
        fitted.rows, *(limits.get(kind, ()) for kind in ("encoders", "llms", "compressors"))
    )
    sides = catalogue.sides(encoders, compressors, limits.get("tokens"), tuple(fitted.rows["tokens"]))
    tables = {
        f"{question:g}/{batch}": _table(
            fitted,
            catalogue.build(
                sides,
                llms,
                dataclasses.replace(request, question_tokens=question, batch=batch, on=on),
                law.unit["params_are"],
            ),
            limits.get("offsets", {}),
            on.memory_bytes * request.chips,
        )
        for question in questions
        for batch in batches
    }
    data = {
        "tables": tables, "questions": [f"{q:g}" for q in questions], "batches": [str(b) for b in batches],
        "question": f"{request.question_tokens:g}", "batch": str(request.batch), "parts": PARTS,
    }  # fmt: skip
    title = f"{name}: error against cost, {request.answer_tokens:g} answer tokens, {request.chips} x {on.name}"
    text = _PAGE.replace("$TITLE", escape(title)).replace("$NOTE", escape(_note(fitted)))
    text = text.replace("$DATA", json.dumps(data, allow_nan=False).replace("</", "<\\/"))
    try:
        write_text(Path(path), text.replace("$PLOTLY", get_plotlyjs()))
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def _note(fitted: FamilyFit) -> str:
    sizes, tokens = fitted.rows["sizes"], fitted.rows["tokens"]
    return (
        f"Law: {fitted.chosen}, fitted from N = {params_label(sizes[0])} to {params_label(sizes[-1])} and"
        f" V = {tokens[0]} to {tokens[-1]};"
        " hollow points lie outside. The law knows N and V only: of encoders and compressors the cheapest is shown."
    )


def _table(fitted: FamilyFit, grid: Grid, offsets: Mapping[Any, float], memory: float) -> dict[str, Sequence[Any]]:
    """Columns of one tab, in ascending error."""
    error = frontier.predicted(fitted, grid, offsets)
    order = frontier.ranked(error, grid.total_secs, grid.memory_bytes <= memory, grid)
    if not order:
        return {"n": []}
    m, n = np.array(order).T
    draws = fitted.predict_draws(grid.params[n], grid.tokens[m])
    low, high = np.quantile(draws, (0.025, 0.975), axis=0)
    sizes, tokens = fitted.rows["sizes"], fitted.rows["tokens"]
    inside = (grid.params >= sizes[0]) & (grid.params <= sizes[-1])
    outside = ~(inside[n] & (grid.tokens[m] >= tokens[0]) & (grid.tokens[m] <= tokens[-1]))
    compute = sum(np.where(grid.by_compute[part], grid.secs[part], 0)[m, n] for part in PARTS)
    secs, flops = grid.total_secs[m, n], grid.total_flops[m, n]
    return {
        "llm": [grid.llms[j] for j in n],
        "n": _short(grid.params[n]),
        "v": [grid.sides[i].tokens for i in m],
        "side": [f"{grid.sides[i].encoder} + {grid.sides[i].compressor}" for i in m],
        "error": _short(error[m, n]),
        "low": _short(low),
        "high": _short(high),
        "tflops": _short(flops / 1e12),
        "ms": _short(secs * 1e3),
        "mb": _short(grid.cache_bytes[m, n] / 1e6),
        "binds": ["compute" if 2 * c >= s else "memory" for c, s in zip(compute, secs, strict=True)],
        "outside": outside.astype(int).tolist(),
        "share": [
            [round(100 * float(grid.flops[part][i, j] / grid.total_flops[i, j])) for part in PARTS] for i, j in order
        ],
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
  ].concat(t.outside[i] ? ["<i>outside the fitted rows</i>"] : []).join("<br>");
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
    points(t, x, inside, "inside the fitted rows", "circle", true),
    points(t, x, outside, "outside", "circle-open", false),
    frontier(t, x, inside, "frontier, inside", "solid"), frontier(t, x, rows, "frontier, all", "dot"),
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
