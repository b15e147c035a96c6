"""`hfvit push`"""

import argparse

from hfvit.utils.quiet import quiet_libraries

EPILOG = """\
What is pushed: the weights, config.json, the card, run.json, recipe.yaml, trainer_state.json and the plots, in one
commit, of a LoRA run its adapter/, and for a data set on the Hub .eval_results; with --include the exports below
OUTPUT_DIR too. Never checkpoints, optimizer state, pickles, other hidden or temporary files, pictures of the data set,
nor the paths of this machine. What was written above or below the generated text of the card, here or on the Hub,
stays. The repository is then loaded back into an empty cache, and its logits are compared.

exit code: 0 done, 5 the Hub could not be reached or refused (with the command to repeat), 2 a wrong command.

examples:
  hfvit push outputs/quickstart user/digits --dry-run
  hfvit push outputs/quickstart user/digits --private
  hfvit push outputs/quickstart user/digits --include onnx --message "With INT8"
  hfvit push outputs/quickstart team/digits --create-pr
"""


def add(commands) -> None:
    parser = commands.add_parser(
        "push",
        help="publish a run's folder on the Hub",
        description="Push the output folder of a run to a model repository on the Hub.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="OUTPUT_DIR", help="the output folder of a run")
    parser.add_argument("repository", metavar="USER/NAME", help="made where there is none")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="branch to push to, made where there is none [main]")
    parser.add_argument("--create-pr", "--create_pr", action="store_true", help="open a pull request instead")
    parser.add_argument("--include", nargs="+", choices=("onnx", "tensorrt"), default=[], help="exports to push, too")
    parser.add_argument("--message", help="of the commit")
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="list files and sizes, and send nothing")
    parser.set_defaults(command=push)


def push(options: argparse.Namespace) -> None:
    """`hfvit push OUTPUT_DIR USER/NAME`"""
    from hfvit.hub.files import files_to_push
    from hfvit.hub.push import Destination, check_name, listing, push_to

    check_name(options.repository)
    include = tuple(dict.fromkeys(options.include))
    if options.dry_run:
        print(listing(files_to_push(options.folder, options.repository, include)))
        return
    quiet_libraries()
    private = options.private or None
    destination = Destination(options.repository, private, options.revision, options.create_pr)
    print(push_to(options.folder, destination, include, options.message))
