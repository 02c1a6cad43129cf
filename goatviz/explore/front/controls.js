// Named controls of an explorer: native elements, which work with keyboards and screen readers.
// Each is the trait of its name; a logarithmic slider moves in powers of ten.

import { listen, make } from "./dom.js";

export function toSlider(value, spec) {
  if (spec.choices?.length) {
    const far = spec.choices.map((choice) => Math.abs(choice - value));
    return far.indexOf(Math.min(...far));
  }
  return spec.log ? Math.log10(value) : value;
}

export function fromSlider(place, spec) {
  // The place on the slider as a number, free of the rounding of 0.1 + 0.2.
  if (spec.choices?.length) return spec.choices[Number(place)];
  const near = Number(Number(place).toPrecision(12));
  return spec.log ? Number((10 ** near).toPrecision(12)) : near;
}

export function reading(value, spec) {
  if (spec.whole) return Number(value).toLocaleString("en");
  return Number(Number(value).toPrecision(3)).toString();
}

const setRange = (input, { min, max, step }) => Object.assign(input, { min, max, step });

const CONTROLS = {
  select(spec, holder, change) {
    const select = make("select", { name: spec.name }, holder);
    let shown = "";
    select.addEventListener("change", () => change(JSON.parse(shown)[Number(select.value)][0]));
    return {
      element: select,
      set(value, now) {
        const options = JSON.stringify(now.options);
        if (options !== shown) {
          shown = options;
          select.replaceChildren();
          now.options.forEach(([, text], at) => make("option", { value: String(at) }, select, text));
        }
        const at = now.options.findIndex(([option]) => option === value);
        select.value = at < 0 ? "" : String(at);
      },
    };
  },
  slider(spec, holder, change) {
    const input = make("input", { type: "range", name: spec.name }, holder);
    const output = make("output", { "aria-hidden": "true" }, holder);
    let current = spec;
    const tell = (value) => {
      output.textContent = reading(value, current);
      input.setAttribute("aria-valuetext", output.textContent);
    };
    input.addEventListener("input", () => {
      const value = fromSlider(input.value, current);
      tell(value);
      change(value);
    });
    return {
      element: input,
      set(value, now) {
        current = now;
        setRange(input, now);
        const place = toSlider(value, now);
        if (Math.abs(Number(input.value) - place) > now.step / 1e3) input.value = place;
        tell(value);
      },
    };
  },
  number(spec, holder, change) {
    const input = make("input", { type: "number", name: spec.name }, holder);
    input.addEventListener("change", () => {
      const value = Number(input.value);
      if (input.value === "" || Number.isNaN(value)) return;
      change(Math.min(Math.max(value, Number(input.min)), Number(input.max)));
    });
    return {
      element: input,
      set(value, now) {
        setRange(input, now);
        if (input.value === "" || Number(input.value) !== value) input.value = value;
      },
    };
  },
  toggle(spec, holder, change) {
    const input = make("input", { type: "checkbox", name: spec.name }, holder);
    input.addEventListener("change", () => change(input.checked));
    return {
      element: input,
      set(value) {
        input.checked = value;
      },
    };
  },
  button(spec, holder, _change, press) {
    const button = make("button", { type: "button", name: spec.name }, holder, spec.label);
    button.addEventListener("click", press);
    return { element: button, set() {} };
  },
};

export function renderControls({ model, el }) {
  const root = make("div", { class: "goatviz-controls", role: "group" }, el);
  const row = make("div", { class: "goatviz-controls-row" }, root);
  const line = make("div", { class: "goatviz-controls-line" }, root);
  const doing = make("span", { class: "goatviz-controls-doing", "aria-live": "polite" }, line);
  const progress = make("progress", { max: "1", "aria-label": "Progress" }, line);
  const cancel = make("button", { type: "button" }, line, "Cancel");
  const problem = make("span", { class: "goatviz-error", role: "alert" }, line);
  const made = new Map();

  const build = () => {
    root.setAttribute("aria-label", model.get("label"));
    const wanted = model.get("control_specs");
    const names = wanted.map((spec) => `${spec.kind} ${spec.name}`).join();
    if (names === root.dataset.names) return;
    root.dataset.names = names;
    row.replaceChildren();
    made.clear();
    for (const spec of wanted) {
      const plain = spec.kind === "button";
      const holder = make(plain ? "span" : "label", { class: `goatviz-control-${spec.kind}` }, row);
      if (!plain) make("span", {}, holder, spec.label);
      if (spec.hint) holder.title = spec.hint;
      const change = (value) => {
        model.set(spec.name, value);
        model.save_changes();
      };
      const press = () => model.send && model.send({ kind: "press", name: spec.name });
      const control = CONTROLS[spec.kind](spec, holder, change, press);
      control.element.setAttribute("aria-label", spec.hint ? `${spec.label}: ${spec.hint}` : spec.label);
      made.set(spec.name, control);
      if (!plain) model.on(`change:${spec.name}`, fill);
    }
  };
  const fill = () => {
    build();
    for (const spec of model.get("control_specs")) {
      const control = made.get(spec.name);
      control.element.disabled = Boolean(spec.disabled);
      control.set(model.get(spec.name), spec);
    }
  };
  const tell = () => {
    const share = model.get("progress");
    line.dataset.busy = share >= 0 ? "yes" : "no";
    doing.textContent = share >= 0 ? model.get("doing") : "";
    progress.value = Math.max(share, 0);
    problem.textContent = model.get("error");
  };
  cancel.addEventListener("click", () => model.send && model.send({ kind: "cancel" }));
  // Otherwise JupyterLab would act on arrow keys and the like.
  root.addEventListener("keydown", (event) => event.stopPropagation());

  const stop = listen(model, [
    ["control_specs label", fill],
    ["progress doing error", tell],
  ]);
  fill();
  tell();
  return () => {
    stop();
    for (const name of made.keys()) model.off(`change:${name}`, fill);
    root.remove();
  };
}
