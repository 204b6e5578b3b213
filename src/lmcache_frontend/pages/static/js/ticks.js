// Ticking a node chooses "those that are ticked", and says how many there are.
const list = document.querySelector("[data-ticks]");
const scope = document.querySelector("[data-ticked]");
const count = document.querySelector("[data-tick-count]");

function tell() {
  const ticked = list.querySelectorAll(":checked").length;
  count.textContent = ticked ? `(${ticked})` : "";
  return ticked;
}

if (list) {
  list.addEventListener("change", () => {
    if (tell()) scope.checked = true;
    else scope.form.elements.scope.value = "all";
  });
  tell();
}
