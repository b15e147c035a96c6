"""The script of `accelerate launch hfvit/train.py RECIPE [--option value ...]`; see hfvit/pipeline.py."""

import sys

from hfvit.pipeline import main
from hfvit.training.distributed import run_one_of_many

if __name__ == "__main__":
    sys.exit(run_one_of_many(main))
