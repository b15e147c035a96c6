// The documentation's lines for several labels: node classify_labels.mjs FOLDER IMAGE... -> JSON, the sigmoid of every class.
import path from "node:path";
import { RawImage, env, pipeline } from "@huggingface/transformers";

const [folder, ...images] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = path.dirname(path.resolve(folder));
const classifier = await pipeline("image-classification", path.basename(folder), { subfolder: "", dtype: "fp32" });
const answers = [];
for (const image of images) {
  const { pixel_values } = await classifier.processor(await RawImage.read(image));
  const { logits } = await classifier.model({ pixel_values });
  const scores = logits.sigmoid().tolist()[0];
  answers.push(scores.map((score, index) => ({ label: classifier.model.config.id2label[index], score })));
}
console.log(JSON.stringify(answers));
