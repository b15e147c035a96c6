"""`hfvit predict`."""

import argparse
import sys

from hfvit.cli.options import (
    ARTIFACT_KINDS,
    add_classifier_options,
    add_revision,
    add_score_options,
    add_token_options,
    exit_codes,
    hub_options,
    parse_providers,
)
from hfvit.errors import DataError, HFViTError, mask_credentials, printable
from hfvit.utils.collector import importing
from hfvit.utils.quiet import quiet_libraries

EPILOG = f"""\
--output writes one row per image and class: image, rank, label, probability, error. The file appears when it is
complete. In CSV, text that a spreadsheet would run as a formula gets a leading quote.

A folder means all images in it and its subfolders. An image that cannot be read is reported on standard error and
skipped; the exit code is then 1.

Formats: JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000 and PPM; HEIF with pip install "hfvit[heif]". The first frame
of an animation is classified. Limits: 89 million pixels per image; 64 MiB, 60 seconds and 5 redirects per URL (http or
https). Other limits are arguments of hfvit.data.decode.read_image (ImageLimits, UrlLimits).

examples:
  hfvit predict outputs/quickstart digit.png
  hfvit predict outputs/quickstart/onnx photos/ --top_k 1 --calibrated
  hfvit predict user/my-vit "photos/**/*.jpg" https://example.org/cat.jpg --json > predictions.jsonl
  hfvit predict outputs/quickstart photos/ --output predictions.csv
  hfvit predict outputs/quickstart photos/ --save_grid grid.png
  hfvit predict outputs/quickstart/onnx digit.png --providers TensorrtExecutionProvider CUDAExecutionProvider

{exit_codes(0, 1, 2)}"""

TOP_K = 5
OUTPUT_KINDS = (".csv", ".parquet", ".jsonl")
GRID_KINDS = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")


def add(commands) -> None:
    """Add the parser of `hfvit predict`."""
    parser = commands.add_parser(
        "predict",
        help="classify images",
        description="Print the most probable classes of each image.",
        epilog=EPILOG,
    )
    parser.add_argument("artifact", metavar="ARTIFACT", help=ARTIFACT_KINDS)
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="file, folder, pattern or URL")
    parser.add_argument(
        "--text",
        action="append",
        help="text that belongs to the images, for an image and text model; give one for all or one per image",
    )
    add_revision(parser)
    add_score_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON line per image")
    parser.add_argument(
        "--output", metavar="FILE", help="write a .csv, .parquet or .jsonl file instead of printing the classes"
    )
    parser.add_argument("--save_grid", metavar="FILE", help="save a figure of the images with their predictions")
    add_token_options(parser)
    add_classifier_options(parser)
    parser.set_defaults(command=predict)


def predict(options: argparse.Namespace) -> int:
    """Run `hfvit predict ARTIFACT IMAGE ...`."""
    from hfvit.data.decode import find_images
    from hfvit.utils.files import output_file

    hub = hub_options(options)
    providers = parse_providers(options)
    grid = output_file(options.save_grid, "--save_grid")
    if grid and grid.suffix.lower() not in GRID_KINDS:
        raise HFViTError(f"--save_grid: must end in one of {', '.join(GRID_KINDS)}, got '{grid}'.")
    output = output_file(options.output, "--output")
    if output and output.suffix.lower() not in OUTPUT_KINDS:
        raise HFViTError(f"--output: must end in one of {', '.join(OUTPUT_KINDS)}, got '{output}'.")
    if output and options.json:
        raise HFViTError(f"--json: not used with --output, got '{output}'. Omit it; a .jsonl file has the same lines.")
    names, wrong = find_images(options.images)
    if not names:
        raise DataError("IMAGE: no image found: " + "; ".join(map(printable, wrong)) + ".")
    for problem in wrong:
        print(f"hfvit: {printable(mask_credentials(problem))}.", file=sys.stderr)
    with importing():
        quiet_libraries()
        from hfvit.inference.classifier import load_classifier
        from hfvit.inference.predict import print_predictions, texts_by_name

    classifier = load_classifier(
        options.artifact,
        options.device,
        options.threads,
        providers=providers,
        objective=options.objective,
        calibrated=options.calibrated,
        patch_size=options.patch_size,
        merge_tokens=options.merge_tokens,
        bf16=options.bf16,
        tta=options.tta,
        **hub,
    )
    texts = texts_by_name(names, options.text, classifier)
    top_k = options.top_k or (TOP_K if classifier.thresholds is None else None)
    bad = print_predictions(classifier, names, options.batch_size, top_k, options.json, grid, texts, output)
    if bad == len(names):
        raise DataError("IMAGE: none of the images could be classified.")
    if bad or wrong:
        print(f"hfvit: {bad + len(wrong)} images or names could not be classified.", file=sys.stderr)
    return 1 if bad or wrong else 0
