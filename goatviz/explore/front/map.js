// A map of attention weights on a canvas, at any zoom. The kernel sends 8-bit cells for the visible
// window; this file draws them, moves the window and asks for the next one. Without a kernel the
// last view stays and is scaled. Tokens are drawn as text, never as markup.

import { colourOf, listen, make, whenThemed } from "./dom.js";

// Room for ticks and titles; tokens need more of it than numbers.
const MARGINS = {
  tokens: { left: 92, right: 12, top: 10, bottom: 84 },
  numbers: { left: 66, right: 12, top: 10, bottom: 48 },
};
const LABEL_PX = 13; // a token needs this many pixels of its own
const FORBIDDEN = 0; // the code of cells whose pairs are all forbidden

const COLOURS = {
  linear: "linear colours",
  log: "logarithmic colours",
  signed: "colours by the root of the difference",
};

const STEPS = {
  ArrowLeft: [0, -1],
  ArrowRight: [0, 1],
  ArrowUp: [-1, 0],
  ArrowDown: [1, 0],
};

export function clampWindow([low, high], count, least = 1) {
  // A half-open window, moved inside `count` positions and then cut to them.
  const width = Math.max(Math.min(high - low, count), Math.min(least, count));
  const start = Math.min(Math.max(low, 0), count - width);
  return [start, start + width];
}

export function zoomWindow([low, high], count, factor, at) {
  // The window scaled about the position `at`, which stays where it is on the screen.
  const width = Math.max(1, Math.min(count, (high - low) * factor));
  const share = (at - low) / (high - low);
  return clampWindow([at - share * width, at + (1 - share) * width], count);
}

export function niceTicks(low, high, most) {
  // Round positions for ticks, at most `most` of them.
  const span = Math.max(high - low, 1);
  let step = 10 ** Math.floor(Math.log10(span / Math.max(most, 1)));
  for (const factor of [1, 2, 5, 10, 20, 50]) {
    if (span / (step * factor) <= most) {
      step *= factor;
      break;
    }
  }
  step = Math.max(1, Math.round(step));
  const ticks = [];
  for (let tick = Math.ceil(low / step) * step; tick < high; tick += step) ticks.push(tick);
  return ticks;
}

export function decode(code, scale) {
  // The weight that an 8-bit code stands for, null where every pair is forbidden.
  if (code === FORBIDDEN) return null;
  const share = (code - 1) / 254;
  if (scale.kind === "log") return scale.low * (scale.high / scale.low) ** share;
  // By the square root on both sides of 0.
  if (scale.kind === "signed") return (2 * share - 1) * Math.abs(2 * share - 1) * scale.high;
  return scale.low + share * (scale.high - scale.low);
}

// Linked maps of a page by its model: what moves one of them moves the others.
const LINKED = new WeakMap();

export function number(value, digits = 3) {
  if (value === 0) return "0";
  if (Math.abs(value) < 1e-3) return value.toExponential(digits - 1);
  return value.toPrecision(digits);
}

export function paintCodes(canvas, codes, rows, columns, palette) {
  // One pixel for each code, in the colours of the palette; clear where a pair is forbidden.
  const lookup = new Uint32Array(256);
  const bytes = new Uint8Array(lookup.buffer);
  for (let code = 1; code < 256; code += 1) {
    const [red, green, blue] = palette[code];
    bytes.set([red, green, blue, 255], 4 * code);
  }
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d");
  const data = context.createImageData(columns, rows);
  const out = new Uint32Array(data.data.buffer);
  for (let at = 0; at < out.length; at += 1) out[at] = lookup[codes[at]];
  context.putImageData(data, 0, 0);
}

export function newestWins(send) {
  // One question at a time; of those asked in the meantime only the newest is sent.
  let busy = false;
  let waiting = null;
  return {
    ask(question) {
      if (busy) {
        waiting = question;
        return;
      }
      busy = true;
      send(question);
    },
    answered() {
      busy = false;
      if (waiting !== null) {
        const next = waiting;
        waiting = null;
        this.ask(next);
      }
    },
    get idle() {
      return !busy;
    },
  };
}

export function renderMap({ model, el, host }) {
  let margin = MARGINS.numbers;
  const fitMargin = () => {
    margin = model.get("has_tokens") ? MARGINS.tokens : MARGINS.numbers;
  };
  fitMargin();
  const root = make("div", { class: "goatviz-map" }, el);
  const toolbar = make("div", { class: "goatviz-map-bar", role: "toolbar" }, root);
  toolbar.setAttribute("aria-label", "Map controls");
  const buttons = {};
  for (const [name, sign, says] of [
    ["in", "+", "Zoom in"],
    ["out", "\u2212", "Zoom out"],
    ["all", "\u2922", "Show the whole plan"],
  ]) {
    buttons[name] = make("button", { type: "button", "aria-label": says, title: says }, toolbar, sign);
  }
  const subscriptions = [];
  const choose = (label, trait, options) => {
    const holder = make("label", {}, toolbar, `${label} `);
    const select = make("select", { "aria-label": label }, holder);
    for (const [value, text] of options) make("option", { value }, select, text);
    select.value = model.get(trait);
    select.addEventListener("change", () => {
      model.set(trait, select.value);
      model.save_changes();
    });
    subscriptions.push([trait, () => (select.value = model.get(trait))]);
  };
  const signed = model.get("signed");
  if (!signed)
    choose("Colour", "scale", [
      ["auto", "automatic"],
      ["linear", "linear"],
      ["log", "logarithmic"],
    ]);
  choose(signed ? "Difference of a cell" : "Weight of a cell", "pool", [
    ["max", signed ? "largest by magnitude" : "largest of its keys"],
    ["mean", "mean of its keys"],
  ]);
  const lesser = make("label", {}, toolbar);
  const without = make("input", { type: "checkbox", name: "without" }, lesser);
  make("span", {}, lesser, "without the sink");
  lesser.title = "leave the first key out, and normalise every row over the others";
  without.addEventListener("change", () => {
    model.set("without", without.checked);
    model.save_changes();
  });
  const showWithout = () => {
    without.checked = model.get("without");
  };
  subscriptions.push(["without", showWithout]);
  showWithout();
  // Without a kernel there is nobody to ask for other cells.
  if (!model.send) for (const label of toolbar.querySelectorAll("label")) label.hidden = true;
  const bar = make("canvas", { class: "goatviz-map-scale", "aria-hidden": "true" }, toolbar);
  const work = make("span", { class: "goatviz-map-work" }, toolbar);
  const progress = make("progress", { max: "1", "aria-label": "Computing the view" }, work);
  buttons.stop = make("button", { type: "button" }, work, "Stop");
  const rule = make("div", { class: "goatviz-map-rule" }, root);
  const canvas = make("canvas", { class: "goatviz-map-canvas", tabindex: "0" }, root);
  canvas.setAttribute("role", "application");
  canvas.setAttribute("aria-roledescription", "attention map");
  const status = make("div", { class: "goatviz-map-status", "aria-live": "polite" }, root);
  const problem = make("div", { class: "goatviz-error", role: "alert" }, root);

  const count = () => model.get("size");
  const image = document.createElement("canvas");
  const state = {
    queries: [0, count()[0]],
    keys: [0, count()[1]],
    cursor: null,
    exact: null, // the kernel's last answer about a pair
    drag: null,
    brushing: null,
    anchor: null, // the query at which a brush by keyboard began
    frame: 0,
    asked: 0,
  };
  const questions = newestWins((question) => {
    if (model.send) model.send({ kind: "view", ...question });
  });
  const cells = newestWins((pair) => {
    if (model.send) model.send({ kind: "cell", query: pair[0], key: pair[1] });
  });

  // Drawing --------------------------------------------------------------------------------

  const box = () => ({
    width: Math.max(60, canvas.clientWidth - margin.left - margin.right),
    height: Math.max(60, canvas.clientHeight - margin.top - margin.bottom),
  });

  const place = (query, key) => {
    const { width, height } = box();
    return {
      x: margin.left + ((key - state.keys[0]) / (state.keys[1] - state.keys[0])) * width,
      y: margin.top + ((query - state.queries[0]) / (state.queries[1] - state.queries[0])) * height,
    };
  };

  const pairAt = (event) => {
    const bounds = canvas.getBoundingClientRect();
    const { width, height } = box();
    const x = (event.clientX - bounds.left - margin.left) / width;
    const y = (event.clientY - bounds.top - margin.top) / height;
    return {
      query: state.queries[0] + y * (state.queries[1] - state.queries[0]),
      key: state.keys[0] + x * (state.keys[1] - state.keys[0]),
      inside: x >= 0 && x < 1 && y >= 0 && y < 1,
      onQueries: x < 0 && y >= 0 && y < 1,
    };
  };

  const colours = () => {
    const names = ["ink", "grid", "masked", "mark"];
    return Object.fromEntries(names.map((name) => [name, colourOf(root, name)]));
  };

  const paintImage = () => {
    const view = model.get("view");
    const pixels = model.get("pixels");
    if (!view.rows || !pixels || pixels.byteLength < view.rows * view.columns) return;
    const codes = new Uint8Array(pixels.buffer, pixels.byteOffset, view.rows * view.columns);
    paintCodes(image, codes, view.rows, view.columns, model.get("palette"));
  };

  const draw = () => {
    state.frame = 0;
    const ratio = window.devicePixelRatio || 1;
    const wide = canvas.clientWidth;
    const high = canvas.clientHeight;
    if (!wide || !high) return;
    canvas.width = Math.round(wide * ratio);
    canvas.height = Math.round(high * ratio);
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    const { width, height } = box();
    const look = colours();
    context.fillStyle = look.masked;
    context.fillRect(margin.left, margin.top, width, height);
    const view = model.get("view");
    if (view.rows) {
      context.save();
      context.beginPath();
      context.rect(margin.left, margin.top, width, height);
      context.clip();
      const from = place(view.queries[0], view.keys[0]);
      const to = place(view.queries[1], view.keys[1]);
      context.imageSmoothingEnabled = false;
      context.drawImage(image, from.x, from.y, to.x - from.x, to.y - from.y);
      context.restore();
    }
    axes(context, look, width, height);
    marks(context, look, width, height);
    root.dataset.painted = String(view.id ?? "");
  };

  const redraw = () => {
    if (!state.frame) state.frame = requestAnimationFrame(draw);
  };

  const labelOf = (tokens, index) => {
    const text = tokens && tokens.texts[index - tokens.start];
    return text === undefined ? null : text;
  };

  const axes = (context, look, width, height) => {
    const view = model.get("view");
    context.fillStyle = look.ink;
    context.strokeStyle = look.grid;
    context.lineWidth = 1;
    context.strokeRect(margin.left - 0.5, margin.top - 0.5, width + 1, height + 1);
    context.font = "11px ui-monospace, Menlo, Consolas, monospace";
    const cellHeight = height / (state.queries[1] - state.queries[0]);
    const cellWidth = width / (state.keys[1] - state.keys[0]);
    context.textBaseline = "middle";
    context.textAlign = "right";
    const texts = (tokens, pixels) => tokens && pixels >= LABEL_PX;
    const every = ([low, high]) => {
      const first = Math.max(0, Math.ceil(low - 0.5));
      return Array.from({ length: Math.max(0, Math.ceil(high) - first) }, (_, at) => first + at);
    };
    const named = texts(view.query_tokens, cellHeight);
    const rows = named ? every(state.queries) : niceTicks(...state.queries, height / 40);
    for (const query of rows) {
      const y = place(query + 0.5, 0).y;
      if (y < margin.top || y > margin.top + height) continue;
      const text = named ? labelOf(view.query_tokens, query) : null;
      context.fillText(clip(text ?? query.toLocaleString("en"), 11), margin.left - 5, y);
    }
    const keyed = texts(view.key_tokens, cellWidth);
    const columns = keyed ? every(state.keys) : niceTicks(...state.keys, width / 70);
    for (const key of columns) {
      const x = place(0, key + 0.5).x;
      if (x < margin.left || x > margin.left + width) continue;
      const text = keyed ? labelOf(view.key_tokens, key) : null;
      context.save();
      context.translate(x, margin.top + height + 6);
      if (text !== null) {
        context.rotate(-Math.PI / 2);
        context.textAlign = "right";
        context.fillText(clip(text, 8), 0, 0);
      } else {
        context.textAlign = "center";
        context.textBaseline = "top";
        context.fillText(key.toLocaleString("en"), 0, 0);
      }
      context.restore();
    }
    context.font = "12px Inter, Helvetica, Arial, sans-serif";
    context.textAlign = "center";
    context.textBaseline = "bottom";
    // Below the ticks, which leave room where no tokens are named.
    const below = keyed ? canvas.clientHeight - 4 : margin.top + height + 40;
    context.fillText("key [tokens]", margin.left + width / 2, below);
    context.save();
    context.translate(named ? 12 : margin.left - 54, margin.top + height / 2);
    context.rotate(-Math.PI / 2);
    context.fillText("query [tokens]", 0, 6);
    context.restore();
  };

  const clip = (text, most) => {
    const all = Array.from(String(text));
    return all.length > most ? `${all.slice(0, most - 1).join("")}\u2026` : all.join("");
  };

  const marks = (context, look, width, height) => {
    const brush = state.brushing ?? model.get("brush");
    if (brush.length === 2) {
      const from = place(brush[0], 0).y;
      const to = place(brush[1], 0).y;
      context.fillStyle = look.mark;
      context.globalAlpha = 0.8;
      context.fillRect(margin.left - 4, from, 4, Math.max(2, to - from));
      context.globalAlpha = 1;
    }
    const outline = ([query, key], dashes) => {
      const from = place(query, key);
      const to = place(query + 1, key + 1);
      const least = 5;
      const wide = Math.max(to.x - from.x, least);
      const high = Math.max(to.y - from.y, least);
      const corner = [(from.x + to.x - wide) / 2, (from.y + to.y - high) / 2];
      // Light on dark can be seen on every colour of the map.
      context.lineWidth = 3.5;
      context.strokeStyle = "rgba(0, 0, 0, 0.75)";
      context.strokeRect(...corner, wide, high);
      context.setLineDash(dashes);
      context.lineWidth = 1.75;
      context.strokeStyle = dashes.length ? "#ffffff" : look.mark;
      context.strokeRect(...corner, wide, high);
      context.setLineDash([]);
    };
    context.save();
    context.beginPath();
    context.rect(margin.left, margin.top, width, height);
    context.clip();
    if (model.get("selection").length === 2) outline(model.get("selection"), []);
    if (state.cursor) outline(state.cursor, [3, 2]);
    context.restore();
  };

  const paintScale = () => {
    const view = model.get("view");
    if (!view.range) return;
    const palette = model.get("palette");
    const ratio = window.devicePixelRatio || 1;
    const wide = 190;
    bar.width = wide * ratio;
    bar.height = 26 * ratio;
    bar.style.width = `${wide}px`;
    bar.style.height = "26px";
    const context = bar.getContext("2d");
    context.scale(ratio, ratio);
    for (let x = 0; x < wide - 60; x += 1) {
      const [red, green, blue] = palette[1 + Math.round((254 * x) / (wide - 61))];
      context.fillStyle = `rgb(${red},${green},${blue})`;
      context.fillRect(30 + x, 2, 1, 10);
    }
    context.fillStyle = colours().ink;
    context.font = "10px Inter, Helvetica, Arial, sans-serif";
    context.textBaseline = "top";
    context.textAlign = "center";
    for (const code of [1, 128, 255]) {
      const at = 30 + ((code - 1) / 254) * (wide - 61);
      context.fillText(number(decode(code, view.range)), at, 14);
    }
  };

  // Text -----------------------------------------------------------------------------------

  const nameOf = (index, tokens) => {
    const text = labelOf(tokens, index);
    const digits = index.toLocaleString("en");
    return text === null ? digits : `${digits} \u201c${text}\u201d`;
  };

  const say = () => {
    const view = model.get("view");
    const exact = state.exact;
    rule.textContent = view.rule
      ? `${model.get("title")} \u00b7 queries ${range(state.queries)}, keys ${range(state.keys)} \u00b7 ` +
        `${view.rule} \u00b7 ${COLOURS[view.range.kind]}`
      : model.get("title");
    if (!state.cursor || !view.rows) {
      status.textContent = model.get("summary");
      return;
    }
    const [query, key] = state.cursor;
    const head = `query ${nameOf(query, view.query_tokens)}, key ${nameOf(key, view.key_tokens)}: `;
    if (exact && exact.query === query && exact.key === key) {
      status.textContent =
        head +
        (!exact.allowed
          ? "forbidden"
          : exact.difference !== undefined
          ? `difference ${number(exact.difference, 6)}: ` +
            `weight ${number(exact.weight, 6)} and ${number(exact.other, 6)}`
          : `weight ${number(exact.weight, 6)}, prior ${number(exact.prior, 6)}, ` +
            `content score ${number(exact.score, 6)}`);
      status.dataset.weight = exact.allowed ? String(exact.weight) : "";
      return;
    }
    const code = codeAt(query, key);
    if (code === undefined) return;
    const value = decode(code, view.range);
    const noun = signed ? "difference" : "weight";
    const what = view.exact ? noun : `${model.get("pool")} ${noun} of its cell`;
    status.textContent = head + (value === null ? "forbidden" : `${what} about ${number(value)}`);
    delete status.dataset.weight;
  };

  const range = ([low, high]) =>
    `${Math.floor(low).toLocaleString("en")}\u2013${(Math.ceil(high) - 1).toLocaleString("en")}`;

  const codeAt = (query, key) => {
    const view = model.get("view");
    const pixels = model.get("pixels");
    const row = Math.floor(
      ((query + 0.5 - view.queries[0]) / (view.queries[1] - view.queries[0])) * view.rows,
    );
    const column = Math.floor(
      ((key + 0.5 - view.keys[0]) / (view.keys[1] - view.keys[0])) * view.columns,
    );
    if (row < 0 || column < 0 || row >= view.rows || column >= view.columns) return undefined;
    return pixels.getUint8(row * view.columns + column);
  };

  // Questions to the kernel ----------------------------------------------------------------

  const room = () => {
    const { width, height } = box();
    const ratio = Math.min(window.devicePixelRatio || 1, 2);
    return { rows: Math.round(height * ratio), columns: Math.round(width * ratio) };
  };

  const fine = () => {
    // Whether the view shows the whole plan, in as many cells as the page has room for.
    const view = model.get("view");
    const whole = ([low, high] = [], size) => low === 0 && high === size;
    const { rows, columns } = room();
    return (
      whole(view.queries, count()[0]) &&
      whole(view.keys, count()[1]) &&
      view.id === -model.get("plan") &&
      view.rows >= Math.min(rows, count()[0]) &&
      view.columns >= Math.min(columns, count()[1])
    );
  };

  const ask = () => {
    const [queries, keys] = [state.queries, state.keys].map(([low, high]) => [
      Math.floor(low + 1e-9),
      Math.ceil(high - 1e-9),
    ]);
    state.asked += 1;
    root.dataset.asked = String(state.asked);
    // A view that is still being computed gives way to the new one.
    if (!questions.idle) stop();
    questions.ask({ id: state.asked, queries, keys, ...room() });
  };

  const stop = () => {
    if (model.get("progress") >= 0 && model.send) model.send({ kind: "stop" });
  };

  const show = (queries, keys) => {
    state.queries = clampWindow(queries, count()[0]);
    state.keys = clampWindow(keys, count()[1]);
    say();
    redraw();
    ask();
  };
  const mine = {
    show,
    reset() {
      const size = count();
      if ([state.queries, state.keys].some(([low, high], at) => low > 0 || high < size[at]))
        show([0, size[0]], [0, size[1]]);
    },
    choose(pair) {
      model.set("selection", pair);
      redraw();
    },
  };
  const linked = model.get("linked") ? (LINKED.get(host) ?? new Set()) : new Set();
  if (model.get("linked")) LINKED.set(host, linked.add(mine));

  const moveTo = (queries, keys) => {
    show(queries, keys);
    for (const other of linked) if (other !== mine) other.show(state.queries, state.keys);
  };

  const zoom = (factor, query, key) => {
    const middle = ([low, high]) => (low + high) / 2;
    moveTo(
      zoomWindow(state.queries, count()[0], factor, query ?? middle(state.queries)),
      zoomWindow(state.keys, count()[1], factor, key ?? middle(state.keys)),
    );
  };

  const whole = () => moveTo([0, count()[0]], [0, count()[1]]);

  const pointAt = (query, key) => {
    const within = (value, most) => Math.min(Math.max(Math.floor(value), 0), most - 1);
    const pair = [within(query, count()[0]), within(key, count()[1])];
    if (state.cursor && pair[0] === state.cursor[0] && pair[1] === state.cursor[1]) return;
    state.cursor = pair;
    say();
    redraw();
    cells.ask(pair);
  };

  const follow = () => {
    // Keep the cursor inside the window.
    const [query, key] = state.cursor;
    const moved = ([low, high], at) => {
      if (at < low) return [at, at + high - low];
      if (at + 1 > high) return [at + 1 - (high - low), at + 1];
      return [low, high];
    };
    const queries = moved(state.queries, query);
    const keys = moved(state.keys, key);
    if (queries[0] !== state.queries[0] || keys[0] !== state.keys[0]) moveTo(queries, keys);
  };

  const setBrush = (one, other) => {
    model.set("brush", [Math.min(one, other), Math.max(one, other) + 1]);
    model.save_changes();
    redraw();
  };

  const select = () => {
    for (const each of new Set([mine, ...linked])) each.choose([...state.cursor]);
    // Without a kernel, nobody else moves the explorer to this pair.
    if (!model.send)
      ["query", "key"].forEach((name, at) => {
        if (host?.get(name) !== undefined) host.set(name, state.cursor[at]);
      });
    model.save_changes();
  };

  // Mouse and keyboard ---------------------------------------------------------------------

  buttons.in.addEventListener("click", () => zoom(0.5, ...(state.cursor ?? [])));
  buttons.out.addEventListener("click", () => zoom(2, ...(state.cursor ?? [])));
  buttons.all.addEventListener("click", whole);
  buttons.stop.addEventListener("click", stop);

  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const step = STEPS[event.key];
    const cursor = state.cursor ?? [Math.floor(state.queries[0]), Math.floor(state.keys[0])];
    if (step && event.shiftKey) {
      const by = (window_) => Math.max(1, (window_[1] - window_[0]) / 4);
      moveTo(
        state.queries.map((at) => at + step[0] * by(state.queries)),
        state.keys.map((at) => at + step[1] * by(state.keys)),
      );
    } else if (step) {
      pointAt(cursor[0] + step[0], cursor[1] + step[1]);
      follow();
    } else if (event.key === "+" || event.key === "=") {
      zoom(0.5, ...(state.cursor ?? []));
    } else if (event.key === "-") {
      zoom(2, ...(state.cursor ?? []));
    } else if (event.key === "Home" || event.key === "0") {
      whole();
    } else if (event.key === "b") {
      // The first press begins the brush, the second ends it.
      if (state.anchor === null) {
        state.anchor = cursor[0];
        setBrush(cursor[0], cursor[0]);
      } else {
        setBrush(state.anchor, cursor[0]);
        state.anchor = null;
      }
    } else if (event.key === "Escape") {
      stop();
      state.anchor = null;
      model.set("brush", []);
      model.save_changes();
    } else if (event.key === "Enter" || event.key === " ") {
      if (!state.cursor) pointAt(...cursor);
      select();
    } else {
      return;
    }
    // JupyterLab would move to another cell, or run this one.
    event.preventDefault();
    event.stopPropagation();
  });

  canvas.addEventListener(
    "wheel",
    (event) => {
      const at = pairAt(event);
      if (!at.inside) return;
      event.preventDefault();
      zoom(event.deltaY > 0 ? 1.25 : 0.8, at.query, at.key);
    },
    { passive: false },
  );

  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    const at = pairAt(event);
    if (at.inside) state.drag = { from: at, queries: state.queries, keys: state.keys, moved: false };
    else if (at.onQueries) state.brushing = [Math.floor(at.query), Math.floor(at.query) + 1];
    else return;
    canvas.setPointerCapture(event.pointerId);
    redraw();
  });

  canvas.addEventListener("pointermove", (event) => {
    const at = pairAt(event);
    if (state.brushing) {
      const end = Math.min(Math.max(Math.floor(at.query), 0), count()[0] - 1);
      state.brushing[1] = end + 1;
      redraw();
    } else if (state.drag) {
      const bounds = canvas.getBoundingClientRect();
      const { width, height } = box();
      const { from, queries, keys } = state.drag;
      // The pointer's place in the window as it was when the drag began.
      const x = (event.clientX - bounds.left - margin.left) / width;
      const y = (event.clientY - bounds.top - margin.top) / height;
      const byQuery = from.query - (queries[0] + y * (queries[1] - queries[0]));
      const byKey = from.key - (keys[0] + x * (keys[1] - keys[0]));
      const far =
        Math.abs(byQuery) * (height / (queries[1] - queries[0])) +
        Math.abs(byKey) * (width / (keys[1] - keys[0]));
      if (far > 4) state.drag.moved = true;
      if (state.drag.moved)
        moveTo(
          queries.map((q) => q + byQuery),
          keys.map((k) => k + byKey),
        );
    } else if (at.inside) {
      pointAt(at.query, at.key);
    }
  });

  canvas.addEventListener("pointerup", (event) => {
    if (state.brushing) {
      const [low, high] = state.brushing;
      if (high - low === 1) {
        // A click on a token chooses its query.
        pointAt(low, model.get("selection")[1] ?? 0);
        select();
      } else {
        model.set("brush", low < high ? [low, high] : [high - 1, low + 1]);
        model.save_changes();
      }
      state.brushing = null;
      redraw();
    } else if (state.drag) {
      const moved = state.drag.moved;
      state.drag = null;
      if (!moved) {
        const at = pairAt(event);
        pointAt(at.query, at.key);
        select();
      }
    }
  });

  canvas.addEventListener("dblclick", whole);

  // Answers of the kernel ------------------------------------------------------------------

  const showView = () => {
    paintImage();
    paintScale();
    say();
    redraw();
  };
  const showError = () => {
    problem.textContent = model.get("error");
    problem.hidden = !model.get("error");
  };
  const showProgress = () => {
    const share = model.get("progress");
    work.dataset.busy = share >= 0 ? "yes" : "no";
    progress.value = Math.max(share, 0);
  };
  const showSize = () => {
    fitMargin();
    // Another plan: answers about the old one no longer count.
    state.queries = [0, count()[0]];
    state.keys = [0, count()[1]];
    state.cursor = null;
    state.exact = null;
    say();
    redraw();
    if (!fine()) ask();
    for (const other of linked) if (other !== mine) other.reset();
  };
  const received = (message) => {
    if (message.kind === "viewed") questions.answered();
    if (message.kind === "celled") {
      cells.answered();
      state.exact = message.cell ?? null;
      say();
    }
  };
  const label = () => {
    canvas.setAttribute(
      "aria-label",
      `${model.get("title")}. Arrow keys move the cursor, shift and arrow keys the window, plus and ` +
        "minus zoom, Home shows the whole plan, Enter selects, b begins and ends a brush of queries, Escape clears it.",
    );
    say();
  };
  subscriptions.push(
    ["pixels view", showView],
    ["palette", showView],
    ["selection brush", redraw],
    ["error", showError],
    ["progress", showProgress],
    ["title summary", label],
    ["plan", showSize],
    ["scale pool without", ask],
    ["msg:custom", received],
  );
  const stops = [
    listen(model, subscriptions),
    whenThemed(root, () => {
      paintScale();
      redraw();
    }),
  ];
  let wide = 0;
  const resized = new ResizeObserver(() => {
    if (canvas.clientWidth === wide) return;
    wide = canvas.clientWidth;
    redraw();
    ask();
  });
  resized.observe(canvas);

  label();
  showError();
  showProgress();
  showView();
  return () => {
    for (const each of stops) each();
    linked.delete(mine);
    resized.disconnect();
    if (state.frame) cancelAnimationFrame(state.frame);
    root.remove();
  };
}
