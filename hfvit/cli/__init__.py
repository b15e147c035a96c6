"""The `hfvit` command, one file for each of its commands. What costs time is imported inside the command."""

import argparse
import sys

import hfvit
from hfvit.cli import demo, listings, predict, push, report, sweep, train, validate, verify
from hfvit.errors import printable, run
from hfvit.utils.terminal import prepare_streams

COMMANDS = (train, sweep, verify, validate, predict, report, demo, push, listings)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console command; exits with the command's code."""
    prepare_streams()
    parser = build_parser()
    options, rest = parser.parse_known_args(argv)
    if rest and not options.takes_rest:
        parser.error(f"unrecognized arguments: {printable(' '.join(rest))}")
    options.rest = rest
    sys.exit(run(lambda: options.command(options)))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hfvit", description=hfvit.__doc__.splitlines()[0])
    parser.set_defaults(takes_rest=False)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add(commands)
    return parser
