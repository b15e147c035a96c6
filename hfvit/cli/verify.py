"""`hfvit verify`"""

import argparse
import tempfile
from pathlib import Path

from hfvit.cli.options import above_0
from hfvit.errors import GateError, ModelError
from hfvit.utils.hub_ids import folder_or_hub_id
from hfvit.utils.quiet import quiet_libraries

EPILOG = """\
The recipe.yaml of the run is run again, on the data that it names, as one process on this machine. The accuracy on
each split must lie in the 95 % interval that run.json records, and that of a shipped recipe, run as it is, must reach
its expected_accuracy (a range that was not measured is only reported). Nothing in RUN_DIR is changed.

exit code: 0 inside, 4 outside or not reached, 2 something was wrong with the command.

examples:
  hfvit verify outputs/quickstart
  hfvit verify outputs/quickstart --output outputs/quickstart_again
  hfvit verify outputs/quickstart --eval-only
"""


def add(commands) -> None:
    parser = commands.add_parser(
        "verify",
        help="run a finished run's recipe again, and hold the result to the recorded interval",
        description="Repeat a run, or the evaluation of its checkpoint, and compare.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="RUN_DIR", help="the output folder of a run")
    parser.add_argument("--eval-only", "--eval_only", action="store_true", help="evaluate the saved checkpoint again")
    parser.add_argument("--output", metavar="DIR", help="keep the new run in this folder [a temporary one]")
    parser.add_argument(
        "--batch_size", type=above_0, default=32, help="images at a time, of --eval-only [%(default)s]"
    )
    parser.add_argument("--device", help="of --eval-only: cpu, cuda, ... [cuda where there is one]")
    parser.set_defaults(command=verify)


def verify(options: argparse.Namespace) -> None:
    """`hfvit verify RUN_DIR`"""
    folder = folder_or_hub_id(Path(options.folder), ModelError)
    quiet_libraries()
    from hfvit.artifacts.constants import RECIPE_FILE
    from hfvit.artifacts.run_record import RunRecord
    from hfvit.verify import compare_runs, evaluate_again

    RunRecord.load(folder)
    if not (Path(folder) / RECIPE_FILE).is_file():
        raise ModelError(f"{folder} holds no {RECIPE_FILE}, which tells how to repeat the run.")
    if options.eval_only:
        found = evaluate_again(folder, options.batch_size, options.device)
    else:
        from hfvit.pipeline import main as train

        with tempfile.TemporaryDirectory(prefix="hfvit-verify-") as temporary:
            again = options.output or str(Path(temporary) / "run")
            train([str(Path(folder) / RECIPE_FILE), "--output_dir", again])
            found = compare_runs(folder, again)
    print(f"\n{found.table()}")
    if found.failures:
        raise GateError("\n".join(found.failures))
