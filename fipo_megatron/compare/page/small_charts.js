// What the charts of the comparisons have in common.
function smallChart(title, width, height, label) {
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  return [make("figure", { class: "card small-chart" }, make("figcaption", {}, make("h4", { text: title })), drawing), drawing];
}

const caption = (x, y, text, anchor = "middle", kind = null) => svg("text", { x, y, "text-anchor": anchor, class: kind, text });

// From two to six round values from low to high.
function roundTicks(low, high) {
  const decade = 10 ** Math.floor(Math.log10((high - low) / 2 || 1));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * decade).find((size) => (high - low) / size <= 5);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i += 1) ticks.push(i * step);
  return ticks;
}
