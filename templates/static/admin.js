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

// Times are shown in the browser's time zone; hovering shows them in UTC.
function localTimes(root) {
  const two = (n) => String(n).padStart(2, "0");
  for (const e of root.querySelectorAll("time[data-show]")) {
    const at = new Date(e.dateTime);
    if (isNaN(at)) continue;
    const date = `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())}`;
    const minute = `${two(at.getHours())}:${two(at.getMinutes())}`, second = two(at.getSeconds());
    const utc = e.dateTime.replace("T", " ").replace("Z", " UTC");
    e.title = e.title ? `${utc}, ${e.title}` : utc;
    e.textContent = { minute: `${date} ${minute}`, second: `${date} ${minute}:${second}`, clock: `${minute}:${second}`, date }[e.dataset.show];
  }
  const zone = new Intl.DateTimeFormat("en-GB", { timeZoneName: "short" }).formatToParts().find((p) => p.type === "timeZoneName");
  for (const e of root.querySelectorAll("[data-zone]")) e.textContent = zone ? zone.value : "local time";
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

// The key / moves the focus to the search field of a list.
document.addEventListener("keydown", (event) => {
  const search = document.querySelector("[data-search]");
  if (event.key !== "/" || !search || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest("input:not([type=checkbox], [type=radio]), textarea, select, [contenteditable]")) return;
  event.preventDefault();
  search.focus();
  search.select();
});

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
