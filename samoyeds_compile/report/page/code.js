// Text as coloured HTML: Python lines, operations, kernels with their sparse instructions.

const escaped = (text) => String(text).replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);

const PYTHON = /(#.*$)|("""|'''|"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|\b(def|class|return|if|elif|else|for|while|in|not|and|or|is|None|True|False|import|from|with|as|lambda|yield|raise|try|except|assert|pass|self)\b|\b(\d[\w.]*)\b/g;
const KERNEL = /(\/\/.*$|\/\*.*?\*\/|#\s.*$)|("(?:[^"\\]|\\.)*")|\b(static|inline|constexpr|const|template|typename|struct|class|return|if|else|for|while|using|namespace|void|int|int64_t|int32_t|uint32_t|uint64_t|float|double|bool|auto|def|import|from|in|tl|extern|asm|volatile|__global__|__device__|__shared__)\b|\b(\d[\w.]*)\b/g;
// What reads or multiplies sparse weights: tensor core instructions with .sp, and what spreads 2:4 values into rows.
const SPARSE = /\b(mma\.sp[\w:.]*|wgmma\.mma_async\.sp[\w:.]*|mma_sp\w*|wgmma_sp\w*|_mm\d*_(?:maskz_|mask_)?(?:expandloadu|expand|compressstoreu|permutexvar|permutex2var|permutevar8x32|shuffle_epi8)\w*|_tile_dpbf16ps|_mm\d*_dpbf16_ps|tl\.dot(?:_scaled)?)/g;

function colored(line, grammar) {
  let out = "", end = 0;
  for (const match of line.matchAll(grammar)) {
    const kind = match[1] ? "c" : match[2] ? "s" : match[3] ? "k" : "n";
    out += marked(line.slice(end, match.index)) + `<span class="${kind}">${kind === "s" ? marked(match[0]) : escaped(match[0])}</span>`;
    end = match.index + match[0].length;
  }
  return out + marked(line.slice(end));
}

function marked(text) {
  let out = "", end = 0;
  for (const match of text.matchAll(SPARSE)) {
    out += escaped(text.slice(end, match.index)) + `<span class="sp">${escaped(match[0])}</span>`;
    end = match.index + match[0].length;
  }
  return out + escaped(text.slice(end));
}

function operationLine(operation, i) {
  const text = escaped(operation.text).replace(escaped(operation.op), `<span class="o">${escaped(operation.op)}</span>`);
  const line = operation.line ? ` data-at="${escaped(operation.line.join(":"))}"` : "";
  const shape = operation.shape ? `  <span class="shape"># ${escaped(operation.shape)}</span>` : "";
  return `<span class="l" data-op="${i}"${line}>${escaped(operation.name)} = ${text}${shape}</span>`;
}

function passageHtml(passage, at, fileBefore) {
  const indents = passage.text.filter((text) => text.trim()).map((text) => text.search(/\S/)), indent = Math.min(...indents);
  const hits = new Set(passage.hits), rows = passage.text.map((text, i) => {
    const number = passage.first + i, failed = at && at[0] === passage.file && at[1] === number;
    const kind = failed ? "l at" : hits.has(number) ? "l hit" : "l";
    return `<span class="${kind}" data-line="${escaped(passage.file)}:${number}"><i>${number}</i>${colored(text.slice(indent), PYTHON) || " "}</span>`;
  });
  const file = passage.file === fileBefore ? "" : `<div class="file mono">${escaped(shortFile(passage.file))}</div>`;
  return `${file}<pre>${rows.join("")}</pre>`;
}

function kernelHtml(text) {
  const rows = text.replace(/\n$/, "").split("\n");
  return `<pre class="kernel">${rows.map((row, i) => `<span class="l"><i>${i + 1}</i>${colored(row, KERNEL) || " "}</span>`).join("")}</pre>`;
}

// Files of packages from the package on, files of one's own with their folder.
function shortFile(file) {
  const inside = file.split("/site-packages/");
  return inside.length > 1 ? inside.at(-1) : file.split("/").slice(-3).join("/");
}
