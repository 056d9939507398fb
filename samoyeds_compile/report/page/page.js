// The page: a list of blocks, the picture of the graph, and the details of what is chosen.

const DATA = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const state = { graph: 0, block: null, tab: "lines", camera: null, place: null };
const COLORS = ["#4a86e0", "#e0a23c", "#4fb286", "#b673c9", "#e0716c", "#57b5c7", "#8d96a8"];

// ------------------------------------------------------------------------------------------------------ what there is

// Blocks that reached no graph come after those of all graphs; they have no picture.
const ALL = [
  ...DATA.report.graphs.flatMap((graph, g) => graph.blocks.map((block, b) => ({ block, g, b }))),
  ...(DATA.report.uncaptured ?? []).map((block, b) => ({ block, g: null, b })),
];
const viewOf = (entry) => (entry.g === null ? null : DATA.views[entry.g]?.view?.blocks[entry.b] ?? null);
const current = () => DATA.report.graphs[state.graph];
const nameOf = (block) => block.module || (block.source ? shortFile(block.source.split(": ")[0]) : "block");

const duration = (ms) => (ms < 1000 ? `${ms.toFixed(ms < 10 ? 1 : 0)} ms` : `${(ms / 1000).toFixed(1)} s`);

function remedyOf(block) {
  const [reason, remedy] = [block.reason ?? "", block.remedy ?? ""];
  return [remedy && reason.endsWith(remedy) ? reason.slice(0, -remedy.length).replace(/[;:] $/, "") : reason, remedy];
}

// ------------------------------------------------------------------------------------------------------------- header

function showHeader() {
  const done = ALL.filter((entry) => entry.block.rewritten).length, graphs = DATA.report.graphs;
  const time = graphs.flatMap((graph) => graph.steps).reduce((sum, step) => sum + step.milliseconds, 0);
  const chips = [
    [`${done} of ${ALL.length} block${ALL.length === 1 ? "" : "s"} rewritten`, !ALL.length ? "" : done === ALL.length ? "done" : "left"],
    [`${graphs.length} graph${graphs.length === 1 ? "" : "s"}`, ""],
    [`${duration(time)} in the pipeline`, ""],
  ];
  const problems = graphs.filter((graph) => graph.problem).length, breaks = graphs.filter((graph) => graph.break_reason).length;
  if (breaks) chips.push([`${breaks} graph break${breaks === 1 ? "" : "s"}`, "left"]);
  if (problems) chips.push([`${problems} failed`, "bad"]);
  $("summary").innerHTML = chips.map(([text, kind]) => `<span class="chip ${kind}">${text}</span>`).join("");
  $("graph").innerHTML = graphs.map((graph, g) => `<option value="${g}">graph ${escaped(graph.name || g)} · ${graph.blocks.length} blocks</option>`).join("");
  $("graph").hidden = graphs.length < 2;
  document.title = `Samoyeds: ${DATA.folder}`;
}

function showList() {
  let html = "", last;
  ALL.forEach((entry, i) => {
    if (entry.g !== last) html += `<h3>${entry.g === null ? "in no graph" : `graph ${escaped(DATA.report.graphs[entry.g].name || entry.g)}`}</h3>`;
    last = entry.g;
    const { block } = entry, sizes = [block.experts && `${block.experts} experts`, block.top_k && `top ${block.top_k}`, block.family].filter(Boolean);
    const parts = nameOf(block).split("."), shown = parts.length > 4 ? `…${parts.slice(-4).join(".")}` : nameOf(block);
    html += `<button data-entry="${i}" title="${escaped(nameOf(block))}"><span class="name"><i class="dot ${block.rewritten ? "done" : ""}"></i>`
      + `<span>${escaped(shown)}</span></span><span class="what">${escaped(sizes.join(" · ")) || (block.rewritten ? "" : "left as it is")}</span></button>`;
  });
  $("blocks").innerHTML = html || `<h3>Blocks</h3><p class="muted" style="padding: 0 8px">No mixture-of-experts block was found.</p>`;
}

// ------------------------------------------------------------------------------------------------------------ picture

function showPicture() {
  const picture = DATA.views[state.graph]?.view?.picture, svg = $("picture").querySelector("svg");
  if (!picture?.boxes) { svg.replaceChildren(element("text", { x: 20, y: 40, class: "small" }, "There is no picture of this graph.")); state.camera = null; return; }
  const graph = { size: picture.boxes.length, edges: picture.edges };
  state.place = arrange(graph, 218, 46, 22, 24);
  state.camera = draw(svg, graph, state.place, (i, x, y) => moduleBox(picture.boxes[i], x, y));
}

function moduleBox(box, x, y) {
  const block = box.block === null ? null : current().blocks[box.block];
  const kind = block ? (block.rewritten ? "done" : "left") : "";
  const label = box.label.length > 32 ? `…${box.label.slice(-31)}` : box.label || "function";
  const what = block ? `${block.rewritten ? block.became.map((op) => op.replace("samoyeds::", "")).join(", ") : "left as it is"} · ${box.nodes} ops` : box.ops.slice(0, 3).join(", ");
  const group = element("g", { class: `box ${kind}`, transform: `translate(${x} ${y})`, "data-block": block ? box.block : undefined,
    tabindex: block ? 0 : undefined, role: block ? "button" : undefined, "aria-label": block ? `block ${box.label}` : undefined },
    element("rect", { width: 218, height: 46 }),
    element("text", { x: 10, y: 19, "font-size": 12, "font-weight": block ? 600 : 400 }, label),
    element("text", { x: 10, y: 35, class: "small" }, what.length > 40 ? `${what.slice(0, 39)}…` : what),
    element("title", {}, `${box.label}\n${box.nodes} operations: ${box.ops.join(", ")}`));
  if (block) {
    group.addEventListener("click", () => choose(ALL.findIndex((entry) => entry.g === state.graph && entry.b === box.block)));
    group.addEventListener("keydown", (event) => { if (event.key === "Enter") group.dispatchEvent(new Event("click")); });
  }
  return group;
}

function pointAtBlock() {
  for (const box of document.querySelectorAll("#picture .box")) box.classList.remove("chosen");
  const entry = ALL[state.block], boxes = DATA.views[state.graph]?.view?.picture?.boxes ?? [];
  const at = entry && entry.g === state.graph ? boxes.findIndex((box) => box.block === entry.b) : -1;
  if (at < 0 || !state.camera) return;
  document.querySelector(`#picture .box[data-block="${entry.b}"]`)?.classList.add("chosen");
  if (state.camera.scale < 0.7) state.camera.zoom(0.8 / state.camera.scale);
  state.camera.center(state.place.x[at], state.place.y[at] + 23);
}

// ----------------------------------------------------------------------------------------------------------- overview

function showOverview() {
  const graph = current(), report = DATA.report;
  let html = `<h2>${escaped(DATA.folder)}</h2><p class="muted">${report.graphs.length ? `Graph ${escaped(graph.name || state.graph)} has ${graph.nodes_before} nodes, ${graph.nodes_after} after the rewrite.` : "No graph was compiled."} Choose a block in the list or in the picture.</p>`;
  for (const note of report.notes ?? []) html += `<div class="note">${escaped(note)}</div>`;
  for (const g of report.graphs) {
    if (g.problem) html += `<div class="note bad"><p><b>Graph ${escaped(g.name)} failed in the pipeline and runs as it was.</b></p><p>${escaped(g.problem)}</p></div>`;
    if (g.discarded) html += `<div class="note left"><p><b>Graph ${escaped(g.name)} is not in use.</b></p><p>${escaped(g.discarded)}</p></div>`;
  }
  html += reasonsHtml() + breaksHtml() + timesHtml() + kernelsHtml() + leftOutHtml();
  html += (DATA.views[state.graph]?.artefacts ?? []).filter((file) => file.block === null).map(artefactHtml).join("");
  $("detail").innerHTML = html;
}

function reasonsHtml() {
  const left = ALL.map((entry, i) => ({ ...entry, i })).filter((entry) => !entry.block.rewritten);
  if (!left.length) return ALL.length ? `<div class="note done">Every block that was found is rewritten.</div>` : "";
  const rows = left.map(({ block, i }) => {
    const [reason, remedy] = remedyOf(block);
    return `<tr><td><a href="#" data-entry="${i}">${escaped(nameOf(block))}</a></td><td>${escaped(reason)}${remedy ? `<br><span class="muted">${escaped(remedy)}</span>` : ""}</td></tr>`;
  });
  return `<h3>Not rewritten, and why</h3><table class="plain"><tr><th>block</th><th>why</th></tr>${rows.join("")}</table>`;
}

function breaksHtml() {
  const explained = DATA.report.breaks ?? [];
  const ended = DATA.report.graphs.filter((graph) => graph.break_reason).map((graph) => [`${graph.break_reason.split("\n")[0]} (${graph.break_source})`, ""]);
  const rows = (explained.length ? explained : ended).map(([reason, remedy]) => `<tr><td>${escaped(reason)}</td><td>${escaped(remedy)}</td></tr>`);
  return rows.length ? `<h3>Graph breaks</h3><table class="plain"><tr><th>break</th><th>what to do</th></tr>${rows.join("")}</table>` : "";
}

function timesHtml() {
  const names = [...new Set(DATA.report.graphs.flatMap((graph) => graph.steps.map((step) => step.name)))];
  if (!names.length) return "";
  const total = (graph) => graph.steps.reduce((sum, step) => sum + step.milliseconds, 0);
  const most = Math.max(...DATA.report.graphs.map(total));
  const bars = DATA.report.graphs.map((graph) => `<span class="mono">graph ${escaped(graph.name)}</span><div class="bar">${graph.steps.map((step) =>
    `<i style="width:${100 * step.milliseconds / most}%;background:${COLORS[names.indexOf(step.name) % COLORS.length]}" title="${step.name}: ${duration(step.milliseconds)}, ${step.nodes} nodes after it"></i>`).join("")}</div><span class="mono">${duration(total(graph))}</span>`);
  const sums = names.map((name) => DATA.report.graphs.flatMap((graph) => graph.steps).filter((step) => step.name === name).reduce((sum, step) => sum + step.milliseconds, 0));
  const key = names.map((name, i) => `<span><i style="background:${COLORS[i % COLORS.length]}"></i>${name} ${duration(sums[i])}</span>`);
  return `<h3>Time of each step</h3><div class="times">${bars.join("")}</div><div class="key">${key.join("")}</div>`;
}

function kernelsHtml() {
  const rows = [...new Set(DATA.report.graphs.flatMap((graph) => graph.kernels))].map((kernel) => `<tr><td>${escaped(kernel)}</td></tr>`);
  return rows.length ? `<h3>How experts are computed</h3><table class="plain">${rows.join("")}</table>` : "";
}

function leftOutHtml() {
  const rows = DATA.report.graphs.flatMap((graph, g) => [...(graph.left_out ?? []), ...(DATA.views[g] ? [] : ["this graph's picture: the page is full"])].map((text) => `<tr><td class="mono">${escaped(graph.name)}</td><td>${escaped(text)}</td></tr>`));
  return rows.length ? `<h3>Left out</h3><table class="plain">${rows.join("")}</table>` : "";
}

// -------------------------------------------------------------------------------------------------------------- block

const TABS = [
  ["lines", "Lines and ops", (view) => view && (view.passages.length || view.before.operations.length)],
  ["graph", "Graph", (view) => view && view.before.operations.length > 1],
  ["kernel", "Kernel", (view) => view?.kernel],
  ["pattern", "Sparsity", (view) => view?.patterns?.length],
  ["cost", "Cost", (view, entry) => view && (view.program !== null || layoutOf(entry))],
  ["routing", "Routing", (view, entry) => entry.block.routing],
  ["files", "Artefacts", (view, entry) => artefactsOf(entry).length],
  ["all", "All fields", () => true],
];
const artefactsOf = (entry) => (entry.g === null ? [] : (DATA.views[entry.g]?.artefacts ?? []).filter((file) => file.block === entry.b));

function showBlock() {
  const entry = ALL[state.block], { block } = entry, view = viewOf(entry);
  const shown = TABS.filter(([, , there]) => there(view, entry));
  if (!shown.some(([name]) => name === state.tab)) state.tab = shown[0][0];
  $("detail").innerHTML = `<h2>${escaped(nameOf(block))}</h2>${statusHtml(block)}${factsHtml(block)}
    <div class="tabs" role="tablist">${shown.map(([name, title], i) => `<button role="tab" data-tab="${name}" title="${i + 1}" aria-selected="${name === state.tab}">${title}</button>`).join("")}</div><div id="tab"></div>`;
  ({ lines: showLines, graph: showGraph, kernel: showKernel, pattern: showPatterns, cost: showCost, routing: showRouting, files: showFiles, all: showAll })[state.tab]($("tab"), entry, view);
}

function statusHtml(block) {
  if (block.rewritten) {
    const checked = block.deviation === null ? "not validated" : `validated: it deviates by ${block.deviation.toExponential(1)} at most`;
    return `<span class="chip done">rewritten as ${escaped(block.became.join(", "))}</span> <span class="chip">${checked}</span>`;
  }
  const [reason, remedy] = remedyOf(block);
  return `<div class="note left"><p><b>Left as it is:</b> ${escaped(reason)}</p>${remedy ? `<p>${escaped(remedy)}</p>` : ""}${block.reason_source ? `<p class="mono muted">${escaped(block.reason_source)}</p>` : ""}</div>`;
}

function factsHtml(block) {
  const facts = [
    ["pattern", block.family], ["experts E", block.experts], ["of each token K", block.top_k], ["hidden size H", block.hidden_size],
    ["expert width I", block.intermediate_size], ["activation", block.activation], ["weights", [block.weight_layout, block.gate_up_layout].filter(Boolean).join(", ")],
    ["router", block.router && block.router + (block.router_fused ? " (one op)" : "")], ["router stays", block.router_reason],
    ["computed by", block.kernel],
  ];
  const cells = facts.filter(([, value]) => value !== null && value !== undefined && value !== "").map(([name, value]) => `<div class="${String(value).length > 22 ? "wide" : ""}"><b>${name}</b><span>${escaped(value)}</span></div>`);
  return `<div class="facts">${cells.join("")}</div>`;
}

function showLines(target, entry, view) {
  const passages = view.passages.map((i) => DATA.views[entry.g].view.passages[i]);
  const left = passages.map((passage, i) => passageHtml(passage, entry.block.rewritten ? null : view.reason_at, passages[i - 1]?.file)).join("") || `<p class="muted">The source is not at hand.</p>`;
  const right = view.after ? operationsHtml("What runs instead", view.after) : "";
  target.innerHTML = `<div class="sides"><div><h3>The model's lines</h3>${left}</div><div>${right}${operationsHtml(beforeTitle(entry.block, count(view.before)), view.before)}</div></div>`;
  linkLines(target);
}

const beforeTitle = (block, number) => (!block.rewritten ? "Where it looks like a block" : number === 1 ? "The operation it was" : `The ${number} operations they were`);
const count = (listed) => listed.operations.length + listed.left_out;

function operationsHtml(title, listed) {
  const more = listed.left_out ? `<span class="l c">… and ${listed.left_out} more</span>` : "";
  return listed.operations.length ? `<h3>${title}</h3><pre>${listed.operations.map(operationLine).join("")}${more}</pre>` : "";
}

// Pointing at a line lights the operations that it became, and the other way round.
function linkLines(target) {
  const pairs = [...target.querySelectorAll("[data-at]")];
  const lit = (where, on) => {
    for (const row of pairs) if (row.dataset.at === where) row.classList.toggle("lit", on);
    for (const row of target.querySelectorAll("[data-line]")) if (row.dataset.line === where) row.classList.toggle("lit", on);
  };
  for (const row of target.querySelectorAll("[data-line], [data-at]")) {
    const where = row.dataset.line ?? row.dataset.at;
    row.onmouseenter = () => lit(where, true);
    row.onmouseleave = () => lit(where, false);
  }
}

function showGraph(target, entry, view) {
  const sides = [["As it was", view.before], ...(view.after ? [["As it is now", view.after]] : [])];
  target.innerHTML = `<div class="${sides.length > 1 ? "sides" : ""}">${sides.map(([title, listed]) => `<div><h3>${title}: ${count(listed)} operations</h3><div class="graphview"><svg></svg></div></div>`).join("")}</div>`;
  target.querySelectorAll("svg").forEach((svg, i) => drawOperations(svg, sides[i][1]));
}

function drawOperations(svg, listed) {
  const outside = new Map(listed.operations.flatMap((node) => node.from)), names = [...outside.keys()], first = names.length;
  const inputs = names.map((name) => ({ name, op: name.length > 26 ? `…${name.replace(/_+$/, "").slice(-25)}` : name, text: "from outside the block", shape: outside.get(name), outside: true }));
  const nodes = [...inputs, ...listed.operations];
  const edges = listed.operations.flatMap((node, i) => [...node.from.map(([name]) => names.indexOf(name)), ...node.reads.map((from) => from + first)].map((from) => [from, i + first, nodes[from].shape]));
  const graph = { size: nodes.length, edges: edges.filter(([from, to]) => from < to) };
  draw(svg, graph, arrange(graph, 176, 38, 16, 26), (i, x, y) => {
    const node = nodes[i], kind = node.outside ? "outside" : node.op.startsWith("samoyeds.") ? "ours" : /(mm|matmul|linear|einsum)/.test(node.op) ? "product" : "";
    const shape = node.shape.length > 28 ? `${node.shape.slice(0, 27)}…` : node.shape;
    return element("g", { class: `box ${kind}`, transform: `translate(${x} ${y})` }, element("rect", { width: 176, height: 38 }),
      element("text", { x: 8, y: 16, "font-size": 12 }, node.op.length > 27 ? `${node.op.slice(0, 26)}…` : node.op),
      element("text", { x: 8, y: 30, class: "small" }, shape || node.name.slice(0, 28)), element("title", {}, `${node.name} = ${node.text}\n${node.shape}`));
  });
}

function showKernel(target, entry, view) {
  const texts = DATA.views[entry.g].kernels, found = view.kernel.files.filter((name) => name in texts);
  target.innerHTML = `<div class="note">${escaped(view.kernel.title)}</div>` + (found.map((name) => {
    const instructions = [...new Set(texts[name].match(SPARSE) ?? [])];
    const key = instructions.length ? `<div class="key">matrix and sparse instructions: ${instructions.map((one) => `<a href="#" class="sp mono" data-find="${escaped(one)}">${escaped(one)}</a>`).join(" ")}</div>` : "";
    return `<div class="file mono">kernels/${escaped(name)}</div>${key}${kernelHtml(texts[name])}`;
  }).join("") || `<p class="muted">No text was generated for it.</p>`);
}

function showPatterns(target, entry, view) {
  target.innerHTML = view.patterns.map(({ name, shape, config, bytes, dense_bytes, rows }) => {
    const saved = (dense_bytes / bytes).toFixed(2), kept = config.n / config.m * (config.inner === "2:4" ? 0.5 : 1);
    return `<figure><canvas></canvas><figcaption><b>${escaped(name)}</b> [${shape.join(", ")}]<br>${config.n} of ${config.m} sub-rows in each vector of ${config.vector} columns, ${config.inner === "2:4" ? "2 of 4 values in them" : "all values in them"}: ${(100 * kept).toFixed(1)} % kept, ${saved}× smaller than dense.<br>First ${rows.length} rows and ${rows[0]?.length ?? 0} columns of the first expert; a stronger colour is a larger value, lines are the edges of blocks.</figcaption></figure>`;
  }).join("");
  target.querySelectorAll("canvas").forEach((canvas, i) => paintPattern(canvas, view.patterns[i]));
}

function paintPattern(canvas, { rows, config }) {
  const cell = 9, style = getComputedStyle(document.documentElement), color = (name) => style.getPropertyValue(name).trim();
  canvas.width = cell * (rows[0]?.length ?? 1); canvas.height = cell * rows.length;
  const paint = canvas.getContext("2d");
  rows.forEach((row, y) => [...row].forEach((level, x) => {
    if (level === ".") return;
    paint.globalAlpha = 0.25 + 0.75 * Number(level) / 9; paint.fillStyle = color("--accent");
    paint.fillRect(x * cell + 1, y * cell + 1, cell - 2, cell - 2);
  }));
  paint.globalAlpha = 1; paint.fillStyle = color("--soft");
  for (let x = config.vector; x < (rows[0]?.length ?? 0); x += config.vector) paint.fillRect(x * cell, 0, 1, canvas.height);
  paint.globalAlpha = 0.35;
  if (config.m > 1) for (let y = config.m; y < rows.length; y += config.m) paint.fillRect(0, y * cell, canvas.width, 1);
}

const layoutOf = (entry) => (entry.g === null ? null : DATA.report.graphs[entry.g].layouts.find((layout) => layout.index === entry.b));

function measuredOf(entry, view) {
  const file = (DATA.views[entry.g]?.artefacts ?? []).find((one) => one.block === view.program && one.name === "measured.json");
  return file ? JSON.parse(file.text) : null;
}

// The cost model against measurement. Both are of one number of tokens: that of the inputs that were recorded.
function showCost(target, entry, view) {
  const layout = layoutOf(entry), measured = measuredOf(entry, view), predicted = layout?.microseconds ?? null, us = (ms) => 1000 * ms;
  const time = (value) => `${value.toFixed(1)} µs`, ratio = (value) => `${value.toFixed(2)} ×`;
  const rows = [
    ["predicted by the cost model", predicted === null ? "no prediction: no kernel for a CPU computes it" : time(predicted), predicted === null ? "" : `${layout.tokens} tokens, ${layout.constants === "measured" ? "costs measured here" : "default costs, of another machine"}`, "predicted"],
    ["measured, rewritten", measured ? time(us(measured.milliseconds.after)) : "not measured", measured ? `median of ${measured.calls} calls` : "", "measured"],
  ];
  if (measured) rows.push(["measured, original", time(us(measured.milliseconds.before)), `compiled by ${measured.base}`, "original"]);
  if (measured && predicted) rows.push(["measured / predicted", ratio(us(measured.milliseconds.after) / predicted), "measured is a whole call of the compiled block", "ratio"]);
  if (measured) rows.push(["original / rewritten", ratio(measured.milliseconds.before / measured.milliseconds.after), "above 1 the rewrite is faster", "gain"]);
  const cells = rows.map(([name, value, note, id]) => `<tr><td>${name}</td><td class="num" id="cost-${id}">${escaped(value)}</td><td class="muted">${escaped(note)}</td></tr>`);
  let html = `<h3>Cost model against measurement</h3><table class="plain"><tr><th></th><th class="num">time</th><th></th></tr>${cells.join("")}</table>`;
  const graph = DATA.report.graphs[entry.g].dump.split(/[\\/]/).pop().replace("graph_", "");
  if (measured) html += `<p class="muted">${measured.inputs.length} inputs, ${escaped(measured.inputs[0])} the first; ${measured.threads} thread${measured.threads === 1 ? "" : "s"}; ${measured.cold ? "caches emptied before each call" : "caches as they are"}; ${escaped(measured.machine)}; torch ${escaped(measured.torch)}.${view.program === entry.b ? "" : ` Measured on block ${view.program}, which is alike.`}</p>`;
  else if (view.program !== null) html += `<p class="note">Not measured: run <code>python -m samoyeds_compile.repro ${escaped(DATA.folder)} ${graph}/${view.program} --time</code>, which also brings this page up to date.</p>`;
  target.innerHTML = html;
}

function showRouting(target, { block }) {
  const { slots } = block.routing, total = slots.reduce((sum, n) => sum + n, 0), most = Math.max(...slots), mean = total / slots.length;
  if (!total) { target.innerHTML = `<p class="muted">Nothing was counted yet when this page was written. Run the model, then call <code>report.update_dump()</code>.</p>`; return; }
  const unused = slots.filter((n) => !n).length, busiest = slots.indexOf(most), height = 160, width = 640, step = width / slots.length, y = (n) => height - n / most * (height - 14);
  const bars = slots.map((n, e) => element("rect", { class: e === busiest ? "most" : "", x: e * step + step * 0.08, y: y(n), width: step * 0.84, height: height - y(n) }, element("title", {}, `expert ${e}: ${n} slots, ${(n / mean).toFixed(2)} times the mean`)));
  const every = Math.ceil(slots.length / 16), labels = slots.map((_, e) => e).filter((e) => e % every === 0).map((e) => element("text", { class: "small", x: (e + 0.5) * step, y: height + 15, "text-anchor": "middle" }, String(e)));
  const line = element("line", { class: "mean", x1: 0, x2: width, y1: y(mean), y2: y(mean) });
  const chart = element("svg", { class: "routing", viewBox: `0 0 ${width} ${height + 20}`, role: "img", "aria-label": "Slots of each expert" }, ...bars, line, ...labels);
  target.innerHTML = `<h3>Slots of each expert</h3><figure><figcaption>Slots (a token at one of its experts) by expert, in all calls until this page was written; the line is the mean. The busiest is expert ${busiest}.</figcaption></figure>`
    + `<div class="facts"><div><b>slots</b><span>${total}</span></div><div><b>mean of an expert</b><span>${mean.toFixed(1)}</span></div><div><b>most</b><span>${most}</span></div><div><b>imbalance, most / mean</b><span id="imbalance">${(most / mean).toFixed(2)}</span></div><div><b>experts without slots</b><span>${unused}</span></div></div>`;
  target.querySelector("figure").prepend(chart);
}

function showFiles(target, entry) {
  target.innerHTML = artefactsOf(entry).map(artefactHtml).join("");
}

function artefactHtml({ name, text }) {
  const picture = name.endsWith(".svg");
  const shown = picture ? `<img alt="${escaped(name)}" src="data:image/svg+xml,${encodeURIComponent(text)}" style="max-width:100%">` : `<pre class="text">${escaped(text)}</pre>`;
  return `<figure><figcaption class="mono">${escaped(name)}</figcaption>${shown}</figure>`;
}

function showAll(target, { block }) {
  const rows = Object.entries(block).map(([name, value]) => `<tr><td class="mono">${name}</td><td class="mono">${escaped(typeof value === "string" ? value : JSON.stringify(value))}</td></tr>`);
  target.innerHTML = `<table class="plain">${rows.join("")}</table>`;
}

// ------------------------------------------------------------------------------------------------------------ choosing

function choose(i) {
  const entry = ALL[i];
  if (!entry) return;
  state.block = i;
  if (entry.g !== null && entry.g !== state.graph) { state.graph = entry.g; $("graph").value = entry.g; showPicture(); }
  for (const button of document.querySelectorAll("#blocks button")) button.setAttribute("aria-current", String(Number(button.dataset.entry) === i));
  document.querySelector(`#blocks [data-entry="${i}"]`)?.scrollIntoView({ block: "nearest" });
  history.replaceState(null, "", `#block-${i}`);
  showBlock();
  pointAtBlock();
  $("detail").scrollTop = 0;
}

function overview() {
  state.block = null;
  for (const button of document.querySelectorAll("#blocks button")) button.removeAttribute("aria-current");
  history.replaceState(null, "", "#");
  showOverview();
  pointAtBlock();
  state.camera?.fit();
}

function chooseGraph(g) {
  if (g < 0 || g >= DATA.report.graphs.length) return;
  state.graph = g; $("graph").value = g;
  showPicture();
  overview();
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  try { localStorage.setItem("samoyeds-theme", theme); } catch { /* a file opened from disk may have no storage */ }
  if (state.block !== null && state.tab === "pattern") showBlock();
}

function storedTheme() {
  try { return localStorage.getItem("samoyeds-theme"); } catch { return null; }
}

const ZOOM = { in: () => state.camera?.zoom(1.3), out: () => state.camera?.zoom(1 / 1.3), fit: () => state.camera?.fit(true) };
const flip = () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
const step = (by) => choose(state.block === null ? (by > 0 ? 0 : ALL.length - 1) : Math.min(ALL.length - 1, Math.max(0, state.block + by)));
const KEYS = {
  j: () => step(1), k: () => step(-1), ArrowDown: () => step(1), ArrowUp: () => step(-1), t: flip, Escape: overview, "?": () => $("keys").showModal(),
  "+": ZOOM.in, "=": ZOOM.in, "-": ZOOM.out, 0: ZOOM.fit, "[": () => chooseGraph(state.graph - 1), "]": () => chooseGraph(state.graph + 1),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("keys").open || event.target.tagName === "SELECT") return;
  const tab = document.querySelectorAll("#detail [data-tab]")[Number(event.key) - 1];
  const act = tab ? () => tab.click() : KEYS[event.key];
  if (act) { event.preventDefault(); act(); }
});
document.addEventListener("click", (event) => {
  const target = event.target.closest("[data-entry], [data-tab], [data-zoom], [data-find]");
  if (!target) return;
  if (target.tagName === "A") event.preventDefault();
  if (target.dataset.entry) choose(Number(target.dataset.entry));
  if (target.dataset.tab) { state.tab = target.dataset.tab; showBlock(); }
  if (target.dataset.zoom) ZOOM[target.dataset.zoom]();
  if (target.dataset.find) [...document.querySelectorAll("pre.kernel .sp")].find((mark) => mark.textContent === target.dataset.find)?.scrollIntoView({ block: "center" });
});
$("graph").onchange = (event) => chooseGraph(Number(event.target.value));
$("overview").onclick = overview;
$("theme").onclick = flip;
$("help").onclick = () => $("keys").showModal();
window.addEventListener("resize", () => { state.camera?.fit(); pointAtBlock(); });

setTheme(storedTheme() ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
showHeader();
showList();
showPicture();
const asked = /^#block-(\d+)$/.exec(location.hash);
if (asked && ALL[Number(asked[1])]) choose(Number(asked[1])); else overview();
