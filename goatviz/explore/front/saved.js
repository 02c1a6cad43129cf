// The exported page: the same front end, with a model that has no kernel. Every state was computed
// beforehand; moving a control picks one. This follows the front end in one script.

const content = JSON.parse(document.getElementById("data").textContent);

class Model {
  constructor(state) {
    this.state = state;
    this.acts = new Map();
  }

  get(name) {
    return this.state[name];
  }

  set(name, value) {
    // A value that was not computed is not shown; of a slider's, the nearest one is.
    const options = content.choices[content.names.indexOf(name)];
    const spec = content.model.control_specs.find((each) => each.name === name);
    const chosen = spec?.choices.length ? spec.choices[toSlider(value, spec)] : value;
    if (content.held.includes(name) || (options && !options.includes(chosen))) return;
    this.assign({ [name]: chosen });
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

  on(event, act) {
    if (!this.acts.has(event)) this.acts.set(event, new Set());
    this.acts.get(event).add(act);
  }

  off(event, act) {
    this.acts.get(event)?.delete(act);
  }
}

globalThis[LIBRARY] = Promise.resolve(globalThis.Plotly);

const resolved = new Map();
function resolve(value) {
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
}

function stateFor(model) {
  // States stand in the order of nested loops, the last control moving fastest.
  let at = 0;
  content.names.forEach((name, number) => {
    const options = content.choices[number];
    at = at * options.length + Math.max(options.indexOf(model.get(name)), 0);
  });
  return resolve(content.states[at]);
}

const model = new Model(resolve(content.model));
model.assign(stateFor(model));
listen(model, [[content.names.join(" "), () => model.assign(stateFor(model))]]);
document.getElementById("fixed").textContent = content.fixed ? `As exported: ${content.fixed}.` : "";
render({ model, el: document.getElementById("explorer") });
