// Polls /stats until the chosen model is running, and while the figures are open.

import { $ } from "./basics.js";
import { POLL, addSample, forgetFigures, showState } from "./figures.js";
import { onChoice, showModels } from "./models.js";

const MODEL_POLL = 3_000; // milliseconds between polls until the chosen model is running
const LIMIT = 5_000; // milliseconds that a poll may take

let timer = 0;
let ready = false; // whether the chosen model is running

export async function poll() {
  clearTimeout(timer);
  const stats = await fetchStats();
  ready = showModels(stats);
  if ($("live").open) showFigures(stats);
  planNext();
}

// Plans the next poll, and only one even if poll() was called several times.
function planNext() {
  clearTimeout(timer);
  const { open } = $("live");
  if (!document.hidden && (open || !ready)) timer = setTimeout(poll, open ? POLL : MODEL_POLL);
}

function showFigures(stats) {
  if (stats) addSample(stats);
  showState(stats);
}

// Returns null if there was no answer.
async function fetchStats() {
  try {
    const response = await fetch("stats", { signal: AbortSignal.timeout(LIMIT) });
    return response.ok ? await response.json() : null;
  } catch {
    return null;
  }
}

$("live").ontoggle = () => {
  if ($("live").open) return poll();
  forgetFigures();
  planNext();
};

onChoice(poll);

document.addEventListener("visibilitychange", () => {
  clearTimeout(timer);
  if (!document.hidden) poll();
});

export function startPolling() {
  $("live").hidden = false;
  if (!document.hidden) poll();
}
