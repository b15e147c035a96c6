"""Cases of test_bad_input.py: setup, command, message, exit code if not 2.

A name that ends in a colon is the option at the head of the message; other names are values, files or columns.
"""

from helpers.bad_files import CHECKPOINTS, DATA_SETS, GRAPHS
from helpers.bad_words import COMMAND_LINES, RECIPES

ROWS = {
    f"{kind}: {name}": row
    for kind, rows in (
        ("recipe", RECIPES), ("command", COMMAND_LINES), ("data", DATA_SETS), ("model", CHECKPOINTS), ("onnx", GRAPHS),
    )
    for name, row in rows.items()
}  # fmt: skip
