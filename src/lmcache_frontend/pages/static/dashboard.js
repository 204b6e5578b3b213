// Tells the reader when what the page shows is old: the frontend stopped, or the network is gone.
"use strict";

const offline = document.getElementById("offline");
const since = document.getElementById("since");
const nodes = () => document.getElementById("nodes");

function lost() {
  since.textContent = nodes().dataset.time;
  offline.hidden = false;
  document.title = "LMCache: no answer";
}

function fresh() {
  offline.hidden = true;
  document.title = nodes().dataset.title;
}

document.addEventListener("htmx:error", lost);
document.addEventListener("htmx:response:error", lost);
document.addEventListener("htmx:after:swap", fresh);
