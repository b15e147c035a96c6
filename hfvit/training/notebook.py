"""Progress of a training in a notebook."""

from transformers.utils.notebook import NotebookProgressCallback

SHOWN = ("eval_loss", "eval_accuracy", "eval_map")


class NotebookProgress(NotebookProgressCallback):
    """Show transformers' progress bar and table with the metrics of the run.

    These are loss, accuracy and the metric that selects.
    """

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        selects = f"eval_{(args.metric_for_best_model or 'loss').removeprefix('eval_')}"
        # A copy, as the base class removes entries.
        shown = {key: value for key, value in (metrics or {}).items() if key in (*SHOWN, selects)}
        super().on_evaluate(args, state, control, metrics=shown, **kwargs)
