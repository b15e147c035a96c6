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

    from hfvit.artifacts.export_folder import find_exports
    from hfvit.artifacts.run_record import RunRecord
    from hfvit.hub.files import EXPORTS
    from hfvit.hub.model_card import write_model_card
    from hfvit.report.page import write_page
    from hfvit.report.summary import summary_table, write_plots

    record = RunRecord.load(options.folder)
    folder = Path(options.folder).expanduser()
    exports, stale = find_exports(folder, record)
    for name in stale:
        print(f"hfvit: {folder / name} is older than the run and left out; export this model again", file=sys.stderr)
    plots = write_plots(record, folder)
    card = write_model_card(record, folder, {name: rows for name, rows in exports.items() if name in EXPORTS})
    print(summary_table(record, options.folder))
    print(f"report     {len(plots)} plots in {folder / 'plots'}, {card}")
    if options.html or options.open:
        page = write_page(record, folder, exports)
        print(f"page       {page}")
        if options.open:
            import webbrowser

            if not webbrowser.open(page.resolve().as_uri()):
                print("hfvit: no browser could be started here; open the page yourself", file=sys.stderr)
