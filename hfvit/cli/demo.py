"""`hfvit demo`."""

import argparse
import tempfile
from collections import Counter
from pathlib import Path

from hfvit.cli.options import add_revision, exit_codes, hub_options, positive_int
from hfvit.errors import DataError, HFViTError
from hfvit.utils.collector import importing
from hfvit.utils.quiet import quiet_libraries

EPILOG = f"""\
Without --static: a Gradio app for any artifact that `hfvit predict` takes. Install it with: pip install "hfvit[demo]"
It listens on 127.0.0.1 only, unless --host or --share is given.

With --static: a folder with a page that runs an ONNX export in the visitor's browser (transformers.js). Any static
server can serve it: a static Space on the Hub, GitHub Pages, or `python -m http.server` in the folder.

examples:
  hfvit demo outputs/quickstart
  hfvit demo outputs/quickstart --examples photos/ --port 8080
  hfvit demo outputs/quickstart/onnx --static page
  hfvit demo outputs/quickstart/onnx --static page --vendor node_modules --overwrite

{exit_codes(0, 2)}"""

MAX_EXAMPLES = 24
MAX_PORT = 65535
APP_ONLY = ("revision", "device", "threads", "host", "port", "share")
PAGE_ONLY = ("vendor", "title", "overwrite")


def add(commands) -> None:
    """Add the parser of `hfvit demo`."""
    parser = commands.add_parser(
        "demo",
        help="try a classifier in the browser",
        description="Serve a Gradio app of a classifier, or write a static page that runs its ONNX export.",
        epilog=EPILOG,
    )
    parser.add_argument("artifact", metavar="ARTIFACT", help="checkpoint folder, Hub id, .onnx file or export folder")
    parser.add_argument("--top_k", type=positive_int, default=5, help="classes shown per image [%(default)s]")
    parser.add_argument(
        "--examples",
        metavar="FOLDER",
        help=f"example images: a folder, pattern or file, of which the app shows {MAX_EXAMPLES} and a page 12, first"
        " one of each folder [app on 127.0.0.1: those of the run, else none]",
    )
    app = parser.add_argument_group("Gradio app")
    add_revision(app)
    app.add_argument("--device", help="where to run: cpu, cuda, cuda:1, ... [cuda if available, else cpu]")
    app.add_argument("--threads", type=positive_int, help="CPU threads [PyTorch's default]")
    app.add_argument("--host", help="address to listen on; 0.0.0.0 for the whole network [127.0.0.1]")
    app.add_argument("--port", type=positive_int, help="port to listen on [first free one from 7860 on]")
    app.add_argument("--share", action="store_true", help="open a public tunnel through Gradio's servers")
    page = parser.add_argument_group("static page")
    page.add_argument("--static", metavar="DIR", help="write a static page into this folder, and start no server")
    page.add_argument(
        "--vendor", metavar="FOLDER", help="copy transformers.js from this node_modules folder [load it from a CDN]"
    )
    page.add_argument("--title", help="heading of the page [name of the checkpoint]")
    page.add_argument("--overwrite", action="store_true", help="replace the files of a page in DIR; other files stay")
    parser.set_defaults(command=demo)


def demo(options: argparse.Namespace) -> None:
    """Run `hfvit demo ARTIFACT`."""
    unavailable = APP_ONLY if options.static else PAGE_ONLY
    problem = "not available with --static" if options.static else "only available with --static"
    for name in unavailable:
        if getattr(options, name):
            raise HFViTError(f"--{name}: {problem}.")
    if options.port and options.port > MAX_PORT:
        raise HFViTError(f"--port: must be at most {MAX_PORT}, got {options.port}.")
    if options.static:
        _write(options)
    else:
        _serve(options)


def _write(options: argparse.Namespace) -> None:
    from hfvit.demo.static_page import browser_file, check_page_folder, write_page
    from hfvit.demo.web_runtime import from_cdn, from_npm

    browser_file(options.artifact)
    check_page_folder(options.static, options.overwrite)
    runtime = from_npm(options.vendor) if options.vendor else from_cdn()
    quiet_libraries()
    file = write_page(
        options.artifact,
        options.static,
        runtime,
        title=options.title,
        examples=_examples(options),
        top_k=options.top_k,
        overwrite=options.overwrite,
    )
    print(f"Wrote {options.static}, a page that runs {file.name}. Serve it: python -m http.server -d {options.static}")


def _serve(options: argparse.Namespace) -> None:
    from hfvit.artifacts.artifact import find_artifact
    from hfvit.data.decode import is_url
    from hfvit.demo.app import load_gradio, serve
    from hfvit.demo.run_results import read_results, write_class_examples

    hub = hub_options(options)
    artifact = find_artifact(options.artifact)
    examples = _examples(options)
    if options.examples and is_url(options.examples):
        raise DataError(f"--examples: the app takes local files only, got {options.examples}. Download it first.")
    gradio = load_gradio()
    with importing():
        quiet_libraries()
        from hfvit.inference.classifier import load_classifier

    results = read_results(artifact, **hub)
    classifier = load_classifier(options.artifact, options.device, options.threads, tta=results.tta, **hub)
    classifier.temperature = results.temperature or 1.0
    if classifier.text_reader:
        raise HFViTError(
            f"ARTIFACT: the demo does not support image and text models, got {options.artifact}. Use `hfvit predict`."
        )
    with tempfile.TemporaryDirectory(prefix="hfvit-examples-") as folder:
        if not examples and not options.host and not options.share:  # images of the data set, for this machine only
            examples = write_class_examples(artifact, Path(folder), **hub)
        serve(
            gradio,
            classifier,
            host=options.host or "127.0.0.1",
            port=options.port,
            share=options.share,
            top_k=options.top_k,
            examples=examples,
            results=results,
        )


def _examples(options: argparse.Namespace) -> list[str]:
    from hfvit.data.decode import find_images

    names, wrong = find_images([options.examples] if options.examples else [])
    if wrong:
        raise DataError(f"--examples: {wrong[0]}.")
    return one_of_each_folder(names)[:MAX_EXAMPLES]


def one_of_each_folder(names: list[str]) -> list[str]:
    """Sort images so that the first of each folder come first.

    A folder may be that of a class.
    """
    seen: Counter[Path] = Counter()
    ranked = []
    for name in names:
        folder = Path(name).parent
        ranked.append((seen[folder], name))
        seen[folder] += 1
    return [name for _, name in sorted(ranked, key=lambda each: each[0])]
