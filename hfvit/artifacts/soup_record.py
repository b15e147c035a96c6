"""soup.json: members and scores of a soup of runs."""

from dataclasses import dataclass
from typing import ClassVar

from hfvit.artifacts.gate import EvaluationData
from hfvit.artifacts.json_record import FileRecord
from hfvit.artifacts.run_sections import Soup


@dataclass(kw_only=True)
class SoupRecord(FileRecord):
    """Result of `hfvit soup`.

    Attributes:
        hfvit_version: version that wrote the file.
        soup: the runs, by their path without local folders, and their scores.
        data: labeled images that the scores are of.
    """

    FILE: ClassVar[str] = "soup.json"
    REMEDY: ClassVar[str] = "Make the checkpoint again with `hfvit soup`, or delete the file."

    hfvit_version: str
    soup: Soup
    data: EvaluationData

    def __repr__(self) -> str:
        soup = self.soup
        members = f"{len(soup.used)} of {len(soup.members)} runs"
        return f"SoupRecord({soup.kind}, {members}: {soup.metric} {soup.score:.2%})"
