"""`hfvit report`"""

import argparse
import sys

from hfvit.cli.options import exit_codes

EPILOG = f"""\
Plots (plots/*.png, light and dark) and the model card (README.md) are made from run.json and examples.npz; neither the
model nor the data set is needed. Edits of the card are kept. report.html is one file that needs no network; it shows
images of the data set, and hfvit never pushes it.

examples:
  hfvit report outputs/quickstart
  hfvit report outputs/quickstart --html
  hfvit report outputs/quickstart --open

{exit_codes(0, 2, 7)}"""


def add(commands) -> None:
    parser = commands.add_parser(
        "report",
        help="write the plots, model card and HTML page of a run again",
        description="Write the plots and the model card of a run again, and an HTML page of both.",
        epilog=EPILOG,
    )
    parser.add_argument("folder", metavar="OUTPUT_DIR", help="output folder of a run")
    parser.add_argument("--html", action="store_true", help="also write OUTPUT_DIR/report.html")
    parser.add_argument("--open", action="store_true", help="write report.html and open it in the browser")
    parser.set_defaults(command=report)


def report(options: argparse.Namespace) -> None:
    """`hfvit report OUTPUT_DIR`"""
    from pathlib import Path

    from hfvit.artifacts.export_folder import find_exports
    from hfvit.artifacts.run_record import read_run
    from hfvit.hub.files import EXPORTS
    from hfvit.hub.model_card import write_model_card
    from hfvit.report.page import write_page
    from hfvit.report.summary import summary_table, write_plots

    facts, folder = read_run(options.folder), Path(options.folder).expanduser()
    exports, stale = find_exports(folder, facts)
    for name in stale:
        print(f"hfvit: {folder / name} is older than the run and left out; export this model again", file=sys.stderr)
    plots = write_plots(facts, folder)
    card = write_model_card(facts, folder, {name: files for name, files in exports.items() if name in EXPORTS})
    print(summary_table(facts, options.folder))
    print(f"report     {len(plots)} plots in {folder / 'plots'}, {card}")
    if options.html or options.open:
        page = write_page(facts, folder, exports)
        print(f"page       {page}")
        if options.open:
            import webbrowser

            if not webbrowser.open(page.resolve().as_uri()):
                print("hfvit: no browser could be started here; open the page yourself", file=sys.stderr)
