"""Train a recipe on a Ray cluster: one process of hfvit a worker.

    pip install "hfvit[ray]"
    python examples/ray/train.py quickstart --num_workers 2 --output_dir /shared/out
    python examples/ray/train.py vit_base --num_workers 8 --use_gpu --bf16 true --output_dir /shared/out

All other options are those of `hfvit train`. `output_dir` and the data must be on a disk that all machines share. Ray
starts the workers again after the loss of a machine (`--max_failures`), and they resume from the last checkpoint.
"""

import argparse
import os
import sys

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer


def train_worker(config: dict) -> None:
    """Run the recipe in a worker, whose process group and environment Ray has set up."""
    # As `accelerate launch` does on CPUs: otherwise each process would train alone.
    if not config["use_gpu"]:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    from hfvit.multirun import main

    main(config["argv"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="recipe name or YAML file")
    parser.add_argument("--num_workers", type=int, default=2, help="processes of the run")
    parser.add_argument("--use_gpu", action="store_true", help="give each worker a GPU")
    parser.add_argument("--cpus_per_worker", type=int, default=1, help="CPU cores of a worker")
    parser.add_argument("--max_failures", type=int, default=3, help="restarts after the loss of a worker")
    options, rest = parser.parse_known_args()
    recipe = os.path.abspath(options.recipe) if os.path.exists(options.recipe) else options.recipe
    argv = [recipe, *rest, "--resume_from_checkpoint", "auto"]
    TorchTrainer(
        train_worker,
        train_loop_config={"argv": argv, "use_gpu": options.use_gpu},
        torch_config=TorchConfig(backend="nccl" if options.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=options.num_workers,
            use_gpu=options.use_gpu,
            resources_per_worker={"CPU": options.cpus_per_worker, **({"GPU": 1} if options.use_gpu else {})},
        ),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=options.max_failures)),
    ).fit()


if __name__ == "__main__":
    sys.exit(main())
