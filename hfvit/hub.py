"""run.json -> the model card of the output folder."""

import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hfvit.checkpoints import write_text
from hfvit.report import duration
from hfvit.shipped import shipped


def write_model_card(facts: dict, output_dir: str | Path) -> Path:
    """Render model_card.md's template with the facts of a run as `output_dir/README.md`."""
    role = "test" if "test" in facts["metrics"] else "validation"
    metrics = facts["metrics"][role]
    data, recipe = facts["data"], facts["recipe"]
    name = Path(output_dir).resolve().name
    on_hub = is_hub_id(data["dataset_name"])
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=data["dataset_name"] if on_hub else "image-classification",
            dataset_name=dataset_title(data["dataset_name"]),
            dataset_config=data["dataset_config_name"],
            dataset_revision=data["dataset_revision"],
            dataset_split=data["splits"][role]["source"],
            metric_type=metric,
            metric_name=title,
            metric_value=round(metrics[key], 4),
        )
        for metric, key, title in (("accuracy", "accuracy", "Accuracy"), ("f1", "macro_f1", "Macro F1"))
    ]
    base = facts["model"]["base_model"]
    card_data = ModelCardData(
        model_name=name,
        eval_results=results,
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "vision-transformer", "timm", "transformers", "hfvit"],
        datasets=data["dataset_name"] if on_hub else None,
        base_model=base if base and is_hub_id(base) else None,
        metrics=["accuracy", "f1"],
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(shipped("model_card.md")),
        name=name,
        role=role,
        result=metrics,
        interval="{:.2%} to {:.2%}".format(*metrics["accuracy_interval"]),
        model=facts["model"],
        base_model=base if base and is_hub_id(base) else None,
        from_scratch=base is None,
        data=data,
        dataset_title=dataset_title(data["dataset_name"]),
        training=facts["training"],
        time=duration(facts["training"]["seconds"]),
        hardware=facts["hardware"],
        versions=facts["versions"],
        recipe=recipe,
    )
    path = Path(output_dir) / "README.md"
    write_text(path, str(card))
    return path


def is_hub_id(name: str) -> bool:
    """Whether `name` can only be a repository on the Hub: `owner/name`, and no path of this machine."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)) and not Path(name).exists()


def dataset_title(name: str) -> str:
    """A data set's public name: a Hub id as it is; of a folder the last part alone, never a path."""
    if name == "digits":
        return "scikit-learn digits"
    return name if is_hub_id(name) else Path(name).name
