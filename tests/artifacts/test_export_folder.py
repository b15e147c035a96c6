"""Staging folders of killed exports, and when they are deleted."""

import os
import platform
import signal
import subprocess
import sys

from helpers.commands import ROOT

from hfvit.artifacts.export_folder import STAGING, STALE_SECONDS, staging_folder

HOLD = """\
import sys
from pathlib import Path
from hfvit.artifacts.export_folder import staging_folder
with staging_folder(Path(sys.argv[1])) as staging:
    (staging / "model.onnx").write_text("half of it")
    print(staging.name, flush=True)
    sys.stdin.read()
"""


def test_next_export_deletes_staging_folders_of_ended_processes_only(tmp_path):
    running, killed = (
        subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for _ in range(2)
    )
    try:
        kept, left = (process.stdout.readline().strip() for process in (running, killed))
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert {path.name for path in tmp_path.iterdir()} == {kept, left}
        with staging_folder(tmp_path) as staging:
            assert {path.name for path in tmp_path.iterdir()} == {kept, staging.name}
    finally:
        running.communicate("")
    assert not list(tmp_path.iterdir())


def test_staging_folders_of_other_machines_are_deleted_after_a_day(tmp_path):
    fresh, old = (tmp_path / f"{STAGING}another-machine-{number}-x" for number in (1, 2))
    for folder in (fresh, old):
        folder.mkdir()
    age = old.stat().st_mtime - STALE_SECONDS - 60
    os.utime(old, (age, age))
    mine = tmp_path / f"{STAGING}{platform.node()}-{os.getpid()}-x"
    mine.mkdir()
    with staging_folder(tmp_path):
        assert fresh.exists()
        assert mine.exists()
        assert not old.exists()
