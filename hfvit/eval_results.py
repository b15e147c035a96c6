"""The run's result as the Hub's leaderboards read it: `.eval_results/NAME.yaml` of the repository."""

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.constants import EVAL_RESULTS_FOLDER

from hfvit.paths import is_hub_id


def eval_results_file(facts: dict) -> tuple[str, str] | None:
    """(path in the repository, YAML), or None where there is no result of a data set on the Hub.

    A result is the accuracy, in percent, on the whole test split: figures of rows that selected the checkpoint, or of
    a part of the split, do not belong beside those of others.
    """
    data, test = facts["data"], facts["metrics"].get("test")
    name = data["dataset_name"]
    if test is None or data.get("is_local") or not is_hub_id(name) or facts["recipe"].get("max_eval_samples"):
        return None
    entry = EvalResultEntry(
        dataset_id=name,
        task_id=data["dataset_config_name"] or "default",
        value=round(100 * test["accuracy"], 2),
        dataset_revision=data.get("dataset_commit") or data["dataset_revision"],
        date=facts.get("finished"),
        notes=f"top-1 accuracy in percent, split {data['splits']['test']['source']}, {test['images']:,} images",
    )
    text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)
    return f"{EVAL_RESULTS_FOLDER}/{name.replace('/', '--')}.yaml", text
