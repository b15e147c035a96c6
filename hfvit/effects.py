"""Which keys of a recipe have an effect in which mode: one table, from which a key set in vain is told.

A key that would mislead (a teacher for a linear probe) is refused where its section is checked; what stands here is
harmless, and one line says so before any work.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple


class Need(NamedTuple):
    """`keys` have an effect only where `met` holds, which `need` says as a recipe would."""

    keys: str
    need: str
    met: Callable[[Mapping[str, Any]], Any]


def _augments(values: Mapping[str, Any]) -> bool:
    return values["finetuning"] != "linear_probe" or values["probe_passes"] > 0


# The first need of a key that is not met is the one that is told.
NEEDS = (
    Need("lora_rank lora_alpha lora_dropout lora_targets", "finetuning: lora", lambda v: v["finetuning"] == "lora"),
    Need("probe_c probe_passes", "finetuning: linear_probe", lambda v: v["finetuning"] == "linear_probe"),
    Need(
        "learning_rate weight_decay layer_decay num_train_epochs max_steps warmup_steps lr_scheduler_type optim"
        " max_grad_norm label_smoothing_factor drop_rate attn_drop_rate drop_path_rate mix_off_epochs"
        " repeated_augmentation early_stopping_patience nan_policy nan_lr_factor nan_max_rewinds eval_steps save_steps"
        " save_strategy keep_checkpoints",
        "finetuning: full or lora",
        lambda v: v["finetuning"] != "linear_probe",
    ),
    Need(
        "crop_scale crop_ratio horizontal_flip policy rand_augment_magnitude rand_augment_num_ops",
        "probe_passes above 0",
        _augments,
    ),
    Need("head_templates", "head_from_text", lambda v: v["head_from_text"]),
    Need("distillation distillation_alpha distillation_temperature", "teacher", lambda v: v["teacher"]),
    Need("distillation_temperature", "distillation: soft", lambda v: v["distillation"] == "soft"),
    Need("text_encoder_revision fusion fusion_layers max_text_length", "text_encoder", lambda v: v["text_encoder"]),
    Need("fusion_layers", "fusion: cross_attention", lambda v: v["fusion"] == "cross_attention"),
    Need("model_revision", "model_name_or_path", lambda v: v["model_name_or_path"]),
    Need("validation_fraction", "no validation_split", lambda v: not v["validation_split"]),
    Need("shuffle_buffer_size", "streaming: true", lambda v: v["streaming"]),
    Need(
        "rand_augment_magnitude rand_augment_num_ops",
        "policy: rand_augment",
        lambda v: v["policy"] == "rand_augment",
    ),
    Need(
        "mix_off_epochs",
        "mixup_alpha, cutmix_alpha or random_erasing",
        lambda v: v["mixup_alpha"] or v["cutmix_alpha"] or v["random_erasing"],
    ),
    Need("nan_lr_factor nan_max_rewinds", "nan_policy: rewind", lambda v: v["nan_policy"] == "rewind"),
    Need("eval_steps", "eval_strategy: steps", lambda v: v["eval_strategy"] == "steps"),
    Need("save_steps", "save_strategy: steps", lambda v: v["save_strategy"] == "steps"),
    Need(  # where eval_steps is not given, it is logging_steps
        "logging_steps",
        "logging_strategy: steps",
        lambda v: "steps" in (v["logging_strategy"], v["eval_strategy"]),
    ),
)


def without_effect(given: Iterable[str], values: Mapping[str, Any]) -> str | None:
    """A sentence about the keys of `given` that have no effect beside `values`, which holds all keys; else None."""
    idle: dict[str, list[str]] = {}
    for key in given:
        unmet = next((need.need for need in NEEDS if key in need.keys.split() and not need.met(values)), None)
        if unmet:
            idle.setdefault(unmet, []).append(key)
    if not idle:
        return None
    told = "; ".join(f"{', '.join(keys)} (needs {need})" for need, keys in idle.items())
    return f"Set without any effect: {told}."
