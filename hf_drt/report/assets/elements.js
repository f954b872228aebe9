"use strict";
// Draws the report from the JSON beside it. Text from the runs reaches the page as text nodes only.

const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const view = { axis: "steps", log: false, hidden: new Set(), shade: RUNS.findIndex((run) => run.phases.length) };
const charts = [];
const UNIT = { steps: "update steps", seconds: "seconds of training" };
const VIRIDIS = [
  "#440154",
  "#482878",
  "#3e4a89",
  "#31688e",
  "#26828e",
  "#1f9e89",
  "#35b779",
  "#6ece58",
  "#b5de2b",
  "#fde725",
];

function make(namespace, name, attributes, children) {
  const element = document.createElementNS(namespace, name);
  for (const [key, value] of Object.entries(attributes ?? {})) {
    if (typeof value === "function") element.addEventListener(key, value);
    else if (value !== null && value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}
const html = (name, attributes, ...children) => make("http://www.w3.org/1999/xhtml", name, attributes, children);
const svg = (name, attributes, ...children) => make("http://www.w3.org/2000/svg", name, attributes, children);
const colour = (index) => `var(--run${index % 6})`;

function marker(index, x, y, size = 3.6) {
  const r = size,
    fill = `fill:${colour(index)}`;
  const path = [
    `M${x - r},${y}a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0`,
    `M${x - r},${y - r}h${2 * r}v${2 * r}h${-2 * r}z`,
    `M${x},${y - 1.25 * r}l${1.25 * r},${2.2 * r}h${-2.5 * r}z`,
    `M${x},${y - 1.35 * r}l${1.35 * r},${1.35 * r}l${-1.35 * r},${1.35 * r}l${-1.35 * r},${-1.35 * r}z`,
  ][index % 4];
  return svg("path", { class: "mark", d: path, style: fill });
}

function swatch(index) {
  const line = svg("line", { x1: 0, x2: 24, y1: 7, y2: 7, style: `stroke:${colour(index)}`, "stroke-width": 2 });
  return svg("svg", { class: "swatch", width: 24, height: 14, "aria-hidden": "true" }, line, marker(index, 12, 7));
}

function text(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(2).replace("e+", "e");
  if (Number.isInteger(value)) return value.toLocaleString("en-US");
  return Number(value.toPrecision(4)).toLocaleString("en-US", { maximumFractionDigits: 6 });
}

function tickText(value, step) {
  const size = Math.abs(value);
  if (value !== 0 && (size < 1e-3 || size >= 1e6))
    return Number(value.toPrecision(3)).toExponential().replace("e+", "e");
  const digits = Math.min(6, String(Number(step.toPrecision(3))).split(".")[1]?.length ?? 0);
  return value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

function ticks(low, high, count) {
  const raw = (high - low) / Math.max(1, count),
    power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= raw * 0.999);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++)
    found.push(Number((k * step).toPrecision(12)));
  return found.map((value) => [value, tickText(value, step)]);
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (const factor of [1, 2, 5]) {
      const value = factor * 10 ** power;
      if (value >= low && value <= high) found.push([value, tickText(value, value)]);
    }
  }
  const every = Math.ceil(found.length / 6);
  return found.length < 2 ? ticks(low, high, 4) : found.filter((_, index) => index % every === 0);
}

function scale(low, high, from, to, log) {
  const f = log ? Math.log : (value) => value;
  const factor = (to - from) / (f(high) - f(low) || 1);
  return (value) => from + (f(value) - f(low)) * factor;
}

function mix(share) {
  const place = Math.min(1, Math.max(0, share)) * (VIRIDIS.length - 1),
    index = Math.min(Math.floor(place), VIRIDIS.length - 2);
  const part = (hex, at) => parseInt(hex.slice(at, at + 2), 16);
  const channel = (at) =>
    Math.round(part(VIRIDIS[index], at) + (place - index) * (part(VIRIDIS[index + 1], at) - part(VIRIDIS[index], at)));
  return `rgb(${channel(1)},${channel(3)},${channel(5)})`;
}
