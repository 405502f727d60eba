// The colors that were chosen for this browser, before the page is drawn. Without a choice, they are those of the system.
"use strict";
try {
  const theme = localStorage.getItem("theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Without storage, the colors are those of the system.
}
