"""Train, evaluate, save and report the run that a recipe describes."""

import logging
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from timm.data import resolve_data_config
from transformers import TrainerCallback, set_seed

from hfvit.artifacts.checkpoint import check_same_model, remove_checkpoints
from hfvit.artifacts.constants import RECIPE_FILE
from hfvit.artifacts.output_dir import alone_in, claim_output_dir, clear_run, refuse_to_discard
from hfvit.artifacts.run_record import RunRecord
from hfvit.data.dataset import image_datasets
from hfvit.data.splits import load_splits
from hfvit.data.stream import ImageStream
from hfvit.data.stream_splits import stream_splits
from hfvit.data.text import load_tokenizer, split_texts
from hfvit.errors import HubError
from hfvit.evaluation.examples import Examples
from hfvit.finetuning.factory import trainer_for
from hfvit.finetuning.lora import add_lora
from hfvit.finetuning.progressive_resizing import ProgressiveSize
from hfvit.finetuning.zero_shot_head import start_from_text
from hfvit.hub.model_card import write_model_card
from hfvit.hub.push import Destination, check_destination, push
from hfvit.metrics.classification import ImageClassificationMetric, trainer_metrics
from hfvit.metrics.temperature import calibrate
from hfvit.models.factory import build_model
from hfvit.models.image_text import add_text_encoder
from hfvit.models.patch_size import train_patch_sizes
from hfvit.recipe.loader import Recipe, load_recipe
from hfvit.report.summary import summary_table, write_plots, write_training_images
from hfvit.training.distributed import require_shared_folder
from hfvit.transforms.augmentation import Augmentation
from hfvit.transforms.mixup import BatchMixing
from hfvit.transforms.preprocessing import Preprocessing
from hfvit.utils.environment import keep_freed_memory, use_all_cores
from hfvit.utils.files import write_text

logger = logging.getLogger("hfvit")


def main(argv: list[str] | None = None, callbacks: Sequence[TrainerCallback] = ()) -> None:
    """Run the recipe named by `argv[0]`; the options after it beat the file's values. `callbacks` watch it train."""
    recipe = load_recipe(sys.argv[1:] if argv is None else argv)
    args = recipe.training
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO if args.process_index == 0 else logging.WARNING)
    if recipe.idle and args.process_index == 0:
        logger.warning(recipe.idle)
    if args.device.type == "cpu":
        use_all_cores(args.world_size)
    with alone_in(args.output_dir, "training") if args.should_save else nullcontext():
        run(recipe, callbacks)


def run(recipe: Recipe, callbacks: Sequence[TrainerCallback] = ()) -> None:
    """Claim the output folder, load, build, read, train, evaluate, save and report, in this order."""
    # Claim
    args, data_args, model_args, augmentation_args = recipe.training, recipe.data, recipe.model, recipe.augmentation
    finetuning = recipe.finetuning
    destination = None
    if args.push_at_end and args.should_save:
        destination = Destination(args.hub_model_id, args.hub_private_repo, args.hub_revision, token=args.hub_token)
        destination = check_destination(destination)
    if args.overwrite_output_dir:
        refuse_to_discard(args.output_dir, {**model_args.checkpoints, **finetuning.checkpoints})
    with args.main_process_first(local=False, desc="claiming output_dir"):
        checkpoint = claim_output_dir(
            args.output_dir, args.resume_from_checkpoint, args.overwrite_output_dir, is_main=args.should_save
        )
    if not args.save_on_each_node:
        require_shared_folder(args.output_dir)

    # Load
    with args.main_process_first(desc="loading the data set"):
        if data_args.streaming:
            splits = stream_splits(**data_args.loading, seed=args.seed, check_length=args.check_stream)
        else:
            splits = load_splits(**data_args.loading, seed=args.seed)
    recipe.pin(splits.facts["dataset_commit"])
    logger.info(splits.describe())

    # Build
    set_seed(args.seed)
    model = build_model(
        splits.labels,
        model_name_or_path=model_args.model_name_or_path,
        architecture=model_args.architecture,
        image_size=model_args.image_size,
        timm_kwargs=model_args.timm_kwargs,
        revision=model_args.model_revision,
        frozen=model_args.freeze,
        preprocessing=data_args.preprocessing,
    )
    sizes = finetuning.progressive_image_size
    progressive = ProgressiveSize(model, sizes) if sizes else None
    tokenizer, texts = None, None
    if model_args.text_encoder:
        model = add_text_encoder(model, **model_args.text_options, frozen=model_args.freeze)
        tokenizer = load_tokenizer(
            model_args.text_encoder, model.text_model.config.vocab_size, model_args.text_encoder_revision
        )
        texts, read = split_texts(splits, tokenizer, model_args.max_text_length)
        logger.info(read)
    draws = [train_patch_sizes(model, model_args.patch_sizes)] if model_args.patch_sizes else []
    lora = add_lora(model, **finetuning.lora) if finetuning.finetuning == "lora" else None
    if checkpoint:
        check_same_model(checkpoint, model)
        logger.info("Resuming from %s", checkpoint)

    # Read
    data_config = resolve_data_config(model.config.pretrained_cfg)
    augmentation = Augmentation.from_config(data_config, **augmentation_args.image_changes)
    with args.main_process_first(desc="decoding the images"):
        datasets = image_datasets(
            splits,
            data_config,
            augmentation,
            seed=args.seed,
            repeats=augmentation_args.repeated_augmentation,
            show_progress=args.should_save and not args.disable_tqdm,
            texts=texts,
        )
    if data_args.streaming:
        datasets["train"] = ImageStream(
            splits.train,
            name=data_args.train_split,
            images=splits.facts["splits"]["train"]["rows"],
            classes=len(splits.labels),
            augmentation=augmentation,
            batch_size=args.per_device_train_batch_size,
            seed=args.seed,
            order_seed=args.order_seed,
            repeats=augmentation_args.repeated_augmentation,
            buffer_size=data_args.shuffle_buffer_size,
            process=args.process_index,
            processes=args.world_size,
        )
        logger.info(datasets["train"].describe())
    args.choose_workers(any(dataset.decodes for dataset in datasets.values()))
    if args.device.type == "cpu" and args.dataloader_num_workers == 0:
        keep_freed_memory()
    if finetuning.head_from_text and not checkpoint:
        start_from_text(
            model, splits.labels, datasets["validation"], Preprocessing(data_config), **finetuning.text_head
        )
    trainer = trainer_for(finetuning, model, splits.labels, datasets["train"])(
        model=model,
        args=args,
        train_dataset=datasets["train"],
        eval_dataset=datasets["validation"],
        compute_metrics=trainer_metrics(splits.labels),
        preprocessing=Preprocessing(data_config),
        mixing=BatchMixing(len(splits.labels), **augmentation_args.mixing),
        progressive=progressive,
        callbacks=[*draws, *callbacks],
    )

    # Train
    if args.overwrite_output_dir and args.should_save:
        # not before everything that a new run needs is known to work
        clear_run(args.output_dir, checkpoint, recipe.source)
    if args.should_save:
        write_training_images(*trainer.training_images(), splits.labels, args.output_dir)
    output = trainer.train(resume_from_checkpoint=checkpoint)
    if lora:
        if args.should_save:
            lora.save(args.output_dir)
        lora.merge()

    # Evaluate: the test split once, after everything that selects
    metric = ImageClassificationMetric(splits.labels)
    results, metrics, trainer.compute_metrics = {}, {}, None  # computed here, in full, and only once
    for role in ("validation", "test"):
        if role in datasets:
            prediction = trainer.predict(datasets[role], metric_key_prefix=role)
            results[role] = prediction.predictions, prediction.label_ids
            metrics[role] = metric.compute(predictions=prediction.predictions, references=prediction.label_ids)

    # Save and report
    trainer.save_model(args.output_dir)
    trainer.save_state()
    if args.should_save:
        plain_model = trainer.accelerator.unwrap_model(model)
        record = RunRecord.collect(recipe, splits, plain_model, trainer, output, metrics)
        record.temperature = calibrate(results)
        role = record.role
        examples = Examples(role, datasets[role], splits[role]["row"], *results[role], splits.labels)
        examples.add_attention(plain_model, trainer.preprocessing, args.device, trainer.is_sharded)
        examples.write(args.output_dir)
        record.examples = examples.record
        if tokenizer:
            tokenizer.save_pretrained(args.output_dir)
        write_text(Path(args.output_dir) / RECIPE_FILE, recipe.to_yaml())
        record.save(args.output_dir)
        write_plots(record, args.output_dir)
        write_model_card(record, args.output_dir)
        if not args.keep_checkpoints:
            remove_checkpoints(args.output_dir)
        print("\n" + summary_table(record, args.output_dir), flush=True)
        if destination:
            try:
                print(push(args.output_dir, destination))
            except HubError as error:  # the run is whole: what trained for hours has not failed
                print(f"hfvit: the run is finished and saved, but was not pushed: {error}", file=sys.stderr)
