// Keeps `#part` new while somebody looks, and says when what it shows is old: the frontend stopped, or the network is gone.
const part = document.getElementById("part");
const offline = document.getElementById("offline");
const title = document.title;
const opened = new Date().toLocaleTimeString();
let busy = false;

function facts() {
  return document.getElementById("facts")?.dataset ?? {};
}

function lost() {
  if (!part) return;
  busy = false;
  document.getElementById("since").textContent = facts().time ?? opened;
  offline.hidden = false;
  document.title = "LMCache: no answer";
}

function fresh() {
  busy = false;
  offline.hidden = true;
  document.title = facts().title ?? title;
}

// A reader who types, marks text or has a menu open is not disturbed; a tab that nobody sees asks for nothing.
function disturbs() {
  const active = document.activeElement;
  return document.hidden || (part.contains(active) && active.matches("input, select, textarea"));
}

function refresh() {
  if (busy || disturbs()) return;
  busy = true;
  part.dispatchEvent(new Event("refresh"));
}

if (part?.dataset.refresh) {
  document.addEventListener("htmx:error", lost);
  document.addEventListener("htmx:response:error", lost);
  document.addEventListener("htmx:after:swap", fresh);
  document.addEventListener("visibilitychange", refresh);
  setInterval(refresh, 1000 * Number(part.dataset.refresh));
}
