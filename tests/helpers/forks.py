"""Run Python commands in forks of a process that has imported the libraries.

Most of the time of a short command goes into imports. `ForkServer` starts one process (`python -m helpers.forks`) that
imports them once, and forks for each command. A fork is like a new process in all but what is fixed by then: variables
that libraries read when they are imported, the seed of hashes, and which modules are loaded.
"""

import atexit
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(sys.executable).parent
# What commands import. Not onnxruntime, which starts a thread: a fork has only the thread that forked.
PRELOADED = (
    "evaluate", "hfvit.cli", "hfvit.evaluation.compare", "hfvit.pipeline", "matplotlib.pyplot", "networkx", "onnx",
    "onnxscript.function_libs.torch_lib.ops", "peft", "scipy.stats", "sklearn.metrics", "torch._dynamo",
    "torch._inductor.decomposition", "torch.export", "torch.onnx", "torch.utils.tensorboard",
    "transformers.exporters.exporter_onnx", "transformers.pipelines", "transformers.trainer",
)  # fmt: skip
# Variables that are read when a command runs, not when a library is imported.
READ_LATE = {
    "ACCELERATE_USE_CPU", "COLUMNS", "HF_TOKEN", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "PATH", "PYTEST_CURRENT_TEST", "RANK", "TMPDIR", "WORLD_SIZE",
}  # fmt: skip


class Fork:
    """Process of a command, with the interface of `subprocess.Popen`."""

    def __init__(self, server: "ForkServer", words: list[str], pid: int):
        self.args = words
        self.pid = pid
        self.returncode = None
        self._server = server
        self._ended = os.pidfd_open(pid)

    def poll(self) -> int | None:
        return self.returncode if self._wait(0) else None

    def wait(self, timeout: float | None = None) -> int:
        if not self._wait(timeout):
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def _wait(self, timeout: float | None) -> bool:
        if self.returncode is None and select.select([self._ended], [], [], timeout)[0]:
            self.returncode = self._server.ask({"wait": self.pid})
            os.close(self._ended)
        return self.returncode is not None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            signal.pidfd_send_signal(self._ended, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """Process that has imported the libraries with `environment`.

    It starts with the first command and ends with this process.
    """

    def __init__(self, environment: dict[str, str]):
        self.environment = dict(environment)
        self._process = None

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "helpers.forks", str(theirs.fileno())],
                cwd=ROOT / "tests",
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )

    def close(self) -> None:
        if self._process:
            self._socket.close()
            self._process.wait(60)

    def serves(self, words: list[str], environment: dict[str, str]) -> bool:
        """Return whether a command is one of Python in the imports' environment."""
        changed = {key for key, _ in environment.items() ^ self.environment.items()} - READ_LATE
        if environment.get("PYTHONPATH") == str(ROOT):
            changed.discard("PYTHONPATH")
        return not changed and script_of(words) is not None

    def start(
        self,
        words: list[str],
        cwd: Path,
        environment: dict[str, str],
        stdout: int,
        stderr: int,
        finalize: bool = False,
    ) -> Fork:
        """Start a command.

        Args:
            words: `python`, or a script of this interpreter, and its arguments.
            cwd: folder to run in.
            environment: all environment variables of the command.
            stdout: file descriptor for its output.
            stderr: file descriptor for its messages.
            finalize: end as the interpreter does, which also frees each object. It takes half a second.
        """
        request = {"words": words, "cwd": str(cwd), "environment": environment, "finalize": finalize}
        return Fork(self, words, self.ask(request, stdout, stderr))

    def run(
        self, words: list[str], cwd: Path, environment: dict[str, str], timeout: float
    ) -> subprocess.CompletedProcess:
        """Run a command as `subprocess.run(capture_output=True, text=True)` does."""
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            fork = self.start(words, cwd, environment, out.fileno(), err.fileno())
            try:
                fork.wait(timeout)
            finally:
                fork.kill()
                fork.wait()
                out.seek(0)
                err.seek(0)
            return subprocess.CompletedProcess(words, fork.returncode, out.read(), err.read())

    def ask(self, request: dict, *descriptors: int) -> int:
        if not self._process:
            self._start()
        socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors)
        answer = self._socket.recv(1 << 10)
        if not answer:
            raise RuntimeError("the process that forks has ended")
        return json.loads(answer)


def script_of(words: list[str]) -> str | None:
    """Return "python", or the path of a console script; None for another program."""
    if words[0] in ("python", sys.executable):
        return "python" if words[1:] and (words[1] in ("-c", "-m") or not words[1].startswith("-")) else None
    script = SCRIPTS / words[0]
    if not script.is_file():
        return None
    with script.open("rb") as file:
        return str(script) if b"python" in file.readline() else None


def preload() -> None:
    for name in PRELOADED:
        if find_spec(name.partition(".")[0]):
            importlib.import_module(name)
    from PIL import Image

    Image.init()  # otherwise each fork imports Pillow's plugins
    running = {Path(f"/proc/self/task/{thread}/comm").read_text() for thread in os.listdir("/proc/self/task")[1:]}
    assert running <= {"jemalloc_bg_thd\n"}, running  # pyarrow's, which starts again in a fork


def serve(connection: socket.socket) -> dict | None:
    """Fork for each request, and return the request in a fork.

    None at the end of the connection.
    """
    while True:
        message, descriptors, *_ = socket.recv_fds(connection, 1 << 20, 2)
        if not message:
            return None
        request = json.loads(message)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if not answer:
                connection.close()
                _become(request, descriptors)
                return request
            for descriptor in descriptors:
                os.close(descriptor)
        connection.send(json.dumps(answer).encode())


def _become(request: dict, descriptors: list[int]) -> None:
    import datasets
    import numpy as np

    for number, descriptor in enumerate(descriptors, start=1):
        os.dup2(descriptor, number)
        os.close(descriptor)
    # The streams of the start would seek, which pipes cannot.
    encoding, errors = sys.stdout.encoding, sys.stdout.errors
    sys.stdout = open(1, "w", encoding=encoding, errors=errors, closefd=False)  # noqa: SIM115 (open until the end)
    sys.stderr = open(2, "w", 1, encoding, "backslashreplace", closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    if os.environ.get("PYTHONPATH") == str(ROOT):
        sys.path.insert(0, str(ROOT))
    tempfile.tempdir = None
    np.random.seed()
    datasets.fingerprint.fingerprint_rng = random.Random()


def execute(words: list[str]) -> None:
    """Run a command in this process, as the interpreter would."""
    script, arguments = script_of(words), words[1:]
    if script == "python" and arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        sys.path.insert(0, "")
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(arguments[1], "<string>", "exec"), vars(sys.modules["__main__"]))
    elif script == "python" and arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path.insert(0, os.getcwd())
        sys.modules.pop(arguments[1], None)
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments if script == "python" else [script, *arguments]
        file = Path(sys.argv[0]).absolute()
        sys.path.insert(0, str(file.resolve().parent))
        sys.modules["__main__"] = types.ModuleType("__main__")
        sys.modules["__main__"].__file__ = str(file)
        exec(compile(file.read_bytes(), file, "exec"), vars(sys.modules["__main__"]))


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends pytest, and with it this process
    del sys.path[0]  # tests/
    gc.disable()  # imports leave no garbage
    preload()
    gc.freeze()  # otherwise garbage collection copies the shared pages in each fork
    gc.enable()
    if request := serve(connection):
        try:
            execute(request["words"])
            code = 0
        except SystemExit as stop:
            if not isinstance(stop.code, int | None):
                raise
            code = stop.code or 0
        if request["finalize"]:
            sys.exit(code)
        # What the interpreter does at its end, but for freeing each object.
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
