"""What a user has changed in a model card survives when the card is written again.

A card is metadata and sections (`## ...`, and what stands before the first). A comment at its end records a hash of
each part as it was written; a part that no longer has its hash is the user's.
"""

import hashlib
import json
import re
from dataclasses import dataclass

import yaml

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
