"""Register the export commands of hfvit in optimum-cli.

These are `export onnx`, `openvino`, `executorch` and `tensorrt`, unless another package has the name.

optimum-cli fails if two packages register a command with the same name. It imports all files of this namespace anyway,
so reading the lists of the others costs nothing.
"""

import sys
from importlib import import_module
from pathlib import Path

from optimum.commands.export.base import ExportCommand

import optimum.commands.register
from hfvit.cli.export_executorch import ExecuTorchExportCommand
from hfvit.cli.export_onnx import OnnxExportCommand
from hfvit.cli.export_openvino import OpenVINOExportCommand
from hfvit.cli.export_tensorrt import TensorRTExportCommand
from optimum.commands import optimum_cli


def others() -> dict[str, str]:
    """Return the `export` commands of other packages: name -> module."""
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
COMMANDS = (OnnxExportCommand, OpenVINOExportCommand, ExecuTorchExportCommand, TensorRTExportCommand)
# An iterator, since optimum reads the list once per copy of this file, such as a checkout next to an installation.
REGISTER_COMMANDS = iter([(command, ExportCommand) for command in COMMANDS if command.COMMAND.name not in taken])
for name in ("onnx", "openvino", "executorch"):
    if name in taken and sys.argv[1:3] == ["export", name]:
        print(
            f"hfvit: `optimum-cli export {name}` is registered by {taken[name]}; for hfvit's, run"
            f" `python -m hfvit.cli.export_{name}`",
            file=sys.stderr,
        )
