"""Render the model card and keep the text that users wrote into it."""

import hashlib
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from huggingface_hub import EvalResult, ModelCardData

from hfvit.artifacts.constants import CARD_FILE
from hfvit.artifacts.export_folder import ExportRow
from hfvit.artifacts.run_record import RunRecord
from hfvit.artifacts.run_sections import Data, Model, MultiLabelMetrics
from hfvit.errors import ModelError, one_line, printable
from hfvit.hub.redaction import redact_record
from hfvit.utils.files import shipped, write_text
from hfvit.utils.formatting import duration
from hfvit.utils.hub_ids import dataset_title, is_hub_id
from hfvit.utils.markup import markdown_environment
from hfvit.utils.yaml_files import load_yaml

PLACEHOLDER = "PATH_OR_HUB_ID"
MAX_TABLE_CLASSES = 200  # a longer table of classes is left out

START = "<!-- hfvit: start of generated text -->"
END = "<!-- hfvit: end of generated text -->"
HINT = "<!-- What is written above or below is kept; changes between the two marks are not. -->"
# Metadata that hfvit sets: that of an earlier card is dropped, even if the new card has none.
GENERATED_KEYS = ("library_name", "pipeline_tag", "tags", "datasets", "base_model", "metrics", "model-index")
# Of these, those that hold for other weights, too.
KIND_KEYS = ("library_name", "pipeline_tag")
TAGS = ("image-classification", "vision-transformer", "timm", "transformers", "hfvit")
# Plots that the template refers to.
CARD_PLOTS = (
    "confusion_matrix", "per_class_recall", "two_classes", "reliability", "precision_recall", "average_precision",
    "learning_curves",
)  # fmt: skip
# Common licenses that the Hub knows by these identifiers; it refuses a card with an unknown one
# (huggingface.co/docs/hub/repositories-licenses).
HUB_LICENSES = (
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "isc", "mpl-2.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0",
    "unlicense", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0",
    "openrail", "gemma", "other", "unknown",
)  # fmt: skip
_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", flags=re.DOTALL)
# Cards of version 0.1 end with hashes of the generated text, by `metadata:KEY` and `section:TITLE`.
_HASHES = re.compile(
    r"\n*<!-- hfvit wrote this card; what is changed by hand stays when it is written again: (\{.*?\}) -->\n?"
)


@dataclass
class UserParts:
    """Parts of a card that its user wrote: metadata, text before and after."""

    metadata: dict[str, Any]
    before: str
    after: str


def user_parts(card: str) -> UserParts:
    """Find the parts of a card that its user wrote.

    In a card of version 0.1, these are the sections that were changed or added; in a card of another program, the
    whole text. Metadata that is not a YAML mapping is ignored.
    """
    card = card.replace("\r\n", "\n")
    front = _FRONT_MATTER.match(card)
    body = card[front.end() :] if front else card
    metadata = _metadata(front[1]) if front else {}
    start = body.find(START)
    end = body.find(END, start)
    if 0 <= start < end:
        return UserParts(metadata, body[:start], body[end + len(END) :])
    if found := _HASHES.search(body):
        return _of_version_0_1(metadata, f"{body[: found.start()]}\n{body[found.end() :]}", found[1])
    return UserParts(metadata, "", body.replace(START, "").replace(END, ""))


def keep_user_parts(card: str, earlier: Sequence[str]) -> str:
    """Mark the generated `card` and add the text that users wrote into earlier ones.

    Of the same metadata key, or of sections with the same heading (`## TITLE`) on the same side, the last one is kept.
    Text without a heading is kept from all cards.
    """
    front = _FRONT_MATTER.match(card)
    generated = _metadata(front[1])
    metadata: dict[str, Any] = {}
    before: dict[str, str] = {}
    after: dict[str, str] = {}
    for parts in map(user_parts, earlier):
        metadata |= {key: value for key, value in parts.metadata.items() if key not in (*generated, *GENERATED_KEYS)}
        before = _merged(before, _sections(parts.before))
        after = _merged(after, _sections(parts.after))
    if generated.get("license", "other") != "other":  # these are of another license
        metadata = {key: value for key, value in metadata.items() if key not in ("license_name", "license_link")}
    text = card[front.end() :].strip()
    for mark in (START, END):  # in a name
        text = text.replace(mark, mark.replace("<!--", "<! --"))
    header = yaml.safe_dump(generated | metadata, sort_keys=False, allow_unicode=True)
    parts = [*before.values(), f"{START}\n{HINT}\n\n{text}\n\n{END}", *after.values()]
    return f"---\n{header}---\n\n" + "\n\n".join(parts) + "\n"


def is_generated(card: str) -> bool:
    """Return whether hfvit wrote a part of the card."""
    return START in card or bool(_HASHES.search(card))


def remove_generated_text(card: str) -> str:
    """Return what its user wrote of a card, an empty string if that is nothing.

    A card without generated text is returned unchanged.
    """
    if not is_generated(card):
        return card
    parts = user_parts(card)
    text = "\n\n".join(filter(None, (parts.before.strip(), parts.after.strip())))
    metadata = {key: value for key, value in parts.metadata.items() if key not in GENERATED_KEYS}
    if not text and not metadata:
        return ""
    metadata |= {key: parts.metadata[key] for key in KIND_KEYS if key in parts.metadata}
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n\n{text}\n"


def _metadata(text: str) -> dict[str, Any]:
    try:
        metadata = load_yaml(text)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError):  # ValueError: an invalid date
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _sections(text: str) -> dict[str, str]:
    """Split text at `##` headings outside of code blocks: title -> text."""
    sections: dict[str, list[str]] = {}
    title = ""
    fenced = False
    for line in text.split("\n"):
        fenced ^= line.startswith("```")
        if line.startswith("## ") and not fenced:
            title = line[3:].strip()
        sections.setdefault(title, []).append(line)
    joined = {title: "\n".join(lines).strip() for title, lines in sections.items()}
    return {title: text for title, text in joined.items() if text}


def _merged(earlier: dict[str, str], later: dict[str, str]) -> dict[str, str]:
    """Merge sections; of two with the same title, keep the later one."""
    first = earlier.get("", "")
    second = later.get("", "")
    if first in second:
        text = second
    elif second in first:
        text = first
    else:
        text = f"{first}\n\n{second}"
    merged = earlier | later
    merged.pop("", None)
    return {"": text, **merged} if text else merged


def _of_version_0_1(metadata: dict[str, Any], body: str, hashes: str) -> UserParts:
    try:
        written = dict(json.loads(hashes))
    except (ValueError, TypeError):
        written = {}

    def is_changed(name: str, text: str) -> bool:
        return written.get(name) != hashlib.sha256(text.encode()).hexdigest()[:12]

    changed = {
        key: value
        for key, value in metadata.items()
        if is_changed(f"metadata:{key}", json.dumps(value, sort_keys=True, default=str))
    }
    sections = [text for title, text in _sections(body).items() if is_changed(f"section:{title}", text)]
    return UserParts(changed, "", "\n\n".join(sections))


def write_model_card(
    record: RunRecord, output_dir: str | Path, exports: dict[str, list[ExportRow]] | None = None
) -> Path:
    """Write the model card to `output_dir/README.md` and keep the user's text in it.

    Args:
        record: record of the run.
        output_dir: output folder of the run.
        exports: folder name of each export -> its `export_rows`.

    Returns:
        The path of the card.
    """
    path = Path(output_dir) / CARD_FILE
    try:
        earlier = [path.read_text(encoding="utf-8")] if path.exists() else []
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {one_line(error)}. Move it away.") from None
    name = Path(output_dir).resolve().name
    card = render_card(record, name, exports=exports, earlier=earlier, with_plots=has_plots(output_dir))
    write_text(path, card)
    return path


def has_plots(output_dir: str | Path) -> bool:
    """Return whether the figures of a run were drawn."""
    return any(Path(output_dir, "plots").glob("*.png"))


def render_card(
    record: RunRecord,
    name: str,
    repository: str = PLACEHOLDER,
    exports: dict[str, list[ExportRow]] | None = None,
    earlier: Sequence[str] = (),
    with_plots: bool = True,
    revision: str | None = None,
) -> str:
    """Render model_card.md for a run.

    Args:
        record: record of the run.
        name: title of the card.
        repository: Hub id in the card's code.
        exports: folder name of each export -> its `export_rows`.
        earlier: cards whose user text and metadata are kept; a later card has precedence.
        with_plots: refer to the figures in `plots/`.
        revision: branch of the repository. Default: main.
    """
    metrics = record.result
    data = record.data
    model = record.model
    pinned = record.recipe.get("dataset_revision") == data.commit
    exports = exports or {}
    multi_label = isinstance(metrics, MultiLabelMetrics)
    public = redact_record(record)
    texts_are_local = model.texts is not None and model.texts.is_local
    branch = quote(revision or "main", safe="")
    template = shipped("model_card.md")
    environment = markdown_environment(template.parent, keep_trailing_newline=True)
    card = environment.get_template(template.name).render(
        card_data=_card_metadata(record, name, "onnx" in exports).to_yaml(),
        name=name,
        repository=repository,
        role=record.role,
        metrics=record.metrics,
        result=metrics,
        multi_label=multi_label,
        thresholds=record.thresholds,
        temperature=record.temperature,
        with_plots=with_plots,
        # Not every viewer resolves a relative URL in `srcset`.
        plots="" if repository == PLACEHOLDER else f"https://huggingface.co/{repository}/resolve/{branch}/",
        classes=metrics.per_class if len(metrics.per_class) <= MAX_TABLE_CLASSES else [],
        model=public.model,
        protocol=_protocol(model),
        eval_tta=record.eval_tta,
        two_classes=not multi_label and metrics.roc_curve is not None,
        out_of_distribution=record.out_of_distribution,
        base_model=_hub_base(model),
        base_license=model.base_license,
        from_scratch=model.base_model is None,
        data=data,
        dataset_title=dataset_title(data.dataset_name),
        dataset_commit=data.commit,
        revision_option="" if pinned or not data.commit else f" --dataset_revision {shlex.quote(data.commit)}",
        dataset_url=f"https://huggingface.co/datasets/{data.dataset_name}" if _is_on_hub(data) else None,
        needs_local=data.is_local or model.is_local or texts_are_local,
        training=record.training,
        time=duration(record.training.seconds),
        hardware=record.hardware,
        versions=record.versions,
        recipe=public.recipe,
        command=_command_to_type(public.command or ""),
        exports=[row for rows in exports.values() for row in rows],
        onnx=[row.name for row in exports.get("onnx", [])],
    )
    return keep_user_parts(card, earlier)


def _card_metadata(record: RunRecord, name: str, has_onnx: bool) -> ModelCardData:
    """Return the metadata of the card, which the Hub reads.

    Args:
        record: record of the run.
        name: title of the card.
        has_onnx: whether the repository has an ONNX export.
    """
    metrics = record.result
    data = record.data
    model = record.model
    tags = [*TAGS]
    if model.texts:  # the Hub has no widget and no pipeline for such models
        tags = ["image-classification", "image-and-text", "hfvit"]
    elif has_onnx:
        tags += ["onnx", "transformers.js"]
    if isinstance(metrics, MultiLabelMetrics):
        tags.insert(1, "multi-label-image-classification")
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=data.dataset_name if _is_on_hub(data) else "image-classification",
            dataset_name=printable(dataset_title(data.dataset_name)),
            dataset_config=data.dataset_config_name and printable(data.dataset_config_name),
            dataset_revision=data.commit and printable(data.commit),
            dataset_split=printable(data.splits[record.role].source),
            metric_type=metric,
            metric_name=metric_title,
            metric_value=round(value, 4),
        )
        for metric, metric_title, value in metrics.index_entries()
    ]
    return ModelCardData(
        model_name=printable(name),
        eval_results=results,
        **license_metadata(model.base_license),
        library_name="hfvit" if model.texts else "timm",
        pipeline_tag=None if model.texts else "image-classification",
        tags=tags,
        datasets=data.dataset_name if _is_on_hub(data) else None,
        base_model=_hub_base(model),
        metrics=list(dict.fromkeys(metric for metric, *_ in metrics.index_entries())),
    )


def license_metadata(license: Any) -> dict[str, str]:
    """Return the metadata of a license that timm names.

    It is `other` with a name for one that the Hub does not know.
    """
    if not isinstance(license, str) or not re.fullmatch(r"[a-z0-9.\-]+", license):
        return {}
    return {"license": license} if license in HUB_LICENSES else {"license": "other", "license_name": license}


def _is_on_hub(data: Data) -> bool:
    return is_hub_id(data.dataset_name) and not data.is_local


def _hub_base(model: Model) -> str | None:
    """Return the Hub id of the pretrained model, None without one."""
    return model.base_model if model.base_model and is_hub_id(model.base_model) and not model.is_local else None


def _protocol(model: Model) -> str:
    """Describe the preprocessing of an image for the evaluation."""
    steps = model.preprocessing
    parts = [f"{model.image_size[0]} px"]
    is_squashed = steps.get("crop_mode") == "squash"
    if steps.get("interpolation"):
        parts.append(f"{steps['interpolation']} resize{' to the exact size' if is_squashed else ''}")
    if isinstance(steps.get("crop_pct"), int | float) and not (is_squashed and steps["crop_pct"] == 1):
        mode = "center" if is_squashed else steps.get("crop_mode") or "center"
        parts.append(f"{mode} crop of {100 * steps['crop_pct']:.4g} %")
    return ", ".join(parts)


def _command_to_type(command: str) -> str | None:
    """Return the recorded command line as a user would type it, None if unknown."""
    script, _, rest = command.partition(" ")
    return f"hfvit train {rest}" if script.endswith("train.py") else command if script == "hfvit" else None
