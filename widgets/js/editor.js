// The schedule editor: what a ScheduleEditor publishes (spec, view, reply and the samples of yours, preset, best), drawn, and its
// wishes sent.

const KINDS = { x0: { colour: "#56b4e9", text: "x₀" }, eps: { colour: "#e69f00", text: "ε" } }; // two shapes of heads, too
const ARMS = ["yours", "preset", "best"];
const NUDGE = 0.05; // log-SNR per arrow key
const LANE = 34; // height of a row of heads
const HEAD = 26; // width of a head
const LEFT = 62; // names of the rows
const RIGHT = 46; // the data lies at infinity
const EDGE = HEAD / 2 + 2;
const FIELDS = { // name, help, and the values in words where these differ
  order: ["order", "terms of the Taylor expansion; each needs one earlier evaluation"],
  prediction: ["prediction", "what is expanded: the data estimate x0 or the noise estimate eps"],
  relaxation: ["relaxation", "a factor 1 + O(h) of the first derivative; bh1 and bh2 are UniPC's"],
  start: ["starts from", "the point that is expanded around: the current one (multistep) or an earlier one (singlestep)", (v) => v ? `${v} back` : "here"],
  corrector: ["corrector", "on arrival: correct the state by the evaluation there, for free or with one evaluation more", (v) => ({ none: "none", pseudo: "pseudo (free)", implicit: "implicit (+1)" }[v])],
  correction_order: ["its order", "terms of the correction"],
};
const HELP = "drag a mark, or arrow keys (Shift: finer); 1–4 order, p prediction, + and Delete; double click on the line adds a step; c, C: pseudo, implicit corrector";

const hue = (arm) => `var(--wbe-${arm})`;
const armMark = (arm, x, y, r) => marker(SHAPES[ARMS.indexOf(arm)], x, y, r);

function render({ model, el }) {
  const spec = model.get("spec");
  let view = model.get("view");
  let selected = Math.min(2, view.marks.steps.length - 1);
  let refusal = ""; // why the last choice was refused
  const redraw = painter();
  const link = connect(model, {
    part: "marks",
    restate: () => { selected = clamp(selected, 0, lastMark()); redraw(drawStrip, drawStep); },
    waiting: () => { head.status.textContent = WAITING; },
  });
  const { ask } = link;
  const steps = () => link.local.steps;
  const levels = () => link.local.levels;
  const lastMark = () => levels().length - 1 - (levels().at(-1) === null); // the end at the data is no mark
  const legend = h("div", { class: "wbe-legend" }, ...Object.entries(KINDS).map(([kind, { colour }]) => h("span", {},
    h("i", { class: `wbe-${kind}`, style: `background:${colour}` }), `${kind} prediction`)), "number: order");
  const head = headPart({ ask, reseed: (seed) => ask({ kind: "compare", fields: { seed } }), before: legend });

  // --- what the hand does to a mark

  const [low, high] = spec.range;
  let width = 700;
  const across = (level) => LEFT + EDGE + ((level - low) / (high - low)) * (width - LEFT - RIGHT - 2 * EDGE);
  const levelAt = (x) => low + ((x - LEFT - EDGE) / (width - LEFT - RIGHT - 2 * EDGE)) * (high - low);
  const atData = () => width - RIGHT / 2 - 4;

  function room(i) {
    const next = levels()[i + 1];
    return [i ? levels()[i - 1] + spec.gap : low, next == null ? high : next - spec.gap];
  }

  function move(i, level) {
    const [from, to] = room(i);
    const place = clamp(level, from, to);
    if (from > to || Math.abs(place - levels()[i]) < 1e-9) return;
    levels()[i] = place;
    redraw(drawStrip, drawStep);
    ask({ kind: "move", step: i, log_snr: place, gesture: link.gesture() });
  }

  function decide(field, value, i = selected) {
    const why = view.options[i]?.[field]?.find(([v]) => v === value)?.[1];
    refusal = why ? `${words(field)} ${value}: ${why}` : "";
    redraw(drawStep);
    if (!why) ask({ kind: "decide", step: i, fields: { [field]: value } });
  }

  function nextOrder(i) {
    const now = steps()[i].order;
    const allowed = view.options[i].order.filter(([, why]) => !why).map(([v]) => v);
    const next = allowed.find((v) => v > now) ?? allowed[0];
    decide("order", next === now ? (now % 4) + 1 : next, i); // where there is no other: says why not
  }

  const toggle = (i) => decide("prediction", steps()[i].prediction === "x0" ? "eps" : "x0", i);

  function select(i) {
    selected = clamp(i, 0, lastMark());
    refusal = "";
    redraw(drawStrip, drawStep);
  }

  // --- the strip: marks along log-SNR

  const back = s("g");
  const stems = s("g"); // behind all heads
  const marksBox = s("g");
  const strip = s("svg", { class: "wbe-strip", role: "group", "data-testid": "strip", "aria-label": "schedule: one mark per solver step along log-SNR, noise left, data right" }, back, stems, marksBox);
  const marks = [];

  function makeMark(i) {
    const stem = s("line", { class: "wbe-stem" });
    const hit = s("rect", { class: "wbe-hit", x: -HEAD / 2, width: HEAD, height: LANE });
    const [shape, tip] = [s("path", { class: "wbe-head" }), s("title")];
    const [digit, kind, extra] = ["digit", "kind", "extra"].map((name) => s("text", { class: `wbe-${name}` }));
    const node = s("g", { class: "wbe-mark", tabindex: 0, role: "slider", "aria-orientation": "horizontal", "data-testid": `handle-${i}` }, tip, hit, shape, digit, kind, extra);
    node.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      const wasOn = node.matches(":focus"); // a first click only selects
      node.focus();
      select(i);
      node.setPointerCapture(event.pointerId);
      link.hold();
      const begin = { x: event.clientX, level: levels()[i], isBelow: event.clientY > shape.getBoundingClientRect().top + 17 };
      let isMoved = false;
      const drag = (e) => {
        if (!isMoved && Math.abs(e.clientX - begin.x) < 3) return;
        isMoved = true;
        move(i, levelAt(across(begin.level) + ((e.clientX - begin.x) * width) / (strip.getBoundingClientRect().width || width)));
      };
      node.addEventListener("pointermove", drag);
      node.addEventListener("lostpointercapture", () => {
        node.removeEventListener("pointermove", drag);
        if (!isMoved && wasOn && steps()[i]) (begin.isBelow ? toggle : nextOrder)(i);
      }, { once: true });
    });
    node.addEventListener("focus", () => { if (selected !== i) select(i); });
    node.addEventListener("keydown", (event) => {
      const step = event.shiftKey ? NUDGE / 5 : NUDGE;
      const by = { ArrowLeft: -step, ArrowDown: -step, ArrowRight: step, ArrowUp: step, PageDown: -10 * NUDGE, PageUp: 10 * NUDGE, Home: -Infinity, End: Infinity }[event.key];
      const isStep = i < steps().length;
      if (by !== undefined) {
        link.begin(`mark-${i}`);
        move(i, levels()[i] + by);
      } else if (isStep && /^[1-4]$/.test(event.key)) decide("order", Number(event.key), i);
      else if (isStep && event.key === "p") toggle(i);
      else if (isStep && ["+", "Insert"].includes(event.key)) ask({ kind: "add", step: i });
      else if (isStep && ["Delete", "Backspace"].includes(event.key)) ask({ kind: "remove", step: i });
      else return;
      event.preventDefault();
    });
    marksBox.append(node);
    stems.append(stem);
    return { node, hit, stem, shape, digit, kind, extra, tip };
  }

  // The row of each head: the lowest in which it does not cover the one before.
  function lanes() {
    const ends = [];
    return levels().slice(0, lastMark() + 1).map((level) => {
      const x = across(level);
      let lane = ends.findIndex((end) => x - HEAD / 2 >= end + 2);
      if (lane < 0) lane = ends.length < 4 ? ends.length : ends.indexOf(Math.min(...ends));
      ends[lane] = x + HEAD / 2;
      return lane;
    });
  }

  function drawMark(mark, i, y, ground) {
    const [x, step, isOn] = [across(levels()[i]), steps()[i], i === selected ? " wbe-on" : ""];
    const [r, bottom] = [HEAD / 2 - 1, y + LANE - 6];
    const set = (node, values) => Object.entries(values).forEach(([name, value]) => node.setAttribute(name, value));
    const [from, to] = room(i);
    const name = step ? `step ${i + 1} of ${steps().length}` : "end of the schedule";
    const noise = `log-SNR ${signed(levels()[i])}, noise ${short(Math.exp(-levels()[i]))} times the signal`;
    const what = step ? `order ${step.order}, ${step.prediction} prediction${step.corrector === "none" ? "" : `, ${step.corrector} corrector`}` : "";
    set(mark.node, { transform: `translate(${x},0)`, class: `wbe-mark${isOn}${step ? "" : " wbe-end"}`, "aria-label": name, "aria-valuetext": [noise, what].filter(Boolean).join("; "),
      "aria-valuenow": +levels()[i].toFixed(4), "aria-valuemin": +from.toFixed(4), "aria-valuemax": +to.toFixed(4) });
    mark.hit.setAttribute("y", y);
    set(mark.stem, { class: `wbe-stem${isOn}`, x1: x, x2: x, y1: bottom, y2: ground + 5 });
    // data estimates round, noise estimates square
    set(mark.shape, step ? { fill: KINDS[step.prediction].colour, d: step.prediction === "x0"
      ? `M${-r},${y + r}A${r},${r} 0 0 1 ${r},${y + r}V${bottom - r}A${r},${r} 0 0 1 ${-r},${bottom - r}Z` : `M${-r},${y}H${r}V${bottom}H${-r}Z` } : { d: `M-7,${y + 14}H7V${bottom}H-7Z` });
    set(mark.digit, { y: y + 14 });
    set(mark.kind, { y: y + 24 });
    set(mark.extra, { x: HEAD / 2 + 6, y: y + 6 });
    mark.digit.textContent = step?.order ?? "";
    mark.kind.textContent = step ? KINDS[step.prediction].text : "";
    mark.extra.textContent = { pseudo: "c", implicit: "C" }[step?.corrector] ?? "";
    mark.tip.textContent = `${name}: ${noise}. ${what}${step ? "\nDrag or arrow keys: move. 1-4: order. p: x0 or eps. + and Delete: add, remove.\nClick again: next order; on the letter: x0 or eps." : ""}`;
  }

  function drawStrip() {
    const count = lastMark() + 1;
    while (marks.length < count) marks.push(makeMark(marks.length));
    const rows = lanes();
    const top = 6 + LANE * Math.max(...rows, 1);
    const ground = top + LANE + 10;
    const others = Object.entries(view.arms).filter(([arm]) => arm !== "yours");
    const bottom = ground + 17 * others.length + 10;
    strip.setAttribute("height", bottom + 28);
    strip.setAttribute("viewBox", `0 0 ${width} ${bottom + 28}`);
    marks.forEach((mark, i) => {
      mark.node.style.display = mark.stem.style.display = i < count ? "" : "none";
      if (i < count) drawMark(mark, i, top - LANE * rows[i], ground);
    });
    const line = (x1, x2, y, more) => s("line", { x1, x2, y1: y, y2: y, ...more });
    const text = (x, y, content, more = { "text-anchor": "middle" }) => s("text", { x, y, ...more }, content);
    back.replaceChildren(text(0, ground - 14, "yours", { class: "wbe-row" }), line(LEFT, width - RIGHT, ground, { class: "wbe-ground" }), text(atData(), ground - 9, "data"),
      ...(levels().at(-1) === null ? [line(width - RIGHT, atData(), ground, { class: "wbe-ground", "stroke-dasharray": "3 3" }), s("circle", { cx: atData(), cy: ground, r: 4, fill: "var(--wb-fg)" })] : []),
      ...others.flatMap(([arm, given], k) => {
        const y = ground + 17 * (k + 1);
        return [text(0, y + 4, spec.arms[arm], {}), line(LEFT, width - RIGHT, y, { class: "wbe-tick", opacity: 0.2 }), ...given.levels.map((level) => {
          const mark = armMark(arm, level === null ? atData() : across(level), y, 4);
          mark.setAttribute("class", "wbe-other");
          mark.setAttribute("fill", hue(arm));
          return mark;
        })];
      }),
      ...named(niceTicks(low, high, Math.round(width / 70)), signed, 0).flatMap(([tick, name]) => [s("line", { class: "wbe-tick", x1: across(tick), x2: across(tick), y1: bottom, y2: bottom + 5 }), text(across(tick), bottom + 17, name)]),
      text(0, bottom + 17, "log-SNR", {}));
  }

  strip.addEventListener("dblclick", (event) => {
    if (event.target.closest(".wbe-mark")) return;
    const box = strip.getBoundingClientRect();
    const level = levelAt(((event.clientX - box.left) * width) / box.width);
    const inside = levels().filter((v) => v !== null && v < level).length;
    if (inside) ask({ kind: "add", step: inside - 1, log_snr: clamp(level, low, high) });
  });

  // --- the selected step

  const heading = h("h4", { "data-testid": "step-title" });
  const where = h("div", { class: "wbe-wide wbe-where" });
  const reason = h("div", { class: "wbe-wide wbe-reason", role: "status", "data-testid": "reason" });
  const level = guard(h("input", { type: "number", step: NUDGE, "aria-label": "log-SNR of the selected mark", "data-testid": "level",
    onchange: () => { link.begin(); ask({ kind: "move", step: selected, log_snr: Number(level.value), gesture: link.gesture() }); } }));
  const choices = spec.fields.map((field) => {
    const [name] = FIELDS[field];
    const node = h("select", { "aria-label": `${name} of the selected step`, "data-testid": `step-${field}`, onchange: () => decide(field, view.options[selected][field][node.selectedIndex][0]) });
    return { field, node, label: h("span", {}, name) };
  });
  const addButton = button("+ Add a step", "divide the selected step in two", () => ask({ kind: "add", step: Math.min(selected, steps().length - 1) }), "add");
  const removeButton = button("− Remove", "remove the selected step", () => ask({ kind: "remove", step: selected }), "remove");
  const stepBox = h("div", { class: "wbe-step", role: "group", "aria-label": "the selected step" }, heading, where, h("span", {}, "log-SNR"), level,
    ...choices.flatMap(({ label, node }) => [label, node]), reason, h("div", { class: "wbe-wide wbe-buttons" }, addButton, removeButton));

  function drawStep() {
    const [n, step] = [steps().length, steps()[selected]];
    const [a, b] = [levels()[selected], levels()[selected + 1]];
    heading.textContent = step ? `Step ${selected + 1} of ${n}` : "End of the schedule";
    where.textContent = `${step ? `from log-SNR ${signed(a)} to ${b == null ? "the data" : signed(b)}` : `log-SNR ${signed(a)}`}; σ\u2060/\u2060α\u00a0=\u00a0${short(Math.exp(-a))}`;
    if (!typing.has(level)) level.value = a.toFixed(3);
    const options = step && view.options.length === n ? view.options[selected] : {};
    const refused = [];
    for (const { field, node, label } of choices) {
      const [, help, text = words] = FIELDS[field];
      const values = options[field] ?? [];
      const entries = JSON.stringify(values);
      if (node.dataset.values !== entries) {
        node.dataset.values = entries;
        node.replaceChildren(...values.map(([v, why]) => h("option", { value: v, disabled: Boolean(why), title: why }, text(v))));
      }
      node.selectedIndex = values.findIndex(([v]) => v === step?.[field]);
      node.disabled = values.filter(([v, why]) => !why || v === step?.[field]).length < 2;
      const [value, why] = values.find(([v, w]) => w && v !== step?.[field]) ?? [];
      node.title = why ?? help;
      if (why && field === "order") refused.push(`order ${value}: ${why}`);
      if (why && field === "corrector") refused.push(`corrector: ${why}`);
      node.hidden = label.hidden = field === "correction_order" && (step?.corrector ?? "none") === "none";
    }
    reason.textContent = refusal || (refused.length ? `not here: ${refused.join("; ")}` : "");
    removeButton.disabled = !step || n < 2;
    addButton.disabled = n >= spec.max_steps;
  }

  // --- samples

  const frames = {};
  const law = spec.law ? unpack(decode64(spec.law)).panes[0] : null;
  const pictures = Object.fromEntries(ARMS.map((arm) => {
    const canvas = h("canvas", { role: "img", "aria-label": `samples: ${spec.arms[arm]}`, "data-testid": arm === "yours" ? "samples" : `samples-${arm}`, "data-revision": 0, "data-key": "" });
    const caption = h("figcaption");
    return [arm, { canvas, caption, figure: h("figure", { hidden: arm === "best" && !spec.has_best }, canvas, caption) }];
  }));

  function drawFrame(arm) {
    const frame = unpack(model.get(arm)) ?? frames[arm];
    if (!frame) return;
    frames[arm] = frame;
    const { canvas } = pictures[arm];
    const [pane] = frame.panes;
    if (pane.kind === "pictures") drawPictures(canvas, pane);
    else drawPoints(canvas, pane, law);
    Object.assign(canvas.dataset, { revision: frame.revision, key: frame.revision, step: frame.step });
    canvas.setAttribute("aria-label", `samples, ${spec.arms[arm]}: ${frame.title}, after step ${frame.step} of ${frame.of}`);
    drawCaptions();
  }
  const drawers = ARMS.map((arm) => () => drawFrame(arm));

  function drawCaptions() {
    for (const [arm, { caption, figure }] of Object.entries(pictures)) {
      const [given, frame] = [view.arms[arm], frames[arm]];
      const isEarly = Boolean(frame && frame.step < frame.of);
      figure.hidden = !given;
      caption.replaceChildren(h("b", {}, spec.arms[arm]), given?.title ?? "", h("br"), isEarly ? `estimate at step ${frame.step} of ${frame.of}` : given?.error ? `error ${measured(...given.error)}` : unknown(given));
      caption.classList.toggle("wbe-early", isEarly);
    }
  }

  // --- numbers and the curve

  const unknown = (given) => (given?.has_failed ? "failed" : "…");
  const graded = {}; // by arm, the last that is known: shown until the next one is, so that nothing jumps under the hand
  const shownArms = () => Object.entries(view.arms).map(([arm, given]) => {
    if (given.error) graded[arm] = given;
    return [arm, given.error || given.has_failed || !graded[arm] ? given : { ...graded[arm], is_old: true }];
  });
  const table = h("table", { class: "wbe-table", "data-testid": "table" });
  const note = h("div", { class: "wbe-help" });
  const reading = h("div", { class: "wb-note", "data-testid": "reading" }, "\u00a0");
  let dots = [];
  const curve = plotter({ id: "curve", label: spec.curve, height: 170,
    on: { hover: (i) => { reading.textContent = dots[i]?.text ?? "\u00a0"; }, click: (i) => { if (dots[i].arm === "yours") select(dots[i].step); } } });

  function swatch(arm) {
    const dot = armMark(arm, 11, 5, 3.4);
    dot.setAttribute("fill", hue(arm));
    return s("svg", { class: "wbe-swatch", viewBox: "0 0 22 10", "aria-hidden": "true" }, s("line", { class: `wb-curve wbe-${arm}`, x1: 0, x2: 22, y1: 5, y2: 5 }), dot);
  }

  function drawNumbers() {
    const arms = shownArms();
    const known = arms.map(([, a]) => a).filter((a) => a.error);
    const least = Math.min(...known.map((a) => a.error[0]));
    const rival = arms.find(([arm]) => arm === "preset")?.[1];
    const ratio = (a) => (a.error && rival?.error?.[0] ? `× ${short(a.error[0] / rival.error[0])}` : a.has_failed || rival?.has_failed || !rival ? "–" : "…");
    const row = ([arm, a]) => h("tr", { class: `${known.length > 1 && a.error?.[0] === least ? "wbe-winner" : ""} ${a.is_old ? "wbe-old" : ""}`, "data-arm": arm }, h("th", { scope: "row" }, swatch(arm), spec.arms[arm]),
      ...[a.evaluations == null ? unknown(a) : short(a.evaluations), a.error ? measured(...a.error) : unknown(a), ratio(a)].map((text) => h("td", {}, text)));
    table.replaceChildren(h("thead", {}, h("tr", {}, ...["", "evaluations", "error at the end", "to the preset"].map((text) => h("th", { scope: "col" }, text)))), h("tbody", {}, ...arms.map(row)));
    note.textContent = `evaluations per sample; error: distance from ${spec.truth}, ${spec.unit}${known.length ? `; n = ${known[0].error[2]}, same noise for all` : ""}`;
    drawCurve();
  }

  function drawCurve() {
    const old = (arm) => (view.arms[arm].error ? "" : " wbe-old");
    const lines = shownArms().map(([arm, a]) => [arm, a.curve.map(([x, y], step) => ({ arm, step, x, y, text: `${spec.arms[arm]}, step ${step + 1}: ${short(y)} at ${x == null ? "the data" : `log-SNR ${signed(x)}`}` })).filter(({ y }) => y > 0)])
      .filter(([, line]) => line.length).reverse(); // yours on top
    dots = lines.flatMap(([arm, line]) => line.map((dot) => ({ ...dot, shape: SHAPES[ARMS.indexOf(arm)], colour: hue(arm), class: `wb-mark${old(arm)}` })));
    const truth = spec.truth.replace(/ \(.*/, "");
    curve.draw({ x: { label: "log-SNR", low, high, end: dots.some(({ x }) => x == null) ? "data" : "" }, y: { label: "RMS distance", log: true, better: "down" }, points: dots,
      lines: lines.map(([arm, line]) => ({ class: `wb-curve wbe-${arm}${old(arm)}`, points: line.map(({ x, y }) => [x, y]) })), key: lines.map(([arm]) => ({ name: spec.arms[arm], shape: SHAPES[ARMS.indexOf(arm)], colour: hue(arm) })).reverse(),
      empty: view.arms.yours.has_failed ? `no errors: ${truth} failed` : `no errors yet: ${truth} is being computed` });
    curve.node.setAttribute("aria-label", `${spec.curve} along log-SNR: ${lines.map(([arm, line]) => `${spec.arms[arm]} ends at ${short(line.at(-1).y)}`).join(", ")}; arrow keys read its points`);
  }

  // --- what it is compared with; plans and code in and out

  const menus = Object.fromEntries([["preset", "preset compared with", spec.presets], ["spacing", "spacing of the preset", spec.spacings], ["final", "where the preset ends", spec.finals]].map(([name, label, values]) => {
    const texts = { zero: "ends at the data", cleanest: "ends at the cleanest level" };
    const node = h("select", { "aria-label": label, "data-testid": name, onchange: () => ask({ kind: "compare", fields: { [name]: node.value } }) }, ...values.map((v) => h("option", { value: v }, texts[v] ?? v)));
    return [name, node];
  }));
  const compare = h("div", { class: "wbe-compare", role: "group", "aria-label": "compare with" }, h("span", {}, "compare with"), menus.preset, "on", menus.spacing, menus.final,
    h("span", { class: "wbe-help" }, "at equal evaluations"), button("Start from it", "replace your schedule by this preset", () => ask({ kind: "use" }), "use"),
    spec.has_best ? button("Start from the best found", "replace your schedule by the best one found", () => ask({ kind: "use_best" }), "use-best") : null);
  const box = copyBox();
  const paste = h("input", { type: "text", class: "wbe-paste", placeholder: "paste a plan (JSON)", "aria-label": "paste a plan", "data-testid": "paste", spellcheck: "false" });
  const open = () => { if (paste.value.trim()) ask({ kind: "load", text: paste.value.trim() }); };
  paste.addEventListener("keydown", (event) => { if (event.key === "Enter") open(); });
  const group = (name, ...nodes) => h("div", { class: "wb-group", role: "group", "aria-label": name }, ...nodes);
  const foot = h("div", { class: "wb-foot" },
    group("share", button("Copy plan", "copy the plan as JSON", () => ask({ kind: "json" }), "copy-plan"), button("Copy as code", "copy Python code that runs the plan", () => ask({ kind: "code" }), "copy-code"),
      paste, button("Open", "open the pasted plan", open, "open-plan")), group("export the curve", h("span", {}, "curve"), ...savers(curve, el, "errors")), h("span", { class: "wbe-help" }, HELP));

  // --- all together

  const root = h("div", { class: "wb wbe", "data-testid": "schedule-editor", "data-lm-suppress-shortcuts": "true" }, head.node, strip, compare,
    h("div", { class: "wbe-columns" }, stepBox, h("div", { class: "wbe-samples" }, ...Object.values(pictures).map(({ figure }) => figure)),
      h("div", { class: "wbe-right" }, h("div", {}, table, note), h("div", {}, h("div", { class: "wbe-help wbe-over" }, `${spec.curve}, RMS`), curve.node, reading))),
    foot, box.node);

  function takeView() {
    view = model.get("view");
    link.heard(view);
    redraw(drawView);
  }

  function drawView() {
    if (!link.settle() && steps().length === view.marks.steps.length) link.local.steps = structuredClone(view.marks.steps); // the hand is ahead: its places stay
    head.entitle(`${view.arms.yours.title} · ${plural(view.evaluations, "evaluation")} · seed ${view.seed} · ${plural(view.n_samples, "sample")}`);
    head.showSeed(view.seed);
    head.draw(view, link.isLate() ? WAITING : view.status ? `${view.status}…` : view.missing, Boolean(view.is_stale && !view.error));
    for (const [name, node] of Object.entries(menus)) node.value = view.compare[name];
    drawNumbers();
    drawCaptions();
    redraw(drawStrip, drawStep);
  }

  function takeReply() {
    const reply = model.get("reply");
    if (reply.id?.startsWith(link.client)) box.offer(reply.text, reply.kind === "json" ? "The plan" : "Code for the plan");
  }

  const on = { "change:view": takeView, "change:reply": takeReply, ...Object.fromEntries(ARMS.map((arm, k) => [`change:${arm}`, () => redraw(drawers[k])])) };
  const leave = attend(model, el, root, on, () => {
    width = strip.clientWidth || 700;
    redraw(drawStrip, drawCurve, ...drawers.filter((_, k) => frames[ARMS[k]]?.panes[0].kind === "points"));
  });
  drawView();
  drawers.forEach((draw) => draw());
  return () => {
    leave();
    redraw.stop();
    link.stop();
  };
}

export default { render };
