"""Compare a checkpoint and its exports on one labeled split and record the result."""

from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch

from hfvit.artifacts.artifact import revision_arguments
from hfvit.evaluation.compare import Comparison, check_recordable, compare, record
from hfvit.evaluation.split import evaluation_split
from hfvit.inference.classifier import Classifier, check_tta, load_classifier
from hfvit.inference.execution_providers import Providers
from hfvit.utils.checks import check_integer, check_number


def validate(
    reference: str | Path,
    others: str | Path | Sequence[str | Path] = (),
    *,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    split: str | None = None,
    image_column: str | None = None,
    label_column: list[str] | str | None = None,
    text_column: str | None = None,
    max_samples: int | None = None,
    seed: int = 42,
    max_accuracy_drop: float = 0.5,
    min_agreement: float | None = None,
    patch_size: int | Sequence[int] = (),
    merge_tokens: int | Sequence[int] = (),
    bf16: bool = False,
    tta: str | None = None,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    threads: int | None = None,
    providers: Providers | None = None,
    show_progress: bool = True,
    revision: str | None = None,
) -> Comparison:
    """Compare artifacts with a reference on the same images, and save the result.

    Args:
        reference: checkpoint folder, Hub id, ONNX file, TensorRT engine or export folder.
        others: one or more artifacts of the same kinds to compare with the reference.
        dataset_name: Hub id, folder or `digits`. Default: the data set of the reference's recipe.
        dataset_config_name: configuration of the data set.
        split: split of the data set. Default: the validation images of the recipe.
        image_column: name of the image column. Default: found by its type.
        label_column: name of the label column. Default: found by its type.
        text_column: name of the text column. Default: the recipe's.
        max_samples: number of images, sampled with `seed`. Default: all.
        seed: seed of `max_samples`.
        max_accuracy_drop: largest drop in accuracy beyond chance, in percentage points.
        min_agreement: smallest fraction of images, 0 to 1, with the class that the reference predicts. Default: none.
        patch_size: also compare the reference with this or these patch sizes, in pixels (FlexiViT).
        merge_tokens: also compare the reference with this number, or these, of tokens merged per block (ToMe).
        bf16: also compare the reference with bfloat16 weights.
        tta: "flip" to evaluate each artifact also with the mean of the logits of an image and its mirror image.
        batch_size: images per batch, also for the throughput. Default: that of the reference's device.
        device: `cpu`, `cuda`, ... Default: CUDA if available.
        threads: CPU threads. Default: PyTorch's.
        providers: ONNX Runtime execution providers of ONNX files, instead of `device`.
        show_progress: show a progress bar on a terminal.
        revision: branch, tag or commit of the reference, if it is a Hub id. Default: main.

    Returns:
        Accuracy, agreement and speed of each artifact, whether all are within the limits (`passed`), and all metrics
        of the reference (`metrics`). All but `metrics` is saved in `run.json`, `export.json` and `engine.json` of the
        artifacts.

    Raises:
        ModelError: an artifact cannot be loaded, or an option has a wrong value; nothing was saved.
        DataError: the data set cannot be used.
    """
    check_tta(tta)
    check_integer("max_samples", max_samples)
    check_integer("seed", seed, 0, optional=False)
    check_integer("batch_size", batch_size)
    check_number("max_accuracy_drop", max_accuracy_drop, 100)
    check_number("min_agreement", min_agreement, 1, optional=True)
    hub = revision_arguments(reference, revision)
    others = [others] if isinstance(others, str | Path) else list(others)
    paths = [reference, *others]
    check_recordable(paths)
    labeled = evaluation_split(
        reference,
        dataset_name=dataset_name,
        dataset_config_name=dataset_config_name,
        split=split,
        image_column=image_column,
        label_column=label_column,
        text_column=text_column,
        max_samples=max_samples,
        seed=seed,
        revision=revision,
    )

    def load(**change: Any) -> Classifier:
        classifier = load_classifier(reference, device, threads, **hub, **change)
        if revision is not None:  # OTHER may be another revision
            classifier.name = f"{reference}@{revision}"
        return classifier

    changes: list[dict[str, Any]] = []
    for name, values in (("patch_size", patch_size), ("merge_tokens", merge_tokens)):
        changes += [{name: value} for value in ([values] if isinstance(values, Integral | str) else values)]
    changes += [{"bf16": True}] if bf16 else []
    variants = [load(**change) for change in changes]
    comparison = compare(
        load() if hub else reference,
        [*others, *variants],
        labeled,
        max_accuracy_drop=max_accuracy_drop,
        min_agreement=min_agreement,
        batch_size=batch_size,
        device=device,
        threads=threads,
        providers=providers,
        tta=tta,
        all_metrics=True,
        show_progress=show_progress,
    )
    measured = [*paths, *[reference] * len(variants)]
    comparison.saved = record(comparison, measured if tta is None else measured * 2)
    return comparison
