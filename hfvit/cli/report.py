"""`hfvit report`."""

import argparse
import sys

from hfvit.cli.options import exit_codes
from hfvit.errors import printable

EPILOG = f"""\
Plots (plots/*.png, light and dark) and the model card (README.md) come from run.json and examples.npz; neither the
model nor the data set is loaded. Text above and below the generated part of the model card is kept. report.html is
a single file that works offline. It shows images of the data set, and `hfvit push` leaves it out.

examples:
  hfvit report outputs/quickstart
  hfvit report outputs/quickstart --html
  hfvit report outputs/quickstart --open

{exit_codes(0, 2, 7)}"""


def add(commands) -> None:
    """Add the parser of `hfvit report`."""
    parser = commands.add_parser(
        "report",
        help="regenerate the plots, model card and HTML page of a run",
        description="Regenerate the plots and the model card of a run, and optionally write an HTML page.",
        epilog=EPILOG,
    )
    parser.add_argument("folder", metavar="OUTPUT_DIR", help="output folder of a run")
    parser.add_argument("--html", action="store_true", help="also write OUTPUT_DIR/report.html")
    parser.add_argument("--open", action="store_true", help="write report.html and open it in the browser")
    parser.set_defaults(command=report)


def report(options: argparse.Namespace) -> None:
    """Run `hfvit report OUTPUT_DIR`."""
    from hfvit.artifacts.run_summary import summary_table
    from hfvit.report.write import write_report
    from hfvit.utils.files import expand_user
    from hfvit.utils.terminal import terminal_width

    written = write_report(options.folder, html=options.html or options.open)
    folder = expand_user(options.folder)
    for export in written.stale:
        print(
            f"hfvit: left out {printable(str(export))}, which is older than the run; export it again", file=sys.stderr
        )
    print(summary_table(written.record, options.folder, terminal_width()))
    print(f"report     {len(written.plots)} plots in {printable(f'{folder}/plots, {written.card}')}")
    if written.page:
        print(f"page       {printable(str(written.page))}")
    if options.open:
        import webbrowser

        if not webbrowser.open(written.page.resolve().as_uri()):
            print(f"hfvit: could not start a browser; open {written.page}", file=sys.stderr)
