"""`hfvit push`."""

import argparse

from hfvit.cli.options import exit_codes
from hfvit.utils.quiet import quiet_libraries

EPILOG = f"""\
Pushed in one commit: weights, config.json, model card, run.json, recipe.yaml, trainer_state.json and plots; adapter/
of a LoRA run; soup.json and extension.json; .eval_results for a data set on the Hub; the exports of --include. Other
weights in the repository, and files of an earlier push that belong to them, are deleted; --dry_run lists them. Other
files in the repository are kept. Never pushed: checkpoints, optimizer state, pickles, hidden and temporary files,
images of the data set, paths of this machine. Text above and below the generated part of the model card, local or on
the Hub, is kept. After the push, the model is loaded from the Hub, and its logits are compared with those of
OUTPUT_DIR.

examples:
  hfvit push outputs/quickstart user/digits --dry_run
  hfvit push outputs/quickstart user/digits --private
  hfvit push outputs/quickstart user/digits --include onnx --message "With INT8"
  hfvit push outputs/quickstart team/digits --create_pr

{exit_codes(0, 2, 5)}"""


def add(commands) -> None:
    """Add the parser of `hfvit push`."""
    parser = commands.add_parser(
        "push",
        help="push a run to the Hub",
        description="Push the output folder of a run to a model repository on the Hub.",
        epilog=EPILOG,
    )
    parser.add_argument("folder", metavar="OUTPUT_DIR", help="output folder of a run")
    parser.add_argument("repository", metavar="USER/NAME", help="model repository; created if missing")
    parser.add_argument("--private", action="store_true", help="create the repository as private")
    parser.add_argument("--revision", help="branch to push to; created if missing [main]")
    parser.add_argument(
        "--create_pr", action="store_true", help="open a pull request instead of committing to a branch"
    )
    parser.add_argument(
        "--include", nargs="+", choices=("onnx", "openvino", "executorch", "tensorrt"), default=[],
        help="exports to push [none]",
    )  # fmt: skip
    parser.add_argument("--message", help="commit message [Push with hfvit]")
    parser.add_argument("--dry_run", action="store_true", help="list the files to push and to delete, without pushing")
    parser.set_defaults(command=push)


def push(options: argparse.Namespace) -> None:
    """Run `hfvit push OUTPUT_DIR USER/NAME`."""
    from hfvit.hub.push import Destination, check_name, dry_run, push_to

    check_name(options.repository)
    include = tuple(dict.fromkeys(options.include))
    quiet_libraries()
    private = options.private or None
    destination = Destination(options.repository, private, options.revision, options.create_pr)
    if options.dry_run:
        print(dry_run(options.folder, destination, include))
        return
    print(push_to(options.folder, destination, include, options.message))
