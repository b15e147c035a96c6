"""`hfvit embed`."""

import argparse
import sys

from hfvit.cli.options import add_revision, add_runtime_options, exit_codes, hub_options
from hfvit.errors import DataError, HFViTError, mask_credentials, printable
from hfvit.utils.collector import importing
from hfvit.utils.formatting import counted
from hfvit.utils.quiet import quiet_libraries

EPILOG = f"""\
The features are the inputs of the head: the pooled output of the network. The Parquet file has the columns image (the
name) and features (a list of float32). An image that cannot be read, or whose features are not finite, is reported on
standard error and left out; the exit code is then 1.

examples:
  hfvit embed outputs/quickstart photos/ --output features.parquet
  hfvit embed user/my-vit "photos/**/*.jpg" --output features.parquet --normalize

{exit_codes(0, 1, 2)}"""


def add(commands) -> None:
    """Add the parser of `hfvit embed`."""
    parser = commands.add_parser(
        "embed",
        help="write pooled features of images",
        description="Write the pooled features of images to a Parquet file.",
        epilog=EPILOG,
    )
    parser.add_argument("artifact", metavar="ARTIFACT", help="checkpoint folder or Hub id")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="file, folder, pattern or URL")
    parser.add_argument("--output", metavar="FILE", required=True, help=".parquet file to write")
    parser.add_argument("--normalize", action="store_true", help="scale features to length 1, for cosine similarity")
    add_revision(parser)
    parser.add_argument("--bf16", action="store_true", help="use the weights of the checkpoint as bfloat16")
    add_runtime_options(parser, has_providers=False)
    parser.set_defaults(command=embed)


def embed(options: argparse.Namespace) -> int:
    """Run `hfvit embed ARTIFACT IMAGE ... --output FILE`."""
    from hfvit.data.decode import find_images
    from hfvit.utils.files import output_file

    hub = hub_options(options)
    output = output_file(options.output, "--output")
    if output.suffix.lower() != ".parquet":
        raise HFViTError(f"--output: must end in .parquet, got '{output}'.")
    names, wrong = find_images(options.images)
    if not names:
        raise DataError("IMAGE: no image found: " + "; ".join(map(printable, wrong)) + ".")
    with importing():
        quiet_libraries()
        from hfvit.inference.classifier import load_classifier
        from hfvit.inference.embed import embed_files

    classifier = load_classifier(options.artifact, options.device, options.threads, bf16=options.bf16, **hub)
    errors = embed_files(classifier, names, output, options.normalize, options.batch_size)
    for problem in [*errors.values(), *(f"{problem}." for problem in wrong)]:
        print(f"hfvit: {printable(mask_credentials(problem))}", file=sys.stderr)
    print(f"Wrote {printable(str(output))} with {counted(len(names) - len(errors), 'image')}")
    if len(errors) == len(names):
        raise DataError("IMAGE: no features could be computed of any image.")
    return 1 if errors or wrong else 0
