"""Every field of the installed `TrainingArguments` is honored, refused, or named as without effect."""

import dataclasses

import pytest
from transformers import TrainingArguments

from hfvit.errors import RecipeError
from hfvit.recipe.loader import ignored_options
from hfvit.recipe.training_args import NOT_AVAILABLE, WITHOUT_EFFECT, HFViTTrainingArguments

# Fields that `Trainer` or hfvit honors, with another value than the default.
HONORED = {
    "per_device_train_batch_size": 4, "num_train_epochs": 2.0, "max_steps": 7, "learning_rate": 0.1,
    "lr_scheduler_type": "constant", "lr_scheduler_kwargs": {}, "warmup_steps": 3, "optim": "sgd",
    "weight_decay": 0.1, "adam_beta1": 0.5, "adam_beta2": 0.5, "adam_epsilon": 0.1,
    "max_grad_norm": 2.0, "label_smoothing_factor": 0.1, "bf16": True, "bf16_full_eval": True, "fp16_full_eval": True,
    "activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False},
    "torch_compile": True, "torch_compile_backend": "eager", "torch_compile_mode": "default",
    "torch_empty_cache_steps": 5, "logging_strategy": "epoch", "logging_steps": 3, "logging_first_step": True,
    "log_on_each_node": False, "log_level": "error", "log_level_replica": "error", "disable_tqdm": True,
    "run_name": "name", "project": "name", "trackio_space_id": "a/b", "trackio_bucket_id": "a/b",
    "trackio_static_space_id": "a/b", "eval_strategy": "steps", "eval_steps": 3, "eval_delay": 1,
    "per_device_eval_batch_size": 3, "eval_on_start": True, "eval_use_gather_object": True,
    "eval_accumulation_steps": 2, "save_only_model": True, "save_strategy": "best", "save_steps": 3,
    "save_on_each_node": True, "save_total_limit": 2, "hub_token": "t", "hub_private_repo": True,
    "hub_model_id": "a/b", "hub_revision": "r", "load_best_model_at_end": False, "metric_for_best_model": "loss",
    "greater_is_better": True, "ignore_data_skip": True, "restore_callback_states_from_checkpoint": False,
    "full_determinism": False, "seed": 3, "data_seed": 4, "use_cpu": True, "dataloader_in_order": False,
    "dataloader_num_workers": 1, "ddp_find_unused_parameters": True, "ddp_bucket_cap_mb": 3,
    "ddp_broadcast_buffers": False, "ddp_static_graph": True, "ddp_timeout": 30, "skip_memory_metrics": False,
    "resume_from_checkpoint": "auto",
}  # fmt: skip
# Honored with conditions that other tests have: several processes, workers, a GPU, a tracker, a push, a folder.
HONORED_ELSEWHERE = {
    "output_dir", "fp16", "tf32", "gradient_checkpointing", "gradient_checkpointing_kwargs", "report_to",
    "push_to_hub", "hub_strategy", "accelerator_config", "dataloader_pin_memory", "dataloader_persistent_workers",
    "dataloader_prefetch_factor", "dataloader_multiprocessing_context", "ddp_backend", "fsdp", "fsdp_config",
    "local_rank", "optim_args",
}  # fmt: skip
REFUSED = {
    "remove_unused_columns": True, "logging_nan_inf_filter": True, "dataloader_drop_last": True,
    "auto_find_batch_size": True, "enable_jit_checkpoint": True, "batch_eval_metrics": True,
    "prediction_loss_only": True, "eval_do_concat_batches": False, "include_for_metrics": ["inputs"],
    "train_sampling_strategy": "group_by_length", "include_num_input_tokens_seen": "all", "label_names": ["x"],
    "neftune_noise_alpha": 5.0, "use_liger_kernel": True, "liger_kernel_config": {"rope": True},
    "debug": "underflow_overflow", "deepspeed": "x.json", "parallelism_config": {"tp_size": 2},
    "gradient_accumulation_steps": 2,
}  # fmt: skip
UNUSED = {name for names in WITHOUT_EFFECT.values() for name in names}


def test_every_field_of_training_arguments_is_accounted_for():
    groups = [set(HONORED), HONORED_ELSEWHERE, set(NOT_AVAILABLE), UNUSED]
    assert set().union(*groups) == {field.name for field in dataclasses.fields(TrainingArguments)}
    assert sum(map(len, groups)) == len(set().union(*groups))
    assert set(REFUSED) == set(NOT_AVAILABLE)


@pytest.mark.parametrize("key", HONORED)
def test_honored_field_keeps_its_value(key, tmp_path):
    value = HONORED[key]
    options = {"output_dir": str(tmp_path), "global_batch_size": 8, "use_cpu": True, key: value}
    kept = getattr(HFViTTrainingArguments(**options), key)
    assert getattr(kept, "value", kept) == value


@pytest.mark.parametrize("key", REFUSED)
def test_refused_field_is_an_error(key, tmp_path):
    with pytest.raises(RecipeError, match=f"^{key}:"):
        HFViTTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **{key: REFUSED[key]})


def test_unused_fields_are_reported():
    message = ignored_options(UNUSED, {})
    assert all(name in message for name in UNUSED)


@pytest.mark.parametrize("kwargs", [{"num_steps": 2}, {"num_step": 2}, 2])
@pytest.mark.parametrize("per_device", [None, 4])
def test_accumulation_of_accelerate_is_an_error(tmp_path, kwargs, per_device):
    config = {"gradient_accumulation_kwargs": kwargs}
    options = {"global_batch_size": 8, "per_device_train_batch_size": per_device, "accelerator_config": config}
    with pytest.raises(RecipeError, match=r"^accelerator_config: "):
        HFViTTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options)


def test_other_accumulation_options_are_kept(tmp_path):
    given = {"sync_each_batch": True}
    config = {"gradient_accumulation_kwargs": given}
    args = HFViTTrainingArguments(output_dir=str(tmp_path), use_cpu=True, accelerator_config=config)
    kept = args.accelerator_config.gradient_accumulation_kwargs
    assert kept == given
    assert kept is not given  # the Trainer changes it


def test_false_counts_no_tokens(tmp_path):
    args = HFViTTrainingArguments(output_dir=str(tmp_path), use_cpu=True, include_num_input_tokens_seen=False)
    assert args.include_num_input_tokens_seen == "no"


@pytest.mark.parametrize(("options", "expected"), [({"max_steps": 5}, 5), ({"max_steps": 600}, 500), ({}, 500)])
def test_logging_steps_beyond_max_steps_log_the_last_step(tmp_path, options, expected):
    assert HFViTTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options).logging_steps == expected
    stream = HFViTTrainingArguments(output_dir=str(tmp_path), use_cpu=True, global_batch_size=8, num_train_epochs=2)
    stream.fit_stream(47)
    assert stream.logging_steps == 10


def test_epochs_of_a_run(tmp_path):
    options = {"output_dir": str(tmp_path), "use_cpu": True, "global_batch_size": 8}
    assert HFViTTrainingArguments(num_train_epochs=2.5, **options).epochs == 2.5
    for fit in (HFViTTrainingArguments.fit, HFViTTrainingArguments.fit_stream):
        args = HFViTTrainingArguments(max_steps=15, eval_strategy="steps", **options)
        assert args.epochs is None
        fit(args, 47)
        assert args.epochs == 3.0
