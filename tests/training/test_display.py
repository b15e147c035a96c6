"""Progress of a run in a log file, a terminal, JSON lines and quietly."""

import io
import json
import logging
import math
import os
import pty
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from helpers.messages import option_of
from helpers.runs import fails
from rich.console import Console
from scipy.stats import binomtest

from hfvit.pipeline import main
from hfvit.recipe.training_args import HFViTTrainingArguments
from hfvit.training import display
from hfvit.training.display import LineProgress, LiveProgress, MessageFilter, TrainingProgress, _is_terminal
from hfvit.training.json_log import epochs_of
from hfvit.utils.quiet import quiet_run

IMAGES = 144
METRICS = {"eval_loss": 0.5, "eval_accuracy": 0.75}
ARGS = SimpleNamespace(max_steps=-1, epochs=2.5)
LOADER = SimpleNamespace(dataset=range(IMAGES))


def state(step: int, best: int | None = None):
    return SimpleNamespace(global_step=step, max_steps=60, epoch=step / 20, num_train_epochs=3, best_global_step=best)


def train(progress: TrainingProgress, evaluations: int = 3) -> None:
    """Call the events of a training of three epochs, whose second evaluation is the best."""
    progress.on_train_begin(ARGS, state(0), None)
    for number in range(1, evaluations + 1):
        step = 20 * number
        best = min(step, 40)
        progress.on_step_begin(None, state(step - 1, best), None)
        progress.on_step_end(None, state(step, best), None)
        progress.on_log(None, state(step), None, logs={"loss": 2.0, "learning_rate": 1e-3, "images_per_second": 500.0})
        progress.on_prediction_step(None, state(step), None, eval_dataloader=range(3))
        progress.on_evaluate(None, state(step), None, metrics=dict(METRICS), eval_dataloader=LOADER)
        progress.on_save(None, state(step, best), None)
    progress.on_train_end(None, state(60, 40), None)


@pytest.mark.parametrize("width", [100, 60])
def test_live_display_fits_the_terminal_and_marks_the_best(width, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    stream = io.StringIO()
    progress = LiveProgress(Console(file=stream, force_terminal=True, width=width, color_system=None))
    train(progress)
    text = re.sub(r"\x1b\[[0-9?;]*[a-zA-Z]", "", stream.getvalue()).replace("\r", "\n")
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(map(len, lines)) <= width
    rows = [line.split() for line in lines if "75.00%" in line]
    assert len(rows) == 3
    low, high = binomtest(108, IMAGES).proportion_ci(0.95, method="wilson")
    assert all(f"{100 * low:.1f} - {high:.1%}" in " ".join(row) for row in rows)
    assert [any("best" in cell for cell in row) for row in rows] == [True, True, False]
    assert all((row[-1] == "saved") == (width == 100) for row in rows)


def test_log_has_one_line_for_each_evaluation(capsys):
    train(LineProgress())
    lines = capsys.readouterr().err.splitlines()
    assert re.search(r"\b60\b.*\b2\.5\b", lines[0])
    assert [line.split("  ")[0] for line in lines[1:]] == ["step 20/60", "step 40/60", "step 60/60"]
    assert not any("\r" in line for line in lines)
    assert "best" in lines[2]
    assert "best" not in lines[3]


def test_log_of_a_stream_of_unknown_length_has_no_epochs(capsys):
    progress = LineProgress()
    unknown = SimpleNamespace(**vars(state(20, 20)) | {"epoch": None, "num_train_epochs": sys.maxsize})
    progress.on_train_begin(SimpleNamespace(max_steps=60), unknown, None)
    progress.on_step_end(None, unknown, None)
    loader = SimpleNamespace(dataset=SimpleNamespace(images=IMAGES))
    progress.on_evaluate(None, unknown, None, metrics=dict(METRICS), eval_dataloader=loader)
    progress.on_train_end(None, unknown, None)
    first, second = capsys.readouterr().err.splitlines()
    assert "epoch" not in first + second
    low, _ = binomtest(108, IMAGES).proportion_ci(0.95, method="wilson")
    assert f"{100 * low:.1f}" in second


def test_log_has_a_line_when_nothing_was_printed_for_long(capsys, monkeypatch):
    progress = LineProgress()
    progress.on_train_begin(ARGS, state(0), None)
    progress.on_log(None, state(1), None, logs={"loss": 2.5, "learning_rate": 1e-3})
    progress.on_step_end(None, state(1), None)
    monkeypatch.setattr(display, "LINE_SECONDS", 0.0)
    progress.on_step_end(None, state(2), None)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "loss 2.5000" in lines[1]


def test_time_left_counts_from_the_step_of_a_resume(monkeypatch):
    progress = TrainingProgress()
    monkeypatch.setattr(display.time, "monotonic", lambda: 100.0)
    progress.on_train_begin(ARGS, state(20), None)
    assert progress.seconds_left is None
    monkeypatch.setattr(display.time, "monotonic", lambda: 110.0)
    progress.on_step_end(None, state(40), None)
    assert progress.seconds_left == pytest.approx(10.0)


def test_messages_of_libraries_and_repeated_warnings_are_hidden():
    def passes(filter_, name, level, text):
        return filter_.filter(logging.LogRecord(name, level, "", 0, text, (), None))

    once = MessageFilter()
    assert [passes(once, "hfvit.data", logging.WARNING, "few images") for _ in range(2)] == [True, False]
    assert [passes(once, "hfvit", logging.INFO, "same") for _ in range(2)] == [True, True]
    assert not passes(once, "accelerate", logging.WARNING, "x")
    assert passes(once, "accelerate", logging.ERROR, "x")
    assert passes(MessageFilter(verbose=True), "accelerate", logging.INFO, "x")


def test_library_bars_are_restored():
    from datasets.utils import are_progress_bars_disabled
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    level = transformers_logging.get_verbosity()
    with quiet_run():
        assert not transformers_logging.is_progress_bar_enabled()
        assert are_progress_bars_disabled()
    assert (transformers_logging.is_progress_bar_enabled(), are_progress_bars_disabled()) == before
    assert transformers_logging.get_verbosity() == level


def test_terminal_is_detected(monkeypatch):
    main_end, terminal = pty.openpty()
    with os.fdopen(terminal, "w") as stream:
        monkeypatch.setenv("TERM", "xterm")
        assert _is_terminal(stream)
        monkeypatch.setenv("TERM", "dumb")
        assert not _is_terminal(stream)
    os.close(main_end)
    assert not _is_terminal(io.StringIO())


def test_run_writes_lines_json_and_a_summary(recipe, capsys, tmp_path):
    main([str(recipe), "--json_log", str(tmp_path / "logs" / "run.jsonl"), "--logging_steps", "2"])
    printed = capsys.readouterr()
    assert "{'" not in printed.out + printed.err
    assert "Writing model shards" not in printed.err
    assert printed.err.count("validation loss") == 2
    assert "top-5" not in printed.out  # three classes
    assert "fp32, 1 process" in printed.out
    assert len((printed.out + printed.err).splitlines()) < 30
    events = [json.loads(line) for line in (tmp_path / "logs" / "run.jsonl").read_text().splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds.count("evaluation") == kinds.count("checkpoint") == 2
    assert kinds[-2:] == ["result", "end"]
    assert events[-1]["error"] is None
    evaluations = [event for event in events if event["event"] == "evaluation"]
    assert evaluations[0]["eval_loss"] > 0
    values = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert not {"quiet", "verbose", "json_log"} & set(values)


def test_quiet_run_prints_nothing_and_logs_its_error(recipe, capsys, tmp_path):
    main([str(recipe), "--quiet", "--max_steps", "2"])
    printed = capsys.readouterr()
    assert printed.out + printed.err == ""
    log = tmp_path / "error.jsonl"
    fails(capsys, recipe, "--overwrite_output_dir", "--dataset_name", "./missing", "--json_log", log)
    assert json.loads(log.read_text().splitlines()[-1])["error"] == "DataError"


def test_json_log_that_cannot_be_written_is_an_error(recipe, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert option_of(fails(capsys, recipe, "--json_log", tmp_path / "file" / "log.jsonl")) == "json_log"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_json_log_on_a_full_disk_does_not_end_the_run(recipe, caplog, tmp_path):
    main([str(recipe), "--max_steps", "2", "--json_log", "/dev/full"])
    assert [record.getMessage() for record in caplog.records if record.name == "hfvit.training.json_log"]
    assert (tmp_path / "out" / "run.json").is_file()


def test_quiet_and_verbose_exclude_each_other(recipe, capsys):
    assert option_of(fails(capsys, recipe, "--quiet", "--verbose")) == "quiet"


@pytest.mark.parametrize(("steps", "epochs"), [(20, 1), (30, 1.5)])
def test_epochs_of_a_run_with_max_steps_are_not_rounded_up(steps, epochs, tmp_path):
    args = HFViTTrainingArguments(str(tmp_path), max_steps=steps, num_train_epochs=9, use_cpu=True)
    args.steps_per_epoch = 20
    assert epochs_of(args, SimpleNamespace(num_train_epochs=math.ceil(epochs))) == epochs
