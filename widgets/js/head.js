// The head of a panel with settings: title, what goes on, the seed, the history, and what could not be.

function headPart({ ask, reseed, before = null, after = null }) {
  const title = h("div", { class: "wb-title", "data-testid": "title" });
  const stale = h("span", { class: "wb-stale", "data-testid": "stale" }, "updating…");
  const status = h("div", { class: "wb-status", role: "status", "data-testid": "status" });
  const problem = h("div", { class: "wb-error", role: "alert", "data-testid": "error", hidden: true });
  const seed = guard(h("input", { type: "number", min: 0, step: 1, "aria-label": "seed", class: "wb-number", "data-testid": "seed", onchange: () => reseed(Number(seed.value)) }));
  const undo = button("↶ Undo", "undo the last change", () => ask({ kind: "undo" }), "undo");
  const redo = button("↷ Redo", "redo", () => ask({ kind: "redo" }), "redo");
  const node = h("div", { class: "wb-top" }, h("div", { class: "wb-line" }, title, stale),
    h("div", { class: "wb-tools" }, before, status, h("label", { class: "wb-seed" }, "seed", seed),
      button("New", "new random seed", () => reseed(Math.floor(Math.random() * 10000)), "dice"), undo, redo,
      button("Reset", "back to the start", () => ask({ kind: "reset" }), "reset"), after));
  return {
    node: h("div", {}, node, problem), status,
    entitle(text) { title.textContent = title.title = text; },
    showSeed(value) { if (!typing.has(seed)) seed.value = value; },
    draw(view, doing, isBusy) {
      problem.textContent = view.error || view.notice;
      problem.hidden = !problem.textContent;
      stale.classList.toggle("wb-on", isBusy);
      status.textContent = doing;
      undo.disabled = !view.can_undo;
      redo.disabled = !view.can_redo;
    },
  };
}
