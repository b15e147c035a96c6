"""Commands in forks (helpers/forks.py) against the same commands in new processes."""

import re
import subprocess
import sys

import pytest
from helpers.commands import ROOT, command_environment, fork_server, run_command


@pytest.mark.parametrize(
    "words",
    [
        ["-c", "import sys; print(sys.argv, __name__, sys.path[0]); sys.exit(3)", "a b"],
        ["-c", "import os, sys; print(os.getcwd(), os.environ['COLUMNS'], repr(sys.stdin.read()))"],
        ["-c", "import sys; print(sys.stdout.encoding, sys.stdout.errors, sys.stderr.errors, sys.stdout.isatty())"],
        ["-c", "import atexit; atexit.register(print, 'end'); print('begin')"],
        ["-c", "import subprocess; subprocess.run(['echo', 'child'])"],
        ["-c", "import sys; sys.exit('text')"],
        ["-c", "1/0"],
        ["-c", "raise KeyboardInterrupt"],
        # A shell ignores SIGINT in its background jobs, and new processes inherit that.
        ["-c", "from signal import *; signal(SIGINT, default_int_handler); raise_signal(SIGINT)"],
        ["-c", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"],
        ["-m", "json.tool", "no such file"],
        ["script.py", "a"],
    ],
)
def test_command_in_a_fork_equals_a_new_process(words, tmp_path):
    (tmp_path / "script.py").write_text("import sys\nprint(sys.argv, __name__, __file__, sys.path[0])\n")
    forked, new = (
        run_command(sys.executable, *words, cwd=tmp_path, new_process=new, COLUMNS="50") for new in (False, True)
    )
    assert (forked.args, forked.returncode, forked.stdout) == (new.args, new.returncode, new.stdout)
    # On Python 3.13, nanobind (of onnx) may report its own objects at the end of a fork.
    said = [line for line in forked.stderr.splitlines() if not re.search(r"nanobind|^ - |refleaks", line)]
    assert said[-1:] == new.stderr.splitlines()[-1:]


def test_command_in_a_fork_that_takes_too_long_is_killed():
    words = [sys.executable, "-c", "import time; time.sleep(60)"]
    with pytest.raises(subprocess.TimeoutExpired):
        fork_server().run(words, ROOT, command_environment(), timeout=0.2)


def test_environments_of_imports_and_other_programs_are_not_served():
    words = ["hfvit", "--version"]
    assert fork_server().serves(words, command_environment(COLUMNS="50"))
    for name in ("HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "PYTHONPATH", "PYTHONWARNINGS"):
        assert not fork_server().serves(words, command_environment(**{name: "other"}))
    assert not fork_server().serves(["bash", "-c", "true"], command_environment())
