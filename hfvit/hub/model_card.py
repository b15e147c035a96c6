"""Render the model card and keep user edits."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hfvit.artifacts.export_folder import ExportRow
from hfvit.artifacts.run_record import RunRecord
from hfvit.hub.redaction import public_record
from hfvit.utils.files import shipped, write_text
from hfvit.utils.formatting import duration
from hfvit.utils.hub_ids import dataset_title, is_hub_id

MARK = "hfvit wrote this card; what is changed by hand stays when it is written again"
_RECORD = re.compile(rf"\n*<!-- {re.escape(MARK)}: (\{{.*?\}}) -->\n?")
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---\r?\n", flags=re.DOTALL)


@dataclass
class Card:
    """`record` maps the written parts (`metadata:KEY`, `section:TITLE`) to hashes; None where there is no record."""

    metadata: dict
    sections: dict[str, str]
    record: dict[str, str] | None

    @property
    def hashes(self) -> dict[str, str]:
        parts = {
            f"metadata:{key}": json.dumps(value, sort_keys=True, default=str) for key, value in self.metadata.items()
        }
        parts |= {f"section:{title}": text.strip() for title, text in self.sections.items()}
        return {name: hashlib.sha256(text.encode()).hexdigest()[:12] for name, text in parts.items()}

    def text(self) -> str:
        metadata = yaml.safe_dump(self.metadata, sort_keys=False, allow_unicode=True)
        body = "\n\n".join(text.strip() for text in self.sections.values())
        return f"---\n{metadata}---\n\n{body}\n\n<!-- {MARK}: {json.dumps(self.record)} -->\n"


def read_card(text: str) -> Card:
    """The parts of a card; metadata that is no YAML mapping counts as none."""
    text = text.replace("\r\n", "\n")
    found, record = _RECORD.search(text), None
    if found:
        text = text[: found.start()] + "\n" + text[found.end() :]
        try:
            record = json.loads(found[1])
        except ValueError:
            record = None
    front = _FRONT_MATTER.match(text)
    try:
        metadata = yaml.safe_load(front[1]) if front else {}
    except yaml.YAMLError:
        metadata = {}
    return Card(
        metadata if isinstance(metadata, dict) else {}, _sections(text[front.end() :] if front else text), record
    )


def recorded(text: str) -> str:
    """A card as it was just made, with the record of its parts."""
    card = read_card(text)
    card.record = card.hashes
    return card.text()


def keep_edits(new: str, old: str) -> str:
    """The card `new`, which has its record, with what a user changed, added or deleted in `old`.

    Of a card without a record (another program's) only what `new` does not have is kept.
    """
    card, before = read_card(new), read_card(old)
    now, then = before.hashes, before.record
    for kind, ours, theirs in (
        ("metadata", card.metadata, before.metadata),
        ("section", card.sections, before.sections),
    ):
        for key, value in theirs.items():
            name = f"{kind}:{key}"
            if key not in ours:
                # A part that was written once, is unchanged, and is no more: the new run has nothing to say there.
                if then is None or then.get(name) != now[name]:
                    ours[key] = value
            elif then is not None and then.get(name) != now[name]:
                ours[key] = value
        if theirs and then is not None:  # metadata that cannot be read is a slip, not a wish to have none
            for key in [key for key in ours if f"{kind}:{key}" in then and key not in theirs]:
                del ours[key]
    return card.text()


def _sections(body: str) -> dict[str, str]:
    """Title -> text with its heading; a `##` inside a block of code is no heading."""
    sections, title, lines, fenced = {}, "", [], False
    for line in body.split("\n"):
        fenced ^= line.startswith("```")
        if line.startswith("## ") and not fenced:
            sections[title] = "\n".join(lines)
            title, lines = line[3:].strip(), []
        lines.append(line)
    sections[title] = "\n".join(lines)
    return {title: text for title, text in sections.items() if text.strip()}


PLACEHOLDER = "PATH_OR_HUB_ID"
MOST_CLASSES = 200  # rows of the table; more would only be scrolled past


def write_model_card(
    record: RunRecord, output_dir: str | Path, exports: dict[str, list[ExportRow]] | None = None
) -> Path:
    """Render the card as `output_dir/README.md`; what a user has edited in one that lies there stays.

    `exports` as `render_card` takes them.
    """
    path = Path(output_dir) / "README.md"
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    write_text(path, render_card(record, Path(output_dir).resolve().name, exports=exports, edited=(old,)))
    return path


def render_card(
    record: RunRecord,
    name: str,
    repository: str = PLACEHOLDER,
    exports: dict[str, list[ExportRow]] | None = None,
    edited: tuple[str, ...] = (),
) -> str:
    """Render model_card.md for a run.

    Args:
        record: of the run.
        name: title of the card.
        repository: Hub id that the card's code loads.
        exports: folder of each export -> its `export_rows`.
        edited: earlier cards, whose edits are kept; those of a later one win.
    """
    metrics = record.result
    data = record.data
    model = record.model
    on_hub = is_hub_id(data.dataset_name) and not data.is_local
    base = model.base_model if model.base_model and is_hub_id(model.base_model) else None
    base = None if model.is_local else base
    title = dataset_title(data.dataset_name)
    pinned = record.recipe.get("dataset_revision") == data.commit
    exports = exports or {}
    license = model.base_license if base else None
    tags = ["image-classification", "vision-transformer", "timm", "transformers", "hfvit"]
    if model.texts:  # no widget and no pipeline of the Hub can run it
        tags = ["image-classification", "image-and-text", "hfvit"]
    elif "onnx" in exports:
        tags += ["onnx", "transformers.js"]
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=data.dataset_name if on_hub else "image-classification",
            dataset_name=title,
            dataset_config=data.dataset_config_name,
            dataset_revision=data.commit,
            dataset_split=data.splits[record.role].source,
            metric_type=metric,
            metric_name=metric_title,
            metric_value=round(value, 4),
        )
        for metric, value, metric_title in (
            ("accuracy", metrics.accuracy, "Accuracy"),
            ("f1", metrics.macro_f1, "Macro F1"),
        )
    ]
    card_data = ModelCardData(
        model_name=name,
        eval_results=results,
        license=license if license and re.fullmatch(r"[a-z0-9.\-]+", license) else None,
        library_name="hfvit" if model.texts else "timm",
        pipeline_tag=None if model.texts else "image-classification",
        tags=tags,
        datasets=data.dataset_name if on_hub else None,
        base_model=base,
        metrics=["accuracy", "f1"],
    )
    public = public_record(record)
    texts_are_local = model.texts is not None and model.texts.is_local
    card = ModelCard.from_template(
        card_data,
        template_path=str(shipped("model_card.md")),
        name=name,
        repository=repository,
        role=record.role,
        metrics=record.metrics,
        result=metrics,
        temperature=record.temperature,
        # A relative address in `srcset` is not resolved everywhere; that of the repository's main branch is.
        plots="" if repository == PLACEHOLDER else f"https://huggingface.co/{repository}/resolve/main/",
        classes=metrics.per_class if len(metrics.per_class) <= MOST_CLASSES else [],
        model=public.model,
        base_model=base,
        base_license=license,
        from_scratch=model.base_model is None,
        data=data,
        dataset_title=title,
        dataset_commit=data.commit,
        revision_option="" if pinned or not data.commit else f" --dataset_revision {data.commit}",
        dataset_url=f"https://huggingface.co/datasets/{data.dataset_name}" if on_hub else None,
        needs_local=data.is_local or model.is_local or texts_are_local,
        training=record.training,
        time=duration(record.training.seconds),
        hardware=record.hardware,
        versions=record.versions,
        recipe=public.recipe,
        command=_as_typed(public.command or ""),
        exports=[row for rows in exports.values() for row in rows],
        onnx=[row.name for row in exports.get("onnx", [])],
    )
    text = recorded(str(card))
    for old in edited:
        text = keep_edits(text, old) if old else text
    return text


def _as_typed(command: str) -> str | None:
    """The recorded command line, of a script by its name alone, as one that can be typed."""
    script, _, rest = command.partition(" ")
    return f"hfvit train {rest}" if script.endswith("train.py") else command if script == "hfvit" else None
