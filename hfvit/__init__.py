"""hfvit: fine-tune Vision Transformers for image classification, from one recipe to a deployable checkpoint."""

from importlib import import_module
from importlib.metadata import version

__version__ = version("hfvit")

# Resolved on first use, so that `import hfvit` and `hfvit --help` never pay for torch.
_HOME_OF = {
    "AugmentationArguments": "recipe.arguments",
    "DataArguments": "recipe.arguments",
    "FinetuningArguments": "recipe.arguments",
    "ModelArguments": "recipe.arguments",
    "RunArguments": "recipe.arguments",
    "HFViTTrainingArguments": "recipe.training_args",
    "HFViTConfig": "models.configuration",
    "HFViTForImageClassification": "models.modeling",
    "HFViTFusionConfig": "models.image_text",
    "HFViTFusionForImageClassification": "models.image_text",
    "HFViTTrainer": "training.trainer",
    "export_onnx": "export.onnx",
    "load_classifier": "inference.classifier",
    "quantize_onnx": "export.quantization",
}

__all__ = list(_HOME_OF)


def __getattr__(name):
    if name not in _HOME_OF:
        raise AttributeError(f"module 'hfvit' has no attribute {name!r}; it has {', '.join(sorted(__all__))}")
    return getattr(import_module(f"hfvit.{_HOME_OF[name]}"), name)


def __dir__():
    return sorted(__all__)
