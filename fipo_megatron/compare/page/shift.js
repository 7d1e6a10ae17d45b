// The summary, the histograms and the profiles of a comparison.
const WIDTH = 360, HEIGHT = 150, LEFT = 50, BOTTOM = 22, TOP = 10;

function bars(key) {
  const { labels, counts, ticks } = data.histograms[key], title = data.labels[key];
  const [figure, drawing] = smallChart(title, WIDTH, HEIGHT, `Histogram of ${title}`);
  const top = Math.log10(Math.max(1, ...counts) + 1), wide = (WIDTH - LEFT) / counts.length;
  const y = (count) => (HEIGHT - BOTTOM - TOP) * (1 - Math.log10(count + 1) / top) + TOP;
  for (let decade = 0; 10 ** decade <= Math.max(...counts); decade += 1) {
    const at = y(10 ** decade);
    drawing.append(svg("line", { class: "grid", x1: LEFT, x2: WIDTH, y1: at, y2: at }), caption(LEFT - 4, at + 3, number(10 ** decade), "end"));
  }
  counts.forEach((count, i) => {
    const bar = svg("rect", { class: "c0", x: LEFT + i * wide, y: y(count), width: Math.max(0.5, wide - 0.6), height: HEIGHT - BOTTOM - y(count), fill: "var(--c)" });
    bar.append(svg("title", { text: `${labels[i]}: ${count.toLocaleString("en")} positions` }));
    drawing.append(bar);
  });
  for (const [text, i] of Object.entries(ticks)) drawing.append(caption(LEFT + (i + 0.5) * wide, HEIGHT - 5, minus(text)));
  return figure;
}

function profile(key) {
  const { mean, percentile_95: upper } = data.quantities[key].profile, title = data.labels[key];
  const [figure, drawing] = smallChart(title, WIDTH, HEIGHT, `Profile of ${title}`);
  const all = [...mean, ...upper].filter(Number.isFinite), low = Math.min(0, ...all), high = Math.max(...all, low + 1e-12);
  const x = (i) => LEFT + (i + 0.5) * (WIDTH - LEFT) / mean.length, y = (v) => (HEIGHT - BOTTOM - TOP) * (high - v) / (high - low) + TOP;
  for (const value of roundTicks(low, high)) {
    drawing.append(svg("line", { class: "grid", x1: LEFT, x2: WIDTH, y1: y(value), y2: y(value) }), caption(LEFT - 4, y(value) + 3, number(value), "end"));
  }
  for (const [values, dashes] of [[upper, "4 3"], [mean, null]]) {
    const points = values.flatMap((v, i) => Number.isFinite(v) ? [`${x(i).toFixed(1)},${y(v).toFixed(1)}`] : []);
    if (points.length > 1) drawing.append(svg("path", { class: "line c0", d: `M${points.join("L")}`, fill: "none", stroke: "var(--c)", "stroke-dasharray": dashes }));
  }
  drawing.append(caption(LEFT, HEIGHT - 5, "first token", "start"), caption(WIDTH, HEIGHT - 5, "last token", "end"));
  return figure;
}

const minus = (text) => text.replace("-", "−");
const lines = (text) => text.replaceAll("\n", "↵");

function heading() {
  const { summary } = data, shares = Object.entries(summary.concentration.js);
  const fraction = (name, cut) => number(data.quantities[name].fractions[cut], true);
  byId("verdict").replaceChildren(
    make("p", { class: "first", text: `At ${fraction("rank", "> 1")} of ${summary.positions.toLocaleString("en")} positions the models prefer different tokens; at ${fraction("js", "> 0.1")} the JS divergence is above 0.1.` }),
    make("p", { text: `Share of the whole JS divergence in the most changed positions: ${shares.map(([share, part]) => `${number(part, true)} in ${number(Number(share), true)} of them`).join(", ")}.` }),
    make("p", { class: "quiet", text: `base ${summary.base} · RL ${summary.rl} · temperature ${summary.temperature} · ${summary.responses} responses` }));
  table(byId("fractions"), ["Quantity", "Mean", "Median", "99th percentile", "Largest", "Fractions of the positions"], Object.entries(data.quantities).map(([key, q]) =>
    make("tr", {}, make("th", { scope: "row", text: data.labels[key] }), ...[q.mean, q.percentiles["50"], q.percentiles["99"], q.max].map((v) => make("td", { class: "value", text: number(v) })),
      make("td", { class: "fractions" }, ...Object.entries(q.fractions).flatMap(([cut, part]) => [make("span", {}, make("span", { class: "quiet", text: `${minus(cut)}: ` }), number(part, true)), " "])))));
}

function changed() {
  const text = (value) => make("code", { text: JSON.stringify(value) }), value = (v, percent) => make("td", { class: "value", text: number(v, percent) });
  table(byId("tokens"), ["Token", "Count", "Share of JS", "Mean JS", "Mean Δ log p"], data.summary.most_changed_tokens.map((row) =>
    make("tr", {}, make("th", { scope: "row" }, text(row.text)), value(row.count), value(row.js_share, true), value(row.js_mean), value(row.delta_mean))));
  table(byId("positions"), ["Response", "Text", "RL prefers", "JS", "Δ log p", "Rank in base"], data.summary.most_changed_positions.map((row) =>
    make("tr", {}, value(row.response), make("td", {}, make("code", {}, lines(row.before), make("mark", { text: lines(row.text) }), lines(row.after))), make("td", {}, text(row.rl_prefers)), value(row.js), value(row.delta), value(row.rank))));
}

heading();
byId("bars").replaceChildren(...Object.keys(data.histograms).map(bars));
byId("lines").replaceChildren(...Object.keys(data.quantities).map(profile));
changed();
new TokenView();
