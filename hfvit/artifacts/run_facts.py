"""Collect the contents of run.json from a finished training."""

import math
import platform
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

import hfvit
from hfvit.utils.environment import hardware, installed_versions
from hfvit.utils.hub_ids import is_local

PACKAGES = ("torch", "torchvision", "timm", "transformers", "accelerate", "datasets", "evaluate", "scikit-learn")


def collect_facts(recipe, splits, model, trainer, output, metrics: dict) -> dict:
    """Everything that a reader needs to judge and repeat a run; plain JSON values only.

    `output` is what `trainer.train()` returned; `metrics` maps a split's role to its `classification_metrics`.
    """
    args, state = recipe.training, trainer.state
    best = state.best_model_checkpoint if args.load_best_model_at_end else None
    base = recipe.model.model_name_or_path
    return {
        "hfvit_version": hfvit.__version__,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "model": {
            "architecture": model.config.architecture,
            "base_model": base,
            "is_local": base is not None and is_local(base),
            # timm's checkpoints carry their license; a network trained from nothing has none yet.
            "base_license": model.config.pretrained_cfg.get("license") if base else None,
            **({"texts": _text_facts(recipe.model, model)} if recipe.model.text_encoder else {}),
            "image_size": list(model.config.image_size),
            "parameters": sum(p.numel() for p in model.parameters()),
            "trained_parameters": trainer.trained_parameters,
            "preprocessing": {
                key: model.config.pretrained_cfg.get(key)
                for key in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
            },
        },
        "data": {**splits.facts, "selected_by": "validation" if best or "probe" in output.metrics else None},
        "recipe": recipe.values,
        "seeds": {"seed": args.seed, "data_seed": args.data_seed, "full_determinism": args.full_determinism},
        "metrics": metrics,
        "training": {
            "steps": state.global_step,
            "epochs": state.epoch,
            "best_step": int(Path(best).name.removeprefix("checkpoint-")) if best else None,
            "best_metric": state.best_metric if best else None,
            "best_metric_name": args.metric_for_best_model if best else None,
            "seconds": output.metrics["train_runtime"],
            **trainer.speed.overall(),
            "flops_per_image": trainer.speed.flops_per_image,
            "peak_flops": trainer.speed.peak_flops,
            "resumed_at_step": trainer.resumed_at_step,
            "precision": args.mixed_precision,
            "processes": args.world_size,
            "data_workers": args.dataloader_num_workers,
            "per_device_batch_size": trainer.out_of_memory.micro.size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps * trainer.out_of_memory.micro.count,
            "per_device_eval_batch_size": trainer.out_of_memory.eval_batch_size,
            **({"probe": output.metrics["probe"]} if "probe" in output.metrics else {}),
        },
        "events": trainer.events,
        "versions": {
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            **installed_versions(PACKAGES),
        },
        "hardware": hardware(),
        "history": [{key: _json_number(value) for key, value in entry.items()} for entry in state.log_history],
    }


def _text_facts(arguments, model) -> dict:
    """What reads the texts, and how they meet the images."""
    return {
        "text_encoder": arguments.text_encoder,
        "is_local": is_local(arguments.text_encoder),
        "model_type": model.text_model.config.model_type,
        "fusion": model.config.fusion,
        "max_text_length": model.config.max_text_length,
        "parameters": sum(p.numel() for p in model.text_model.parameters()),
    }


def _json_number(value):
    """JSON has no NaN and no infinity; fp16's loss scaler meets infinite gradient norms as a matter of course."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def command_line() -> str:
    """The command as typed, without the folder of its program and the value of any option that names a token."""
    words, hide = [Path(sys.argv[0]).name], False
    for word in sys.argv[1:]:
        option, _, value = word.partition("=")
        is_secret = option.startswith("--") and "token" in option.lower()
        words.append("***" if hide else f"{option}=***" if is_secret and value else word)
        hide = is_secret and not value
    return shlex.join(words)
