"""LoRA for timm models through peft."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from hfvit.artifacts.constants import ADAPTER_FILES, ADAPTER_FOLDER
from hfvit.errors import ModelError, RecipeError, nearest
from hfvit.models.factory import meta_copy
from hfvit.models.freezing import classifier_parameters
from hfvit.training.distributed import are_weights_sharded
from hfvit.utils.files import temporary_file, write_text
from hfvit.utils.optional import import_optional

PEFT_PREFIX = "base_model.model."  # of every name in an adapter file
# timm's names of attention projections. An output projection counts only beside an input projection, as a patch
# embedding also has a `proj`.
INPUT_PROJECTIONS = ("qkv", "q", "k", "v", "kv", "q_proj", "k_proj", "v_proj", "qkv_proj")
OUTPUT_PROJECTIONS = ("proj", "out_proj")
MLP = ("fc1", "fc2")


class Lora:
    """Save and merge the adapters of a model.

    Args:
        model: model of `add_lora`.
        tuner: peft's `LoraModel`.
        head: names of the classifier's parameters.
    """

    def __init__(self, model, tuner, head: list[str]):
        self.model = model
        self.tuner = tuner
        self.head = head

    def merge(self) -> None:
        """Merge the adapters into the weights and remove them."""
        with torch.no_grad():
            self.tuner.merge_and_unload()
        _set_separate_bias(self.model.timm_model, False)

    def save(self, output_dir: str | Path) -> Path:
        """Write `output_dir/adapter/` for `PeftModel.from_pretrained(timm_model, ...)`.

        It has to be called before `merge`. The head is included in `modules_to_save`, which peft does not do for a
        tuner without a `PeftModel`.
        """
        from peft import get_peft_model_state_dict

        timm_model = self.model.timm_model
        folder = Path(output_dir) / ADAPTER_FOLDER
        config_file, weights_file = (folder / name for name in ADAPTER_FILES)
        weights = get_peft_model_state_dict(timm_model, save_embedding_layers=False)
        weights |= {name: timm_model.get_parameter(name).detach() for name in self.head}
        weights = {PEFT_PREFIX + name: value.contiguous().cpu() for name, value in weights.items()}
        config = self.tuner.peft_config["default"].to_dict()
        config |= {"inference_mode": True, "modules_to_save": sorted({name.rpartition(".")[0] for name in self.head})}
        with temporary_file(weights_file) as temporary:
            save_file(weights, temporary, metadata={"format": "pt"})
        write_text(config_file, json.dumps(config, indent=2, default=_as_list, sort_keys=True) + "\n")
        return folder


def add_lora(model, rank: int, alpha: float, dropout: float = 0.0, targets: list[str] | None = None) -> Lora:
    """Add LoRA adapters (https://arxiv.org/abs/2106.09685) and freeze the rest.

    Args:
        model: an `HFViTForImageClassification`, changed in place.
        rank: rank of the update `alpha / rank * B @ A` of a weight.
        alpha: scale of the update.
        dropout: dropout before `A`.
        targets: last parts of layer names; None for all attention projections, or for the MLP layers of a network
            without attention. timm's `qkv` is one layer, so that query, key and value share `A`.

    Raises:
        ModelError: no layer has a name of `targets`, or the network does not call such a layer.
        RecipeError: peft is not installed, or weights are sharded.
    """
    peft = import_optional("peft", "lora", "finetuning: lora", RecipeError)
    if are_weights_sharded():
        raise RecipeError("finetuning: lora requires unsharded weights. Launch without FSDP or DeepSpeed.")
    timm_model = model.timm_model
    layers = target_layers(timm_model, targets)
    head = classifier_parameters(timm_model)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        # A pattern matches full names; a list would match suffixes, and so the patch embedding.
        target_modules="|".join(re.escape(name) for name in layers),
    )
    tuner = peft.LoraModel(timm_model, config, "default")
    for parameter in head:
        parameter.requires_grad = True
    _set_separate_bias(timm_model, True)
    model.eval_frozen_modules()
    names = {id(parameter): name for name, parameter in timm_model.named_parameters()}
    _require_gradients(model)
    return Lora(model, tuner, [names[id(parameter)] for parameter in head])


def target_layers(timm_model: nn.Module, targets: list[str] | None = None) -> list[str]:
    """Return the full names of the layers to adapt, see `add_lora`."""
    kinds = (nn.Linear, nn.Conv2d)
    layers = {
        name: m for name, m in timm_model.named_modules() if isinstance(m, kinds) and getattr(m, "groups", 1) == 1
    }
    head = {id(parameter) for parameter in classifier_parameters(timm_model)}
    layers = {name: m for name, m in layers.items() if id(m.weight) not in head}
    last = {name: name.rpartition(".")[2] for name in layers}
    if targets:
        unknown = [target for target in targets if target not in last.values()]
        if unknown:
            known = ", ".join(sorted(set(last.values())))
            raise ModelError(
                f"lora_targets: no layer named '{unknown[0]}' in the model (found: {known})."
                f"{nearest(unknown[0], set(last.values()))}"
            )
        return [name for name in layers if last[name] in targets]
    attentions = {name.rpartition(".")[0] for name in layers if last[name] in INPUT_PROJECTIONS}
    found = [
        name
        for name in layers
        if name.rpartition(".")[0] in attentions and last[name] in INPUT_PROJECTIONS + OUTPUT_PROJECTIONS
    ]
    found = found or [name for name in layers if last[name] in MLP]
    if not found:
        known = ", ".join(sorted(set(last.values())))
        raise ModelError(
            f"finetuning: lora found no attention or MLP layers in {type(timm_model).__name__}. Pass lora_targets"
            f" (found: {known})."
        )
    return found


def _set_separate_bias(timm_model: nn.Module, separate: bool) -> None:
    """Let BEiT, EVA and Swin v2 call their `qkv` layer and add its bias separately.

    By default they only read the weight of the layer, which would bypass the adapter.
    """
    for module in timm_model.modules():
        if hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = separate


def _require_gradients(model) -> None:
    """Raise `ModelError` unless every trainable weight gets a gradient."""
    meta_model = meta_copy(model).eval()
    with torch.device("meta"):
        meta_model(torch.zeros(2, 3, *model.config.image_size)).logits.sum().backward()
    idle = [
        name for name, parameter in meta_model.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    if idle:
        layers = sorted({re.sub(r"\.lora_[AB]\..*", "", name).removeprefix("timm_model.") for name in idle})
        raise ModelError(
            f"lora_targets: {model.config.architecture} does not call {layers[0]}"
            f"{f' and {len(layers) - 1} more' if len(layers) > 1 else ''}, so that adapters would not train. Choose"
            " other layers."
        )


def _as_list(value):
    """Convert peft's sets and enumerations to JSON."""
    return sorted(value) if isinstance(value, set) else getattr(value, "value", str(value))
