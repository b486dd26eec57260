// Shows what a LivePanel publishes (spec, view) and sends it wishes: a slider's index, or a point's place.
// Runs in JupyterLab through anywidget; imports nothing and asks the network for nothing.

const STYLE = `
.wba-columns { display: grid; grid-template-columns: minmax(170px, 210px) minmax(0, 1fr); gap: 6px 18px; align-items: start; margin-top: 4px; }
.wba-knob { display: block; padding: 3px 0; }
.wba-knob span { display: flex; justify-content: space-between; gap: 8px; font-variant-numeric: tabular-nums; }
.wba-two { display: grid; grid-template-columns: repeat(auto-fit, minmax(270px, 1fr)); gap: 6px 18px; align-items: start; }
.wba-samples figure { margin: 0; min-width: 0; }
.wba-samples figcaption { font-size: 12px; line-height: 16px; opacity: .85; }
.wba-picture { display: block; width: 100%; max-width: 640px; overflow: visible; font-family: inherit; }
.wba-two .wba-picture { max-width: 470px; }
.wba-name { paint-order: stroke; stroke: var(--wb-bg); stroke-width: 3px; stroke-linejoin: round; }
.wba-samples [data-drag] { cursor: grab; outline: none; touch-action: none; }
.wba-samples [data-drag]:focus-visible :is(path, circle) { stroke: var(--wb-focus); stroke-width: 4; }
.wb .wba-table { border-collapse: collapse; font-size: 12px; margin: 4px 0; font-variant-numeric: tabular-nums; }
.wb .wba-table :is(th, td) { padding: 2px 9px; text-align: right; background: none; border: 0; border-top: 1px solid var(--wb-line); }
.wb .wba-table :is(th, td):first-child { text-align: left; padding-left: 0; }
.wba-said { margin: 4px 0; font-weight: 600; }
.wba .wb-status { height: auto; white-space: normal; margin-top: 6px; }
.wba pre { font-size: 12px; overflow: auto; padding: 6px; background: var(--wb-soft); color: var(--wb-fg); margin: 4px 0 0; }
@container (max-width: 560px) { .wba-columns { grid-template-columns: minmax(0, 1fr); } }
`;
const NUDGE = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
let panels = 0;

function h(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function render({ model, el }) {
  const own = `wba-${(panels += 1)}`;
  const title = h("div", { class: "wb-title", "data-testid": "title" });
  const error = h("div", { class: "wb-error", role: "alert", "data-testid": "error", hidden: "" });
  const knobs = h("div", {});
  const samples = h("div", { class: "wba-samples", "data-testid": "samples", "data-key": "" });
  const status = h("div", { class: "wb-status", role: "status", "data-testid": "status" });
  const code = h("pre", { "data-testid": "code", hidden: "", tabindex: "0", "aria-label": "code of this setting" });
  const copy = h("button", { type: "button", "data-testid": "copy-code", onclick: () => {
    code.hidden = !code.hidden;
    if (!code.hidden) navigator.clipboard?.writeText(code.textContent).catch(() => {});
  } }, "Copy as code");
  const root = h("div", { class: "wb wba", "data-testid": "explorer", role: "region",
    "data-lm-suppress-shortcuts": "true" }, h("style", {}, STYLE), title, error,
    h("div", { class: "wba-columns" }, h("div", {}, knobs, copy), samples), status, code);
  root.addEventListener("keydown", (event) => event.stopPropagation()); // JupyterLab would take the arrows away
  el.append(root);

  // Under Panel a wish is a value that the page sets.
  const send = (wish) => {
    if (model.send) model.send(wish);
    else {
      model.set("intent", wish);
      model.save_changes();
    }
  };
  let rows = {};
  const abort = new AbortController();
  const held = {}; // sliders under the hand: their own place counts, not the kernel's

  function build() {
    const spec = model.get("spec");
    root.setAttribute("aria-label", `${spec.name} panel`);
    rows = {};
    knobs.replaceChildren(...(spec.sliders ?? []).map((slider) => {
      const id = `${own}-${slider.name}`;
      const shown = h("b", {});
      const input = h("input", { type: "range", id, min: 0, max: slider.values.length - 1, step: 1, "aria-label": slider.label,
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
      return h("label", { class: "wba-knob", for: id, title: slider.help }, h("span", {}, slider.label, shown), input);
    }));
    draw();
  }

  function draw() {
    const view = model.get("view");
    if (!view.values) return;
    for (const [name, { slider, place }] of Object.entries(rows)) {
      if (performance.now() - (held[name] ?? -1e9) > 700) place(Math.max(slider.values.indexOf(view.values[name]), 0));
    }
    title.textContent = view.title;
    error.hidden = !view.error;
    error.textContent = view.error;
    status.textContent = view.status;
    code.textContent = view.code;
    if (samples.dataset.key === view.key) return;
    const focused = samples.contains(document.activeElement) ? document.activeElement.dataset.drag : null;
    samples.innerHTML = view.body; // made by the kernel's own code, texts escaped
    samples.dataset.key = view.key;
    if (focused) samples.querySelector(`[data-drag="${focused}"]`)?.focus({ preventScroll: true });
  }

  // Points of the simplex: the picture is replaced under the hand, so the drag is the window's.
  let dragged = null;
  function move(event) {
    const svg = samples.querySelector('[data-testid="simplex"]');
    if (!dragged || !svg) return;
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    send({ point: dragged, x: at.x, y: at.y });
  }
  samples.addEventListener("pointerdown", (event) => {
    const point = event.target.closest("[data-drag]");
    if (!point) return;
    dragged = point.dataset.drag;
    point.focus({ preventScroll: true });
    event.preventDefault();
  });
  window.addEventListener("pointermove", move, { signal: abort.signal });
  window.addEventListener("pointerup", () => { dragged = null; }, { signal: abort.signal });
  samples.addEventListener("keydown", (event) => {
    const point = event.target.closest("[data-drag]");
    if (!point || !NUDGE[event.key]) return;
    event.preventDefault();
    const far = event.shiftKey ? 15 : 3;
    const [dx, dy] = NUDGE[event.key];
    send({ point: point.dataset.drag, x: +point.dataset.x + far * dx, y: +point.dataset.y + far * dy });
  });

  build();
  model.on("change:spec", build);
  model.on("change:view", draw);
  return () => {
    abort.abort();
    model.off("change:spec", build);
    model.off("change:view", draw);
    root.remove();
  };
}

export default { render };
