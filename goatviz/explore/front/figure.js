// A plotly figure. plotly.js is loaded once per page, arrays come as bytes, the newest figure wins,
// and text and grid follow the page's theme. Without a kernel the last figure stays, as interactive
// as any plotly figure.

import { colourOf, listen, make, whenThemed } from "./dom.js";

const LIBRARY = Symbol.for("goatviz.plotly");
const PAUSE_MS = 250;
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

async function imported(source) {
  const before = globalThis.Plotly;
  const url = URL.createObjectURL(new Blob([asModule(source)], { type: "text/javascript" }));
  const loaded = await import(url);
  URL.revokeObjectURL(url);
  // The page's own plotly.js, if it has one, keeps its name.
  if (before === undefined) delete globalThis.Plotly;
  else globalThis.Plotly = before;
  return loaded.default;
}

export async function loadLibrary(ask) {
  // plotly.js, the same for every figure of this page; `ask` promises its source. Who waits for
  // another's answer asks for itself if that never comes, as when the other widget is closed.
  for (;;) {
    const first = !globalThis[LIBRARY];
    if (first) globalThis[LIBRARY] = ask().then(imported);
    const loading = globalThis[LIBRARY];
    try {
      return await loading;
    } catch (error) {
      if (globalThis[LIBRARY] === loading) delete globalThis[LIBRARY];
      if (first) throw error;
    }
  }
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

export function unpacked({ text, spec, buffers = [] }) {
  // The figure with its arrays, which are written as numbers of buffers.
  const fill = (value) => {
    if (Array.isArray(value)) return value.map(fill);
    if (value === null || typeof value !== "object") return value;
    if (typeof value.bdata === "number") {
      const { buffer, byteOffset, byteLength } = buffers[value.bdata];
      return { ...value, bdata: buffer.slice(byteOffset, byteOffset + byteLength) };
    }
    return Object.fromEntries(Object.entries(value).map(([name, each]) => [name, fill(each)]));
  };
  return fill(spec ?? JSON.parse(text));
}

export function renderFigure({ model, el, plotly: loading, host }) {
  const root = make("div", { class: "goatviz-figure", role: "group" }, el);
  const place = make("div", { class: "goatviz-figure-place" }, root);
  // Screen readers hear the same from the controls' line.
  const coming = make("div", { class: "goatviz-figure-coming", "aria-hidden": "true" }, root);
  const problem = make("div", { class: "goatviz-error", role: "alert" }, root);

  let plotly = null;
  let timer = 0;
  let closed = false;
  let busy = false;
  let again = false;
  let width = 0;
  let content = null;
  let near = true;

  const read = () => {
    const figure = model.get("figure");
    content = figure.text || figure.spec ? unpacked(figure) : null;
    // As high as its figure from the start, so that nothing below it jumps when it is drawn.
    place.style.minHeight = `${content?.layout?.height ?? model.get("height")}px`;
    root.dataset.waiting = content ? "no" : "yes";
    tell();
    redraw();
  };
  const label = () => root.setAttribute("aria-label", model.get("label"));
  const tell = () => {
    // What will stand here, what it waits for, and how far that is.
    if (content) return;
    const share = host.get("progress");
    const doing = share < 0 ? "" : ` ${host.get("doing")}, ${Math.round(100 * share)} %`;
    coming.textContent = `${model.get("label")}.${doing}`;
  };

  const draw = async () => {
    timer = 0;
    if (closed || !plotly || !content) return;
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
      width = place.clientWidth;
      const layout = {
        ...themed(content.layout ?? {}, colourOf(root, "ink"), colourOf(root, "faint")),
        width,
        autosize: false,
        uirevision: model.get("view_of"),
      };
      const first = !place.data;
      await plotly.react(place, content.data ?? [], layout, CONFIG);
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
    // Once for all changes made together, without waiting for a frame: drawing takes longer. A
    // figure outside the window waits for a pause, so that those that are seen are drawn sooner.
    if (closed || (near && timer)) return;
    clearTimeout(timer);
    timer = setTimeout(draw, near ? 0 : PAUSE_MS);
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
  const seen = new IntersectionObserver((entries) => {
    near = entries.at(-1).isIntersecting;
    if (near && timer) {
      clearTimeout(timer);
      timer = 0;
      redraw();
    }
  });
  seen.observe(root);
  const stops = [
    listen(model, [
      ["figure", read],
      ["label", label],
    ]),
    listen(host, [["progress doing", tell]]),
    whenThemed(root, redraw),
  ];
  label();
  read();
  loading.then(
    (loaded) => {
      plotly = loaded;
      redraw();
    },
    (error) => {
      problem.textContent = `plotly.js could not be loaded. ${error}`;
    },
  );

  return () => {
    closed = true;
    clearTimeout(timer);
    resized.disconnect();
    seen.disconnect();
    for (const stop of stops) stop();
    if (plotly) plotly.purge(place);
    root.remove();
  };
}
