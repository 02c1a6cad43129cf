// A plotly figure as a widget. plotly.js comes from one shared model and is loaded once per page,
// the newest figure wins, and text and grid follow the page's theme. Without a kernel the last
// figure stays, as interactive as any plotly figure.

const LIBRARY = Symbol.for("goatviz.plotly");
const CONFIG = {
  showSendToCloud: false,
  displaylogo: false,
  responsive: false,
  modeBarButtonsToRemove: ["select2d", "lasso2d"],
};

export function asModule(source) {
  // plotly.js is written for CommonJS or a global variable; as an ES module it needs the former.
  return `const module = { exports: {} };\nconst define = undefined;\n${source}\nexport default module.exports;`;
}

export function loadLibrary(source) {
  // A promise of plotly.js, the same for every figure of this page.
  if (!globalThis[LIBRARY]) {
    const before = globalThis.Plotly;
    const url = URL.createObjectURL(new Blob([asModule(source)], { type: "text/javascript" }));
    globalThis[LIBRARY] = import(url).then((loaded) => {
      URL.revokeObjectURL(url);
      // The page's own plotly.js, if it has one, keeps its name.
      if (before === undefined) delete globalThis.Plotly;
      else globalThis.Plotly = before;
      return loaded.default;
    });
  }
  return globalThis[LIBRARY];
}

export function themed(layout, ink, grid) {
  // The same layout with text and lines in the page's colours; those set by the figure stay.
  const found = { ...layout, font: { ...layout.font, color: ink } };
  const axes = { ...(layout.template?.layout ?? {}), ...layout };
  for (const name of Object.keys(axes)) {
    if (/^[xy]axis\d*$/.test(name))
      found[name] = { ...layout[name], gridcolor: grid, linecolor: grid, tickcolor: grid };
  }
  return found;
}

function render({ model, el }) {
  const root = make("div", { class: "goatviz-figure", role: "group" }, el);
  const place = make("div", {}, root);
  const problem = make("div", { class: "goatviz-figure-error", role: "alert" }, root);

  let plotly = null;
  let frame = 0;
  let closed = false;
  let busy = false;
  let again = false;
  let width = 0;

  // As high as its figure from the start, so that nothing below it jumps when it is drawn.
  const reserve = () => {
    const height = JSON.parse(model.get("figure")).layout?.height;
    if (height) place.style.minHeight = `${height}px`;
  };

  const label = () => root.setAttribute("aria-label", model.get("label"));

  const draw = async () => {
    frame = 0;
    if (closed || !plotly) return;
    if (!place.clientWidth) {
      // Not on the page, perhaps for less than a frame, which no observer would notice.
      width = 0;
      requestAnimationFrame(() => place.clientWidth && redraw());
      return;
    }
    if (busy) {
      again = true;
      return;
    }
    busy = true;
    try {
      const figure = JSON.parse(model.get("figure"));
      const style = getComputedStyle(root);
      const ink = style.getPropertyValue("--goatviz-ink").trim() || style.color;
      const grid = style.getPropertyValue("--goatviz-grid").trim();
      width = place.clientWidth;
      const layout = {
        ...themed(figure.layout ?? {}, ink, grid),
        width,
        autosize: false,
        uirevision: model.get("view_of"),
      };
      const first = !place.data;
      await plotly.react(place, figure.data ?? [], layout, CONFIG);
      if (closed) return;
      if (first) place.on("plotly_click", clicked);
      root.dataset.drawn = String(Number(root.dataset.drawn ?? 0) + 1);
      problem.textContent = "";
    } catch (error) {
      problem.textContent = `This figure could not be drawn. ${error}`;
    }
    busy = false;
    if (again) {
      again = false;
      redraw();
    }
  };

  const redraw = () => {
    // Once for all changes made together, without waiting for a frame: drawing takes longer.
    if (!frame && !closed) frame = setTimeout(draw, 0);
  };

  const clicked = (event) => {
    const point = event.points[0];
    if (!point || !model.send) return;
    model.send({
      kind: "click",
      trace: point.data.name ?? "",
      x: point.x,
      y: point.y,
      index: point.pointIndex ?? point.pointNumber,
    });
  };

  const resized = new ResizeObserver(() => {
    if (place.clientWidth && Math.abs(place.clientWidth - width) > 1) redraw();
  });
  resized.observe(root);
  const theme = new MutationObserver(redraw);
  theme.observe(document.body, {
    attributes: true,
    attributeFilter: ["data-jp-theme-light", "data-jp-theme-name", "class"],
  });
  // A theme's colours may arrive after its name, so watch the colour of the text itself.
  const inked = (event) => {
    if (event.target === root && event.propertyName === "color") redraw();
  };
  root.addEventListener("transitionend", inked);
  const preference = window.matchMedia("(prefers-color-scheme: dark)");
  preference.addEventListener("change", redraw);
  model.on("change:figure", redraw);
  model.on("change:label", label);
  label();
  reserve();

  const library = async () => {
    try {
      const reference = model.get("library");
      const source = reference.get
        ? reference.get("source")
        : (await model.widget_manager.get_model(reference.replace("IPY_MODEL_", ""))).get("source");
      plotly = await loadLibrary(source);
      redraw();
    } catch (error) {
      problem.textContent = `plotly.js could not be loaded. ${error}`;
    }
  };
  library();

  return () => {
    closed = true;
    clearTimeout(frame);
    resized.disconnect();
    theme.disconnect();
    preference.removeEventListener("change", redraw);
    model.off("change:figure", redraw);
    model.off("change:label", label);
    if (plotly) plotly.purge(place);
    root.remove();
  };
}

export default { render };
