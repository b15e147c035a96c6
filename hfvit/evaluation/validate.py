"""Compare a checkpoint and its exports on one labelled split, and record the result beside them."""

from collections.abc import Sequence
from pathlib import Path

from hfvit.evaluation.compare import Comparison, check_recordable, compare, record
from hfvit.evaluation.split import evaluation_split
from hfvit.inference.classifier import load_classifier
from hfvit.inference.execution_providers import Providers


def validate(
    reference: str | Path,
    others: Sequence[str | Path] = (),
    *,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    text_column: str | None = None,
    max_samples: int | None = None,
    seed: int = 42,
    max_accuracy_drop: float = 0.5,
    min_agreement: float | None = None,
    patch_size: Sequence[int] = (),
    merge_tokens: Sequence[int] = (),
    batch_size: int = 16,
    device: str | None = None,
    threads: int | None = None,
    providers: Providers | None = None,
    show_progress: bool = True,
) -> Comparison:
    """Run the reference and the others over the same images, compare them, and save the result beside them.

    Args:
        reference: checkpoint folder, Hub id, ONNX file, TensorRT engine or export folder.
        others: the same kinds, compared with the reference.
        dataset_name: Hub id, folder or `digits`; by default the data of the reference's recipe.
        dataset_config_name: configuration of the data set.
        split: by default the validation images of the recipe.
        image_column, label_column, text_column: found by their types by default.
        max_samples: number of images, drawn with `seed`; all by default.
        seed: of `max_samples`.
        max_accuracy_drop: in percentage points, largest allowed loss of accuracy.
        min_agreement: in [0, 1], smallest share of images with the reference's top-1 class.
        patch_size: in pixels; the reference at each of these patch sizes is compared, too.
        merge_tokens: tokens merged per block; the reference with each of these is compared, too.
        batch_size: images of one forward pass, in the throughput as well.
        device: `cpu`, `cuda`, ...; CUDA where it is available by default.
        threads: of a CPU.
        providers: ONNX Runtime's execution providers, in place of `device`.
        show_progress: show a progress bar on a terminal.

    Returns:
        Accuracy, agreement and speed of each artifact; `passed` tells whether all are within the limits. It is saved
        in `run.json`, `export.json` and `engine.json` where these are beside the artifacts.

    Raises:
        ModelError, DataError: an artifact or a data set that cannot be used.
    """
    paths = [reference, *others]
    check_recordable(paths)
    labelled = evaluation_split(
        reference,
        dataset_name=dataset_name,
        dataset_config_name=dataset_config_name,
        split=split,
        image_column=image_column,
        label_column=label_column,
        text_column=text_column,
        max_samples=max_samples,
        seed=seed,
    )
    changes = [{"patch_size": value} for value in patch_size] + [{"merge_tokens": value} for value in merge_tokens]
    changed = [load_classifier(reference, device, threads, **change) for change in changes]
    comparison = compare(
        reference,
        [*others, *changed],
        labelled,
        max_accuracy_drop=max_accuracy_drop,
        min_agreement=min_agreement,
        batch_size=batch_size,
        device=device,
        threads=threads,
        providers=providers,
        show_progress=show_progress,
    )
    comparison.saved = record(comparison, [*paths, *[reference] * len(changed)])
    return comparison
