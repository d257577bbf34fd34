"use strict";
// Charges, filters and ranks the candidates of `data` (written by page.py) for the budget and request of the controls.
const c = data.candidates, count = c.v.length, every = c.v.map((_, i) => i);
const view = {...data.start, all: false};
const COLOURS = ["#2468a2", "#d1603d", "#5b8c5a", "#8a5fa8", "#c29a2b"];  // of the parts
const BEST = "#d1603d", PAPER = "#8a5fa8", INK = "#222222";
const FLOPS = [[1e12, "TFLOPs"], [1e9, "GFLOPs"], [1e6, "MFLOPs"], [1e3, "kFLOPs"]];
const SECS = [[1, "s"], [1e-3, "ms"], [1e-6, "µs"], [1e-9, "ns"]], BYTES = [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"]];
const KINDS = {  // of budgets: `unit` is what one of the command's units is worth
  tflops: {name: "FLOPs per request", units: FLOPS, unit: 1e12, of: "per request"},
  latency_ms: {name: "Latency per batch", units: SECS, unit: 1e-3, of: "per batch"},
  usd_per_million_requests: {
    name: "Dollars per million requests", units: [[1, "US$"]], unit: 1, of: "per million requests",
  },
  cache_mb: {name: "Cache per request", units: BYTES, unit: 1e6, of: "of cache per request"},
};
const BASIS = {cell: "measured cell", between: "between measured cells", outside: "extrapolated"};
const MARK = {cell: "\u25cf", between: "\u00b7", outside: "\u25cb"};  // as in the figure
const timed = kind => kind === "latency_ms" || kind === "usd_per_million_requests";
const $ = id => document.getElementById(id);

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children.map(String));
  return node;
}
function add(node, ...children) { node.append(...children); return node; }
function short(x) {
  if (x === 0) return "0";
  if (x >= 1000) return Math.round(x).toLocaleString("en-US");
  return x >= 1e-4 ? String(Number(x.toPrecision(3))) : x.toExponential(1);
}
function unitOf(value, units) { return units.find(([scale]) => value >= scale) || units[units.length - 1]; }
function amountText(value, units) {
  const [scale, name] = unitOf(value, units), number = short(value / scale);
  return name === "US$" ? `${name} ${number}` : `${number} ${name}`;
}
const errorText = x => x.toFixed(4);
const percent = share => share < 0.005 ? "under 1 %" : `${Math.round(100 * share)} %`;
function roundUp(x) {  // to three digits
  const step = 10 ** (Math.floor(Math.log10(x)) - 2);
  return Number((Math.ceil(x / step - 1e-9) * step).toPrecision(3));
}

// frontier.plan ------------------------------------------------------------------------------------------------------
function costs() {
  const at = data.at[view.question], served = at[view.batch], chip = view.chip ? served[view.chip] : null;
  const memory = chip ? data.chips[view.chip].memory : Infinity;
  return {...at, ...(chip || {}), fits: every.map(i => served.memory[i] <= memory)};
}
function secsWithin() {  // of a batch, for a budget of latency or dollars
  if (view.kind === "latency_ms") return view.amount / 1e3;
  return view.amount / 1e6 / (view.price / 3600) * view.batch / data.count;
}
function charge(cost, mode) {  // what each candidate takes of the budget, and the budget
  if (view.kind === "cache_mb") return [cost.cache, view.amount * 1e6];
  if (mode === "paper") {
    const peak = view.chip ? data.chips[view.chip].peak * data.count / view.batch : 0;
    return [cost.paper_flops, view.kind === "tflops" ? view.amount * 1e12 : secsWithin() * peak];
  }
  return view.kind === "tflops" ? [cost.flops, view.amount * 1e12] : [cost.secs, secsWithin()];
}
function ranked(cost, mode) {  // the models of each mode within the budget, best first; one of each LLM, V and error
  const [taken, limit] = charge(cost, mode), most = Math.max(...cost.flops);
  const paper = cost.paper_flops.map((value, i) => value * (1 + 1e-9 * cost.flops[i] / most));
  const tie = mode === "paper" ? paper : cost.secs || cost.flops, seen = new Set();
  return every.filter(i => taken[i] <= limit && (mode === "paper" || cost.fits[i]))
    .sort((a, b) => c.last[a] - c.last[b] || c.error[a] - c.error[b] || tie[a] - tie[b])
    .filter(i => {
      const key = [c.llm[i], c.v[i], c.error[i], c.last[i]].join("\n");
      return !seen.has(key) && seen.add(key);
    });
}
const dollars = secs => secs * data.count / view.batch * view.price / 3600 * 1e6;  // per million requests
function spent(cost) {  // what each candidate costs, in the units of KINDS
  if (view.kind === "usd_per_million_requests") return cost.secs.map(dollars);
  return {tflops: cost.flops, latency_ms: cost.secs, cache_mb: cost.cache}[view.kind];
}
function range(cost) {  // the least and largest amount that changes the choice, in the command's unit
  const values = spent(cost).filter((_, i) => cost.fits[i]), unit = KINDS[view.kind].unit;
  return values.length ? [roundUp(Math.min(...values) / unit), roundUp(Math.max(...values) / unit)] : null;
}

// Cards and table ----------------------------------------------------------------------------------------------------
const modelText = i => `${c.llm[i]} with ${c.v[i]} visual token${c.v[i] === 1 ? "" : "s"}`;
const intervalText = i => `[${errorText(c.low[i])}, ${errorText(c.high[i])}]`;
function bar(title, values, units) {
  const total = values.reduce((a, b) => a + b, 0), node = document.createDocumentFragment();
  const used = data.parts.map((part, k) => [part, values[k], COLOURS[k]]).filter(([, value]) => value > 0);
  const text = used.map(([part, value]) => `${part} ${amountText(value, units)}`).join(", ");
  const strip = el("div", {class: "bar", role: "img", "aria-label": `${title} by part: ${text}`});
  const list = add(el("ul", {class: "parts"}), el("li", {}, `${title}:`));
  for (const [part, value, colour] of used) {
    strip.append(el("span", {style: `width:${100 * value / total}%;background:${colour}`}));
    list.append(add(el("li"), el("i", {style: `background:${colour}`}), `${part} ${percent(value / total)}`));
  }
  return add(node, strip, list);
}
function card(kind, title, i, cost, lines) {
  const node = add(el("div", {class: `card ${kind}`}), el("h3", {}, title));
  if (i === undefined) return add(node, el("p", {}, "no model is within the budget"));
  const basis = c.basis[i];
  add(node, el("div", {class: "name"}, `${c.llm[i]}, V = ${c.v[i]}`),
    el("p", {class: "faint"}, `${c.encoder[i]} + ${c.compressor[i]}, N = ${c.size[i]}`),
    el("span", {class: `badge ${basis}`}, basis === "outside" ? `extrapolated: ${c.outside[i]}` : BASIS[basis]));
  const word = data.law ? "predicted error" : "measured error";
  const rows = [[word, errorText(c.error[i])], ["95 % interval", intervalText(i)]];
  if (data.law && c.measured[i] !== null) rows.push(["measured error", errorText(c.measured[i])]);
  rows.push(["FLOPs per request", amountText(cost.flops[i], FLOPS)]);
  if (cost.secs) {
    const what = view.batch === "1" ? "time of a request" : `time of ${view.batch} requests`;
    rows.push([what, amountText(cost.secs[i], SECS)]);
    if (view.price > 0) rows.push(["per million requests", `US$ ${short(dollars(cost.secs[i]))}`]);
  }
  rows.push(["cache per request", amountText(cost.cache[i], BYTES)], ...lines);
  if (!cost.fits[i]) rows.push(["memory of the chip", "too small"]);
  const list = el("dl");
  for (const [key, value] of rows) add(list, el("dt", {}, key), el("dd", {}, value));
  if (timed(view.kind)) add(node, bar("time", cost.secs_by_part[i], SECS));
  else add(node, bar("FLOPs", cost.flops_by_part[i], FLOPS));
  return add(node, list);
}
function binds(cost, i) {  // as the plan's column of that name
  return view.kind === "cache_mb" ? "memory" : !cost.secs ? "budget" : {c: "compute", m: "memory"}[cost.binds[i]];
}
const BINDS = {budget: "the FLOPs budget", compute: "compute time", memory: "memory traffic"};
function showCards(cost, full, paper) {
  const [best, next] = full, chosen = paper[0], value = spent(cost), limit = view.amount * KINDS[view.kind].unit;
  const bound = view.kind === "cache_mb" ? "the cache budget" : BINDS[binds(cost, best)];
  const close = next !== undefined && c.high[best] >= c.low[next] ? "overlap" : "are apart";
  const worse = i => [["error above the best", errorText(c.error[i] - c.error[best])], ["intervals", close]];
  const share = i => [["share of the budget", percent(value[i] / limit)]];
  $("cards").replaceChildren(
    card("best", "Best within the budget", best, cost, [["what binds", bound], ...share(best)]),
    card("next", "Runner-up", next, cost, worse(next)),
    card("paper", "By the paper's cost, 2 N (Q + V)", chosen, cost, share(chosen)));
  const judged = chosen === undefined ? "no model" : chosen === best ? "the same" :
    `${modelText(chosen)}, which in full takes ${short(value[chosen] / limit)} times the budget` +
    (cost.fits[chosen] ? "" : " and does not fit into the chip's memory");
  const beyond = c.basis[best] === "outside" ? " (extrapolated)" : "";
  const within = `${amountText(limit, KINDS[view.kind].units)} ${KINDS[view.kind].of}`;
  $("answer").textContent = `Within ${within}: ${modelText(best)}, ` +
    `error ${errorText(c.error[best])} ${intervalText(best)}${beyond}. The paper's cost chooses ${judged}.`;
}
function showTable(cost, full, paper) {
  const named = ["encoder", "compressor"].filter(key => new Set(c[key]).size > 1);
  const columns = [  // title, class, text
    ["", "", (i, rank) => rank + 1], ["", "", i => MARK[c.basis[i]]],
    ["LLM", "left", i => c.llm[i]], ["V", "", i => c.v[i]],
    ...named.map(key => [key, key === "encoder" ? "left rare" : "left", i => c[key][i]]),
    ["error", "", i => errorText(c.error[i])], ["95 %", "spare", i => intervalText(i)],
    ...(data.law ? [["measured", "spare", i => c.measured[i] === null ? "" : errorText(c.measured[i])]] : []),
    ["FLOPs", view.kind === "tflops" ? "" : "spare", i => amountText(cost.flops[i], FLOPS)],
    ...(cost.secs ? [["time", timed(view.kind) ? "" : "spare", i => amountText(cost.secs[i], SECS)]] : []),
    ["cache", view.kind === "cache_mb" ? "" : "rare", i => amountText(cost.cache[i], BYTES)],
    ["binds", "left rare short", i => binds(cost, i)],
    ["basis", "left rare short", i => BASIS[c.basis[i]].split(" ")[0]],
  ];
  const head = el("tr");
  for (const [title, style] of columns) head.append(el("th", {scope: "col", class: style}, title));
  const lines = full.slice(0, view.all ? count : data.top).map((i, rank) => {
    const line = el("tr", rank ? {} : {class: "best"});
    for (const [, style, text] of columns) line.append(el("td", {class: style}, text(i, rank)));
    return line;
  });
  $("choices").tHead.replaceChildren(head);
  $("choices").tBodies[0].replaceChildren(...lines);
  $("more").hidden = full.length <= data.top;
  $("more").textContent = view.all ? "Show fewer" : `Show all ${full.length}`;
}

// Controls -----------------------------------------------------------------------------------------------------------
function show() {
  if (timed(view.kind) && !view.chip) view.chip = data.start.chip || "v6e";
  const editing = document.activeElement === $("price");
  if (timed(view.kind) && !(view.price > 0) && view.kind !== "latency_ms" && !editing) view.price = 1;
  const cost = costs(), span = range(cost), kind = KINDS[view.kind];
  const middle = span ? Math.sqrt(span[0] * span[1]) : view.amount;
  if (view.amount === null) view.amount = roundUp(middle);
  const [scale, unit] = unitOf(middle * kind.unit * 3, kind.units);
  for (const key of ["kind", "question", "batch", "chip"]) $(key).value = view[key] ?? "";
  if (!editing) $("price").value = view.price ?? "";
  if (document.activeElement !== $("amount")) {
    $("amount").value = Number((view.amount * kind.unit / scale).toPrecision(12));
  }
  $("unit").textContent = unit; $("unit").dataset.scale = scale / kind.unit;
  $("priced").hidden = view.kind !== "usd_per_million_requests";
  const [full, paper] = ["full", "paper"].map(mode => view.amount > 0 ? ranked(cost, mode) : []);
  if (span) {
    const at = span[1] > span[0] ? Math.log(view.amount / span[0]) / Math.log(span[1] / span[0]) : 1;
    if (!view.sliding) $("slider").value = Math.round(200 * Math.min(Math.max(at, 0), 1));
    $("slider").setAttribute("aria-valuetext", amountText(view.amount * kind.unit, kind.units));
    [$("least").textContent, $("most").textContent] = span.map(end => amountText(end * kind.unit, kind.units));
  }
  if (full.length) showCards(cost, full, paper);
  else {
    $("answer").textContent = span ? `Nothing is within this budget; the least is ${$("least").textContent}.` :
      `Nothing fits into the memory of ${data.count} x ${view.chip}.`;
    $("cards").replaceChildren();
  }
  showTable(cost, full, paper);
  showFigure(cost, full, paper);
  view.sliding = false;
}
function fill(select, pairs) { for (const [value, text] of pairs) $(select).append(el("option", {value}, text)); }
fill("kind", Object.entries(KINDS).map(([key, kind]) => [key, kind.name]));
fill("question", data.questions.map(q => [q, q]));
fill("batch", data.batches.map(b => [b, b]));
const many = data.count > 1 ? `${data.count} x ` : "";
fill("chip", [["", "any"], ...Object.keys(data.chips).map(name => [name, many + name])]);
$("kind").onchange = () => { view.kind = $("kind").value; view.amount = null; show(); };
$("chip").onchange = () => {
  view.chip = $("chip").value;
  if (!view.chip && timed(view.kind)) { view.kind = "tflops"; view.amount = null; }
  show();
};
for (const key of ["question", "batch"]) $(key).onchange = () => { view[key] = $(key).value; show(); };
$("price").oninput = () => { view.price = Number($("price").value); show(); };
$("amount").oninput = () => { view.amount = Number($("amount").value) * $("unit").dataset.scale; show(); };
$("slider").oninput = () => {
  const [low, high] = range(costs()), share = $("slider").value / 200;
  view.amount = share === 1 ? high : roundUp(low * (high / low) ** share);
  view.sliding = true;
  show();
};
$("more").onclick = () => { view.all = !view.all; show(); };
$("controls").onsubmit = () => false;
show();
