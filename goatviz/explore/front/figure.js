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

export function wrapped(text, pixels, size) {
  // Lines of plain text that fit into a width at a font size, escaped for plotly.
  const most = Math.max(8, Math.floor(pixels / (0.56 * size)));
  const lines = [];
  let line = [];
  for (const word of text.split(/\s+/).filter(Boolean)) {
    let letters = [...word];
    for (;;) {
      const joined = line.length ? [...line, " ", ...letters] : letters;
      if (joined.length <= most) {
        line = joined;
        break;
      }
      if (letters.length > most) {
        // It fills this line and goes on in the next.
        const room = Math.max(1, most - line.length - (line.length ? 1 : 0));
        line = [...line, ...(line.length ? [" "] : []), ...letters.slice(0, room)];
        letters = letters.slice(room);
      }
      lines.push(line);
      line = [];
    }
  }
  if (line.length) lines.push(line);
  const names = { "&": "&amp;", "<": "&lt;", ">": "&gt;" };
  return lines.map((each) => each.join("").replace(/[&<>]/g, (sign) => names[sign]));
}

export function fitted(layout, data, width) {
  // The layout of a figure that was measured for another width: text in as many lines and the
  // legend in as many rows as it needs here, as plots/base.py would set them, which measures.
  const words = layout.meta;
  if (!words?.width || !width) return layout;
  const { l, r, t, b } = layout.margin;
  const lines = (text, size, at) => wrapped(text, at - 20, size);
  const titles = (at) => [lines(words.title, 16, at), lines(words.subtitle, 12, at)];
  const captions = (at) => words.caption.flatMap((text) => lines(text, 11, at));
  const names = [...new Set(data.filter((trace) => trace.showlegend).map((trace) => trace.name))];
  const pixels = (text, size) =>
    0.56 * size * Math.max(...text.split("<br>").map((line) => [...line].length));
  const legend = (at) => {
    const room = at - l - r;
    const total = names.reduce((sum, name) => sum + pixels(name, 12) + 46, 0);
    if (total <= room) return [0, names.length ? 1 : 0];
    const widest = Math.max(...names.map((name) => pixels(name, 11))) + 4;
    const each = Math.min(Math.ceil(widest), Math.floor(room) - 46);
    return [each, Math.ceil(names.length / Math.max(1, Math.floor(room / (each + 46))))];
  };
  const [before, now] = [words.width, width].map((at) => {
    const [title, subtitle] = titles(at);
    const caption = captions(at);
    const [each, rows] = legend(at);
    const top = 20 * title.length + 15 * subtitle.length;
    return { title, subtitle, caption, each, rows, top };
  });
  const top = now.top - before.top;
  const foot = 20 * (now.rows - before.rows);
  const bottom = foot + 15 * (now.caption.length - before.caption.length);
  const { entrywidth, ...entries } = layout.legend;
  const found = {
    ...layout,
    height: layout.height + top + bottom,
    margin: { ...layout.margin, t: t + top, b: b + bottom },
    legend: now.each ? { ...entries, entrywidth: now.each } : entries,
  };
  if (layout.title) {
    const below = now.subtitle.length === 1 ? [...now.subtitle, ""] : now.subtitle;
    const subtitle = { ...layout.title.subtitle, text: below.join("<br>") };
    found.title = { ...layout.title, text: now.title.join("<br>"), subtitle };
  }
  if (now.caption.length) {
    // The caption is the last annotation.
    const caption = layout.annotations.at(-1);
    const text = now.caption.join("<br>");
    const moved = { ...caption, text, yshift: caption.yshift - foot };
    found.annotations = [...layout.annotations.slice(0, -1), moved];
  }
  const ticks = (at) => Math.max(3, Math.floor((at - l - r) / 58));
  for (const name of Object.keys(layout))
    if (/^xaxis\d*$/.test(name) && layout[name].nticks === ticks(words.width))
      found[name] = { ...layout[name], nticks: ticks(width) };
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
    reserve();
    root.dataset.waiting = content ? "no" : "yes";
    tell();
    redraw();
  };
  const laidOut = () => fitted(content.layout ?? {}, content.data ?? [], place.clientWidth);
  const reserve = () => {
    // As high as its figure from the start, so that nothing below it jumps when it is drawn.
    const height = content ? laidOut().height : model.get("height");
    place.style.minHeight = height ? `${height}px` : "";
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
      reserve();
      const layout = {
        ...themed(laidOut(), colourOf(root, "ink"), colourOf(root, "faint")),
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
