// The strip of denoising: which model takes which step, with handles where one hands over to the next.

const MAX_CELLS = 60; // beyond, cells of one model merge

function stripPanel(spec, link, view) {
  const hue = (m) => colour(spec.models[m].colour);
  let now = null; // the frame shown
  const cells = s("g");
  const axis = s("g", { class: "wb-axis" });
  const progress = s("rect", { class: "wb-progress", y: 44, height: 3, x: 0, width: 0 });
  const strip = s("svg", { class: "wb-strip", height: 78, "data-testid": "strip", role: "group", "aria-label": "trajectory: which model takes which step" }, cells, progress, axis);
  const chips = spec.models.map(() => h("b"));
  const legend = h("div", { class: "wb-legend", "data-testid": "counts" }, ...spec.models.map((entry, m) => h("span", { class: "wb-chip" },
    h("i", { style: `background:${hue(m)}` }, entry.letter), entry.name === entry.letter ? "" : `${entry.name} `, chips[m])), "steps");
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
      link.hold();
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
      link.begin(`handle-${k}`);
      moveHandle(k, to);
    });
    strip.append(node);
    return node;
  });

  const hasHandles = () => "fractions" in link.local.knobs && spec.models.length > 1;
  const isReversed = () => link.local.knobs.order === "costly_first";

  // Share of the trajectory reached after each step. With handles, until Python has answered for a new number of steps:
  // even steps. Without, only the method knows how many steps there are.
  function reached() {
    const n = hasHandles() ? link.local.knobs.n_steps : view().strip.log_snr.length;
    return view().strip.reached.length === n ? view().strip.reached : Array.from({ length: n }, (_, i) => (i + 1) / n);
  }

  function cumulated() { // shares at which one model hands over to the next, in the order along the trajectory
    const given = link.local.knobs.fractions;
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
    link.change({ knobs: { fractions: parts.slice(0, -1) } });
  }

  // Steps per model in the order along the trajectory: [[model index, steps], ...].
  function owned() {
    const K = spec.models.length;
    const order = [...Array(K).keys()];
    if (!hasHandles()) return view().strip.owned;
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
  function draw() {
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
      rect.setAttribute("fill", hue(m));
      const { letter } = spec.models[m];
      text.textContent = x(to) - x(from) > 7 * letter.length + 3 ? letter : "";
    });
    drawAxis(n, x);
    drawHandles(n, x, parts);
    drawProgress();
  }

  function drawAxis(n, x) {
    const noise = view().strip.log_snr;
    const shape = JSON.stringify([stripWidth, n, noise, view().strip.is_open]);
    if (shape === axis.dataset.shape || noise.length !== n) return;
    axis.dataset.shape = shape;
    axis.replaceChildren();
    const stride = Math.max(1, Math.ceil((n * 46) / (stripWidth - 120)));
    for (let j = 0; j < n && x(j) <= stripWidth - 70; j += stride) {
      axis.append(s("line", { x1: x(j), x2: x(j), y1: 48, y2: 52 }), s("text", { x: x(j), y: 63, "text-anchor": j ? "middle" : "start" }, noise[j] == null ? "−∞" : signed(noise[j], 1)));
    }
    axis.append(s("text", { x: EDGE, y: 76 }, view().strip.is_open ? "as many steps as the error asks: known after the run" : "noise level: log-SNR before the step"),
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
    chips.forEach((chip, m) => { chip.textContent = view().strip.is_open && byModel[m] ? "?" : byModel[m]; });
  }

  function drawProgress() {
    const done = now && !now.is_done && now.of ? now.step / now.of : 1;
    progress.setAttribute("x", EDGE);
    progress.setAttribute("width", Math.max((stripWidth - 2 * EDGE) * done, 0));
    progress.style.opacity = done < 1 ? 1 : 0;
  }

  return {
    node: h("div", { class: "wb-striprow" }, legend, strip), draw,
    resize() { stripWidth = strip.clientWidth || 600; draw(); },
    showFrame(frame) { now = frame; drawProgress(); },
  };
}
