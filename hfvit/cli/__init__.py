"""The `hfvit` command, with one module per subcommand and lazy imports."""

import sys
from collections.abc import Iterable

import hfvit
from hfvit.cli import (
    demo,
    embed,
    extend,
    inspect,
    listings,
    predict,
    push,
    report,
    serve,
    soup,
    sweep,
    train,
    validate,
    verify,
)
from hfvit.cli.options import CommandParser, accept_dashes, exit_codes
from hfvit.errors import EXIT_CODES, nearest, printable, run
from hfvit.utils.terminal import prepare_streams, print_traceback

COMMANDS = (
    train, inspect, sweep, verify, validate, predict, embed, extend, soup, report, demo, serve, push, listings,
)  # fmt: skip

DESCRIPTION = """\
Fine-tune Vision Transformers for image classification: from one recipe to a deployable checkpoint.

  hfvit train quickstart          train a small ViT in a minute, without GPU or download
  hfvit recipes                   list the shipped recipes
  hfvit COMMAND --help            options and examples of a command
"""

EXPORTS = (
    "Exports to ONNX, OpenVINO, ExecuTorch and TensorRT are commands of optimum-cli: `optimum-cli export --help`."
)
EXPORT_COMMANDS = ("export", "optimize", "quantize")
# Names of commands in Ultralytics, getitune and Lightning, and common ones.
OTHER_COMMANDS = {
    "fit": "train", "finetune": "train", "resume": "train", "val": "validate", "test": "validate", "eval": "validate",
    "evaluate": "validate", "benchmark": "validate", "infer": "predict", "tune": "sweep", "checks": "doctor",
    "models": "recipes", "list": "recipes", "find": "recipes", "cfg": "recipes", "info": "recipes",
}  # fmt: skip

EPILOG = f"""\
{EXPORTS}

{exit_codes(*EXIT_CODES)}"""


def main(argv: list[str] | None = None) -> None:
    """Run the console command and exit with its code.

    Args:
        argv: arguments after `hfvit`. Default: those of the process.
    """
    prepare_streams()
    sys.excepthook = print_traceback
    words = sys.argv[1:] if argv is None else list(argv)
    parser, commands = build_parsers()
    if not words:
        # Exit code 2, as git and uv do: `hfvit $COMMAND` with an empty variable must not pass for success.
        parser.print_help(sys.stderr)
        sys.exit(2)
    if words[0] not in commands and words[0] not in parser.option_names:
        if words[0].startswith("-"):
            parser.refuse(words)
        hint = _command_hint(words[0], commands)
        parser.error(f"COMMAND: unknown, got '{printable(words[0])}'.{hint}")
    options, rest = parser.parse_known_args(words)
    command = commands[words[0]]
    if options.accepts_recipe_options:
        command.check_misspelled(rest)
    elif rest:
        command.refuse(rest)
    options.rest = rest
    sys.exit(run(lambda: options.command(options)))


def _command_hint(name: str, commands: Iterable[str]) -> str:
    """Return the command that an unknown one stands for, or all commands."""
    if name in EXPORT_COMMANDS:
        return f" {EXPORTS}"
    if name in OTHER_COMMANDS:
        return f" Did you mean '{OTHER_COMMANDS[name]}'?"
    return nearest(name, commands) or f" Commands: {', '.join(commands)}"


def build_parser() -> CommandParser:
    """Build the parser of `hfvit` with all commands."""
    return build_parsers()[0]


def build_parsers() -> tuple[CommandParser, dict[str, CommandParser]]:
    """Build the parser of `hfvit` and, by name, the parsers of its commands."""
    parser = CommandParser(prog="hfvit", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"hfvit {hfvit.__version__}")
    parser.set_defaults(accepts_recipe_options=False)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add(commands)
    for command in commands.choices.values():
        accept_dashes(command)
    return parser, dict(commands.choices)
