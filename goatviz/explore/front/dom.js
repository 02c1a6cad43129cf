// What the modules of the front end share.

export function make(tag, attributes, parent, text) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

export function listen(model, changes) {
  // Call functions when traits change, [["label summary", act], ...]; returns how to stop. However
  // many traits change together, even one after the other, a function is called once, and after them.
  const waiting = new Set();
  const flush = () => {
    const acts = [...waiting];
    waiting.clear();
    for (const act of acts) act();
  };
  const all = changes.flatMap(([names, act]) => {
    const later = () => {
      if (!waiting.size) queueMicrotask(flush);
      waiting.add(act);
    };
    return names
      .split(" ")
      .map((name) => (name.includes(":") ? [name, act] : [`change:${name}`, later]));
  });
  for (const [event, act] of all) model.on(event, act);
  return () => {
    waiting.clear();
    for (const [event, act] of all) model.off(event, act);
  };
}

export function scoped(model, name) {
  // The part of the model whose traits begin with the part's name, as a model of its own.
  const prefix = `${name.replaceAll(" ", "_")}_`;
  const inner = new Map();
  const own = (event) => event.replace(/^change:/, `change:${prefix}`);
  const wrapped = (event, act) => {
    if (!event.startsWith("msg:")) return act;
    if (!inner.has(act))
      inner.set(act, (content, buffers) => {
        if (content.part === name) act(content, buffers);
      });
    return inner.get(act);
  };
  return {
    get: (trait) => model.get(prefix + trait),
    set: (trait, value) => model.set(prefix + trait, value),
    save_changes: () => model.save_changes(),
    send: model.send && ((content) => model.send({ part: name, ...content })),
    on: (event, act) => model.on(own(event), wrapped(event, act)),
    off: (event, act) => model.off(own(event), wrapped(event, act)),
  };
}

export function whenThemed(root, act) {
  // Call when the page turns light or dark; returns how to stop.
  const watcher = new MutationObserver(act);
  for (const element of [document.documentElement, document.body])
    watcher.observe(element, {
      attributes: true,
      attributeFilter: ["class", "data-theme", "data-jp-theme-light", "data-jp-theme-name"],
    });
  // A theme's colours may arrive after its name, so watch the colour of the explorer's text itself.
  const explorer = root.closest(".goatviz-explorer");
  const inked = (event) => {
    if (event.target === explorer && event.propertyName === "color") act();
  };
  explorer.addEventListener("transitionend", inked);
  const preference = window.matchMedia("(prefers-color-scheme: dark)");
  preference.addEventListener("change", act);
  return () => {
    watcher.disconnect();
    explorer.removeEventListener("transitionend", inked);
    preference.removeEventListener("change", act);
  };
}

export function colourOf(root, name) {
  // A colour of the style sheet, such as "ink".
  return getComputedStyle(root).getPropertyValue(`--goatviz-${name}`).trim();
}
