// The README's lines for transformers.js: node classify_hub.mjs HUB USER/NAME DTYPE IMAGE... -> JSON, every class of each.
import { mkdtempSync } from "node:fs";
import { tmpdir } from "node:os";
import path from "node:path";
import {
  AutoModelForImageClassification, ImageClassificationPipeline, ImageProcessor, env,
} from "@huggingface/transformers";

const [hub, repository, dtype, ...images] = process.argv.slice(2);
env.remoteHost = `${hub}/`;
env.allowLocalModels = false;
env.cacheDir = mkdtempSync(path.join(tmpdir(), "transformers_js-")); // each run asks the Hub

const read = async (name) => (await fetch(`${env.remoteHost}${repository}/resolve/main/onnx/${name}`)).json();
const [config, steps] = await Promise.all([read("config.json"), read("preprocessor_config.json")]);
const model = await AutoModelForImageClassification.from_pretrained(repository, { config, dtype });
const processor = new ImageProcessor(steps);
const classifier = new ImageClassificationPipeline({ task: "image-classification", model, processor });
const answers = [];
for (const image of images) answers.push(await classifier(image, { top_k: null }));
console.log(JSON.stringify(answers));
