"""The rows of test_bad_input.py: what is made first, the command, what its message names, the exit code if not 2.

A name that ends in a colon is the option at the head of the message; any other is a datum, a file or a value.
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
