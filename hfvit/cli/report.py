"""`hfvit report`"""

import argparse
import sys

EPILOG = """\
Plots (plots/*.png, each for light and for dark pages) and the model card (README.md) are made from run.json, and from
examples.npz, which holds the few pictures that are shown; neither the model nor the data set is needed. What was
written above or below the generated text of the card stays. With --html or --open, report.html holds everything in one
file that needs no network. It shows pictures of the data set, and hfvit never pushes it.

examples:
  hfvit report outputs/quickstart
  hfvit report outputs/quickstart --html
  hfvit report outputs/quickstart --open
"""


def add(commands) -> None:
    parser = commands.add_parser(
        "report",
        help="draw the plots of a run again, write its card, and show it all as one page",
        description="Make plots, model card and a page from the run.json of a run's folder.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="OUTPUT_DIR", help="the output folder of a run")
    parser.add_argument("--html", action="store_true", help="write OUTPUT_DIR/report.html, too")
    parser.add_argument("--open", action="store_true", help="write it and open it in the browser")
    parser.set_defaults(command=report)


def report(options: argparse.Namespace) -> None:
    """`hfvit report OUTPUT_DIR`"""
    from pathlib import Path

    from hfvit.report.summary import summary_table
    from hfvit.report.write import write_report

    written = write_report(options.folder, html=options.html or options.open)
    folder = Path(options.folder).expanduser()
    for export in written.stale:
        print(f"hfvit: {export} is older than the run and left out; export this model again", file=sys.stderr)
    print(summary_table(written.record, options.folder))
    print(f"report     {len(written.plots)} plots in {folder / 'plots'}, {written.card}")
    if written.page:
        print(f"page       {written.page}")
    if options.open:
        import webbrowser

        if not webbrowser.open(written.page.resolve().as_uri()):
            print("hfvit: no browser could be started here; open the page yourself", file=sys.stderr)
