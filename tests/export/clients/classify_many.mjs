// transformers.js on several export folders: node classify_many.mjs IMAGE FOLDER... -> JSON, {folder: classes or error}.
import path from "node:path";
import { env, pipeline } from "@huggingface/transformers";

const [image, ...folders] = process.argv.slice(2);
env.allowRemoteModels = false;
const answers = {};
for (const folder of folders) {
  env.localModelPath = path.dirname(path.resolve(folder));
  try {
    const classifier = await pipeline("image-classification", path.basename(folder), { subfolder: "", dtype: "fp32" });
    answers[folder] = await classifier(image, { top_k: null });
    await classifier.dispose();
  } catch (error) {
    answers[folder] = String(error);
  }
}
console.log(JSON.stringify(answers));
