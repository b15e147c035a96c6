"""`MultiRunRecord` (multirun.json): runs of a recipe with several seeds or folds."""

import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from hfvit.artifacts.constants import MULTIRUN_FILE
from hfvit.artifacts.json_record import Count, FieldError, FileRecord, Record, shown
from hfvit.artifacts.run_record import RunRecord
from hfvit.recipe.arguments import MULTI_LABEL_METRICS, RANKING_METRICS, SCALAR_METRICS
from hfvit.utils.formatting import aligned

SCALARS = dict.fromkeys((*SCALAR_METRICS, *RANKING_METRICS, *MULTI_LABEL_METRICS))


@dataclass(kw_only=True)
class MemberRun(Record):
    """Describe a finished run.

    Attributes:
        folder: name of its folder in that of the record.
        values: keys of its recipe in which the runs differ.
        metrics: scalar metrics by split.
    """

    folder: str
    values: dict[str, Any]
    metrics: dict[str, dict[str, float]]


@dataclass(kw_only=True)
class Spread(Record):
    """Mean, sample standard deviation and range of a metric over runs.

    The standard deviation of a single run is None.
    """

    mean: float
    std: float | None
    lowest: float
    highest: float
    runs: Count

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Summarize the values of a metric."""
        found = list(values)
        std = statistics.stdev(found) if len(found) > 1 else None
        return cls(mean=statistics.fmean(found), std=std, lowest=min(found), highest=max(found), runs=len(found))


@dataclass(kw_only=True)
class MultiRunRecord(FileRecord):
    """multirun.json of a folder with several runs of a recipe.

    Attributes:
        repeated_by: key of the recipe with the runs, `seeds` or `folds`.
        planned: names of all runs.
        score: name of the main metric, such as `accuracy`.
        recipe: values that all runs have.
        runs: finished runs.
        metrics: summary of the finished runs, by split and metric.
    """

    FILE: ClassVar[str] = MULTIRUN_FILE
    REMEDY: ClassVar[str] = "Pass --overwrite_output_dir to start all runs again."

    hfvit_version: str
    finished: str | None = None
    command: str
    repeated_by: str
    planned: list[str]
    score: str | None = None
    recipe: dict[str, Any]
    runs: list[MemberRun] = field(default_factory=list)
    metrics: dict[str, dict[str, Spread]] = field(default_factory=dict)

    def check(self) -> None:
        """Raise `FieldError` for names that are not folders in that of the record."""
        for place, run in enumerate(self.runs):
            if not re.fullmatch(r"(seed|fold)_\d+", run.folder):
                raise FieldError(f"runs[{place}].folder", f"must be seed_N or fold_N, got {shown(run.folder)}")

    def add(self, folder: str, values: dict[str, Any], run: RunRecord) -> None:
        """Add a finished run, and summarize all of them.

        Args:
            folder: name of its folder.
            values: keys of the recipe in which the runs differ.
            run: its record.
        """
        metrics = {
            role: {key: value for key, value in split.to_json().items() if key in SCALARS and value is not None}
            for role, split in run.metrics.items()
        }
        self.runs = [other for other in self.runs if other.folder != folder]
        self.runs.append(MemberRun(folder=folder, values=values, metrics=metrics))
        self.score = run.result.score.key
        self.metrics = {}
        for role in dict.fromkeys(role for member in self.runs for role in member.metrics):
            found = [member.metrics[role] for member in self.runs if role in member.metrics]
            keys = dict.fromkeys(key for scores in found for key in scores)
            self.metrics[role] = {key: Spread.of(scores[key] for scores in found if key in scores) for key in keys}

    def __repr__(self) -> str:
        shown = [f"{len(self.runs)} of {len(self.planned)} {self.repeated_by}"]
        shown += [f"{role} {self.score} {self._shown(each[self.score].mean)}" for role, each in self.metrics.items()]
        return f"MultiRunRecord({', '.join(shown)})"

    def __str__(self) -> str:
        return self.table() if self.runs else repr(self)

    def table(self) -> str:
        """Return a table with the score of each finished run, mean and deviation."""
        roles = [role for role in ("validation", "test") if role in self.metrics]
        rows = [("run", *(f"{role} {self.score}" for role in roles))]
        for member in self.runs:
            scores = [member.metrics.get(role, {}).get(self.score) for role in roles]
            rows.append((member.folder, *map(self._shown, scores)))
        spreads = [self.metrics[role][self.score] for role in roles]
        rows.append(("mean", *(self._shown(spread.mean) for spread in spreads)))
        rows.append(("std", *(self._shown(spread.std) for spread in spreads)))
        return "\n".join(aligned(rows))

    def _shown(self, value: float | None) -> str:
        return "-" if value is None else f"{value:.2%}" if self.score == "accuracy" else f"{value:.4f}"
