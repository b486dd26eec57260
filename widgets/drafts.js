// Draws what a DraftsExplorer publishes (spec, view, frame, bars, frontier, pinned, reply) and sends it wishes. The
// helpers that it draws with are those of explorer.js, which stand before it in one module.

const MARKS = [...SHAPES, "square", "star"];
const ROW = 26; // height of a node's row in a tree
const MAX_TEXT = 14; // characters of a token that a node shows
const DRAFTINGS = { iid: "independent draws", without: "draws without replacement", greedy: "likeliest, and one draw", top: "likeliest only" };

const parse = (value) => (value?.byteLength ? JSON.parse(new TextDecoder().decode(value)) : null);
const percent = (x) => (x === 0 ? "0" : x < 0.0005 ? "<.001" : x.toFixed(x < 0.0995 ? 3 : 2).replace(/^0\./, "."));
const visible = (text) => text.replaceAll(" ", "·").replaceAll("\n", "⏎").replaceAll("\t", "→") || "∅";
const cut = (text) => ([...text].length > MAX_TEXT ? `${[...text].slice(0, MAX_TEXT - 1).join("")}…` : text);
const plural = (n, word) => `${n} ${n === 1 ? word : word.endsWith("s") ? `${word}es` : `${word}s`}`;

function render({ model, el }) {
  const spec = model.get("spec");
  const colour = (k) => COLOURS[k % COLOURS.length];
  const client = Math.random().toString(36).slice(2, 8);
  let view = model.get("view");
  let frame = null;
  let local = structuredClone(view.state); // the settings as the hand has them, ahead of Python's
  let held = 0;
  let gesture = 0;
  let lastKey = { name: "", time: 0 };
  let chosen = 0; // the block selected
  let hovered = -1; // and the one under the pointer
  let unsent = null;

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
    } else if (intent.kind === "select" && last?.kind === "select") last.block = intent.block;
    else queue.push(intent);
    pump();
  }

  function pump() {
    if (pending || !queue.length) return;
    const intent = queue.shift();
    pending = intent.id = `${client}-${++serial}`;
    model.send(intent);
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
    if (held && onRelease.checked) unsent = { state: { ...unsent?.state, ...part.state }, knobs: { ...unsent?.knobs, ...part.knobs } };
    else ask({ kind: "set", state: { ...part.state }, knobs: { ...part.knobs }, gesture: `${client}-${gesture}` });
  }

  function hold() {
    held += 1;
    gesture += 1;
    const release = () => {
      removeEventListener("pointerup", release, true);
      removeEventListener("pointercancel", release, true);
      held -= 1;
      const part = unsent;
      unsent = null;
      if (part) change(part);
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
  const typing = new WeakSet(); // what is half typed must not be written over by news from Python
  function guard(field) {
    field.addEventListener("input", () => typing.add(field));
    for (const end of ["change", "blur"]) field.addEventListener(end, () => typing.delete(field), true);
    return field;
  }
  const seed = guard(h("input", { type: "number", min: 0, step: 1, "aria-label": "seed", class: "wb-number", "data-testid": "seed",
    onchange: () => { beginGesture(); change({ state: { seed: Number(seed.value) } }); } }));
  const undo = button("↶ Undo", "undo the last change", () => ask({ kind: "undo" }), "undo");
  const redo = button("↷ Redo", "redo", () => ask({ kind: "redo" }), "redo");
  const pin = button("Pin as A", "keep this run's text beside those that follow", () => ask({ kind: view.pinned ? "unpin" : "pin" }), "pin");
  const top = h("div", { class: "wb-top" },
    h("div", { class: "wb-line" }, title, stale),
    h("div", { class: "wb-tools" }, status, h("label", { class: "wb-seed" }, "seed", seed),
      button("New", "new random seed", () => { beginGesture(); change({ state: { seed: Math.floor(Math.random() * 10000) } }); }, "dice"),
      undo, redo, button("Reset", "back to the settings at the start", () => ask({ kind: "reset" }), "reset"), pin));

  // --- knobs

  const method = h("select", { "aria-label": "method", "data-testid": "method", onchange: () => { beginGesture(); ask({ kind: "set", state: { method: method.value }, knobs: {}, gesture: `${client}-${gesture}` }); } },
    ...spec.methods.map((m) => h("option", { value: m.name, title: m.summary }, m.name)));
  const source = h("div", { class: "wb-source" });
  const knobBox = h("div", { class: "wb-knoblist" });
  let controls = [];

  function slider(knob) {
    const [low, high] = knob.soft ?? [knob.low, knob.high];
    const range = h("input", { type: "range", "aria-label": words(knob.name), "data-testid": `knob-${knob.name}`, title: `${knob.help}. Double click: ${knob.start}`, min: low, max: high, step: knob.step ?? "any" });
    range.addEventListener("pointerdown", hold);
    range.addEventListener("input", () => {
      if (!held) beginGesture(knob.name);
      change({ knobs: { [knob.name]: +Number(range.value).toPrecision(6) } });
    });
    range.addEventListener("dblclick", () => { beginGesture(); change({ knobs: { [knob.name]: knob.start } }); });
    const field = guard(h("input", { type: "number", class: "wb-number", "aria-label": `${words(knob.name)}, exact value`, "data-testid": `field-${knob.name}`,
      min: knob.low, max: knob.high, step: knob.step ?? "any", title: `${knob.low} to ${knob.high} ${knob.unit}`,
      onchange: () => { beginGesture(); change({ knobs: { [knob.name]: Number(field.value) } }); } }));
    return {
      nodes: [range, field], wide: true,
      put(value) {
        if (Number(range.value) !== value) range.value = value;
        range.setAttribute("aria-valuetext", `${value} ${knob.unit}`.trim());
        if (!typing.has(field)) field.value = value;
      },
    };
  }

  function chooser(knob) {
    const select = h("select", { "aria-label": words(knob.name), "data-testid": `knob-${knob.name}`, onchange: () => { beginGesture(); change({ knobs: { [knob.name]: knob.choices[select.selectedIndex] } }); } },
      ...knob.choices.map((choice) => h("option", {}, String(choice))));
    return { nodes: [select], put: (value) => { select.selectedIndex = knob.choices.indexOf(value); } };
  }

  // A list of numbers, as text. What is none is sent as it is: Python says what is allowed.
  function list(knob) {
    const field = guard(h("input", { type: "text", class: "wbd-list", "aria-label": words(knob.name), "data-testid": `knob-${knob.name}`, title: knob.help, spellcheck: "false",
      onchange: () => {
        const parts = field.value.split(/[\s,;]+/).filter(Boolean);
        beginGesture();
        change({ knobs: { [knob.name]: parts.length && parts.every((part) => Number.isFinite(Number(part))) ? parts.map(Number) : field.value } });
      } }));
    return { nodes: [field], put: (value) => { if (!typing.has(field)) field.value = [value].flat().join(", "); } };
  }

  function buildKnobs() {
    const now = spec.methods.find((m) => m.name === local.method);
    source.textContent = now.summary;
    source.title = `${now.summary}\n${now.source}`;
    controls = [...now.knobs].sort((a, b) => (a.name === "n_tokens") - (b.name === "n_tokens")).map((knob) => {
      const control = knob.kind === "tuple" ? list(knob) : knob.choices ? chooser(knob) : slider(knob);
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
    if (!typing.has(seed)) seed.value = local.seed;
    for (const { knob, nodes, put, row, reason } of controls) {
      const unmet = Object.entries(knob.needs).find(([name, wanted]) => ![wanted].flat().includes(local.knobs[name]));
      nodes.forEach((node) => { node.disabled = Boolean(unmet); });
      row.classList.toggle("wb-off", Boolean(unmet));
      reason.textContent = unmet ? ` needs ${words(unmet[0])} ${[unmet[1]].flat().join(" or ")}` : "";
      if (knob.name in local.knobs) put(local.knobs[knob.name]);
    }
  }

  // --- the text, token by token

  const stream = h("div", { class: "wbd-stream", role: "listbox", tabindex: 0, "data-testid": "samples", "aria-label": "text, block by block; arrow keys choose a block", "aria-orientation": "horizontal" });
  const prompt = h("span", { class: "wbd-prompt", role: "presentation", title: "prompt" });
  stream.append(prompt);
  const pinnedStream = h("div", { class: "wbd-stream", "data-testid": "pinned" });
  const pinnedCaption = h("div", { class: "wb-caption" });
  const pinnedSide = h("div", { hidden: true }, pinnedCaption, pinnedStream);
  const comparison = h("div", { class: "wb-comparison", "data-testid": "comparison", hidden: true });
  const caption = h("div", { class: "wb-note wbd-progress", "data-testid": "progress" });
  const showLost = h("input", { type: "checkbox", checked: true, "aria-label": "show rejected drafts in the text", "data-testid": "show-rejected", onchange: () => root.classList.toggle("wbd-nolost", !showLost.checked) });
  const legend = h("div", { class: "wbd-legend" },
    h("span", { class: "wbd-token wbd-draft" }, "accepted draft"), h("span", { class: "wbd-token wbd-own" }, "the target's own"),
    h("label", { class: "wb-switch" }, showLost, h("span", { class: "wbd-token wbd-lost" }, "rejected")));

  // Whitespace is shown: a dot per space, an arrow and a new line.
  function token(kind, text) {
    const node = h("span", { class: `wbd-token wbd-${kind}` });
    if (kind === "lost") node.append(visible(text));
    else {
      for (const part of text.split(/(\n|[ \t]+)/).filter(Boolean)) {
        if (!/^[ \n\t]/.test(part)) node.append(part);
        else {
          node.append(h("wbr"), h("span", { class: "wbd-space" }, visible(part)));
          if (part === "\n") node.append(h("br"));
        }
      }
      if (!text) node.append(h("span", { class: "wbd-space" }, "∅"));
    }
    return node;
  }

  const last = (block) => block.path.at(-1) ?? -1;
  const lost = (block) => block.nodes.filter((_, node) => block.parents[node] === last(block));

  function piece(block, i, id) {
    const rejected = [...new Set(lost(block))];
    const drafts = block.texts.slice(0, block.n_accepted);
    const node = h("span", { class: "wbd-block", role: "option", id, "data-block": i,
      "aria-label": `block ${i + 1}: accepted ${drafts.map(visible).join(" ") || "none"}; rejected ${rejected.map(visible).join(" ") || "none"}; target's own ${block.own ? visible(block.own[0]) : "none"}` });
    let before = "";
    const put = (kind, text) => { // a line may break between tokens, but not within a word
      if (!/\p{L}$/u.test(before) || !/^\p{L}/u.test(text)) node.append(h("wbr"));
      node.append(token(kind, text));
      if (kind !== "lost") before = text;
    };
    drafts.forEach((text) => put("draft", text));
    rejected.slice(0, 3).forEach((text) => put("lost", text));
    if (rejected.length > 3) node.append(h("span", { class: "wbd-token wbd-lost wbd-more" }, `+${rejected.length - 3}`));
    if (block.own) put("own", block.own[0]);
    return node;
  }

  // Blocks that stay the same keep their elements.
  function lay(host, blocks, prefix) {
    const old = [...host.querySelectorAll(".wbd-block")];
    blocks.forEach((block, i) => {
      const sign = JSON.stringify([block.texts, block.n_accepted, lost(block)]);
      if (old[i]?.dataset.sign === sign) return;
      const node = piece(block, i, `${prefix}-${i}`);
      node.dataset.sign = sign;
      if (old[i]) old[i].replaceWith(node);
      else host.append(node);
    });
    old.slice(blocks.length).forEach((node) => node.remove());
  }

  function drawFrame() {
    const next = parse(model.get("frame"));
    if (!next) return;
    frame = next;
    title.textContent = title.title = frame.title;
    prompt.replaceChildren(...token("prompt", frame.prompt).childNodes);
    lay(stream, frame.blocks, client);
    Object.assign(stream.dataset, { key: frame.key, revision: frame.revision, done: frame.is_done, blocks: frame.blocks.length });
    caption.textContent = frame.is_done ? `${plural(frame.n_tokens, "token")} in ${plural(frame.blocks.length, "target pass")}` : `${frame.n_tokens} of ${frame.of} tokens…`;
    drawBlock();
  }

  function drawPinned() {
    const given = parse(model.get("pinned"));
    pinnedSide.hidden = !given;
    if (given) lay(pinnedStream, given.blocks, `${client}-a`);
  }

  const current = () => (frame ? Math.min(hovered >= 0 ? hovered : chosen, frame.blocks.length - 1) : -1);

  function choose(i) {
    if (!frame?.blocks.length) return;
    chosen = clamp(i, 0, frame.blocks.length - 1);
    hovered = -1;
    ask({ kind: "select", block: chosen });
    stream.querySelector(`[data-block="${chosen}"]`)?.scrollIntoView({ block: "nearest" });
    redraw(drawBlock);
  }

  const under = (event) => Number(event.target.closest(".wbd-block")?.dataset.block ?? -1);
  const hover = (i) => { if (i !== hovered) { hovered = i; redraw(drawBlock); } };
  stream.addEventListener("pointerover", (event) => hover(under(event)));
  stream.addEventListener("pointerleave", () => hover(-1));
  stream.addEventListener("click", (event) => { if (under(event) >= 0) choose(under(event)); });
  stream.addEventListener("keydown", (event) => {
    const to = { ArrowLeft: chosen - 1, ArrowUp: chosen - 1, ArrowRight: chosen + 1, ArrowDown: chosen + 1, Home: 0, End: Infinity }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    choose(to);
  });

  // --- the tree of one block

  const treeTitle = h("div", { class: "wbd-treetitle", "data-testid": "block" });
  const tree = s("svg", { class: "wbd-tree", role: "img", "data-testid": "tree" });
  const treeBox = h("div", { class: "wbd-treebox", tabindex: 0, role: "group", "aria-label": "draft tree of the block chosen" }, tree);

  function drawBlock() {
    const i = current();
    for (const node of stream.querySelectorAll(".wbd-block")) {
      const k = Number(node.dataset.block);
      node.classList.toggle("wbd-chosen", k === Math.min(chosen, frame.blocks.length - 1));
      node.classList.toggle("wbd-hover", k === hovered);
      node.setAttribute("aria-selected", k === Math.min(chosen, frame.blocks.length - 1));
    }
    drawBars();
    if (i < 0) return;
    stream.setAttribute("aria-activedescendant", `${client}-${Math.min(chosen, frame.blocks.length - 1)}`);
    const block = frame.blocks[i];
    const n = block.nodes.length;
    const text = n ? `${plural(block.n_passes, "draft pass")}, ${plural(n, "node")}, ${block.n_accepted} accepted → ${plural(block.texts.length, "token")} from one target pass`
      : "nothing drafted, 1 token from one target pass";
    treeTitle.replaceChildren(h("b", {}, `Block ${i + 1} of ${frame.blocks.length}`), ` · ${text}`);
    tree.setAttribute("aria-label", `draft tree of block ${i + 1}: ${text}`);
    drawTree(block);
  }

  function drawTree(block) {
    const n = block.nodes.length;
    const path = new Set(block.path);
    const name = (node) => cut(visible(block.nodes[node])) + (block.times[node] > 1 ? ` ×${block.times[node]}` : "");
    // Nodes to draw: the context, the drafts, and below the last accepted one what the target said instead.
    const all = [{ id: -1, text: "context", kind: "root" }, ...block.nodes.map((_, node) => ({
      id: node, parent: block.parents[node], text: name(node), kind: path.has(node) ? "kept" : block.target[node] == null ? "unseen" : "lost",
      edge: `${percent(block.draft[node])} / ${block.target[node] == null ? "–" : percent(block.target[node])}` }))];
    if (block.own) all.push({ id: n, parent: last(block), text: cut(visible(block.own[0])), kind: "own", edge: `– / ${percent(block.own[1])}` });
    const by = new Map(all.map((entry) => [entry.id, Object.assign(entry, { below: [], depth: 0, wide: Math.max(24, 7.4 * [...entry.text].length + 12) })]));
    for (const entry of all.slice(1)) {
      entry.depth = by.get(entry.parent).depth + 1;
      by.get(entry.parent).below.push(entry);
    }
    let row = 0;
    const place = (entry) => {
      if (!entry.below.length) entry.y = ROW * row++ + ROW / 2 + 6;
      else {
        entry.below.forEach(place);
        entry.y = (entry.below[0].y + entry.below.at(-1).y) / 2;
      }
    };
    place(all[0]);
    const depth = Math.max(...all.map((entry) => entry.depth));
    const left = [4];
    const widths = Array.from({ length: depth + 1 }, (_, d) => Math.max(...all.filter((entry) => entry.depth === d).map((entry) => entry.wide)));
    const spare = (treeBox.clientWidth || 500) - 20 - sum(widths);
    const gap = depth ? clamp(spare / depth, 76, 130) : 0; // for an edge and its label
    for (let d = 1; d <= depth; d++) left[d] = left[d - 1] + widths[d - 1] + gap;
    const width = left[depth] + widths[depth] + 6;
    const height = ROW * row + 12;
    const edges = s("g");
    const nodes = s("g");
    for (const entry of all) {
      const x = left[entry.depth];
      if (entry.parent !== undefined) {
        const from = by.get(entry.parent);
        const [x0, x1] = [left[from.depth] + from.wide, x];
        const bend = left[from.depth] + widths[from.depth] + 14;
        edges.append(s("path", { class: `wbd-edge wbd-e-${entry.kind}`, d: `M${x0},${from.y}H${bend - 12}C${bend},${from.y} ${bend - 2},${entry.y} ${bend + 12},${entry.y}H${x1}` }));
        nodes.append(s("text", { class: `wbd-label wbd-l-${entry.kind}`, x: x1 - 4, y: entry.y - 3 }, entry.edge));
      }
      const group = s("g", { class: `wbd-node wbd-n-${entry.kind}`, "data-kind": entry.kind },
        s("rect", { x, y: entry.y - 10, width: entry.wide, height: 20, rx: 4 }), s("text", { x: x + entry.wide / 2, y: entry.y + 4 }, entry.text));
      if (entry.kind === "lost" || entry.kind === "unseen") group.append(s("line", { x1: x + 3, x2: x + entry.wide - 3, y1: entry.y, y2: entry.y }));
      group.append(s("title", {}, { root: "the text so far", kept: "accepted draft", lost: "rejected draft", unseen: "never looked at: a draft above it was rejected", own: "the target's own token" }[entry.kind]));
      nodes.append(group);
    }
    tree.setAttribute("width", width);
    tree.setAttribute("height", height);
    tree.replaceChildren(edges, nodes);
  }

  // --- acceptance: each rule against the optimum of its way of drafting

  const barBox = h("div", { class: "wbd-bars", "data-testid": "bars" });
  let barsDrawn = "";

  function drawBars() {
    const bars = model.get("bars") ?? {};
    const i = current();
    const isOurs = frame && bars.key === frame.key;
    const here = (isOurs && bars.blocks[i]) || {};
    const n = isOurs ? bars.n_drafts[i] : undefined;
    const sign = JSON.stringify([i, isOurs, here, bars.mean, bars.rule, bars.hits, bars.n, frame?.is_done, n]);
    if (sign === barsDrawn) return;
    barsDrawn = sign;
    if (!isOurs) return; // the old ones stay until there are new ones
    if (n === 0) {
      barBox.replaceChildren(h("p", { class: "wb-note" }, bars.n ? "Nothing was drafted in this block." : "Nothing is drafted: every token is the target's own."));
      return;
    }
    const groups = Object.entries(DRAFTINGS).map(([drafting, text]) => [drafting, text, Object.keys(spec.rules).filter((rule) => spec.rules[rule] === drafting && (rule in here || rule in bars.mean || rule === bars.rule))])
      .filter(([drafting, , rules]) => rules.length || `optimum ${drafting}` in here);
    const rows = groups.flatMap(([drafting, text, rules]) => {
      const own = { greedy: "greedy", top: "top" }[drafting]; // these rules attain the optimum of their drafts
      const best = here[`optimum ${drafting}`] ?? here[own];
      const entries = [...rules, ...(own ? [] : [`optimum ${drafting}`])];
      return [h("div", { class: "wbd-group" }, text), ...entries.map((key) => barRow(key, here[key], bars.mean[key], best, bars.rule))];
    });
    const head = h("div", { class: "wbd-bar wbd-head" }, h("span", {}, n === undefined ? "" : plural(n, "draft")), h("span"), h("span", {}, "here"), h("span", { title: `mean of the ${bars.n_graded} blocks computed so far` }, "mean"));
    const share = bars.n ? `First drafts accepted in this run: ${bars.hits} of ${plural(bars.n, "block")} (${percent(bars.hits / bars.n)}). ` : "";
    const far = bars.n_graded < bars.n ? `Mean of ${bars.n_graded} of ${bars.n} blocks so far.` : `Mean of ${plural(bars.n, "block")}.`;
    barBox.replaceChildren(head, ...rows, h("p", { class: "wbd-note" }, `Line: optimum for such drafts; dot: mean. ${share}${far}`));
  }

  function barRow(key, value, mean, best, used) {
    const isOptimum = key.startsWith("optimum");
    const name = isOptimum ? "optimum" : key;
    const text = value ? `${percent(value[0])}${value[1] ? ` ± ${value[1].toFixed(2).slice(1)}` : ""}` : "…";
    const track = h("span", { class: "wbd-track" });
    if (value) track.append(h("i", { class: isOptimum ? "wbd-fill wbd-best" : key === used ? "wbd-fill wbd-used" : "wbd-fill", style: `width:${100 * value[0]}%` }));
    if (mean !== undefined) track.append(h("i", { class: "wbd-mean", style: `left:${100 * mean}%` }));
    if (best) track.append(h("i", { class: "wbd-tick", style: `left:${100 * best[0]}%` }));
    return h("div", { class: key === used ? "wbd-bar wbd-inuse" : "wbd-bar", role: "img", "data-rule": key,
      "aria-label": `${key}: acceptance ${text}${mean === undefined ? "" : `, mean ${percent(mean)}`}${key === used ? ", in use" : ""}` },
    h("span", { class: "wbd-rule", title: value?.[1] ? `${key}: no closed form; by drawing` : key }, key === used ? `▸ ${name}` : name), track,
    h("span", { class: "wbd-value" }, text), h("span", { class: "wbd-value" }, mean === undefined ? "" : percent(mean)));
  }

  // --- cost

  const costs = h("div", { class: "wbd-costs", "data-testid": "costs" });

  function line(name, value, note, id) {
    return h("div", { class: "wbd-cost", "data-testid": id }, h("span", {}, name), h("b", {}, value), h("small", {}, note ?? ""));
  }

  function drawNumbers() {
    const run = view.shown;
    if (!run) {
      costs.replaceChildren(h("div", { class: "wb-empty" }, "no run yet: the first one is on its way"));
      return;
    }
    const { reference, pinned } = view;
    const [value, stderr, n] = run.quality.block_efficiency;
    const more = n > run.n ? `; ${measured(value, stderr)} over ${n} texts` : stderr != null ? ` ± ${measured(stderr)} over ${n} texts` : `; more texts once nothing else is asked`;
    const surprise = run.quality.surprise;
    const plain = reference?.quality.surprise;
    const time = run.timing;
    const base = reference?.timing;
    const speed = time && base && base.ms / time.ms;
    const error = speed && speed * Math.hypot(time.spread / time.ms, base.spread / base.ms);
    costs.replaceChildren(
      line("tokens per target pass", short(run.efficiency), (run.n > 1 ? `${run.n} texts` : "this text") + more, "efficiency"),
      ...run.models.map(([name, passes, positions]) => line(name, plural(passes, "pass"), `${plural(positions, "position")}${run.n > 1 ? `, all ${run.n} texts` : ""}, prompt included`, "passes")),
      line("arithmetic factor", reference ? `× ${short(run.flops / reference.flops)}` : "…", reference ? `${short(run.flops)} FLOPs per token; plain decoding ${short(reference.flops)}` : "plain decoding is not known yet", "factor"),
      line("seconds per token", time ? `${measured(time.ms, time.spread)} ms` : "…", time ? `${base ? `plain ${measured(base.ms, base.spread)} ms, so × ${measured(speed, error)} its speed. ` : ""}Median of ${time.repeats} with spread, ${time.machine}` : "measured once nothing else is asked", "seconds"),
      ...(surprise ? [line("surprise", `${measured(surprise[0], surprise[1])} bits`, `per token, ${plural(surprise[2], "text")}${plain && run.method !== reference.method ? `; plain ${measured(plain[0], plain[1])}, ${plural(plain[2], "text")}` : ""}`, "surprise")] : []));
    pin.textContent = pinned ? "Unpin A" : "Pin as A";
    comparison.hidden = !pinned;
    if (!pinned) return;
    pinnedCaption.textContent = `A, pinned: ${pinned.title}`;
    const names = Object.keys(run.knobs).filter((name) => name in pinned.knobs); // what both methods have
    const text = (v) => [v].flat().join("-");
    comparison.replaceChildren(h("b", {}, "A → B "), [...(pinned.method !== run.method ? [`${pinned.method} → ${run.method}`] : []),
      ...names.filter((name) => text(pinned.knobs[name]) !== text(run.knobs[name])).map((name) => `${words(name)} ${text(pinned.knobs[name])} → ${text(run.knobs[name])}`),
      `tokens per pass ${short(pinned.efficiency)} → ${short(run.efficiency)}`, `FLOPs per token × ${short(run.flops / pinned.flops)}`].join(" · "));
  }

  // --- the runs tried: tokens per target pass against what a token costs

  const costSelect = h("select", { "aria-label": "cost on the plot", "data-testid": "cost", onchange: () => drawFrontier() },
    h("option", { value: "flops" }, "FLOPs per token"), h("option", { value: "ms" }, "measured ms per token"));
  const plot = s("svg", { class: "wb-plot", height: 230, tabindex: 0, role: "application", "data-testid": "frontier", "aria-label": "tokens per target pass against cost per token; arrow keys go from run to run, Enter returns to one" });
  const hint = h("div", { class: "wb-note", "data-testid": "hover" });
  let drawn = [];
  let selected = -1;

  function drawFrontier() {
    const cost = costSelect.value;
    const points = (model.get("frontier").points ?? []).filter((p) => p[cost] > 0);
    const width = plot.clientWidth || 600;
    const box = { left: 52, right: width - 16, top: 26, bottom: 190 };
    drawn = [];
    selected = -1;
    plot.replaceChildren();
    if (!points.length) {
      plot.append(s("text", { x: width / 2, y: 110, "text-anchor": "middle", class: "wb-emptytext" }, cost === "ms" ? "no run is timed yet: times are measured once nothing else is asked" : "no run yet"));
      return;
    }
    const spread = (values, low, high) => [Math.min(...values) / low, Math.max(...values) * high];
    const [x0, x1] = spread(points.map((p) => p[cost]), 1.3, 1.3);
    const top = Math.max(...points.map((p) => p.value + (p.stderr ?? 0)));
    const [y0, y1] = [0.8, Math.max(top, 1.5) * 1.06];
    const X = (v) => box.left + (Math.log(v / x0) / Math.log(x1 / x0)) * (box.right - box.left);
    const Y = (v) => box.bottom - ((v - y0) / (y1 - y0)) * (box.bottom - box.top);
    const grid = s("g", { class: "wb-axis" });
    for (const [t, text] of named(logTicks(x0, x1), short)) grid.append(s("line", { class: "wb-gridline", x1: X(t), x2: X(t), y1: box.top, y2: box.bottom }), s("text", { x: X(t), y: box.bottom + 15, "text-anchor": "middle" }, text));
    for (const [t, text] of named(niceTicks(y0, y1, 4), short)) grid.append(s("line", { class: "wb-gridline", x1: box.left, x2: box.right, y1: Y(t), y2: Y(t) }), s("text", { x: box.left - 6, y: Y(t) + 4, "text-anchor": "end" }, text));
    grid.append(s("text", { x: (box.left + box.right) / 2, y: box.bottom + 32, "text-anchor": "middle" }, `${costSelect.selectedOptions[0].text} (log)`),
      s("text", { transform: `translate(13,${(box.top + box.bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, "tokens per pass"));
    plot.append(grid);
    const used = new Map();
    for (const point of points) {
      const [x, y] = [X(point[cost]), Y(point.value)];
      const k = point.is_reference ? -1 : spec.methods.findIndex((entry) => entry.name === point.method);
      if (k >= 0) used.set(point.method, k);
      const group = s("g", { class: "wb-point", "data-keys": point.keys.join(" "), "data-role": point.is_reference ? "reference" : "" });
      if (point.stderr) group.append(s("line", { class: "wb-whisker", x1: x, x2: x, y1: Y(point.value - point.stderr), y2: Y(point.value + point.stderr) }));
      const mark = marker(k < 0 ? "star" : MARKS[k % MARKS.length], x, y, 4.5);
      mark.setAttribute("class", k < 0 ? "wb-rival" : "wb-mark");
      if (k >= 0) mark.setAttribute("fill", colour(k));
      group.append(mark);
      if (point.keys.includes(view.shown?.key)) group.append(s("circle", { class: "wb-ring", cx: x, cy: y, r: 9, "data-testid": "ring" }));
      plot.append(group);
      drawn.push({ point, x, y });
    }
    let x = box.left;
    for (const [name, k] of [...used, ["plain decoding", -1], ["shown", -2]]) {
      const mark = k === -2 ? s("circle", { class: "wb-ring", cx: x + 8, cy: 12, r: 6 }) : marker(k < 0 ? "star" : MARKS[k % MARKS.length], x + 8, 12, 4.5);
      if (k > -2) mark.setAttribute("class", k < 0 ? "wb-rival" : "wb-mark");
      if (k >= 0) mark.setAttribute("fill", colour(k));
      plot.append(mark, s("text", { class: "wb-keytext", x: x + 20, y: 16 }, name));
      x += 36 + 6.7 * name.length;
    }
    point(-1);
  }

  function point(index) {
    selected = index;
    plot.querySelectorAll(".wb-point").forEach((node, i) => node.classList.toggle("wb-hover", i === index));
    if (index < 0) {
      hint.textContent = "up and to the left is better; click a run to return to it";
      return;
    }
    const p = drawn[index].point;
    hint.textContent = `${p.title}: ${measured(p.value, p.stderr)} tokens per pass (n = ${p.n}), ${short(p.flops)} FLOPs${p.ms ? `, ${short(p.ms)} ms` : ""} per token`;
  }

  function nearest(event) {
    const at = plot.getBoundingClientRect();
    const far = drawn.map(({ x, y }) => Math.hypot(x - (event.clientX - at.left), y - (event.clientY - at.top)));
    const best = far.indexOf(Math.min(...far));
    return far[best] < 14 ? best : -1;
  }

  const recall = (index) => { if (index >= 0) ask({ kind: "recall", key: drawn[index].point.keys[0] }); };
  plot.addEventListener("pointermove", (event) => { const i = nearest(event); if (i !== selected) point(i); });
  plot.addEventListener("pointerleave", () => point(-1));
  plot.addEventListener("blur", () => point(-1));
  plot.addEventListener("click", (event) => recall(nearest(event)));
  plot.addEventListener("keydown", (event) => {
    const order = [...drawn.keys()].sort((a, b) => drawn[a].x - drawn[b].x);
    const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
    if (step && order.length) {
      event.preventDefault();
      const now = order.indexOf(selected);
      point(order[now < 0 ? 0 : clamp(now + step, 0, order.length - 1)]);
    } else if (event.key === "Enter") recall(selected);
  });

  // --- more texts, links, code

  const scoreButtons = spec.scores.map((n) => button(`n = ${n}`, `grade these settings with ${n} texts`, () => ask({ kind: "score", n }), `score-${n}`));
  const stopButton = button("Stop", "stop grading", () => ask({ kind: "stop_score" }), "score-stop");
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

  const paste = h("input", { type: "text", placeholder: "paste a link", "aria-label": "paste a link", "data-testid": "paste", spellcheck: "false" });
  const open = () => { if (paste.value.trim()) ask({ kind: "load", link: paste.value.trim() }); };
  paste.addEventListener("keydown", (event) => { if (event.key === "Enter") open(); });
  const onRelease = h("input", { type: "checkbox", "aria-label": "update on release", "data-testid": "on-release" });
  const group = (name, ...nodes) => h("div", { class: "wb-group", role: "group", "aria-label": name }, h("span", {}, name), ...nodes);
  const foot = h("div", { class: "wb-foot" },
    group("grade with more texts", ...scoreButtons, stopButton),
    group("export", button("SVG", "plot as SVG", () => download(new Blob([standalone(plot, el).text], { type: "image/svg+xml" }), "drafts.svg"), "export-svg"),
      button("Tree", "tree as SVG", () => download(new Blob([standalone(tree, el).text], { type: "image/svg+xml" }), "tree.svg"), "export-tree"),
      button("CSV", "all runs as CSV", () => ask({ kind: "csv" }), "export-csv")),
    group("share", button("Copy link", "copy a link to these settings", () => ask({ kind: "link" }), "copy-link"),
      button("Copy as code", "copy Python code that makes this run", () => ask({ kind: "code" }), "copy-code"), paste, button("Open", "open the pasted link", open, "open-link")),
    h("label", { class: "wb-switch" }, onRelease, "update on release"));

  // --- all together

  const root = h("div", { class: "wb wbd", "data-testid": "explorer", "data-lm-suppress-shortcuts": "true" },
    top, problem,
    h("div", { class: "wb-columns wbd-columns" },
      h("div", { class: "wb-knobs" }, h("div", { class: "wb-knob" }, h("span", { class: "wb-name" }, "method"), method), source, knobBox),
      h("div", { class: "wbd-middle" }, h("div", { class: "wbd-over" }, legend, caption), stream, pinnedSide, comparison, treeTitle, treeBox,
        h("div", { class: "wb-note" }, "edges: draft probability / target probability")),
      h("div", { class: "wbd-numbers" },
        h("div", {}, h("b", { class: "wbd-heading" }, "Acceptance at this context"), barBox), h("div", {}, h("b", { class: "wbd-heading" }, "Cost of this run"), costs))),
    h("div", { class: "wb-frontier" }, h("div", { class: "wb-row" }, h("b", {}, "Runs tried"), "against", costSelect), plot, hint),
    foot, boxPanel);
  root.addEventListener("keydown", (event) => event.stopPropagation()); // JupyterLab would take the arrows away

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

  let numbersDrawn = "";
  function drawView() {
    settle();
    const bad = view.error || view.notice;
    problem.hidden = !bad;
    problem.textContent = bad;
    stale.classList.toggle("wb-on", Boolean(view.is_stale && !view.error));
    stream.classList.toggle("wbd-old", Boolean(frame && view.is_stale && frame.key !== view.key && !view.error));
    status.textContent = view.status ? `idle work: ${view.status}…` : "";
    undo.disabled = !view.can_undo;
    redo.disabled = !view.can_redo;
    scoreButtons.forEach((node) => { node.hidden = view.is_scoring; });
    stopButton.hidden = !view.is_scoring;
    const numbers = JSON.stringify([view.shown, view.reference, view.pinned?.key]);
    if (numbers !== numbersDrawn) {
      drawNumbers();
      drawFrontier();
    }
    numbersDrawn = numbers;
  }

  function takeReply() {
    const reply = model.get("reply");
    if (!reply.id?.startsWith(client)) return;
    if (reply.kind === "csv") download(new Blob([reply.text], { type: "text/csv" }), "runs.csv");
    else offer(reply.text, reply.kind === "link" ? "Link to the run shown" : "Code for the run shown");
  }

  const on = { "change:view": takeView, "change:frontier": () => redraw(drawFrontier), "change:frame": () => redraw(drawFrame, drawView), "change:bars": () => redraw(drawBars), "change:pinned": () => redraw(drawPinned), "change:reply": takeReply };
  for (const [event, callback] of Object.entries(on)) model.on(event, callback);
  const watcher = new ResizeObserver(() => redraw(drawFrontier, ...(frame ? [drawBlock] : [])));
  el.append(root);
  watcher.observe(root);
  drawControls();
  drawFrame();
  drawView();
  drawPinned();
  return () => {
    watcher.disconnect();
    cancelAnimationFrame(due);
    clearTimeout(timer);
    for (const [event, callback] of Object.entries(on)) model.off(event, callback);
  };
}

export default { render };
