"""soup.json: members and scores of a soup of runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from hfvit.artifacts.gate import EvaluationData
from hfvit.artifacts.json_record import Record
from hfvit.artifacts.run_sections import Soup
from hfvit.utils.files import write_object


@dataclass(kw_only=True)
class SoupRecord(Record):
    """Result of `hfvit soup`.

    Attributes:
        hfvit_version: version that wrote the file.
        soup: the runs, by their path without local folders, and their scores.
        data: labeled images that the scores are of.
    """

    FILE: ClassVar[str] = "soup.json"

    hfvit_version: str
    soup: Soup
    data: EvaluationData

    def save(self, folder: Path) -> Path:
        """Write soup.json to a folder."""
        write_object(folder / self.FILE, self.to_json())
        return folder / self.FILE
