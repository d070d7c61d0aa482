// What the served model recognises, and the sample photos where it knows them.

import { $, number } from "./basics.js";

const NO_SERVER = "No model is running at the moment, so photos have to wait for one.";
const NO_REDIS = "The service can't reach its queue at the moment, so photos are not answered.";
const NO_ANSWER = "The service does not say what it recognises at the moment.";

// Shows what `stats` says (null: nothing), and returns whether a model is served.
export function showModel(stats) {
  const servers = Object.values(stats?.model_servers ?? {});
  const texts = [...new Set(servers.map(sentence))]; // several servers of one model say it once
  $("model").textContent = texts.join(" ") || fault(stats);
  $("samples").hidden = !servers.length || !servers.every(knowsPhotos);
  return servers.length > 0;
}

function fault(stats) {
  if (!stats) return NO_ANSWER;
  return stats.queue_length === null ? NO_REDIS : NO_SERVER;
}

// Model servers say these things, so none of them may be missing or of another type.
function sentence({ model, classes, description }) {
  const name = typeof model === "string" && model ? `Model: ${model}.` : "";
  const count = Number.isInteger(classes) && classes > 0 ? `${number(classes)} classes` : "what its model was made for";
  return `Recognises ${descriptionOf({ description }) || count}. ${name}`.trim();
}

const descriptionOf = ({ description }) =>
  typeof description === "string" ? description.trim().replace(/\.$/, "") : "";

const knowsPhotos = (server) => /\bImageNet\b/i.test(descriptionOf(server));
