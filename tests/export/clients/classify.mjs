// transformers.js on an export folder: node classify.mjs FOLDER DTYPE|default PICTURE... -> JSON, the best class of each.
import path from "node:path";
import { env, pipeline } from "@huggingface/transformers";

const [folder, dtype, ...pictures] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = path.dirname(path.resolve(folder));
const options = { subfolder: "" }; // the folder is flat; transformers.js would look in its subfolder `onnx`
if (dtype !== "default") options.dtype = dtype;

const classifier = await pipeline("image-classification", path.basename(folder), options);
const answers = [];
for (const picture of pictures) answers.push(await classifier(picture, { top_k: null }));
console.log(JSON.stringify(answers));
