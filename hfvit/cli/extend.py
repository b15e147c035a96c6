"""`hfvit extend`."""

import argparse

from hfvit.cli.options import add_batch_and_device, add_revision, exit_codes, positive_int
from hfvit.errors import printable
from hfvit.utils.collector import importing
from hfvit.utils.formatting import shortened
from hfvit.utils.quiet import hide_data_bars, quiet_libraries

EPILOG = f"""\
FOLDER has a subfolder of images for each new class; five to twenty images each are usual. Nothing is trained: the row
of the head for a new class is the mean feature of its images, and the rows of the old classes stay. The labeled images
of the old classes are the validation split of the run's recipe, unless --dataset_name and --split are given: half of
them balance old and new classes, the other half give the accuracy. The accuracy of the new images is leave-one-out.

examples:
  hfvit extend outputs/flowers new_flowers/ --output_dir outputs/flowers_extended
  hfvit extend user/my-vit new_classes/ --output_dir out --dataset_name path/to/folder --split test

{exit_codes(0, 2)}"""


def add(commands) -> None:
    """Add the parser of `hfvit extend`."""
    parser = commands.add_parser(
        "extend",
        help="add classes to a checkpoint from a few images each",
        description="Add classes to a checkpoint from a few images each, without training.",
        epilog=EPILOG,
    )
    parser.add_argument("run", metavar="RUN", help="checkpoint folder or Hub id of a timm model")
    parser.add_argument("folder", metavar="FOLDER", help="folder with a subfolder of images for each new class")
    parser.add_argument("--output_dir", metavar="DIR", required=True, help="new folder for the larger checkpoint")
    parser.add_argument("--dataset_name", help="labeled images of the old classes [the recipe's]")
    parser.add_argument("--split", help="their split [the recipe's validation split]")
    parser.add_argument(
        "--max_samples", type=positive_int, default=5000, help="largest number of them, sampled [%(default)s]"
    )
    add_revision(parser)
    add_batch_and_device(parser)
    parser.set_defaults(command=extend)


def extend(options: argparse.Namespace) -> None:
    """Run `hfvit extend RUN FOLDER --output_dir DIR`."""
    from hfvit.artifacts.artifact import revision_arguments

    revision_arguments(options.run, options.revision)
    with importing():
        quiet_libraries()
        hide_data_bars()
        from hfvit.evaluation.extend import extend as add_classes

    record = add_classes(
        options.run,
        options.folder,
        options.output_dir,
        dataset_name=options.dataset_name,
        split=options.split,
        max_samples=options.max_samples,
        batch_size=options.batch_size,
        device=options.device,
        revision=options.revision,
    )
    old = f"{record.old_accuracy:.2%} ({record.old_accuracy_before:.2%} without new classes)"
    new = "not measured" if record.new_accuracy is None else f"{record.new_accuracy:.2%} (leave-one-out)"
    print(f"old classes  accuracy {old}, {record.old_images:,} images")
    print(f"new classes  accuracy {new}, {sum(record.images):,} images of {printable(shortened(record.new_classes))}")
    print(f"saved        {printable(options.output_dir)}")
