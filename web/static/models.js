// The models: says what the chosen one recognizes, offers a choice if there are several, and the sample photos if the
// chosen one knows them. The choice is kept until the tab is closed.

import { $, notice, number } from "./basics.js";

const NO_SERVER = "No model is running right now, so photos wait until one is.";
const NO_REDIS = "The service can't reach its queue right now, so it can't classify photos.";
const NO_ANSWER = "The service does not answer right now, so its model is unknown.";
const CHOOSE = "Choose a model and a photo, and the model says what it recognizes.";

let models = {}; // by name, as /stats has them
let names = []; // of the models, the default one first
let usual = ""; // the name of the default model, which /predict without a name uses
const options = new Map(); // the elements of the choice, by name

// The name of the model for new photos, or "" while it is unknown: the service then uses its default model.
export const chosenModel = () => sessionStorage.getItem("model") ?? names[0] ?? "";

export const several = () => names.length > 1;

// The address to post a photo for a model to. If the service has no other model, it is the one without a name.
export const addressOf = (name) =>
  name && (several() || name !== usual) ? `predict/${encodeURIComponent(name)}` : "predict";

// What /stats says about models comes from model servers, so any value may be missing or have another type.
export const isObject = (value) => typeof value === "object" && value !== null;
export const isReady = (about) => isObject(about) && about.ready === true;

export function namesIn(stats) {
  const isDefault = (name) => name === stats.default_model;
  const found = isObject(stats?.models) ? Object.keys(stats.models) : [];
  return found.sort((a, b) => isDefault(b) - isDefault(a) || a.localeCompare(b, "en"));
}

// Shows the models in `stats` (null if there was no answer), and returns whether the chosen one is running.
export function showModels(stats) {
  if (namesIn(stats).length) learn(stats); // otherwise keep those that were known, as when Redis is down
  const about = stats ? models[chosenModel()] : null;
  const ready = isReady(about) && stats.queue_length !== null;
  $("model").textContent = ready ? (several() ? CHOOSE : sentence(about)) : fault(stats);
  $("samples").hidden = !ready || !/\bImageNet\b/i.test(descriptionOf(about));
  return ready;
}

function learn(stats) {
  [models, names] = [stats.models, namesIn(stats)];
  usual = names.includes(stats.default_model) ? stats.default_model : "";
  const stored = sessionStorage.getItem("model");
  if (stored !== null && !names.includes(stored)) {
    sessionStorage.removeItem("model");
    notice(`The model ${stored} is no longer served, so new photos go to ${names[0]}.`);
  }
  showOptions();
}

function fault(stats) {
  if (!stats) return NO_ANSWER;
  if (stats.queue_length === null) return NO_REDIS;
  return several() ? `The model ${chosenModel()} is not running right now, so its photos wait until it is.` : NO_SERVER;
}

const sentence = (about) => `Recognizes ${abilities(about) || "what its model was trained for"}. Model: ${chosenModel()}.`;

function abilities(about) {
  const { classes } = about;
  return descriptionOf(about) || (Number.isInteger(classes) && classes > 0 ? `${number(classes)} classes` : "");
}

const descriptionOf = ({ description }) =>
  typeof description === "string" ? description.trim().replace(/\.$/, "") : "";

// The choice

// Changes options in place, because a new element would lose the focus.
function showOptions() {
  for (const [name, option] of options) if (!names.includes(name)) option.remove(), options.delete(name);
  for (const name of names) if (!options.has(name)) options.set(name, makeOption(name));
  if (names.some((name, i) => $("options").children[i] !== options.get(name))) {
    $("options").append(...names.map((name) => options.get(name)));
  }
  names.forEach(showOption);
  $("choice").hidden = !several();
  document.documentElement.classList.toggle("several", several());
}

function makeOption(name) {
  const option = $("option").content.firstElementChild.cloneNode(true);
  option.querySelector("input").value = name;
  option.querySelector(".name").textContent = name;
  return option;
}

function showOption(name) {
  const [about, option] = [models[name], options.get(name)];
  option.querySelector("input").checked = name === chosenModel();
  option.querySelector(".abilities").textContent = isObject(about) ? abilities(about) : "";
  option.querySelector(".off").hidden = isReady(about);
}

// Calls `go` whenever another model is chosen.
export function onChoice(go) {
  $("choice").onchange = (event) => {
    sessionStorage.setItem("model", event.target.value);
    go();
  };
}
