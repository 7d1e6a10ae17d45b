// A chart: lines, bands or stacked areas over steps, in SVG.
const HEIGHT = 236;
const MARGIN = { left: 62, right: 14, top: 12, bottom: 26 };

function nearest(steps, step) {
  let low = 0, high = steps.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle; else high = middle;
  }
  return step - steps[low] <= steps[high] - step ? low : high;
}

function smoothedValues(steps, values, window) {
  if (window <= 1) return values;
  const result = new Array(values.length).fill(null);
  let begin = 0, end = 0, sum = 0, count = 0;
  for (let i = 0; i < values.length; i++) {
    while (end < steps.length && steps[end] <= steps[i] + window / 2) {
      if (values[end] !== null) { sum += values[end]; count++; }
      end++;
    }
    while (steps[begin] < steps[i] - window / 2) {
      if (values[begin] !== null) { sum -= values[begin]; count--; }
      begin++;
    }
    if (values[i] !== null && count) result[i] = sum / count;
  }
  return result;
}

function linearTicks(low, high, count) {
  const raw = (high - low) / count, unit = 10 ** Math.floor(Math.log10(raw));
  const width = [1, 2, 5, 10].map((factor) => factor * unit).reduce((a, b) => Math.abs(Math.log(b / raw)) < Math.abs(Math.log(a / raw)) ? b : a);
  const ticks = [];
  for (let i = Math.ceil(low / width - 1e-9); i * width <= high + width * 1e-9; i++) ticks.push(i * width || 0);
  return ticks;
}

function logTicks(low, high) {
  const decades = Math.log10(high / low);
  if (decades < 0.7) return linearTicks(low, high, 4).filter((tick) => tick > 0);
  const every = Math.ceil(decades / 5), factors = decades < 2.2 ? [1, 2, 5] : [1];
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    if (power % every === 0) ticks.push(...factors.map((factor) => factor * 10 ** power));
  }
  return ticks.filter((tick) => tick >= low && tick <= high);
}

class Chart {
  constructor(spec, owner, index) {
    this.spec = spec;
    this.owner = owner;
    this.clip = `clip-${index}`;
    this.byRun = several && spec.only === null;
    this.log = spec.log;
    this.step = null;
    this.series = spec.lines.map((line) => this.unpacked(line));
    this.bands = spec.bands.map((band) => ({
      ...band, run: band.run, edges: [band.low, band.high].map((edge) => ({ steps: data.steps[edge.s], values: edge.v })),
    }));
    this.build();
  }

  unpacked(line) {
    const index = this.byRun ? line.run : line.slot;
    const styled = this.byRun || this.bandsOf().length ? line.slot : 0;
    return { ...line, steps: data.steps[line.s], values: line.v, look: `${colour(index)} ${dash(styled)}` };
  }

  bandsOf() { return this.spec.bands; }

  build() {
    const { spec } = this;
    this.svg = svg("svg", { role: "img", tabindex: "0", class: "plot", "aria-label": spec.title });
    this.logButton = make("button", {
      type: "button", class: "plain small", "aria-pressed": String(this.log), text: "log",
      title: "Logarithmic scale", onclick: () => { this.log = !this.log; this.draw(); },
    });
    const explained = make("dl", {}, ...spec.explained.flatMap(([label, tag, text]) => [
      make("dt", { text: label }), make("dd", {}, text, " ", make("code", { text: tag }))]));
    this.figure = make("figure", { class: "chart card", id: `chart-${spec.key}` },
      make("figcaption", {}, make("h4", { text: spec.title }), spec.stacked ? "" : this.logButton),
      this.legend(), this.svg, make("details", {}, make("summary", { text: "What is shown" }), explained));
    this.svg.addEventListener("pointermove", (event) => this.moved(event));
    this.svg.addEventListener("pointerdown", (event) => { this.drag = event.offsetX; });
    this.svg.addEventListener("pointerup", (event) => this.released(event));
    this.svg.addEventListener("pointerleave", () => { this.drag = null; this.band?.remove(); this.owner.point(null); hideTip(); });
    this.svg.addEventListener("blur", () => { this.owner.point(null); hideTip(); });
    this.svg.addEventListener("dblclick", () => this.owner.setRange(null, null));
    this.svg.addEventListener("keydown", (event) => this.key(event));
  }

  legend() {
    const seen = new Map();
    for (const line of this.series) {
      if (!seen.has(line.label)) seen.set(line.label, this.byRun ? `grey ${dash(line.slot)}` : line.look);
    }
    const entries = [...seen].map(([label, look]) => make("span", { class: "entry" }, this.swatch(look), label));
    if (!this.byRun) {
      const labels = new Map(this.bands.map((band) => [band.label, band.level]));
      entries.push(...[...labels].map(([label, level]) =>
        make("span", { class: "entry" }, make("span", { class: `box c0 level${level}` }), label)));
    }
    return make("div", { class: "legend" }, ...(this.spec.legend ? entries : []));
  }

  swatch(look) {
    if (this.spec.stacked) return make("span", { class: `box solid ${look}` });
    return svg("svg", { class: "swatch", width: 22, height: 8, "aria-hidden": "true" },
      svg("line", { class: `line ${look}`, x1: 0, x2: 22, y1: 4, y2: 4 }));
  }

  seen(thing) { return !state.hidden.has(this.spec.only ?? thing.run); }

  window() { return this.spec.marks ? 1 : state.smooth; }

  draw() {
    const width = Math.max(260, this.figure.clientWidth - 24);
    this.width = width;
    this.lines = this.series.filter((line) => this.seen(line));
    for (const line of this.lines) line.shown = smoothedValues(line.steps, line.values, this.window());
    this.shownBands = this.bands.filter((band) => this.seen(band));
    for (const band of this.shownBands) {
      band.shown = band.edges.map((edge) => smoothedValues(edge.steps, edge.values, this.window()));
    }
    if (this.spec.stacked) this.stack();
    const [low, high] = this.domain();
    const span = Math.max(state.to - state.from, 1e-9);
    this.x = (step) => MARGIN.left + (step - state.from) / span * (width - MARGIN.left - MARGIN.right);
    this.inverse = (x) => state.from + (x - MARGIN.left) / (width - MARGIN.left - MARGIN.right) * span;
    // A logarithmic axis has no place for 0, such as a noise floor that is exact: it is drawn at the bottom.
    const scale = this.logarithmic ? (value) => Math.log(Math.max(value, low)) : (value) => value;
    const [bottom, top] = [scale(low), scale(high)];
    this.y = (value) => HEIGHT - MARGIN.bottom - (scale(value) - bottom) / (top - bottom) * (HEIGHT - MARGIN.top - MARGIN.bottom);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.svg.setAttribute("width", width);
    this.svg.setAttribute("height", HEIGHT);
    const inside = svg("g", { "clip-path": `url(#${this.clip})` });
    this.svg.replaceChildren(
      svg("clipPath", { id: this.clip }, svg("rect", {
        x: MARGIN.left, y: 0, width: width - MARGIN.left - MARGIN.right, height: HEIGHT - MARGIN.bottom + 1 })),
      this.axes(low, high), inside, this.alarms());
    this.curves(inside);
    this.cursor = svg("g", { class: "cursor" });
    this.svg.append(this.cursor);
    this.logButton.setAttribute("aria-pressed", String(this.log));
    this.svg.setAttribute("aria-label", this.described());
  }

  described() {
    const ends = this.lines.slice(0, 8).map((line) => {
      const last = line.values.length - 1;
      return `${this.labelOf(line)} ends at ${number(line.values[last], this.spec.percent)}`;
    });
    return `${this.spec.title}. ${ends.join(", ")}. Arrow keys show the values of each step.`;
  }

  labelOf(line) {
    return this.byRun ? `${data.runs[line.run].name}, ${line.label}` : line.label;
  }

  stack() {
    let below = null;
    for (const line of this.lines) {
      line.base = below ?? line.shown.map(() => 0);
      line.top = line.shown.map((value, i) => line.base[i] + (value ?? 0));
      below = line.top;
    }
  }

  domain() {
    let low = Infinity, high = -Infinity, least = Infinity;
    const look = (steps, values) => values.forEach((value, i) => {
      if (value === null || steps[i] < state.from || steps[i] > state.to) return;
      low = Math.min(low, value);
      high = Math.max(high, value);
      if (value > 0) least = Math.min(least, value);
    });
    for (const line of this.lines) {
      look(line.steps, this.spec.stacked ? line.top : line.shown);
      if (this.spec.stacked) continue;
      for (const values of [line.low ?? line.values, line.high ?? line.values]) {
        look(...(this.window() > 1 ? this.withoutExtremes(line.steps, values) : [line.steps, values]));
      }
    }
    for (const band of this.shownBands) band.edges.forEach((edge, i) => look(edge.steps, band.shown[i]));
    this.logarithmic = this.log && !this.spec.stacked && least < Infinity;
    if (low > high) return [0, 1];
    if (this.logarithmic) {
      const bottom = low > 0 ? low : least;
      const room = Math.max(1.02, (high / bottom) ** 0.06);
      return [bottom / room, high * room];
    }
    if (this.spec.stacked) return [0, high * 1.05 || 1];
    if (low === 0 && high === 0) return [0, this.spec.percent ? 0.01 : 1];
    if (high - low < 1e-12 * Math.max(1, Math.abs(high))) return [low - (Math.abs(low) * 0.1 || 1), high + (Math.abs(high) * 0.1 || 1)];
    const room = 0.06 * (high - low);
    const bottom = low >= 0 && low < 0.35 * high ? 0 : low - room;
    return [bottom, high + room];
  }

  // Range of the unsmoothed values behind the smoothed line: a spike must not flatten the rest.
  withoutExtremes(steps, values) {
    const there = values.map((value, i) => [steps[i], value])
      .filter(([step, value]) => value !== null && step >= state.from && step <= state.to).sort((a, b) => a[1] - b[1]);
    const cut = Math.ceil(0.03 * there.length), kept = there.slice(cut, there.length - cut);
    return [kept.map(([step]) => step), kept.map(([, value]) => value)];
  }

  axes(low, high) {
    const group = svg("g", { class: "axes", "aria-hidden": "true" });
    const right = this.width - MARGIN.right, floor = HEIGHT - MARGIN.bottom;
    for (const tick of this.logarithmic ? logTicks(low, high) : linearTicks(low, high, 5)) {
      group.append(
        svg("line", { x1: MARGIN.left, x2: right, y1: this.y(tick), y2: this.y(tick), class: "grid" }),
        svg("text", { x: MARGIN.left - 7, y: this.y(tick) + 3.5, "text-anchor": "end", text: number(tick, this.spec.percent) }));
    }
    for (const tick of linearTicks(state.from, state.to, Math.max(3, this.width / 90)).filter(Number.isInteger)) {
      group.append(
        svg("line", { x1: this.x(tick), x2: this.x(tick), y1: floor, y2: floor + 4, class: "tick" }),
        svg("text", { x: this.x(tick), y: floor + 17, "text-anchor": "middle", text: tick.toLocaleString("en") }));
    }
    group.append(svg("line", { x1: MARGIN.left, x2: right, y1: floor, y2: floor, class: "tick" }));
    return group;
  }

  path(steps, values) {
    const parts = [];
    let open = false;
    for (let i = 0; i < steps.length; i++) {
      if (steps[Math.min(i + 1, steps.length - 1)] < state.from || steps[Math.max(i - 1, 0)] > state.to) continue;
      const y = values[i] === null ? null : this.y(values[i]);
      if (y === null) { open = false; continue; }
      parts.push(`${open ? "L" : "M"}${this.x(steps[i]).toFixed(1)},${y.toFixed(1)}`);
      open = true;
    }
    return parts;
  }

  area(low, high) {
    const upper = this.path(...high).join("").replaceAll("M", "L");
    const lower = this.path(...low).reverse().join("").replaceAll("M", "L");
    return upper ? `M${upper.slice(1)}${lower}Z` : "";
  }

  curves(group) {
    for (const band of this.shownBands) {
      const [low, high] = band.edges.map((edge, i) => [edge.steps, band.shown[i]]);
      const index = this.byRun ? band.run : 0;
      group.append(svg("path", { class: `band ${colour(index)} level${band.level}`, d: this.area(low, high) }));
    }
    for (const line of this.lines) {
      if (this.spec.stacked) {
        group.append(svg("path", { class: `stack ${line.look}`, d: this.area([line.steps, line.base], [line.steps, line.top]) }));
        continue;
      }
      if (line.low) {
        group.append(svg("path", { class: `band extremes ${line.look.split(" ")[0]}`, d: this.area([line.steps, line.low], [line.steps, line.high]) }));
      }
      if (this.window() > 1) group.append(svg("path", { class: `line raw ${line.look}`, d: this.path(line.steps, line.values).join("") }));
      group.append(svg("path", { class: `line ${line.look}`, d: this.path(line.steps, line.shown).join("") }));
      if (this.spec.marks || line.steps.length < 3) {
        line.steps.forEach((step, i) => {
          if (line.shown[i] !== null) group.append(svg("circle", { class: `mark ${line.look}`, cx: this.x(step), cy: this.y(line.shown[i]), r: 2.8 }));
        });
      }
    }
  }

  shownAlarms() {
    const all = data.runs.flatMap((run, i) => run.alarms.map((alarm) => ({ ...alarm, run: i })));
    const mine = all.filter((alarm) => this.spec.only === null ? !state.hidden.has(alarm.run) : alarm.run === this.spec.only);
    return mine.filter((alarm) => alarm.step >= state.from && alarm.step <= state.to);
  }

  alarms() {
    const group = svg("g", { class: "alarms" });
    for (const alarm of this.shownAlarms()) {
      const x = this.x(alarm.step), look = several ? colour(alarm.run) : "warning";
      group.append(
        svg("line", { class: `alarm ${look}`, x1: x, x2: x, y1: MARGIN.top - 6, y2: HEIGHT - MARGIN.bottom }),
        svg("path", { class: `flag ${look}`, d: `M${x},${MARGIN.top - 10}l9,4l-9,4Z` }));
    }
    return group;
  }

  // The cursor, which all charts share, and the values of its step.

  moved(event) {
    if (this.drag != null && Math.abs(event.offsetX - this.drag) > 4) this.stretch(event.offsetX);
    const step = this.snapped(this.inverse(event.offsetX));
    this.owner.point(step);
    if (step !== null) this.tell(step, event.clientX, event.clientY);
  }

  snapped(step) {
    let best = null;
    for (const line of this.lines) {
      const found = line.steps[nearest(line.steps, step)];
      if (found < state.from || found > state.to) continue;
      if (best === null || Math.abs(found - step) < Math.abs(best - step)) best = found;
    }
    return best;
  }

  point(step) {
    this.step = step;
    this.cursor.replaceChildren();
    if (step === null || step < state.from || step > state.to) return;
    this.cursor.append(svg("line", { x1: this.x(step), x2: this.x(step), y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom }));
  }

  tell(step, x, y) {
    const rows = [];
    for (const line of this.spec.stacked ? [...this.lines].reverse() : this.lines) {
      const i = nearest(line.steps, step);
      const near = i > 0 ? line.steps[i] - line.steps[i - 1] : (line.steps[1] ?? 0) - line.steps[0];
      const off = Math.abs(line.steps[i] - step);
      if (off > 0 && off > near) continue;
      const beside = line.steps[i] === step ? "" : ` (step ${line.steps[i]})`;
      const ends = line.low ? ` (${number(line.low[i], this.spec.percent)} to ${number(line.high[i], this.spec.percent)})` : "";
      const value = number(line.values[i], this.spec.percent) + ends + beside;
      const mean = this.window() > 1 ? number(line.shown[i], this.spec.percent) : null;
      rows.push(make("tr", {}, make("td", {}, this.swatch(line.look)), make("td", { text: this.labelOf(line) }),
        make("td", { class: "value", text: value }), make("td", { class: "value quiet", text: mean ? `mean ${mean}` : "" })));
      if (line.steps[i] === step) this.dot(line, i);
    }
    for (const band of this.shownBands) {
      const ends = band.edges.map((edge) => number(edge.values[nearest(edge.steps, step)], this.spec.percent));
      const label = this.byRun ? `${data.runs[band.run].name}, ${band.label}` : band.label;
      const look = this.byRun ? colour(band.run) : "c0";
      rows.push(make("tr", {}, make("td", {}, make("span", { class: `box ${look} level${band.level}` })),
        make("td", { text: label }), make("td", { class: "value", text: ends.join(" to ") }), make("td")));
    }
    if (this.spec.stacked && this.lines.length) {
      const last = this.lines[this.lines.length - 1];
      rows.push(make("tr", {}, make("td"), make("td", { text: "together" }),
        make("td", { class: "value", text: number(last.top[nearest(last.steps, step)]) }), make("td")));
    }
    const alarms = this.shownAlarms().filter((alarm) => Math.abs(this.x(alarm.step) - this.x(step)) < 8);
    const told = alarms.map((alarm) => make("p", { class: "alarm-text", text:
      `Alarm${several ? ` of ${data.runs[alarm.run].name}` : ""} at step ${alarm.step} (${alarm.action}): ${alarm.reason}` }));
    byId("tip").replaceChildren(make("strong", { text: `step ${step.toLocaleString("en")}` }), make("table", {}, ...rows), ...told);
    placeTip(byId("tip"), x, y);
  }

  dot(line, i) {
    const value = this.spec.stacked ? line.top[i] : line.shown[i];
    if (value === null) return;
    this.cursor.append(svg("circle", { class: `mark ${line.look}`, cx: this.x(line.steps[i]), cy: this.y(value), r: 3.5 }));
  }

  stretch(x) {
    this.band?.remove();
    this.band = svg("rect", { class: "stretch", x: Math.min(x, this.drag), width: Math.abs(x - this.drag), y: MARGIN.top,
      height: HEIGHT - MARGIN.top - MARGIN.bottom });
    this.svg.append(this.band);
  }

  released(event) {
    const begin = this.drag;
    this.drag = null;
    this.band?.remove();
    if (begin == null || Math.abs(event.offsetX - begin) <= 4) return;
    const ends = [begin, event.offsetX].map(this.inverse).sort((a, b) => a - b);
    this.owner.setRange(Math.round(ends[0]), Math.round(ends[1]));
  }

  key(event) {
    if (event.key === "Escape") { this.owner.setRange(null, null); return; }
    const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!way || !this.lines.length) return;
    event.preventDefault();
    const steps = this.lines[0].steps;
    const at = this.step === null ? nearest(steps, way > 0 ? state.from : state.to) : nearest(steps, this.step) + way;
    const step = steps[Math.min(Math.max(at, 0), steps.length - 1)];
    if (step < state.from || step > state.to) return;
    this.owner.point(step);
    const box = this.svg.getBoundingClientRect();
    this.tell(step, box.left + this.x(step), box.top + HEIGHT / 2);
  }
}
