// Sends one image to the service and reads the answer.

import { currentKey } from "./key.js";
import { addressOf } from "./models.js";

const ANSWER_LIMIT = 300_000; // milliseconds, above the longest REQUEST_TIMEOUT

// Returns {key, predictions, model, timing} or {key, status, error: {code, message}, retry, wait}. `key` is the API key that
// was sent, `model` the name of the model that answered; `retry` says whether to offer another try, `wait` after how many
// seconds.
export async function ask({ file, name, model, signal }) {
  const key = currentKey();
  const answer = (await unreadable(file)) ?? (await post(file, name, addressOf(model), key, signal));
  return { key, ...answer };
}

async function unreadable(file) {
  if (!file.size) return failure("empty", "This file is empty (0 bytes), so choose another.");
  try {
    await file.slice(0, 1).arrayBuffer();
  } catch {
    const message = "This can't be read: it may be a folder, or a file that was moved or changed. Choose it again.";
    return failure("unreadable", message);
  }
}

const failure = (code, message, retry = false) => ({ error: { code, message }, retry, wait: 0 });

async function post(file, name, address, key, signal) {
  const body = new FormData();
  body.append("image", file, name);
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  try {
    const limit = AbortSignal.any([signal, AbortSignal.timeout(ANSWER_LIMIT)]);
    return await understand(await fetch(address, { method: "POST", body, headers, signal: limit }), key);
  } catch (error) {
    if (error.name === "TimeoutError") return failure("timeout", "There was no answer within 5 minutes, so try again.", true);
    return failure("unreachable", "The service can't be reached, so check your network and try again.", true);
  }
}

async function understand(response, key) {
  const body = await response.json().catch(() => ({}));
  if (response.ok && body.predictions) {
    const model = response.headers.get("X-Model") ?? "";
    return { predictions: body.predictions, model, timing: timings(response.headers.get("Server-Timing")) };
  }
  const unknown = { code: "unknown", message: `The service answered with status ${response.status}, so try again later.` };
  const error = body.error ?? unknown;
  return {
    status: response.status,
    error: response.status === 401 ? { ...error, message: unauthorized(key) } : error,
    retry: response.status === 429 || response.status >= 500,
    wait: retryAfter(response.headers.get("Retry-After")),
  };
}

// Replaces the service's message, which tells programmers which header to send.
const unauthorized = (key) =>
  key ? "The key is not accepted: enter another above." : "A key is needed: enter it above.";

// Returns seconds. The header is a number of seconds or a date.
function retryAfter(header) {
  if (!header) return 0;
  const seconds = /^\d+$/.test(header) ? Number(header) : (Date.parse(header) - Date.now()) / 1000;
  return Math.max(0, Math.ceil(seconds || 0));
}

// Parses `prepare;dur=1.2, compute;dur=3.4;desc="batch of 2"` to {stage: {ms, note}}.
function timings(header) {
  const found = (header ?? "").matchAll(/(\w+);dur=([\d.]+)(?:;desc="([^"]*)")?/g);
  return Object.fromEntries([...found].map(([, stage, ms, note]) => [stage, { ms: Number(ms), note }]));
}
