// The page at /: sends images to /predict and shows what comes back, and below it how the service is doing, by /stats.

const LANES = 4; // images under way at once: a browser keeps 6 connections, of which the figures want one
const ANSWER_LIMIT = 300_000; // milliseconds, above the longest REQUEST_TIMEOUT
const POLL = 2_000; // milliseconds
const POLL_LIMIT = 5_000;
const RECENTLY = 60_000; // milliseconds that "last minute" means
const AT_ONCE = 10_000; // milliseconds over which images a second are counted
const USUAL_BATCH = 32; // images: BATCH_SIZE, unless set

const $ = (id) => document.getElementById(id);
const number = (value, digits = 0) =>
  value.toLocaleString("en-GB", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const plural = (count, what) => `${number(count)} ${what}${count === 1 ? "" : "s"}`;

// Predictions

let waiting = []; // cards whose image is yet to be sent
let lanes = 0;
let stop = new AbortController(); // ends the requests of the images that are shown

function classifyAll(files) {
  if (!files.length) return;
  stop.abort();
  stop = new AbortController();
  const cards = [...files].map(makeCard);
  $("results").replaceChildren(...cards.map((card) => card.element));
  $("results-section").hidden = false;
  $("results-title").textContent = cards.length === 1 ? "What it shows" : `What the ${cards.length} images show`;
  waiting = [];
  refused.clear();
  cards.forEach(send);
  $("results-section").scrollIntoView({ block: "nearest" });
}

function makeCard(file) {
  const element = $("result").content.firstElementChild.cloneNode(true);
  const name = file.name || "image";
  const preview = element.querySelector(".preview");
  const address = URL.createObjectURL(file);
  preview.onload = () => URL.revokeObjectURL(address);
  preview.onerror = () => {
    // No browser shows every format that the service reads.
    URL.revokeObjectURL(address);
    preview.replaceWith(Object.assign(document.createElement("div"), { className: "preview", textContent: "no preview" }));
  };
  preview.src = address;
  preview.alt = `Preview of ${name}`;
  element.querySelector("h3").textContent = name;
  const card = { file, name, element, signal: stop.signal, unauthorised: false };
  element.querySelector(".again").onclick = () => again(card);
  return card;
}

function send(card) {
  waiting.push(card);
  if (lanes < LANES) drive();
}

async function drive() {
  lanes++;
  for (let card; (card = waiting.shift()); ) {
    if (!card.signal.aborted) await classify(card);
  }
  lanes--;
}

async function classify(card) {
  card.element.setAttribute("aria-busy", "true");
  const begun = performance.now();
  const answer = await ask(card);
  if (card.signal.aborted) return;
  card.element.removeAttribute("aria-busy");
  if (answer.predictions) showPredictions(card, answer, performance.now() - begun);
  else showError(card, answer);
}

// Returns {predictions, timing}, or {message, wait, retry, status}: what to tell, and whether and when to try again.
async function ask(card) {
  const form = new FormData();
  form.append("image", card.file, card.name);
  const limit = AbortSignal.any([card.signal, AbortSignal.timeout(ANSWER_LIMIT)]);
  try {
    const response = await fetch("predict", { method: "POST", body: form, headers: authorization(), signal: limit });
    return await understand(response);
  } catch (error) {
    const late = error.name === "TimeoutError";
    const message = late
      ? "No answer came within 5 minutes, so try again."
      : "The service can't be reached, so check your network and try again.";
    return { message, retry: true, wait: 0 };
  }
}

async function understand(response) {
  const body = await response.json().catch(() => ({}));
  if (response.ok && body.predictions) {
    return { predictions: body.predictions, timing: timings(response.headers.get("Server-Timing")) };
  }
  return {
    status: response.status,
    message: body.error?.message ?? `The service answered with status ${response.status}, so try again later.`,
    retry: response.status === 429 || response.status >= 500,
    wait: retryAfter(response.headers.get("Retry-After")),
  };
}

// Returns seconds; the header has them, or a date.
function retryAfter(header) {
  if (!header) return 0;
  const seconds = /^\d+$/.test(header) ? Number(header) : (Date.parse(header) - Date.now()) / 1000;
  return Math.max(0, Math.ceil(seconds || 0));
}

// Returns {stage: {ms, note}} of `prepare;dur=1.2, compute;dur=3.4;desc="batch of 2"`.
function timings(header) {
  const found = (header ?? "").matchAll(/(\w+);dur=([\d.]+)(?:;desc="([^"]*)")?/g);
  return Object.fromEntries([...found].map(([, stage, ms, note]) => [stage, { ms: Number(ms), note }]));
}

function showPredictions(card, { predictions, timing }, measured) {
  card.element.querySelector(".wait").hidden = true;
  card.element.querySelector(".bars").replaceChildren(...predictions.map(bar));
  card.element.querySelector(".took").textContent = tookText(timing, measured);
  const best = predictions[0];
  say("status", `${card.name} shows ${labelText(best)}, ${percent(best.probability)}.`);
}

function tookText(timing, measured) {
  const round = `${number(measured)} ms`;
  if (!timing.total) return `Took ${round}.`;
  const stages = ["prepare", "queue", "compute"].filter((stage) => timing[stage]);
  const parts = stages.map((stage) => `${stage} ${number(timing[stage].ms)}`).join(", ");
  const note = timing.compute?.note ? `, ${timing.compute.note}` : "";
  return `Took ${number(timing.total.ms)} ms in the service (${parts}${note}), ${round} with the network.`;
}

function bar(prediction) {
  const element = document.createElement("li");
  const label = Object.assign(document.createElement("span"), { className: "label", textContent: labelText(prediction) });
  const value = Object.assign(document.createElement("span"), { className: "value", textContent: percent(prediction.probability) });
  element.append(label, value, track(prediction.probability));
  return element;
}

function track(share) {
  const element = Object.assign(document.createElement("span"), { className: "track", ariaHidden: "true" });
  const fill = document.createElement("span");
  fill.style.width = `${Math.min(1, share) * 100}%`;
  element.append(fill);
  return element;
}

const labelText = ({ label }) => label.replaceAll("_", " "); // as in golden_retriever

function percent(share) {
  return share > 0 && share < 0.001 ? "< 0.1%" : `${number(Math.min(1, share) * 100, 1)}%`;
}

function showError(card, { message, retry, wait, status }) {
  card.element.querySelector(".wait").hidden = true;
  const error = card.element.querySelector(".error");
  error.hidden = false;
  error.textContent = message;
  card.unauthorised = status === 401;
  refused.add(card);
  say("alert", `${card.name}: ${message}`);
  if (card.unauthorised) askForKey();
  else if (retry) offerAgain(card, wait);
}

function offerAgain(card, seconds) {
  const button = card.element.querySelector(".again");
  button.hidden = false;
  button.disabled = seconds > 0;
  button.textContent = seconds > 0 ? `Try again in ${plural(seconds, "second")}` : "Try again";
  if (seconds > 0) setTimeout(() => card.signal.aborted || offerAgain(card, seconds - 1), 1000);
}

function again(card) {
  for (const part of [".error", ".again"]) card.element.querySelector(part).hidden = true;
  card.element.querySelector(".wait").hidden = false;
  refused.delete(card);
  send(card);
}

// Screen readers hear a text again only when it changes.
function say(where, text) {
  $(where).textContent = $(where).textContent === text ? `${text}\u00a0` : text;
}

// The key, where the service wants one: kept as long as the tab

const refused = new Set(); // cards that show an error

function authorization() {
  const key = sessionStorage.getItem("key");
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function askForKey() {
  sessionStorage.removeItem("key"); // it was none, or a wrong one
  if (!$("key-form").hidden) return;
  $("key-form").hidden = false;
  $("key").focus();
}

$("key-form").onsubmit = (event) => {
  event.preventDefault();
  const key = $("key").value.trim();
  if (/^[\x21-\x7e]+$/.test(key)) sessionStorage.setItem("key", key);
  else return say("alert", "A key is made of letters, digits and signs, without spaces.");
  $("key").value = "";
  $("key-form").hidden = true;
  [...refused].filter((card) => card.unauthorised && !card.signal.aborted).forEach(again);
};

// How images come in: chosen, photographed, dropped, pasted

for (const input of [$("files"), $("photo")]) {
  input.onchange = () => {
    classifyAll(input.files);
    input.value = ""; // so that the same file can be chosen again
  };
}

$("form").onsubmit = (event) => event.preventDefault();
document.documentElement.classList.add("scripted");
document.querySelector(".plainly").hidden = true;
$("files").required = false;
$("camera").hidden = false;

let depth = 0; // dragenter comes for each element that the pointer crosses
const hasFiles = (event) => event.dataTransfer?.types.includes("Files");

function dragged(event, step) {
  if (!hasFiles(event)) return;
  event.preventDefault();
  depth = Math.max(0, depth + step);
  document.body.classList.toggle("dropping", depth > 0);
}

document.addEventListener("dragenter", (event) => dragged(event, 1));
document.addEventListener("dragleave", (event) => dragged(event, -1));
document.addEventListener("dragover", (event) => dragged(event, 0));
document.addEventListener("drop", (event) => {
  if (!hasFiles(event)) return;
  dragged(event, -depth);
  classifyAll(event.dataTransfer.files);
});
document.addEventListener("paste", (event) => {
  const files = event.clipboardData?.files ?? [];
  if (!files.length) return; // text, for the field of the key
  event.preventDefault();
  classifyAll(files);
});

// The service now: differences of the counters of /stats

let samples = []; // {at, stats} of the last minute, oldest first
let rates = []; // images a second between two samples, for the line
let timer = 0;

async function poll() {
  const stats = await fetchStats();
  if (stats) note(stats);
  showState(stats);
  clearTimeout(timer); // one poll at a time, however often the page was hidden meanwhile
  if (!document.hidden) timer = setTimeout(poll, POLL);
}

async function fetchStats() {
  try {
    const response = await fetch("stats", { headers: authorization(), signal: AbortSignal.timeout(POLL_LIMIT) });
    return response.ok ? await response.json() : null;
  } catch {
    return null;
  }
}

function note(stats) {
  const at = performance.now();
  const last = samples.at(-1);
  if (last && restarted(last.stats, stats)) samples = rates = [];
  samples = [...samples.filter((sample) => at - sample.at <= RECENTLY), { at, stats }];
  rates = [...rates, rateSince(2)].slice(-RECENTLY / POLL);
  showFigures(stats);
}

const restarted = (before, now) =>
  now.images < before.images || now.latency.count < before.latency.count || now.batch_size.count < before.batch_size.count;

// Images a second since the sample before `count` - 1 others.
function rateSince(count) {
  const [first, last] = [samples.at(-Math.min(count, samples.length)), samples.at(-1)];
  const seconds = (last.at - first.at) / 1000;
  return seconds > 0 ? (last.stats.images - first.stats.images) / seconds : 0;
}

function showState(stats) {
  $("live").hidden = !stats && !samples.length;
  const state = !stats ? "unknown" : stats.queue_length === null || !Object.keys(stats.model_servers).length ? "down" : "up";
  $("live-state").className = `state ${state}`;
  $("live-state").textContent = { up: "ready", down: "not ready", unknown: "no answer" }[state];
}

function showFigures(stats) {
  const servers = Object.values(stats.model_servers);
  $("rate").textContent = number(rateSince(1 + AT_ONCE / POLL), 1);
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

// Of the last minute; where that had no image, since the start.
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

// Returns [[upper bound, how many are in the bucket]], in the order of the bounds.
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

// Returns as text what a share of all stays below, as Prometheus reckons it: evenly spread within a bucket.
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
  // Beyond the usual sizes only as far as there is something to see.
  const last = Math.max(shown.findLastIndex(({ count }) => count), shown.findIndex(({ high }) => high >= USUAL_BATCH));
  $("batches").replaceChildren(...shown.slice(0, last + 1).map((each) => column(each, most)));
}

function column({ high, low, count }, most) {
  const element = document.createElement("li");
  const fill = Object.assign(document.createElement("span"), { className: "fill", ariaHidden: "true" });
  fill.style.height = `max(${(count / most) * 100}%, ${count ? 2 : 0}px)`;
  const text = high === Infinity ? `> ${low}` : high - low > 1 ? `${low + 1}–${high}` : `${high}`;
  const amount = Object.assign(document.createElement("span"), { className: "amount", textContent: number(count) });
  const size = Object.assign(document.createElement("span"), { className: "size", textContent: text });
  element.append(amount, fill, size);
  return element;
}

document.addEventListener("visibilitychange", () => {
  clearTimeout(timer);
  if (!document.hidden) poll();
});
if (!document.hidden) poll();
