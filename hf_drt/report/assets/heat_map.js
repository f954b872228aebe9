// Effective rank, layer by time, in colours that mean the same for all runs.

const rankValues = () =>
  shown().flatMap((index) => RUNS[index].ranks?.values.flat().filter((value) => value !== null) ?? []);

class HeatMap {
  constructor(index) {
    this.index = index;
    this.run = RUNS[index];
    this.plot = svg("svg", { class: "plot", role: "img" });
    this.element = html(
      "figure",
      { "data-heat": index },
      html(
        "figcaption",
        {},
        swatch(index),
        this.run.name,
        html("small", {}, this.run.ranks.prefix ? `layers of ${this.run.ranks.prefix}` : ""),
      ),
      this.plot,
    );
    this.plot.addEventListener("pointermove", (event) => this.hover(event));
    this.plot.addEventListener("pointerleave", hideTip);
  }

  draw() {
    this.element.hidden = !shown().includes(this.index);
    if (this.element.hidden) return;
    const { layers } = this.run.ranks,
      width = Math.max(220, Math.floor(this.element.clientWidth - 34));
    this.row = Math.max(3, Math.min(15, Math.floor(640 / layers.length)));
    this.left = Math.min(Math.round(width * 0.36), 14 + 6.4 * Math.max(...layers.map((name) => name.length)));
    this.right = width - 20;
    this.x = scale(0, lastX(), this.left, this.right, false);
    this.top = 20;
    this.bottom = this.top + this.row * layers.length;
    const height = this.bottom + 40;
    for (const [key, value] of Object.entries({ viewBox: `0 0 ${width} ${height}`, width, height }))
      this.plot.setAttribute(key, value);
    this.plot.setAttribute(
      "aria-label",
      `Effective rank of ${layers.length} layers of ${this.run.name} over ${UNIT[view.axis]}`,
    );
    this.line = svg("line", { class: "cross", y1: this.top, y2: this.bottom, visibility: "hidden" });
    this.plot.replaceChildren(
      ...this.phases(),
      this.image(),
      ...this.labels(),
      ...bottomAxis(this.x, this.left, this.right, this.bottom),
      this.line,
    );
  }

  phases() {
    const blocks = this.run.phases.flatMap((phase) => block(phase, this.x, 1, 17, "wash"));
    return [...blocks, ...phaseLabels(this.run, this.x, 14)];
  }

  cells() {
    const at = this.run.ranks[view.axis];
    return at.map((x, i) => [i ? at[i - 1] : 0, x, i]).filter(([start, end]) => start !== null && end !== null);
  }

  image() {
    const sharp = 2,
      canvas = document.createElement("canvas"),
      values = rankValues();
    const low = values.reduce((a, b) => Math.min(a, b)),
      high = values.reduce((a, b) => Math.max(a, b));
    canvas.width = Math.ceil((this.right - this.left) * sharp);
    canvas.height = (this.bottom - this.top) * sharp;
    const pen = canvas.getContext("2d");
    for (const [start, end, i] of this.cells()) {
      const from = Math.round((this.x(start) - this.left) * sharp),
        to = Math.round((this.x(end) - this.left) * sharp);
      this.run.ranks.values.forEach((row, layer) => {
        if (row[i] === null) return;
        pen.fillStyle = mix((row[i] - low) / (high - low || 1));
        pen.fillRect(from, layer * this.row * sharp, Math.max(1, to - from), this.row * sharp);
      });
    }
    return svg("image", {
      x: this.left,
      y: this.top,
      width: this.right - this.left,
      height: this.bottom - this.top,
      href: canvas.toDataURL(),
      preserveAspectRatio: "none",
    });
  }

  labels() {
    const { layers } = this.run.ranks,
      blockOf = (name) => name?.match(/\d+/)?.[0];
    const room = Math.floor((this.left - 10) / 6.2),
      found = [];
    let free = -1;
    layers.forEach((name, i) => {
      const y = this.top + this.row * i,
        starts = i && blockOf(name) !== blockOf(layers[i - 1]);
      if (starts) found.push(svg("line", { class: "block", x1: this.left, x2: this.right, y1: y, y2: y }));
      if (y < free || (this.row < 11 && i && !starts)) return;
      const label = name.length > room ? `…${name.slice(1 - room)}` : name;
      found.push(
        svg(
          "text",
          { x: this.left - 6, y: y + Math.max(this.row, 11) / 2 + 4, "text-anchor": "end" },
          label,
          svg("title", {}, name),
        ),
      );
      free = y + 11;
    });
    return found;
  }

  hover(event) {
    const box = this.plot.getBoundingClientRect(),
      zoom = this.plot.viewBox.baseVal.width / box.width;
    const px = (event.clientX - box.left) * zoom,
      layer = Math.floor(((event.clientY - box.top) * zoom - this.top) / this.row);
    const cell = this.cells().find(([start, end]) => px >= this.x(start) && px <= this.x(end));
    const { layers, prefix, values, steps } = this.run.ranks;
    if (!cell || !(layer in layers)) return hideTip();
    charts.forEach((chart) => chart.cross?.(cell[1]));
    showTip(
      [
        html("div", { class: "muted" }, prefix + layers[layer]),
        html("div", { class: "muted" }, `${UNIT[view.axis]}: ${text(cell[1])}${phaseAt(this.run, steps[cell[2]])}`),
        tipRow("effective rank", text(values[layer][cell[2]]), this.index),
      ],
      event.clientX,
      event.clientY,
    );
  }

  cross(at) {
    if (!this.line || this.element.hidden) return;
    this.line.setAttribute("visibility", at === null ? "hidden" : "visible");
    if (at !== null) ["x1", "x2"].forEach((end) => this.line.setAttribute(end, this.x(at)));
  }
}

class ColourBar {
  constructor() {
    this.element = html("div", { class: "legend", id: "colourbar" });
  }

  draw() {
    const values = rankValues();
    if (!values.length) return this.element.replaceChildren();
    const stops = VIRIDIS.map((stop, i) => svg("stop", { offset: i / (VIRIDIS.length - 1), "stop-color": stop }));
    const bar = svg(
      "svg",
      { width: 160, height: 12, "aria-hidden": "true" },
      svg("defs", {}, svg("linearGradient", { id: "viridis" }, ...stops)),
      rect(0, 0, 160, 12, "url(#viridis)"),
    );
    const [low, high] = [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
    this.element.replaceChildren("effective rank", html("b", {}, text(low)), bar, html("b", {}, text(high)));
  }
}
