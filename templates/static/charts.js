// Pointing at a chart, or moving with the arrow keys while it has the focus, shows the numbers of that time in all charts
// of the page. Without this script each step of a chart has a title.
"use strict";

const charts = [...document.querySelectorAll(".chart[data-start]")].map((root) => {
  const slots = [...root.querySelectorAll(".slot")];
  const texts = slots.map((slot) => { // the titles would cover the numbers
    const title = slot.querySelector("title"), text = title.textContent;
    slot.closest("a")?.setAttribute("aria-label", text);
    title.remove();
    return text;
  });
  const chart = { root, slots, texts, start: Number(root.dataset.start), step: Number(root.dataset.step), at: -1 };
  root.tabIndex = 0;
  root.setAttribute("aria-description", "The arrow keys move through the numbers, Enter opens the calls.");
  return chart;
});

const svg = (name, attributes) => {
  const e = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) e.setAttribute(key, value);
  return e;
};

// readout fills the box of a chart with the numbers of a step: the first line of its text is the time, each other line a
// name and a number.
function readout(chart, i) {
  chart.box ??= chart.root.appendChild(Object.assign(document.createElement("div"), { className: "readout" }));
  const [time, ...lines] = chart.texts[i].split("\n");
  const keys = chart.slots[i].dataset.keys.split(" ");
  const list = document.createElement("ul");
  lines.forEach((line, n) => {
    const item = document.createElement("li"), at = line.lastIndexOf(": ");
    const sample = svg("svg", { viewBox: "0 0 10 10", "aria-hidden": "true" });
    if (keys[n]) sample.append(svg("rect", { class: keys[n], width: 10, height: 10 }));
    const name = document.createElement("span"), value = document.createElement("b");
    name.textContent = at < 0 ? line : line.slice(0, at);
    value.textContent = at < 0 ? "" : line.slice(at + 2);
    item.append(sample, name, value);
    list.append(item);
  });
  const head = document.createElement("p");
  head.textContent = time;
  chart.box.replaceChildren(head, list);
  const x = chart.slots[i].querySelector(".hit").getBoundingClientRect(), all = chart.root.getBoundingClientRect();
  const left = x.left - all.left, right = x.right - all.left, width = chart.box.offsetWidth; // beside the line, inside the chart
  chart.box.style.left = `${right + width + 8 <= all.width ? right + 8 : Math.max(0, left - width - 8)}px`;
  chart.cross ??= chart.slots[i].closest("svg").appendChild(svg("line", { class: "cross", y1: 0, y2: 180 }));
  const middle = `${100 * (i + .5) / chart.slots.length}%`;
  chart.cross.setAttribute("x1", middle);
  chart.cross.setAttribute("x2", middle);
}

// show marks a time in all charts; undefined hides the marks.
function show(time) {
  for (const chart of charts) {
    const i = time === undefined ? -1 : Math.floor((time - chart.start) / chart.step);
    const at = i >= 0 && i < chart.slots.length ? i : -1;
    if (at === chart.at) continue;
    chart.slots[chart.at]?.classList.remove("here");
    chart.at = at;
    chart.slots[at]?.classList.add("here");
    if (at >= 0) readout(chart, at);
    if (chart.box) chart.box.hidden = at < 0;
    chart.cross?.setAttribute("visibility", at < 0 ? "hidden" : "visible");
  }
}

const timeOf = (chart, i) => chart.start + (i + .5) * chart.step;

for (const chart of charts) {
  const point = (event) => {
    const slot = event.target.closest(".slot");
    if (slot) show(timeOf(chart, chart.slots.indexOf(slot)));
    return slot;
  };
  // The first touch of a step shows its numbers, the second opens its calls.
  let touched = null;
  chart.root.addEventListener("pointerdown", (event) => {
    const isShown = event.target.closest(".slot")?.classList.contains("here");
    touched = event.pointerType === "touch" && !isShown ? point(event) : null;
  });
  chart.root.addEventListener("click", (event) => {
    if (touched) event.preventDefault();
    touched = null;
  });
  chart.root.addEventListener("pointermove", (event) => {
    if (event.pointerType !== "touch") point(event);
    else { // the events of a touch belong to where it began
      const slot = document.elementFromPoint(event.clientX, event.clientY)?.closest(".slot");
      if (chart.slots.includes(slot)) show(timeOf(chart, chart.slots.indexOf(slot)));
    }
  });
  chart.root.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") show(); });
  chart.root.addEventListener("focus", () => { if (chart.root.matches(":focus-visible") && chart.at < 0) show(timeOf(chart, chart.slots.length - 1)); });
  chart.root.addEventListener("focusout", (event) => { if (!chart.root.contains(event.relatedTarget)) show(); });
  chart.root.addEventListener("keydown", (event) => {
    const last = chart.slots.length - 1, now = chart.at < 0 ? last : chart.at;
    const to = { ArrowLeft: Math.max(0, now - 1), ArrowRight: Math.min(last, now + 1), Home: 0, End: last }[event.key];
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape") show();
    else if (event.key === "Enter") {
      const link = chart.slots[now].closest("a");
      if (link) location.assign(link.href.baseVal);
    } else if (to !== undefined) {
      event.preventDefault();
      show(timeOf(chart, to));
      chart.spoken ??= chart.root.appendChild(Object.assign(document.createElement("p"), { className: "hidden", role: "status" }));
      chart.spoken.textContent = chart.texts[to].replaceAll("\n", "; ");
    }
  });
}
document.addEventListener("pointerdown", (event) => { if (!event.target.closest(".chart")) show(); });
