// Finds the files of a drop, including those in folders.

const DEEPEST = 8; // levels of folders
const MOST_LOOKED_AT = 5_000; // entries of dropped folders
const IMAGE = /\.(jpe?g|jfif|png|gif|webp|bmp|tiff?|hei[cf]|avif)$/i; // names, since browsers do not know every image type

// Returns {files, folders, others}. `files` are the dropped files and the images in dropped folders, in order; `folders` is
// the number of dropped folders, `others` the number of files in them that are not images. All entries must be read before
// the first await, since the browser clears them when the event ends.
export async function filesOf(transfer) {
  const items = [...transfer.items].filter((item) => item.kind === "file");
  const dropped = items.map((item) => ({ file: item.getAsFile(), entry: item.webkitGetAsEntry?.() }));
  const found = { files: [], folders: 0, others: 0, lookedAt: 0 };
  for (const { file, entry } of dropped) {
    if (!entry?.isDirectory) found.files.push(file);
    else {
      found.folders++;
      await walk(entry, found, 1);
    }
  }
  return found;
}

async function walk(folder, found, depth) {
  const entries = (await entriesOf(folder)).sort((a, b) => a.name.localeCompare(b.name, "en", { numeric: true }));
  for (const entry of entries) {
    if (++found.lookedAt > MOST_LOOKED_AT) return;
    if (entry.isDirectory && depth < DEEPEST) await walk(entry, found, depth + 1);
    else if (entry.isFile) await take(entry, found);
  }
}

async function take(entry, found) {
  if (entry.name.startsWith(".")) return; // such as .DS_Store and ._photo.jpg of macOS
  const file = await new Promise((resolve) => entry.file(resolve, () => resolve(null)));
  if (file && IMAGE.test(file.name)) found.files.push(file);
  else found.others++;
}

// The browser returns at most a hundred entries at a time.
async function entriesOf(folder) {
  const reader = folder.createReader();
  const all = [];
  while (all.length < MOST_LOOKED_AT) {
    const some = await new Promise((resolve) => reader.readEntries(resolve, () => resolve([])));
    if (!some.length) break;
    all.push(...some);
  }
  return all;
}
