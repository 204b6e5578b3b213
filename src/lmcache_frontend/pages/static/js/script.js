// The editor of scripts: Tab and Enter keep the indent, a run shows its output below, and what was run is kept in this browser.
const KEY = "lmcache-scripts";
const MOST = 20;
const LONGEST = 20_000;
const form = document.querySelector("[data-script]");
const area = form?.querySelector("textarea");
const output = document.getElementById("output");
const running = form?.querySelector("[data-running]");
let leaves = false;

function insert(text) {
  // the only way by which the browser's own undo still works
  if (!document.execCommand("insertText", false, text)) area.setRangeText(text, area.selectionStart, area.selectionEnd, "end");
}

function lineBefore() {
  const start = area.value.lastIndexOf("\n", area.selectionStart - 1) + 1;
  return [start, area.value.slice(start, area.selectionStart)];
}

function indentLines(less) {
  const [start] = lineBefore();
  const end = area.selectionEnd;
  const text = area.value.slice(start, end);
  const moved = less ? text.replace(/^ {1,4}/gm, "") : text.replace(/^/gm, "    ");
  area.setSelectionRange(start, end);
  insert(moved);
  area.setSelectionRange(start, start + moved.length);
}

function keyed(event) {
  if (event.key === "Escape") return void (leaves = true);
  if (event.key === "Tab" && !leaves) {
    event.preventDefault();
    if (event.shiftKey || area.selectionStart !== area.selectionEnd) indentLines(event.shiftKey);
    else insert(" ".repeat(4 - (lineBefore()[1].length % 4)));
  } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    form.requestSubmit();
  } else if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    const line = lineBefore()[1];
    insert(`\n${line.match(/^ */)[0]}${/:\s*(#.*)?$/.test(line) ? "    " : ""}`);
  }
  if (event.key !== "Tab") leaves = false;
}

function kept() {
  try {
    const found = JSON.parse(localStorage.getItem(KEY) ?? "[]");
    return Array.isArray(found) ? found.filter((it) => typeof it?.script === "string").slice(0, MOST) : [];
  } catch {
    return [];
  }
}

function keep(list) {
  try {
    localStorage.setItem(KEY, JSON.stringify(list.slice(0, MOST)));
  } catch {
    // no room, or not allowed: the scripts run all the same
  }
  showHistory();
}

function showHistory() {
  const list = kept();
  const rows = list.map((it, index) => {
    const row = document.createElement("li");
    const button = document.createElement("button");
    const about = document.createElement("small");
    button.type = "button";
    button.className = "quiet cut";
    button.dataset.kept = index;
    button.textContent = it.script.split("\n").find((line) => line.trim()) ?? "";
    about.textContent = `${new Date(it.time).toLocaleString()} · ${it.node}`;
    row.append(button, about);
    return row;
  });
  document.querySelector("[data-history]").replaceChildren(...rows);
  document.querySelector("[data-forget]").hidden = !list.length;
}

async function run(event) {
  event.preventDefault();
  const script = area.value;
  const button = form.querySelector("button.primary");
  if (button.disabled) return;
  if (script.trim() && script.length <= LONGEST) {
    const others = kept().filter((it) => it.script !== script);
    keep([{ script, time: Date.now(), node: form.dataset.node }, ...others]);
  }
  button.disabled = true;
  running.hidden = false;
  try {
    const answer = await fetch(form.action, { method: "POST", body: new FormData(form) });
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const part = page.getElementById("dialog-part") ?? page.querySelector("main");
    part?.querySelector("[data-done]")?.closest("p").remove();
    part?.querySelector("[data-confirm]")?.remove();
    output.replaceChildren(...(part ? part.childNodes : [`The frontend answers ${answer.status}.`]));
  } catch {
    output.replaceChildren("The frontend does not answer. It is not known whether the script has run.");
  } finally {
    button.disabled = false;
    running.hidden = true;
  }
  output.hidden = false;
  output.scrollIntoView({ block: "nearest" });
}

function load(text) {
  area.focus();
  area.select();
  insert(text);
}

function clicked(event) {
  const button = event.target.closest("[data-load], [data-kept], [data-forget]");
  if (!button) return;
  if (button.dataset.load) load(document.getElementById(button.dataset.load).textContent);
  else if (button.dataset.kept) load(kept()[Number(button.dataset.kept)]?.script ?? "");
  else keep([]);
}

if (form) {
  area.addEventListener("keydown", keyed);
  form.addEventListener("submit", run);
  document.addEventListener("click", clicked);
  showHistory();
}
