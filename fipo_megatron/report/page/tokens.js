// The token view: tokens coloured by a value, and all values of the token under the pointer. A page may bring values of
// its own in data.token_modes: their key in the tokens, label and centre (null: from 0 on).
const MODES = data.token_modes?.map((mode) => ({ ...mode, of: (t, i) => t[mode.key]?.[i] })) ?? [
  { key: "weight", label: "Future-KL weight f", centre: 1, of: (t, i) => t.weight?.[i] },
  { key: "shift", label: "log-prob shift d", centre: 0, of: (t, i) => t.shift?.[i] },
  { key: "entropy", label: "entropy", centre: null, of: (t, i) => t.entropy?.[i] },
  { key: "future_kl", label: "Future-KL F", centre: 0, of: (t, i) => t.future_kl?.[i] },
  { key: "mismatch", label: "engine mismatch (old − behaviour)", centre: 0, of: (t, i) => difference(t.old_log_prob?.[i], t.behaviour_log_prob?.[i]) },
];
const ROW = data.row_name ?? "step"; // what the number of a row counts
const RUN = data.run_name ?? "Run"; // what data.runs lists
const STRONGEST = 62; // percent of colour: the text stays readable

function difference(a, b) {
  return a === null || b === null || a === undefined || b === undefined ? undefined : a - b;
}

class TokenView {
  constructor() {
    this.extent = new Map();
    this.modes = MODES.filter((mode) => data.responses.some((r) => r.tokens && mode.of(r.tokens, 0) !== undefined));
    this.mode = this.modes[0] ?? null;
    this.filters = {};
    this.chosen = null;
    byId("omitted").replaceChildren(...data.omitted.map((text) => make("p", { text })));
    if (!data.responses.length) { byId("token-view").hidden = true; return; }
    this.buildFilters();
    this.list();
  }

  buildFilters() {
    const select = (key, label, options) => make("label", {}, label, " ", make("select", {
      id: `filter-${key}`, onchange: (event) => { this.filters[key] = event.target.value; this.list(); } },
    ...options.map(([value, text]) => make("option", { value, text }))));
    const between = (key, label, step) => make("span", { class: "range" }, make("label", {}, label, " ", this.bound(key, "from", step)), " – ", this.bound(key, "to", step));
    byId("filters").addEventListener("submit", (event) => event.preventDefault());
    byId("filters").replaceChildren(
      ...(several ? [select("run", RUN, [["", "all"], ...data.runs.map((run, i) => [i, run.name])])] : []),
      select("answer", "Answer", [["", "all"], ["right", "right"], ["wrong", "wrong"]]),
      between("step", `${ROW[0].toUpperCase()}${ROW.slice(1)}s`, 1), between("response_tokens", "Tokens", 1),
      ...(data.token_modes ? [] : [between("reward", "Reward", "any")]),
      select("order", "Order", [["step", `by ${ROW}`], ["response_tokens", "longest first"], ...(data.token_modes ? [] : [["reward", "highest reward first"]])]),
      make("button", { type: "reset", class: "plain", text: "Reset", onclick: () => { this.filters = {}; setTimeout(() => this.list()); } }));
  }

  bound(key, end, step) {
    return make("input", { type: "number", step, id: `filter-${key}-${end}`, "aria-label": `${key.replace("_", " ")} ${end}`,
      oninput: (event) => { this.filters[`${key}-${end}`] = event.target.value; this.list(); } });
  }

  passes(response) {
    const { filters } = this;
    if (filters.run && response.run !== Number(filters.run)) return false;
    if (filters.answer && Boolean(response.accuracy) !== (filters.answer === "right")) return false;
    return ["step", "response_tokens", "reward"].every((key) => {
      const [from, to] = [filters[`${key}-from`], filters[`${key}-to`]];
      return (!from || response[key] >= Number(from)) && (!to || response[key] <= Number(to));
    });
  }

  list() {
    const found = data.responses.filter((response) => this.passes(response));
    const order = this.filters.order ?? "step";
    if (order !== "step") found.sort((a, b) => (b[order] ?? 0) - (a[order] ?? 0));
    byId("listed").textContent = `${found.length} of ${data.responses.length} responses`;
    byId("list").replaceChildren(...found.map((response) => this.entry(response)));
    if (!found.includes(this.chosen)) this.choose(found.find((response) => response.tokens) ?? found[0] ?? null);
    else this.mark();
  }

  entry(response) {
    const length = response.response_tokens === null ? "" : `${response.response_tokens.toLocaleString("en")} tokens`;
    const button = make("button", { type: "button", class: "row", onclick: () => this.choose(response) },
      this.badge(response), make("span", { text: `${ROW} ${response.step}` }),
      ...(several ? [make("span", { class: `of-run ${colour(response.run)}` }, make("span", { class: "dot" }), data.runs[response.run].name)] : []),
      make("span", { class: "quiet", text: length }),
      make("span", { class: "quiet", text: response.tokens ? "" : "text only" }));
    button.response = response;
    return button;
  }

  badge(response) {
    return make("span", { class: `badge ${response.accuracy ? "right" : "wrong"}`, text: response.accuracy ? "✓ right" : "✗ wrong" });
  }

  mark() {
    for (const row of byId("list").children) row.setAttribute("aria-current", String(row.response === this.chosen));
  }

  choose(response) {
    this.chosen = response;
    this.mark();
    hideTip();
    const target = byId("response");
    if (!response) { target.replaceChildren(make("p", { class: "quiet", text: "No response passes the filters." })); return; }
    const prompt = make("details", { open: true }, make("summary", { text: "Prompt" }), make("pre", { class: "text", text: response.prompt }));
    this.body = make("div", { class: "text tokens", tabindex: "0", role: "group", "aria-label": "Response, token by token; arrow keys move" });
    target.replaceChildren(this.facts(response), prompt, ...(response.tokens && this.mode ? [this.selector(), this.body] : [this.plain(response)]));
    if (response.cut) target.append(make("p", { class: "quiet", text: "Cut here: the rest is not in this page." }));
    if (response.tokens && this.mode) this.spans(response);
  }

  plain(response) {
    const text = response.tokens ? response.tokens.text.join("") : response.response;
    return make("div", {}, make("p", { class: "quiet", text: "No token values are recorded for this response (observe.trajectory_tokens)." }),
      make("pre", { class: "text plain-response", text }));
  }

  facts(response) {
    const versions = response.versions.map(([version, count]) => `${version} (${count} tokens)`).join(", ");
    const facts = [
      [RUN, several ? data.runs[response.run].name : undefined], [ROW[0].toUpperCase() + ROW.slice(1), response.step], ["Problem", response.prompt_id],
      ["Sample", response.sample], ["Data", response.data_source], ["Reward", response.reward], ["Advantage", response.advantage],
      ["Tokens", response.response_tokens], ["Finished by", response.finish_reason], ["Update", response.mini_batch],
      ["Weight versions", versions], ["Right answer", response.ground_truth]];
    return make("div", { class: "facts" }, this.badge(response), ...facts
      .filter(([, value]) => value !== undefined && value !== null && value !== "")
      .map(([name, value]) => make("span", {}, make("span", { class: "quiet", text: `${name} ` }),
        make("b", { text: typeof value === "number" ? number(value) : value }))));
  }

  // Colours

  selector() {
    const select = make("select", { id: "colour-by", onchange: (event) => {
      this.mode = this.modes.find((mode) => mode.key === event.target.value);
      this.paint();
    } }, ...this.modes.map((mode) => make("option", { value: mode.key, text: mode.label, selected: mode === this.mode })));
    this.scale = make("span", { class: "scale" });
    this.profile = svg("svg", { class: "profile", height: 54, preserveAspectRatio: "none", role: "img" });
    return make("div", { class: "colouring" }, make("label", {}, "Colour by ", select), this.scale, this.profile);
  }

  // The range of 98 % of all tokens, the same for all responses, so that colours can be compared.
  reach(mode) {
    if (!this.extent.has(mode.key)) {
      const sizes = [];
      for (const { tokens } of data.responses) {
        if (tokens) tokens.text.forEach((_, i) => { const v = mode.of(tokens, i); if (Number.isFinite(v)) sizes.push(Math.abs(v - (mode.centre ?? 0))); });
      }
      sizes.sort((a, b) => a - b);
      this.extent.set(mode.key, sizes[Math.floor(0.98 * (sizes.length - 1))] || sizes[sizes.length - 1] || 0);
    }
    return this.extent.get(mode.key);
  }

  spans(response) {
    this.at = null;
    this.body.replaceChildren(...response.tokens.text.map((text, i) => {
      const span = make("span", { class: "token", text: text === "" ? "∅" : text.replaceAll("\n", "↵\n") });
      span.index = i;
      return span;
    }));
    this.body.addEventListener("pointermove", (event) => {
      if (event.target.index !== undefined) this.tell(event.target, event.clientX, event.clientY);
      else hideTip();
    });
    this.body.addEventListener("pointerleave", hideTip);
    this.body.addEventListener("blur", hideTip);
    this.body.addEventListener("keydown", (event) => this.key(event));
    this.paint();
  }

  paint() {
    const { tokens } = this.chosen, reach = this.reach(this.mode), centre = this.mode.centre;
    for (const span of this.body.children) {
      const value = this.mode.of(tokens, span.index);
      const share = reach && Number.isFinite(value) ? (value - (centre ?? 0)) / reach : 0;
      const kind = centre === null ? "sequential" : share < 0 ? "below" : "above";
      span.className = `token ${kind}${span === this.at ? " at" : ""}`;
      span.style.setProperty("--k", `${(STRONGEST * Math.min(1, Math.abs(share))).toFixed(1)}%`);
    }
    const ends = centre === null ? [number(0), `≥ ${number(reach)}`] : [`≤ ${number(centre - reach)}`, `≥ ${number(centre + reach)}`];
    this.scale.replaceChildren(make("span", { text: ends[0] }),
      make("span", { class: `bar ${centre === null ? "one" : "two"}` }, ...(centre === null ? [] : [make("span", { text: number(centre) })])),
      make("span", { text: ends[1] }));
    this.drawProfile(tokens, reach, centre);
  }

  drawProfile(tokens, reach, centre) {
    const values = tokens.text.map((_, i) => this.mode.of(tokens, i));
    const finite = values.filter(Number.isFinite), low = Math.min(centre ?? 0, ...finite), high = Math.max(centre ?? reach, ...finite);
    const y = (value) => 50 - 46 * (value - low) / (high - low || 1);
    const points = values.flatMap((value, i) => Number.isFinite(value) ? [`${i},${y(value).toFixed(1)}`] : []);
    this.profile.setAttribute("viewBox", `0 0 ${Math.max(1, values.length - 1)} 54`);
    this.profile.setAttribute("aria-label", `${this.mode.label} over the response, from ${number(low)} to ${number(high)}`);
    this.profile.replaceChildren(
      svg("line", { class: "grid", x1: 0, x2: values.length, y1: y(centre ?? 0), y2: y(centre ?? 0) }),
      ...(points.length > 1 ? [svg("path", { class: "line c0", d: `M${points.join("L")}` })] : []));
  }

  values(tokens, versions, i) {
    if (data.token_rows) return data.token_rows.map(([key, name]) => [name, tokens[key]?.[i]]);
    const shift = tokens.shift?.[i], old = tokens.old_log_prob?.[i];
    const version = versions.reduce(([left, found], [name, count]) =>
      found === null && i < left + count ? [left, name] : [left + count, found], [0, null])[1];
    return [
      ["log π behaviour (engine)", tokens.behaviour_log_prob?.[i]], ["log π old", old],
      ["log π current", Number.isFinite(old) && Number.isFinite(shift) ? old + shift : undefined], ["shift d", shift],
      ["ratio", Number.isFinite(shift) ? Math.exp(shift) : undefined],
      ["engine mismatch", difference(old, tokens.behaviour_log_prob?.[i])], ["Future-KL F", tokens.future_kl?.[i]],
      ["weight f", tokens.weight?.[i]], ["entropy", tokens.entropy?.[i]], ["weight version", version]];
  }

  tell(span, x, y) {
    const { tokens, versions } = this.chosen, i = span.index;
    this.at?.classList.remove("at");
    this.at = span;
    span.classList.add("at");
    const rows = this.values(tokens, versions, i);
    byId("tip").replaceChildren(
      make("strong", {}, `token ${i + 1} of ${this.chosen.response_tokens ?? tokens.text.length}: `, make("code", { text: JSON.stringify(tokens.text[i]) })),
      make("table", {}, ...rows.filter(([, value]) => value !== undefined && value !== null).map(([name, value]) =>
        make("tr", {}, make("td", { text: name }), make("td", { class: "value", text: typeof value === "string" ? JSON.stringify(value) : number(value) })))));
    placeTip(byId("tip"), x, y, true);
  }

  key(event) {
    const way = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (event.key === "Escape") hideTip();
    if (!way) return;
    event.preventDefault();
    const spans = this.body.children, next = Math.min(Math.max((this.at?.index ?? -1) + way, 0), spans.length - 1);
    const box = spans[next].getBoundingClientRect();
    spans[next].scrollIntoView({ block: "nearest" });
    this.tell(spans[next], box.right, box.top + 24);
  }
}
