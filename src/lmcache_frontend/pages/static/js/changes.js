// Marks the fields of a form that differ from what the page had, and says how many there are.
const form = document.querySelector("[data-changes]");
const note = form?.querySelector("[data-count]");
const before = note?.textContent;

function isChanged(field) {
  return field.value !== form.elements[field.name.replace(/^new\./, "was.")].value;
}

function count() {
  let changed = 0;
  for (const field of form.querySelectorAll("[name^='new.']")) {
    const differs = isChanged(field);
    field.closest(".setting").classList.toggle("is-edited", differs);
    changed += differs;
  }
  if (note) note.textContent = changed ? `${changed} ${changed === 1 ? "setting is" : "settings are"} to be changed.` : before;
}

form?.addEventListener("input", count);
if (form) count();
