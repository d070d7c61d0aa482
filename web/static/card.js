// One image on the page: its preview and size, its waiting time, its bars, its error.

import { $, bytes, labelText, make, number, percent, pixels, plural } from "./basics.js";
import { keyWanted } from "./key.js";

const LONG = 8; // seconds after which the page explains the wait
const PREVIEW = 304; // pixels of the longer side; previews of the full 12 megapixels would fill a phone's memory

// Returns the card of an image for a model; the caller adds its element to the page. `state` is waiting, sent, answered or
// failed. `signal` cancels the preview and the request.
export function makeCard(file, model, signal) {
  const element = $("result").content.firstElementChild.cloneNode(true);
  const name = file.name || "image";
  part(element, "h3").textContent = name;
  part(element, ".file-size").textContent = bytes(file.size);
  part(element, ".more").setAttribute("aria-label", `Details of ${name}`);
  part(element, ".more").onclick = () => toggle(element);
  const card = { file, name, model, element, signal, state: "waiting", sentAt: 0, answer: null };
  showModel(card);
  showPreview(card);
  return card;
}

const part = (element, selector) => element.querySelector(selector);

// The page shows this only if the service has several models.
function showModel(card) {
  part(card.element, ".by").textContent = card.model && `Model: ${card.model}`;
}

function toggle(element) {
  const open = element.classList.toggle("open");
  part(element, ".more").setAttribute("aria-expanded", open);
}

// Previews

let previewing = Promise.resolve(); // one at a time: decoding a photo takes a moment and some memory

function showPreview(card) {
  previewing = previewing.then(() => card.signal.aborted || preview(card));
}

async function preview(card) {
  const address = URL.createObjectURL(card.file);
  try {
    const image = await load(address);
    place(card, shrink(image, `Preview of ${card.name}`));
    if (card.file.type === "image/svg+xml") return; // a drawing has no size of its own
    const size = pixels(image.naturalWidth, image.naturalHeight);
    part(card.element, ".file-size").textContent = `${bytes(card.file.size)}, ${size}`;
  } catch {
    placeTile(card); // not an image, or a format that this browser can't show
  } finally {
    URL.revokeObjectURL(address);
  }
}

function load(address) {
  const image = new Image();
  return new Promise((resolve, reject) => Object.assign(image, { onload: () => resolve(image), onerror: reject, src: address }));
}

// Returns the first frame, which is also the one that the service classifies.
function shrink(image, ariaLabel) {
  const scale = Math.min(1, PREVIEW / Math.max(image.naturalWidth, image.naturalHeight));
  const [width, height] = [image.naturalWidth, image.naturalHeight].map((side) => Math.ceil(side * scale));
  const canvas = make("canvas", { className: "preview", role: "img", ariaLabel, width, height });
  canvas.getContext("2d").drawImage(image, 0, 0, width, height);
  return canvas;
}

const place = (card, preview) => part(card.element, ".preview").replaceWith(preview);

function placeTile(card) {
  const ending = /\.(\w{1,5})$/.exec(card.name)?.[1].toUpperCase() ?? "?";
  const tile = make("div", { className: "preview tile", ariaHidden: "true" }, make("b", { textContent: ending }));
  tile.append(make("span", { textContent: "no preview" }));
  place(card, tile);
}

// States

export function showWaiting(card) {
  const seconds = Math.floor((performance.now() - card.sentAt) / 1000);
  part(card.element, ".wait-text").textContent = card.state === "sent" ? sentText(seconds) : heldText();
}

const heldText = () => (keyWanted() ? "Not sent yet: a key is needed." : "Not sent yet: your other images go first.");

// The page can't know how much has been uploaded, or how many images are ahead in the queue.
function sentText(seconds) {
  if (seconds < LONG) return `Waiting for the answer, ${seconds} s`;
  return `Still waiting, ${seconds} s: the upload is slow, or other images are ahead in the queue.`;
}

export function showAgain(card) {
  for (const each of [".error", ".again"]) part(card.element, each).hidden = true;
  part(card.element, ".wait").hidden = false;
  card.element.classList.remove("failed");
  showWaiting(card);
}

export function showPredictions(card, measured) {
  card.model = card.answer.model || card.model;
  showModel(card);
  part(card.element, ".wait").hidden = true;
  part(card.element, ".bars").replaceChildren(...card.answer.predictions.map(bar));
  part(card.element, ".took").textContent = tookText(card.answer.timing, measured);
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
  const label = make("span", { className: "label", textContent: labelText(prediction) });
  const value = make("span", { className: "value", textContent: percent(prediction.probability) });
  const fill = make("span");
  fill.style.width = `${Math.min(1, prediction.probability) * 100}%`;
  return make("li", {}, label, value, make("span", { className: "track", ariaHidden: "true" }, fill));
}

export function showError(card) {
  part(card.element, ".wait").hidden = true;
  part(card.element, ".error").hidden = false;
  part(card.element, ".error").textContent = card.answer.error.message;
  card.element.classList.add("failed");
}

// Shows the button that calls `go`, and enables it after a countdown of `seconds`.
export function offerAgain(card, seconds, go) {
  const button = part(card.element, ".again");
  button.hidden = false;
  button.disabled = seconds > 0;
  button.textContent = seconds > 0 ? `Try again in ${plural(seconds, "second")}` : "Try again";
  button.onclick = go;
  if (seconds <= 0) return;
  card.countdown = setTimeout(() => card.signal.aborted || offerAgain(card, seconds - 1, go), 1000);
}
