// What every plot has: which runs and points are shown, phases, axes, and what hovering tells.

const shown = () =>
  RUNS.map((_, index) => index).filter((i) => !view.hidden.has(i) && (view.axis === "steps" || RUNS[i].timed));

function points(index, key) {
  const series = RUNS[index].series[key];
  if (!series) return [];
  return series[view.axis].map((x, i) => [x, series.values[i], i]).filter(([x, y]) => x !== null && y !== null);
}

function lastX() {
  const ends = shown().map((index) => RUNS[index].end[view.axis]);
  return Math.max(...ends.filter((end) => end !== null), 1e-9);
}

// An adapter is hatched, so that the forms differ in more than colour.
function hatch() {
  const line = svg("line", { x1: 0, y1: 0, x2: 0, y2: 7, style: "stroke:var(--adapter)", "stroke-width": 2.5 });
  return svg(
    "pattern",
    { id: "hatch", width: 7, height: 7, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
    line,
  );
}

const rect = (x, y, width, height, fill, more) =>
  svg("rect", { x, y, width: Math.max(0, width), height, style: `fill:${fill}`, ...more });

function block(phase, x, top, height, look) {
  const [start, end] = phase[view.axis];
  if (start === null || end === null) return [];
  const kind = phase.kind ?? "unknown",
    left = x(start),
    width = x(end) - left;
  const found = [rect(left, top, width, height, `var(--${kind})`, { class: look, "data-kind": kind })];
  if (kind === "adapter") found.push(rect(left, top, width, height, "url(#hatch)", { class: "hatch" }));
  return found;
}

function phaseLabels(run, x, y) {
  const found = [];
  for (const phase of run.phases) {
    const [start, end] = phase[view.axis];
    if (start === null || end === null) continue;
    const width = x(end) - x(start);
    const label = [phase.label, phase.label.slice(0, 4) + ".", phase.label[0]].find(
      (word) => word.length * 6 + 6 <= width,
    );
    if (label)
      found.push(
        svg(
          "text",
          { class: "phase", x: (x(start) + x(end)) / 2, y, "text-anchor": "middle" },
          label,
          svg("title", {}, phase.label),
        ),
      );
  }
  return found;
}

function shading(x, top, height) {
  const run = RUNS[view.shade];
  if (!run || !shown().includes(view.shade)) return [];
  const edges = run.phases
    .slice(1)
    .map((phase) => phase[view.axis][0])
    .filter((at) => at !== null);
  return [
    ...run.phases.flatMap((phase) => block(phase, x, top, height, "wash")),
    ...edges.map((at) => svg("line", { class: "edge", x1: x(at), x2: x(at), y1: top, y2: top + height })),
    ...phaseLabels(run, x, top + 13),
  ];
}

const striped = () => {
  const runs = shown().filter((index) => RUNS[index].phases.length);
  return runs.length > 1 ? runs : [];
};

function strips(x) {
  return striped().flatMap((index, row) => [
    marker(index, x(0) - 9, 5 + 11 * row, 3.2),
    ...RUNS[index].phases.flatMap((phase) => block(phase, x, 1 + 11 * row, 8, "strip")),
    svg("path", {
      d: `M${x(0)},${1 + 11 * row}h${Math.max(0, x(RUNS[index].end[view.axis] ?? 0) - x(0))}v8H${x(0)}z`,
      style: `fill:none;stroke:${colour(index)}`,
      "stroke-width": 0.8,
    }),
  ]);
}

function bottomAxis(x, left, right, y) {
  const marks = ticks(0, lastX(), (right - left) / 62).map(([value, label]) => {
    const beyond = x(value) + 3.5 * label.length > right + 18; // of the picture's edge
    return svg(
      "text",
      { x: beyond ? right + 18 : x(value), y: y + 16, "text-anchor": beyond ? "end" : "middle" },
      label,
    );
  });
  return [
    svg("line", { class: "axis", x1: left, x2: right, y1: y, y2: y }),
    ...marks,
    svg("text", { x: (left + right) / 2, y: y + 32, "text-anchor": "middle", class: "unit" }, UNIT[view.axis]),
  ];
}

const tip = html("div", { id: "tip", hidden: true, role: "status" });

function showTip(rows, clientX, clientY) {
  tip.replaceChildren(...rows);
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = clientX + 16 + box.width > innerWidth ? clientX - 16 - box.width : clientX + 16;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${Math.min(Math.max(8, clientY - box.height / 2), innerHeight - box.height - 8)}px`;
}

function hideTip() {
  tip.hidden = true;
  charts.forEach((chart) => chart.cross?.(null));
}

const tipRow = (name, value, index) =>
  html(
    "div",
    {},
    ...(index === undefined ? [] : [swatch(index)]),
    html("span", { class: "name" }, name),
    html("b", {}, value),
  );

function phaseAt(run, step) {
  const phase = run.phases.find((each) => step > each.steps[0] && step <= each.steps[1]) ?? run.phases[0];
  return phase ? ` (${phase.label})` : "";
}
