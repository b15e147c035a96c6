"""`optimum-cli export onnx` and `export tensorrt`, each unless another distribution brings a command of that name.

Two commands of one name end the whole of optimum-cli with an error. optimum loads every file of this namespace anyway,
so looking at the others' lists costs nothing.
"""

import sys
from importlib import import_module
from pathlib import Path

from optimum.commands.export.base import ExportCommand

import optimum.commands.register
from hfvit.cli.export_onnx import OnnxExportCommand
from hfvit.cli.export_tensorrt import TensorRTExportCommand
from optimum.commands import optimum_cli


def others() -> dict[str, str]:
    """Names of the other distributions' commands below `export`, each with its module."""
    commands, found = list(optimum_cli._OPTIMUM_CLI_SUBCOMMANDS), {}
    for folder in optimum.commands.register.__path__:
        for file in Path(folder).glob("*.py"):
            if file.stem in (Path(__file__).stem, "__init__"):
                continue
            module = import_module(f"optimum.commands.register.{file.stem}")
            commands += getattr(module, "REGISTER_COMMANDS", [])
    for entry in commands:
        command, parent = entry if isinstance(entry, tuple) else (entry, None)
        if parent is ExportCommand:
            name = command.name if hasattr(command, "name") else command.COMMAND.name
            found[name] = getattr(command, "subcommand_class", command).__module__
    return found


taken = others()
ours = [command for command in (OnnxExportCommand, TensorRTExportCommand) if command.COMMAND.name not in taken]
# Read once: optimum asks again for each folder that holds this file, such as a checkout beside an installation.
REGISTER_COMMANDS = iter([(command, ExportCommand) for command in ours])
if "onnx" in taken and sys.argv[1:3] == ["export", "onnx"]:
    print(
        f"hfvit: this `export onnx` is that of {taken['onnx']}; hfvit's is"
        " `python -m hfvit.cli.export_onnx`, with its own --help",
        file=sys.stderr,
    )
