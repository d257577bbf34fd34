"use strict";
// The figure of the page: error against cost of all candidates.
const escaped = text => text.replace(/[&<>"']/g, mark => `&#${mark.charCodeAt(0)};`);  // Plotly reads some HTML
function ticks(low, high) {  // of a logarithmic axis
  const found = [], decades = Math.log10(high / low);
  const digits = decades < 1.6 ? [1, 2, 3, 5, 7] : decades < 3 ? [1, 2, 5] : [1];
  if (decades < 0.6) {
    const rough = (high - low) / 6, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].find(digit => digit * power >= rough) * power;
    for (let k = Math.ceil(low / step); k * step <= high; k++) found.push(Number((k * step).toPrecision(6)));
    return found;
  }
  for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power++) {
    found.push(...digits.map(digit => Number((digit * 10 ** power).toPrecision(2))));
  }
  return found.filter(x => x >= low && x <= high);
}
function shade(share) {  // light to dark with N
  const ends = [[0x9c, 0xc4, 0xe0], [0x0b, 0x2a, 0x4f]];
  return `rgb(${ends[0].map((value, k) => Math.round(value + share * (ends[1][k] - value)))})`;
}
function frontier(x, rows, dash) {
  let least = Infinity;
  const kept = [...rows].sort((a, b) => x[a] - x[b] || c.error[a] - c.error[b])
    .filter(i => c.error[i] < least && ((least = c.error[i]), true));
  return {
    x: kept.map(i => x[i]), y: kept.map(i => c.error[i]), mode: "lines", hoverinfo: "skip",
    line: {shape: "hv", color: BEST, width: 1.8, dash},
  };
}
function hover(cost, i) {
  const measured = data.law && c.measured[i] !== null ? [`measured ${errorText(c.measured[i])}`] : [];
  return [`<b>${escaped(c.llm[i])}, V = ${c.v[i]}</b>`, escaped(`${c.encoder[i]} + ${c.compressor[i]}`),
    `error ${errorText(c.error[i])} ${intervalText(i)}`, ...measured, amountText(cost.flops[i], FLOPS),
    ...(cost.secs ? [amountText(cost.secs[i], SECS)] : []),
    c.basis[i] === "outside" ? `<i>extrapolated: ${escaped(c.outside[i])}</i>` : BASIS[c.basis[i]]].join("<br>");
}
function label(x, y, text, colour, more) {
  return {x: Math.log10(x), y, text, showarrow: false, font: {color: colour, size: 12}, ...more};
}
function curves(cost, x, shown, narrow) {  // a line for each LLM, and its name at the largest V
  const sizes = [...new Set(c.n)].sort((a, b) => a - b), groups = new Map(), labels = new Map(), traces = [];
  for (const i of shown) {
    const key = [c.llm[i], c.encoder[i], c.compressor[i]].join("\n");
    groups.set(key, [...(groups.get(key) || []), i]);
  }
  for (const rows of groups.values()) {
    rows.sort((a, b) => c.v[a] - c.v[b]);
    const i = rows[rows.length - 1], share = sizes.indexOf(c.n[i]) / Math.max(sizes.length - 1, 1);
    const colour = shade(share);
    traces.push({
      x: rows.map(k => x[k]), y: rows.map(k => c.error[k]), text: rows.map(k => hover(cost, k)), mode: "lines+markers",
      hovertemplate: "%{text}<extra></extra>", line: {color: colour, width: 0.8},
      marker: {
        color: colour, size: rows.map(k => ({cell: 9, between: 4, outside: 6})[c.basis[k]]),
        symbol: rows.map(k => c.basis[k] === "outside" ? "circle-open" : "circle"),
      },
    });
    const more = {xanchor: "left", xshift: 7, bgcolor: "rgba(255,255,255,.8)", borderpad: 1};
    const text = escaped(narrow ? c.size[i] : c.llm[i]);
    if (!labels.has(c.llm[i])) labels.set(c.llm[i], label(x[i], c.error[i], text, shade(0.4 + 0.6 * share), more));
  }
  return [traces, sizes.length <= 12 ? [...labels.values()] : []];
}
function showFigure(cost, full, paper) {
  const narrow = $("plot").clientWidth < 560, value = spent(cost);
  const shown = every.filter(i => cost.fits[i] || i === paper[0]);
  const [scale, unit] = unitOf(Math.max(...shown.map(i => value[i])) / 3, KINDS[view.kind].units);
  const x = value.map(each => each / scale), limit = view.amount * KINDS[view.kind].unit / scale;
  const [traces, notes] = curves(cost, x, shown, narrow);
  traces.push(frontier(x, shown, "dot"), frontier(x, shown.filter(i => c.basis[i] !== "outside"), "solid"));
  const marks = [[paper[0], PAPER, "x", 12], [full[1], BEST, "diamond-open", 11], [full[0], BEST, "diamond", 14]];
  for (const [i, color, symbol, size] of marks.filter(([i]) => i !== undefined)) {
    const marker = {color, symbol, size, line: {color: symbol === "diamond-open" ? color : "#fff", width: 1}};
    traces.push({x: [x[i]], y: [c.error[i]], mode: "markers", hoverinfo: "skip", marker});
  }
  const xs = shown.map(i => x[i]), ys = shown.map(i => c.error[i]);
  const near = limit > Math.min(...xs) / 2 && limit < 2 * Math.max(...xs) ? [limit] : [];  // else off the figure
  const low = Math.min(...xs, ...near) / 1.1, high = Math.max(...xs, ...near) * 1.1;
  const logged = Math.max(...ys) > 4 * Math.max(Math.min(...ys), 1e-9) && Math.min(...ys) > 0;
  if (logged) for (const note of notes) note.y = Math.log10(note.y);
  const shapes = near.map(at => (
    {type: "line", x0: at, x1: at, y0: 0, y1: 1, yref: "paper", line: {color: INK, width: 1, dash: "dash"}}));
  notes.push(...near.map(at => label(at, 1, "budget", INK, {yref: "paper", yanchor: "bottom"})));
  const grid = {gridcolor: "#e9e9e9", zeroline: false, tickformat: "~g"}, tickvals = ticks(low, high);
  Plotly.react("plot", traces, {
    margin: {l: 56, r: narrow ? 44 : 96, t: 22, b: 48}, hovermode: "closest", plot_bgcolor: "#fff", showlegend: false,
    font: {family: "system-ui, sans-serif", color: INK, size: 13}, annotations: notes, shapes,
    xaxis: {
      ...grid, type: "log", title: {text: `${unit} ${KINDS[view.kind].of}`}, range: [Math.log10(low), Math.log10(high)],
      tickvals: narrow ? tickvals.filter((_, k) => k % 2 === 0) : tickvals,
    },
    yaxis: {
      ...grid, type: logged ? "log" : "linear", title: {text: data.law ? "predicted error" : "measured error"},
      ...(logged ? {tickvals: ticks(Math.min(...ys) / 1.2, Math.max(...ys) * 1.2)} : {}),
    },
  }, {responsive: true, displayModeBar: false, scrollZoom: false});
  $("key").textContent = [
    "A line for each LLM, a point for each V.",
    data.law ? "Large points: measured cells; small: between them; hollow: extrapolated." : "Points: measured cells.",
    `Orange steps: least error at each cost${data.law ? ", dotted with extrapolations" : ""}.`,
    "Diamond: the best within the budget (hollow: the runner-up); cross: the choice by the paper's cost.",
  ].join(" ");
}
