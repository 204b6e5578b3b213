// A form with `data-ask` shows what it will do in a dialog instead of on a page of its own: the same two answers of the server.
const dialog = document.getElementById("confirm");

async function show(form, submitter) {
  const fields = new FormData(form, submitter);
  const body = form.enctype === "multipart/form-data" ? fields : new URLSearchParams(fields);
  const buttons = form.querySelectorAll("button");
  buttons.forEach((button) => (button.disabled = true));
  try {
    const answer = await fetch(submitter?.hasAttribute("formaction") ? submitter.formAction : form.action, { method: "POST", body });
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const part = page.getElementById("dialog-part") ?? page.querySelector("main");
    dialog.replaceChildren(...(part ? [part] : [`The frontend answers ${answer.status}.`]));
  } catch {
    dialog.replaceChildren("The frontend does not answer. It is not known whether this was done.");
  } finally {
    buttons.forEach((button) => (button.disabled = false));
  }
  if (!dialog.open) dialog.showModal();
}

document.addEventListener("submit", (event) => {
  const form = event.target;
  if (form.matches("[data-ask]") || (form.matches("[data-confirm]") && dialog.contains(form))) {
    event.preventDefault();
    show(form, event.submitter);
  }
});

dialog.addEventListener("click", (event) => {
  if (event.target.closest("[data-close]")) {
    event.preventDefault();
    dialog.close();
  }
});
