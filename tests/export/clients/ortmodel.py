"""ORTModelForImageClassification on an export folder: python ortmodel.py FOLDER IMAGE... -> JSON, {class: score}."""

import json
import sys

from optimum.onnxruntime import ORTModelForImageClassification
from transformers import AutoImageProcessor, pipeline

folder, *images = sys.argv[1:]
model = ORTModelForImageClassification.from_pretrained(folder)  # selects model.onnx among several files
processor = AutoImageProcessor.from_pretrained(folder)
classifier = pipeline("image-classification", model=model, image_processor=processor)
answers = classifier(images, top_k=model.config.num_labels)
print(json.dumps([{row["label"]: row["score"] for row in rows} for rows in answers]))
