// Shared by all modules of the page: find and make elements, announce texts to screen readers, format numbers.

export const $ = (id) => document.getElementById(id);

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// Announces a text to screen readers. They ignore a text that does not change, so a repeated text gets a space at its end.
export function say(where, text) {
  $(where).textContent = $(where).textContent === text ? `${text}\u00a0` : text;
}

export function notice(text) {
  $("notice").hidden = !text;
  $("notice").textContent = text;
  if (text) say("alert", text);
}

export const number = (value, digits = 0) =>
  value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });

export const plural = (count, what) => `${number(count)} ${what}${count === 1 ? "" : "s"}`;

export const labelText = ({ label }) => label.replaceAll("_", " "); // for labels such as golden_retriever

export function percent(share) {
  return share > 0 && share < 0.001 ? "< 0.1%" : `${number(Math.min(1, share) * 100, 1)}%`;
}

// A kB is 1,024 bytes, as in the service's own messages.
export function bytes(count) {
  if (count >= 2 ** 20) return `${number(count / 2 ** 20, 1)} MB`;
  return count >= 1000 ? `${number(count / 2 ** 10)} kB` : plural(count, "byte");
}

export function pixels(width, height) {
  const millions = (width * height) / 1e6;
  const sides = `${number(width)}\u00a0×\u00a0${number(height)}`;
  return millions >= 0.1 ? `${sides} (${number(millions, 1)}\u00a0megapixels)` : sides;
}
