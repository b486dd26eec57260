// A panel of one picture: what a Panel publishes (spec, view), drawn, and its wishes sent: a slider's index, a button, or a
// point's place.

const NUDGE = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
let panels = 0;

// A picture made by the kernel's own code, texts escaped. Its points with a name to drag are moved by hand and by key; the
// picture is replaced under the hand, so the hand is held by what the picture stands in.
PANES.svg = (spec, { send }) => {
  const node = h("div");
  let dragged = "";
  const pointOf = (event) => event.target.closest("[data-drag]");
  node.addEventListener("pointerdown", (event) => {
    const point = pointOf(event);
    if (!point) return;
    dragged = point.dataset.drag;
    point.focus({ preventScroll: true });
    node.setPointerCapture(event.pointerId);
    event.preventDefault();
  });
  node.addEventListener("pointermove", (event) => {
    if (!dragged) return;
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(node.firstElementChild.getScreenCTM().inverse());
    send({ point: dragged, x: at.x, y: at.y });
  });
  for (const end of ["pointerup", "pointercancel"]) node.addEventListener(end, () => { dragged = ""; });
  node.addEventListener("keydown", (event) => {
    const point = pointOf(event);
    if (!point || !NUDGE[event.key]) return;
    event.preventDefault();
    const [dx, dy] = NUDGE[event.key].map((d) => d * (event.shiftKey ? 15 : 3));
    send({ point: point.dataset.drag, x: +point.dataset.x + dx, y: +point.dataset.y + dy });
  });
  return {
    node,
    draw(pane) {
      const focused = node.contains(document.activeElement) ? document.activeElement.dataset.drag : "";
      node.innerHTML = pane.svg;
      if (focused) node.querySelector(`[data-drag="${focused}"]`)?.focus({ preventScroll: true });
    },
  };
};

function render({ model, el }) {
  const own = `wba-${(panels += 1)}`;
  const { prefix = "", name } = model.get("spec");
  const id = (part) => ({ "data-testid": `${prefix}${part}` });
  const title = h("div", { class: "wb-title", ...id("title") });
  const error = h("div", { class: "wb-error", role: "alert", ...id("error"), hidden: true });
  const sliders = h("div");
  const buttons = h("div", { class: "wb-row" });
  const progress = h("progress", { max: 1, value: 0, "aria-label": "done so far" });
  const samples = h("div", { class: "wba-panes", ...id("samples"), "data-key": "" });
  const status = h("div", { class: "wb-status", role: "status", ...id("status") });
  const box = copyBox();
  const copy = button("Copy as code", "copy Python code of this setting", () => box.offer(model.get("view").code, "Code of this setting"), `${prefix}copy-code`);
  const controls = h("div", {}, sliders, copy);
  const columns = h("div", { class: "wba-columns" }, controls, samples);
  const root = h("div", { class: `wb wba ${prefix ? `wb-${name}` : ""}`, ...id("explorer"), role: "region", "aria-label": `${name} panel`,
    "data-lm-suppress-shortcuts": true }, title, buttons, error, columns, status, box.node);
  root.addEventListener("keydown", (event) => event.stopPropagation()); // JupyterLab would take the arrows away
  el.append(root);

  // Under Panel a wish is a value that the page sets.
  const send = (wish) => {
    if (model.send) model.send(wish);
    else {
      model.set("intent", { ...wish, serial: performance.now() }); // the same wish twice is two
      model.save_changes();
    }
  };
  let rows = {};
  const held = {}; // sliders under the hand: their own place counts, not the kernel's
  const made = {}; // what draws the panes, by name

  function build() {
    rows = {};
    const spec = model.get("spec");
    controls.hidden = !spec.sliders.length;
    columns.classList.toggle("wba-bare", controls.hidden);
    sliders.replaceChildren(...spec.sliders.map((slider) => {
      const shown = h("b");
      const input = h("input", { type: "range", id: `${own}-${slider.name}`, min: 0, max: slider.values.length - 1, step: 1, "aria-label": slider.label,
        title: slider.help, "data-testid": slider.name });
      const place = (index) => {
        input.value = index;
        shown.textContent = slider.texts[index];
        input.setAttribute("aria-valuetext", slider.texts[index]);
      };
      input.addEventListener("input", () => {
        place(+input.value);
        held[slider.name] = performance.now();
        send({ knob: slider.name, index: +input.value });
      });
      rows[slider.name] = { slider, place };
      return h("label", { class: "wba-slider", for: input.id, title: slider.help }, h("span", {}, slider.label, shown), input);
    }));
    draw();
  }

  function make(pane) {
    const drawer = PANES[pane.kind](model.get("spec"), { send });
    const said = h("b", { "data-testid": `${pane.name}-said` });
    const words = h("span");
    const figure = h("figure", { class: pane.wide ? "wba-wide" : "" }, drawer.node, h("figcaption", {}, said, words));
    return { ...drawer, figure, said, words, target: drawer.node.querySelector(".wb-plot") ?? drawer.node };
  }

  function drawPanes(panes) {
    for (const pane of panes) {
      const kept = (made[pane.name] ??= make(pane));
      if (kept.figure.parentNode !== samples) samples.append(kept.figure);
      kept.target.dataset.testid = pane.name;
      if (pane.said) kept.target.setAttribute("aria-label", pane.said);
      if (pane.n != null) kept.target.dataset.n = pane.n;
      kept.said.textContent = pane.strong ?? "";
      kept.words.textContent = pane.caption ?? "";
      kept.draw(pane);
    }
    for (const gone of Object.keys(made).filter((key) => !panes.some((pane) => pane.name === key))) {
      made[gone].figure.remove();
      delete made[gone];
    }
  }

  function draw() {
    const view = model.get("view");
    for (const [key, { slider, place }] of Object.entries(rows)) {
      if (performance.now() - (held[key] ?? -1e9) > 700) place(Math.max(slider.values.indexOf(view.values[key]), 0));
    }
    title.textContent = view.title;
    error.hidden = !view.error;
    error.textContent = view.error;
    status.textContent = view.status;
    status.dataset.state = view.state ?? "";
    buttons.hidden = !view.buttons;
    if (view.buttons) {
      progress.value = view.share;
      const focused = buttons.contains(document.activeElement) ? [...buttons.children].indexOf(document.activeElement) : -1;
      buttons.replaceChildren(...view.buttons.map(({ press, text, help, disabled }) => h("button", { type: "button", title: help, disabled, onclick: () => send({ press }) }, text)), progress);
      buttons.children[focused]?.focus({ preventScroll: true });
    }
    if (samples.dataset.key === view.key) return;
    drawPanes(view.panes);
    samples.dataset.key = view.key;
  }

  const redraw = painter();
  const watcher = new ResizeObserver(() => redraw(again));
  const again = () => Object.values(made).forEach((pane) => pane.again?.());
  const drawSoon = () => redraw(draw);
  build();
  watcher.observe(samples);
  model.on("change:spec", build);
  model.on("change:view", drawSoon);
  return () => {
    watcher.disconnect();
    redraw.stop();
    model.off("change:spec", build);
    model.off("change:view", drawSoon);
    root.remove();
  };
}

export default { render };
