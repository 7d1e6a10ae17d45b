// The summary and the tables, then the other parts.
function summary() {
  const names = data.runs.map((run) => run.name);
  const title = names.length > 3 ? `${names.length} runs` : names.join(" · ");
  document.title = `${title}: report`;
  byId("title").textContent = title;
  const [first, ...more] = data.verdict;
  byId("verdict").replaceChildren(make("p", { class: "first", text: first }), ...more.map((text) => make("p", { text })));
  const rows = data.headline.rows.map((cells, i) => {
    const equal = data.equals.includes(i) && several;
    const best = equal && data.equals.length === 1;
    return make("tr", { class: best ? "best" : "" },
      make("th", { scope: "row" }, make("span", { class: `of-run ${colour(i)}` }, several ? make("span", { class: "dot" }) : "", data.runs[i].name),
        best ? make("span", { class: "badge right", text: "best" }) : "",
        equal && !best ? make("span", { class: "badge", text: "no clear difference" }) : "",
        make("span", { class: "path quiet", text: data.runs[i].path })),
      ...cells.map(([text, detail]) => make("td", { class: text === "yes" ? "warned" : detail.length > 40 ? "long" : "" },
        make("b", { text }), detail ? make("span", { class: "detail", text: detail }) : "")));
  });
  table(byId("headline"), ["Run", ...data.headline.columns], rows);
  byId("notes").replaceChildren(...data.notes.map((text) => make("p", { class: "quiet", text })));
}

function differences() {
  const target = byId("differences");
  if (!several) { target.append(make("p", { class: "quiet", text: "One run: there is nothing to compare." })); return; }
  if (data.configured.includes(false)) target.append(make("p", { class: "quiet", text: "Not all runs have a config.yaml." }));
  if (!data.differences.length) { target.append(make("p", { text: "The configurations are equal except for run.output." })); return; }
  const body = make("table", { id: "differing" });
  table(body, ["Key", ...data.runs.map((run) => run.name)], data.differences.map(({ key, values }) =>
    make("tr", {}, make("th", { scope: "row" }, make("code", { text: key })), ...values.map((text) => make("td", {}, make("code", { text }))))));
  target.append(make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Configuration" }, body),
    make("p", { class: "quiet", text: "All other keys are equal; run.output is left out." }));
}

function finalNumbers() {
  const rows = data.table.map(({ tag, text, unit, values }) => make("tr", { "data-tag": tag },
    make("th", { scope: "row", title: text }, make("code", { text: tag }), make("span", { class: "quiet meaning", text })),
    ...values.map((value) => make("td", { class: "value", text: number(value) + (unit && value !== null ? ` ${unit}` : "") }))));
  table(byId("table"), ["Name", ...data.runs.map((run) => run.name)], rows);
  byId("find").addEventListener("input", (event) => {
    const wanted = event.target.value.toLowerCase();
    for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });
}

summary();
differences();
finalNumbers();
const curves = new Curves();
const tokenView = new TokenView();
