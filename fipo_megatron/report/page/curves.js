// All charts and their common state: visible runs, range of steps, smoothing.
class Curves {
  constructor() {
    this.charts = data.charts.map((spec, i) => new Chart(spec, this, i));
    this.range = data.range;
    [state.from, state.to] = this.range;
    this.layOut();
    this.controls();
    if (data.runs.some((run) => run.alarms.length)) byId("alarm-key").hidden = false;
    let width = 0;
    new ResizeObserver(() => {
      const now = byId("charts").clientWidth;
      if (now !== width) { width = now; this.draw(); }
    }).observe(byId("charts"));
  }

  layOut() {
    const sections = [...new Set(data.charts.map((spec) => spec.section))];
    byId("charts").replaceChildren(...sections.flatMap((name) => [
      make("h3", { text: name }),
      this.grid(this.charts.filter((chart) => chart.spec.section === name)),
    ]));
    if (!this.charts.length) byId("charts").append(make("p", { class: "card", text: "There are no steps yet; nothing can be drawn." }));
  }

  grid(charts) {
    const pairs = charts.length === 2 || charts.length === 4;
    return make("div", { class: `grid-of-charts ${pairs ? "pairs" : ""}` }, ...charts.map((chart) => chart.figure));
  }

  controls() {
    byId("chips").replaceChildren(...(several ? data.runs.map((run, i) => make("button", {
      type: "button", class: `chip ${colour(i)}`, "aria-pressed": "true", title: run.path, onclick: (event) => this.toggle(i, event.currentTarget),
    }, make("span", { class: "dot" }), run.name)) : []));
    const span = this.range[1] - this.range[0] + 1;
    const windows = [1, 3, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000].filter((n) => n <= Math.max(20, span / 2));
    if (data.smooth > 1) windows.push(data.smooth);
    this.windows = [...new Set(windows)].sort((a, b) => a - b);
    const slider = byId("smooth");
    slider.max = this.windows.length - 1;
    slider.value = Math.max(0, this.windows.indexOf(data.smooth));
    slider.addEventListener("input", () => this.smooth());
    this.smooth(false);
    for (const id of ["from", "to"]) {
      byId(id).addEventListener("change", () => this.setRange(Number(byId("from").value), Number(byId("to").value)));
    }
    byId("all-steps").addEventListener("click", () => this.setRange(null, null));
    this.showRange();
  }

  smooth(draw = true) {
    state.smooth = this.windows[Number(byId("smooth").value)];
    const text = state.smooth > 1 ? `mean of ${state.smooth} steps` : "off";
    byId("smooth-value").textContent = text;
    byId("smooth").setAttribute("aria-valuetext", text);
    if (draw) this.draw();
  }

  toggle(run, button) {
    if (!state.hidden.delete(run)) state.hidden.add(run);
    button.setAttribute("aria-pressed", String(!state.hidden.has(run)));
    this.draw();
  }

  setRange(from, to) {
    if (from === null || !(to > from)) [state.from, state.to] = this.range;
    else [state.from, state.to] = [Math.max(from, this.range[0]), Math.min(to, this.range[1])];
    if (!(state.to > state.from)) [state.from, state.to] = this.range;
    this.showRange();
    hideTip();
    this.draw();
  }

  showRange() {
    byId("from").value = state.from;
    byId("to").value = state.to;
  }

  draw() {
    for (const chart of this.charts) {
      chart.figure.hidden = chart.spec.only !== null && state.hidden.has(chart.spec.only);
      if (!chart.figure.hidden) chart.draw();
    }
  }

  point(step) {
    for (const chart of this.charts) if (!chart.figure.hidden) chart.point(step);
  }
}
