// Filters a list that is on the page already: an input with `data-local="#list"` hides the children that lack its words.
const MARK = "data-text";

function filter(input) {
  const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
  const items = document.querySelectorAll(`${input.dataset.local} > [${MARK}]`);
  let shown = 0;
  for (const item of items) {
    const text = item.getAttribute(MARK).toLowerCase();
    item.hidden = !words.every((word) => text.includes(word));
    shown += !item.hidden;
  }
  const note = document.querySelector(`${input.dataset.local}-shown`);
  if (note) note.textContent = words.length ? `${shown} of ${items.length}` : `${items.length}`;
  const url = new URL(location);
  if (input.value) url.searchParams.set(input.name, input.value);
  else url.searchParams.delete(input.name);
  history.replaceState(null, "", url);
}

document.addEventListener("input", (event) => event.target.matches?.("[data-local]") && filter(event.target));
document.addEventListener("htmx:after:swap", () => {
  for (const input of document.querySelectorAll("[data-local]")) if (input.value) filter(input);
});
