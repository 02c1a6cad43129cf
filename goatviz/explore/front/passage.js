// The input as a passage: each token coloured by the mass that the chosen query gives to it, or that
// it gives to the chosen key. Pointing at a token shows its row, a click chooses it.

import { listen, make } from "./dom.js";
import { newestWins, number } from "./map.js";

const SIDES = {
  gives: { chosen: "query", says: (at) => `Query ${at} gives`, other: "to key" },
  receives: { chosen: "key", says: (at) => `Key ${at} receives`, other: "from query" },
};

export function shades(weights, sink) {
  // Shares of full colour, by square root, and the mass that has it: the largest beside the sink.
  let most = 0;
  weights.forEach((weight, at) => {
    if (at !== sink && weight > most) most = weight;
  });
  const full = most > 0 ? most : 1;
  const share = (weight) => (weight > 0 ? Math.min(1, Math.sqrt(weight / full)) : 0);
  return { full, shares: Array.from(weights, share) };
}

export function renderPassage({ model, el, host }) {
  const root = make("div", { class: "goatviz-passage", role: "group", "aria-label": "Input" }, el);
  const bar = make("div", { class: "goatviz-passage-bar" }, root);
  const holder = make("label", {}, bar, "Colour: ");
  const direction = make("select", { name: "direction" }, holder);
  make("option", { value: "gives" }, direction, "mass that the chosen query gives");
  make("option", { value: "receives" }, direction, "mass that the chosen key receives");
  direction.disabled = !model.send;
  const seeker = make("label", {}, bar, "Search ");
  const search = make("input", { type: "search", name: "search", size: "12" }, seeker);
  const matches = make("span", { "aria-live": "polite" }, seeker);
  const legend = make("span", { class: "goatviz-part-note" }, bar);
  const text = make("div", { class: "goatviz-passage-text", tabindex: "0", role: "application" }, root);
  text.setAttribute("aria-roledescription", "passage");
  text.setAttribute(
    "aria-label",
    "Tokens of the input. Left and right arrows choose the token before or after.",
  );
  const status = make("div", { class: "goatviz-part-note", "aria-live": "polite" }, root);
  let spans = [];
  let painted = []; // the share of full colour of each
  let hovered = null; // the token that is pointed at, and its weights once they are known
  let found = [];

  const side = () => SIDES[model.get("direction")];
  const named = (at) => {
    const token = model.get("tokens")[at];
    return token === undefined ? String(at) : `${at.toLocaleString("en")} \u201c${token}\u201d`;
  };
  const asArray = (view) =>
    new Float32Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));

  const build = () => {
    text.replaceChildren();
    painted = [];
    spans = model.get("tokens").map((token, at) => {
      // A line may break before a word.
      if (/^\W/.test(token)) make("wbr", {}, text);
      const span = make("span", { "data-at": String(at), dir: "auto" }, text, token);
      if (/\u23ce/.test(token)) make("br", {}, text);
      return span;
    });
    seek();
    paint();
  };

  const paint = () => {
    if (!spans.length) {
      legend.textContent = status.textContent = "";
      return;
    }
    const shown = hovered?.weights ?? asArray(model.get("weights"));
    const at = hovered?.weights ? hovered.at : model.get("at");
    const { full, shares } = shades(shown, model.get("sink"));
    spans.forEach((span, token) => {
      const share = (shares[token] ?? 0).toFixed(3);
      // Most keep theirs, and a style that is set again is computed again.
      if (painted[token] !== share) span.style.setProperty("--goatviz-share", share);
      painted[token] = share;
      span.classList.toggle("goatviz-forbidden", Number.isNaN(shown[token]));
      span.classList.toggle("goatviz-chosen", token === at);
    });
    legend.textContent = `full colour: ${number(full)} or more`;
    const best = shown.reduce((top, weight, token) => (weight > shown[top] || Number.isNaN(shown[top]) ? token : top), 0);
    status.textContent = Number.isNaN(shown[best])
      ? `There are no weights of ${side().chosen} ${named(at)}.`
      : `${side().says(named(at))} most ${side().other} ${named(best)}: ${number(shown[best])}.`;
    root.dataset.painted = String(at);
  };

  const rows = newestWins((at) => model.send({ kind: "weights", at }));
  const point = (at) => {
    if (at === (hovered?.at ?? null)) return;
    hovered = at === null ? null : { at, weights: null };
    if (at === null) paint();
    else if (model.send) rows.ask(at);
  };
  const choose = (at) => {
    if (at < 0 || at >= spans.length) return;
    hovered = null;
    host.set(side().chosen, at);
    host.save_changes();
  };
  const reveal = (at) => {
    // Scroll the passage, and not the page around it.
    const span = spans[at];
    if (!span) return;
    const top = span.offsetTop - text.offsetTop;
    if (top < text.scrollTop || top + span.offsetHeight > text.scrollTop + text.clientHeight)
      text.scrollTop = Math.max(0, top - text.clientHeight / 2);
  };
  const tokenOf = (event) => {
    const span = event.target.closest?.("[data-at]");
    return span ? Number(span.dataset.at) : null;
  };
  text.addEventListener("pointermove", (event) => point(tokenOf(event)));
  text.addEventListener("pointerleave", () => point(null));
  text.addEventListener("click", (event) => {
    const at = tokenOf(event);
    if (at !== null) choose(at);
  });
  text.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || event.ctrlKey || event.metaKey || event.altKey) return;
    choose(model.get("at") + step);
    event.preventDefault();
    event.stopPropagation();
  });

  const seek = () => {
    const wanted = search.value.trim().toLowerCase();
    found = [];
    spans.forEach((span, at) => {
      const hit = wanted !== "" && model.get("tokens")[at].toLowerCase().includes(wanted);
      span.classList.toggle("goatviz-match", hit);
      if (hit) found.push(at);
    });
    matches.textContent = wanted ? ` ${found.length.toLocaleString("en")} found` : "";
  };
  search.addEventListener("input", () => {
    seek();
    if (found.length) reveal(found[0]);
  });
  search.addEventListener("keydown", (event) => {
    event.stopPropagation();
    if (event.key !== "Enter" || !found.length) return;
    // The next match after the chosen token, and after the last one the first.
    choose(found.find((at) => at > model.get("at")) ?? found[0]);
  });
  direction.addEventListener("keydown", (event) => event.stopPropagation());
  direction.addEventListener("change", () => {
    model.set("direction", direction.value);
    model.save_changes();
  });

  const received = (content, buffers) => {
    if (content.kind !== "weighed") return;
    rows.answered();
    if (hovered && hovered.at === content.at && buffers?.length) {
      hovered.weights = asArray(buffers[0]);
      paint();
    }
  };
  const chosen = () => {
    direction.value = model.get("direction");
    paint();
  };
  const stop = listen(model, [
    ["tokens", build],
    ["weights sink direction", chosen],
    ["at", () => reveal(model.get("at"))],
    ["msg:custom", received],
  ]);
  build();
  chosen();
  // It begins when the passage has a place on the page.
  const resized = new ResizeObserver(() => reveal(model.get("at")));
  resized.observe(text);
  return () => {
    stop();
    resized.disconnect();
    root.remove();
  };
}
