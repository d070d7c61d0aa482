// The page at /: takes photos that are chosen, taken with a camera, dropped, pasted, or picked from the samples.

import { $, notice, plural } from "./basics.js";
import { filesOf } from "./folders.js";
import { classifyAll } from "./results.js";
import { startPolling } from "./service.js";

for (const input of [$("files"), $("photo")]) {
  input.onchange = () => {
    classifyAll([...input.files]);
    input.value = ""; // so that the same file can be chosen again
  };
}

$("form").onsubmit = (event) => event.preventDefault();
document.documentElement.classList.add("scripted");
$("files").required = false;
$("camera").hidden = false;

// Samples

$("samples").onclick = async (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  try {
    const response = await fetch(button.value);
    if (!response.ok) throw Error(response.status);
    const photo = await response.blob();
    classifyAll([new File([photo], button.value.split("/").at(-1), { type: photo.type })]);
  } catch {
    notice("The sample can't be loaded, so check your network and try again.");
  }
};

// Drops

const hasFiles = (event) => event.dataTransfer?.types.includes("Files"); // rather than text
const dropping = (on) => document.documentElement.classList.toggle("dropping", on);

for (const event of ["dragenter", "dragover"]) {
  document.addEventListener(event, (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    dropping(true);
  });
}
document.addEventListener("dragleave", (event) => event.relatedTarget || dropping(false)); // no target: the drag left the window
document.addEventListener("drop", async (event) => {
  dropping(false);
  if (!hasFiles(event)) return;
  event.preventDefault();
  const { files, folders, others } = await filesOf(event.dataTransfer);
  classifyAll(files, others || (folders && !files.length) ? folderText(files.length, others) : "");
});

function folderText(images, others) {
  if (!images) return "There are no images in this folder, so drop another one, or the images themselves.";
  const text = others === 1 ? "is not an image and was" : "are not images and were";
  return `${plural(others, "file")} in the folder ${text} left out.`;
}

document.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files ?? [])];
  if (!files.length) return; // text for the key field
  event.preventDefault();
  classifyAll(files);
});

startPolling();
