"""hfvit: fine-tune Vision Transformers for image classification, from one recipe to a deployable checkpoint."""

from importlib import import_module
from importlib.metadata import version

__version__ = version("hfvit")

# Resolved on first use, so that `import hfvit` and `hfvit --help` never pay for torch.
_HOME_OF = {
    "AugmentationArguments": "config",
    "DataArguments": "config",
    "FinetuningArguments": "finetuning_args",
    "ModelArguments": "model_args",
    "RunArguments": "config",
    "HFViTTrainingArguments": "training_args",
    "HFViTConfig": "model_config",
    "HFViTForImageClassification": "modeling",
    "HFViTFusionConfig": "image_text",
    "HFViTFusionForImageClassification": "image_text",
    "HFViTTrainer": "trainer",
    "export_onnx": "export.onnx",
    "load_classifier": "inference",
    "quantize_onnx": "export.quantize",
}

__all__ = list(_HOME_OF)


def __getattr__(name):
    if name not in _HOME_OF:
        raise AttributeError(f"module 'hfvit' has no attribute {name!r}; it has {', '.join(sorted(__all__))}")
    return getattr(import_module(f"hfvit.{_HOME_OF[name]}"), name)


def __dir__():
    return sorted(__all__)
