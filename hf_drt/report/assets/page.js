// The toolbar, and the page put together.

function redraw() {
  hideTip();
  charts.forEach((chart) => chart.draw());
}

function pressed(button, on) {
  button.setAttribute("aria-pressed", String(on));
}

function chip(run, index) {
  const name = run.name + (run.timed ? "" : " (no seconds)");
  const button = html(
    "button",
    { class: "chip", "aria-pressed": "true", title: "show or hide this run", "data-run": index },
    swatch(index),
    html("span", {}, name),
  );
  button.addEventListener("click", () => {
    view.hidden[view.hidden.has(index) ? "delete" : "add"](index);
    pressed(button, !view.hidden.has(index));
    redraw();
  });
  return button;
}

function axisButtons() {
  const buttons = Object.keys(UNIT).map((axis) => {
    const title = axis === "steps" ? "Steps" : "Seconds",
      off = axis === "seconds" && !RUNS.some((run) => run.timed);
    return html(
      "button",
      { "data-axis": axis, "aria-pressed": String(axis === view.axis), disabled: off, title: UNIT[axis] },
      title,
    );
  });
  buttons.forEach((button) =>
    button.addEventListener("click", () => {
      view.axis = button.dataset.axis;
      buttons.forEach((each) => pressed(each, each === button));
      redraw();
    }),
  );
  return html("div", { class: "segments controls", role: "group", "aria-label": "horizontal axis" }, ...buttons);
}

function logButton() {
  const button = html(
    "button",
    { class: "toggle controls", id: "log", "aria-pressed": "false", title: "of curves that are above zero" },
    "Log scale",
  );
  button.addEventListener("click", () => {
    view.log = !view.log;
    pressed(button, view.log);
    redraw();
  });
  return button;
}

function shadeSelect() {
  const candidates = RUNS.map((run, index) => [run, index]).filter(([run]) => run.phases.length);
  if (!candidates.length) return [];
  const options = [["none", -1], ...candidates.map(([run, index]) => [run.name, index])];
  const select = html(
    "select",
    { id: "shade" },
    ...options.map(([name, value]) => html("option", { value, selected: value === view.shade }, name)),
  );
  select.addEventListener("change", () => {
    view.shade = Number(select.value);
    redraw();
  });
  return [html("label", { class: "group controls" }, html("span", { class: "muted" }, "Phases of"), select)];
}

const HEADINGS = { loss: "training loss", drt_effective_rank_mean: "effective rank" };

function build() {
  document
    .getElementById("toolbar")
    .append(
      html("div", { class: "group", role: "group", "aria-label": "runs" }, ...RUNS.map(chip)),
      axisButtons(),
      logButton(),
      ...shadeSelect(),
    );
  for (const key of DATA.curves) charts.push(new LineChart(HEADINGS[key] ?? key.replaceAll("_", " "), [{ key }]));
  document.getElementById("charts").append(...charts.map((chart) => chart.element));
  const ranks = document.getElementById("rankcharts"),
    added = [];
  if (RUNS.some((run) => run.series.drt_effective_rank_mean)) {
    const lines = [
      { key: "drt_effective_rank_mean", suffix: ", mean" },
      { key: "drt_effective_rank_min", suffix: ", lowest", thin: true },
    ];
    added.push(new LineChart("effective rank of the target layers", lines, "mean, and dashed the lowest layer"));
  }
  const maps = RUNS.map((run, index) => [run, index])
    .filter(([run]) => run.ranks)
    .map(([, index]) => new HeatMap(index));
  if (maps.length) added.push(new ColourBar(), ...maps);
  ranks?.append(...added.map((chart) => chart.element));
  charts.push(...added);
  document.querySelectorAll("[data-swatch]").forEach((place) => place.prepend(swatch(Number(place.dataset.swatch))));
  document.body.append(
    tip,
    svg("svg", { width: 0, height: 0, style: "position:absolute", "aria-hidden": "true" }, svg("defs", {}, hatch())),
  );
  redraw();
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== width) {
      width = innerWidth;
      requestAnimationFrame(redraw);
    }
  });
}

build();
