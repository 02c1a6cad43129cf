// The exported page: the widgets' own code, with models that have no kernel. Every state was
// computed beforehand; moving a control picks one.

class Model {
  constructor(state) {
    this.state = state;
    this.acts = new Map();
  }

  get(name) {
    return this.state[name];
  }

  set(name, value) {
    this.assign({ [name]: value });
  }

  assign(values) {
    // Set all values first, then call each listener of a changed value once.
    const called = new Set();
    const changed = Object.keys(values).filter((name) => this.state[name] !== values[name]);
    Object.assign(this.state, values);
    for (const name of changed)
      for (const act of this.acts.get(`change:${name}`) ?? []) called.add(act);
    for (const act of called) act();
  }

  save_changes() {}

  on(events, act) {
    for (const event of events.split(" ")) {
      if (!this.acts.has(event)) this.acts.set(event, new Set());
      this.acts.get(event).add(act);
    }
  }

  off(events, act) {
    for (const event of events.split(" ")) this.acts.get(event)?.delete(act);
  }
}

(() => {
  const content = JSON.parse(document.getElementById("data").textContent);
  globalThis[Symbol.for("goatviz.plotly")] = Promise.resolve(globalThis.Plotly);

  const resolved = new Map();
  const resolve = (value) => {
    if (value === null || typeof value !== "object") return value;
    if (Array.isArray(value)) return value.map(resolve);
    if (typeof value.$ === "number") {
      if (!resolved.has(value.$)) resolved.set(value.$, resolve(content.shared[value.$]));
      return resolved.get(value.$);
    }
    if (value.base64 !== undefined) {
      const bytes = Uint8Array.from(atob(resolve(value.base64)), (letter) => letter.charCodeAt(0));
      return new DataView(bytes.buffer);
    }
    const found = {};
    for (const [name, each] of Object.entries(value)) found[name] = resolve(each);
    return found;
  };

  const place = (values) => {
    // States stand in the order of nested loops, the last control moving fastest.
    let at = 0;
    content.names.forEach((name, number) => {
      const options = content.choices[number];
      at = at * options.length + Math.max(options.indexOf(values[name]), 0);
    });
    return content.states[at];
  };

  const panels = document.getElementById("panels");
  const summary = document.getElementById("summary");
  document.getElementById("fixed").textContent = content.fixed ? `As exported: ${content.fixed}.` : "";
  const cell = (least) => {
    const style = `flex: 1 1 ${least}px; min-width: min(${least}px, 100%)`;
    return make("div", { style }, panels);
  };
  const first = place(content.values);
  const library = { get: () => "" };
  const extras = new Map();
  for (const name of content.extras) {
    const model = new Model({ ...resolve(first.extras[name]), palette: content.palette });
    extras.set(name, model);
    planMap.render({ model, el: cell(420) });
  }
  const figures = new Map();
  const figureOf = (state, name) => ({
    figure: JSON.stringify(resolve(state.figures[name])),
    view_of: state.views[name] ?? name,
  });
  for (const { name, least } of content.panels) {
    const label = `${content.label}: ${name}`;
    const model = new Model({ ...figureOf(first, name), label, library });
    figures.set(name, model);
    figureView.render({ model, el: cell(least) });
  }
  const show = () => {
    const state = place(panel.get("values"));
    for (const [name, model] of figures) model.assign(figureOf(state, name));
    for (const [name, model] of extras) model.assign(resolve(state.extras[name]));
    summary.textContent = state.summary;
  };
  const panel = new Model({
    controls: content.controls,
    values: content.values,
    label: content.label,
    progress: -1,
    doing: "",
    error: "",
  });
  controls.render({ model: panel, el: document.getElementById("controls") });
  panel.on("change:values", show);
  summary.textContent = first.summary;
})();
