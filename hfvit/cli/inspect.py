"""`hfvit inspect`."""

import argparse
import json
import sys

from hfvit.cli.options import exit_codes, non_negative_int
from hfvit.utils.quiet import hide_data_bars

EPILOG = f"""\
All images are decoded once. The report has splits, classes with their counts, sizes and color modes, files that are
left out or cannot be decoded, exact and near duplicates (within a split and across splits), images of one color, and
the starting recipe of `hfvit train DATASET`.

--run finds suspicious labels: images that a trained run classifies differently.

examples:
  hfvit inspect photos
  hfvit inspect photos/labels.csv --label_column species --html report.html
  hfvit inspect photos --run outputs/photos --html report.html
  hfvit inspect photos --json > photos.json
  hfvit inspect photos --recipe photos.yaml && hfvit train photos.yaml

{exit_codes(0, 1, 2)}"""

# Recipe keys that select images and labels.
TEXT_KEYS = {
    "dataset_config_name": "configuration of the data set",
    "dataset_revision": "branch, tag or commit on the Hub",
    "image_column": "column of the images [by type or name]",
    "group_column": "column of groups whose images are held out together, such as patients",
    "problem_type": "single_label_classification or multi_label_classification [by the labels]",
    "label_separator": "character between the labels of an image, such as '|'",
    "train_split": "split to train on [train]",
    "validation_split": "split that selects the checkpoint [validation, or held out of train]",
    "test_split": "split to evaluate once; none: no test split [test, or held out of train]",
}


def add(commands) -> None:
    """Add the parser of `hfvit inspect`."""
    parser = commands.add_parser(
        "inspect",
        help="check a data set before training",
        description="Check a data set before training, and print a starting recipe.",
        epilog=EPILOG,
    )
    parser.add_argument("dataset", metavar="DATASET", help="folder, table, archive, Hub id, or 'digits'")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--html", metavar="FILE", help="write an HTML page with samples of each class")
    parser.add_argument("--recipe", metavar="FILE", help="write the starting recipe")
    parser.add_argument("--from_scratch", action="store_true", help="starting recipe without pretrained weights")
    parser.add_argument("--run", metavar="RUN_DIR", help="trained run, to find suspicious labels")
    for key, text in TEXT_KEYS.items():
        parser.add_argument(f"--{key}", metavar="NAME", help=text)
    parser.add_argument("--label_column", nargs="+", metavar="NAME", help="column of the labels [by type or name]")
    parser.add_argument("--class_names", nargs="+", metavar="NAME", help="names of integer labels, or a text file")
    parser.add_argument(
        "--allow_outside_paths", action="store_true", help="allow paths of images outside the folder of a table"
    )
    parser.add_argument("--seed", type=non_negative_int, default=42, help="seed of held-out images [%(default)s]")
    parser.set_defaults(command=inspect)


def inspect(options: argparse.Namespace) -> int:
    """Run `hfvit inspect DATASET`."""
    from hfvit.utils.files import output_file

    html = output_file(options.html, "--html")
    recipe = output_file(options.recipe, "--recipe")
    hide_data_bars()
    from hfvit.recipe.loader import NULLS
    from hfvit.report.inspection import inspect as inspect_dataset
    from hfvit.utils.terminal import encoding_of, printable_json

    fields = {
        key: getattr(options, key)
        for key in (*TEXT_KEYS, "label_column", "class_names")
        if getattr(options, key) is not None
    }
    if len(fields.get("label_column", ())) == 1:
        fields["label_column"] = fields["label_column"][0]
    nulls = {key: None for key, value in fields.items() if isinstance(value, str) and value.lower() in NULLS}
    fields |= nulls | ({"allow_outside_paths": True} if options.allow_outside_paths else {})
    inspection = inspect_dataset(
        options.dataset,
        run=options.run,
        html=html,
        recipe=recipe,
        from_scratch=options.from_scratch,
        seed=options.seed,
        show_progress=sys.stderr.isatty(),
        **fields,
    )
    if options.json:
        print(printable_json(json.dumps(inspection.to_json(), ensure_ascii=False), encoding_of(sys.stdout)))
    else:
        print(inspection)
        for file in filter(None, (html, recipe)):
            print(f"Wrote {file}")
    return 1 if inspection.unreadable else 0
