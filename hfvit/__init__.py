"""Fine-tune Vision Transformers for image classification, and export them.

Train
    inspect("photos", html="photos.html")      check a data set first; returns an Inspection
    train("quickstart", output_dir="out")      a recipe, as `hfvit train` does; returns a RunRecord
    find_lr("quickstart")                      learning rate range test; returns a LearningRateCurve
    HFViTTrainer(model=..., args=...,          your own datasets.Dataset, transforms, loss and metrics
        train_dataset=..., eval_dataset=...)
    HFViTTrainingArguments                     its arguments
    HFViTForImageClassification                a timm model as a PreTrainedModel: from_pretrained(...)

Use
    load_classifier("out")                     checkpoint, Hub id, ONNX file or TensorRT engine -> Classifier
    predict("out", "image.jpg")                the classes of an image, a list, or a folder
    embed("out", ["a.jpg", "b.jpg"])           pooled features, to search or cluster images
    extend("out", "new_classes", "out2")       new classes from a few images each, without training
    soup(["out", "out2"], "out3")              the mean of the weights of several runs

Evaluate and export
    export_onnx(model, "model.onnx")           one ONNX file, checked against PyTorch
    quantize_onnx("model.onnx", "int8.onnx")   its INT8 version
    validate("out", ["out/onnx"])              accuracy, agreement and speed of a checkpoint and its exports

Share
    write_report("out", html=True)             plots, model card and page of a run
    push("out", "user/name")                   the run on the Hub, in one commit
    RunRecord.load("out")                      run.json: metrics, history, versions, hardware

The command line does the same: `hfvit --help`. Documentation: docs/python.md in the repository.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

__version__ = version("hfvit")

if TYPE_CHECKING:
    from hfvit import errors as errors
    from hfvit.artifacts.run_record import RunRecord as RunRecord
    from hfvit.evaluation.extend import extend as extend
    from hfvit.evaluation.soup import soup as soup
    from hfvit.evaluation.validate import validate as validate
    from hfvit.export.onnx import export_onnx as export_onnx
    from hfvit.export.quantization import quantize_onnx as quantize_onnx
    from hfvit.hub.push import push as push
    from hfvit.inference.classifier import Classifier as Classifier
    from hfvit.inference.classifier import load_classifier as load_classifier
    from hfvit.inference.classifier import predict as predict
    from hfvit.inference.embed import embed as embed
    from hfvit.lr_finder import find_lr as find_lr
    from hfvit.models.configuration import HFViTConfig as HFViTConfig
    from hfvit.models.image_text import HFViTFusionConfig as HFViTFusionConfig
    from hfvit.models.image_text import HFViTFusionForImageClassification as HFViTFusionForImageClassification
    from hfvit.models.modeling import HFViTForImageClassification as HFViTForImageClassification
    from hfvit.multirun import train as train
    from hfvit.recipe.arguments import AugmentationArguments as AugmentationArguments
    from hfvit.recipe.arguments import DataArguments as DataArguments
    from hfvit.recipe.arguments import FinetuningArguments as FinetuningArguments
    from hfvit.recipe.arguments import ModelArguments as ModelArguments
    from hfvit.recipe.arguments import RunArguments as RunArguments
    from hfvit.recipe.training_args import HFViTTrainingArguments as HFViTTrainingArguments
    from hfvit.report.inspection import inspect as inspect
    from hfvit.report.write import write_report as write_report
    from hfvit.training.trainer import HFViTTrainer as HFViTTrainer

# Public name -> module. Resolved on first use, so that `import hfvit` and `hfvit --help` do not import torch.
_PUBLIC = {
    "AugmentationArguments": "recipe.arguments",
    "Classifier": "inference.classifier",
    "DataArguments": "recipe.arguments",
    "FinetuningArguments": "recipe.arguments",
    "HFViTConfig": "models.configuration",
    "HFViTForImageClassification": "models.modeling",
    "HFViTFusionConfig": "models.image_text",
    "HFViTFusionForImageClassification": "models.image_text",
    "HFViTTrainer": "training.trainer",
    "HFViTTrainingArguments": "recipe.training_args",
    "ModelArguments": "recipe.arguments",
    "RunArguments": "recipe.arguments",
    "RunRecord": "artifacts.run_record",
    "embed": "inference.embed",
    "export_onnx": "export.onnx",
    "extend": "evaluation.extend",
    "find_lr": "lr_finder",
    "inspect": "report.inspection",
    "load_classifier": "inference.classifier",
    "predict": "inference.classifier",
    "push": "hub.push",
    "quantize_onnx": "export.quantization",
    "soup": "evaluation.soup",
    "train": "multirun",
    "validate": "evaluation.validate",
    "write_report": "report.write",
}


if not TYPE_CHECKING:  # type checkers would accept any name

    def __getattr__(name):
        if name == "errors":
            return import_module("hfvit.errors")
        if name not in _PUBLIC:
            raise AttributeError(f"module 'hfvit' has no attribute {name!r}; it has {', '.join(sorted(_PUBLIC))}")
        return getattr(import_module(f"hfvit.{_PUBLIC[name]}"), name)


def __dir__():
    return sorted([*_PUBLIC, "errors"])
