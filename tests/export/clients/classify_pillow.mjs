// The documentation's lines for transformers.js with Pillow's resize: node classify_pillow.mjs FOLDER DTYPE IMAGE... -> JSON.
import path from "node:path";
import { Tensor, env, pipeline } from "@huggingface/transformers";
import { pillowProcessor } from "./pixels.mjs";

const [folder, dtype, ...images] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = path.dirname(path.resolve(folder));
const classifier = await pipeline("image-classification", path.basename(folder), { subfolder: "", dtype });
classifier.processor = pillowProcessor(classifier.processor.image_processor.config, Tensor);
const answers = [];
for (const image of images) answers.push(await classifier(image, { top_k: null }));
console.log(JSON.stringify(answers));
