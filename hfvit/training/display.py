"""Progress of a run, live in a terminal, in a log file or in a notebook."""

import logging
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, TextIO

import psutil
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text
from tqdm import tqdm
from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import has_length
from transformers.utils import is_in_notebook

from hfvit.metrics.classification import accuracy_interval
from hfvit.recipe.training_args import HFViTTrainingArguments
from hfvit.training.json_log import JsonLog, JsonLogCallback, epochs_of
from hfvit.utils.formatting import counted, duration
from hfvit.utils.terminal import PrintableFormatter

LINE_SECONDS = 30.0  # between two lines of a log file
REFRESHES_PER_SECOND = 2
PRIMARY_METRICS = {"eval_accuracy": "accuracy", "eval_map": "mAP"}  # key -> name, the first that is computed is shown


class MessageFilter(logging.Filter):
    """Pass messages of hfvit and errors of libraries, each warning once.

    Args:
        verbose: pass messages of libraries, too.
    """

    def __init__(self, verbose: bool = False):
        super().__init__()
        self.verbose = verbose
        self._seen: set[tuple[str, str]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if not self.verbose and record.levelno < logging.ERROR and record.name.split(".")[0] != "hfvit":
            return False
        if record.levelno < logging.WARNING:
            return True
        key = record.name, record.getMessage()
        is_new = key not in self._seen
        self._seen.add(key)
        return is_new


class MessageHandler(logging.StreamHandler):
    """Write log messages to the current `sys.stderr`.

    A live display replaces that stream.

    Args:
        verbose: show messages of libraries, too.
        to_stdout: write to standard output instead; a notebook marks standard error as an error.
    """

    def __init__(self, verbose: bool = False, to_stdout: bool = False):
        self._name_of_stream = "stdout" if to_stdout else "stderr"
        super().__init__(sys.stderr)
        self.setFormatter(PrintableFormatter("%(message)s"))
        self.addFilter(MessageFilter(verbose))

    def format(self, record: logging.LogRecord) -> str:
        """Format a message; on a terminal, lines end between words."""
        text = super().format(record)
        if not self.stream.isatty():
            return text
        wrapper = textwrap.TextWrapper(
            shutil.get_terminal_size().columns, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
        return "\n".join(map(wrapper.fill, text.split("\n")))

    @property
    def stream(self) -> TextIO:
        return getattr(sys, self._name_of_stream)

    @stream.setter
    def stream(self, value: TextIO) -> None:
        """Ignore the stream that the base class sets."""


@dataclass
class Evaluation:
    """Evaluation during the training.

    Args:
        step: optimizer step.
        epoch: epoch, with fractions.
        train_loss: last logged training loss, or None.
        loss: validation loss, or None.
        metric: name of the metric.
        value: its value.
        interval: 95 % interval of an accuracy, or None.
        is_best: whether it is the best so far by `metric_for_best_model`.
        is_saved: whether a checkpoint was saved after it.
    """

    step: int
    epoch: float
    train_loss: float | None
    loss: float | None
    metric: str
    value: float | None
    interval: tuple[float, float] | None
    is_best: bool = False
    is_saved: bool = False

    @property
    def score(self) -> str:
        """Return the formatted value."""
        if self.value is None:
            return "-"
        return f"{self.value:.2%}" if self.metric == "accuracy" else f"{self.value:.4f}"

    @property
    def range(self) -> str:
        """Return the formatted interval."""
        return "" if self.interval is None else "{:.1f} - {:.1f}%".format(*(100 * end for end in self.interval))

    @property
    def note(self) -> str:
        """Return whether it is the best and whether it was saved."""
        return ", ".join(["best"] * self.is_best + ["saved"] * self.is_saved)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


class TrainingProgress(TrainerCallback):
    """Collect what the Trainer logs; subclasses show it.

    Nothing is read from the device: losses and throughput are those of the Trainer's log.

    Attributes:
        work_before: function `(step, steps)` that returns what the time of the steps before `step` is proportional to.
    """

    def __init__(self) -> None:
        self.work_before: Callable[[int, int], int] = lambda step, steps: step
        self.started = time.monotonic()
        self.first_step = 0
        self.step = 0
        self.steps = 0
        self.epoch = 0.0
        self.epochs: float | None = None  # None for a stream of unknown length
        self.logs: dict[str, float] = {}
        self.batch = 0
        self.batches: int | None = None
        self.pending: Evaluation | None = None

    # ---- Trainer's events ----

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.monotonic()
        self.first_step = state.global_step
        self.steps = state.max_steps
        self.epochs = epochs_of(args, state)
        self._read(state)
        self.begin()

    def on_step_begin(self, args, state, control, **kwargs):
        self._show_pending(state)

    def on_step_end(self, args, state, control, **kwargs):
        self._read(state)
        self.update()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.logs = dict(logs)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        self.batch += 1
        self.batches = len(eval_dataloader) if has_length(eval_dataloader) else None
        self.update()

    def on_evaluate(self, args, state, control, metrics=None, eval_dataloader=None, **kwargs):
        self.batch = 0
        self._read(state)
        metrics = metrics or {}
        key = next((key for key in PRIMARY_METRICS if key in metrics), None)
        value = metrics.get(key)
        self.pending = Evaluation(
            step=state.global_step,
            epoch=state.epoch or 0.0,
            train_loss=self.logs.get("loss"),
            loss=metrics.get("eval_loss"),
            metric=PRIMARY_METRICS.get(key, "accuracy"),
            value=value,
            interval=_interval(value, eval_dataloader) if key == "eval_accuracy" else None,
        )

    def on_predict(self, args, state, control, **kwargs):
        self.batch = 0

    def on_save(self, args, state, control, **kwargs):
        if self.pending:
            self.pending.is_saved = True
        self._show_pending(state)

    def on_train_end(self, args, state, control, **kwargs):
        self._show_pending(state)
        self.end()

    def flush(self) -> None:
        """Show an evaluation after which the training was interrupted."""
        if self.pending:
            shown, self.pending = self.pending, None
            self.show(shown)

    def _read(self, state) -> None:
        self.step = state.global_step
        self.epoch = state.epoch or 0.0

    def _show_pending(self, state) -> None:
        if self.pending:
            self.pending.is_best = state.best_global_step == self.pending.step
            self.flush()

    # ---- What subclasses show ----

    def begin(self) -> None:
        """Show that the training begins."""

    def update(self) -> None:
        """Show the current step or batch."""

    def show(self, evaluation: Evaluation) -> None:
        """Show an evaluation."""

    def end(self) -> None:
        """Show that the training has ended."""

    @property
    def seconds_left(self) -> float | None:
        """Estimate the seconds to the end of training and its evaluations.

        Returns None before the first step.
        """
        first, now, last = (self.work_before(step, self.steps) for step in (self.first_step, self.step, self.steps))
        if now == first:
            return None
        return (time.monotonic() - self.started) / (now - first) * (last - now)

    @property
    def memory(self) -> str:
        """Return the peak memory of the GPU as logged, else the memory of this process."""
        peak = self.logs.get("peak_memory_gib")
        used = psutil.Process().memory_info().rss / 2**30 if peak is None else peak
        return f"{used:.1f} GiB"

    @property
    def values(self) -> list[str]:
        """Return throughput, loss, learning rate and memory."""
        shown = []
        if "images_per_second" in self.logs:
            shown.append(f"{self.logs['images_per_second']:,.0f} images/s")
        if "loss" in self.logs:
            shown.append(f"loss {self.logs['loss']:.4f}")
        if "learning_rate" in self.logs:
            shown.append(f"lr {self.logs['learning_rate']:.1e}")
        return [*shown, self.memory]


def _interval(accuracy: float | None, eval_dataloader) -> tuple[float, float] | None:
    """Return the 95 % interval of an accuracy on a data set of known length."""
    dataset = getattr(eval_dataloader, "dataset", None)
    images = len(dataset) if has_length(dataset) else getattr(dataset, "images", None)  # a stream counts its images
    if accuracy is None or not images:
        return None
    low, high = accuracy_interval(round(accuracy * images), images)
    return low, high


class LineProgress(TrainingProgress):
    """Print a line for each evaluation, and one every `LINE_SECONDS`.

    Args:
        to_stdout: write to standard output instead of standard error.
    """

    def __init__(self, to_stdout: bool = False):
        super().__init__()
        self.to_stdout = to_stdout
        self._printed = time.monotonic()

    def begin(self) -> None:
        resumed = f", from step {self.first_step:,}" if self.first_step else ""
        epochs = "" if self.epochs is None else f", {counted(self.epochs, 'epoch')}"
        self._print([f"Training: {counted(self.steps, 'step')}{epochs}{resumed}"])

    def update(self) -> None:
        if time.monotonic() - self._printed < LINE_SECONDS:
            return
        if self.batch:
            self._print([self._place, f"evaluating batch {self.batch}/{self.batches or '?'}"])
        else:
            self._print([self._place, *self.values, *self._left])

    def show(self, evaluation: Evaluation) -> None:
        interval = f" ({evaluation.range})" if evaluation.range else ""
        cells = [
            self._place,
            f"train loss {_number(evaluation.train_loss)}",
            f"validation loss {_number(evaluation.loss)}",
            f"{evaluation.metric} {evaluation.score}{interval}",
            *([evaluation.note] if evaluation.note else []),
            *self._left,
        ]
        self._print(cells)

    @property
    def _place(self) -> str:
        width = len(str(self.steps))
        epoch = "" if self.epochs is None else f"  epoch {self.epoch:.4g}"
        return f"step {self.step:>{width}}/{self.steps}{epoch}"

    @property
    def _left(self) -> list[str]:
        seconds = self.seconds_left
        return [f"{duration(seconds)} left"] if seconds and self.step < self.steps else []

    def _print(self, cells: list[str]) -> None:
        self._printed = time.monotonic()
        print("  ".join(cells), file=sys.stdout if self.to_stdout else sys.stderr, flush=True)


class Column(NamedTuple):
    """Column of evaluations: heading, width, minimum width of the terminal."""

    heading: str
    width: int
    from_width: int = 0


COLUMNS = (
    Column("epoch", 5),
    Column("step", 7, 80),
    Column("train loss", 10),
    Column("val. loss", 9),
    Column("", 8),  # the metric
    Column("95 % interval", 13),
    Column("", 4),  # best; with enough space also whether it was saved
)
WIDTH_OF_NOTE = 70


class LiveProgress(TrainingProgress):
    """Show a progress bar with values, and a table row for each evaluation.

    Args:
        console: console of the terminal.
    """

    def __init__(self, console: Console):
        super().__init__()
        self.console = console
        self.title: str | None = None
        self._live: Live | None = None
        self._has_head = False
        self._spinner = Spinner("dots")

    @contextmanager
    def phase(self, title: str) -> Iterator[None]:
        """Show a phase outside the training.

        Args:
            title: what is done, such as "Drawing figures".
        """
        self.batch = 0
        self.batches = None
        self.title = title
        self._start()
        try:
            yield
        finally:
            self.stop()

    def begin(self) -> None:
        self.title = None
        self._start()

    def end(self) -> None:
        self.stop()

    def stop(self) -> None:
        """Remove the display from the terminal."""
        if self._live:
            self._live.stop()
            self._live = None

    def show(self, evaluation: Evaluation) -> None:
        if not self._has_head:
            self._has_head = True
            headings = [column.heading for column in COLUMNS]
            headings[4] = evaluation.metric
            self._print_row(headings, style="bold")
        short_note = "best" if evaluation.is_best else ""
        self._print_row(
            [
                f"{evaluation.epoch:.4g}",
                f"{evaluation.step:,}",
                _number(evaluation.train_loss),
                _number(evaluation.loss),
                evaluation.score,
                evaluation.range,
                evaluation.note if self.console.width >= WIDTH_OF_NOTE else short_note,
            ],
            style="green" if evaluation.is_best else "",
        )

    def _print_row(self, cells: list[str], style: str) -> None:
        shown = [
            cell.ljust(column.width) if column is COLUMNS[-1] else cell.rjust(column.width)
            for column, cell in zip(COLUMNS, cells, strict=True)
            if self.console.width >= column.from_width
        ]
        self.console.print(Text("  ".join(shown).rstrip(), style=style), no_wrap=True, overflow="ellipsis")

    def _start(self) -> None:
        if self._live:  # after a rewind
            return
        # Output of callbacks to a file must not go to the terminal.
        self._live = Live(
            get_renderable=self._render,
            console=self.console,
            refresh_per_second=REFRESHES_PER_SECOND,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),
        )
        self._live.start()

    def _render(self) -> RenderableType:
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True)
        if self.title is not None:
            if not self.batches:
                self._spinner.update(text=Text(f"{self.title} ..."))
                return self._spinner
            grid.add_row(self.title, ProgressBar(self.batches, self.batch), f"{self.batch}/{self.batches} batches")
            return grid
        seconds = self.seconds_left
        left = "" if seconds is None else f"  {tqdm.format_interval(seconds)} left"
        grid.add_row("Training", ProgressBar(self.steps, self.step), f"{self.step:,}/{self.steps:,} steps{left}")
        values = self.values
        if self.batch:
            values = [f"evaluating batch {self.batch}/{self.batches or '?'}", *values[:1], *values[-1:]]
        epoch = [] if self.epochs is None else [f"epoch {self.epoch:.2f}/{self.epochs:g}"]
        line = Text("  ".join([*epoch, *values]), "dim", no_wrap=True)
        line.truncate(self.console.width, overflow="ellipsis")
        return Group(grid, line)


class Display:
    """Show phases, progress and messages in a terminal, log file or notebook.

    Args:
        args: training arguments; `disable_tqdm` is set where no progress bars can be drawn.
    """

    def __init__(self, args: HFViTTrainingArguments):
        self.is_main = args.process_index == 0
        self.is_quiet = args.quiet or not self.is_main
        self._verbose = args.verbose
        self._handler: MessageHandler | None = None
        self.in_notebook = is_in_notebook()
        self.json_log = JsonLog(args.json_log) if args.json_log and self.is_main else None
        self.live: LiveProgress | None = None
        self.callbacks: list[TrainerCallback] = []
        with_bars = not args.disable_tqdm and not self.is_quiet
        if self.is_quiet:
            pass
        elif self.in_notebook and with_bars:
            from hfvit.training.notebook import NotebookProgress

            self.callbacks.append(NotebookProgress())
        elif with_bars and _is_terminal(sys.stderr):
            self.live = LiveProgress(Console(stderr=True, highlight=False, markup=False))
            self.callbacks.append(self.live)
        else:
            with_bars = False
            self.callbacks.append(LineProgress(to_stdout=self.in_notebook))
        args.disable_tqdm = not with_bars
        self.with_bars = with_bars
        if self.json_log:
            self.callbacks.append(JsonLogCallback(self.json_log))

    def __enter__(self) -> Self:
        root = logging.getLogger()
        if not root.handlers:  # otherwise the calling program has set up its logging
            self._handler = MessageHandler(self._verbose, to_stdout=self.in_notebook)
            root.addHandler(self._handler)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: Any) -> None:
        for callback in self.callbacks:
            if isinstance(callback, TrainingProgress):
                callback.flush()
        if self.live:
            self.live.stop()
        if self._handler:
            logging.getLogger().removeHandler(self._handler)
        if self.json_log:
            self.json_log.close(kind)

    @property
    def log_level(self) -> int:
        """Return the level of hfvit's messages; only the main process prints."""
        if not self.is_main:
            return logging.ERROR
        if self.is_quiet:
            return logging.WARNING
        return logging.DEBUG if self._verbose else logging.INFO

    def attach(self, trainer: Trainer) -> None:
        """Replace the Trainer's own progress bars and printed logs."""
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        if self.in_notebook:
            from transformers.utils.notebook import NotebookProgressCallback

            trainer.remove_callback(NotebookProgressCallback)
        progressive = getattr(trainer, "progressive", None)
        for callback in self.callbacks:
            if progressive and isinstance(callback, TrainingProgress):
                callback.work_before = progressive.pixels_before
            trainer.add_callback(callback)

    @contextmanager
    def phase(self, title: str) -> Iterator[None]:
        """Show what is done after the training, such as "Drawing figures"."""
        if self.json_log:
            self.json_log.write("phase", name=title)
        if self.live:
            with self.live.phase(title):
                yield
            return
        if not self.is_quiet:
            print(title, file=sys.stdout if self.in_notebook else sys.stderr, flush=True)
        yield

    def result(self, text: str, values: dict[str, Any]) -> None:
        """Print the summary of the run.

        Args:
            text: summary.
            values: metrics of each split, for the JSON log.
        """
        if self.json_log:
            self.json_log.write("result", **values)
        if not self.is_quiet and not self.in_notebook:  # a notebook shows the returned record
            print(f"\n{text}", flush=True)


def _is_terminal(stream: TextIO) -> bool:
    """Return whether a live display can be drawn on a stream."""
    return stream.isatty() and not Console(file=stream).is_dumb_terminal
