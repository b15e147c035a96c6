"""Names of options in other libraries, for the hint of an unknown option."""

from collections.abc import Iterable

from hfvit.errors import MIN_SIMILARITY, nearest
from hfvit.recipe.training_args import NOT_AVAILABLE, WITHOUT_EFFECT

# Key of a recipe -> names of timm's and transformers' training scripts, of other trainers, and common ones.
_NAMES_OF = {
    "learning_rate": "lr lr0 lr_base",
    "num_train_epochs": "epochs max_epochs",
    "max_steps": "steps train_steps_per_epoch",
    "warmup_steps": "warmup warmup_epochs warmup_ratio",
    "global_batch_size": "batch batch_size batchsize bs train_batch_size",
    "per_device_eval_batch_size": "eval_batch_size validation_batch_size",
    "per_device_train_batch_size": "accumulate grad_accum_steps",
    "optim": "opt optimizer",
    "optim_args": "momentum opt_kwargs",
    "weight_decay": "wd",
    "max_grad_norm": "clip_grad gradient_clip_val",
    "lr_scheduler_type": "sched scheduler lr_scheduler cos_lr",
    "lr_scheduler_kwargs": "sched_kwargs lrf min_lr warmup_lr",
    "model_name_or_path": "model initial_checkpoint pretrained_path backbone_weights checkpoint",
    "model_args": "model_kwargs",
    "architecture": "arch",
    "dataset_name": "data data_dir data_root dataset train_dir validation_dir val_dir train_csv val_csv",
    "image_column": "image_column_name csv_image_column input_key",
    "label_column": "label_column_name csv_label_column target_key",
    "group_column": "groups group patient_id",
    "label_separator": "label_delimiter",
    "class_names": "classes class_map names",
    "problem_type": "task classification_task",
    "validation_split": "val_split",
    "validation_fraction": "train_val_split",
    "max_train_samples": "fraction train_num_samples",
    "max_eval_samples": "val_num_samples",
    "image_size": "imgsz img_size input_size resolution",
    "image_mean": "mean",
    "image_std": "std",
    "interpolation": "train_interpolation",
    "crop_scale": "scale",
    "crop_ratio": "ratio",
    "horizontal_flip": "hflip fliplr random_flip",
    "vertical_flip": "vflip flipud",
    "color_jitter": "hsv_h hsv_s hsv_v color_jitter_prob",
    "policy": "aa auto_augment grayscale_prob gaussian_blur_prob degrees shear translate random_rotate",
    "repeated_augmentation": "aug_repeats",
    "mixup_alpha": "mixup",
    "cutmix_alpha": "cutmix",
    "mix_off_epochs": "mixup_off_epoch close_mosaic",
    "random_erasing": "reprob erasing",
    "label_smoothing_factor": "smoothing label_smoothing",
    "drop_rate": "drop dropout",
    "drop_path_rate": "drop_path drop_connect",
    "ema_decay": "ema model_ema model_ema_decay",
    "class_balance": "class_weight class_weights cls_pw",
    "finetuning": "lora",
    "teacher": "kd_model_name",
    "distillation": "kd_distill_type",
    "distillation_alpha": "distill_loss_weight",
    "distillation_temperature": "kd_temperature",
    "dataloader_num_workers": "workers num_workers",
    "bf16": "amp amp_dtype precision mixed_precision",
    "fp16": "half",
    "torch_compile": "torchcompile compile",
    "activation_checkpointing": "grad_checkpointing",
    "full_determinism": "deterministic",
    "output_dir": "output out work_dir",
    "overwrite_output_dir": "overwrite exist_ok",
    "resume_from_checkpoint": "resume resume_interrupted",
    "save_steps": "save_period save_every_num_steps",
    "save_total_limit": "checkpoint_hist",
    "eval_steps": "val_interval val_check_interval val_every_num_steps",
    "logging_steps": "log_interval log_every_num_steps",
    "early_stopping_patience": "patience",
    "metric_for_best_model": "eval_metric monitor callback_monitor watch_metric",
    "eval_tta": "tta augment",
    "report_to": "log_wandb logger loggers",
    "project": "wandb_project",
    "run_name": "name experiment",
}
OTHER_NAMES = {name: key for key, names in _NAMES_OF.items() for name in names.split()}

_DEVICES = "Choose GPUs with CUDA_VISIBLE_DEVICES or `accelerate launch`, and the CPU with use_cpu."
_CLASSES = "The classes are those of the data set."
# Name of another library's option -> where hfvit has it.
SET_ELSEWHERE = {
    **dict.fromkeys(("device", "devices", "gpus", "accelerator", "strategy", "num_nodes", "no_cuda"), _DEVICES),
    **dict.fromkeys(("num_classes", "num_labels", "nc", "ignore_mismatched_sizes"), _CLASSES),
    "pretrained": "Set model_name_or_path for pretrained weights, or architecture to train from scratch.",
    "cache_dir": "Set the environment variable HF_HOME.",
    "config": "Pass a recipe as the first argument.",
}

_UNUSABLE = {*NOT_AVAILABLE, *(key for keys in WITHOUT_EFFECT.values() for key in keys)}


def key_hint(name: str, keys: Iterable[str], prefix: str = "") -> str:
    """Return " Did you mean 'x'?" for an unknown key, or where it is set.

    Args:
        name: the unknown key.
        keys: known keys.
        prefix: prefix of options on the command line.
    """
    if name in SET_ELSEWHERE:
        return f" {SET_ELSEWHERE[name]}"
    if name in OTHER_NAMES:
        return f" Did you mean '{prefix}{OTHER_NAMES[name]}'?"
    key_of = OTHER_NAMES | {key: key for key in keys if key not in _UNUSABLE}
    shown = {other: prefix + key for other, key in key_of.items()}
    return nearest(name.lower(), shown, MIN_SIMILARITY, shown)
