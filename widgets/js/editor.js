// Draws what a ScheduleEditor publishes (spec, view, reply and the samples of yours, preset, best) and sends it wishes.
// Runs in JupyterLab through anywidget; imports nothing and asks the network for nothing.

const KINDS = { x0: { colour: "#56b4e9", text: "x₀" }, eps: { colour: "#e69f00", text: "ε" } }; // Okabe-Ito, and two shapes
const ARMS = { yours: "yours", preset: "preset", best: "best found" };
const SHAPES = { yours: "circle", preset: "triangle", best: "diamond" };
const SVG = "http://www.w3.org/2000/svg";
const MAX_PICTURES = 64;
const MERGE_MS = 800; // keys pressed faster than this are one step of the history
const NUDGE = 0.05; // log-SNR per arrow key
const LANE = 34; // height of a row of heads
const HEAD = 26; // width of a head

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

const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
const words = (name) => String(name).replaceAll("_", " ");
const signed = (x, digits = 2) => x.toFixed(digits).replace("-", "−");

function short(x, digits = 3) {
  if (x === 0) return "0";
  const size = Math.abs(x);
  return size >= 1e4 || size < 1e-3 ? x.toExponential(1).replace("-", "−") : `${+x.toPrecision(digits)}`.replace("-", "−");
}

// The value with as many decimals as its standard error has meaning.
function measured(value, stderr) {
  if (stderr == null || !(stderr > 0)) return short(value);
  if (value < 1e-3) return `${short(value, 2)} ± ${short(stderr, 1)}`;
  const decimals = clamp(1 - Math.floor(Math.log10(stderr)), 0, 6);
  return `${value.toFixed(decimals)} ± ${stderr.toFixed(decimals)}`;
}

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

// Samples that are no pictures: a histogram (one axis) or a scatter (the first two axes), over samples of the true law.
// The window is the law's where it is known, so that it stays where it is while a mark moves.
function drawPoints(canvas, frame, under) {
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth || 120, canvas.clientHeight || 120];
  [canvas.width, canvas.height] = [width * ratio, height * ratio];
  canvas.style.imageRendering = "auto";
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const [dim] = frame.shape.slice(1);
  const floats = (f) => new Float32Array(f.values.buffer, f.values.byteOffset, f.values.byteLength >> 2);
  const column = (f, axis) => { const all = floats(f); return Array.from({ length: f.shape[0] }, (_, i) => all[i * dim + axis]); };
  const range = (axis) => {
    const all = column(under ?? frame, axis).sort((a, b) => a - b);
    const pad = (all.at(-1) - all[0]) * 0.12 || 1;
    return [all[0] - pad, all.at(-1) + pad];
  };
  const style = getComputedStyle(canvas);
  pen.font = `11px ${style.fontFamily}`;
  const [left, right, top, bottom] = [8, width - 8, 8, height - 20];
  const xs = range(0);
  const across = (x) => left + ((x - xs[0]) / (xs[1] - xs[0])) * (right - left);
  pen.fillStyle = pen.strokeStyle = style.color;
  pen.textAlign = "center";
  for (const [tick, text] of named(niceTicks(...xs, width < 180 ? 3 : 5), short)) pen.fillText(text, clamp(across(tick), 14, width - 14), height - 5);
  pen.globalAlpha = 0.4;
  pen.strokeRect(left, top, right - left, bottom - top);
  pen.globalAlpha = 1;
  pen.save();
  pen.beginPath();
  pen.rect(left, top, right - left, bottom - top);
  pen.clip();
  if (dim === 1) {
    const bins = 40;
    const counts = (f) => {
      const tally = new Array(bins).fill(0);
      for (const x of column(f, 0)) {
        const bin = Math.floor(((x - xs[0]) / (xs[1] - xs[0])) * bins);
        if (bin >= 0 && bin < bins) tally[bin] += 1 / f.shape[0];
      }
      return tally;
    };
    const [own, other] = [counts(frame), under ? counts(under) : []];
    const tallest = under ? 1.4 * Math.max(...other) : Math.max(...own);
    const bar = (right - left) / bins;
    const up = (c) => (c / tallest) * (bottom - top);
    pen.fillStyle = "#56b4e9";
    own.forEach((c, i) => pen.fillRect(left + i * bar, bottom - up(c), bar - 1, up(c)));
    pen.beginPath();
    other.forEach((c, i) => {
      pen.lineTo(left + i * bar, bottom - up(c));
      pen.lineTo(left + (i + 1) * bar, bottom - up(c));
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
    pen.globalAlpha = 0.35;
    if (under) dots(under, (x, y) => { pen.beginPath(); pen.arc(x, y, 2.4, 0, 7); pen.stroke(); });
    pen.globalAlpha = 0.85;
    pen.fillStyle = "#e69f00";
    dots(frame, (x, y) => { pen.beginPath(); pen.arc(x, y, 2.2, 0, 7); pen.fill(); });
  }
  pen.restore();
}

// ------------------------------------------------------------------------------------------------ axes

function marker(shape, x, y, r) {
  const at = (points) => s("polygon", { points: points.map(([a, b]) => `${x + a * r},${y + b * r}`).join(" ") });
  if (shape === "triangle") return at([[0, -1.2], [1.1, 0.8], [-1.1, 0.8]]);
  if (shape === "diamond") return at([[0, -1.3], [1.3, 0], [0, 1.3], [-1.3, 0]]);
  return s("circle", { cx: x, cy: y, r });
}

// ------------------------------------------------------------------------------------------------ the panel

function render({ model, el }) {
  const spec = model.get("spec");
  const client = Math.random().toString(36).slice(2, 8);
  let view = model.get("view");
  let local = structuredClone(view.marks); // the marks as the hand has them, ahead of Python's
  let selected = Math.min(2, local.steps.length - 1);
  let refusal = ""; // why the last choice was refused
  let held = 0;
  let gesture = 0;
  let lastKey = { name: "", time: 0 };
  const frames = { yours: null, preset: null, best: null };

  // --- wishes: one under way at a time; newer moves of one gesture replace older ones that still wait

  const queue = [];
  let pending = "";
  let serial = 0;
  let timer = 0;

  function ask(intent) {
    const last = queue.at(-1);
    if (intent.kind === "move" && last?.kind === "move" && last.gesture === intent.gesture && last.step === intent.step) last.log_snr = intent.log_snr;
    else queue.push(intent);
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

  function settle() {
    if (held || pending || queue.length) return;
    local = structuredClone(view.marks);
    selected = clamp(selected, 0, lastMark());
    redraw(drawStrip, drawStep);
  }

  // --- top

  const button = (text, label, action, id) => h("button", { type: "button", "aria-label": label, title: label, onclick: action, "data-testid": id }, text);
  const title = h("div", { class: "wb-title", "data-testid": "title" });
  const stale = h("span", { class: "wb-stale", "data-testid": "stale" }, "updating…");
  const status = h("div", { class: "wb-status", role: "status", "data-testid": "status" });
  const problem = h("div", { class: "wb-error", role: "alert", "data-testid": "error", hidden: true });
  const seed = guard(h("input", { type: "number", min: 0, step: 1, "aria-label": "seed", class: "wb-number", "data-testid": "seed",
    onchange: () => ask({ kind: "compare", fields: { seed: Number(seed.value) } }) }));
  const undo = button("↶ Undo", "undo the last change", () => ask({ kind: "undo" }), "undo");
  const redo = button("↷ Redo", "redo", () => ask({ kind: "redo" }), "redo");
  const reset = button("Reset", "back to the schedule at the start", () => ask({ kind: "reset" }), "reset");
  const legend = h("div", { class: "wbe-legend" }, ...Object.entries(KINDS).map(([kind, { colour }]) => h("span", {},
    h("i", { class: `wbe-${kind}`, style: `background:${colour}` }), `${kind} prediction`)), "number: order");
  const top = h("div", { class: "wb-top" },
    h("div", { class: "wb-line" }, title, stale),
    h("div", { class: "wb-tools" }, legend, status, h("label", { class: "wb-seed" }, "seed", seed),
      button("New", "new random seed", () => ask({ kind: "compare", fields: { seed: Math.floor(Math.random() * 10000) } }), "dice"), undo, redo, reset));

  // What is half typed must not be written over by news from Python.
  function guard(field) {
    field.addEventListener("input", () => { field.dataset.typing = "1"; });
    for (const end of ["change", "blur"]) field.addEventListener(end, () => { delete field.dataset.typing; }, true);
    return field;
  }

  // --- the strip: marks along log-SNR

  const LEFT = 62; // names of the rows
  const RIGHT = 46; // the data lies at infinity
  const EDGE = HEAD / 2 + 2;
  let width = 700;
  const back = s("g");
  const stems = s("g"); // behind all heads
  const marksBox = s("g");
  const strip = s("svg", { class: "wbe-strip", role: "group", "data-testid": "strip", "aria-label": "schedule: one mark per solver step along log-SNR, noise left, data right" }, back, stems, marksBox);
  const marks = [];
  const [low, high] = spec.range;
  const across = (level) => LEFT + EDGE + ((level - low) / (high - low)) * (width - LEFT - RIGHT - 2 * EDGE);
  const levelAt = (x) => low + ((x - LEFT - EDGE) / (width - LEFT - RIGHT - 2 * EDGE)) * (high - low);
  const atData = () => width - RIGHT / 2 - 4;
  const lastMark = () => local.levels.length - 1 - (local.levels.at(-1) === null); // the end at the data is no mark

  function room(i) {
    const { levels } = local;
    const next = levels[i + 1];
    return [i ? levels[i - 1] + spec.gap : low, next == null ? high : next - spec.gap];
  }

  function move(i, level) {
    const [from, to] = room(i);
    if (from > to) return;
    const place = clamp(level, from, to);
    if (Math.abs(place - local.levels[i]) < 1e-9) return;
    local.levels[i] = place;
    redraw(drawStrip, drawStep);
    ask({ kind: "move", step: i, log_snr: place, gesture: `${client}-${gesture}` });
  }

  function decide(field, value, i = selected) {
    const found = view.options[i]?.[field]?.find(([v]) => v === value);
    if (found?.[1]) {
      refusal = `${words(field)} ${value}: ${found[1]}`;
      redraw(drawStep);
      return;
    }
    refusal = "";
    ask({ kind: "decide", step: i, fields: { [field]: value } });
  }

  function nextOrder(i) {
    const now = local.steps[i].order;
    const allowed = view.options[i].order.filter(([, why]) => !why).map(([v]) => v);
    const next = allowed.find((v) => v > now) ?? allowed[0];
    if (next !== now) decide("order", next, i);
    else decide("order", (now % 4) + 1, i); // says why not
  }

  const toggle = (i) => decide("prediction", local.steps[i].prediction === "x0" ? "eps" : "x0", i);

  function select(i) {
    selected = clamp(i, 0, lastMark());
    refusal = "";
    redraw(drawStrip, drawStep);
  }

  function makeMark(i) {
    const hit = s("rect", { class: "wbe-hit", x: -HEAD / 2, width: HEAD });
    const stem = s("line", { class: "wbe-stem" });
    const head = s("path", { class: "wbe-head" });
    const digit = s("text", { class: "wbe-digit" });
    const kind = s("text", { class: "wbe-kind" });
    const extra = s("text", { class: "wbe-extra" });
    const tip = s("title");
    const node = s("g", { class: "wbe-mark", tabindex: 0, role: "slider", "aria-orientation": "horizontal", "data-testid": `handle-${i}` }, tip, hit, head, digit, kind, extra);
    node.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      const wasOn = node.matches(":focus"); // a first click only selects
      node.focus();
      select(i);
      node.setPointerCapture(event.pointerId);
      held += 1;
      gesture += 1;
      lastKey = { name: "", time: 0 };
      const begin = { x: event.clientX, level: local.levels[i], isBelow: event.clientY > head.getBoundingClientRect().top + 17 };
      let moved = false;
      const drag = (e) => {
        if (!moved && Math.abs(e.clientX - begin.x) < 3) return;
        moved = true;
        const scale = (strip.getBoundingClientRect().width || width) / width;
        move(i, levelAt(across(begin.level) + (e.clientX - begin.x) / scale));
      };
      node.addEventListener("pointermove", drag);
      node.addEventListener("lostpointercapture", () => {
        node.removeEventListener("pointermove", drag);
        held -= 1;
        if (!moved && wasOn && local.steps[i]) {
          if (begin.isBelow) toggle(i);
          else nextOrder(i);
        }
        settle();
      }, { once: true });
    });
    node.addEventListener("focus", () => { if (selected !== i) select(i); });
    node.addEventListener("keydown", (event) => {
      const step = event.shiftKey ? NUDGE / 5 : NUDGE;
      const by = { ArrowLeft: -step, ArrowDown: -step, ArrowRight: step, ArrowUp: step, PageDown: -10 * NUDGE, PageUp: 10 * NUDGE, Home: -Infinity, End: Infinity }[event.key];
      const isStep = i < local.steps.length;
      if (by !== undefined) {
        beginGesture(`mark-${i}`);
        move(i, local.levels[i] + by);
      } else if (isStep && /^[1-4]$/.test(event.key)) decide("order", Number(event.key), i);
      else if (isStep && event.key === "p") toggle(i);
      else if (isStep && (event.key === "+" || event.key === "Insert")) ask({ kind: "add", step: i });
      else if (isStep && (event.key === "Delete" || event.key === "Backspace")) ask({ kind: "remove", step: i });
      else return;
      event.preventDefault();
    });
    marksBox.append(node);
    stems.append(stem);
    return { node, hit, stem, head, digit, kind, extra, tip };
  }

  // The row of each head: the lowest in which it does not cover the one before.
  function lanes() {
    const ends = [];
    return local.levels.slice(0, lastMark() + 1).map((level) => {
      const x = across(level);
      let lane = ends.findIndex((end) => x - HEAD / 2 >= end + 2);
      if (lane < 0) lane = ends.length < 4 ? ends.length : ends.indexOf(Math.min(...ends));
      ends[lane] = x + HEAD / 2;
      return lane;
    });
  }

  const others = () => Object.entries(view.arms).filter(([arm]) => arm !== "yours");

  function drawStrip() {
    const count = lastMark() + 1;
    while (marks.length < count) marks.push(makeMark(marks.length));
    const rows = lanes();
    const top = 6 + LANE * Math.max(...rows, 1);
    const ground = top + LANE + 10;
    const rowsBelow = others();
    const height = ground + 22 + 17 * rowsBelow.length + 16;
    strip.setAttribute("height", height);
    strip.setAttribute("viewBox", `0 0 ${width} ${height}`);
    marks.forEach((mark, i) => {
      mark.node.style.display = mark.stem.style.display = i < count ? "" : "none";
      if (i >= count) return;
      const [x, y] = [across(local.levels[i]), top - LANE * rows[i]];
      const step = local.steps[i];
      mark.node.setAttribute("transform", `translate(${x},0)`);
      mark.node.setAttribute("class", `wbe-mark${i === selected ? " wbe-on" : ""}${step ? "" : " wbe-end"}`);
      mark.hit.setAttribute("y", y);
      mark.hit.setAttribute("height", LANE);
      mark.stem.setAttribute("class", `wbe-stem${i === selected ? " wbe-on" : ""}`);
      mark.stem.setAttribute("x1", x);
      mark.stem.setAttribute("x2", x);
      mark.stem.setAttribute("y1", y + LANE - 6);
      mark.stem.setAttribute("y2", ground + 5);
      const r = HEAD / 2 - 1;
      const bottom = y + LANE - 6;
      // data estimates round, noise estimates square
      mark.head.setAttribute("d", step?.prediction === "x0"
        ? `M${-r},${y + r}A${r},${r} 0 0 1 ${r},${y + r}V${bottom - r}A${r},${r} 0 0 1 ${-r},${bottom - r}Z` : `M${-r},${y}H${r}V${bottom}H${-r}Z`);
      if (step) mark.head.setAttribute("fill", KINDS[step.prediction].colour);
      else mark.head.setAttribute("d", `M${-7},${y + 14}H7V${bottom}H-7Z`);
      mark.digit.setAttribute("y", y + 14);
      mark.digit.textContent = step ? step.order : "";
      mark.kind.setAttribute("y", y + 24);
      mark.kind.textContent = step ? KINDS[step.prediction].text : "";
      mark.extra.setAttribute("x", HEAD / 2 + 2);
      mark.extra.setAttribute("y", y + 6);
      mark.extra.textContent = !step || step.corrector === "none" ? "" : step.corrector === "pseudo" ? "c" : "C";
      const name = step ? `step ${i + 1} of ${local.steps.length}` : "end of the schedule";
      const noise = `log-SNR ${signed(local.levels[i])}, noise ${short(Math.exp(-local.levels[i]))} times the signal`;
      const what = step ? `order ${step.order}, ${step.prediction} prediction${step.corrector === "none" ? "" : `, ${step.corrector} corrector`}` : "";
      mark.node.setAttribute("aria-label", name);
      mark.node.setAttribute("aria-valuetext", [noise, what].filter(Boolean).join("; "));
      mark.node.setAttribute("aria-valuenow", +local.levels[i].toFixed(4));
      const [from, to] = room(i);
      mark.node.setAttribute("aria-valuemin", +from.toFixed(4));
      mark.node.setAttribute("aria-valuemax", +to.toFixed(4));
      mark.tip.textContent = `${name}: ${noise}. ${what}${step ? "\nDrag or arrow keys: move. 1-4: order. p: x0 or eps. + and Delete: add, remove.\nClick again: next order; on the letter: x0 or eps." : ""}`;
    });
    drawGround(ground, rowsBelow, top - LANE * Math.max(...rows));
  }

  function drawGround(ground, rowsBelow, highest) {
    const nodes = [s("text", { class: "wbe-row", x: 0, y: ground - 14 }, "yours"), s("line", { class: "wbe-ground", x1: LEFT, x2: width - RIGHT, y1: ground, y2: ground })];
    if (local.levels.at(-1) === null) {
      nodes.push(s("line", { class: "wbe-ground", x1: width - RIGHT, x2: atData(), y1: ground, y2: ground, "stroke-dasharray": "3 3" }),
        s("circle", { cx: atData(), cy: ground, r: 4, fill: "var(--wb-fg)" }));
    }
    nodes.push(s("text", { x: atData(), y: ground - 9, "text-anchor": "middle" }, "data"));
    rowsBelow.forEach(([arm, given], k) => {
      const y = ground + 17 * (k + 1);
      nodes.push(s("text", { x: 0, y: y + 4 }, ARMS[arm]), s("line", { class: "wbe-tick", x1: LEFT, x2: width - RIGHT, y1: y, y2: y, opacity: 0.2 }));
      for (const level of given.levels) {
        const mark = marker(SHAPES[arm], level === null ? atData() : across(level), y, 4);
        mark.setAttribute("class", "wbe-other");
        mark.setAttribute("fill", `var(--wbe-${arm === "preset" ? "theirs" : "found"})`);
        nodes.push(mark);
      }
    });
    const bottom = ground + 17 * rowsBelow.length + 10;
    for (const [tick, text] of named(niceTicks(low, high, Math.round(width / 70)), signed, 0)) {
      nodes.push(s("line", { class: "wbe-tick", x1: across(tick), x2: across(tick), y1: bottom, y2: bottom + 5 }), s("text", { x: across(tick), y: bottom + 17, "text-anchor": "middle" }, text));
    }
    nodes.push(s("text", { x: 0, y: bottom + 17 }, "log-SNR"));
    back.replaceChildren(...nodes);
  }

  strip.addEventListener("dblclick", (event) => {
    if (event.target.closest(".wbe-mark")) return;
    const box = strip.getBoundingClientRect();
    const level = levelAt(((event.clientX - box.left) * width) / box.width);
    const inside = local.levels.filter((v) => v !== null && v < level).length;
    if (inside) ask({ kind: "add", step: inside - 1, log_snr: clamp(level, low, high) });
  });

  // --- the selected step

  const heading = h("h4", { "data-testid": "step-title" });
  const where = h("div", { class: "wbe-wide wbe-where" });
  const reason = h("div", { class: "wbe-wide wbe-reason", role: "status", "data-testid": "reason" });
  const level = guard(h("input", { type: "number", step: NUDGE, "aria-label": "log-SNR of the selected mark", "data-testid": "level",
    onchange: () => { beginGesture(); ask({ kind: "move", step: selected, log_snr: Number(level.value), gesture: `${client}-${gesture}` }); } }));
  const NAMES = { order: "order", prediction: "prediction", relaxation: "relaxation", start: "starts from", corrector: "corrector", correction_order: "its order" };
  const HELP = {
    order: "terms of the Taylor expansion; each needs one earlier evaluation", prediction: "what is expanded: the data estimate x0 or the noise estimate eps",
    relaxation: "a factor 1 + O(h) of the first derivative; bh1 and bh2 are UniPC's", start: "the point that is expanded around: the current one (multistep) or an earlier one (singlestep)",
    corrector: "on arrival: correct the state by the evaluation there, for free or with one evaluation more", correction_order: "terms of the correction",
  };
  const TEXTS = { start: (v) => v ? `${v} back` : "here", corrector: (v) => ({ none: "none", pseudo: "pseudo (free)", implicit: "implicit (+1 evaluation)" }[v]) };
  const choices = Object.fromEntries(spec.fields.map((field) => {
    const node = h("select", { "aria-label": `${NAMES[field]} of the selected step`, "data-testid": `step-${field}`, onchange: () => decide(field, view.options[selected][field][node.selectedIndex][0]) });
    return [field, node];
  }));
  const addButton = button("+ Add a step", "divide the selected step in two", () => ask({ kind: "add", step: Math.min(selected, local.steps.length - 1) }), "add");
  const removeButton = button("− Remove", "remove the selected step", () => ask({ kind: "remove", step: selected }), "remove");
  const stepBox = h("div", { class: "wbe-step", role: "group", "aria-label": "the selected step" }, heading, where,
    h("span", {}, "log-SNR"), level,
    ...spec.fields.flatMap((field) => [h("span", { "data-for": field }, NAMES[field]), choices[field]]),
    reason, h("div", { class: "wbe-wide wbe-buttons" }, addButton, removeButton));

  function drawStep() {
    const n = local.steps.length;
    const isStep = selected < n;
    const [a, b] = [local.levels[selected], local.levels[selected + 1]];
    heading.textContent = isStep ? `Step ${selected + 1} of ${n}` : "End of the schedule";
    where.textContent = isStep ? `from log-SNR ${signed(a)} to ${b == null ? "the data" : signed(b)}; σ/α\u00a0=\u00a0${short(Math.exp(-a))}` : `log-SNR ${signed(a)}; σ/α\u00a0=\u00a0${short(Math.exp(-a))}`;
    if (!level.dataset.typing) level.value = a.toFixed(3);
    const options = isStep && view.options.length === n ? view.options[selected] : null;
    const refused = [];
    for (const [field, node] of Object.entries(choices)) {
      const values = options?.[field] ?? [];
      const now = JSON.stringify(values);
      if (node.dataset.values !== now) {
        node.dataset.values = now;
        node.replaceChildren(...values.map(([v, why]) => h("option", { value: v, disabled: Boolean(why), title: why }, TEXTS[field]?.(v) ?? words(v))));
      }
      node.selectedIndex = isStep ? values.findIndex(([v]) => v === local.steps[selected][field]) : -1;
      const open = values.filter(([v, why]) => !why || v === local.steps[selected]?.[field]);
      node.disabled = open.length < 2;
      const [value, why] = values.find(([v, w]) => w && v !== local.steps[selected]?.[field]) ?? [];
      node.title = why ?? HELP[field];
      if (why && (field === "order" || field === "corrector")) refused.push(`${field === "order" ? `order ${value}` : "corrector"}: ${why}`);
      const isMoot = field === "correction_order" && (!isStep || local.steps[selected].corrector === "none");
      node.hidden = isMoot;
      stepBox.querySelector(`[data-for=${field}]`).hidden = isMoot;
    }
    reason.textContent = refusal || `not here: ${refused.join("; ")}`.replace(/^not here: $/, "");
    removeButton.disabled = !isStep || n < 2;
    addButton.disabled = n >= spec.max_steps;
  }

  // --- samples

  const canvases = {};
  const captions = {};
  const figures = {};
  for (const arm of Object.keys(ARMS)) {
    canvases[arm] = h("canvas", { role: "img", "aria-label": `samples: ${ARMS[arm]}`, "data-testid": arm === "yours" ? "samples" : `samples-${arm}`, "data-revision": 0, "data-key": "" });
    captions[arm] = h("figcaption");
    figures[arm] = h("figure", { hidden: arm === "best" && !spec.has_best }, canvases[arm], captions[arm]);
  }
  const samples = h("div", { class: "wbe-samples" }, ...Object.values(figures));
  const law = spec.law ? unpack(Uint8Array.from(atob(spec.law), (c) => c.charCodeAt(0))) : null;

  function drawFrame(arm) {
    const frame = unpack(model.get(arm)) ?? frames[arm];
    if (!frame) return;
    frames[arm] = frame;
    if (spec.is_image) drawPictures(canvases[arm], frame);
    else drawPoints(canvases[arm], frame, law);
    Object.assign(canvases[arm].dataset, { revision: frame.revision, key: frame.revision, step: frame.step });
    canvases[arm].setAttribute("aria-label", `samples, ${ARMS[arm]}: ${frame.title}, after step ${frame.step} of ${frame.of}`);
    drawCaptions();
  }
  const drawers = Object.fromEntries(Object.keys(ARMS).map((arm) => [arm, () => drawFrame(arm)]));

  function drawCaptions() {
    for (const arm of Object.keys(ARMS)) {
      const given = view.arms[arm];
      const frame = frames[arm];
      figures[arm].hidden = !given;
      const isEarly = Boolean(frame && frame.step < frame.of);
      const note = isEarly ? `estimate at step ${frame.step} of ${frame.of}` : given?.error ? `error ${measured(given.error[0], given.error[1])}` : given ? "…" : "";
      captions[arm].replaceChildren(h("b", {}, ARMS[arm]), given ? given.title : "", h("br"), note);
      captions[arm].classList.toggle("wbe-early", isEarly);
    }
  }

  // --- numbers and the curve

  const table = h("table", { class: "wbe-table", "data-testid": "table" });
  const curve = s("svg", { class: "wbe-curve", height: 230, role: "img", "data-testid": "curve" });
  const curveTitle = h("div", { class: "wbe-help wbe-over" }, `${spec.curve}, ${spec.is_image ? "RMS of the state" : "RMS"}`);

  function swatch(arm) {
    const svg = s("svg", { class: "wbe-swatch", viewBox: "0 0 22 10", "aria-hidden": "true" }, s("line", { class: `wbe-line wbe-${arm}`, x1: 0, x2: 22, y1: 5, y2: 5 }));
    const dot = marker(SHAPES[arm], 11, 5, 3.4);
    dot.setAttribute("fill", colourOf(arm));
    svg.append(dot);
    return svg;
  }
  const colourOf = (arm) => `var(--wbe-${{ yours: "ours", preset: "theirs", best: "found" }[arm]})`;

  function drawNumbers() {
    const known = Object.entries(view.arms).filter(([, a]) => a.error);
    const least = Math.min(...known.map(([, a]) => a.error[0]));
    const base = view.arms.preset?.error?.[0];
    table.replaceChildren(
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, ""), h("th", { scope: "col" }, "evaluations"), h("th", { scope: "col", title: spec.unit }, "error at the end"), h("th", { scope: "col" }, "to the preset"))),
      h("tbody", {}, ...Object.entries(view.arms).map(([arm, a]) => h("tr", { class: known.length > 1 && a.error?.[0] === least ? "wbe-winner" : "", "data-arm": arm },
        h("th", { scope: "row" }, swatch(arm), ARMS[arm]), h("td", {}, a.evaluations == null ? "…" : short(a.evaluations)),
        h("td", {}, a.error ? measured(a.error[0], a.error[1]) : "…"), h("td", {}, a.error && base ? `× ${short(a.error[0] / base)}` : "…")))));
    const n = known[0]?.[1].error[2];
    note.textContent = `evaluations per sample; error: distance from ${spec.truth}, ${spec.unit}${n ? `; n = ${n}, same noise for all` : ""}`;
    drawCurve();
  }
  const note = h("div", { class: "wbe-help" });

  function drawCurve() {
    const full = curve.clientWidth || 320;
    const height = 230;
    const box = { left: 48, right: full - 44, top: 10, bottom: height - 34 };
    const lines = Object.entries(view.arms).map(([arm, a]) => [arm, a.curve.filter(([, y]) => y > 0)]).filter(([, line]) => line.length);
    curve.replaceChildren();
    if (!lines.length) {
      curve.append(s("text", { x: full / 2, y: height / 2, "text-anchor": "middle" }, `no errors yet: ${spec.truth.replace(/ \(.*/, "")} is being computed`));
      return;
    }
    const values = lines.flatMap(([, line]) => line.map(([, y]) => y));
    const [y0, y1] = [Math.min(...values) / 1.5, Math.max(...values) * 1.5];
    const X = (x) => x == null ? full - 20 : box.left + ((x - low) / (high - low)) * (box.right - box.left);
    const Y = (y) => box.bottom - (Math.log(y / y0) / Math.log(y1 / y0)) * (box.bottom - box.top);
    for (const [t, text] of named(logTicks(y0, y1), (x, d) => (x < 1e-3 ? x.toExponential(d - 3).replace("-", "−") : short(x, d)))) curve.append(s("line", { class: "wbe-gridline", x1: box.left, x2: full, y1: Y(t), y2: Y(t) }), s("text", { x: box.left - 5, y: Y(t) + 4, "text-anchor": "end" }, text));
    for (const [t, text] of named(niceTicks(low, high, 5), signed, 0)) curve.append(s("text", { x: X(t), y: box.bottom + 16, "text-anchor": "middle" }, text));
    curve.append(s("text", { x: full - 20, y: box.bottom + 16, "text-anchor": "middle" }, "data"), s("text", { x: (box.left + box.right) / 2, y: height - 4, "text-anchor": "middle" }, "log-SNR"));
    for (const [arm, line] of lines.reverse()) { // yours on top
      curve.append(s("polyline", { class: `wbe-line wbe-${arm}`, points: line.map(([x, y]) => `${X(x)},${Y(y)}`).join(" ") }));
      for (const [x, y] of line) {
        const dot = marker(SHAPES[arm], X(x), Y(y), 3.6);
        dot.setAttribute("class", "wbe-dot");
        dot.setAttribute("fill", colourOf(arm));
        curve.append(dot);
      }
    }
    curve.setAttribute("aria-label", `${spec.curve} along log-SNR: ${lines.map(([arm, line]) => `${ARMS[arm]} ends at ${short(line.at(-1)[1])}`).join(", ")}`);
  }

  // --- what it is compared with

  const menu = (name, label, values) => {
    const node = h("select", { "aria-label": label, "data-testid": name, onchange: () => ask({ kind: "compare", fields: { [name]: node.value } }) }, ...values.map(([v, text]) => h("option", { value: v }, text)));
    return node;
  };
  const menus = {
    preset: menu("preset", "preset compared with", spec.presets.map((v) => [v, v])),
    spacing: menu("spacing", "spacing of the preset", spec.spacings.map((v) => [v, v])),
    final: menu("final", "where the preset ends", spec.finals.map((v) => [v, v === "zero" ? "ends at the data" : "ends at the cleanest level"])),
  };
  const compare = h("div", { class: "wbe-compare", role: "group", "aria-label": "compare with" }, h("span", {}, "compare with"), menus.preset, "on", menus.spacing, menus.final,
    h("span", { class: "wbe-help" }, "at equal evaluations"), button("Start from it", "replace your schedule by this preset", () => ask({ kind: "use" }), "use"),
    spec.has_best ? button("Start from the best found", "replace your schedule by the best one found", () => ask({ kind: "use_best" }), "use-best") : null);

  // --- plans and code in and out

  const boxText = h("textarea", { readonly: true, rows: 8, "aria-label": "text to copy", spellcheck: "false", "data-testid": "box" });
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

  const paste = h("input", { type: "text", class: "wbe-paste", placeholder: "paste a plan (JSON)", "aria-label": "paste a plan", "data-testid": "paste", spellcheck: "false" });
  const open = () => { if (paste.value.trim()) ask({ kind: "load", text: paste.value.trim() }); };
  paste.addEventListener("keydown", (event) => { if (event.key === "Enter") open(); });
  const foot = h("div", { class: "wb-foot" },
    h("div", { class: "wb-group", role: "group", "aria-label": "share" },
      button("Copy plan", "copy the plan as JSON", () => ask({ kind: "json" }), "copy-plan"), button("Copy as code", "copy Python code that runs the plan", () => ask({ kind: "code" }), "copy-code"),
      paste, button("Open", "open the pasted plan", open, "open-plan")),
    h("span", { class: "wbe-help" }, "drag a mark, or arrow keys (Shift: finer); 1–4 order, p prediction, + and Delete; double click on the line adds a step; c, C: pseudo, implicit corrector"));

  // --- all together

  const root = h("div", { class: "wb wbe", "data-testid": "schedule-editor", "data-lm-suppress-shortcuts": "true" },
    top, problem, strip, compare,
    h("div", { class: "wbe-columns" }, stepBox, samples,
      h("div", { class: "wbe-right" }, h("div", {}, table, note), h("div", {}, curveTitle, curve))),
    foot, boxPanel);
  // JupyterLab's notebook would take Enter and the arrows away from fields
  root.addEventListener("keydown", (event) => event.stopPropagation());

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

  function takeView() {
    view = model.get("view");
    if (view.ack === pending) acknowledge();
    redraw(drawView);
  }

  function drawView() {
    const isAhead = held || pending || queue.length;
    if (isAhead && local.steps.length === view.marks.steps.length) local.steps = structuredClone(view.marks.steps);
    if (!isAhead) settle();
    const bad = view.error || view.notice;
    problem.hidden = !bad;
    problem.textContent = bad;
    stale.classList.toggle("wb-on", Boolean(view.is_stale && !view.error));
    status.textContent = view.status ? `${view.status}…` : view.missing;
    const { evaluations } = view;
    title.textContent = title.title = `${view.arms.yours.title} · ${evaluations} evaluation${evaluations === 1 ? "" : "s"} · seed ${view.seed} · ${view.n_samples} samples`;
    if (!seed.dataset.typing) seed.value = view.seed;
    undo.disabled = !view.can_undo;
    redo.disabled = !view.can_redo;
    for (const [name, node] of Object.entries(menus)) node.value = view.compare[name];
    drawNumbers();
    drawCaptions();
    redraw(drawStrip, drawStep);
  }

  function takeReply() {
    const reply = model.get("reply");
    if (reply.id?.startsWith(client)) offer(reply.text, reply.kind === "json" ? "The plan" : "Code for the plan");
  }

  const on = { "change:view": takeView, "change:reply": takeReply };
  for (const arm of Object.keys(ARMS)) on[`change:${arm}`] = () => redraw(drawers[arm]);
  for (const [event, callback] of Object.entries(on)) model.on(event, callback);
  const watcher = new ResizeObserver(() => {
    width = strip.clientWidth || 700;
    redraw(drawStrip, drawCurve, ...(spec.is_image ? [] : Object.values(drawers)));
  });
  el.append(root);
  watcher.observe(root);
  drawView();
  for (const draw of Object.values(drawers)) draw();
  return () => {
    watcher.disconnect();
    cancelAnimationFrame(due);
    clearTimeout(timer);
    for (const [event, callback] of Object.entries(on)) model.off?.(event, callback);
  };
}

export default { render };
