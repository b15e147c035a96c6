"""`hfvit verify`."""

import argparse
import tempfile
from pathlib import Path

from hfvit.cli.options import exit_codes, positive_int
from hfvit.errors import GateError, ModelError
from hfvit.utils.hub_ids import folder_or_hub_id
from hfvit.utils.quiet import quiet_libraries

EPILOG = f"""\
Trains recipe.yaml of the run again, in one process on this machine. The accuracy on each split must be within the 95 %
interval in run.json. For a shipped recipe without further options, it must also be within expected_accuracy, unless
that range is an estimate. RUN_DIR is not changed; nothing is pushed or sent to a tracker. --allow_outside_paths is
needed where recipe.yaml names files of this machine or URLs: the run may be somebody else's.

examples:
  hfvit verify outputs/quickstart
  hfvit verify outputs/quickstart --output outputs/quickstart_again
  hfvit verify outputs/quickstart --eval_only
  hfvit verify outputs/photos --allow_outside_paths

{exit_codes(0, 2, 3, 4, 6, 7, 75)}"""


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
        "--batch_size", type=positive_int, default=32, help="images per batch with --eval_only [%(default)s]"
    )
    parser.add_argument("--device", help="where to run --eval_only: cpu, cuda, ... [cuda if available, else cpu]")
    parser.set_defaults(command=verify)


def verify(options: argparse.Namespace) -> None:
    """Run `hfvit verify RUN_DIR`."""
    folder = folder_or_hub_id(Path(options.folder), ModelError)
    quiet_libraries()
    from hfvit.artifacts.constants import RECIPE_FILE
    from hfvit.artifacts.run_record import RunRecord
    from hfvit.verify import check_reads, compare_runs, evaluate_again, repeat_command

    RunRecord.load(folder)
    if not (Path(folder) / RECIPE_FILE).is_file():
        raise ModelError(f"RUN_DIR: no {RECIPE_FILE} to repeat the run from, got {folder}.")
    check_reads(folder, options.allow_outside_paths)
    if options.eval_only:
        found = evaluate_again(folder, options.batch_size, options.device)
    else:
        from hfvit.pipeline import main as train

        with tempfile.TemporaryDirectory(prefix="hfvit-verify-") as temporary:
            again = options.output or str(Path(temporary) / "run")
            train(repeat_command(folder, again))
            found = compare_runs(folder, again)
    print(f"\n{found.table()}")
    if found.failures:
        raise GateError("\n".join(found.failures))
