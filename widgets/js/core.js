// What every live panel's front end stands on. These files are put one after the other into one module, which runs in
// JupyterLab through anywidget and under `panel serve`; it imports nothing and asks the network for nothing.

const COLOURS = ["#56b4e9", "#e69f00", "#2fb58b", "#cc79a7", "#f0e442"]; // Okabe-Ito, light enough for black letters
const SHAPES = ["circle", "triangle", "diamond", "cross", "square"];
const SVG = "http://www.w3.org/2000/svg";
const colour = (k) => COLOURS[k % COLOURS.length];

function h(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

function s(tag, props = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(props)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// ------------------------------------------------------------------------------------------------ numbers and words

const sum = (values) => values.reduce((a, b) => a + b, 0);
const clamp = (x, low, high) => Math.min(Math.max(x, low), high);

function short(x, digits = 3) {
  if (x === 0) return "0";
  const [size, rounded] = [Math.abs(x), +x.toPrecision(digits)];
  const unit = size < 1e4 ? null : [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]].find(([scale]) => size >= scale);
  return minus(unit ? `${+(x / unit[0]).toPrecision(digits)} ${unit[1]}` : size < 1e-3 ? rounded.toExponential() : `${rounded}`);
}

const minus = (text) => text.replaceAll("-", "−");
const signed = (x, digits = 2) => minus(x.toFixed(digits));

// The value with as many decimals as its standard error has meaning.
function measured(value, stderr) {
  const isTiny = Math.abs(value) < 1e-3 && !(stderr >= 1e-3);
  if (stderr == null || (isTiny && !stderr)) return short(value);
  if (isTiny) return `${short(value, 2)} ± ${short(stderr, 1)}`;
  const decimals = stderr > 0 ? clamp(1 - Math.floor(Math.log10(stderr)), 0, 6) : 3;
  return `${signed(value, decimals)} ± ${stderr.toFixed(decimals)}`;
}

const words = (name) => String(name).replaceAll("_", " ");

const plural = (n, word) => `${n} ${n === 1 ? word : word.endsWith("s") ? `${word}es` : `${word}s`}`;
const decode64 = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

// A frame: length of its header (4 bytes, little-endian), header (JSON) with its panes, and the panes' values.
function unpack(value) {
  if (!value || !value.byteLength) return null;
  const view = value instanceof DataView ? value : new DataView(value.buffer ?? value, value.byteOffset ?? 0, value.byteLength);
  const length = view.getUint32(0, true);
  const bytes = new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
  const frame = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + length)));
  for (const pane of frame.panes) {
    for (const name of ["values", "more"]) {
      if (!pane[name]) continue;
      const { at, size, shape } = pane[name];
      const part = bytes.slice(4 + length + at, 4 + length + at + size);
      pane[name] = pane.kind === "pictures" ? part : new Float32Array(part.buffer);
      pane[name].shape = shape;
    }
  }
  return frame;
}

// What arrives is drawn with the next frame of the display, once, however much arrives before it.
function painter() {
  const dirty = new Set();
  let due = 0;
  const redraw = (...parts) => {
    parts.forEach((part) => dirty.add(part));
    due ||= requestAnimationFrame(() => {
      due = 0;
      const now = [...dirty];
      dirty.clear();
      for (const part of now) part();
    });
  };
  redraw.stop = () => cancelAnimationFrame(due);
  return redraw;
}

// Show the root, hear what the model says, and call again() when the size has changed; what ends all this.
function attend(model, el, root, on, again) {
  const watcher = new ResizeObserver(again);
  for (const [event, callback] of Object.entries(on)) model.on(event, callback);
  root.addEventListener("keydown", (event) => event.stopPropagation()); // JupyterLab would take Enter and the arrows away
  el.append(root);
  watcher.observe(root);
  return () => {
    watcher.disconnect();
    for (const [event, callback] of Object.entries(on)) model.off?.(event, callback);
  };
}

// ------------------------------------------------------------------------------------------------ files and clipboard

function download(blob, name) {
  const link = h("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// A copy of an SVG in light colours, with the styles that the page's stylesheet gave it written into it.
function standalone(svg, host) {
  const copy = svg.cloneNode(true);
  const stage = h("div", { class: "wb wb-light wb-offstage" }, copy);
  host.append(stage);
  for (const node of [copy, ...copy.querySelectorAll("*")]) {
    const style = getComputedStyle(node);
    for (const name of ["fill", "stroke", "stroke-width", "stroke-dasharray", "font-family", "font-size", "font-weight", "opacity"]) {
      node.style.setProperty(name, style.getPropertyValue(name));
    }
    node.removeAttribute("tabindex");
  }
  stage.remove();
  copy.setAttribute("xmlns", SVG);
  const [width, height] = [svg.clientWidth, svg.clientHeight];
  copy.setAttribute("viewBox", `0 0 ${width} ${height}`);
  copy.setAttribute("width", width);
  copy.setAttribute("height", height);
  copy.prepend(s("rect", { width, height, fill: "#ffffff" }));
  return { text: new XMLSerializer().serializeToString(copy), width, height };
}

function rasterise({ text, width, height }, then) {
  const picture = new Image();
  picture.onload = () => {
    const canvas = h("canvas", { width: width * 2, height: height * 2 });
    canvas.getContext("2d").drawImage(picture, 0, 0, width * 2, height * 2);
    canvas.toBlob(then);
  };
  picture.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`;
}

// A box with text to copy; offer(text, what it is) opens it.
function copyBox() {
  const text = h("textarea", { readonly: true, rows: 10, "aria-label": "text to copy", spellcheck: "false", "data-testid": "box" });
  const note = h("span", { role: "status" });
  const node = h("div", { class: "wb-box", hidden: true, role: "dialog", "aria-label": "copy" },
    h("div", { class: "wb-row" }, note, button("Close", "close", () => { node.hidden = true; }, "box-close")), text);
  node.addEventListener("keydown", (event) => { if (event.key === "Escape") node.hidden = true; });
  async function offer(content, what) {
    node.hidden = false;
    text.value = content;
    text.rows = clamp(content.split("\n").length, 3, 18);
    text.focus();
    text.select();
    try {
      await navigator.clipboard.writeText(content);
      note.textContent = `${what}: copied to the clipboard.`;
    } catch {
      note.textContent = `${what}: press Ctrl+C to copy.`; // no clipboard without a secure page or permission
    }
  }
  return { node, offer };
}

const button = (text, label, action, id) => h("button", { type: "button", "aria-label": label, title: label, onclick: action, "data-testid": id }, text);
