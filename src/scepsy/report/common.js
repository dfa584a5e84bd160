// Shared by the pages: elements, words for numbers, tips, tables, colours.
const COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c7ae6", "#a3a300", "#7f5539", "#5c7f8a"];
function colours(llms) {
  const found = new Map(llms.map((llm, index) => [llm, COLOURS[index % COLOURS.length]]));
  return (llm) => found.get(llm) || "var(--idle)";
}
const byId = (id) => document.getElementById(id);

function node(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
  for (const child of children) made.append(child);
  return made;
}
function svg(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
  for (const child of children) made.append(child);
  return made;
}
function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  if (Math.abs(value) >= 1000) return Math.round(value).toLocaleString("en");
  return Number(value.toPrecision(digits)).toString();
}
const seconds = (value) => value < 0.001 && value > 0 ? "<1 ms" : value < 1 ? `${Math.round(value * 1000)} ms` : `${number(value)} s`;
const percent = (value) => `${(100 * value).toFixed(value < 0.0995 ? 1 : 0)} %`;

const tip = byId("tip");
function hover(element, words) {
  element.addEventListener("mousemove", (event) => {
    tip.textContent = words;
    tip.style.visibility = "visible";
    tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8)}px`;
  });
  element.addEventListener("mouseleave", () => { tip.style.visibility = "hidden"; });
  element.addEventListener("focus", () => {
    const box = element.getBoundingClientRect();
    tip.textContent = words;
    tip.style.visibility = "visible";
    tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${Math.min(box.bottom + 6, innerHeight - tip.offsetHeight - 8)}px`;
  });
  element.addEventListener("blur", () => { tip.style.visibility = "hidden"; });
  return element;
}
function table(target, columns, rows) {
  const head = node("tr", {}, ...columns.map(([title, kind]) => node("th", { class: kind || "" }, title)));
  const body = rows.map((row) => node("tr", {}, ...row.map((cell, index) =>
    node("td", { class: columns[index][1] || "" }, cell instanceof Node ? cell : String(cell)))));
  target.append(node("table", {}, node("thead", {}, head), node("tbody", {}, ...body)));
}
