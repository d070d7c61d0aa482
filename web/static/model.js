// Shows what the model recognizes, and the sample photos if the model knows them.

import { $, number } from "./basics.js";

const NO_SERVER = "No model is running right now, so photos wait until one is.";
const NO_REDIS = "The service can't reach its queue right now, so it can't classify photos.";
const NO_ANSWER = "The service does not answer right now, so its model is unknown.";

// Shows the models in `stats` (null if there was no answer), and returns whether there is one.
export function showModel(stats) {
  const servers = Object.values(stats?.model_servers ?? {});
  const texts = [...new Set(servers.map(sentence))]; // servers of the same model are shown once
  $("model").textContent = texts.join(" ") || fault(stats);
  $("samples").hidden = !servers.length || !servers.every(knowsPhotos);
  return servers.length > 0;
}

function fault(stats) {
  if (!stats) return NO_ANSWER;
  return stats.queue_length === null ? NO_REDIS : NO_SERVER;
}

// These values come from model servers, so any of them may be missing or have another type.
function sentence({ model, classes, description }) {
  const name = typeof model === "string" && model ? `Model: ${model}.` : "";
  const count = Number.isInteger(classes) && classes > 0 ? `${number(classes)} classes` : "what its model was trained for";
  return `Recognizes ${descriptionOf({ description }) || count}. ${name}`.trim();
}

const descriptionOf = ({ description }) =>
  typeof description === "string" ? description.trim().replace(/\.$/, "") : "";

const knowsPhotos = (server) => /\bImageNet\b/i.test(descriptionOf(server));
