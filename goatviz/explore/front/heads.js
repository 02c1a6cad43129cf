// All heads of a model at a glance: a small picture of each plan; a click or a key opens one.

import { colourOf, listen, make, whenThemed } from "./dom.js";
import { number, paintCodes } from "./map.js";

const MARGIN = { left: 44, top: 4, right: 4, bottom: 30 };
const SIZES = { least: 11, most: 56 }; // pixels of a picture, with the gap after it

export function gridOf(layers, heads, width) {
  // How the pictures lie: the longer side from left to right, as large as there is room.
  const across = layers >= heads ? layers : heads;
  const down = layers >= heads ? heads : layers;
  const room = Math.floor((width - MARGIN.left - MARGIN.right) / across);
  return {
    layersAcross: layers >= heads,
    across,
    down,
    size: Math.max(SIZES.least, Math.min(SIZES.most, room)),
  };
}

export function renderHeads({ model, el, host }) {
  const root = make("div", { class: "goatviz-heads", role: "group" }, el);
  const title = make("div", { class: "goatviz-part-title" }, root);
  const rule = make("div", { class: "goatviz-part-note" }, root);
  const scroller = make("div", { class: "goatviz-scroller" }, root);
  const canvas = make("canvas", { tabindex: "0", role: "application" }, scroller);
  canvas.setAttribute("aria-roledescription", "overview of heads");
  const status = make("div", { class: "goatviz-part-note", "aria-live": "polite" }, root);
  const atlas = document.createElement("canvas");
  let hovered = null;
  let frame = 0;

  const layers = () => model.get("layers");
  const heads = () => model.get("heads");
  const known = (at) => at && model.get("present")[at[0]]?.[at[1]];
  const chosen = () => [layers().indexOf(host.get("layer")), heads().indexOf(host.get("head"))];
  const grid = () => gridOf(layers().length, heads().length, scroller.clientWidth);

  const paintAtlas = () => {
    const [rows, columns] = model.get("cells");
    const pixels = model.get("pixels");
    const count = layers().length * heads().length;
    if (!pixels || !rows || pixels.byteLength < count * rows * columns) return;
    const codes = new Uint8Array(pixels.buffer, pixels.byteOffset, count * rows * columns);
    paintCodes(atlas, codes, count * rows, columns, model.get("palette"));
    redraw();
  };

  const corner = ([layer, head], { layersAcross, size }) => {
    const [x, y] = layersAcross ? [layer, head] : [head, layer];
    return [MARGIN.left + x * size, MARGIN.top + y * size];
  };

  const draw = () => {
    frame = 0;
    if (!scroller.clientWidth || !atlas.width) return;
    const lie = grid();
    const { across, down, size, layersAcross } = lie;
    const ratio = window.devicePixelRatio || 1;
    const wide = MARGIN.left + MARGIN.right + across * size;
    const high = MARGIN.top + MARGIN.bottom + down * size;
    Object.assign(canvas, { width: Math.round(wide * ratio), height: Math.round(high * ratio) });
    Object.assign(canvas.style, { width: `${wide}px`, height: `${high}px` });
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.imageSmoothingEnabled = true;
    const [rows, columns] = model.get("cells");
    const gap = size > 20 ? 2 : 1;
    for (let layer = 0; layer < layers().length; layer += 1)
      for (let head = 0; head < heads().length; head += 1) {
        if (!known([layer, head])) continue;
        const [x, y] = corner([layer, head], lie);
        const from = (layer * heads().length + head) * rows;
        context.fillStyle = colourOf(root, "masked");
        context.fillRect(x, y, size - gap, size - gap);
        context.drawImage(atlas, 0, from, columns, rows, x, y, size - gap, size - gap);
      }
    context.fillStyle = colourOf(root, "ink");
    context.font = "11px Inter, Helvetica, Arial, sans-serif";
    const [names, sides] = layersAcross ? [layers(), heads()] : [heads(), layers()];
    const every = Math.max(1, Math.ceil(22 / size));
    context.textAlign = "center";
    context.textBaseline = "top";
    names.forEach((name, at) => {
      if (at % every === 0)
        context.fillText(name, MARGIN.left + (at + 0.5) * size, MARGIN.top + down * size + 3);
    });
    context.textAlign = "right";
    context.textBaseline = "middle";
    sides.forEach((name, at) => {
      if (at % Math.max(1, Math.ceil(13 / size)) === 0)
        context.fillText(name, MARGIN.left - 5, MARGIN.top + (at + 0.5) * size - gap / 2);
    });
    context.textAlign = "left";
    context.textBaseline = "bottom";
    context.fillText(layersAcross ? "layer" : "head", MARGIN.left, high - 1);
    context.save();
    context.translate(11, MARGIN.top);
    context.rotate(-Math.PI / 2);
    context.textAlign = "right";
    context.fillText(layersAcross ? "head" : "layer", 0, 0);
    context.restore();
    const frameOf = (at, colour) => {
      const [x, y] = corner(at, lie);
      context.lineWidth = 4;
      context.strokeStyle = "rgba(0, 0, 0, 0.75)";
      context.strokeRect(x - 1, y - 1, size - gap + 2, size - gap + 2);
      context.lineWidth = 2;
      context.strokeStyle = colour;
      context.strokeRect(x - 1, y - 1, size - gap + 2, size - gap + 2);
    };
    if (known(chosen())) frameOf(chosen(), colourOf(root, "mark"));
    if (known(hovered)) frameOf(hovered, "#ffffff");
    root.dataset.drawn = String(Number(root.dataset.drawn ?? 0) + 1);
  };
  const redraw = () => {
    if (!frame) frame = requestAnimationFrame(draw);
  };

  const say = () => {
    const at = hovered ?? chosen();
    title.textContent = model.get("title");
    rule.textContent = `Logarithmic colours, 1e-5 to 1. ${model.get("rule")}`;
    root.dataset.waiting = layers().length ? "no" : "yes";
    if (!known(at)) return;
    const [layer, head] = at;
    const numbers = model
      .get("measures")
      .filter(({ values }) => values[layer][head] !== null)
      .map(({ name, values }) => `${name} ${number(values[layer][head])}`);
    status.textContent = `Layer ${layers()[layer]}, head ${heads()[head]}: ${numbers.join(", ")}.`;
  };
  const label = () =>
    canvas.setAttribute(
      "aria-label",
      `${model.get("title")} Arrow keys open the head beside the chosen one.`,
    );

  const choose = (at) => {
    if (!known(at)) return;
    host.set("layer", layers()[at[0]]);
    host.set("head", heads()[at[1]]);
    host.save_changes();
    moved();
  };
  const placeAt = (event) => {
    const { layersAcross, size, across, down } = grid();
    const box = canvas.getBoundingClientRect();
    const x = Math.floor((event.clientX - box.left - MARGIN.left) / size);
    const y = Math.floor((event.clientY - box.top - MARGIN.top) / size);
    if (x < 0 || y < 0 || x >= across || y >= down) return null;
    const at = layersAcross ? [x, y] : [y, x];
    return known(at) ? at : null;
  };
  const hover = (at) => {
    hovered = at;
    canvas.style.cursor = at ? "pointer" : "default";
    say();
    redraw();
  };
  canvas.addEventListener("pointermove", (event) => hover(placeAt(event)));
  canvas.addEventListener("pointerleave", () => hover(null));
  canvas.addEventListener("click", (event) => choose(placeAt(event)));
  canvas.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const step = steps[event.key];
    if (!step || event.ctrlKey || event.metaKey || event.altKey) return;
    const [layer, head] = chosen();
    const [x, y] = step;
    hovered = null;
    choose(grid().layersAcross ? [layer + x, head + y] : [layer + y, head + x]);
    event.preventDefault();
    event.stopPropagation();
  });

  const moved = () => {
    say();
    redraw();
  };
  const stops = [
    listen(model, [
      ["pixels cells palette", paintAtlas],
      ["layers heads present measures", moved],
      ["title rule", () => (say(), label())],
    ]),
    listen(host, [["layer head", moved]]),
    whenThemed(root, redraw),
  ];
  const resized = new ResizeObserver(redraw);
  resized.observe(scroller);
  say();
  label();
  paintAtlas();
  return () => {
    for (const stop of stops) stop();
    resized.disconnect();
    if (frame) cancelAnimationFrame(frame);
    root.remove();
  };
}
