// Web worker that loads the model and classifies images, so that the page stays responsive.
//
// In:  {kind: "start", page, base}, then {kind: "classify", id, image: Blob}.
// Out: {kind: "progress", loaded, total}, {kind: "ready"}, {kind: "failed", text}, and for each image
//      {kind: "answer", id, best, milliseconds, seen, size} or {kind: "refused", id, text}.

import { resizeAndCrop, pixelValues } from "./pixels.js";

let page, library, model;

const errorMessage = (error) => (typeof error === "number" ? `ONNX Runtime error ${error}` : error?.message || String(error));

self.onmessage = async ({ data: message }) => {
  if (message.kind === "start") {
    try {
      await start(message.page, message.base);
      self.postMessage({ kind: "ready" });
    } catch (error) {
      self.postMessage({ kind: "failed", text: errorMessage(error) });
    }
  } else {
    const { id } = message;
    try {
      self.postMessage({ kind: "answer", id, ...(await classify(message.image)) });
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

async function classify(blob) {
  const image = await decode(blob);
  const seen = resizeAndCrop(image, page.steps);
  const begin = performance.now();
  const scores = await logits(seen);
  const milliseconds = performance.now() - begin;
  if (!scores.every(Number.isFinite)) throw new Error("The logits are NaN or infinite.");
  const answers = Array.from(probabilities(scores), (probability, index) => {
    const label = page.labels[index];
    return page.thresholds ? { label, probability, found: probability >= page.thresholds[index] } : { label, probability };
  });
  const best = answers
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
