"""Script for `accelerate launch hfvit/train.py RECIPE`; see `hfvit.multirun`."""

import sys

from hfvit.multirun import main
from hfvit.training.distributed import run_one_of_many

if __name__ == "__main__":
    sys.exit(run_one_of_many(main))
