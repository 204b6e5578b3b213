// Keyboard: `/` searches, `g` and a letter goes somewhere, `[` and `]` change the tab, `t` the theme, `?` tells of these.
const keys = document.getElementById("keys");
let going = 0;

function isTyping(target) {
  return target.isContentEditable || target.matches?.("input, select, textarea");
}

function search() {
  const field = document.querySelector("[data-search-page]") ?? document.querySelector("[data-search]");
  field?.focus();
  field?.select();
}

function tab(step) {
  const tabs = [...document.querySelectorAll(".tabs a")];
  const here = tabs.findIndex((it) => it.hasAttribute("aria-current"));
  tabs[here + step]?.click();
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && isTyping(event.target)) event.target.blur();
  if (event.ctrlKey || event.metaKey || event.altKey || isTyping(event.target) || document.querySelector("dialog[open]")) return;
  if (Date.now() - going < 1500) {
    going = 0;
    const link = [...document.querySelectorAll("[data-go]")].find((it) => it.dataset.go === event.key);
    if (link) return void link.click();
  }
  const actions = {
    "/": search,
    "?": () => keys.showModal(),
    g: () => (going = Date.now()),
    t: () => document.dispatchEvent(new Event("theme:next")),
    "[": () => tab(-1),
    "]": () => tab(1),
  };
  if (actions[event.key]) {
    event.preventDefault();
    actions[event.key]();
  }
});

document.addEventListener("click", (event) => event.target.closest?.("[data-keys]") && keys.showModal());
document.addEventListener("change", (event) => event.target.matches?.("[data-submit]") && event.target.form.requestSubmit());

// Where there is no room for all tabs, that of this page is seen.
for (const it of document.querySelectorAll(".tabs [aria-current], .top nav [aria-current]")) {
  const bar = it.parentElement;
  bar.scrollLeft = it.offsetLeft - bar.offsetLeft - (bar.clientWidth - it.clientWidth) / 2;
}
