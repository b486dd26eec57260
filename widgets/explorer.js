// Draws what an Explorer publishes (spec, view, frontier, frame, pinned, reply) and sends it wishes. Runs in JupyterLab
// through anywidget and under `panel serve`; imports nothing and asks the network for nothing.

const COLOURS = ["#56b4e9", "#e69f00", "#2fb58b", "#cc79a7", "#f0e442"]; // Okabe-Ito, light enough for black letters
const SHAPES = ["circle", "triangle", "diamond", "cross"];
const SVG = "http://www.w3.org/2000/svg";
const MAX_PICTURES = 64;
const MAX_CELLS = 60; // beyond, cells of one model merge
const MERGE_MS = 800; // keys pressed faster than this are one step of the history

function h(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

function s(tag, props = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(props)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// ------------------------------------------------------------------------------------------------ numbers and words

const sum = (values) => values.reduce((a, b) => a + b, 0);
const clamp = (x, low, high) => Math.min(Math.max(x, low), high);

function short(x, digits = 3) {
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size >= 1e4 || size < 1e-3) {
    const unit = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]].find(([scale]) => size >= scale);
    return unit ? `${+(x / unit[0]).toPrecision(digits)} ${unit[1]}` : x.toExponential(1);
  }
  return `${+x.toPrecision(digits)}`;
}

// The value with as many decimals as its standard error has meaning.
function measured(value, stderr) {
  if (stderr == null) return `${short(value)}`;
  const decimals = stderr > 0 ? clamp(1 - Math.floor(Math.log10(stderr)), 0, 5) : 3;
  return `${value.toFixed(decimals)} ± ${stderr.toFixed(decimals)}`;
}

const words = (name) => name.replaceAll("_", " ");

// ------------------------------------------------------------------------------------------------ samples

// A frame: length of its header (4 bytes, little-endian), header (JSON), values.
function unpack(value) {
  if (!value || !value.byteLength) return null;
  const view = value instanceof DataView ? value : new DataView(value.buffer ?? value, value.byteOffset ?? 0, value.byteLength);
  const length = view.getUint32(0, true);
  const bytes = new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
  return { ...JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + length))), values: bytes.slice(4 + length) };
}

function drawPictures(canvas, frame) {
  const [n, height, width, channels = 1] = frame.shape;
  const shown = Math.min(n, MAX_PICTURES);
  const columns = Math.ceil(Math.sqrt(shown));
  const gap = width <= 64 ? 1 : 4;
  const cell = [width + gap, height + gap];
  const size = [columns * cell[0] - gap, Math.ceil(shown / columns) * cell[1] - gap];
  if (canvas.width !== size[0] || canvas.height !== size[1]) [canvas.width, canvas.height] = size;
  canvas.style.imageRendering = width <= 128 ? "pixelated" : "auto";
  const pixels = new ImageData(...size); // between pictures transparent
  for (let i = 0; i < shown; i++) {
    const left = (i % columns) * cell[0];
    const top = Math.floor(i / columns) * cell[1];
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        const from = ((i * height + y) * width + x) * channels;
        const to = ((top + y) * size[0] + left + x) * 4;
        for (let c = 0; c < 3; c++) pixels.data[to + c] = frame.values[from + (channels === 3 ? c : 0)];
        pixels.data[to + 3] = 255;
      }
    }
  }
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

// Samples that are no pictures: a histogram (one axis) or a scatter (the first two axes), over the reference's samples.
function drawPoints(canvas, frame, under) {
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth || 120, canvas.clientHeight || 120];
  [canvas.width, canvas.height] = [width * ratio, height * ratio];
  canvas.style.imageRendering = "auto";
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const [dim] = frame.shape.slice(1);
  const floats = (f) => new Float32Array(f.values.buffer, f.values.byteOffset, f.values.byteLength >> 2);
  const column = (f, axis) => Array.from({ length: f.shape[0] }, (_, i) => floats(f)[i * dim + axis]);
  const range = (axis) => {
    const all = [...column(frame, axis), ...(under ? column(under, axis) : [])].sort((a, b) => a - b);
    const pad = (all.at(-1) - all[0]) * 0.05 || 1;
    return [all[0] - pad, all.at(-1) + pad];
  };
  const style = getComputedStyle(canvas);
  pen.font = `11px ${style.fontFamily}`;
  const [left, right, top, bottom] = [8, width - 8, 10, height - 20];
  const xs = range(0);
  const across = (x) => left + ((x - xs[0]) / (xs[1] - xs[0])) * (right - left);
  pen.fillStyle = pen.strokeStyle = style.color;
  pen.textAlign = "center";
  for (const [tick, text] of named(niceTicks(...xs, 5), short)) pen.fillText(text, clamp(across(tick), 14, width - 14), height - 5);
  pen.globalAlpha = 0.4;
  pen.strokeRect(left, top, right - left, bottom - top);
  if (dim === 1) {
    const bins = 40;
    const counts = (f) => {
      const tally = new Array(bins).fill(0);
      for (const x of column(f, 0)) tally[clamp(Math.floor(((x - xs[0]) / (xs[1] - xs[0])) * bins), 0, bins - 1)] += 1 / f.shape[0];
      return tally;
    };
    const [own, other] = [counts(frame), under ? counts(under) : []];
    const tallest = Math.max(...own, ...other);
    const bar = (right - left) / bins;
    pen.globalAlpha = 1;
    pen.fillStyle = "#56b4e9";
    own.forEach((c, i) => pen.fillRect(left + i * bar, bottom - (c / tallest) * (bottom - top), bar - 1, (c / tallest) * (bottom - top)));
    pen.beginPath();
    other.forEach((c, i) => {
      const y = bottom - (c / tallest) * (bottom - top);
      pen.lineTo(left + i * bar, y);
      pen.lineTo(left + (i + 1) * bar, y);
    });
    pen.lineWidth = 1.5;
    pen.stroke();
  } else {
    const ys = range(1);
    const up = (y) => bottom - ((y - ys[0]) / (ys[1] - ys[0])) * (bottom - top);
    const dots = (f, draw) => {
      const [a, b] = [column(f, 0), column(f, 1)];
      a.forEach((x, i) => draw(across(x), up(b[i])));
    };
    pen.globalAlpha = 0.5;
    if (under) dots(under, (x, y) => { pen.beginPath(); pen.arc(x, y, 3, 0, 7); pen.stroke(); });
    pen.globalAlpha = 0.85;
    pen.fillStyle = "#e69f00";
    dots(frame, (x, y) => { pen.beginPath(); pen.arc(x, y, 2.4, 0, 7); pen.fill(); });
  }
  pen.globalAlpha = 1;
}

// ------------------------------------------------------------------------------------------------ axes

function marker(shape, x, y, r) {
  const at = (points) => s("polygon", { points: points.map(([a, b]) => `${x + a * r},${y + b * r}`).join(" ") });
  if (shape === "triangle") return at([[0, -1.2], [1.1, 0.8], [-1.1, 0.8]]);
  if (shape === "diamond") return at([[0, -1.3], [1.3, 0], [0, 1.3], [-1.3, 0]]);
  if (shape === "square") return at([[-1, -1], [1, -1], [1, 1], [-1, 1]]);
  if (shape === "cross") return at([[-1.2, -0.4], [-0.4, -0.4], [-0.4, -1.2], [0.4, -1.2], [0.4, -0.4], [1.2, -0.4], [1.2, 0.4], [0.4, 0.4], [0.4, 1.2], [-0.4, 1.2], [-0.4, 0.4], [-1.2, 0.4]]);
  if (shape === "star") {
    return at(Array.from({ length: 10 }, (_, i) => {
      const [angle, radius] = [(i * Math.PI) / 5 - Math.PI / 2, i % 2 ? 0.7 : 1.8];
      return [radius * Math.cos(angle), radius * Math.sin(angle)];
    }));
  }
  return s("circle", { cx: x, cy: y, r });
}

// ------------------------------------------------------------------------------------------------ files and clipboard

function download(blob, name) {
  const link = h("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// A copy of an SVG in light colours, with the styles that the page's stylesheet gave it written into it.
function standalone(svg, host) {
  const copy = svg.cloneNode(true);
  const stage = h("div", { class: "wb wb-light wb-offstage" }, copy);
  host.append(stage);
  for (const node of [copy, ...copy.querySelectorAll("*")]) {
    const style = getComputedStyle(node);
    for (const name of ["fill", "stroke", "stroke-width", "stroke-dasharray", "font-family", "font-size", "font-weight", "opacity"]) {
      node.style.setProperty(name, style.getPropertyValue(name));
    }
    node.removeAttribute("tabindex");
  }
  stage.remove();
  copy.setAttribute("xmlns", SVG);
  const [width, height] = [svg.clientWidth, svg.clientHeight];
  copy.setAttribute("viewBox", `0 0 ${width} ${height}`);
  copy.setAttribute("width", width);
  copy.setAttribute("height", height);
  copy.prepend(s("rect", { width, height, fill: "#ffffff" }));
  return { text: new XMLSerializer().serializeToString(copy), width, height };
}

function rasterise({ text, width, height }, then) {
  const picture = new Image();
  picture.onload = () => {
    const canvas = h("canvas", { width: width * 2, height: height * 2 });
    canvas.getContext("2d").drawImage(picture, 0, 0, width * 2, height * 2);
    canvas.toBlob(then);
  };
  picture.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`;
}

// ------------------------------------------------------------------------------------------------ the panel

function render({ model, el }) {
  const spec = model.get("spec");
  const colour = (k) => COLOURS[k % COLOURS.length];
  const client = Math.random().toString(36).slice(2, 8);
  let view = model.get("view");
  let frontier = model.get("frontier");
  let frame = null;
  let local = structuredClone(view.state); // the settings as the hand has them, ahead of Python's
  let held = 0; // pointers down on a slider or handle
  let gesture = 0;
  let lastKey = { name: "", time: 0 };
  let metric = "";
  let selected = -1; // point of the frontier under the hand
  const peeked = {}; // frames by key, for hovering and for the reference's samples

  // --- wishes: one under way at a time; newer changes of one gesture replace older ones that still wait

  const queue = [];
  let pending = "";
  let serial = 0;
  let timer = 0;

  function ask(intent) {
    const last = queue.at(-1);
    if (intent.kind === "set" && last?.kind === "set" && last.gesture === intent.gesture) {
      Object.assign(last.state, intent.state);
      Object.assign(last.knobs, intent.knobs);
    } else queue.push(intent);
    pump();
  }

  function pump() {
    if (pending || !queue.length) return;
    const intent = queue.shift();
    pending = intent.id = `${client}-${++serial}`;
    if (model.send) model.send(intent);
    else {
      model.set("intent", intent);
      model.save_changes();
    }
    timer = setTimeout(() => {
      status.textContent = "waiting for Python…";
      acknowledge();
    }, 5000);
  }

  function acknowledge() {
    clearTimeout(timer);
    pending = "";
    pump();
  }

  function beginGesture(name) {
    const now = Date.now();
    if (name === undefined || name !== lastKey.name || now - lastKey.time > MERGE_MS) gesture += 1;
    lastKey = { name, time: now };
  }

  function change(part) {
    Object.assign(local, part.state);
    Object.assign(local.knobs, part.knobs);
    redraw(drawControls);
    if (!(held && onRelease.checked)) ask({ kind: "set", state: { ...part.state }, knobs: { ...part.knobs }, gesture: `${client}-${gesture}` });
    else unsent = { state: { ...unsent?.state, ...part.state }, knobs: { ...unsent?.knobs, ...part.knobs } };
  }
  let unsent = null;

  function hold() {
    held += 1;
    gesture += 1;
    const release = () => {
      removeEventListener("pointerup", release, true);
      removeEventListener("pointercancel", release, true);
      held -= 1;
      if (unsent) {
        const part = unsent;
        unsent = null;
        change(part);
      }
      settle();
    };
    addEventListener("pointerup", release, true);
    addEventListener("pointercancel", release, true);
  }

  function settle() {
    if (held || pending || queue.length || unsent) return;
    local = structuredClone(view.state);
    drawControls();
  }

  // --- top: title, status, history

  const button = (text, label, action, id) => h("button", { type: "button", "aria-label": label, title: label, onclick: action, "data-testid": id }, text);
  const title = h("div", { class: "wb-title", "data-testid": "title" });
  const stale = h("span", { class: "wb-stale", "data-testid": "stale" }, "updating…");
  const status = h("div", { class: "wb-status", role: "status", "data-testid": "status" });
  const problem = h("div", { class: "wb-error", role: "alert", "data-testid": "error", hidden: true });
  const seed = h("input", { type: "number", min: 0, step: 1, "aria-label": "seed", class: "wb-number", "data-testid": "seed",
    onchange: () => { beginGesture(); change({ state: { seed: Number(seed.value) } }); } });
  const undo = button("↶ Undo", "undo the last change", () => ask({ kind: "undo" }), "undo");
  const redo = button("↷ Redo", "redo", () => ask({ kind: "redo" }), "redo");
  const reset = button("Reset", "back to the settings at the start", () => ask({ kind: "reset" }), "reset");
  const pin = button("Pin as A", "keep this run's samples beside those that follow", () => ask({ kind: view.pinned ? "unpin" : "pin" }), "pin");
  const top = h("div", { class: "wb-top" },
    h("div", { class: "wb-line" }, title, stale),
    h("div", { class: "wb-tools" }, status,
      h("label", { class: "wb-seed" }, "seed", seed),
      button("New", "new random seed", () => { beginGesture(); change({ state: { seed: Math.floor(Math.random() * 10000) } }); }, "dice"),
      undo, redo, reset, pin));

  // --- the trajectory: which model takes which step

  const cells = s("g");
  const axis = s("g", { class: "wb-axis" });
  const progress = s("rect", { class: "wb-progress", y: 44, height: 3, x: 0, width: 0 });
  const strip = s("svg", { class: "wb-strip", height: 78, "data-testid": "strip", role: "group", "aria-label": "trajectory: which model takes which step" }, cells, progress, axis);
  const chips = spec.models.map(() => h("b"));
  const legend = h("div", { class: "wb-legend", "data-testid": "counts" }, ...spec.models.map((entry, m) => h("span", { class: "wb-chip" },
    h("i", { style: `background:${colour(m)}` }, entry.letter), entry.name === entry.letter ? "" : `${entry.name} `, chips[m])), "steps");
  const EDGE = 12; // room for handles at both ends
  let stripWidth = 600; // kept, because asking for it at every event would make the browser lay the page out anew
  const handles = spec.models.slice(1).map((_, k) => {
    const node = s("g", { class: "wb-handle", tabindex: 0, role: "slider", "data-testid": `handle-${k}`, "aria-orientation": "horizontal", "aria-valuemin": 0 },
      s("rect", { class: "wb-hit", x: -12, y: 0, width: 24, height: 50 }),
      s("line", { y1: 10, y2: 48 }), s("path", { d: "M-7,0H7V8L0,15L-7,8Z" }));
    node.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      node.focus();
      node.setPointerCapture(event.pointerId);
      hold();
      const move = (e) => {
        const box = strip.getBoundingClientRect();
        const share = (e.clientX - box.left - EDGE) / (box.width - 2 * EDGE);
        moveHandle(k, Math.round(share * reached().length));
      };
      node.addEventListener("pointermove", move);
      node.addEventListener("lostpointercapture", () => node.removeEventListener("pointermove", move), { once: true });
    });
    node.addEventListener("keydown", (event) => {
      const now = ends()[k];
      const last = reached().length;
      const to = { ArrowLeft: now - 1, ArrowDown: now - 1, ArrowRight: now + 1, ArrowUp: now + 1, Home: 0, End: last, PageDown: now - 5, PageUp: now + 5 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      beginGesture(`handle-${k}`);
      moveHandle(k, to);
    });
    strip.append(node);
    return node;
  });

  // What is half typed must not be written over by news from Python.
  const typing = new WeakSet();
  const isTyping = (field) => typing.has(field);
  function guard(field) {
    field.addEventListener("input", () => typing.add(field));
    for (const end of ["change", "blur"]) field.addEventListener(end, () => typing.delete(field), true);
    return field;
  }

  const hasHandles = () => "fractions" in local.knobs && spec.models.length > 1;
  const isReversed = () => local.knobs.order === "costly_first";

  // Share of the trajectory reached after each step. With handles, until Python has answered for a new number of steps:
  // even steps. Without, only the method knows how many steps there are.
  function reached() {
    const n = hasHandles() ? local.knobs.n_steps : view.strip.log_snr.length;
    return view.strip.reached.length === n ? view.strip.reached : Array.from({ length: n }, (_, i) => (i + 1) / n);
  }

  function cumulated() { // shares at which one model hands over to the next, in the order along the trajectory
    const given = local.knobs.fractions;
    const K = spec.models.length;
    const head = [...given, ...new Array(K).fill(0)].slice(0, K - 1);
    let shares = [...head, Math.max(1 - sum(head), 0)];
    if (isReversed()) shares = shares.reverse();
    return shares.slice(0, -1).map((_, k) => sum(shares.slice(0, k + 1)));
  }

  const ends = () => cumulated().map((share) => reached().filter((r) => r <= share + 1e-9).length);

  function moveHandle(k, step) {
    const to = clamp(step, 0, reached().length);
    if (to === ends()[k]) return;
    const at = to ? reached()[to - 1] : 0;
    // other marks in the way are pushed along
    const shares = cumulated().map((share, j) => j === k ? at : j < k ? Math.min(share, at) : Math.max(share, at));
    let parts = [...shares, 1].map((c, i) => Math.max(+(c - (shares[i - 1] ?? 0)).toFixed(12), 0));
    if (isReversed()) parts = parts.reverse();
    change({ knobs: { fractions: parts.slice(0, -1) } });
  }

  // Steps per model in the order along the trajectory: [[model index, steps], ...].
  function owned() {
    const K = spec.models.length;
    const order = [...Array(K).keys()];
    if (!hasHandles()) return view.strip.owned;
    const at = [0, ...ends(), reached().length];
    return (isReversed() ? order.reverse() : order).map((m, i) => [m, at[i + 1] - at[i]]);
  }

  // Pieces that the strip is cut into: one per step, or one per model where there are too many steps.
  function pieces(parts, n) {
    let at = 0;
    return parts.flatMap(([m, count]) => {
      const from = at;
      at += count;
      if (n > MAX_CELLS) return count ? [[m, from, at]] : [];
      return Array.from({ length: count }, (_, j) => [m, from + j, from + j + 1]);
    });
  }

  // Elements stay while the cut stays: setting up text is the slowest thing that a drag could ask of a browser.
  function drawStrip() {
    const n = reached().length;
    const x = (i) => EDGE + ((stripWidth - 2 * EDGE) * i) / n;
    const parts = owned();
    const cut = pieces(parts, n);
    const shape = JSON.stringify([stripWidth, n, cut.map(([, from, to]) => [from, to])]);
    if (shape !== cells.dataset.shape) {
      cells.dataset.shape = shape;
      cells.replaceChildren(...cut.flatMap(([, from, to]) => [
        s("rect", { class: "wb-cell", x: x(from) + 0.5, y: 18, width: Math.max(x(to) - x(from) - 1, 0.5), height: 24 }),
        s("text", { class: "wb-letter", x: (x(from) + x(to)) / 2, y: 34.5 })]));
    }
    cut.forEach(([m, from, to], i) => {
      const [rect, text] = [cells.children[2 * i], cells.children[2 * i + 1]];
      if (rect.dataset.model === String(m)) return;
      rect.dataset.model = m;
      rect.setAttribute("fill", colour(m));
      const { letter } = spec.models[m];
      text.textContent = x(to) - x(from) > 7 * letter.length + 3 ? letter : "";
    });
    drawAxis(n, x);
    drawHandles(n, x, parts);
    drawProgress();
  }

  function drawAxis(n, x) {
    const noise = view.strip.log_snr;
    const shape = JSON.stringify([stripWidth, n, noise, view.strip.is_open]);
    if (shape === axis.dataset.shape || noise.length !== n) return;
    axis.dataset.shape = shape;
    axis.replaceChildren();
    const stride = Math.max(1, Math.ceil((n * 46) / (stripWidth - 120)));
    for (let j = 0; j < n && x(j) <= stripWidth - 70; j += stride) {
      axis.append(s("line", { x1: x(j), x2: x(j), y1: 48, y2: 52 }), s("text", { x: x(j), y: 63, "text-anchor": j ? "middle" : "start" }, noise[j]?.toFixed(1) ?? "-∞"));
    }
    axis.append(s("text", { x: EDGE, y: 76 }, view.strip.is_open ? "as many steps as the error asks: known after the run" : "noise level: log-SNR before the step"),
      s("text", { x: stripWidth - EDGE, y: 63, "text-anchor": "end" }, "data"));
  }

  function drawHandles(n, x, parts) {
    const at = hasHandles() ? ends() : [];
    handles.forEach((node, k) => {
      node.style.display = hasHandles() ? "" : "none";
      if (!hasHandles()) return;
      const crowd = at.filter((e) => e === at[k]).length; // handles on one spot stand side by side
      const rank = at.slice(0, k).filter((e) => e === at[k]).length;
      const nudge = (rank - (crowd - 1) / 2) * 15;
      node.setAttribute("transform", `translate(${clamp(x(at[k]) + nudge, 8, stripWidth - 8)},0)`);
      const [before, after] = [parts[k][0], parts[k + 1][0]].map((m) => spec.models[m].name);
      node.setAttribute("aria-label", `switch from model ${before} to model ${after}`);
      node.setAttribute("aria-valuenow", at[k]);
      node.setAttribute("aria-valuemax", n);
      const first = k ? at[k - 1] : 0;
      node.setAttribute("aria-valuetext", at[k] > first ? `${before} takes steps ${first + 1}-${at[k]} of ${n}` : `${before} takes no step of ${n}`);
    });
    const byModel = spec.models.map((_, m) => sum(parts.filter(([owner]) => owner === m).map(([, count]) => count)));
    chips.forEach((chip, m) => { chip.textContent = view.strip.is_open && byModel[m] ? "?" : byModel[m]; });
  }

  function drawProgress() {
    const done = frame && !frame.is_done && frame.of ? frame.step / frame.of : 1;
    progress.setAttribute("x", EDGE);
    progress.setAttribute("width", Math.max((stripWidth - 2 * EDGE) * done, 0));
    progress.style.opacity = done < 1 ? 1 : 0;
  }

  // --- knobs

  const method = h("select", { "aria-label": "method", "data-testid": "method", onchange: () => { beginGesture(); ask({ kind: "set", state: { method: method.value }, knobs: {}, gesture: `${client}-${gesture}` }); } },
    ...spec.methods.map((m) => h("option", { value: m.name, title: m.summary }, m.name)));
  const source = h("div", { class: "wb-source" });
  const knobBox = h("div", { class: "wb-knoblist" });
  let controls = [];
  guard(seed);

  function slider(knob) {
    const [low, high] = knob.soft ?? [knob.low, knob.high];
    const isLog = knob.scale === "log";
    const toValue = (p) => {
      const raw = isLog ? low * (high / low) ** (p / 1000) : p;
      return knob.kind === "int" ? Math.round(raw) : +raw.toPrecision(6);
    };
    const range = h("input", { type: "range", "aria-label": words(knob.name), "data-testid": `knob-${knob.name}`, title: `${knob.help}. Double click: ${knob.start}`,
      min: isLog ? 0 : low, max: isLog ? 1000 : high, step: isLog ? 1 : knob.step ?? "any" });
    range.addEventListener("pointerdown", hold);
    range.addEventListener("input", () => {
      if (!held) beginGesture(knob.name);
      change({ knobs: { [knob.name]: toValue(Number(range.value)) } });
    });
    range.addEventListener("dblclick", () => { beginGesture(); change({ knobs: { [knob.name]: knob.start } }); });
    const field = h("input", { type: "number", class: "wb-number", "aria-label": `${words(knob.name)}, exact value`, "data-testid": `field-${knob.name}`,
      min: knob.low, max: knob.high, step: knob.step ?? "any", title: `${knob.low} to ${knob.high} ${knob.unit}`,
      onchange: () => { beginGesture(); change({ knobs: { [knob.name]: Number(field.value) } }); } });
    guard(field);
    return {
      nodes: [range, field], wide: true,
      put(value) {
        const position = isLog ? (1000 * Math.log(clamp(value, low, high) / low)) / Math.log(high / low) : value;
        if (Number(range.value) !== position) range.value = position;
        range.setAttribute("aria-valuetext", `${value} ${knob.unit}`.trim());
        if (!isTyping(field)) field.value = value;
      },
    };
  }

  function chooser(knob) {
    const name = words(knob.name);
    if (knob.kind === "bool") {
      const box = h("input", { type: "checkbox", "aria-label": name, "data-testid": `knob-${knob.name}`, onchange: () => { beginGesture(); change({ knobs: { [knob.name]: box.checked } }); } });
      return { nodes: [box], put: (value) => { box.checked = value; } };
    }
    const select = h("select", { "aria-label": name, "data-testid": `knob-${knob.name}`, onchange: () => { beginGesture(); change({ knobs: { [knob.name]: knob.choices[select.selectedIndex] } }); } },
      ...knob.choices.map((choice) => h("option", {}, words(String(choice)))));
    select.addEventListener("dblclick", () => change({ knobs: { [knob.name]: knob.start } }));
    return { nodes: [select], put: (value) => { select.selectedIndex = knob.choices.indexOf(value); } };
  }

  function buildKnobs() {
    const chosen = spec.methods.find((m) => m.name === local.method);
    source.textContent = chosen.summary;
    source.title = `${chosen.summary}\n${chosen.source}`;
    controls = chosen.knobs.filter((knob) => knob.kind !== "tuple").map((knob) => {
      const control = knob.choices || knob.kind === "bool" ? chooser(knob) : slider(knob);
      const reason = h("span", { class: "wb-reason" });
      const row = h("div", { class: control.wide ? "wb-knob wb-wide" : "wb-knob", title: knob.help },
        h("span", { class: "wb-name" }, knob.unit && !words(knob.name).endsWith(knob.unit) ? `${words(knob.name)} (${knob.unit})` : words(knob.name), reason), ...control.nodes);
      return { ...control, knob, row, reason };
    });
    knobBox.replaceChildren(...controls.map((c) => c.row));
    knobBox.dataset.method = local.method;
  }

  function drawControls() {
    if (knobBox.dataset.method !== local.method) buildKnobs();
    method.value = local.method;
    if (!isTyping(seed)) seed.value = local.seed;
    for (const { knob, nodes, put, row, reason } of controls) {
      const unmet = Object.entries(knob.needs).find(([name, wanted]) => ![wanted].flat().includes(local.knobs[name]));
      nodes.forEach((node) => { node.disabled = Boolean(unmet); });
      row.classList.toggle("wb-off", Boolean(unmet));
      reason.textContent = !unmet ? "" : ` needs ${words(unmet[0])} ${[unmet[1]].flat().map((value) => words(String(value))).join(" or ")}`;
      put(local.knobs[knob.name]);
    }
    drawStrip();
  }

  // --- samples

  const canvas = h("canvas", { role: "img", "data-testid": "samples", "data-revision": 0 });
  const caption = h("div", { class: "wb-caption" }, "B");
  const pinnedCanvas = h("canvas", { role: "img", "aria-label": "samples of the pinned run", "data-testid": "pinned" });
  const pinnedCaption = h("div", { class: "wb-caption" });
  const pinnedSide = h("figure", { class: "wb-side", hidden: true }, pinnedCanvas, pinnedCaption);
  const samples = h("div", { class: "wb-samples" }, pinnedSide, h("figure", { class: "wb-side" }, canvas, caption));

  function drawSamples(target, given) {
    if (spec.is_image) drawPictures(target, given);
    else drawPoints(target, given, under());
  }

  const law = spec.law ? unpack(Uint8Array.from(atob(spec.law), (c) => c.charCodeAt(0))) : null;
  const under = () => law ?? peeked[view.reference?.key]; // what samples that are no pictures are drawn over

  function drawFrame() {
    const next = unpack(model.get("frame"));
    if (!next) return;
    frame = next;
    drawSamples(canvas, frame);
    Object.assign(canvas.dataset, { revision: frame.revision, key: frame.key, step: frame.step, of: frame.of });
    canvas.setAttribute("aria-label", `samples of ${frame.title}, ${frame.is_done ? "finished" : `after ${stepOf(frame)}`}`);
    title.textContent = title.title = frame.title;
    drawProgress();
    drawCaption();
  }

  const stepOf = ({ step, of }) => `step ${step}${of ? ` of ${of}` : ""}`;

  function drawCaption() {
    const [n] = frame?.shape ?? [0];
    const some = spec.is_image && n > MAX_PICTURES ? `the first ${MAX_PICTURES} of ${n} samples` : "";
    const key = spec.is_image ? "" : `filled: this run${under() ? `; outline: ${law ? "the true law" : "the reference"}` : ""}`;
    caption.textContent = [view.pinned ? "B, this run" : "", frame && !frame.is_done ? `estimate at ${stepOf(frame)}` : "", some, key].filter(Boolean).join(" · ") || "\u00a0";
    caption.classList.toggle("wb-early", Boolean(frame && !frame.is_done));
  }

  function drawPinned() {
    const given = unpack(model.get("pinned"));
    pinnedSide.hidden = !given;
    samples.classList.toggle("wb-two", Boolean(given));
    if (given) drawSamples(pinnedCanvas, given);
    if (frame && !spec.is_image) drawSamples(canvas, frame);
  }

  // --- cost and quality

  const costs = h("div", { class: "wb-costs", "data-testid": "costs" });
  const comparison = h("div", { class: "wb-comparison", "data-testid": "comparison" });
  const qualities = h("table", { class: "wb-quality", "data-testid": "quality" });

  function bar(heading, parts, text, against, note) {
    const total = sum(parts);
    const full = Math.max(against ?? total, total) || 1;
    return h("div", { class: "wb-bar" },
      h("div", { class: "wb-bartext" }, h("span", {}, heading), h("b", {}, text)),
      h("div", { class: "wb-track", role: "img", "aria-label": `${heading}: ${text}` },
        ...parts.map((part, m) => part > 0 ? h("span", { style: `width:${(100 * part) / full}%;background:${colour(m)}`, title: `${spec.models[m].name} ${short(part)}` }, spec.models[m].letter) : null)),
      h("div", { class: "wb-note", title: note }, note));
  }

  function drawNumbers() {
    const run = view.shown;
    if (!run) {
      costs.replaceChildren(h("div", { class: "wb-empty" }, "no run yet: the first one is on its way"));
      return;
    }
    const reference = view.reference;
    const share = (name) => reference ? `${Math.round((100 * sum(run[name])) / sum(reference[name]))} % of the reference` : "reference not known yet";
    const time = run.timing;
    costs.replaceChildren(
      bar("evaluations per sample", run.evaluations, short(sum(run.evaluations)), reference && sum(reference.evaluations), share("evaluations")),
      bar("FLOPs per sample", run.flops, short(sum(run.flops)), reference && sum(reference.flops), share("flops")),
      time ? bar("measured time", time.by_model, `${measured(time.ms, time.spread)} ms`, time.ms, `${run.n} samples on ${time.machine}; median of ${time.repeats}; ${short(time.peak_mb)} MB held`)
        : bar("measured time", [], "measuring…", 1, "once nothing else is asked"));
    const rows = Object.entries(run.quality).map(([name, [value, stderr, n]]) => {
      const m = spec.metrics[name];
      const few = n < m.min_n;
      return h("tr", { class: few ? "wb-few" : "", title: m.help, "data-metric": name },
        h("th", { scope: "row" }, m.label, h("small", {}, [m.unit, m.higher ? "higher is better" : "lower is better"].filter(Boolean).join(", "))),
        h("td", {}, measured(value, stderr), h("small", {}, few ? `n = ${n}, needs n ≥ ${m.min_n}` : `n = ${n}`)));
    });
    if (!("drift" in run.quality)) rows.push(h("tr", { class: "wb-few" }, h("th", { scope: "row" }, spec.metrics.drift.label), h("td", {}, h("small", {}, "no score yet: the reference is being computed"))));
    qualities.replaceChildren(...rows);
    pin.textContent = view.pinned ? "Unpin A" : "Pin as A";
    comparison.hidden = !view.pinned;
    if (!view.pinned) return;
    pinnedCaption.textContent = `A, pinned: ${view.pinned.title}`;
    pinnedCaption.title = view.pinned.full;
    const names = [...new Set([...Object.keys(view.pinned.knobs), ...Object.keys(run.knobs)])];
    const text = (v) => v === undefined ? "none" : typeof v === "number" ? short(v) : Array.isArray(v) ? v.map((x) => short(x)).join(", ") : words(String(v));
    const differ = names.filter((name) => text(view.pinned.knobs[name]) !== text(run.knobs[name]));
    comparison.replaceChildren(h("b", {}, "A → B "),
      [...(view.pinned.method !== run.method ? [`${view.pinned.method} → ${run.method}`] : []),
        ...differ.map((name) => `${words(name)} ${text(view.pinned.knobs[name])} → ${text(run.knobs[name])}`),
        `FLOPs × ${(sum(run.flops) / sum(view.pinned.flops)).toFixed(2)}`].join(" · "));
  }

  // --- the frontier

  const metricSelect = h("select", { "aria-label": "quality on the frontier", "data-testid": "metric", onchange: () => { metric = metricSelect.value; drawFrontier(); } });
  const costSelect = h("select", { "aria-label": "cost on the frontier", "data-testid": "cost", onchange: () => drawFrontier() },
    h("option", { value: "flops" }, "FLOPs per sample"), h("option", { value: "evaluations" }, "evaluations per sample"));
  const nSelect = h("select", { "aria-label": "samples per run on the frontier", "data-testid": "frontier-n", onchange: () => ask({ kind: "frontier_n", n: Number(nSelect.value) }) });
  const plot = s("svg", { class: "wb-plot", height: 290, tabindex: 0, role: "application", "data-testid": "frontier",
    "aria-label": "quality against cost; arrow keys go from point to point, Enter returns to that run" });
  const thumb = h("canvas", { "aria-hidden": "true", width: 96, height: 96 });
  const cardText = h("div", { class: "wb-cardtext", "data-testid": "hover" });
  const card = h("div", { class: "wb-card", hidden: true }, thumb, cardText);
  const plotBox = h("div", { class: "wb-plotbox" }, plot, card);
  const ring = s("circle", { class: "wb-ring", r: 9, "data-testid": "ring" }); // around the run shown
  let drawn = []; // what the plot shows: {point, x, y}

  function options(select, entries, value) {
    const now = JSON.stringify(entries);
    if (select.dataset.entries !== now) {
      select.dataset.entries = now;
      select.replaceChildren(...entries.map(([v, text]) => h("option", { value: v }, text)));
    }
    select.value = value;
  }

  function pareto(points, cost, higher) {
    const front = [];
    const key = (p) => (higher ? -p.value : p.value);
    for (const p of [...points].sort((a, b) => a[cost] - b[cost] || key(a) - key(b))) if (!front.length || key(p) < key(front.at(-1))) front.push(p);
    return front;
  }

  function drawFrontier() {
    frontier = model.get("frontier");
    const known = Object.keys(frontier.metrics ?? {});
    if (!known.includes(metric)) metric = known.includes("drift") ? "drift" : known[0] ?? "";
    if (metric !== "drift" && known.includes("drift") && !metricSelect.dataset.touched) metric = "drift";
    options(metricSelect, known.map((name) => [name, spec.metrics[name].label]), metric);
    options(nSelect, (frontier.ns ?? []).map((n) => [String(n), `n = ${n}`]), String(frontier.n));
    const width = plot.clientWidth || 600;
    const cost = costSelect.value;
    const points = (frontier.metrics?.[metric] ?? []).filter((p) => p[cost] > 0);
    const box = { left: 62, right: width - 16 };
    const key = layKey(box, points);
    box.top = 12 + LINE * (key.at(-1).row + 1);
    box.bottom = box.top + 220;
    const height = box.bottom + 40;
    plot.setAttribute("height", height);
    const pointed = drawn[selected]?.point.keys; // stays under the hand while new points arrive
    drawn = [];
    select(-1);
    plot.replaceChildren();
    if (!points.length) {
      const why = known.length ? "no runs with this number of samples yet" : "no score yet: the first run and its reference are being computed";
      plot.append(s("text", { x: width / 2, y: height / 2, "text-anchor": "middle", class: "wb-emptytext" }, why));
      return;
    }
    const m = spec.metrics[metric];
    const bars = points.map((p) => p.stderr ?? 0);
    const costsOf = points.map((p) => p[cost]);
    const [x0, x1] = [Math.min(...costsOf) / 1.25, Math.max(...costsOf) * 1.35];
    let [y0, y1] = [Math.min(...points.map((p, i) => p.value - bars[i])), Math.max(...points.map((p, i) => p.value + bars[i]))];
    const pad = (y1 - y0) * 0.08 || Math.abs(y1) * 0.1 || 1;
    [y0, y1] = [y0 - pad, y1 + pad];
    const X = (v) => box.left + (Math.log(v / x0) / Math.log(x1 / x0)) * (box.right - box.left);
    const Y = (v) => box.bottom - ((v - y0) / (y1 - y0)) * (box.bottom - box.top);
    const grid = s("g", { class: "wb-axis" });
    for (const [t, text] of named(logTicks(x0, x1), short)) grid.append(s("line", { class: "wb-gridline", x1: X(t), x2: X(t), y1: box.top, y2: box.bottom }), s("text", { x: X(t), y: box.bottom + 15, "text-anchor": "middle" }, text));
    for (const [t, text] of named(niceTicks(y0, y1, 5), short)) grid.append(s("line", { class: "wb-gridline", x1: box.left, x2: box.right, y1: Y(t), y2: Y(t) }), s("text", { x: box.left - 6, y: Y(t) + 4, "text-anchor": "end" }, text));
    grid.append(
      s("text", { x: (box.left + box.right) / 2, y: height - 6, "text-anchor": "middle" }, `${costSelect.selectedOptions[0].text} (log)`),
      s("text", { transform: `translate(13,${(box.top + box.bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, `${m.label}${m.unit ? ` (${m.unit})` : ""}`));
    plot.append(grid);
    const front = pareto(points, cost, m.higher);
    plot.append(s("polyline", { class: "wb-front", points: front.map((p) => `${X(p[cost])},${Y(p.value)}`).join(" ") }));
    points.forEach((point, i) => {
      const [x, y] = [X(point[cost]), Y(point.value)];
      const kind = spec.methods.findIndex((entry) => entry.name === point.method);
      const group = s("g", { class: "wb-point", "data-keys": point.keys.join(" "), "data-role": point.role });
      if (bars[i]) group.append(s("line", { class: "wb-whisker", x1: x, x2: x, y1: Y(point.value - bars[i]), y2: Y(point.value + bars[i]) }));
      const mark = marker({ reference: "star", baseline: "square" }[point.role] ?? SHAPES[Math.max(kind, 0) % SHAPES.length], x, y, 4.5);
      mark.setAttribute("class", point.role ? "wb-rival" : "wb-mark");
      if (!point.role) mark.setAttribute("fill", colour(Math.max(kind, 0)));
      group.append(mark);
      if (point.role) {
        const isRight = x > (box.left + box.right) / 2;
        const isAbove = isRight === m.higher; // the side that the front does not come from
        group.append(s("text", { class: "wb-rolename", x: x + (isRight ? -11 : 11), y: y + (isAbove ? -8 : 17), "text-anchor": isRight ? "end" : "start" }, point.role));
      }
      plot.append(group);
      drawn.push({ point, x, y });
    });
    drawKey(key);
    plot.append(ring);
    markShown();
    if (pointed) select(drawn.findIndex(({ point }) => point.keys.some((key) => pointed.includes(key))));
  }

  function markShown() {
    const here = drawn.find(({ point }) => point.keys.includes(view.shown?.key));
    ring.style.display = here ? "" : "none";
    ring.setAttribute("transform", `translate(${here?.x ?? 0},${here?.y ?? 0})`);
  }

  // Where the entries of the key stand: {name, x, row, k}, in as many rows as they need.
  const LINE = 18;
  function layKey(box, points) {
    const used = spec.methods.map((entry, k) => [entry.name, k]).filter(([name]) => points.some((p) => p.method === name && !p.role));
    let [x, row] = [box.left, 0];
    return [...used, ["Pareto front", -1], [`shown · n = ${frontier.n} per run`, -2]].map(([name, k]) => {
      const wide = 32 + 6.7 * name.length;
      if (x + wide > box.right && x > box.left) [x, row] = [box.left, row + 1];
      x += wide;
      return { name, k, row, x: x - wide };
    });
  }

  function drawKey(entries) {
    for (const { name, k, row, x } of entries) {
      const y = 14 + LINE * row;
      const mark = k >= 0 ? marker(SHAPES[k % SHAPES.length], x + 8, y, 4.5)
        : k === -1 ? s("line", { class: "wb-front", x1: x, x2: x + 16, y1: y, y2: y })
          : s("circle", { class: "wb-ring", cx: x + 8, cy: y, r: 6 });
      if (k >= 0) {
        mark.setAttribute("class", "wb-mark");
        mark.setAttribute("fill", colour(k));
      }
      plot.append(mark, s("text", { class: "wb-keytext", x: x + 20, y: y + 4 }, name));
    }
  }

  function select(index) {
    selected = index;
    card.hidden = index < 0;
    plot.querySelectorAll(".wb-point").forEach((node, i) => node.classList.toggle("wb-hover", i === index));
    if (index < 0) return;
    const { point, x, y } = drawn[index];
    const key = point.keys[0];
    const seeds = point.keys.length > 1 ? `, mean of ${point.keys.length} seeds` : "";
    const role = point.role ? `${point.role}: ` : "";
    cardText.replaceChildren(h("b", {}, role + frontier.titles[key]),
      h("div", {}, `${spec.metrics[metric].label} ${measured(point.value, point.stderr)}${seeds}, n = ${point.n}`),
      h("div", {}, `${short(point.evaluations)} evaluations, ${short(point.flops)} FLOPs per sample`), h("small", {}, "click: return to this run"));
    card.style.left = `${clamp(x + 14, 0, plot.clientWidth - 330)}px`;
    card.style.top = `${clamp(y - 120, 0, 170)}px`;
    thumb.hidden = !peeked[key];
    if (peeked[key]) drawSamples(thumb, peeked[key]);
    else ask({ kind: "peek", key });
  }

  function nearest(event) {
    const at = plot.getBoundingClientRect();
    const far = drawn.map(({ x, y }) => Math.hypot(x - (event.clientX - at.left), y - (event.clientY - at.top)));
    const best = far.indexOf(Math.min(...far));
    return far[best] < 14 ? best : -1;
  }

  const recall = (index) => { if (index >= 0) ask({ kind: "recall", key: drawn[index].point.keys[0] }); };
  plot.addEventListener("pointermove", (event) => { const i = nearest(event); if (i !== selected) select(i); });
  plot.addEventListener("pointerleave", () => select(-1));
  plot.addEventListener("blur", () => select(-1));
  plot.addEventListener("click", (event) => recall(nearest(event)));
  plot.addEventListener("keydown", (event) => {
    const order = [...drawn.keys()].sort((a, b) => drawn[a].x - drawn[b].x);
    const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
    if (step && order.length) {
      event.preventDefault();
      const now = order.indexOf(selected);
      select(order[now < 0 ? 0 : clamp(now + step, 0, order.length - 1)]);
    } else if (event.key === "Enter") recall(selected);
  });

  // --- long scores, links, code, files

  const scoreBar = h("progress", { max: 1, value: 0, "aria-label": "score with more samples" });
  const scoreText = h("span", { class: "wb-scoretext", "data-testid": "score" });
  const scoreButtons = spec.scores.map((n) => button(`n = ${n}`, `score these settings with ${n} samples`, () => ask({ kind: "score", n }), `score-${n}`));
  const stopButton = button("Stop", "stop scoring and keep what there is", () => ask({ kind: "stop_score" }), "score-stop");

  function drawScore() {
    const now = view.score;
    scoreButtons.forEach((node) => { node.hidden = Boolean(now); });
    scoreBar.hidden = stopButton.hidden = !now;
    if (now) {
      scoreBar.value = now.done / now.n;
      const left = now.eta == null ? "" : `, about ${Math.ceil(now.eta)} s left`;
      scoreText.textContent = `${now.done} of ${now.n}${left}`;
      scoreText.title = now.title;
    } else scoreText.textContent = "";
  }

  const boxText = h("textarea", { readonly: true, rows: 10, "aria-label": "text to copy", spellcheck: "false", "data-testid": "box" });
  const boxNote = h("span", { role: "status" });
  const boxPanel = h("div", { class: "wb-box", hidden: true, role: "dialog", "aria-label": "copy" },
    h("div", { class: "wb-row" }, boxNote, button("Close", "close", () => { boxPanel.hidden = true; }, "box-close")), boxText);
  boxPanel.addEventListener("keydown", (event) => { if (event.key === "Escape") boxPanel.hidden = true; });

  async function offer(text, what) {
    boxPanel.hidden = false;
    boxText.value = text;
    boxText.rows = clamp(text.split("\n").length, 3, 18);
    boxText.focus();
    boxText.select();
    try {
      await navigator.clipboard.writeText(text);
      boxNote.textContent = `${what}: copied to the clipboard.`;
    } catch {
      boxNote.textContent = `${what}: press Ctrl+C to copy.`; // no clipboard without a secure page or permission
    }
  }

  const files = {
    svg: () => download(new Blob([standalone(plot, el).text], { type: "image/svg+xml" }), "frontier.svg"),
    png: () => rasterise(standalone(plot, el), (blob) => download(blob, "frontier.png")),
    images: () => {
      const scale = Math.max(1, Math.round(800 / canvas.width));
      const large = h("canvas", { width: canvas.width * scale, height: canvas.height * scale });
      const pen = large.getContext("2d");
      pen.imageSmoothingEnabled = false;
      pen.drawImage(canvas, 0, 0, large.width, large.height);
      large.toBlob((blob) => download(blob, "samples.png"));
    },
    csv: () => ask({ kind: "csv" }),
  };
  const paste = h("input", { type: "text", placeholder: "paste a link", "aria-label": "paste a link", "data-testid": "paste", spellcheck: "false" });
  const open = () => { if (paste.value.trim()) ask({ kind: "load", link: paste.value.trim() }); };
  paste.addEventListener("keydown", (event) => { if (event.key === "Enter") open(); });
  const onRelease = h("input", { type: "checkbox", "aria-label": "update on release", "data-testid": "on-release" });

  const group = (name, ...nodes) => h("div", { class: "wb-group", role: "group", "aria-label": name }, h("span", {}, name), ...nodes);
  const foot = h("div", { class: "wb-foot" },
    group("score with more samples", ...scoreButtons, scoreBar, stopButton, scoreText),
    group("export", button("SVG", "frontier as SVG", files.svg, "export-svg"), button("PNG", "frontier as PNG", files.png, "export-png"),
      button("Samples", "samples as PNG", files.images, "export-images"), button("CSV", "all runs as CSV", files.csv, "export-csv")),
    group("share", button("Copy link", "copy a link to these settings", () => ask({ kind: "link" }), "copy-link"),
      button("Copy as code", "copy Python code that makes this run", () => ask({ kind: "code" }), "copy-code"), paste, button("Open", "open the pasted link", open, "open-link")),
    h("label", { class: "wb-switch" }, onRelease, "update on release"));

  // --- all together

  const root = h("div", { class: "wb", "data-testid": "explorer", "data-lm-suppress-shortcuts": "true" },
    top, problem,
    h("div", { class: "wb-striprow" }, legend, strip),
    h("div", { class: "wb-columns" },
      h("div", { class: "wb-knobs" }, h("div", { class: "wb-knob" }, h("span", { class: "wb-name" }, "method"), method), source, knobBox),
      h("div", { class: "wb-middle" }, samples, comparison),
      h("div", { class: "wb-numbers" }, costs, qualities)),
    h("div", { class: "wb-frontier" }, h("div", { class: "wb-row" }, h("b", {}, "Quality against cost"), metricSelect, "against", costSelect, nSelect), plotBox),
    foot, boxPanel);
  // JupyterLab's notebook would take Enter and the arrows away from fields
  root.addEventListener("keydown", (event) => event.stopPropagation());
  metricSelect.addEventListener("change", () => { metricSelect.dataset.touched = "1"; });

  // What arrives is drawn with the next frame of the display, once, however much arrives before it.
  const dirty = new Set();
  let due = 0;

  function redraw(...parts) {
    parts.forEach((part) => dirty.add(part));
    due ||= requestAnimationFrame(() => {
      due = 0;
      const now = [...dirty];
      dirty.clear();
      for (const part of now) part();
    });
  }

  let numbersDrawn = "";

  function takeView() {
    view = model.get("view");
    if (view.ack === pending) acknowledge();
    redraw(drawView);
  }

  function drawView() {
    const isAhead = held || pending || queue.length || unsent; // the hand is: its settings stay
    if (isAhead) drawStrip();
    else settle();
    const bad = view.error || view.notice;
    problem.hidden = !bad;
    problem.textContent = bad;
    stale.classList.toggle("wb-on", Boolean(view.is_stale && !view.error));
    status.textContent = view.status ? `idle work: ${view.status}…` : "";
    undo.disabled = !view.can_undo;
    redo.disabled = !view.can_redo;
    const key = view.reference?.key;
    if (!spec.is_image && !law && key && !(key in peeked)) {
      peeked[key] = null;
      ask({ kind: "peek", key });
    }
    const numbers = JSON.stringify([view.shown, view.reference?.key, view.pinned?.key]);
    if (numbers !== numbersDrawn) {
      drawNumbers();
      markShown();
    }
    numbersDrawn = numbers;
    drawScore();
    if (frame) drawCaption();
  }

  function takeReply() {
    const reply = model.get("reply");
    if (!reply.id?.startsWith(client)) return;
    if (reply.kind === "peek") {
      const given = unpack(Uint8Array.from(atob(reply.frame), (c) => c.charCodeAt(0)));
      peeked[given.key] = given;
      if (selected >= 0 && drawn[selected].point.keys[0] === given.key) select(selected);
      if (!spec.is_image && frame) drawFrame();
    } else if (reply.kind === "csv") download(new Blob([reply.text], { type: "text/csv" }), "runs.csv");
    else offer(reply.text, reply.kind === "link" ? "Link to the run shown" : "Code for the run shown");
  }

  const on = { "change:view": takeView, "change:frontier": () => redraw(drawFrontier), "change:frame": () => redraw(drawFrame), "change:pinned": () => redraw(drawPinned), "change:reply": takeReply };
  for (const [event, callback] of Object.entries(on)) model.on(event, callback);
  const watcher = new ResizeObserver(() => { stripWidth = strip.clientWidth || 600; drawStrip(); drawFrontier(); if (frame && !spec.is_image) drawFrame(); });
  el.append(root);
  watcher.observe(root);
  drawControls();
  drawView();
  drawFrame();
  drawPinned();
  drawFrontier();
  return () => {
    watcher.disconnect();
    cancelAnimationFrame(due);
    clearTimeout(timer);
    for (const [event, callback] of Object.entries(on)) model.off?.(event, callback);
  };
}

export default { render };
