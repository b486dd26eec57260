// The pane of decoding: text block by block, the draft tree of one block, and each rule's acceptance beside the optimum.

const ROW = 26; // height of a node's row in a tree
const MAX_TEXT = 14; // characters of a token that a node shows
const DRAFTINGS = { iid: "independent draws", without: "draws without replacement", greedy: "likeliest, and one draw", top: "likeliest only" };

const percent = (x) => (x === 0 ? "0" : x < 0.0005 ? "<.001" : x.toFixed(x < 0.0995 ? 3 : 2).replace(/^0\./, "."));
const visible = (text) => text.replaceAll(" ", "·").replaceAll("\n", "⏎").replaceAll("\t", "→") || "∅";
const cut = (text) => ([...text].length > MAX_TEXT ? `${[...text].slice(0, MAX_TEXT - 1).join("")}…` : text);

function textPane(spec, { link, model, redraw, isPinned }) {
  const prefix = `${link.client}${isPinned ? "-a" : ""}`;
  let pane = null;
  let shown = null; // the frame that the pane is of
  let chosen = 0; // the block selected
  let hovered = -1; // and the one under the pointer

  const stream = h("div", { class: "wbd-stream", role: "listbox", tabindex: 0, "data-testid": isPinned ? "pinned" : "samples", "aria-label": "text, block by block; arrow keys choose a block", "aria-orientation": "horizontal" });
  const prompt = h("span", { class: "wbd-prompt", role: "presentation", title: "prompt" });
  stream.append(prompt);
  const caption = h("div", { class: "wb-note wbd-progress", "data-testid": "progress" });
  const showLost = h("input", { type: "checkbox", checked: true, "aria-label": "show rejected drafts in the text", "data-testid": "show-rejected", onchange: () => node.classList.toggle("wbd-nolost", !showLost.checked) });
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

  function draw(given, frame) {
    shown = frame;
    pane = given;
    prompt.replaceChildren(...token("prompt", pane.prompt).childNodes);
    lay(stream, pane.blocks, prefix);
    Object.assign(stream.dataset, { key: frame.key, revision: frame.revision, done: frame.is_done, blocks: pane.blocks.length });
    caption.textContent = frame.is_done ? `${plural(pane.n_tokens, "token")} in ${plural(pane.blocks.length, "target pass")}` : `${pane.n_tokens} of ${pane.of} tokens…`;
    if (!isPinned) drawBlock();
  }

  const current = () => (pane ? Math.min(hovered >= 0 ? hovered : chosen, pane.blocks.length - 1) : -1);

  function choose(i) {
    if (!pane?.blocks.length) return;
    chosen = clamp(i, 0, pane.blocks.length - 1);
    hovered = -1;
    link.ask({ kind: "select", item: chosen });
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
      node.classList.toggle("wbd-chosen", k === Math.min(chosen, pane.blocks.length - 1));
      node.classList.toggle("wbd-hover", k === hovered);
      node.setAttribute("aria-selected", k === Math.min(chosen, pane.blocks.length - 1));
    }
    drawBars();
    if (i < 0) return;
    stream.setAttribute("aria-activedescendant", `${prefix}-${Math.min(chosen, pane.blocks.length - 1)}`);
    const block = pane.blocks[i];
    const n = block.nodes.length;
    const text = n ? `${plural(block.n_passes, "draft pass")}, ${plural(n, "node")}, ${block.n_accepted} accepted → ${plural(block.texts.length, "token")} from one target pass`
      : "nothing drafted, 1 token from one target pass";
    treeTitle.replaceChildren(h("b", {}, `Block ${i + 1} of ${pane.blocks.length}`), ` · ${text}`);
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
    const bars = model.get("detail") ?? {};
    const i = current();
    const isOurs = shown && bars.key === shown.key;
    const here = (isOurs && bars.blocks[i]) || {};
    const n = isOurs ? bars.n_drafts[i] : undefined;
    const sign = JSON.stringify([i, isOurs, here, bars.mean, bars.rule, bars.hits, bars.n, shown?.is_done, n]);
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

  const node = isPinned ? h("div", { class: "wbd" }, stream)
    : h("div", { class: "wbd" }, h("div", { class: "wbd-over" }, legend, caption), stream, treeTitle, treeBox, h("div", { class: "wb-note" }, "edges: draft probability / target probability"));
  const side = h("div", { class: "wbd" }, h("b", { class: "wbd-heading" }, "Acceptance at this context"), barBox);
  return {
    node, side: isPinned ? null : side, draw, detail: drawBars, again: () => { if (pane && !isPinned) drawBlock(); },
    stale(isOld) { stream.classList.toggle("wbd-old", isOld); },
    files: { Tree: ["tree as SVG", (el) => download(new Blob([standalone(tree, el).text], { type: "image/svg+xml" }), "tree.svg"), "export-tree"] },
  };
}

PANES.text = textPane;
