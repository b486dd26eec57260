// The one plot of all live charts: axes with round ticks, lines with bands, points with whiskers, a key, hover, keyboard and
// click. Its ticks are those of ticks.js.

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

// Buttons that save a plot as it is, in light colours.
const savers = (plot, host, name) => [
  button("SVG", `${name} as SVG`, () => download(new Blob([standalone(plot.node, host).text], { type: "image/svg+xml" }), `${name}.svg`), "export-svg"),
  button("PNG", `${name} as PNG`, () => rasterise(standalone(plot.node, host), (blob) => download(blob, `${name}.png`)), "export-png"),
];

const LINE = 18; // height of a row of the key
const DOT = 4.5;

// draw({x, y, lines, points, key, ring, empty}). An axis: {label, log, better: "up" | "down", low, high}; x.end: the name of a
// place beyond the axis, where an x of null lies. lines: {points: [[x, y]], band: [[x, low, high]], colour, class}. points: {x, y, error, shape, colour, class, note, attributes}. key: {name,
// shape, colour} or {name, class} for a line, {name, ring: true} for the ring. ring: the index of a point.
// on.hover(index or -1, place), on.click(index).
function plotter({ id, label, height = 220, on = {} }) {
  const node = s("svg", { class: "wb-plot", height: height + 50, tabindex: 0, role: "application", "data-testid": id, "aria-label": label });
  let drawn = []; // {x, y} of each point
  let chosen = -1;
  let now = null;

  function range(axis, values) {
    let [low, high] = [Math.min(...values), Math.max(...values)];
    if (axis.log) return [axis.low ?? low / 1.25, axis.high ?? high * 1.35];
    const pad = (high - low) * 0.08 || Math.abs(high) * 0.1 || 1;
    return [axis.low ?? low - pad, axis.high ?? high + pad];
  }

  // Where the entries of the key stand, in as many rows as they need.
  function layKey(entries, box) {
    let [x, row] = [box.left, 0];
    return entries.map((entry) => {
      const wide = 32 + 6.7 * entry.name.length;
      if (x + wide > box.right && x > box.left) [x, row] = [box.left, row + 1];
      x += wide;
      return { ...entry, row, x: x - wide };
    });
  }

  function draw(data) {
    now = data;
    const width = node.clientWidth || 480;
    const box = { left: 62, right: width - 16 };
    const key = layKey(data.key ?? [], box);
    box.top = 12 + LINE * (key.length ? key.at(-1).row + 1 : 0);
    box.bottom = box.top + height;
    const whole = box.bottom + 40;
    node.setAttribute("height", whole);
    drawn = [];
    select(-1);
    node.replaceChildren();
    const lines = data.lines ?? [];
    const points = data.points ?? [];
    const across = [...points.map((p) => p.x), ...lines.flatMap((l) => l.points.map(([x]) => x))].filter((x) => x != null);
    const up = [...points.flatMap((p) => [p.y - (p.error ?? 0), p.y + (p.error ?? 0)]),
      ...lines.flatMap((l) => [...l.points.map(([, y]) => y), ...(l.band ?? []).flatMap(([, low, high]) => [low, high])])];
    if (!across.length) {
      node.append(s("text", { x: width / 2, y: whole / 2, "text-anchor": "middle", class: "wb-emptytext" }, data.empty ?? "nothing yet"));
      return;
    }
    const [[x0, x1], [y0, y1]] = [range(data.x, across), range(data.y, up)];
    const share = (axis, v, low, high) => (axis.log ? Math.log(v / low) / Math.log(high / low) : (v - low) / (high - low || 1));
    const edge = box.right - (data.x.end ? 44 : 0);
    const X = (v) => (v == null ? box.right - 14 : box.left + share(data.x, v, x0, x1) * (edge - box.left));
    const Y = (v) => box.bottom - share(data.y, v, y0, y1) * (box.bottom - box.top);
    const grid = s("g", { class: "wb-axis" });
    const ticks = (axis, low, high, n) => named(axis.log ? logTicks(low, high) : niceTicks(low, high, n), short);
    for (const [t, text] of ticks(data.x, x0, x1, 6)) grid.append(s("line", { class: "wb-gridline", x1: X(t), x2: X(t), y1: box.top, y2: box.bottom }), s("text", { x: clamp(X(t), box.left + 8, box.right - 8), y: box.bottom + 15, "text-anchor": "middle" }, text));
    for (const [t, text] of ticks(data.y, y0, y1, 5)) grid.append(s("line", { class: "wb-gridline", x1: box.left, x2: box.right, y1: Y(t), y2: Y(t) }), s("text", { x: box.left - 6, y: Y(t) + 4, "text-anchor": "end" }, text));
    if (data.x.end) grid.append(s("text", { x: X(null), y: box.bottom + 15, "text-anchor": "middle" }, data.x.end));
    const better = { up: " → better", down: " ← better" };
    grid.append(
      s("text", { x: (box.left + box.right) / 2, y: whole - 6, "text-anchor": "middle" }, `${data.x.label}${data.x.log ? " (log)" : ""}${better[data.x.better] ?? ""}`),
      s("text", { transform: `translate(13,${(box.top + box.bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, `${data.y.label}${data.y.log ? " (log)" : ""}${better[data.y.better] ?? ""}`));
    node.append(grid);
    for (const entry of lines) {
      const path = (rows) => rows.map(([x, y]) => `${X(x).toFixed(1)},${Y(y).toFixed(1)}`).join(" ");
      if (entry.band?.length) node.append(s("polygon", { class: "wb-band", fill: entry.colour, points: path([...entry.band.map(([x, low]) => [x, low]), ...entry.band.map(([x, , high]) => [x, high]).reverse()]) }));
      const style = entry.colour ? { style: `stroke:${entry.colour}` } : {};
      node.append(s("polyline", { class: entry.class ?? "wb-curve", points: path(entry.points), ...style }));
    }
    const taken = []; // boxes of notes, so that none covers another
    points.forEach((point) => {
      const [x, y] = [X(point.x), Y(point.y)];
      const group = s("g", { class: "wb-point", ...point.attributes });
      if (point.error) group.append(s("line", { class: "wb-whisker", x1: x, x2: x, y1: Y(point.y - point.error), y2: Y(point.y + point.error) }));
      const mark = marker(point.shape ?? "circle", x, y, DOT);
      mark.setAttribute("class", point.class ?? "wb-mark");
      if (point.colour) mark.setAttribute("fill", point.colour);
      group.append(mark);
      if (point.note) {
        const isRight = x > (box.left + box.right) / 2;
        const isAbove = isRight === (data.y.better === "up"); // the side that the front does not come from
        const at = { x: x + (isRight ? -11 : 11), y: y + (isAbove ? -8 : 17) };
        const wide = 6.2 * point.note.length;
        while (taken.some((other) => Math.abs(other.y - at.y) < 12 && Math.abs(other.x - at.x) < (other.wide + wide) / 2 + 6)) at.y += isAbove ? -12 : 12;
        taken.push({ ...at, wide });
        group.append(s("text", { class: "wb-rolename", ...at, "text-anchor": isRight ? "end" : "start" }, point.note));
      }
      node.append(group);
      drawn.push({ x, y });
    });
    for (const entry of key) {
      const y = 14 + LINE * entry.row;
      const mark = entry.ring ? s("circle", { class: "wb-ring", cx: entry.x + 8, cy: y, r: 6 })
        : entry.shape ? marker(entry.shape, entry.x + 8, y, DOT) : s("line", { class: entry.class ?? "wb-curve", x1: entry.x, x2: entry.x + 16, y1: y, y2: y });
      if (entry.shape) mark.setAttribute("class", entry.colour ? "wb-mark" : "wb-rival");
      if (entry.colour) mark.setAttribute(entry.shape ? "fill" : "style", entry.shape ? entry.colour : `stroke:${entry.colour}`);
      node.append(mark, s("text", { class: "wb-keytext", x: entry.x + 20, y: y + 4 }, entry.name));
    }
    node.append(halo);
    ring(data.ring ?? -1);
  }

  const halo = s("circle", { class: "wb-ring", r: 9, "data-testid": "ring" });
  function ring(index) {
    const at = drawn[index];
    halo.style.display = at ? "" : "none";
    halo.setAttribute("transform", `translate(${at?.x ?? 0},${at?.y ?? 0})`);
  }

  function select(index) {
    chosen = index;
    node.querySelectorAll(".wb-point").forEach((mark, i) => mark.classList.toggle("wb-hover", i === index));
    on.hover?.(index, drawn[index]);
  }

  function nearest(event) {
    const at = node.getBoundingClientRect();
    const far = drawn.map(({ x, y }) => Math.hypot(x - (event.clientX - at.left), y - (event.clientY - at.top)));
    const best = far.lastIndexOf(Math.min(...far)); // of points on one spot the one on top
    return far[best] < 14 ? best : -1;
  }

  const click = (index) => { if (index >= 0) on.click?.(index); };
  node.addEventListener("pointermove", (event) => { const i = nearest(event); if (i !== chosen) select(i); });
  node.addEventListener("pointerleave", () => select(-1));
  node.addEventListener("blur", () => select(-1));
  node.addEventListener("click", (event) => click(nearest(event)));
  node.addEventListener("keydown", (event) => {
    const order = [...drawn.keys()].sort((a, b) => drawn[a].x - drawn[b].x);
    const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
    if (step && order.length) {
      event.preventDefault();
      const at = order.indexOf(chosen);
      select(order[at < 0 ? 0 : clamp(at + step, 0, order.length - 1)]);
    } else if (event.key === "Enter") click(chosen);
  });
  return { node, draw, ring, select, again: () => now && draw(now), get chosen() { return chosen; } };
}
