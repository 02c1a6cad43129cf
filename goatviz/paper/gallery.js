// The page's buttons, and what a print needs. Everything is made here, from what is drawn.
"use strict";

const save = (name, type, text) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type}));
  link.download = name;
  link.click();
  URL.revokeObjectURL(link.href);
};

const graphOf = button => document.getElementById(`figure-${button.dataset.slug}`);

const quoted = value => /[",\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value;
const cell = value => value === null || value === undefined || Number.isNaN(value)
  ? "" : quoted(String(value));

// Edges of cells become their middles.
const places = (values, count) => !values ? [...Array(count).keys()]
  : values.length === count + 1
    ? [...values].slice(1).map((value, at) => (value + values[at]) / 2) : [...values];

// The traces that are seen, one row for each point or cell of a map.
const rowsOf = graph => graph._fullData.filter(trace => trace.visible === true).flatMap(trace => {
  const name = trace.name ?? "";
  if (trace.z) {
    const xs = places(trace.x, trace.z[0]?.length ?? 0), ys = places(trace.y, trace.z.length);
    return [...trace.z].flatMap((row, i) =>
      [...row].map((value, j) => [name, xs[j], ys[i], value, "", ""]));
  }
  const errors = trace.error_y?.visible ? trace.error_y : trace.error_x;
  return [...(trace.y ?? [])].map((value, at) => [
    name, trace.x?.[at], value, "", errors?.arrayminus?.[at], errors?.array?.[at]]);
});

const csvOf = graph => [["trace", "x", "y", "z", "below", "above"], ...rowsOf(graph)]
  .map(row => row.map(cell).join(",")).join("\n") + "\n";

// As it is drawn now, on white and without menus.
const svgOf = async graph => {
  const {width, height} = graph._fullLayout;
  const layout = {...graph.layout, updatemenus: [], paper_bgcolor: "#ffffff", width, height};
  const address = await Plotly.toImage({data: graph.data, layout}, {format: "svg", width, height});
  return decodeURIComponent(address.slice(address.indexOf(",") + 1));
};

const textOf = table => [...table.rows]
  .map(row => [...row.cells].map(one => one.textContent.trim()).join("\t")).join("\n");

const copy = async (button, text) => {
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    // A page from a file may not write to the clipboard: the table is selected instead.
    getSelection().selectAllChildren(document.getElementById(button.dataset.table));
    button.textContent = "Selected: press Ctrl+C";
  }
  setTimeout(() => { button.textContent = label; }, 2500);
};

const actions = {
  svg: async button => save(`${button.dataset.slug}.svg`, "image/svg+xml",
    await svgOf(graphOf(button))),
  csv: button => save(`${button.dataset.slug}.csv`, "text/csv", csvOf(graphOf(button))),
  copy: button => copy(button, textOf(document.getElementById(button.dataset.table))),
};

document.addEventListener("click", event => {
  const button = event.target.closest("button[data-action]");
  if (button) actions[button.dataset.action](button);
});

// Figures are as wide as the paper while it is printed, where they are drawn at 3/4.
const PAPER = 906;
const graphs = () => document.querySelectorAll(".js-plotly-plot");
addEventListener("beforeprint", () => graphs().forEach(graph =>
  Plotly.relayout(graph, {autosize: false, width: PAPER})));
addEventListener("afterprint", () => graphs().forEach(graph =>
  Plotly.relayout(graph, {autosize: true, width: null})));
