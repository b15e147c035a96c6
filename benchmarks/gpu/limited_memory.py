"""Train a recipe with a fraction of the GPU's memory.

python limited_memory.py FRACTION RECIPE [--option value ...]
"""

import sys

import torch

from hfvit.errors import run
from hfvit.pipeline import main

if __name__ == "__main__":
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(float(sys.argv[1]))
    sys.exit(run(lambda: main(sys.argv[2:])))
