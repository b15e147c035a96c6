"""Summary table of a run."""

from pathlib import Path

from hfvit.artifacts.run_record import RunRecord
from hfvit.artifacts.run_sections import Training
from hfvit.errors import printable
from hfvit.utils.formatting import aligned, duration


def summary_table(record: RunRecord, output_dir: str | Path) -> str:
    """Format the summary of a run: metrics of each split, model, time and speed."""
    tables = {split: metrics.columns() for split, metrics in record.metrics.items()}
    header = ("split", *next(iter(tables.values())))
    rows = [(split, *columns.values()) for split, columns in tables.items()]
    model = record.model
    training = record.training
    texts = model.texts
    resumed = f", resumed at step {training.resumed_at_step:,}" if training.resumed_at_step else ""
    epochs = "" if training.epochs is None else f", {training.epochs:.4g} epochs"
    lines = [
        *aligned([header, *rows]),
        "",
        f"model      {model.architecture}, {model.image_size[0]} px, {model.parameters / 1e6:.1f} M parameters"
        f" ({model.trained_parameters / 1e6:.1f} M trained)",
        *([f"texts      {texts.model_type}, fusion {texts.fusion}"] if texts else []),
        f"training   {training.steps:,} steps{epochs}{resumed};"
        f" {duration(training.seconds)},"
        f" {training.images_per_second:,.0f} images/s, {training.data_wait:.1%} of the time waiting for data,"
        f" {training.processes} process(es), precision {training.precision}",
        f"selected   {selection(training)}{_without_test_split(record)}",
        *_temperature_line(record),
        *_thresholds_line(record),
        f"files      {output_dir}",
    ]
    return "\n".join(map(printable, lines))


def selection(training: Training) -> str:
    """Describe which checkpoint or penalty was selected, and by which metric."""
    if training.best_step:
        return f"step {training.best_step} by validation {training.best_metric_name}"
    if probe := training.probe:
        return f"C = {probe.best_c:g} of {len(probe.c)} by validation {probe.selected_by}"
    return "the last step"


def _without_test_split(record: RunRecord) -> str:
    """Note that the results are optimistic if there is no test split."""
    if record.role == "test" or not record.data.selected_by:
        return ""
    name = record.result.score.name
    return f"; no test split: the {name} above is of the split used for selection, so it is optimistic"


def _temperature_line(record: RunRecord) -> list[str]:
    temperature = record.temperature
    if temperature is None or record.thresholds:
        return []
    if temperature.value is None:
        return [f"calibrated no: {temperature.reason}"]
    before = record.result
    after = temperature.splits[record.role]
    return [
        f"calibrated temperature {temperature.value:.2f}, fitted on the validation split; {record.role} ECE"
        f" {before.ece:.4f} -> {after.ece:.4f}, loss {before.loss:.4f} -> {after.loss:.4f}"
    ]


def _thresholds_line(record: RunRecord) -> list[str]:
    thresholds = record.thresholds
    if thresholds is None:
        return []
    low, high = min(thresholds.values), max(thresholds.values)
    return [f"thresholds {low:.2f} to {high:.2f}, fitted for each class on the {thresholds.fitted_on} split"]
