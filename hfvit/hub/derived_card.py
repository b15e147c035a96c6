"""Model card of a checkpoint of `hfvit soup` or `hfvit extend`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from hfvit.artifacts.export_folder import ExportRow
from hfvit.artifacts.extension_record import ExtensionRecord
from hfvit.artifacts.soup_record import SoupRecord
from hfvit.errors import printable
from hfvit.hub.model_card import TAGS, keep_user_parts, license_metadata
from hfvit.recipe.arguments import MULTI_LABEL
from hfvit.utils.hub_ids import is_hub_id
from hfvit.utils.markup import markdown_environment


def read_derived_record(folder: Path) -> SoupRecord | ExtensionRecord | None:
    """Return soup.json or extension.json of a folder, None without one.

    Raises:
        ModelError: the file is damaged.
    """
    found = [kind for kind in (ExtensionRecord, SoupRecord) if (folder / kind.FILE).is_file()]
    return found[0].load(folder) if found else None


def render_derived_card(
    record: SoupRecord | ExtensionRecord,
    config: dict[str, Any],
    labels: list[str],
    repository: str,
    exports: Sequence[ExportRow] = (),
    earlier: Sequence[str] = (),
) -> str:
    """Render derived_card.md.

    Args:
        record: soup.json or extension.json.
        config: config.json of the checkpoint.
        labels: its class names.
        repository: Hub id, `user/name`.
        exports: rows of the exports in the repository.
        earlier: cards whose user text and metadata are kept; a later card has precedence.
    """
    soup = record.soup if isinstance(record, SoupRecord) else None
    data = record.data if isinstance(record, SoupRecord) else None
    multi_label = config.get("problem_type") == MULTI_LABEL
    base_license = (config.get("pretrained_cfg") or {}).get("license")
    name = repository.split("/")[-1]
    metadata = ModelCardData(
        model_name=printable(name),
        **license_metadata(base_license),
        library_name="timm",
        pipeline_tag="image-classification",
        tags=[*TAGS, *(["multi-label-image-classification"] if multi_label else [])],
        datasets=data.dataset if data and is_hub_id(data.dataset) else None,
    )
    environment = markdown_environment(Path(__file__).parent, keep_trailing_newline=True)
    card = environment.get_template("derived_card.md").render(
        card_data=metadata.to_yaml(),
        name=name,
        repository=repository,
        soup=soup,
        data=data,
        extension=None if soup else record,
        labels=labels,
        multi_label=multi_label,
        architecture=config.get("architecture", ""),
        base_license=base_license,
        exports=exports,
    )
    return keep_user_parts(card, earlier)
