"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const numbers = head.classList.contains("n");
    const down = head.getAttribute("aria-sort") ? head.getAttribute("aria-sort") === "ascending" : numbers && column > 0;
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = row => numbers ? Number(row.cells[column].dataset.v) : row.cells[column].textContent;
    const order = (a, b) => numbers ? value(a) - value(b) : value(a).localeCompare(value(b));
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort((a, b) => down ? order(b, a) : order(a, b)));
  }));
}
const lanes = document.getElementById("lanes"), zoom = document.querySelector(".zoom");
if (lanes && zoom) {
  const view = lanes.parentElement;
  let factor = 1;
  const zoomBy = (by, x) => {
    const middle = (view.scrollLeft + x) / factor;
    factor = Math.min(64, Math.max(1, factor * by));
    lanes.setAttribute("width", 100 * factor + "%");
    view.scrollLeft = middle * factor - x;
  };
  zoom.hidden = false;
  for (const button of zoom.children)
    button.addEventListener("click", () => zoomBy(Number(button.dataset.by), view.clientWidth / 2));
  view.addEventListener("wheel", event => {
    if (!event.ctrlKey) return;
    event.preventDefault();
    zoomBy(event.deltaY < 0 ? 1.25 : 0.8, event.clientX - view.getBoundingClientRect().left);
  }, { passive: false });
}
const tip = document.createElement("div");
tip.id = "tip";
tip.hidden = true;
document.body.append(tip);
const told = new WeakMap();
const textOf = element => {
  if (!element || told.has(element)) return told.get(element);
  const title = element.querySelector(":scope > title");
  const text = title ? title.textContent : element.getAttribute("title");
  if (title) title.remove();
  element.removeAttribute("title");
  told.set(element, text);
  return text;
};
document.addEventListener("mousemove", event => {
  const text = textOf(event.target.closest("rect, circle, .bar.big i, .bars li"));
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  tip.style.left = Math.max(4, Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 4)) + "px";
  tip.style.top = event.clientY + (event.clientY + tip.offsetHeight + 24 > innerHeight ? -tip.offsetHeight - 8 : 16) + "px";
});
