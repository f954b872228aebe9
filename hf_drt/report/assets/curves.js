// Curves of all runs shown, over steps or seconds.

class LineChart {
  constructor(title, lines, note) {
    this.lines = lines;
    this.title = title;
    this.plot = svg("svg", { class: "plot", role: "img", tabindex: 0 });
    this.element = html(
      "figure",
      { "data-chart": lines[0].key },
      html("figcaption", {}, title, ...(note ? [html("small", {}, note)] : [])),
      this.plot,
    );
    this.plot.addEventListener("pointermove", (event) => this.hover(event));
    this.plot.addEventListener("pointerleave", hideTip);
    this.plot.addEventListener("blur", hideTip);
    this.plot.addEventListener("keydown", (event) => this.walk(event));
  }

  curves() {
    return shown()
      .flatMap((index) => this.lines.map((line) => ({ index, ...line, points: points(index, line.key) })))
      .filter((curve) => curve.points.length);
  }

  draw() {
    const curves = (this.drawn = this.curves());
    const width = Math.max(220, Math.floor(this.element.clientWidth - 34)),
      height = 250;
    this.plot.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.plot.setAttribute("width", width);
    this.plot.setAttribute("height", height);
    this.plot.setAttribute("aria-label", `${this.title} over ${UNIT[view.axis]}; arrow keys read the values`);
    const values = curves.flatMap((curve) => curve.points.map((point) => point[1]));
    if (values.length) return this.fill(curves, values, width - 20, height - 40);
    const place = { class: "empty", x: width / 2, y: height / 2, "text-anchor": "middle" };
    this.plot.replaceChildren(svg("text", place, "none of the runs shown has it"));
  }

  fill(curves, values, right, bottom) {
    const log = view.log && Math.min(...values) > 0;
    const [low, high] = this.range(values, log);
    const labels = log ? logTicks(low, high) : ticks(low, high, 5);
    const left = Math.max(48, 16 + 6.7 * Math.max(...labels.map(([, label]) => label.length)));
    const top = 4 + 11 * striped().length;
    this.x = scale(0, lastX(), left, right, false);
    this.y = scale(low, high, bottom, top + 22, log);
    this.line = svg("line", { class: "cross", y1: top, y2: bottom, visibility: "hidden" });
    this.dots = svg("g", {});
    this.plot.replaceChildren(
      ...strips(this.x),
      ...shading(this.x, top, bottom - top),
      ...this.leftAxis(labels, left, right),
      ...bottomAxis(this.x, left, right, bottom),
      ...curves.map((curve) => this.path(curve)),
      ...curves.filter((curve) => !curve.thin).flatMap((curve) => this.marks(curve)),
      this.line,
      this.dots,
    );
  }

  range(values, log) {
    let low = values.reduce((a, b) => Math.min(a, b)),
      high = values.reduce((a, b) => Math.max(a, b));
    if (log) return low === high ? [low / 2, high * 2] : [low / (high / low) ** 0.03, high * (high / low) ** 0.03];
    if (low === high) [low, high] = [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
    const pad = (high - low) * 0.04;
    return [low >= 0 && low < 0.35 * high ? 0 : low - pad, high + pad];
  }

  leftAxis(marks, left, right) {
    return marks.flatMap(([value, label]) => [
      svg("line", { class: "grid", x1: left, x2: right, y1: this.y(value), y2: this.y(value) }),
      svg("text", { x: left - 8, y: this.y(value) + 4, "text-anchor": "end" }, label),
    ]);
  }

  path(curve) {
    const d = curve.points
      .map(([x, y], i) => `${i ? "L" : "M"}${this.x(x).toFixed(1)},${this.y(y).toFixed(1)}`)
      .join("");
    return svg("path", {
      class: curve.thin ? "line thin" : "line",
      d,
      style: `stroke:${colour(curve.index)}`,
      "data-run": curve.index,
    });
  }

  marks(curve) {
    const count = curve.points.length,
      gap = Math.max(1, Math.round(count / 9)),
      first = Math.floor((gap * (curve.index % 4)) / 4);
    return curve.points
      .filter((_, i) => count <= 20 || i % gap === first)
      .map(([x, y]) => marker(curve.index, this.x(x), this.y(y)));
  }

  hover(event) {
    if (!this.drawn?.length) return;
    const box = this.plot.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * this.plot.viewBox.baseVal.width;
    const all = this.drawn.flatMap((curve) => curve.points.map((point) => point[0]));
    const nearest = all.reduce(
      (best, x) => (Math.abs(this.x(x) - at) < Math.abs(this.x(best) - at) ? x : best),
      all[0],
    );
    this.read(nearest, event.clientX, event.clientY);
  }

  read(at, clientX, clientY) {
    const near = this.drawn
      .map((curve) => ({
        ...curve,
        point: curve.points.reduce((best, point) => (Math.abs(point[0] - at) < Math.abs(best[0] - at) ? point : best)),
      }))
      .filter((curve) => Math.abs(this.x(curve.point[0]) - this.x(at)) < 24);
    charts.forEach((chart) => chart.cross?.(at));
    this.dots.replaceChildren(
      ...near.map((curve) => marker(curve.index, this.x(curve.point[0]), this.y(curve.point[1]), 5)),
    );
    showTip(
      [
        html("div", { class: "muted" }, `${this.title}, ${UNIT[view.axis]}: ${text(at)}`),
        ...near.map((curve) => {
          const run = RUNS[curve.index],
            step = run.series[curve.key].steps[curve.point[2]];
          return tipRow(run.name + (curve.suffix ?? "") + phaseAt(run, step), text(curve.point[1]), curve.index);
        }),
      ],
      clientX,
      clientY,
    );
    this.at = at;
  }

  walk(event) {
    const direction = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!direction || !this.drawn?.length) return;
    event.preventDefault();
    const all = [...new Set(this.drawn.flatMap((curve) => curve.points.map((point) => point[0])))].sort(
      (a, b) => a - b,
    );
    const place = all.findIndex((x) => x >= (this.at ?? -1));
    const at =
      all[
        Math.min(
          all.length - 1,
          Math.max(0, (place < 0 ? all.length - 1 : place) + (this.at === undefined ? 0 : direction)),
        )
      ];
    const box = this.plot.getBoundingClientRect();
    this.read(at, box.left + (this.x(at) / this.plot.viewBox.baseVal.width) * box.width, box.top + box.height / 2);
  }

  cross(at) {
    if (!this.line) return;
    this.dots.replaceChildren();
    this.line.setAttribute("visibility", at === null ? "hidden" : "visible");
    if (at === null) {
      this.at = undefined;
      return;
    }
    this.line.setAttribute("x1", this.x(at));
    this.line.setAttribute("x2", this.x(at));
  }
}
