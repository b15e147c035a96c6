"""`hfvit verify`."""

import argparse
import tempfile
from pathlib import Path

from hfvit.cli.options import exit_codes, positive_int
from hfvit.errors import GateError, HFViTError, ModelError, UnfinishedError
from hfvit.utils.collector import importing
from hfvit.utils.hub_ids import folder_or_hub_id
from hfvit.utils.quiet import hide_data_bars, quiet_libraries

EPILOG = f"""\
Trains recipe.yaml of the run again, in one process on this machine. The accuracy on each split must be within the 95 %
interval in run.json. For a shipped recipe without further options, it must also be within expected_accuracy, unless
that range is an estimate. RUN_DIR may also have several runs (--seeds, --folds): each is repeated, and the mean over
several seeds must be within expected_accuracy; folds have no test split. RUN_DIR is not changed; nothing is pushed or
sent to a tracker. --allow_outside_paths is needed where recipe.yaml names files of this machine or URLs: the run may
be somebody else's.

examples:
  hfvit verify outputs/quickstart
  hfvit verify outputs/quickstart --output outputs/quickstart_again
  hfvit verify outputs/quickstart --eval_only
  hfvit verify outputs/photos --allow_outside_paths

{exit_codes(0, 2, 3, 4, 6, 7, 75)}"""

EVAL_BATCH_SIZE = 32


def add(commands) -> None:
    """Add the parser of `hfvit verify`."""
    parser = commands.add_parser(
        "verify",
        help="repeat a run and compare its accuracy with the recorded one",
        description="Repeat a run, or only its evaluation, and compare the accuracy with the recorded one.",
        epilog=EPILOG,
    )
    parser.add_argument("folder", metavar="RUN_DIR", help="output folder of a run")
    parser.add_argument("--eval_only", action="store_true", help="evaluate the saved checkpoint instead of training")
    parser.add_argument("--output", metavar="DIR", help="folder for the new run [a temporary one]")
    parser.add_argument(
        "--allow_outside_paths", action="store_true", help="read files of this machine and URLs that recipe.yaml names"
    )
    parser.add_argument(
        "--batch_size", type=positive_int, help=f"images per batch with --eval_only [{EVAL_BATCH_SIZE}]"
    )
    parser.add_argument("--device", help="where to run --eval_only: cpu, cuda, ... [cuda if available, else cpu]")
    parser.set_defaults(command=verify)


def verify(options: argparse.Namespace) -> None:
    """Run `hfvit verify RUN_DIR`."""
    check_options(options)
    folder = folder_or_hub_id(Path(options.folder), ModelError)
    quiet_libraries()
    hide_data_bars()
    from hfvit.artifacts.constants import RECIPE_FILE
    from hfvit.artifacts.multirun_record import MultiRunRecord
    from hfvit.artifacts.run_record import RunRecord
    from hfvit.verify import check_reads, compare_with_expected, join

    folders = {"": Path(folder)}
    if (Path(folder) / MultiRunRecord.FILE).is_file():
        folders = {run.folder: Path(folder) / run.folder for run in MultiRunRecord.load(folder).runs}
        if not folders:
            raise ModelError(f"RUN_DIR: no finished run in {folder}. Run its hfvit train command again.")
    records = [RunRecord.load(each) for each in folders.values()]
    for each in folders.values():
        if not (each / RECIPE_FILE).is_file():
            raise ModelError(f"RUN_DIR: no {RECIPE_FILE} to repeat the run from, got {each}.")
        check_reads(each, options.allow_outside_paths)
    found = {name: _verify_run(name, each, options) for name, each in folders.items()}
    compared = found[""] if "" in found else join(found)
    compare_with_expected(compared, records)
    print(f"\n{compared.table()}")
    if compared.failures:
        raise GateError("\n".join(compared.failures))


def check_options(options: argparse.Namespace) -> None:
    """Raise `HFViTError` for an option without effect."""
    unavailable = ("output",) if options.eval_only else ("batch_size", "device")
    problem = "not available with --eval_only, which trains no run" if options.eval_only else "requires --eval_only"
    for name in unavailable:
        if (value := getattr(options, name)) is not None:
            raise HFViTError(f"--{name}: {problem}, got {value}. Omit --{name}.")


def _verify_run(name: str, folder: Path, options: argparse.Namespace):
    """Repeat a run, or only its evaluation, and compare it with its record.

    Args:
        name: name of the run among several, empty for a single one.
        folder: its folder.
        options: options of the command.
    """
    from hfvit.verify import compare_runs, evaluate_again, repeat_command

    if options.eval_only:
        return evaluate_again(folder, options.batch_size or EVAL_BATCH_SIZE, options.device)
    with importing():
        from hfvit.pipeline import main as train

    with tempfile.TemporaryDirectory(prefix="hfvit-verify-") as temporary:
        again = str(Path(options.output or f"{temporary}/run") / name)
        try:
            train(repeat_command(folder, again))
        except UnfinishedError as error:
            deleted = "" if options.output else " The temporary folder is deleted."
            raise type(error)(error.cause, f"hfvit verify does not resume.{deleted}") from None
        return compare_runs(folder, again)
