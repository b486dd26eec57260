// One control for each knob, whatever its kind: slider and field, list of numbers, menu, switch.

const N_OPEN = 8; // knobs of a method that are shown at once; more are folded

// What is half typed must not be written over by news from Python.
const typing = new WeakSet();
function guard(field) {
  field.addEventListener("input", () => typing.add(field));
  for (const end of ["change", "blur"]) field.addEventListener(end, () => typing.delete(field), true);
  return field;
}

function knobPanel(spec, link) {
  const method = h("select", { "aria-label": "method", "data-testid": "method", onchange: () => { link.begin(); link.change({ state: { method: method.value }, knobs: {} }); } },
    ...spec.methods.map((m) => h("option", { value: m.name, title: m.summary }, m.name)));
  const source = h("div", { class: "wb-source" });
  const list = h("div", { class: "wb-knoblist" });
  let controls = [];
  const put = (knob, value) => { link.begin(); link.change({ knobs: { [knob.name]: value } }); };

  function slider(knob) {
    const [low, high] = knob.soft ?? [knob.low, knob.high];
    const isLog = knob.scale === "log";
    const toValue = (p) => {
      const raw = isLog ? low * (high / low) ** (p / 1000) : p;
      return knob.kind === "int" ? Math.round(raw) : +raw.toPrecision(6);
    };
    const range = h("input", { type: "range", "aria-label": words(knob.name), "data-testid": `knob-${knob.name}`, title: `${knob.help}. Double click: ${knob.start}`,
      min: isLog ? 0 : low, max: isLog ? 1000 : high, step: isLog ? 1 : knob.step ?? (knob.kind === "int" ? 1 : "any") });
    range.addEventListener("pointerdown", link.hold);
    range.addEventListener("input", () => {
      if (!link.isHeld()) link.begin(knob.name);
      link.change({ knobs: { [knob.name]: toValue(Number(range.value)) } });
    });
    range.addEventListener("dblclick", () => put(knob, knob.start));
    const field = guard(h("input", { type: "number", class: "wb-number", "aria-label": `${words(knob.name)}, exact value`, "data-testid": `field-${knob.name}`,
      min: knob.low, max: knob.high, step: knob.step ?? "any", title: `${knob.low} to ${knob.high} ${knob.unit}`, onchange: () => put(knob, Number(field.value)) }));
    return {
      nodes: [range, field], wide: true,
      show(value) {
        const position = isLog ? (1000 * Math.log(clamp(value, low, high) / low)) / Math.log(high / low) : value;
        if (Number(range.value) !== position) range.value = position;
        range.setAttribute("aria-valuetext", `${value} ${knob.unit}`.trim());
        if (!typing.has(field)) field.value = value;
      },
    };
  }

  // A list of numbers, as text. What is none is sent as it is: Python says what is allowed.
  function numbers(knob) {
    const field = guard(h("input", { type: "text", class: "wb-list", "aria-label": words(knob.name), "data-testid": `knob-${knob.name}`, title: `${knob.help}: numbers with commas between`, spellcheck: "false",
      onchange: () => {
        const parts = field.value.split(/[\s,;]+/).filter(Boolean);
        put(knob, parts.every((part) => Number.isFinite(Number(part))) ? parts.map(Number) : field.value);
      } }));
    return { nodes: [field], wide: true, show: (value) => { if (!typing.has(field)) field.value = [value].flat().map((x) => +(+x).toPrecision(6)).join(", "); } };
  }

  function flag(knob) {
    const box = h("input", { type: "checkbox", "aria-label": words(knob.name), "data-testid": `knob-${knob.name}`, onchange: () => put(knob, box.checked) });
    return { nodes: [box], show: (value) => { box.checked = value; } };
  }

  function menu(knob) {
    const select = h("select", { "aria-label": words(knob.name), "data-testid": `knob-${knob.name}`, onchange: () => put(knob, knob.choices[select.selectedIndex]) },
      ...knob.choices.map((choice) => h("option", {}, words(String(choice)))));
    select.addEventListener("dblclick", () => put(knob, knob.start));
    return { nodes: [select], show: (value) => { select.selectedIndex = knob.choices.indexOf(value); } };
  }

  const kinds = (knob) => (knob.kind === "tuple" ? numbers : knob.kind === "bool" ? flag : knob.choices ? menu : slider)(knob);

  function build() {
    const chosen = spec.methods.find((m) => m.name === link.local.method);
    source.textContent = chosen.summary;
    source.title = `${chosen.summary}\n${chosen.source}`;
    controls = chosen.knobs.map((knob) => {
      const control = kinds(knob);
      const reason = h("span", { class: "wb-reason" });
      const label = knob.unit && !words(knob.name).endsWith(knob.unit) ? `${words(knob.name)} (${knob.unit})` : words(knob.name);
      const row = h("div", { class: control.wide ? "wb-knob wb-wide" : "wb-knob", title: knob.help }, h("span", { class: "wb-name" }, label, reason), ...control.nodes);
      return { ...control, knob, row, reason };
    });
    const rows = controls.map((control) => control.row);
    const folded = rows.length > N_OPEN + 1 ? rows.splice(N_OPEN) : [];
    list.replaceChildren(...rows);
    if (folded.length) list.append(h("details", { class: "wb-more", "data-testid": "more-knobs" }, h("summary", {}, `${folded.length} more`), ...folded));
    list.dataset.method = link.local.method;
  }

  function draw() {
    if (list.dataset.method !== link.local.method) build();
    method.value = link.local.method;
    for (const { knob, nodes, show, row, reason } of controls) {
      const unmet = Object.entries(knob.needs).find(([name, wanted]) => ![wanted].flat().includes(link.local.knobs[name]));
      nodes.forEach((node) => { node.disabled = Boolean(unmet); });
      row.classList.toggle("wb-off", Boolean(unmet));
      reason.textContent = unmet ? ` needs ${words(unmet[0])} ${[unmet[1]].flat().map((value) => words(String(value))).join(" or ")}` : "";
      if (knob.name in link.local.knobs) show(link.local.knobs[knob.name]);
    }
  }

  return { node: h("div", { class: "wb-knobs" }, h("div", { class: "wb-knob" }, h("span", { class: "wb-name" }, "method"), method), source, list), draw };
}
