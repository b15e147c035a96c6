// Loads the model and answers pictures, away from the page's own thread, which never stalls so.
//
// In:  {kind: "start", page, base}, then {kind: "classify", id, picture: Blob}.
// Out: {kind: "progress", loaded, total}, {kind: "ready"}, {kind: "failed", text}, and for each picture
//      {kind: "answer", id, best, milliseconds, seen, size} or {kind: "refused", id, text}.

import { fitted, pixelValues } from "./pixels.js";

let page, library, model;

const told = (error) => (typeof error === "number" ? `ONNX Runtime's error ${error}` : error?.message || String(error));

self.onmessage = async ({ data: message }) => {
  if (message.kind === "start") {
    try {
      await start(message.page, message.base);
      self.postMessage({ kind: "ready" });
    } catch (error) {
      self.postMessage({ kind: "failed", text: told(error) });
    }
  } else {
    const { id } = message;
    try {
      self.postMessage({ kind: "answer", id, ...(await classify(message.picture)) });
    } catch (error) {
      self.postMessage({ kind: "refused", id, text: told(error) });
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
  // The browser's own cache asks the server whether a file has changed; these would show an old model for ever.
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

async function classify(picture) {
  const image = await decode(picture);
  const seen = fitted(image, page.steps);
  const begin = performance.now();
  const scores = await logits(seen);
  const milliseconds = performance.now() - begin;
  if (!scores.every(Number.isFinite)) throw new Error("The model's answer is no number.");
  const best = Array.from(probabilities(scores), (probability, index) => ({ label: page.labels[index], probability }))
    .sort((one, other) => other.probability - one.probability)
    .slice(0, page.top_k);
  return { best, milliseconds, seen, size: [image.width, image.height] };
}

function probabilities(scores) {
  if (page.multi_label) return scores.map((score) => 1 / (1 + Math.exp(-score)));
  const most = Math.max(...scores);
  const powers = Array.from(scores, (score) => Math.exp(score - most));
  const sum = powers.reduce((total, value) => total + value, 0);
  return powers.map((value) => value / sum);
}

/** Upright by its EXIF orientation; no color profile is applied, since Pillow applies none. */
async function decode(picture) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(picture, { imageOrientation: "from-image", colorSpaceConversion: "none" });
  } catch {
    throw new Error("This is no picture that your browser can read.");
  }
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  if (!context) throw new Error(`A picture of ${width} × ${height} pixels is too large for your browser.`);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return context.getImageData(0, 0, width, height);
}
