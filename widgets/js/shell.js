// The explorer: what an Explorer publishes (spec, view, frontier, frame, pinned, detail, reply), drawn, and its wishes sent.

function render({ model, el }) {
  const spec = model.get("spec");
  let view = model.get("view");
  let frontier = model.get("frontier");
  let frame = null;
  let metric = "";
  const peeked = {}; // frames by key, for hovering and for the reference's samples
  const redraw = painter();
  const onRelease = h("input", { type: "checkbox", "aria-label": "update on release", "data-testid": "on-release" });
  const link = connect(model, {
    restate: (atOnce) => (atOnce ? drawControls() : redraw(drawControls)),
    waiting: () => { head.status.textContent = WAITING; },
    isOnRelease: () => onRelease.checked,
  });
  const { ask } = link;
  const law = spec.law ? unpack(decode64(spec.law)).panes[0] : null;
  const under = () => law ?? peeked[view.reference?.key]?.panes.find((pane) => pane.kind === "points"); // what points are drawn over
  const context = { link, model, redraw, under };

  // --- top: title, status, history

  const pin = button("Pin as A", "keep what is shown beside what follows", () => ask({ kind: view.pinned ? "unpin" : "pin" }), "pin");
  const reseed = (seed) => { link.begin(); link.change({ state: { seed } }); };
  const head = headPart({ ask, reseed, after: pin });

  const knobs = knobPanel(spec, link);
  const strip = spec.strip ? stripPanel(spec, link, () => view) : null;

  function drawControls() {
    head.showSeed(link.local.seed);
    knobs.draw();
    strip?.draw();
  }

  // --- what is made: panes, made as frames first bring them

  const own = {}; // by name: what draws the pane, of the run shown
  const theirs = {}; // and of the pinned one
  const ownBox = h("div", { class: "wb-panes", "data-testid": "panes" });
  const pinnedBox = h("div", { class: "wb-panes" });
  const sideBox = h("div", { class: "wb-sides" });
  const caption = h("div", { class: "wb-caption" }, "B");
  const pinnedCaption = h("div", { class: "wb-caption" });
  const pinnedSide = h("figure", { class: "wb-side", hidden: true }, pinnedBox, pinnedCaption);
  const samples = h("div", { class: "wb-samples" }, pinnedSide, h("figure", { class: "wb-side" }, ownBox, caption));
  const exports = h("span");

  function drawPanes(kept, box, given, isPinned) {
    for (const pane of given.panes) {
      if (!kept[pane.name]) {
        const made = kept[pane.name] = PANES[pane.kind](spec, { ...context, isPinned });
        if (made.canvas) {
          made.canvas.classList.toggle("wb-small", Boolean(pane.small));
          made.canvas.dataset.testid = isPinned ? "pinned" : pane.name;
          if (isPinned) made.canvas.setAttribute("aria-label", "samples of the pinned run");
        }
        box.append(pane.title ? h("div", {}, h("b", { class: "wb-panetitle" }, pane.title), made.node) : made.node);
        if (made.side) sideBox.append(made.side);
        if (!isPinned) exports.append(...Object.entries(made.files ?? {}).map(([text, [about, action, id]]) => button(text, about, () => action(el), id)));
      }
      kept[pane.name].draw(pane, given);
    }
  }

  const stepOf = ({ step, of }) => `step ${step}${of ? ` of ${of}` : ""}`;

  function drawFrame() {
    const next = unpack(model.get("frame"));
    if (!next) return;
    frame = next;
    drawPanes(own, ownBox, frame, false);
    for (const { canvas } of Object.values(own)) {
      if (!canvas) continue;
      Object.assign(canvas.dataset, { revision: frame.revision, key: frame.key, step: frame.step, of: frame.of });
      canvas.setAttribute("aria-label", `samples of ${frame.title}, ${frame.is_done ? "finished" : `after ${stepOf(frame)}`}`);
    }
    Object.assign(ownBox.dataset, { revision: frame.revision, key: frame.key });
    exportImages.hidden = !Object.values(own).some((made) => made.canvas);
    head.entitle(frame.title);
    strip?.showFrame(frame);
    drawCaption();
  }

  function drawCaption() {
    const first = frame?.panes[0];
    const [n] = first?.values?.shape ?? [0];
    const some = first?.kind === "pictures" && n > MAX_PICTURES ? `the first ${MAX_PICTURES} of ${n} samples` : "";
    const key = first?.kind === "points" ? `filled: this run${under() ? `; outline: ${law ? "the true law" : "the reference"}` : ""}` : "";
    const early = frame && !frame.is_done && frame.step != null ? `estimate at ${stepOf(frame)}` : "";
    caption.textContent = [view.pinned ? "B, this run" : "", early, some, key, first?.caption].filter(Boolean).join(" · ") || "\u00a0";
    caption.classList.toggle("wb-early", Boolean(early));
  }

  function drawPinned() {
    const given = unpack(model.get("pinned"));
    pinnedSide.hidden = !given;
    samples.classList.toggle("wb-two", Boolean(given));
    if (given) drawPanes(theirs, pinnedBox, given, true);
    if (frame) Object.values(own).forEach((made) => made.again?.());
    if (frame?.panes[0]?.kind === "points") drawFrame();
  }

  // --- cost and quality

  const costs = h("div", { class: "wb-costs", "data-testid": "costs" });
  const comparison = h("div", { class: "wb-comparison", "data-testid": "comparison", hidden: true });
  const qualities = h("table", { class: "wb-quality", "data-testid": "quality" });

  function bar({ id, name, parts, unit }, text, against, note) {
    const total = sum(parts);
    const full = Math.max(against ?? total, total) || 1;
    return h("div", { class: "wb-bar", "data-cost": id },
      h("div", { class: "wb-bartext" }, h("span", {}, name), h("b", {}, unit ? `${text} ${unit}` : text)),
      h("div", { class: "wb-track", role: "img", "aria-label": `${name}: ${text}` },
        ...parts.map((part, m) => (part > 0 ? h("span", { style: `width:${(100 * part) / full}%;background:${colour(spec.models[m]?.colour ?? m)}`, title: `${spec.models[m]?.name ?? name} ${short(part)}` }, spec.models[m]?.letter ?? "") : null))),
      h("div", { class: "wb-note", title: note }, note));
  }

  function drawNumbers() {
    const run = view.shown;
    if (!run) {
      costs.replaceChildren(h("div", { class: "wb-empty" }, "no run yet: the first one is on its way"));
      return;
    }
    const reference = view.reference;
    const total = (card, id) => sum(card?.costs.find((cost) => cost.id === id)?.parts ?? []);
    const share = (id) => (total(reference, id) ? `${Math.round((100 * total(run, id)) / total(reference, id))} % of the reference` : "reference not known yet");
    const time = run.timing;
    const theirTime = reference?.timing?.ms;
    const timed = { id: "time", name: "measured time" };
    costs.replaceChildren(
      ...run.costs.map((cost) => bar(cost, short(sum(cost.parts)), total(reference, cost.id) || undefined, share(cost.id))),
      time ? bar({ ...timed, parts: time.by_model.length ? time.by_model : [time.ms] }, `${measured(time.ms, time.spread)} ms`, Math.max(theirTime ?? 0, time.ms), `${theirTime ? `${Math.round((100 * time.ms) / theirTime)} % of the reference; ` : ""}${plural(run.n, spec.sample)} on ${time.machine}; median of ${time.repeats}; ${short(time.peak_mb)} MB held`)
        : bar({ ...timed, parts: [] }, "measuring…", 1, "once nothing else is asked"),
      ...run.lines.map(({ id, name, value, note }) => h("div", { class: "wb-figure", "data-testid": id }, h("span", {}, name), h("b", {}, value), h("small", {}, note))));
    const rows = Object.entries(run.quality).map(([name, [value, stderr, n]]) => {
      const m = spec.metrics[name];
      const few = n < m.min_n;
      return h("tr", { class: few ? "wb-few" : "", title: m.help, "data-metric": name },
        h("th", { scope: "row" }, m.label, h("small", {}, [m.unit, m.higher ? "higher is better" : "lower is better"].filter(Boolean).join(", "))),
        h("td", {}, measured(value, stderr), h("small", {}, few ? `n = ${n}, needs n ≥ ${m.min_n}` : `n = ${n}`)));
    });
    const main = spec.metrics[spec.main_metric];
    if (main && !(spec.main_metric in run.quality)) rows.push(h("tr", { class: "wb-few" }, h("th", { scope: "row" }, main.label), h("td", {}, h("small", {}, "no score yet: the reference is being computed"))));
    qualities.replaceChildren(...rows);
    pin.textContent = view.pinned ? "Unpin A" : "Pin as A";
    comparison.hidden = !view.pinned;
    if (!view.pinned) return;
    pinnedCaption.textContent = `A, pinned: ${view.pinned.title}`;
    pinnedCaption.title = view.pinned.full;
    const names = [...new Set([...Object.keys(view.pinned.knobs), ...Object.keys(run.knobs)])];
    const text = (v) => v === undefined ? "none" : typeof v === "number" ? short(v) : Array.isArray(v) ? v.map((x) => short(x)).join(", ") : words(String(v));
    const differ = names.filter((name) => text(view.pinned.knobs[name]) !== text(run.knobs[name]));
    const [axis] = spec.axes[0];
    comparison.replaceChildren(h("b", {}, "A → B "),
      [...(view.pinned.method !== run.method ? [`${view.pinned.method} → ${run.method}`] : []),
        ...differ.map((name) => `${words(name)} ${text(view.pinned.knobs[name])} → ${text(run.knobs[name])}`),
        `${axis === "flops" ? "FLOPs" : words(axis)} × ${(total(run, axis) / total(view.pinned, axis)).toFixed(2)}`].join(" · "));
  }

  // --- the frontier

  const metricSelect = h("select", { "aria-label": "quality on the frontier", "data-testid": "metric", onchange: () => { metric = metricSelect.value; metricSelect.dataset.touched = "1"; drawFrontier(); } });
  const costSelect = h("select", { "aria-label": "cost on the frontier", "data-testid": "cost", onchange: () => drawFrontier() },
    ...spec.axes.map(([name, text]) => h("option", { value: name }, text)));
  const nSelect = h("select", { "aria-label": "samples per run on the frontier", "data-testid": "frontier-n", onchange: () => ask({ kind: "frontier_n", n: Number(nSelect.value) }) });
  const thumbs = {}; // by pane: small pictures of the run under the hand
  const thumb = h("div", { class: "wb-thumb", "aria-hidden": "true" });
  const cardText = h("div", { class: "wb-cardtext", "data-testid": "hover" });
  const card = h("div", { class: "wb-card", hidden: true }, thumb, cardText);
  let drawn = []; // the points that the plot shows
  const plot = plotter({ id: "frontier", label: "quality against cost; arrow keys go from point to point, Enter returns to that run",
    on: { hover: drawCard, click: (index) => ask({ kind: "recall", key: drawn[index].keys[0] }) } });

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
    if (!known.includes(metric) || !metricSelect.dataset.touched) metric = known.includes(spec.main_metric) ? spec.main_metric : known[0] ?? "";
    options(metricSelect, known.map((name) => [name, spec.metrics[name].label]), metric);
    const ns = frontier.ns ?? [];
    nSelect.hidden = !ns.length;
    options(nSelect, ns.map((n) => [String(n), `n = ${n}`]), String(frontier.n));
    const cost = costSelect.value;
    const pointed = drawn[plot.chosen]?.keys; // stays under the hand while new points arrive
    drawn = (frontier.metrics?.[metric] ?? []).filter((p) => p[cost] > 0);
    const m = spec.metrics[metric];
    const kind = (p) => Math.max(spec.methods.findIndex((entry) => entry.name === p.method), 0);
    const used = [...new Set(drawn.filter((p) => !p.role).map(kind))].sort((a, b) => a - b);
    plot.draw({
      x: { label: costSelect.selectedOptions[0].text, log: true, better: "down" },
      y: { label: m ? `${m.label}${m.unit ? ` (${m.unit})` : ""}` : "", better: m?.higher ? "up" : "down" },
      lines: drawn.length ? [{ class: "wb-front", points: pareto(drawn, cost, m.higher).map((p) => [p[cost], p.value]) }] : [],
      points: drawn.map((p) => ({ x: p[cost], y: p.value, error: p.stderr ?? 0, shape: { reference: "star", baseline: "square" }[p.role] ?? SHAPES[kind(p) % SHAPES.length],
        class: p.role ? "wb-rival" : "wb-mark", colour: p.role ? "" : colour(kind(p)), note: p.role, attributes: { "data-keys": p.keys.join(" "), "data-role": p.role } })),
      key: [...used.map((k) => ({ name: spec.methods[k].name, shape: SHAPES[k % SHAPES.length], colour: colour(k) })), { name: "Pareto front", class: "wb-front" },
        { name: ns.length ? `shown · n = ${frontier.n} per run` : "shown", ring: true }],
      empty: cost === "ms" && known.length ? "no run is timed yet: times are measured once nothing else is asked" : known.length ? "no runs with this number of samples yet" : "no score yet: the first run and its reference are being computed",
    });
    markShown();
    if (pointed) plot.select(drawn.findIndex((point) => point.keys.some((key) => pointed.includes(key))));
  }

  const markShown = () => plot.ring(drawn.findIndex((point) => point.keys.includes(view.shown?.key)));

  function drawCard(index, at) {
    card.hidden = index < 0;
    if (index < 0) return;
    const point = drawn[index];
    const key = point.keys[0];
    const seeds = point.keys.length > 1 ? `, mean of ${point.keys.length} seeds` : "";
    cardText.replaceChildren(h("b", {}, (point.role ? `${point.role}: ` : "") + frontier.titles[key]),
      h("div", {}, `${spec.metrics[metric].label} ${measured(point.value, point.stderr)}${seeds}, n = ${point.n}`),
      h("div", {}, spec.axes.filter(([name]) => point[name] > 0).map(([name, text]) => `${short(point[name])} ${text}`).join(", ")), h("small", {}, "click: return to this run"));
    card.style.left = `${clamp(at.x + 14, 0, Math.max(plot.node.clientWidth - 330, 0))}px`;
    card.style.top = `${clamp(at.y - 120, 0, 170)}px`;
    const canvases = peeked[key]?.panes.filter((pane) => ["pictures", "points", "heat"].includes(pane.kind)).slice(0, 1) ?? [];
    thumb.hidden = !canvases.length;
    for (const pane of canvases) {
      thumbs[pane.kind] ??= PANES[pane.kind](spec, context);
      thumb.replaceChildren(thumbs[pane.kind].node);
      thumbs[pane.kind].draw(pane);
    }
    if (!(key in peeked)) peek(key);
  }

  function peek(key) {
    peeked[key] = null;
    ask({ kind: "peek", key });
  }

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

  const box = copyBox();
  const files = {
    images: () => {
      const canvas = Object.values(own).find((made) => made.canvas)?.canvas;
      if (!canvas) return;
      const scale = Math.max(1, Math.round(800 / canvas.width));
      const large = h("canvas", { width: canvas.width * scale, height: canvas.height * scale });
      const pen = large.getContext("2d");
      pen.imageSmoothingEnabled = false;
      pen.drawImage(canvas, 0, 0, large.width, large.height);
      large.toBlob((blob) => download(blob, "samples.png"));
    },
  };
  const exportImages = button("Samples", "samples as PNG", files.images, "export-images");
  const paste = h("input", { type: "text", placeholder: "paste a link", "aria-label": "paste a link", "data-testid": "paste", spellcheck: "false" });
  const open = () => { if (paste.value.trim()) ask({ kind: "load", link: paste.value.trim() }); };
  paste.addEventListener("keydown", (event) => { if (event.key === "Enter") open(); });

  const group = (name, ...nodes) => h("div", { class: "wb-group", role: "group", "aria-label": name }, h("span", {}, name), ...nodes);
  const foot = h("div", { class: "wb-foot" },
    group("score with more samples", ...scoreButtons, scoreBar, stopButton, scoreText),
    group("export", ...savers(plot, el, "frontier"),
      exportImages, exports, button("CSV", "all runs as CSV", () => ask({ kind: "csv" }), "export-csv")),
    group("share", button("Copy link", "copy a link to these settings", () => ask({ kind: "link" }), "copy-link"),
      button("Copy as code", "copy Python code that makes this run", () => ask({ kind: "code" }), "copy-code"), paste, button("Open", "open the pasted link", open, "open-link")),
    h("label", { class: "wb-switch" }, onRelease, "update on release"));

  // --- all together

  const root = h("div", { class: "wb", "data-testid": "explorer", "data-lm-suppress-shortcuts": "true" },
    head.node, strip?.node ?? "",
    h("div", { class: "wb-columns" },
      knobs.node,
      h("div", { class: "wb-middle" }, samples, comparison),
      h("div", { class: "wb-right" },
        h("div", { class: "wb-frontier" }, h("div", { class: "wb-row" }, h("b", { title: "quality against cost" }, "Frontier"), metricSelect, costSelect, nSelect), h("div", { class: "wb-plotbox" }, plot.node, card)),
        h("div", { class: "wb-numbers" }, costs, h("div", {}, qualities, sideBox)))),
    foot, box.node);

  let numbersDrawn = "";

  function takeView() {
    view = model.get("view");
    link.heard(view);
    redraw(drawView);
  }

  function drawView() {
    if (!link.settle()) strip?.draw(); // the hand is ahead: its settings stay
    const isBusy = Boolean(view.is_stale && !view.error);
    head.draw(view, link.isLate() ? WAITING : view.status ? `idle work: ${view.status}…` : "", isBusy);
    samples.classList.toggle("wb-busy", isBusy);
    Object.values(own).forEach((made) => made.stale?.(Boolean(isBusy && frame && frame.key !== view.key)));
    const key = view.reference?.key;
    if (!law && key && frame?.panes[0]?.kind === "points" && !(key in peeked)) peek(key);
    const numbers = JSON.stringify([view.shown, view.reference, view.pinned?.key]);
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
    if (!reply.id?.startsWith(link.client)) return;
    if (reply.kind === "peek") {
      const given = unpack(decode64(reply.frame));
      peeked[given.key] = given;
      if (drawn[plot.chosen]?.keys[0] === given.key) plot.select(plot.chosen);
      if (frame?.panes[0]?.kind === "points") drawFrame();
    } else if (reply.kind === "csv") download(new Blob([reply.text], { type: "text/csv" }), "runs.csv");
    else box.offer(reply.text, reply.kind === "link" ? "Link to the run shown" : "Code for the run shown");
  }

  const on = { "change:view": takeView, "change:frontier": () => redraw(drawFrontier), "change:frame": () => redraw(drawFrame, drawView), "change:pinned": () => redraw(drawPinned),
    "change:detail": () => redraw(() => Object.values(own).forEach((made) => made.detail?.())), "change:reply": takeReply };
  const again = () => {
    strip?.resize();
    drawFrontier();
    Object.values(own).forEach((made) => made.again?.());
    if (frame?.panes[0]?.kind === "points") drawFrame();
  };
  const leave = attend(model, el, root, on, () => redraw(again));
  drawControls();
  drawFrame();
  drawView();
  drawPinned();
  drawFrontier();
  return () => {
    leave();
    redraw.stop();
    link.stop();
  };
}

export default { render };
