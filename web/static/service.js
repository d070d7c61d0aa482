// Polls /stats until the model is known, and while the figures are open.

import { $ } from "./basics.js";
import { POLL, addSample, forgetFigures, showState } from "./figures.js";
import { showModel } from "./model.js";

const MODEL_POLL = 3_000; // milliseconds between polls until the model is known
const LIMIT = 5_000; // milliseconds that a poll may take

let timer = 0;
let known = false; // whether the model is known

export async function poll() {
  clearTimeout(timer);
  const stats = await fetchStats();
  known = showModel(stats);
  if ($("live").open) showFigures(stats);
  planNext();
}

// Plans the next poll, and only one even if poll() was called several times.
function planNext() {
  clearTimeout(timer);
  const { open } = $("live");
  if (!document.hidden && (open || !known)) timer = setTimeout(poll, open ? POLL : MODEL_POLL);
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

document.addEventListener("visibilitychange", () => {
  clearTimeout(timer);
  if (!document.hidden) poll();
});

export function startPolling() {
  $("live").hidden = false;
  if (!document.hidden) poll();
}
