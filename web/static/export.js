// Copies the results to the clipboard as JSON or CSV. If the browser refuses, shows them as text to copy or save.

import { $, plural, say } from "./basics.js";

const FORMULA = /^(\s*[=+\-@＝＋－＠]|[\t\r\n])/; // the start of a cell that a spreadsheet may run as a formula

// Returns the JSON that the service answers to several images, plus the names of each file and its model.
function asJson(cards) {
  const results = cards.map(({ name, model, answer: { predictions, error } }) =>
    predictions ? { file: name, model, success: true, predictions } : { file: name, model, success: false, error }
  );
  return `${JSON.stringify({ success: results.every((each) => each.success), results }, null, 2)}\n`;
}

// Returns a line for each image in the format of RFC 4180: the best label comes before the error and the
// model, the other labels after them.
function asCsv(cards) {
  const most = Math.max(1, ...cards.map(({ answer }) => answer.predictions?.length ?? 0));
  const others = Array.from({ length: most - 1 }, (_, i) => [`label_${i + 2}`, `probability_${i + 2}`]);
  const head = ["file", "label", "probability", "error", "model", ...others.flat()];
  const rows = cards.map(({ name, model, answer: { predictions = [], error } }) => {
    const [best = ["", ""], ...rest] = predictions.map(({ label, probability }) => [label, probability]);
    const empty = Array(2 * (most - 1) - 2 * rest.length).fill("");
    return [name, ...best, error?.message ?? "", model, ...rest.flat(), ...empty];
  });
  return [head, ...rows].map((row) => `${row.map(cell).join(",")}\r\n`).join("");
}

function cell(value) {
  if (typeof value === "number") return String(value);
  const text = FORMULA.test(value) ? `'${value}` : value;
  return /[",\r\n]|^\s|\s$/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

// Copies the results of `cards`, which must have an answer, as `form` (JSON or CSV). `total` is the number of images on the page.
export async function copy(form, cards, total) {
  const text = form === "JSON" ? asJson(cards) : asCsv(cards);
  closeExport();
  const what = cards.length < total ? `${cards.length} of ${plural(total, "result")}` : plural(cards.length, "result");
  try {
    await navigator.clipboard.writeText(text); // missing unless the page came by HTTPS or from localhost
    confirm(form, `Copied ${what} as ${form}.`);
  } catch {
    offer(form, text, what);
  }
}

function confirm(form, text) {
  const button = $(`copy-${form.toLowerCase()}`);
  say("status", text);
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = `Copy ${form}`), 2000);
}

function offer(form, text, what) {
  $("export").hidden = false;
  $("export-text").value = text;
  $("export").querySelector("label").textContent =
    `The browser does not let this page copy. Here is the ${form} of ${what}: copy it yourself, or save it.`;
  const type = form === "JSON" ? "application/json" : "text/csv";
  const mark = form === "CSV" ? "\ufeff" : ""; // tells Excel that the file is UTF-8
  $("save").href = URL.createObjectURL(new Blob([mark, text], { type: `${type};charset=utf-8` }));
  $("save").download = `results.${form.toLowerCase()}`;
  $("export-text").focus();
  $("export-text").select();
  $("export-text").scrollTop = 0; // show the beginning, not the end
}

export function closeExport() {
  if ($("export").hidden) return;
  URL.revokeObjectURL($("save").href);
  $("export-text").value = "";
  $("export").hidden = true;
}

$("export-close").onclick = () => {
  closeExport();
  $("copy-json").focus();
};
