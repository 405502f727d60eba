// Conveniences. Every page works without them.
"use strict";

// Copy buttons: hidden in the page, shown where they can work.
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

// A form is sent once, however often its button is pressed.
document.addEventListener("submit", (event) => {
  const form = event.target;
  if (form.method !== "post") return;
  if (form.dataset.sent) {
    event.preventDefault();
    return;
  }
  form.dataset.sent = "yes";
});
addEventListener("pageshow", () => {
  for (const form of document.querySelectorAll("form[data-sent]")) delete form.dataset.sent;
});

// A part of a page with data-refresh="seconds" and an id is fetched anew, while
// somebody can see it and is not at work in it.
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
