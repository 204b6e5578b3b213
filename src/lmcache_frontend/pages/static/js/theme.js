// Before the first paint: the theme that was chosen here, and that scripts run.
(() => {
  "use strict";
  const names = ["system", "light", "dark"];
  const root = document.documentElement;
  root.classList.add("js");
  let theme = "system";
  try {
    theme = localStorage.getItem("lmcache-theme") ?? theme;
  } catch {
    // storage is switched off: the system's theme it is
  }
  const show = () => {
    if (theme === "light" || theme === "dark") root.dataset.theme = theme;
    else delete root.dataset.theme;
    for (const button of document.querySelectorAll("[data-theme-switch]")) {
      button.setAttribute("aria-label", `Theme: ${theme}`);
      button.querySelector("[data-theme-name]").textContent = theme[0].toUpperCase() + theme.slice(1);
    }
  };
  const next = () => {
    theme = names[(names.indexOf(theme) + 1) % names.length];
    try {
      localStorage.setItem("lmcache-theme", theme);
    } catch {
      // then for this page alone
    }
    show();
    document.dispatchEvent(new Event("theme"));
  };
  show();
  document.addEventListener("DOMContentLoaded", show);
  document.addEventListener("click", (event) => event.target.closest?.("[data-theme-switch]") && next());
  document.addEventListener("theme:next", next);
})();
