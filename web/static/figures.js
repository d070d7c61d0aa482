// The figures of "The service now", computed from how the counters of /stats change.

import { $, make, number, plural } from "./basics.js";
import { isObject, namesIn, several } from "./models.js";

export const POLL = 2_000; // milliseconds
const RECENTLY = 60_000; // milliseconds in "the last minute"
const RATE_SPAN = 10_000; // milliseconds that "images per second" is averaged over
const USUAL_BATCH = 32; // images: the default of BATCH_SIZE

let samples = []; // {at, stats} of the last minute, oldest first

// Called when the figures are closed: a rate across the gap would be wrong.
export function forgetFigures() {
  samples = [];
  $("live-state").hidden = true;
}

export function addSample(stats) {
  const at = performance.now();
  const last = samples.at(-1);
  if (last && restarted(of(last.stats, ""), of(stats, ""))) samples = [];
  samples = [...samples.filter((sample) => at - sample.at <= RECENTLY), { at, stats }];
  showModelNames(namesIn(stats));
  showFigures();
}

const restarted = (before, now) =>
  now.images < before.images || now.latency.count < before.latency.count || now.batch_size.count < before.batch_size.count;

// Returns the figures of one model, or of all for the name "". What is missing counts as 0, as for a model that is new.
function of(stats, name) {
  const found = name ? stats.models?.[name] : stats;
  const { images, queue_length, latency, batch_size } = isObject(found) ? found : {};
  return { images: Number(images) || 0, queue_length, latency: histogram(latency), batch_size: histogram(batch_size) };
}

const histogram = (value) => (isObject(value?.buckets) ? value : { sum: 0, count: 0, buckets: {} });

// Shows the choice of a model if there are several. A model that is gone is no longer chosen.
function showModelNames(names) {
  const chosen = $("figures-of").value;
  const options = ["", ...names].map((name) => new Option(name || "all models", name, false, name === chosen));
  const changed = options.some((option, i) => option.value !== $("figures-of").options[i]?.value);
  if (changed || $("figures-of").options.length !== options.length) $("figures-of").replaceChildren(...options);
  $("figures-choice").hidden = names.length < 2;
}

$("figures-of").onchange = () => {
  if (!samples.length) return;
  showFigures();
  showState(samples.at(-1).stats);
};

// Images per second over the last `count` samples.
function rateSince(count, name) {
  const [first, last] = [samples.at(-Math.min(count, samples.length)), samples.at(-1)];
  return rate(first, last, name);
}

function rate(first, last, name) {
  const seconds = (last.at - first.at) / 1000;
  return seconds > 0 ? (of(last.stats, name).images - of(first.stats, name).images) / seconds : 0;
}

export function showState(stats) {
  const state = !stats ? "unknown" : stats.queue_length === null || !serversOf(stats, $("figures-of").value).length ? "down" : "up";
  $("live-state").hidden = false;
  $("live-state").className = `state ${state}`;
  $("live-state").textContent = { up: "ready", down: "not ready", unknown: "no answer" }[state];
}

function showFigures() {
  const [name, { stats }] = [$("figures-of").value, samples.at(-1)];
  const { queue_length } = of(stats, name);
  $("rate").textContent = number(rateSince(1 + RATE_SPAN / POLL, name), 1);
  $("queue").textContent = stats.queue_length === null ? "no Redis" : number(Number(queue_length) || 0);
  showServers(stats, name);
  drawSpark(name);
  showDistributions(name);
}

const serversOf = (stats, name) => Object.values(stats.model_servers).filter(({ model }) => !name || model === name);

function showServers(stats, name) {
  const servers = serversOf(stats, name);
  $("servers").textContent = number(servers.length);
  const running = [...new Set(servers.map((server) => server.model).filter(Boolean))];
  const off = several() ? namesIn(stats).filter((each) => (!name || each === name) && !running.includes(each)) : [];
  $("models").textContent = [...running, ...off.map((each) => `${each} (not running)`)].join(", ");
}

function drawSpark(name) {
  const rates = samples.slice(1).map((sample, i) => rate(samples[i], sample, name));
  const top = Math.max(...rates, 1);
  const most = RECENTLY / POLL - 1;
  const points = rates.map((each, i) => `${100 - ((rates.length - 1 - i) * 100) / most},${27 - (each / top) * 25}`);
  $("spark").firstElementChild.setAttribute("points", points.join(" "));
}

// Shows the last minute, or if it had no image, everything since the start.
function showDistributions(name) {
  const [first, now] = [of(samples[0].stats, name), of(samples.at(-1).stats, name)];
  const recent = now.latency.count > first.latency.count && now.batch_size.count > first.batch_size.count;
  const latency = recent ? difference(now.latency, first.latency) : now.latency;
  const batches = recent ? difference(now.batch_size, first.batch_size) : now.batch_size;
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
