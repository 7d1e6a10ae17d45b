// The curves and the tables of a comparison by swapped tokens.
const WIDTH = 560, HEIGHT = 300, LEFT = 46, RIGHT = 12, TOP = 22, BOTTOM = 36;
const { result } = data, KEY = "share_at_90%";
const WHAT = { selected: "selected tokens", changed: "changed tokens" };
const directions = [...new Set(result.curves.map((curve) => curve.direction))];
const selectors = data.runs.map((run) => run.name);
const named = (direction) => direction === "base_to_rl" ? "base draws, RL replaces" : "RL draws, base replaces";
const percent = (value) => number(value, true);
function interval(row) {
  return row.low === null ? percent(row.accuracy) : `${percent(row.accuracy)} (${percent(row.low)} to ${percent(row.high)})`;
}

function chart(direction, what) {
  const curves = result.curves.filter((curve) => curve.direction === direction), alone = Object.entries(result.alone);
  const title = `${named(direction)}: accuracy over ${WHAT[what]}`, [figure, drawing] = smallChart(title, WIDTH, HEIGHT, title);
  const shares = curves.flatMap((curve) => curve.points.map((row) => row[what])).filter((share) => share > 0);
  const least = Math.max(1e-4, Math.min(0.01, ...shares)), most = Math.max(0.1, ...shares) * 1.1;
  const x = (share) => LEFT + Math.log(Math.max(share, least) / least) / Math.log(most / least) * (WIDTH - LEFT - RIGHT);
  const rows = [...curves.flatMap((curve) => curve.points), ...alone.map(([, row]) => row)];
  const low = Math.min(...rows.map((row) => row.low ?? row.accuracy)), high = Math.max(...rows.map((row) => row.high ?? row.accuracy), low + 0.01);
  const y = (value) => TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM);
  for (const value of roundTicks(low, high)) {
    drawing.append(svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }), caption(LEFT - 5, y(value) + 4, percent(value), "end"));
  }
  for (const tick of [1e-4, 1e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1]) {
    if (tick >= least && tick <= most) drawing.append(svg("line", { class: "grid", x1: x(tick), x2: x(tick), y1: TOP, y2: HEIGHT - BOTTOM }), caption(x(tick), HEIGHT - BOTTOM + 14, percent(tick)));
  }
  drawing.append(caption((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, `share of ${WHAT[what]}`));
  const [first, second] = direction === "base_to_rl" ? ["base", "rl"] : ["rl", "base"];
  const level = result.alone[first].accuracy + 0.9 * (result.alone[second].accuracy - result.alone[first].accuracy);
  const levels = [...alone.map(([role, row]) => [role === "rl" ? "RL alone" : "base alone", row.accuracy, "6 3"]), ["90 % of the gap", level, "2 3"]];
  for (const [, value, dashes] of levels) drawing.append(svg("line", { class: "line grey", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value), "stroke-dasharray": dashes }));
  for (const curve of curves) drawing.append(...line(curve, what, x, y));
  for (const [name, value] of levels) drawing.append(caption(LEFT + 6, y(value) + (value === level && second === "rl" ? 13 : -4), name, "start", "level"));
  return figure;
}

function line(curve, what, x, y) {
  const look = colour(selectors.indexOf(curve.selector)), rows = [...curve.points].sort((a, b) => a[what] - b[what]);
  const drawn = [svg("path", { class: `line ${look}`, d: `M${rows.map((row) => `${x(row[what]).toFixed(1)},${y(row.accuracy).toFixed(1)}`).join("L")}` })];
  for (const row of rows) {
    const at = x(row[what]);
    if (row.low !== null) drawn.push(svg("line", { class: `line ${look}`, x1: at, x2: at, y1: y(row.low), y2: y(row.high), opacity: 0.5 }));
    const mark = svg("circle", { class: `mark ${look}`, cx: at, cy: y(row.accuracy), r: 4 });
    mark.append(svg("title", { text: `${curve.selector}, threshold ${number(row.threshold)}: ${percent(row.selected)} selected, ${percent(row.changed)} changed, accuracy ${interval(row)}` }));
    drawn.push(mark);
  }
  return drawn;
}

function reached(curve, what) {
  const largest = Math.max(...curve.points.map((row) => row[what]));
  const [value, low, high] = ["value", "low", "high"].map((name) => curve[KEY][what][name] === null ? `> ${percent(largest)}` : percent(curve[KEY][what][name]));
  return make("td", { text: curve[KEY][what].value === null ? value : `${value} (${low} to ${high})` });
}

// The shares of the selectors of a direction, the smallest first.
function inOrder(direction) {
  const curves = result.curves.filter((curve) => curve.direction === direction), share = (curve) => curve[KEY].selected.value;
  const found = curves.filter((curve) => share(curve) !== null).sort((a, b) => share(a) - share(b));
  const rest = curves.filter((curve) => share(curve) === null);
  const texts = [...found.map((curve) => `${percent(share(curve))} by ${curve.selector}`), ...rest.map((curve) => `not reached by ${curve.selector}`)];
  return `Selected tokens that recover 90 % of the gap, if ${named(direction).replace(",", " and")}: ${texts.join(", ")}.`;
}

function summary() {
  const { alone, curves } = result, cell = (text) => make("td", { class: "value", text });
  byId("verdict").replaceChildren(
    make("p", { class: "first", text: `Accuracy of base alone ${percent(alone.base.accuracy)}, of RL alone ${percent(alone.rl.accuracy)}.` }),
    ...directions.map((direction) => make("p", { text: inOrder(direction) })),
    make("p", { class: "quiet", text: `base ${result.base} · RL ${result.rl} · temperature ${result.temperature} · seeds ${result.seeds.join(", ")} · ${alone.base.responses} responses per point` }));
  table(byId("recovered"), ["Direction", "Selector", "Selected tokens", "Changed tokens"], curves.map((curve) =>
    make("tr", {}, cell(named(curve.direction)), make("th", { scope: "row", text: curve.selector }), reached(curve, "selected"), reached(curve, "changed"))));
  table(byId("table"), ["Direction", "Selector", "Target", "Threshold", "Selected", "Changed", "Accuracy", "Recovered", "By seed"], curves.flatMap((curve) => curve.points.map((row) =>
    make("tr", {}, cell(named(curve.direction)), make("th", { scope: "row", text: curve.selector }), cell(percent(row.share)), cell(number(row.threshold)), cell(percent(row.selected)), cell(percent(row.changed)),
      cell(interval(row)), cell(percent(row.recovered)), cell(row.by_seed.map(percent).join(", "))))));
}

summary();
byId("legend").replaceChildren(...selectors.map((name, i) =>
  make("span", { class: "entry" }, make("span", { class: `box solid ${colour(i)}` }), name)));
byId("lines").replaceChildren(...directions.flatMap((direction) => Object.keys(WHAT).map((what) => chart(direction, what))));
new TokenView();
