"""`examples.npz`: the pictures behind plots/mistakes.png and plots/attention.png. Arrays alone, never a pickle."""

import zipfile
from pathlib import Path

import numpy as np

from hfvit.paths import temporary_file
from hfvit.run_folder import EXAMPLES_FILE


def write_examples(output_dir: str | Path, arrays: dict[str, np.ndarray]) -> None:
    """Write the arrays whole or not at all, in place of those of an earlier run."""
    with temporary_file(Path(output_dir) / EXAMPLES_FILE) as temporary:
        np.savez_compressed(temporary, allow_pickle=False, **arrays)


def read_examples(output_dir: str | Path, facts: dict) -> dict[str, np.ndarray]:
    """The arrays that belong to `facts`, run.json's `examples`; empty where the file is not there, or not theirs.

    `mistakes` and `attention` are uint8 `(images, height, width, 3)`, `attention_maps` float32 `(images, rows,
    columns)`; each as long as the list of its name in `facts`.
    """
    path, examples = Path(output_dir) / EXAMPLES_FILE, facts.get("examples")
    if not examples or not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return {}
    counts = {"mistakes": "mistakes", "attention": "attention", "attention_maps": "attention"}
    return {
        name: array
        for name, array in arrays.items()
        if name in counts and len(array) and len(array) == len(examples[counts[name]])
    }
