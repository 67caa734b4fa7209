// Elements, colours and words that all parts share. Words from prompts are set as text, never as HTML.

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("--")) node.style.setProperty(name, value);
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

const byId = (id) => document.getElementById(id);
const percent = (value, digits = 0) => (value == null ? "–" : `${(100 * value).toFixed(digits)}%`);
const points = (value) => (value == null ? "–" : `${value > 0 ? "+" : value < 0 ? "−" : ""}${Math.abs(100 * value).toFixed(1)}`);
const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(3)}`;
const count = (number, word) => `${number.toLocaleString("en")} ${word}${number === 1 ? "" : "s"}`;

// rows of text, the first cell of each its name
function table(head, rows) {
  const heading = el("tr", {}, ...head.map((cell) => el("th", { scope: "col" }, cell)));
  const body = rows.map(([first, ...cells]) =>
    el("tr", {}, el("th", { scope: "row" }, first), ...cells.map((cell) => el("td", {}, cell))));
  return el("table", {}, el("thead", {}, heading), el("tbody", {}, ...body));
}

// a table of numbers.py, each value in words
function asTable(numbers, corner, words = percent) {
  return table([corner, ...numbers.columns], numbers.rows.map((row, r) => [row, ...numbers.values[r].map((x) => words(x, 1))]));
}

// --- colours ---

const dark = matchMedia("(prefers-color-scheme: dark)");
let printing = false;
const isDark = () => !printing && (document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
const ink = () => (isDark() ? "#e6e9ed" : "#1a2026");
const muted = () => (isDark() ? "#a0abb7" : "#57616c");
const lines = () => (isDark() ? "#343b43" : "#dbe0e6");

// from nothing to all, in one hue that any eye can order
const ramp = () => (isDark() ? ["#1f252c", "#2a7db5", "#d3ecfd"] : ["#f1f4f7", "#62a3cd", "#00305a"]);
const scale = (colours) => colours.map((colour, place) => [place / (colours.length - 1), colour]);
// from less to more, through nothing
const balance = () => (isDark() ? ["#56B4E9", "#1f252c", "#E69F00"] : ["#0072B2", "#f1f4f7", "#D55E00"]);

function shade(value) {
  const colours = ramp().map((colour) => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16)));
  const at = Math.min(value, 1) * (colours.length - 1);
  const low = Math.min(Math.floor(at), colours.length - 2);
  const rgb = colours[low].map((part, i) => Math.round(part + (at - low) * (colours[low + 1][i] - part)));
  const light = 0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2];
  return { background: `rgb(${rgb.join(" ")})`, color: light > 130 ? "#10161c" : "#ffffff" };
}

const swatch = (column) =>
  el("i", { class: "swatch", "data-pattern": data.looks[column].pattern, "--colour": data.looks[column].colour, "aria-hidden": "true" });

function drawLegends() {
  const keys = () => data.columns.map((name, column) => el("span", { class: "key" }, swatch(column), name));
  document.querySelectorAll(".legend").forEach((node) => node.replaceChildren(...keys()));
}
