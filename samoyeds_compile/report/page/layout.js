// Where the boxes of a graph go: ranks by longest path, columns by the middle of what a box reads, and a view that
// moves and zooms. A graph is {size, edges: [[from, to, label]]}, from < to.

function ranksOf(graph) {
  const ranks = new Array(graph.size).fill(0);
  for (const [from, to] of [...graph.edges].sort((a, b) => a[1] - b[1])) ranks[to] = Math.max(ranks[to], ranks[from] + 1);
  return ranks;
}

// Boxes that nothing is read by or from before them would all rise to the first rank; let them stand before their reader.
function lowered(graph, ranks) {
  const sources = new Set(graph.edges.map((edge) => edge[1]));
  for (let i = 0; i < graph.size; i++) {
    const readers = graph.edges.filter((edge) => edge[0] === i).map((edge) => ranks[edge[1]]);
    if (!sources.has(i) && readers.length) ranks[i] = Math.max(0, Math.min(...readers) - 1);
  }
  return ranks;
}

function rowsOf(ranks) {
  const rows = [];
  ranks.forEach((rank, i) => (rows[rank] ??= []).push(i));
  return Array.from(rows, (row) => row ?? []);
}

function arrange(graph, width, height, gapX, gapY) {
  const rows = rowsOf(lowered(graph, ranksOf(graph))), x = new Array(graph.size).fill(0), y = [];
  const near = Array.from({ length: graph.size }, () => []);
  for (const [from, to] of graph.edges) { near[from].push(to); near[to].push(from); }
  rows.forEach((row, r) => row.forEach((i, c) => { x[i] = (c - (row.length - 1) / 2) * (width + gapX); y[i] = r * (height + gapY); }));
  for (let sweep = 0; sweep < 6; sweep++) {
    for (const row of sweep % 2 ? [...rows].reverse() : rows) {
      const wish = new Map(row.map((i) => [i, near[i].length ? near[i].reduce((sum, j) => sum + x[j], 0) / near[i].length : x[i]]));
      row.sort((a, b) => wish.get(a) - wish.get(b));
      const middle = row.reduce((sum, i) => sum + wish.get(i), 0) / Math.max(1, row.length);
      row.forEach((i, c) => { x[i] = middle + (c - (row.length - 1) / 2) * (width + gapX); });
    }
  }
  // Each row around one trunk: what runs one after the other stands in a straight line.
  for (const row of rows) row.forEach((i, c) => { x[i] = (c - (row.length - 1) / 2) * (width + gapX); });
  return { x, y, width, height };
}

function element(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) if (value !== undefined && value !== null) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// An edge that passes over boxes in between runs beside them.
function route(place, from, to, lane) {
  const [x1, y1, x2, y2] = [place.x[from], place.y[from] + place.height, place.x[to], place.y[to]];
  const gap = y2 - y1, straight = gap < place.height * 1.2;
  if (straight) return `M${x1},${y1} C${x1},${y1 + gap / 2} ${x2},${y2 - gap / 2} ${x2},${y2}`;
  const side = Math.max(x1, x2) + place.width / 2 + 16 + 9 * (lane % 5), turn = Math.min(26, gap / 2);
  return `M${x1},${y1} C${x1},${y1 + turn} ${side},${y1} ${side},${y1 + turn} L${side},${y2 - turn} C${side},${y2} ${x2},${y2 - turn} ${x2},${y2}`;
}

function draw(svg, graph, place, boxOf) {
  const edges = element("g"), boxes = element("g");
  graph.edges.forEach(([from, to, label], i) => {
    const skips = place.y[to] - place.y[from] > 2.3 * place.height + 60;
    const path = element("path", { d: route(place, from, to, i), class: skips ? "edge skip" : "edge", "data-from": from, "data-to": to });
    if (label) path.append(element("title", {}, label));
    edges.append(path);
  });
  for (let i = 0; i < graph.size; i++) {
    const group = boxOf(i, place.x[i] - place.width / 2, place.y[i]);
    group.addEventListener("mouseenter", () => light(svg, i, true));
    group.addEventListener("mouseleave", () => light(svg, i, false));
    boxes.append(group);
  }
  const world = element("g", { class: "world" }, edges, boxes);
  svg.replaceChildren(world);
  return new Camera(svg, world, bounds(place, graph.size));
}

function light(svg, i, on) {
  for (const path of svg.querySelectorAll(`[data-from="${i}"], [data-to="${i}"]`)) path.classList.toggle("lit", on);
}

function bounds(place, size) {
  if (!size) return { left: 0, top: 0, right: 1, bottom: 1 };
  return { left: Math.min(...place.x) - place.width / 2 - 14, top: Math.min(...place.y) - 14,
    right: Math.max(...place.x) + place.width / 2 + 64, bottom: Math.max(...place.y) + place.height + 14 };
}

class Camera {
  constructor(svg, world, box) {
    Object.assign(this, { svg, world, box });
    svg.onwheel = (event) => { event.preventDefault(); this.zoom(Math.exp(-event.deltaY * 0.0015), event.offsetX, event.offsetY); };
    svg.onpointerdown = (event) => { this.held = [event.clientX, event.clientY]; };
    svg.onpointermove = (event) => this.drag(event);
    svg.onpointerup = svg.onpointerleave = () => { this.held = null; svg.classList.remove("moving"); };
    this.fit();
  }
  drag(event) {
    if (!this.held || !(event.buttons & 1)) return;
    this.svg.classList.add("moving");
    this.x += event.clientX - this.held[0]; this.y += event.clientY - this.held[1];
    this.held = [event.clientX, event.clientY];
    this.show();
  }
  zoom(by, x = this.svg.clientWidth / 2, y = this.svg.clientHeight / 2) {
    const scale = Math.min(3, Math.max(0.02, this.scale * by));
    this.x = x - (x - this.x) * scale / this.scale; this.y = y - (y - this.y) * scale / this.scale; this.scale = scale;
    this.show();
  }
  // All of it; a tall picture starts at its top, wide enough to be read.
  fit(all = false) {
    const { left, top, right, bottom } = this.box, [w, h] = [this.svg.clientWidth || 400, this.svg.clientHeight || 400];
    const whole = Math.min(w / (right - left), h / (bottom - top), 1.25);
    this.scale = all ? whole : Math.max(whole, Math.min(1, w / (right - left)), 0.3);
    this.x = (w - (left + right) * this.scale) / 2;
    this.y = (bottom - top) * this.scale > h ? -top * this.scale : (h - (top + bottom) * this.scale) / 2;
    this.show();
  }
  center(x, y) {
    this.x = this.svg.clientWidth / 2 - x * this.scale; this.y = this.svg.clientHeight / 2 - y * this.scale;
    this.show();
  }
  show() { this.world.setAttribute("transform", `translate(${this.x} ${this.y}) scale(${this.scale})`); }
}
