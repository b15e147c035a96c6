"""`hfvit soup`."""

import argparse

from hfvit.cli.options import add_batch_and_device, exit_codes, positive_int
from hfvit.errors import printable
from hfvit.recipe.arguments import GREEDY, SOUPS
from hfvit.utils.collector import importing
from hfvit.utils.quiet import hide_data_bars, quiet_libraries

EPILOG = f"""\
The runs must have one architecture, the same classes in the same order and the same preprocessing, and were usually
fine-tuned from one pretrained model with other learning rates or augmentations. A mean of models that were trained
from scratch, or from different pretrained models, is useless.

The images are the validation split of the first run's recipe, which must be that of all runs (the same seed, or a
validation_split), unless --dataset_name or --split are given.

examples:
  hfvit soup outputs/a outputs/b outputs/c --output_dir outputs/soup
  hfvit soup outputs/a outputs/b --kind uniform --output_dir outputs/soup

{exit_codes(0, 2)}"""


def add(commands) -> None:
    """Add the parser of `hfvit soup`."""
    parser = commands.add_parser(
        "soup",
        help="average the weights of several runs",
        description="Average the weights of several fine-tuned models (model soup), without training.",
        epilog=EPILOG,
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="output folder of a run, or Hub id of a checkpoint")
    parser.add_argument("--output_dir", metavar="DIR", required=True, help="new folder for the checkpoint")
    parser.add_argument(
        "--kind", choices=SOUPS, default=GREEDY,
        help="greedy adds one run after the other, the best first, as long as the validation score does not drop;"
        " uniform averages all [%(default)s]",
    )  # fmt: skip
    parser.add_argument("--dataset_name", help="labeled images: Hub id, folder or 'digits' [the recipe's]")
    parser.add_argument("--split", help="their split, on which no run was trained [the recipe's validation split]")
    parser.add_argument("--max_samples", type=positive_int, help="largest number of images, sampled [all]")
    add_batch_and_device(parser)
    parser.set_defaults(command=soup)


def soup(options: argparse.Namespace) -> None:
    """Run `hfvit soup RUN RUN ... --output_dir DIR`."""
    from hfvit.artifacts.artifact import find_artifact

    for run in options.runs:
        find_artifact(run)
    with importing():
        quiet_libraries()
        hide_data_bars()
        from hfvit.evaluation.soup import soup as average
        from hfvit.utils.formatting import aligned

    record = average(
        options.runs,
        options.output_dir,
        kind=options.kind,
        dataset_name=options.dataset_name,
        split=options.split,
        max_samples=options.max_samples,
        batch_size=options.batch_size,
        device=options.device,
    )
    rows = [("run", record.soup.metric, "in the mean")]
    rows += [(one.name, f"{one.score:.2%}", "yes" if one.is_used else "no") for one in record.soup.members]
    rows.append((f"{record.soup.kind} soup", f"{record.soup.score:.2%}", ""))
    lines = [
        *aligned(rows),
        "",
        f"data     {record.data.dataset}, {record.data.split}",
        f"saved    {options.output_dir}",
    ]
    print("\n".join(map(printable, lines)))
