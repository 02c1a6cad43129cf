// An explorer: controls, its parts side by side, and all that is shown in words.

import { renderControls } from "./controls.js";
import { listen, make, scoped } from "./dom.js";
import { loadLibrary, renderFigure } from "./figure.js";
import { renderHeads } from "./heads.js";
import { renderMap } from "./map.js";
import { renderPassage } from "./passage.js";

const PARTS = {
  figure: renderFigure,
  heads: renderHeads,
  map: renderMap,
  passage: renderPassage,
};

export async function librarySource(model, closed) {
  // The text of plotly.js: from the model that holds it, or else from the kernel, unless the
  // widget is closed before it answers.
  try {
    const name = model.get("library").replace("IPY_MODEL_", "");
    return (await model.widget_manager.get_model(name)).get("source");
  } catch {
    if (!model.send) throw new Error("There is no kernel to ask for it.");
    return new Promise((resolve, reject) => {
      const end = () => model.off("msg:custom", received);
      const received = (content) => {
        if (content.kind !== "plotly") return;
        end();
        resolve(content.source);
      };
      closed.addEventListener("abort", () => {
        end();
        reject(new Error("The widget was closed."));
      });
      model.on("msg:custom", received);
      model.send({ kind: "plotly" });
    });
  }
}

function keepKeys(root) {
  // Jupyter takes keys such as arrows before they reach a slider, unless it has this attribute. Keys
  // with Control and the like, and Shift+Enter, remain Jupyter's.
  const look = (event) => {
    const [target] = event.composedPath();
    if (!root.contains(target)) return;
    const { ctrlKey, metaKey, altKey, shiftKey, key } = event;
    const jupyters = ctrlKey || metaKey || altKey || (shiftKey && key === "Enter");
    target.toggleAttribute("data-lm-suppress-shortcuts", !jupyters);
  };
  window.addEventListener("keydown", look, true);
  return () => window.removeEventListener("keydown", look, true);
}

export async function reconnect(model) {
  // anywidget takes no message from the kernel any more, ever, once importing this file has taken
  // longer than two seconds, as on a busy machine. Then hand messages on without it, and ask for
  // all that has been missed.
  let own = null;
  try {
    own = await model.widget_manager.get_model(model.get("own_id"));
  } catch {
    // Not a page of Jupyter, or one without a kernel.
  }
  if (!own?.comm_live) return;
  const gated = Object.getPrototypeOf(own);
  try {
    await gated._handle_comm_msg.call(own, { content: { data: { method: "" } } });
  } catch {
    const { _handle_comm_msg: take } = Object.getPrototypeOf(gated);
    own.comm.on_msg(take.bind(own));
    own.comm.send({ method: "request_state" }, own.callbacks());
  }
}

function render({ model, el }) {
  const root = make("div", { class: "goatviz-explorer" }, el);
  const closed = new AbortController();
  const stops = [() => closed.abort(), keepKeys(root)];
  if (model.get("control_specs").length) stops.push(renderControls({ model, el: root }));
  const pictures = make("div", { class: "goatviz-pictures" }, root);
  const summary = make("div", { class: "goatviz-summary", "aria-live": "polite" }, root);
  const plotly = loadLibrary(() => librarySource(model, closed.signal));
  for (const { name, kind, least, wide } of model.get("place_specs")) {
    const place = make("div", { class: "goatviz-place" }, pictures);
    place.style.flex = wide ? "1 1 100%" : `1 1 ${least}px`;
    place.style.minWidth = `min(${least}px, 100%)`;
    stops.push(PARTS[kind]({ model: scoped(model, name), el: place, plotly, host: model }));
  }
  const tell = () => {
    summary.textContent = model.get("summary");
  };
  stops.push(listen(model, [["summary", tell]]));
  tell();
  reconnect(model);
  return () => {
    for (const stop of stops) stop();
    root.remove();
  };
}

export default { render };
