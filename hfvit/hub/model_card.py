"""Render the model card and keep user edits."""

import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hfvit.artifacts.export_folder import export_rows
from hfvit.artifacts.output_dir import write_text
from hfvit.hub.card_edits import keep_edits, recorded
from hfvit.hub.redaction import public_facts
from hfvit.utils.environment import shipped
from hfvit.utils.files import is_hub_id
from hfvit.utils.formatting import duration

PLACEHOLDER = "PATH_OR_HUB_ID"
MOST_CLASSES = 200  # rows of the table; more would only be scrolled past


def write_model_card(facts: dict, output_dir: str | Path, exports: dict[str, dict] | None = None) -> Path:
    """Render the card as `output_dir/README.md`; what a user has edited in one that lies there stays.

    `exports` as `render_card` takes them.
    """
    path = Path(output_dir) / "README.md"
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    write_text(path, render_card(facts, Path(output_dir).resolve().name, exports=exports, edited=(old,)))
    return path


def render_card(
    facts: dict,
    name: str,
    repository: str = PLACEHOLDER,
    exports: dict[str, dict] | None = None,
    edited: tuple[str, ...] = (),
) -> str:
    """model_card.md's template with the facts of a run.

    `exports` maps the folder of an export to its files' facts (export_table.py). `edited` are earlier cards, whose
    edits are kept; those of a later one win.
    """
    role = "test" if "test" in facts["metrics"] else "validation"
    metrics, data, model = facts["metrics"][role], facts["data"], facts["model"]
    on_hub = is_hub_id(data["dataset_name"]) and not data.get("is_local")
    base = model["base_model"] if model["base_model"] and is_hub_id(model["base_model"]) else None
    base = None if model.get("is_local") else base
    title = dataset_title(data["dataset_name"])
    commit = data.get("dataset_commit") or data["dataset_revision"]
    pinned = facts["recipe"].get("dataset_revision") == commit
    exports = exports or {}
    license = model.get("base_license") if base else None
    tags = ["image-classification", "vision-transformer", "timm", "transformers", "hfvit"]
    if model.get("texts"):  # no widget and no pipeline of the Hub can run it
        tags = ["image-classification", "image-and-text", "hfvit"]
    elif "onnx" in exports:
        tags += ["onnx", "transformers.js"]
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=data["dataset_name"] if on_hub else "image-classification",
            dataset_name=title,
            dataset_config=data["dataset_config_name"],
            dataset_revision=commit,
            dataset_split=data["splits"][role]["source"],
            metric_type=metric,
            metric_name=metric_title,
            metric_value=round(metrics[key], 4),
        )
        for metric, key, metric_title in (("accuracy", "accuracy", "Accuracy"), ("f1", "macro_f1", "Macro F1"))
    ]
    card_data = ModelCardData(
        model_name=name,
        eval_results=results,
        license=license if license and re.fullmatch(r"[a-z0-9.\-]+", license) else None,
        library_name="hfvit" if model.get("texts") else "timm",
        pipeline_tag=None if model.get("texts") else "image-classification",
        tags=tags,
        datasets=data["dataset_name"] if on_hub else None,
        base_model=base,
        metrics=["accuracy", "f1"],
    )
    public = public_facts(facts)
    card = ModelCard.from_template(
        card_data,
        template_path=str(shipped("model_card.md")),
        name=name,
        repository=repository,
        role=role,
        metrics=facts["metrics"],
        result=metrics,
        temperature=facts.get("temperature") or {},
        # A relative address in `srcset` is not resolved everywhere; that of the repository's main branch is.
        plots="" if repository == PLACEHOLDER else f"https://huggingface.co/{repository}/resolve/main/",
        classes=metrics["per_class"] if len(metrics["per_class"]) <= MOST_CLASSES else [],
        model=public["model"],
        base_model=base,
        base_license=license,
        from_scratch=model["base_model"] is None,
        data=data,
        dataset_title=title,
        dataset_commit=commit,
        revision_option="" if pinned or not commit else f" --dataset_revision {commit}",
        dataset_url=f"https://huggingface.co/datasets/{data['dataset_name']}" if on_hub else None,
        needs_local=data.get("is_local") or model.get("is_local") or (model.get("texts") or {}).get("is_local"),
        training=facts["training"],
        time=duration(facts["training"]["seconds"]),
        hardware=facts["hardware"],
        versions=facts["versions"],
        recipe=public["recipe"],
        command=_as_typed(public.get("command", "")),
        exports=export_rows(exports),
        onnx=sorted(exports.get("onnx", {})),
    )
    text = recorded(str(card))
    for old in edited:
        text = keep_edits(text, old) if old else text
    return text


def _as_typed(command: str) -> str | None:
    """The recorded command line, of a script by its name alone, as one that can be typed."""
    script, _, rest = command.partition(" ")
    return f"hfvit train {rest}" if script.endswith("train.py") else command if script == "hfvit" else None


def dataset_title(name: str) -> str:
    """A data set's public name: a Hub id as it is; of a folder the last part alone, never a path."""
    if name == "digits":
        return "scikit-learn digits"
    return name if is_hub_id(name) else Path(name).name
