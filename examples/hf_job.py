# /// script
# requires-python = ">=3.11"
# dependencies = ["hfvit"]
# ///
"""Train a recipe as a job on Hugging Face's machines, and push the result.

    hf jobs uv run --flavor a10g-large --secrets HF_TOKEN examples/hf_job.py vit_small --hub_model_id user/my-vit

Options are those of `hfvit train`; the run is pushed to `hub_model_id`, as the disk of a job is deleted at its end.
The script also runs elsewhere: `uv run examples/hf_job.py quickstart --hub_model_id user/my-vit`.
"""

import sys

from hfvit.cli import main

if __name__ == "__main__":
    argv = sys.argv[1:]
    given = {word.partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
    if "__hub_model_id" not in given:
        sys.exit(
            "hub_model_id: missing. Pass --hub_model_id user/name, since the disk of a job is deleted at its end."
        )
    if "__output_dir" not in given:
        argv += ["--output_dir", "outputs/job"]
    main(["train", *argv, "--push_to_hub", "true"])
