// transformers.js on an export folder: node classify.mjs FOLDER DTYPE|default IMAGE... -> JSON, the best class of each.
import path from "node:path";
import { env, pipeline } from "@huggingface/transformers";

const [folder, dtype, ...images] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = path.dirname(path.resolve(folder));
const options = { subfolder: "" }; // flat folder; the default is the subfolder `onnx`
if (dtype !== "default") options.dtype = dtype;

const classifier = await pipeline("image-classification", path.basename(folder), options);
const answers = [];
for (const image of images) answers.push(await classifier(image, { top_k: null }));
console.log(JSON.stringify(answers));
