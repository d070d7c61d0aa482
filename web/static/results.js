// The images on the page: sends a few at a time, shows the results, summarizes many, and clears the list.

import { $, labelText, notice, number, percent, plural, say } from "./basics.js";
import { makeCard, offerAgain, showAgain, showError, showPredictions, showWaiting } from "./card.js";
import { closeExport, copy } from "./export.js";
import { askForKey, currentKey, keyWanted, onKey } from "./key.js";
import { chosenModel, several } from "./models.js";
import { ask } from "./request.js";
import { poll } from "./service.js";

const AT_ONCE = 4; // images sent at once: a browser opens 6 connections to a host, and the figures need one
const MOST = 200; // images on the page
const MANY = 6; // more images than this are shown as rows
const COMMON = 3; // labels in the summary

let cards = []; // in the order on the page: the newest drop first, the images of one drop in their own order
let waiting = []; // cards that are not sent yet, oldest first
let senders = 0; // running calls of sendImages
let clock = 0;
let stop = new AbortController(); // cancels the requests of all cards

// Adds the files, for the model that is chosen now. `remark` is added to the notice.
export function classifyAll(files, remark = "") {
  const added = files.slice(0, MOST - cards.length).map((file) => makeCard(file, chosenModel(), stop.signal));
  const full = added.length < files.length ? fullText(files.length - added.length) : "";
  notice(`${full} ${remark}`.trim());
  if (!added.length) return;
  cards = [...added, ...cards];
  waiting.push(...added);
  $("results").prepend(...added.map((card) => card.element));
  update();
  sendWaiting();
  bringIntoView(added[0].element);
}

const fullText = (left) =>
  `This page holds ${number(MOST)} images, so ${plural(left, "image")} were left out. ` +
  "Copy the results that you need, press Clear, and add the others.";

// Sending

function sendWaiting() {
  while (senders < AT_ONCE && waiting.length && !keyWanted()) sendImages();
  waiting.forEach(showWaiting);
  tick();
}

async function sendImages() {
  senders++;
  try {
    while (waiting.length && !keyWanted()) await classify(waiting.shift());
  } finally {
    senders--;
  }
}

async function classify(card) {
  card.state = "sent";
  card.sentAt = performance.now();
  card.element.setAttribute("aria-busy", "true");
  showWaiting(card);
  const answer = await ask(card);
  if (card.signal.aborted) return;
  card.element.removeAttribute("aria-busy");
  if (answer.status === 401 && answer.key !== currentKey()) return sendAgain(card); // another key was entered meanwhile
  card.answer = answer;
  card.state = answer.predictions ? "answered" : "failed";
  if (answer.predictions) showPredictions(card, performance.now() - card.sentAt);
  else fail(card);
  update();
  announce(card);
}

function fail(card) {
  const { status, key, retry, wait, error } = card.answer;
  showError(card);
  if (status === 401) {
    askForKey(key);
    waiting.forEach(showWaiting); // they now wait for the key
  } else if (retry) offerAgain(card, wait, () => again([card]));
  if (status >= 500 || error.code === "unknown_model") poll(); // what the page says about the models may have changed
}

function sendAgain(card) {
  card.state = "waiting";
  card.answer = null;
  clearTimeout(card.countdown);
  waiting.push(card);
  showAgain(card);
}

function again(chosen) {
  chosen.forEach(sendAgain);
  update();
  sendWaiting();
}

onKey(() => again(cards.filter((card) => card.answer?.status === 401)));

// Updates the waiting times every second while an image waits for its answer.
function tick() {
  clearTimeout(clock);
  const sent = cards.filter((card) => card.state === "sent");
  sent.forEach(showWaiting);
  if (sent.length) clock = setTimeout(tick, 1000);
}

// The summary

function update() {
  const [answered, failed] = ["answered", "failed"].map((state) => cards.filter((card) => card.state === state));
  $("results-section").hidden = !cards.length;
  $("results-title").textContent = cards.length === 1 ? "What it shows" : `What the ${number(cards.length)} images show`;
  $("results").classList.toggle("many", many());
  $("summary").hidden = !many();
  $("summary").textContent = summary(answered, failed);
  for (const each of ["copy-json", "copy-csv"]) $(each).hidden = !answered.length;
  const retryable = failed.filter((card) => card.answer.retry);
  $("retry").hidden = retryable.length < 2;
  $("retry").textContent = `Try ${number(retryable.length)} again`;
  $("retry").onclick = () => again(retryable);
}

const many = () => cards.length > MANY;

function summary(answered, failed) {
  const left = cards.length - answered.length - failed.length;
  const counts = [`${number(answered.length)} answered`];
  if (failed.length) counts.push(`${number(failed.length)} failed`);
  if (left) counts.push(`${number(left)} to go`);
  const common = commonLabels(answered).map(([label, count]) => `${label} ${number(count)}`);
  const text = `${plural(cards.length, "image")}: ${counts.join(", ")}`;
  return common.length ? `${text}; most common: ${common.join(", ")}.` : `${text}.`;
}

function commonLabels(answered) {
  const counts = new Map();
  for (const { answer } of answered) {
    const label = labelText(answer.predictions[0]);
    counts.set(label, (counts.get(label) ?? 0) + 1);
  }
  return [...counts].sort((a, b) => b[1] - a[1]).slice(0, COMMON);
}

// Announces the result of each image; if there are many images, only the summary once all are done.
function announce(card) {
  if (many()) {
    if (cards.every((each) => each.answer)) say("status", $("summary").textContent);
  } else if (card.state === "failed") say("alert", `${card.name}: ${card.answer.error.message}`);
  else {
    const [best] = card.answer.predictions;
    const by = several() ? ` Model: ${card.model}.` : "";
    say("status", `${card.name} shows ${labelText(best)}, ${percent(best.probability)}.${by}`);
  }
}

// On a phone the results begin below the visible part of the page; a list of many should begin at its first result.
function bringIntoView(element) {
  const atTop = many() || matchMedia("(max-width: 40rem)").matches;
  if (atTop) $("results-section").scrollIntoView({ block: "start" });
  else element.scrollIntoView({ block: "nearest" });
}

for (const form of ["JSON", "CSV"]) {
  $(`copy-${form.toLowerCase()}`).onclick = () => copy(form, cards.filter((card) => card.answer), cards.length);
}

$("clear").onclick = () => {
  stop.abort();
  stop = new AbortController();
  [cards, waiting] = [[], []];
  $("results").replaceChildren();
  notice("");
  closeExport();
  update();
  say("status", "The results are cleared.");
  $("files").focus();
};
