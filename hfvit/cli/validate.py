"""`hfvit validate`."""

import argparse

from hfvit.cli.options import (
    ARTIFACT_KINDS,
    add_runtime_options,
    add_token_options,
    add_tta,
    exit_codes,
    fraction,
    non_negative_int,
    parse_providers,
    percentage_points,
    positive_int,
)
from hfvit.errors import GateError, HFViTError, printable
from hfvit.export.options import MAX_ACCURACY_DROP, refuse_unused
from hfvit.utils.collector import importing
from hfvit.utils.quiet import hide_data_bars, quiet_libraries

LIMITS = ("max_accuracy_drop", "min_agreement")

EPILOG = f"""\
Without --dataset_name and --split, the images are the validation split of the reference's recipe.yaml. Classes are
matched by name. Latency and images/s cover the model only, not reading and preprocessing, except for a graph that
includes the preprocessing (marked *).

Below the table are the other metrics of REFERENCE; --per_class, --plots and --output have those of each class.

The result is printed and saved: in run.json of the reference, in export.json or engine.json next to an exported file,
and in the file of --output.

examples:
  hfvit validate outputs/quickstart
  hfvit validate outputs/quickstart --dataset_name path/to/folder --split test --per_class --plots plots
  hfvit validate outputs/quickstart outputs/quickstart/onnx outputs/quickstart/onnx/model_quantized.onnx
  hfvit validate outputs/quickstart onnx/ --split test --min_agreement 0.99 --output gate.json
  hfvit validate outputs/my_vit --merge_tokens 8 16 --max_accuracy_drop 2
  hfvit validate user/my-vit onnx/ --dataset_name path/to/folder --split test --max_samples 2000

{exit_codes(0, 2, 4)}"""


def add(commands) -> None:
    """Add the parser of `hfvit validate`."""
    parser = commands.add_parser(
        "validate",
        help="compare the accuracy of checkpoints and exports on one data set",
        description="Compare checkpoints, ONNX files and engines with a reference on the same images.",
        epilog=EPILOG,
    )
    parser.add_argument("reference", metavar="REFERENCE", help=ARTIFACT_KINDS)
    parser.add_argument("others", metavar="OTHER", nargs="*", help="artifacts to compare with the reference")
    parser.add_argument("--revision", help="branch, tag or commit of REFERENCE, if it is a Hub id [main]")
    data = parser.add_argument_group("data")
    data.add_argument("--dataset_name", help="Hub id, folder or 'digits' [the recipe's]")
    data.add_argument("--dataset_config_name", help="configuration of the data set, if it has several")
    data.add_argument("--split", help="split, or a slice such as test[:1000] [the recipe's validation split]")
    data.add_argument("--image_column", help="name of the image column [found by its type]")
    data.add_argument("--label_column", nargs="+", help="name of the label column, or of several [found by type]")
    data.add_argument("--text_column", help="name of the text column [the recipe's]")
    data.add_argument("--max_samples", type=positive_int, help="largest number of images, sampled with --seed [all]")
    data.add_argument("--seed", type=non_negative_int, default=42, help="seed of --max_samples [%(default)s]")
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max_accuracy_drop",
        type=percentage_points,
        help=f"largest drop in accuracy beyond chance, in percentage points [{MAX_ACCURACY_DROP}]",
    )
    limits.add_argument(
        "--min_agreement",
        type=fraction,
        help="smallest fraction of images, 0 to 1, that get the class that the reference predicts [none]",
    )
    add_token_options(parser.add_argument_group("variants of the reference"), several=True)
    parser.add_argument("--bf16", action="store_true", help="also compare the reference with bfloat16 weights")
    add_tta(parser, "flip also evaluates each artifact with the mean of the logits of an image and its mirror image")
    add_runtime_options(parser)
    parser.add_argument("--per_class", action="store_true", help="print precision, recall and F1 of each class")
    parser.add_argument("--plots", metavar="DIR", help="draw confusion matrix, recall by class and calibration to DIR")
    parser.add_argument("--output", metavar="FILE", help="save the result and all metrics of REFERENCE as JSON")
    parser.set_defaults(command=validate)


def validate(options: argparse.Namespace) -> None:
    """Run `hfvit validate REFERENCE [OTHER ...]`."""
    from hfvit.artifacts.artifact import find_artifact, revision_arguments
    from hfvit.utils.files import check_writable, expand_user, output_file

    if not (options.others or options.patch_size or options.merge_tokens or options.bf16 or options.tta):
        refuse_unused(options, LIMITS, "limits an OTHER or variant, but only REFERENCE is evaluated")
    revision_arguments(options.reference, options.revision)
    for path in options.others:
        find_artifact(path)  # before torch is imported, so that a wrong path is reported at once
    providers = parse_providers(options)
    output = output_file(options.output, "--output")
    if plots := options.plots and expand_user(options.plots):
        check_writable(plots, "--plots", HFViTError)
    with importing():
        quiet_libraries()
        hide_data_bars()
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
        **{name: value for name in LIMITS if (value := getattr(options, name)) is not None},
        patch_size=options.patch_size or (),
        merge_tokens=options.merge_tokens or (),
        bf16=options.bf16,
        tta=options.tta,
        batch_size=options.batch_size,
        device=options.device,
        threads=options.threads,
        providers=providers,
        revision=options.revision,
    )
    print(comparison.table())
    if options.per_class and comparison.metrics is not None:
        print(f"\n{comparison.class_table()}\n")
    written = [*comparison.saved]
    if output:
        metrics = comparison.metrics and comparison.metrics.to_json()
        write_object(output, {**comparison.gate.to_json(), "metrics": metrics})
        written.append(output)
    if plots and comparison.metrics is not None:
        from hfvit.report.plots import write_metric_plots

        write_metric_plots(comparison.metrics, options.split or "validation", plots)
        written.append(plots)
    if written:
        print(f"saved    {printable(', '.join(map(str, written)))}")
    if not comparison.passed:
        raise GateError("\n".join(comparison.failures))
