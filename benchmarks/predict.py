"""Images per second of batch prediction, from files to probabilities.

  python benchmarks/predict.py                     # about five minutes
  python benchmarks/predict.py --quick             # a minute, only to test the script
  python benchmarks/predict.py --json rows.json

Networks with random weights classify generated JPEGs of 500x375 pixels on the CPU. `pipeline` is transformers'
image-classification pipeline with a batch size of 32; hfvit is `Classifier.predict` with its default batch size. Each
contender classifies 32 images first.
"""

import time
from functools import partial
from pathlib import Path

from common import answer, in_own_process, interleaved, medians, parse_options, report, spread, workspace
from images import LARGE, encoded

ARCHITECTURES = ("mobilenetv3_small_100", "vit_tiny_patch16_224")
CONTENDERS = ("pipeline", "hfvit", "hfvit bf16")
PIPELINE_BATCH = 32
COLUMNS = {"model": "", "contender": "", "images/s": ",.1f", "spread": ".0%", "x pipeline": ".2f"}


def write_inputs(folder: Path, architectures: tuple[str, ...], images: int) -> None:
    """Write checkpoints with random weights and JPEG files."""
    from hfvit.models.factory import build_image_model
    from hfvit.recipe.arguments import ModelArguments

    for architecture in architectures:
        labels = [f"class {number}" for number in range(1000)]
        model = build_image_model(ModelArguments(architecture=architecture), labels)
        model.save_pretrained(folder / architecture)
    (folder / "images").mkdir()
    for number in range(images):
        (folder / "images" / f"{number:05}.jpg").write_bytes(encoded(LARGE, number))


def measure(contender: str, checkpoint: str, images: str, **_) -> None:
    """Answer with the images per second of a contender.

    Args:
        contender: one of `CONTENDERS`.
        checkpoint: folder of the checkpoint.
        images: folder of the images.
    """
    files = [str(file) for file in sorted(Path(images).iterdir())]
    if contender == "pipeline":
        from transformers import pipeline

        predict = partial(pipeline("image-classification", model=checkpoint, device="cpu"), batch_size=PIPELINE_BATCH)
    else:
        from hfvit import load_classifier

        predict = partial(load_classifier(checkpoint, device="cpu", bf16=contender.endswith("bf16")).predict, top_k=5)
    predict(files[:PIPELINE_BATCH])  # warm-up
    start = time.perf_counter()
    predict(files)
    answer({"images/s": len(files) / (time.perf_counter() - start)})


def rows_of(results: dict[str, list[dict]]) -> list[dict]:
    """Return one row for each job, relative to the pipeline with the same model."""
    rates = {name: medians(rounds)["images/s"] for name, rounds in results.items()}
    rows = []
    for name, rounds in results.items():
        model, contender = name.split(": ")
        rows.append(
            {
                "model": model,
                "contender": contender,
                "images/s": rates[name],
                "spread": spread([values["images/s"] for values in rounds]),
                "x pipeline": rates[name] / rates[f"{model}: pipeline"],
            }
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    options = parse_options(__doc__, argv, rounds=3)
    if options.worker:
        return measure(**options.worker)
    architectures, images = (ARCHITECTURES[:1], 32) if options.quick else (ARCHITECTURES, 512)
    with workspace() as work:
        write_inputs(work, architectures, images)
        jobs = {
            f"{model}: {contender}": {
                "contender": contender, "checkpoint": str(work / model), "images": str(work / "images")
            }
            for model in architectures
            for contender in CONTENDERS
        }  # fmt: skip
        results = interleaved(jobs, options.rounds, lambda job: in_own_process(__file__, job, work / "cache"))
    report("Prediction", options, rows_of(results), COLUMNS, [f"{images} generated JPEGs of 500x375 pixels"])


if __name__ == "__main__":
    main()
