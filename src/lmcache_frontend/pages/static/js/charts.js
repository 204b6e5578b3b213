// Time series: each `.chart` of `[data-charts]` becomes a uPlot, all of them from one answer of the history.
const places = () => document.querySelector("[data-charts]");
const plots = new Map();
const HEIGHT = 170;
const NEWEST = 3;

function shown(value, unit) {
  if (value == null) return "–";
  if (unit === "share") return `${+(value * 100).toFixed(1)} %`;
  if (unit === "s") {
    if (value === 0) return "0";
    if (value < 1e-3) return `${+(value * 1e6).toPrecision(3)} µs`;
    return value < 1 ? `${+(value * 1e3).toPrecision(3)} ms` : `${+value.toPrecision(3)} s`;
  }
  const [step, units] = unit === "bytes" ? [1024, ["B", "KiB", "MiB", "GiB", "TiB"]] : [1000, ["", "k", "M", "G", "T"]];
  let place = 0;
  for (; Math.abs(value) >= step && place < units.length - 1; place += 1) value /= step;
  return `${+value.toPrecision(3)} ${units[place]}`.trim();
}

// uPlot draws on a canvas: its colours are those that the style sheet gives to elements.
function colour(element) {
  return getComputedStyle(element).color;
}

function options(section, width) {
  const unit = section.dataset.unit;
  const items = [...section.querySelectorAll("[data-series]")];
  const alone = (plot, series) => {
    const values = plot.data[series];
    return values.flatMap((value, i) => (value != null && values[i - 1] == null && values[i + 1] == null ? [i] : []));
  };
  const powers = [...Array(50).keys()].map((power) => 2 ** power);
  const axis = {
    stroke: colour(section.querySelector(".legend")),
    font: "12px system-ui, sans-serif",
    grid: { stroke: colour(section.querySelector(".plot")), width: 1 },
    ticks: { show: false },
  };
  const update = (plot) => {
    const at = plot.cursor.idx;
    items.forEach((item, i) => {
      const values = plot.data[i + 1];
      // The newest step may not have its value yet; what is older than a few is no "now".
      const value = at == null ? values.slice(-NEWEST).findLast((it) => it != null) : values[at];
      item.querySelector("strong").textContent = shown(value, unit);
    });
  };
  return {
    width,
    height: HEIGHT,
    padding: [10, 22, 0, 0],
    legend: { show: false },
    cursor: { sync: { key: "node" }, drag: { x: false, y: false }, points: { size: 6 } },
    scales: { y: { range: (_, low, high) => [Math.min(0, low ?? 0), unit === "share" ? 1 : (high || 1) * 1.08] } },
    axes: [
      { ...axis, values: (_, stamps) => stamps.map((stamp) => new Date(stamp * 1000).toTimeString().slice(0, stamp % 60 ? 8 : 5)), space: 48, size: 28 },
      { ...axis, values: (_, values) => values.map((value) => shown(value, unit)), size: 62, ...(unit === "bytes" && { incrs: powers }) },
    ],
    series: [
      {},
      ...items.map((item) => ({
        stroke: colour(item),
        width: 1.6,
        points: { show: true, size: 4, filter: alone },
        spanGaps: false,
        ...(items.length === 1 && { fill: colour(item).replace(/rgba?\(([^)]*)\)/, (_, rgb) => `rgba(${rgb.split(",").slice(0, 3)}, .1)`) }),
      })),
    ],
    hooks: { setCursor: [update], setData: [update] },
  };
}

function draw(section, data) {
  const place = section.querySelector(".plot");
  const keys = [...section.querySelectorAll("[data-series]")].map((item) => item.dataset.series);
  const columns = [data.times, ...keys.map((key) => data.series[key])];
  const plot = plots.get(section.id);
  if (plot?.root.isConnected) return plot.setData(columns);
  plot?.destroy(); // its chart was taken out of the page meanwhile
  place.replaceChildren();
  plots.set(section.id, new uPlot(options(section, place.clientWidth), columns, place));
}

async function load() {
  const charts = places();
  if (!charts || document.hidden) return;
  const keys = [...charts.querySelectorAll("[data-series]")].map((item) => item.dataset.series);
  const answer = await fetch(`${charts.dataset.url}&series=${keys}&points=360`).catch(() => null);
  if (!answer?.ok) return; // live.js tells when the frontend does not answer
  const data = await answer.json();
  for (const section of charts.querySelectorAll(".chart")) draw(section, data);
}

function again() {
  for (const plot of plots.values()) plot.destroy();
  plots.clear();
  load();
}

new ResizeObserver(() => {
  for (const [id, plot] of plots) {
    const width = document.querySelector(`#${id} .plot`)?.clientWidth;
    if (width && width !== plot.width) plot.setSize({ width, height: HEIGHT });
  }
}).observe(document.documentElement);
document.addEventListener("theme", again);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
document.addEventListener("htmx:after:swap", load);
load();
