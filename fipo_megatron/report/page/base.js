"use strict";
// Helpers of all parts of the page. Texts of runs enter the page as text nodes only.
const data = JSON.parse(document.getElementById("data").textContent);
const several = data.runs.length > 1;
const state = { hidden: new Set(), from: 0, to: 1, smooth: 1 };

const byId = (id) => document.getElementById(id);

function make(tag, options = {}, ...children) {
  const element = options.svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name === "svg") continue;
    if (name === "text") element.textContent = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const svg = (tag, options = {}, ...children) => make(tag, { ...options, svg: true }, ...children);

function number(value, percent = false) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (percent) return `${trimmed(100 * value, 3)} %`;
  return trimmed(value, 4);
}

function trimmed(value, digits) {
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return String(Number(value.toPrecision(3)).toExponential()).replace("e+", "e").replace("-", "−").replace("e-", "e−");
  const rounded = Number(value.toPrecision(digits));
  return rounded.toLocaleString("en", { maximumFractionDigits: 6 }).replace("-", "−");
}

const colour = (index) => `c${index % 8}`;
const dash = (index) => `d${index % 4}`;

function table(target, head, rows) {
  target.replaceChildren(
    make("thead", {}, make("tr", {}, ...head.map((text) => make("th", { scope: "col", text })))),
    make("tbody", {}, ...rows),
  );
}

function placeTip(tip, x, y, below = false) {
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = x + 16 + box.width > innerWidth ? x - box.width - 16 : x + 16;
  const under = y + 24 + box.height > innerHeight ? y - box.height - 24 : y + 24;
  const top = below ? under : Math.min(Math.max(8, y - box.height / 2), innerHeight - box.height - 8);
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${Math.max(4, top)}px`;
}

function hideTip() {
  byId("tip").hidden = true;
}

function theme() {
  const button = byId("theme"), system = matchMedia("(prefers-color-scheme: dark)");
  let dark = system.matches;
  const show = () => {
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    button.textContent = dark ? "Light" : "Dark";
    button.setAttribute("aria-label", dark ? "Use light colours" : "Use dark colours");
  };
  button.addEventListener("click", () => { dark = !dark; show(); });
  system.addEventListener("change", (event) => { dark = event.matches; show(); });
  show();
}

function header() {
  byId("made").textContent = `made ${data.made}`;
  byId("parts").replaceChildren(...[...document.querySelectorAll("main > section")].map((section) =>
    make("a", { href: `#${section.id}`, text: section.dataset.name })));
  theme();
}

header();
