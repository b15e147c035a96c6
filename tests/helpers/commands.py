"""Run commands as a user would."""

import functools
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from helpers.forks import Fork, ForkServer

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def fork_server() -> ForkServer:
    """Return the server of forks of this session.

    tests/conftest.py calls it first, before hfvit sets any variable.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    environment["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # imports would initialize CUDA, and a fork could not use it
    return ForkServer(environment)


def command_environment(**changes: str) -> dict[str, str]:
    """Return the environment of the session's start.

    This interpreter's scripts are first on PATH.
    """
    return {**fork_server().environment, **changes}


def run_command(
    *words: str, cwd: Path = ROOT, new_process: bool = False, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess:
    """Run a command, by default in a fork of a process with imported libraries.

    See helpers/forks.py.

    Args:
        words: the command. Not one of Python, it always runs in a new process.
        cwd: folder to run in.
        new_process: start a new interpreter, for tests of imports, of what libraries print when they are imported, and
            of what may differ between processes, such as hashes.
        timeout: limit in seconds.
        environment: variables to add. One that libraries read when they are imported leads to a new process.
    """
    words = [str(word) for word in words]
    variables = command_environment(**environment)
    if not new_process and fork_server().serves(words, variables):
        return fork_server().run(words, cwd, variables, timeout)
    return subprocess.run(words, cwd=cwd, env=variables, capture_output=True, text=True, timeout=timeout)


def run_into(stdout: int, *words: str) -> tuple[int, str]:
    """Run a command of Python in a fork, with its output in a file descriptor.

    Returns exit code and messages.
    """
    words = [str(word) for word in words]
    with tempfile.TemporaryFile("w+") as messages:
        process = fork_server().start(words, ROOT, command_environment(), stdout, messages.fileno(), finalize=True)
        code = process.wait(60)
        messages.seek(0)
        return code, messages.read()


@contextmanager
def running_command(
    *words: str, cwd: Path = ROOT, log: Path | None = None, **environment: str
) -> Iterator[tuple[Fork, TextIO]]:
    """Run a command of Python in a fork within the context.

    Yields its process and its output.

    Args:
        words: the command.
        cwd: folder to run in.
        log: file for its messages, which are part of the output by default.
        environment: variables to add, of helpers/forks.py's `READ_LATE`.
    """
    words = [str(word) for word in words]
    variables = command_environment(**environment)
    assert fork_server().serves(words, variables)
    reader, writer = os.pipe()
    with open(reader) as output:
        with open(log or os.devnull, "w") as messages:
            stderr = messages.fileno() if log else writer
            process = fork_server().start(words, cwd, variables, writer, stderr)
        os.close(writer)
        try:
            yield process, output
        finally:
            process.kill()
            process.wait()


def free_port(address: str = "127.0.0.1") -> int:
    """Return a free port."""
    with socket.socket() as free:
        free.bind((address, 0))
        return free.getsockname()[1]
