// The figures of "The service now", computed from how the counters of /stats change.

import { $, make, number, plural } from "./basics.js";

export const POLL = 2_000; // milliseconds
const RECENTLY = 60_000; // milliseconds in "the last minute"
const RATE_SPAN = 10_000; // milliseconds that "images per second" is averaged over
const USUAL_BATCH = 32; // images: the default of BATCH_SIZE

let samples = []; // {at, stats} of the last minute, oldest first
let rates = []; // images per second between two samples, for the line

// Called when the figures are closed: a rate across the gap would be wrong.
export function forgetFigures() {
  samples = rates = [];
  $("live-state").hidden = true;
}

export function addSample(stats) {
  const at = performance.now();
  const last = samples.at(-1);
  if (last && restarted(last.stats, stats)) samples = rates = [];
  samples = [...samples.filter((sample) => at - sample.at <= RECENTLY), { at, stats }];
  rates = [...rates, rateSince(2)].slice(-RECENTLY / POLL);
  showFigures(stats);
}

const restarted = (before, now) =>
  now.images < before.images || now.latency.count < before.latency.count || now.batch_size.count < before.batch_size.count;

// Images per second over the last `count` samples.
function rateSince(count) {
  const [first, last] = [samples.at(-Math.min(count, samples.length)), samples.at(-1)];
  const seconds = (last.at - first.at) / 1000;
  return seconds > 0 ? (last.stats.images - first.stats.images) / seconds : 0;
}

export function showState(stats) {
  const state = !stats ? "unknown" : stats.queue_length === null || !Object.keys(stats.model_servers).length ? "down" : "up";
  $("live-state").hidden = false;
  $("live-state").className = `state ${state}`;
  $("live-state").textContent = { up: "ready", down: "not ready", unknown: "no answer" }[state];
}

function showFigures(stats) {
  const servers = Object.values(stats.model_servers);
  $("rate").textContent = number(rateSince(1 + RATE_SPAN / POLL), 1);
  $("queue").textContent = stats.queue_length === null ? "no Redis" : number(stats.queue_length);
  $("servers").textContent = number(servers.length);
  $("models").textContent = [...new Set(servers.map((server) => server.model).filter(Boolean))].join(", ");
  drawSpark();
  showDistributions(stats);
}

function drawSpark() {
  const top = Math.max(...rates, 1);
  const most = RECENTLY / POLL - 1;
  const points = rates.map((rate, i) => `${100 - ((rates.length - 1 - i) * 100) / most},${27 - (rate / top) * 25}`);
  $("spark").firstElementChild.setAttribute("points", points.join(" "));
}

// Shows the last minute, or if it had no image, everything since the start.
function showDistributions(stats) {
  const first = samples[0].stats;
  const recent = stats.latency.count > first.latency.count && stats.batch_size.count > first.batch_size.count;
  const latency = recent ? difference(stats.latency, first.latency) : stats.latency;
  const batches = recent ? difference(stats.batch_size, first.batch_size) : stats.batch_size;
  showLatency(latency);
  showBatches(batches);
  const when = recent ? "in the last minute" : "since the service was started";
  $("window").textContent = `Times and batches of ${plural(batches.count, "image")} ${when}.`;
}

function difference(now, before) {
  const buckets = Object.entries(now.buckets).map(([le, count]) => [le, count - (before.buckets[le] ?? 0)]);
  return { sum: now.sum - before.sum, count: now.count - before.count, buckets: Object.fromEntries(buckets) };
}

// Returns [[upper bound, count in the bucket]], sorted by bound.
function bins(buckets) {
  const bound = (le) => (le === "+Inf" ? Infinity : Number(le));
  const sorted = Object.entries(buckets).map(([le, count]) => [bound(le), count]).sort((a, b) => a[0] - b[0]);
  return sorted.map(([le, count], i) => [le, Math.max(0, count - (i ? sorted[i - 1][1] : 0))]);
}

function showLatency(latency) {
  $("mean").textContent = latency.count ? duration(latency.sum / latency.count) : "–";
  const [half, most] = [0.5, 0.95].map((share) => quantile(bins(latency.buckets), share));
  $("percentiles").textContent = latency.count ? `on average; half within ${half}, 95% within ${most}` : "";
}

// Returns a quantile as text. Like Prometheus, it assumes that the values in a bucket are evenly spread.
function quantile(counted, share) {
  const wanted = share * counted.reduce((sum, [, count]) => sum + count, 0);
  let [below, low] = [0, 0];
  for (const [high, count] of counted) {
    if (count && below + count >= wanted) {
      return high === Infinity ? `more than ${duration(low)}` : duration(low + ((wanted - below) / count) * (high - low));
    }
    [below, low] = [below + count, high];
  }
  return "–";
}

function duration(seconds) {
  if (seconds < 0.0095) return `${number(seconds * 1000, 1)} ms`;
  return seconds < 0.9995 ? `${number(seconds * 1000)} ms` : `${number(seconds, 1)} s`;
}

function showBatches(batches) {
  const counted = bins(batches.buckets);
  const most = Math.max(...counted.map(([, count]) => count), 1);
  $("batch-mean").textContent = batches.count ? `, ${number(batches.sum / batches.count, 1)} on average` : "";
  const shown = counted.map(([high, count], i) => ({ high, count, low: i ? counted[i - 1][0] : 0 }));
  // Sizes beyond the usual ones are shown only if they occur.
  const last = Math.max(shown.findLastIndex(({ count }) => count), shown.findIndex(({ high }) => high >= USUAL_BATCH));
  $("batches").replaceChildren(...shown.slice(0, last + 1).map((each) => column(each, most)));
}

function column({ high, low, count }, most) {
  const element = make("li");
  const fill = make("span", { className: "fill", ariaHidden: "true" });
  fill.style.height = `max(${(count / most) * 100}%, ${count ? 2 : 0}px)`;
  const text = high === Infinity ? `> ${low}` : high - low > 1 ? `${low + 1}–${high}` : `${high}`;
  const amount = make("span", { className: "amount", textContent: number(count) });
  const size = make("span", { className: "size", textContent: text });
  element.append(amount, fill, size);
  return element;
}
