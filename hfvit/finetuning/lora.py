"""LoRA for timm models through peft."""

import json
import re
from pathlib import Path

import torch
from accelerate.utils import parse_flag_from_env
from safetensors.torch import save_file
from torch import nn

from hfvit.artifacts.constants import ADAPTER_FILES, ADAPTER_FOLDER
from hfvit.errors import ModelError, RecipeError, nearest
from hfvit.models.factory import without_storage
from hfvit.models.freezing import classifier_parameters
from hfvit.utils.files import temporary_file, write_text

PEFT_PREFIX = "base_model.model."  # of every name in an adapter file
# What the projections of an attention are called in timm; the output's is taken with the others of its module alone,
# for a patch embedding has a `proj`, too.
INPUT_PROJECTIONS = ("qkv", "q", "k", "v", "kv", "q_proj", "k_proj", "v_proj", "qkv_proj")
OUTPUT_PROJECTIONS = ("proj", "out_proj")
MLP = ("fc1", "fc2")


class Lora:
    """The adapters that `add_lora` has put into a model."""

    def __init__(self, model, tuner, head: list[str]):
        self.model, self.tuner, self.head = model, tuner, head

    def merge(self) -> None:
        """Add the adapters into the weights that they belong to, and take them out."""
        with torch.no_grad():
            self.tuner.merge_and_unload()
        _set_separate_bias(self.model.timm_model, False)

    def save(self, output_dir: str | Path) -> Path:
        """Write `output_dir/adapter/` for `peft.PeftModel.from_pretrained(timm_model, folder)`; before `merge`.

        The head is in it, as a module to save: peft alone would leave it out, and a loaded adapter would answer with
        an untrained one.
        """
        from peft import get_peft_model_state_dict

        timm_model, folder = self.model.timm_model, Path(output_dir) / ADAPTER_FOLDER
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
    """Freeze `model` (modeling.HFViTForImageClassification) but for its head, and give its layers LoRAs that train.

    Args:
        rank, alpha: the update of a weight is `alpha / rank * B @ A`, of that rank.
        dropout: of what `A` sees.
        targets: last parts of the layers' names; None for the projections of every attention, or the two layers of
            every MLP in a network without attention. timm's `qkv` is one layer: its three parts share `A` and have
            rows of `B` of their own.

    Raises `ModelError` for a name that the model does not have, or a layer whose weight its network reads without
    calling it; `RecipeError` where peft is missing or weights are sharded.
    """
    try:
        from peft import LoraConfig, LoraModel
    except ImportError:
        raise RecipeError("finetuning: lora needs peft; install it with `pip install hfvit[lora]`.") from None
    if parse_flag_from_env("ACCELERATE_USE_FSDP") or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise RecipeError("finetuning: lora cannot be merged from sharded weights; launch without FSDP or DeepSpeed.")
    timm_model = model.timm_model
    layers = target_layers(timm_model, targets)
    head = classifier_parameters(timm_model)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        # A pattern over whole names: a list would match the ends of names, and a patch embedding's, too.
        target_modules="|".join(re.escape(name) for name in layers),
    )
    tuner = LoraModel(timm_model, config, "default")
    for parameter in head:
        parameter.requires_grad = True
    _set_separate_bias(timm_model, True)
    model.rest_frozen()
    names = {id(parameter): name for name, parameter in timm_model.named_parameters()}
    _require_gradients(model)
    return Lora(model, tuner, [names[id(parameter)] for parameter in head])


def target_layers(timm_model: nn.Module, targets: list[str] | None = None) -> list[str]:
    """Full names of the layers that get a LoRA; see `add_lora`."""
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
                f"lora_targets: no layer of the model is named '{unknown[0]}'; its layers are {known}."
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
            f"finetuning: {type(timm_model).__name__} has neither an attention nor an MLP of the usual names; choose"
            f" lora_targets among {known}."
        )
    return found


def _set_separate_bias(timm_model: nn.Module, separate: bool) -> None:
    """BEiT, EVA and Swin v2 keep the bias of `qkv` apart and read the layer's weight without calling it, LoRA and all;
    with this switch of theirs they call it and add the bias. The result is the same."""
    for module in timm_model.modules():
        if hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = separate


def _require_gradients(model) -> None:
    """Raise `ModelError` unless every weight that should train gets a gradient; tried on a copy without storage."""
    ghost = without_storage(model).eval()
    with torch.device("meta"):
        ghost(torch.zeros(2, 3, *model.config.image_size)).logits.sum().backward()
    idle = [name for name, parameter in ghost.named_parameters() if parameter.requires_grad and parameter.grad is None]
    if idle:
        layers = sorted({re.sub(r"\.lora_[AB]\..*", "", name).removeprefix("timm_model.") for name in idle})
        raise ModelError(
            f"lora_targets: {model.config.architecture} does not call {layers[0]}"
            f"{f' and {len(layers) - 1} more' if len(layers) > 1 else ''}, so a LoRA there would learn nothing; choose"
            " others."
        )


def _as_list(value):
    """JSON of what peft keeps as a set or an enumeration."""
    return sorted(value) if isinstance(value, set) else getattr(value, "value", str(value))
