"""hfvit's optimum-cli commands: light imports, registration, name conflicts, files of the wheel."""

import re
import shutil
import sys
import zipfile

import pytest
from helpers.commands import ROOT, run_command

PROBE = """\
import sys
from optimum.commands.optimum_cli import main
before = set(sys.modules)
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = {"torch", "transformers", "timm", "datasets", "onnx", "onnxruntime", "numpy"} & (set(sys.modules) - before)
assert not heavy, heavy
"""


EXPORTS = ("onnx", "openvino", "executorch", "tensorrt")


@pytest.mark.parametrize("words", [[], ["export"], *(["export", name] for name in EXPORTS)])
def test_help_imports_nothing_heavy(words):
    result = run_command(sys.executable, "-c", PROBE, *words, "--help", new_process=True, PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    if len(words) == 2:
        assert {"--model", "--dtype", "--atol"} <= set(re.findall(r"--\w+", result.stdout))


OTHER = """\
from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

class Other(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="NAME", help="that of another distribution")

    def run(self):
        print("the other one ran")

REGISTER_COMMANDS = [(Other, ExportCommand)]
"""


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_export_of_another_package_has_precedence(tmp_path, name):
    register = tmp_path / "other" / "optimum" / "commands" / "register"
    register.mkdir(parents=True)
    (register / "register_other.py").write_text(OTHER.replace("NAME", name))
    for path in (f"{ROOT}:{tmp_path / 'other'}", f"{tmp_path / 'other'}:{ROOT}"):
        assert run_command("optimum-cli", "--help", PYTHONPATH=path).returncode == 0
        listing = run_command("optimum-cli", "export", "--help", PYTHONPATH=path, COLUMNS="200")
        assert "that of another distribution" in listing.stdout
        ours = {line.split()[0] for line in listing.stdout.splitlines() if "(hfvit)" in line}
        assert ours == set(EXPORTS) - {name}
        assert listing.stderr == ""
        result = run_command("optimum-cli", "export", name, PYTHONPATH=path)
        assert result.stdout == "the other one ran\n"
        assert "register_other" in result.stderr
        assert f"hfvit.cli.export_{name}" in result.stderr
    result = run_command(sys.executable, "-m", f"hfvit.cli.export_{name}", "--help", PYTHONPATH=str(ROOT))
    assert "--quantize" in result.stdout


def test_a_checkout_beside_an_installation_registers_once(tmp_path):
    register = tmp_path / "optimum" / "commands" / "register"
    register.mkdir(parents=True)
    shutil.copy(ROOT / "optimum" / "commands" / "register" / "register_hfvit.py", register)
    result = run_command("optimum-cli", "export", "--help", PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert result.returncode == 0, result.stderr
    assert "(hfvit)" in result.stdout


def test_wheel_contains_the_command(tmp_path):
    pytest.importorskip("hatchling", reason="needs hatchling, which pip fetches when it builds a wheel")
    words = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path]
    result = run_command(*words)
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"optimum/commands/register/register_hfvit.py", "hfvit/cli/export_onnx.py", "hfvit/export/onnx.py"} <= names
    assert not {name for name in names if name.startswith("optimum/") and name.endswith("__init__.py")}
