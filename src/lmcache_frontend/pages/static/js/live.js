// Keeps `#part` new while somebody looks, and says when what it shows is old: the frontend stopped, or the network is gone.
//
// One stream of events tells that something has changed; the part is asked for then, at most every `data-refresh`
// seconds. Where there is no stream (`data-topics` is missing, too many are open) it is asked for every so often.
const part = document.getElementById("part");
const offline = document.getElementById("offline");
const title = document.title;
const opened = new Date().toLocaleTimeString();
const pause = 1000 * Number(part?.dataset.refresh ?? 0);
let asked = Date.now();
const version = facts().version;
let busy = false;
let changed = false;
let leaving = false;
let stream = null;

function facts() {
  return document.getElementById("facts")?.dataset ?? {};
}

function anew() {
  if (!leaving) location.reload();
  leaving = true;
}

// Signed out, or what was shown is gone: the page itself says so, and leads on.
function refused(event) {
  const status = event.detail?.ctx?.response?.status;
  if ([401, 403, 404].includes(status)) return anew();
  lost(status);
}

function lost(status) {
  busy = false;
  document.getElementById("what").textContent = Number.isInteger(status) ? `The frontend answers ${status}.` : "The frontend does not answer.";
  document.getElementById("since").textContent = facts().time ?? opened;
  offline.hidden = false;
  document.title = "LMCache: no answer";
}

function fresh() {
  if (facts().version !== version) return anew(); // a newer frontend: its parts need its style and scripts
  busy = false;
  offline.hidden = true;
  document.title = facts().title ?? title;
}

// A reader who types, marks text or has a menu open is not disturbed; a tab that nobody sees asks for nothing.
function disturbs() {
  const active = document.activeElement;
  const typing = part.contains(active) && active.matches("input, select, textarea");
  return document.hidden || typing || part.contains(getSelection()?.type === "Range" ? getSelection().anchorNode : null);
}

function refresh() {
  if (busy || leaving || disturbs() || part.querySelector("[data-settled]") || Date.now() - asked < pause) return;
  if (stream?.readyState === EventSource.OPEN && !changed) return;
  [busy, changed, asked] = [true, false, Date.now()];
  part.dispatchEvent(new Event("refresh"));
}

function listen() {
  if (document.hidden) {
    stream?.close();
    stream = null;
    return;
  }
  if (stream || !part.dataset.topics) return;
  stream = new EventSource(`/api/stream?topics=${part.dataset.topics}${part.dataset.stream ?? ""}`);
  const note = () => (changed = true);
  for (const topic of part.dataset.topics.split(",")) stream.addEventListener(topic, note);
  stream.addEventListener("open", note);
  stream.addEventListener("error", () => {
    if (stream?.readyState === EventSource.CLOSED) stream = null; // refused: the clock goes on without it
  });
}

if (pause) {
  document.addEventListener("htmx:error", lost);
  document.addEventListener("htmx:response:error", refused);
  document.addEventListener("htmx:after:swap", fresh);
  document.addEventListener("visibilitychange", () => {
    listen();
    refresh();
  });
  listen();
  setInterval(refresh, 250);
}
