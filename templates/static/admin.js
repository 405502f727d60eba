// Every page works without this script. It adds copy buttons and parts that refresh themselves.
"use strict";

// Copy buttons are hidden in the page, and shown where the clipboard is available.
function copyButtons(root) {
  if (!navigator.clipboard) return;
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

// A part of a page with data-refresh="seconds" and an id is fetched again at that interval, while the page is
// visible and the focus is not inside the part.
function refresh(part) {
  const every = Number(part.dataset.refresh) * 1000;
  if (!(every >= 1000) || !part.id) return;
  const later = () => setTimeout(async () => {
    const now = document.getElementById(part.id);
    if (!now) return;
    if (document.hidden || now.contains(document.activeElement)) return later();
    try {
      const answer = await fetch(location.href, { headers: { "X-Auto-Refresh": "1" } });
      if (!answer.ok || answer.redirected) return;
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const fresh = page.getElementById(part.id);
      if (!fresh) return;
      now.replaceWith(document.adoptNode(fresh));
      copyButtons(fresh);
    } catch {
      // The next attempt may reach the server again.
    }
    later();
  }, every);
  later();
}

copyButtons(document);
document.querySelector("nav [aria-current]")?.scrollIntoView({ block: "nearest", inline: "center" });
for (const part of document.querySelectorAll("[data-refresh]")) refresh(part);
