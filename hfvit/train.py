"""Script for `accelerate launch hfvit/train.py RECIPE`; see `hfvit.multirun`."""

import sys

from hfvit.training.distributed import run_one_of_many
from hfvit.utils.collector import importing

with importing():
    from hfvit.multirun import main

if __name__ == "__main__":
    sys.exit(run_one_of_many(main))
