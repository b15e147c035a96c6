// Web worker that loads the model and classifies images, so that the page stays responsive.
//
// In:  {kind: "start", page, base}, then {kind: "classify", id, image: Blob}, then {kind: "explain", id}.
// Out: {kind: "progress", loaded, total}, {kind: "ready"}, {kind: "failed", text}, and for each image
//      {kind: "answer", id, best, isUnlike, milliseconds, seen, size} or {kind: "refused", id, text}; for each
//      explanation {kind: "explaining", id, part}, then {kind: "explained", id, seen, label}.

import { resizeAndCrop, pixelValues } from "./pixels.js";

const CELLS = 7; // rows and columns of the occlusion map
const COLOR = [230, 110, 0]; // as utils/overlay.py
const STRENGTH = 0.8;

let page, library, model;
let latest = {}; // the last classified image: id, pixels, logits

const errorMessage = (error) => (typeof error === "number" ? `ONNX Runtime error ${error}` : error?.message || String(error));

self.onmessage = async ({ data: message }) => {
  if (message.kind === "start") {
    try {
      await start(message.page, message.base);
      self.postMessage({ kind: "ready" });
    } catch (error) {
      self.postMessage({ kind: "failed", text: errorMessage(error) });
    }
  } else if (message.kind === "explain") {
    await explain(message.id);
  } else {
    const { id } = message;
    try {
      self.postMessage({ kind: "answer", id, ...(await classify(message.image, id)) });
    } catch (error) {
      self.postMessage({ kind: "refused", id, text: errorMessage(error) });
    }
  }
};

async function start(description, base) {
  page = description;
  const at = (path) => new URL(path, base).href;
  const loaded = {};
  const progress = (name, bytes) => {
    loaded[name] = bytes;
    const sum = Object.values(loaded).reduce((total, value) => total + value, 0);
    self.postMessage({ kind: "progress", loaded: sum, total: Math.max(sum, page.bytes) });
  };
  library = await import(at(page.library));
  const { env } = library;
  env.allowRemoteModels = false;
  env.allowLocalModels = true;
  env.localModelPath = base;
  // These caches never ask the server whether a file has changed; the browser's HTTP cache does.
  env.useBrowserCache = false;
  env.useWasmCache = false;
  env.backends.onnx.wasm.wasmPaths = { mjs: at(page.runtime.mjs), wasm: at(page.runtime.wasm) };
  env.backends.onnx.wasm.wasmBinary = await download(at(page.runtime.wasm), (bytes) => progress("runtime", bytes));
  model = await library.AutoModelForImageClassification.from_pretrained("model", {
    device: "wasm",
    dtype: page.dtype,
    progress_callback: (event) => {
      if (event.status === "progress" && event.file.endsWith(".onnx")) progress("model", event.loaded);
    },
  });
  const [height, width] = page.steps.crop ?? [].concat(page.steps.resize, page.steps.resize);
  await logits({ data: new Uint8ClampedArray(width * height * 4), width, height }); // the first run is the slowest
}

async function download(url, progress) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${url}: ${answer.status} ${answer.statusText}`);
  const parts = [];
  let bytes = 0;
  const reader = answer.body.getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    parts.push(part.value);
    progress((bytes += part.value.length));
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

async function logits(seen) {
  const shape = [1, 3, seen.height, seen.width];
  const pixel_values = new library.Tensor("float32", pixelValues(seen, page.steps), shape);
  return (await model({ pixel_values })).logits.data;
}

async function classify(blob, id) {
  const image = await decode(blob);
  const seen = resizeAndCrop(image, page.steps);
  const begin = performance.now();
  const scores = await logits(seen);
  const milliseconds = performance.now() - begin;
  if (!scores.every(Number.isFinite)) throw new Error("The logits are NaN or infinite.");
  latest = { id, seen, scores: Array.from(scores) };
  const answers = Array.from(probabilities(scores), (probability, index) => {
    const label = page.labels[index];
    return page.thresholds ? { label, probability, found: probability >= page.thresholds[index] } : { label, probability };
  });
  const best = answers
    .sort((one, other) => other.probability - one.probability)
    .slice(0, page.top_k);
  const isUnlike = page.max_energy !== null && energy(scores) > page.max_energy;
  return { best, isUnlike, milliseconds, seen, size: [image.width, image.height] };
}

/** Energy of an image, higher for images unlike the training data (metrics/out_of_distribution.py). */
function energy(scores) {
  if (page.multi_label) return -scores.reduce((sum, score) => sum + Math.max(score, 0) + Math.log1p(Math.exp(-Math.abs(score))), 0);
  const most = Math.max(...scores);
  return -most - Math.log(scores.reduce((sum, score) => sum + Math.exp(score - most), 0));
}

/** Find what speaks for the predicted class: hide each part of the image, and see how much less probable it becomes. */
async function explain(id) {
  const { seen, scores } = latest;
  if (id !== latest.id) return;
  const before = probabilities(scores);
  const index = before.indexOf(Math.max(...before));
  const gray = page.steps.mean.map((value) => value / page.steps.scale);
  const relevance = new Float32Array(CELLS * CELLS);
  for (let cell = 0; cell < CELLS * CELLS; cell += 1) {
    const hidden = occluded(seen, cell, gray);
    const after = probabilities(Array.from(await logits(hidden)));
    if (id !== latest.id) return; // another image was chosen meanwhile
    relevance[cell] = Math.max(0, Math.log(before[index]) - Math.log(Math.max(after[index], 1e-12)));
    self.postMessage({ kind: "explaining", id, part: (cell + 1) / (CELLS * CELLS) });
  }
  self.postMessage({ kind: "explained", id, seen: highlight(seen, relevance), label: page.labels[index] });
}

/** Cover a part, one and a half cells wide, so that parts overlap. */
function occluded({ data, width, height }, cell, gray) {
  const covered = new Uint8ClampedArray(data);
  const [row, column] = [Math.floor(cell / CELLS), cell % CELLS];
  const bounds = (place, size) => [(place - 0.25) * size / CELLS, (place + 1.25) * size / CELLS].map((edge) => Math.min(Math.max(Math.round(edge), 0), size));
  const [[top, bottom], [left, right]] = [bounds(row, height), bounds(column, width)];
  for (let y = top; y < bottom; y += 1) {
    for (let x = left; x < right; x += 1) covered.set(gray, 4 * (y * width + x));
  }
  return { data: covered, width, height };
}

/** Color the relevant parts, and show the others in gray (utils/overlay.py). */
function highlight({ data, width, height }, relevance) {
  const most = Math.max(...relevance, 1e-12);
  const at = (row, column) => relevance[Math.min(Math.max(row, 0), CELLS - 1) * CELLS + Math.min(Math.max(column, 0), CELLS - 1)] / most;
  const shown = new Uint8ClampedArray(data);
  for (let y = 0; y < height; y += 1) {
    const v = ((y + 0.5) * CELLS) / height - 0.5;
    for (let x = 0; x < width; x += 1) {
      const u = ((x + 0.5) * CELLS) / width - 0.5;
      const [row, column] = [Math.floor(v), Math.floor(u)];
      const [dv, du] = [v - row, u - column];
      const upper = at(row, column) * (1 - du) + at(row, column + 1) * du;
      const lower = at(row + 1, column) * (1 - du) + at(row + 1, column + 1) * du;
      const opacity = STRENGTH * (upper * (1 - dv) + lower * dv);
      const place = 4 * (y * width + x);
      const luma = 0.299 * data[place] + 0.587 * data[place + 1] + 0.114 * data[place + 2];
      for (let channel = 0; channel < 3; channel += 1) shown[place + channel] = luma * (1 - opacity) + COLOR[channel] * opacity;
    }
  }
  return { data: shown, width, height };
}

function probabilities(scores) {
  if (page.multi_label) return scores.map((score) => 1 / (1 + Math.exp(-score)));
  const most = Math.max(...scores);
  const powers = Array.from(scores, (score) => Math.exp((score - most) / page.temperature));
  const sum = powers.reduce((total, value) => total + value, 0);
  return powers.map((value) => value / sum);
}

/** Decode as Pillow does: apply the EXIF orientation, ignore color profiles. */
async function decode(blob) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob, { imageOrientation: "from-image", colorSpaceConversion: "none" });
  } catch {
    throw new Error("Your browser cannot read this file as an image.");
  }
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  if (!context) throw new Error(`The image of ${width} × ${height} pixels is too large for your browser.`);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return context.getImageData(0, 0, width, height);
}
