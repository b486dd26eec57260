// The kinds of panes: what draws pictures, points, curves, bars, tables and heat. A kind is made once, kind(spec, context) ->
// {node, draw(pane, frame)}; context: {link, model, under() -> the pane that points are drawn over, redraw}.

const MAX_PICTURES = 64;

// Where a weight over a picture is 0, the picture fades: what is left out stays visible, as a shadow.
function veil(data, at, weight) {
  const keep = 0.22 + 0.78 * (weight / 255);
  const blue = weight ? 0 : 60;
  for (let c = 0; c < 3; c++) data[at + c] = data[at + c] * keep + (c === 2 ? blue : 0);
}

function drawPictures(canvas, pane) {
  const [n, height, width, channels = 1] = pane.values.shape;
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
        for (let c = 0; c < 3; c++) pixels.data[to + c] = pane.values[from + (channels === 3 ? c : 0)];
        if (pane.more) veil(pixels.data, to, pane.more[i * height * width + y * width + x]);
        pixels.data[to + 3] = 255;
      }
    }
  }
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

// Samples that are no pictures: a histogram (one axis) or a scatter (the first two axes), over samples of the true law or of the
// reference. Where these are known the window is theirs, so that it stays where it is while a hand moves.
function drawPoints(canvas, pane, under) {
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth || 120, canvas.clientHeight || 120];
  [canvas.width, canvas.height] = [width * ratio, height * ratio];
  canvas.style.imageRendering = "auto";
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const [dim] = pane.values.shape.slice(1);
  const column = (p, axis) => Array.from({ length: p.values.shape[0] }, (_, i) => p.values[i * dim + axis]);
  const range = (axis) => {
    const all = column(under ?? pane, axis).sort((a, b) => a - b);
    const pad = (all.at(-1) - all[0]) * 0.12 || 1;
    return [all[0] - pad, all.at(-1) + pad];
  };
  const style = getComputedStyle(canvas);
  pen.font = `11px ${style.fontFamily}`;
  const [left, right, top, bottom] = [8, width - 8, 10, height - 20];
  const xs = range(0);
  const across = (x) => left + ((x - xs[0]) / (xs[1] - xs[0])) * (right - left);
  pen.fillStyle = pen.strokeStyle = style.color;
  pen.textAlign = "center";
  for (const [tick, text] of named(niceTicks(...xs, width < 180 ? 3 : 5), short)) pen.fillText(text, clamp(across(tick), 14, width - 14), height - 5);
  pen.globalAlpha = 0.4;
  pen.strokeRect(left, top, right - left, bottom - top);
  pen.beginPath();
  pen.rect(left, top, right - left, bottom - top);
  pen.clip();
  if (dim === 1) {
    const bins = 40;
    const counts = (f) => {
      const tally = new Array(bins).fill(0);
      for (const x of column(f, 0)) {
        const bin = Math.floor(((x - xs[0]) / (xs[1] - xs[0])) * bins);
        if (bin >= 0 && bin < bins) tally[bin] += 1 / f.values.shape[0];
      }
      return tally;
    };
    const [own, other] = [counts(pane), under ? counts(under) : []];
    const tallest = under ? 1.4 * Math.max(...other) : Math.max(...own);
    const bar = (right - left) / bins;
    pen.globalAlpha = 1;
    pen.fillStyle = "#56b4e9";
    own.forEach((c, i) => pen.fillRect(left + i * bar, bottom - (c / tallest) * (bottom - top), bar - 1, (c / tallest) * (bottom - top)));
    pen.beginPath();
    other.forEach((c, i) => {
      const y = bottom - (c / tallest) * (bottom - top);
      pen.lineTo(left + i * bar, y);
      pen.lineTo(left + (i + 1) * bar, y);
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
    pen.globalAlpha = 0.5;
    if (under) dots(under, (x, y) => { pen.beginPath(); pen.arc(x, y, 3, 0, 7); pen.stroke(); });
    pen.globalAlpha = 0.85;
    pen.fillStyle = "#e69f00";
    dots(pane, (x, y) => { pen.beginPath(); pen.arc(x, y, 2.4, 0, 7); pen.fill(); });
  }
  pen.globalAlpha = 1;
}

function drawHeat(canvas, pane) {
  const [height, width] = pane.values.shape;
  [canvas.width, canvas.height] = [width, height];
  canvas.style.imageRendering = "pixelated";
  let top = 1e-12;
  for (const value of pane.values) top = Math.max(top, value);
  const pixels = new ImageData(width, height);
  pane.values.forEach((value, i) => {
    const share = clamp(value / top, 0, 1);
    pixels.data.set([255 * Math.min(1, 1.7 * share), 255 * share ** 1.6, 255 * (0.25 + 0.35 * share - 0.5 * share ** 2), 255], 4 * i);
  });
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

const onCanvas = (draw) => (spec, context) => {
  const canvas = h("canvas", { role: "img" });
  return { node: canvas, canvas, draw: (pane) => draw(canvas, pane, context.under?.()) };
};

function curvePane() {
  const note = h("div", { class: "wb-note", "data-testid": "reading" }, "\u00a0");
  let readings = [];
  const chart = plotter({ id: "curve", label: "curve; arrow keys read its points", height: 190, on: { hover: (i) => { note.textContent = readings[i] ?? "\u00a0"; } } });
  return {
    node: h("div", {}, chart.node, note),
    again: chart.again,
    draw(pane) {
      const lines = pane.lines.map((entry, k) => ({ points: entry.x.map((x, i) => [x, entry.y[i]]), colour: entry.faint ? "" : colour(entry.colour ?? k), class: entry.faint ? "wb-front" : "wb-curve",
        band: entry.low && entry.x.map((x, i) => [x, entry.low[i], entry.high[i]]) }));
      const dots = pane.lines.flatMap((entry, k) => (entry.faint || entry.bare ? [] : entry.x.map((x, i) => ({ x, y: entry.y[i], colour: colour(entry.colour ?? k), shape: SHAPES[k % SHAPES.length], text: `${entry.label}: ${short(entry.y[i])}${entry.high ? ` ± ${short(entry.high[i] - entry.y[i])}` : ""} at ${pane.x} ${short(x)}` }))));
      dots.push(...(pane.marks ?? []).map((mark) => ({ ...mark, colour: mark.colour == null ? "" : colour(mark.colour), class: mark.colour == null ? "wb-rival" : "wb-mark" })));
      readings = dots.map((dot) => dot.text);
      chart.draw({ x: { label: pane.x, log: pane.log_x }, y: { label: pane.y, log: pane.log_y, better: pane.better, low: pane.low, high: pane.high }, lines, points: dots,
        key: pane.lines.map((entry, k) => (entry.faint ? { name: entry.label, class: "wb-front" } : entry.bare ? { name: entry.label, colour: colour(entry.colour ?? k) } : { name: entry.label, colour: colour(entry.colour ?? k), shape: SHAPES[k % SHAPES.length] })) });
    },
  };
}

function barsPane() {
  const node = h("div", { class: "wb-rows" });
  return {
    node,
    draw(pane) {
      const top = Math.max(...pane.items.map((item) => item.value + (item.error ?? 0)), pane.full ?? 0) || 1;
      node.replaceChildren(h("b", {}, pane.title ?? ""), ...pane.items.map((item) => h("div", { class: item.marked ? "wb-item wb-marked" : "wb-item", title: item.title ?? "" },
        h("span", {}, item.label), h("div", { class: "wb-track" }, h("span", { style: `width:${clamp((100 * item.value) / top, 0, 100)}%;background:${colour(item.colour ?? 0)}` }),
          item.reach > item.value ? h("span", { class: "wb-reach", style: `width:${(100 * (item.reach - item.value)) / top}%` }) : null),
        h("span", { class: "wb-value" }, item.text ?? measured(item.value, item.error)))));
    },
  };
}

function tablePane() {
  const node = h("table", { class: "wb-table" });
  return {
    node,
    draw(pane) {
      node.replaceChildren(h("tr", {}, ...pane.head.map((text) => h("th", { scope: "col" }, text))), ...pane.rows.map((row) => h("tr", {}, ...row.map((text) => h("td", {}, String(text))))));
    },
  };
}

const PANES = { pictures: onCanvas(drawPictures), points: onCanvas(drawPoints), heat: onCanvas(drawHeat), curve: curvePane, bars: barsPane, table: tablePane };
