// Polls /stats for the line about the model and for the figures, as long as one of them needs it.

import { $ } from "./basics.js";
import { POLL, forgetFigures, note, showState } from "./figures.js";
import { showModel } from "./model.js";

const LOOK_AGAIN = 3_000; // milliseconds between polls until the model is known
const LIMIT = 5_000; // milliseconds

let timer = 0;
let known = false; // whether the model is known

export async function look() {
  clearTimeout(timer);
  const stats = await fetchStats();
  known = showModel(stats);
  if ($("live").open) showFigures(stats);
  planNext();
}

// Plans one poll, however often look() was called meanwhile.
function planNext() {
  clearTimeout(timer);
  const { open } = $("live");
  if (!document.hidden && (open || !known)) timer = setTimeout(look, open ? POLL : LOOK_AGAIN);
}

function showFigures(stats) {
  if (stats) note(stats);
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
  if ($("live").open) return look();
  forgetFigures();
  planNext();
};

document.addEventListener("visibilitychange", () => {
  clearTimeout(timer);
  if (!document.hidden) look();
});

export function startLooking() {
  $("live").hidden = false;
  if (!document.hidden) look();
}
