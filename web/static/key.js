// The API key, if the service requires one. It is kept until the tab is closed.

import { $ } from "./basics.js";

const MISSING = "This service needs an API key. Ask the person who runs it. The key is kept until you close this tab.";
const REFUSED = "This key is not accepted. Check it, or ask the person who runs this service for another.";
const IMPOSSIBLE = "This can't be a key: keys have letters, digits and symbols, but no spaces.";

export const currentKey = () => sessionStorage.getItem("key") ?? "";
export const keyWanted = () => wanted;

let wanted = false; // nothing is sent until a key is given

// Asks for a key after the service refused a request that had the key `refused` (an empty string if it had none).
export function askForKey(refused) {
  if (refused && refused === currentKey()) sessionStorage.removeItem("key");
  if (wanted) return; // do not disturb someone who is typing
  wanted = true;
  $("key-form").hidden = false;
  explain(refused ? REFUSED : MISSING, Boolean(refused));
  $("key").focus();
}

function explain(text, wrong) {
  $("key-hint").textContent = text;
  $("key-form").classList.toggle("wrong", wrong);
  $("key").setAttribute("aria-invalid", wrong);
}

// Calls `go` whenever a key is entered.
export function onKey(go) {
  $("key-form").onsubmit = (event) => {
    event.preventDefault();
    const key = $("key").value.trim();
    if (!/^[\x21-\x7e]+$/.test(key)) return explain(IMPOSSIBLE, true);
    sessionStorage.setItem("key", key);
    $("key").value = "";
    $("key-form").hidden = true;
    wanted = false;
    go();
  };
}
