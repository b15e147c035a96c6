"""Run commands as a user would."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_command(*words: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Run a command in `cwd`, with this interpreter's scripts first on PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def free_port(address: str = "127.0.0.1") -> int:
    """Return a free port."""
    with socket.socket() as free:
        free.bind((address, 0))
        return free.getsockname()[1]
