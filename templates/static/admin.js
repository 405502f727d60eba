// Every page works without this script. It adds copy buttons and parts that refresh themselves.
"use strict";

// Copy buttons are hidden in the page, and shown by this script. Where the clipboard is not available, as over plain
// HTTP, they select the text.
function copyButtons(root) {
  for (const button of root.querySelectorAll("button[data-copy]")) {
    button.hidden = false;
    button.addEventListener("click", async () => {
      const what = document.getElementById(button.dataset.copy);
      const label = button.textContent;
      try {
        await navigator.clipboard.writeText(what.textContent.trim());
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(what);
        button.textContent = "Press Ctrl+C";
      }
      setTimeout(() => { button.textContent = label; }, 2000);
    });
  }
}

// A form is sent once, even if its button is pressed repeatedly. The page of a download stays, so its form can be sent
// again after a moment.
document.addEventListener("submit", (event) => {
  const form = event.target;
  if (form.method !== "post") return;
  if (form.dataset.sent) {
    event.preventDefault();
    return;
  }
  form.dataset.sent = "yes";
  if ("download" in form.dataset) setTimeout(() => { delete form.dataset.sent; }, 1000);
});
addEventListener("pageshow", () => {
  for (const form of document.querySelectorAll("form[data-sent]")) delete form.dataset.sent;
});

// A token expires after a time or on a date: whichever was chosen last.
const lifetime = document.getElementById("f-lifetime"), date = document.getElementById("f-expires_at");
if (lifetime && date) {
  date.addEventListener("input", () => { if (date.value) lifetime.value = ""; });
  lifetime.addEventListener("input", () => { if (lifetime.value) date.value = ""; });
}

// Rows of limits are added and removed in place, and a preset is filled in without losing a typed API key. Without this
// script, these buttons send the form and get it back.
for (const form of document.querySelectorAll("form[data-policy]")) {
  const add = form.querySelector("[name=add_limit]");
  const rows = () => [...form.querySelectorAll("[data-limit]")];
  const renumber = () => {
    for (const [i, row] of rows().entries()) {
      row.setAttribute("aria-label", `Limit ${i + 1}`);
      row.querySelector("[name=remove_limit]").setAttribute("aria-label", `Remove limit ${i + 1}`);
    }
    add.hidden = rows().length >= Number(add.dataset.max);
  };
  const addRow = () => {
    const row = document.getElementById("new-limit").content.firstElementChild.cloneNode(true);
    const index = 1 + Math.max(-1, ...rows().map((r) => Number(r.querySelector("[name=remove_limit]").value)));
    for (const e of row.querySelectorAll("*")) for (const a of e.attributes) a.value = a.value.replace("NEW", index);
    form.querySelector("#limit-rows").append(row);
    renumber();
    row.querySelector("input").focus();
  };
  const removeRow = (row) => {
    const neighbor = row.nextElementSibling ?? row.previousElementSibling;
    row.remove();
    renumber();
    (neighbor?.querySelector("input") ?? add).focus();
  };
  form.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    const change = { add_limit: addRow, remove_limit: () => removeRow(button.closest("[data-limit]")), preset: () => fillPreset(form, button).then(renumber) }[button?.name];
    if (!change) return;
    event.preventDefault();
    change();
  });
  form.addEventListener("input", (event) => { // dollars are not counted per second or minute, and running calls not per period
    if (!("metric" in event.target.dataset)) return;
    const metric = event.target.value, period = event.target.closest("[data-limit]").querySelector("[data-period]");
    if (metric === "concurrent") period.value = "";
    else if (metric === "dollars" && ["", "second", "minute"].includes(period.value)) period.value = "month";
    else if (period.value === "") period.value = "minute";
  });
}

// fillPreset asks the server for the form with a preset, and takes over its values. If that fails, the form is sent.
async function fillPreset(form, button) {
  const body = new URLSearchParams([...new FormData(form)].filter(([name]) => form.elements[name].type !== "password"));
  body.append(button.name, button.value);
  let fresh;
  try {
    const answer = await fetch(form.action, { method: "POST", body });
    fresh = answer.ok && new DOMParser().parseFromString(await answer.text(), "text/html").querySelector("form[data-policy]");
  } catch {
    // The browser shows what is wrong when it sends the form.
  }
  if (!fresh) {
    form.requestSubmit(button);
    return;
  }
  for (const field of fresh.elements) {
    const mine = field.name && form.elements[field.name];
    if (!(mine instanceof HTMLElement) || ["password", "hidden", "submit"].includes(field.type)) continue;
    if (field.type === "checkbox") mine.checked = field.checked;
    else mine.value = field.value;
  }
  form.querySelector(".advanced").open ||= fresh.querySelector(".advanced").open;
  for (const part of ["#limit-rows", ".presets"]) form.querySelector(part).replaceWith(document.adoptNode(fresh.querySelector(part)));
  form.querySelector(`[name=preset][value="${button.value}"]`).focus();
}

// Periods: a range of days or times and a choice of the list exclude each other.
const bounds = document.querySelectorAll("form.filters [name=from], form.filters [name=to]");
const periods = document.querySelectorAll("form.filters [name=period]");
for (const bound of periods.length ? bounds : []) {
  bound.addEventListener("input", () => {
    if (bound.value) for (const p of periods) { if (p.type === "radio") p.checked = false; else p.value = ""; }
  });
}
for (const p of periods) {
  p.addEventListener("input", () => {
    if (p.value) for (const bound of bounds) bound.value = "";
  });
}

// A period that is pointed at is shown at once. With the keyboard, which passes over the others, "Apply" shows it.
for (const p of document.querySelectorAll("form.filters .segments input")) {
  let pointed = false;
  p.closest("label").addEventListener("pointerdown", () => { pointed = true; });
  p.addEventListener("keydown", () => { pointed = false; });
  p.addEventListener("change", () => { if (pointed) p.form.requestSubmit(); });
}

// Times are shown in the browser's time zone; hovering shows them in UTC.
function localTimes(root) {
  const two = (n) => String(n).padStart(2, "0");
  const zone = new Intl.DateTimeFormat("en-GB", { timeZoneName: "short" }).formatToParts().find((p) => p.type === "timeZoneName");
  const zoneName = zone ? zone.value : "local time";
  for (const e of root.querySelectorAll("time[data-show]")) {
    const at = new Date(e.dateTime);
    if (isNaN(at)) continue;
    const date = `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())}`;
    const minute = `${two(at.getHours())}:${two(at.getMinutes())}`, second = two(at.getSeconds());
    const utc = e.dateTime.replace("T", " ").replace("Z", " UTC");
    e.title = e.title ? `${utc}, ${e.title}` : utc;
    if (e.dataset.in) e.dataset.in = zoneName;
    e.textContent = { minute: `${date} ${minute}`, second: `${date} ${minute}:${second}`, clock: `${minute}:${second}`, date }[e.dataset.show];
  }
  for (const e of root.querySelectorAll("[data-zone]")) e.textContent = zoneName;
}

// Parts of a page with data-refresh and an id are fetched again at the interval that was chosen for the page, while the
// page is visible and the focus is not inside the part.
function startRefresh(choice) {
  const remembered = "refresh " + location.pathname;
  let timer = 0;
  const schedule = () => {
    clearTimeout(timer);
    const seconds = Number(choice.value);
    if (seconds > 0) timer = setTimeout(update, seconds * 1000);
  };
  const update = async () => {
    try {
      if (!document.hidden) {
        const answer = await fetch(location.href, { headers: { "X-Auto-Refresh": "1" } });
        if (!answer.ok || answer.redirected) return;
        const page = new DOMParser().parseFromString(await answer.text(), "text/html");
        for (const old of document.querySelectorAll("[data-refresh]")) {
          const fresh = page.getElementById(old.id);
          if (!fresh || old.contains(document.activeElement)) continue;
          old.replaceWith(document.adoptNode(fresh));
          copyButtons(fresh);
          localTimes(fresh);
        }
      }
    } catch {
      // The next attempt may reach the server again.
    }
    schedule();
  };
  let value = choice.dataset.default;
  try {
    value = localStorage.getItem(remembered) ?? value;
  } catch {
    // Without storage, each page starts with its own interval.
  }
  choice.value = [...choice.options].some((o) => o.value === value) ? value : choice.dataset.default;
  choice.addEventListener("input", () => {
    try {
      localStorage.setItem(remembered, choice.value);
    } catch {
      // The choice counts for this page only.
    }
    schedule();
  });
  choice.closest("[hidden]").hidden = false;
  schedule();
}

// The key / moves the focus to the search field of a list. On other pages, it opens the search of calls.
document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || !document.querySelector(".top nav")) return;
  if (event.target.closest("input:not([type=checkbox], [type=radio]), textarea, select, [contenteditable]")) return;
  event.preventDefault();
  const search = document.querySelector("[data-search]");
  if (!search) location.href = "/admin/requests#search";
  search?.focus();
  search?.select();
});
if (location.hash === "#search") document.querySelector("[data-search]")?.focus();

// The choice of colors; theme.js applies it to each page.
for (const theme of document.querySelectorAll("[data-theme-choice]")) {
  theme.value = document.documentElement.dataset.theme ?? "";
  theme.addEventListener("input", () => {
    if (theme.value) document.documentElement.dataset.theme = theme.value;
    else delete document.documentElement.dataset.theme;
    try {
      localStorage.setItem("theme", theme.value);
    } catch {
      // The choice counts for this page only.
    }
  });
  theme.closest("[hidden]").hidden = false;
}

copyButtons(document);
localTimes(document);
document.querySelector("nav [aria-current]")?.scrollIntoView({ block: "nearest", inline: "center" });
const choice = document.getElementById("refresh");
if (choice) startRefresh(choice);
