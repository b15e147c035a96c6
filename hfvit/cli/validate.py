"""`hfvit validate`"""

import argparse

from hfvit.cli.options import above_0, add_changes, add_running, from_0, given_providers, points, share
from hfvit.errors import GateError
from hfvit.utils.quiet import quiet_libraries

EPILOG = """\
The data are the validation rows that the reference's recipe.yaml held out, unless --dataset_name or --split name
others. Classes are matched by name. Latency and images/s are the model's alone, without reading and preprocessing,
but for a graph that does its own preprocessing (marked *).

The result is printed, saved in the reference's run.json and in the export.json or engine.json beside an exported file,
and with --output in a file of your own.

exit code: 0 every artifact passed, 4 one of them did not, 2 something was wrong with the command.

examples:
  hfvit validate outputs/quickstart
  hfvit validate outputs/quickstart outputs/quickstart/onnx outputs/quickstart/onnx/model_quantized.onnx
  hfvit validate outputs/quickstart onnx/ --split test --min_agreement 0.99 --output gate.json
  hfvit validate outputs/my_vit --merge_tokens 8 16 --max_accuracy_drop 2
  hfvit validate user/my-vit onnx/ --dataset_name path/to/folder --split test --max_samples 2000
"""


def add(commands) -> None:
    parser = commands.add_parser(
        "validate",
        help="compare checkpoints and exports on one data set, and fail when one lost accuracy",
        description="Run each artifact over the same pictures and hold it to the first.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = "checkpoint folder, Hub id, .onnx file, TensorRT engine or export folder"
    parser.add_argument("reference", metavar="REFERENCE", help=f"{what}: what the others are held to")
    parser.add_argument("others", metavar="OTHER", nargs="*", help="the same kinds, to be judged")
    data = parser.add_argument_group("data")
    data.add_argument("--dataset_name", help="Hub id, folder or 'digits' [the recipe's]")
    data.add_argument("--dataset_config_name", help="configuration of the data set, where it has several")
    data.add_argument("--split", help="split, slices such as test[:1000] too [the recipe's; validation]")
    data.add_argument("--image_column", help="found by its type when not given")
    data.add_argument("--label_column", help="found by its type when not given")
    data.add_argument("--text_column", help="texts that go with the images [the recipe's]")
    data.add_argument("--max_samples", type=above_0, help="use this many images, drawn with --seed [all]")
    data.add_argument("--seed", type=from_0, default=42, help="[%(default)s]")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max_accuracy_drop", type=points, default=0.5, help="in points [%(default)s]")
    limits.add_argument(
        "--min_agreement", type=share, help="share of the images, 0 to 1, that must get the reference's class [none]"
    )
    add_changes(parser.add_argument_group("the reference, changed"), several=True)
    add_running(parser, batch_size=16)
    parser.add_argument("--output", metavar="FILE", help="save the result as JSON, too")
    parser.set_defaults(command=validate)


def validate(options: argparse.Namespace) -> None:
    """`hfvit validate REFERENCE [OTHER ...]`"""
    from hfvit.artifacts.artifact import find_artifact
    from hfvit.utils.files import output_file

    paths = [options.reference, *options.others]
    for path in paths:
        find_artifact(path)  # a wrong path is told at once, before torch is imported
    providers = given_providers(options)
    output = output_file(options.output, "--output")
    quiet_libraries()
    from hfvit.evaluation.validate import validate as compare
    from hfvit.utils.files import write_object

    comparison = compare(
        options.reference,
        options.others,
        dataset_name=options.dataset_name,
        dataset_config_name=options.dataset_config_name,
        split=options.split,
        image_column=options.image_column,
        label_column=options.label_column,
        text_column=options.text_column,
        max_samples=options.max_samples,
        seed=options.seed,
        max_accuracy_drop=options.max_accuracy_drop,
        min_agreement=options.min_agreement,
        patch_size=options.patch_size or (),
        merge_tokens=options.merge_tokens or (),
        batch_size=options.batch_size,
        device=options.device,
        threads=options.threads,
        providers=providers,
    )
    print(comparison.table())
    written = [*comparison.saved]
    if output:
        write_object(output, comparison.gate.to_json())
        written.append(output)
    if written:
        print(f"saved    {', '.join(map(str, written))}")
    if not comparison.passed:
        raise GateError("\n".join(comparison.failures))
