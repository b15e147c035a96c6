"""What a checkpoint holds beside the Trainer's own state: the unlogged loss, the chosen batch, the run's events."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hfvit.paths import temporary_file

PROGRESS_FILE = "progress.json"


@dataclass
class Progress:
    """`unlogged_loss` is each process's sum of the losses since `logged_step`; sizes are in images of one device."""

    logged_step: int
    unlogged_loss: list[float]
    device_batch: int
    micro_batch: int
    eval_batch: int
    events: list[dict] = field(default_factory=list)

    @classmethod
    def load(cls, checkpoint: str | Path) -> "Progress":
        return cls(**json.loads((Path(checkpoint) / PROGRESS_FILE).read_text(encoding="utf-8")))

    def save(self, checkpoint: str | Path) -> None:
        with temporary_file(Path(checkpoint) / PROGRESS_FILE) as file:
            file.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    def loss_of(self, process: int, processes: int) -> float:
        """The unlogged loss of one of `processes`; their mean where there were others."""
        if len(self.unlogged_loss) == processes:
            return self.unlogged_loss[process]
        return sum(self.unlogged_loss) / len(self.unlogged_loss)


def rewinds(events: list[dict]) -> list[dict]:
    """The events of `nan_policy: rewind`, each with the `step` that is left out from then on."""
    return [event for event in events if event["event"] == "rewind"]


def learning_rate_factor(events: list[dict]) -> float:
    """By what the rewinds have multiplied the learning rate so far."""
    return rewinds(events)[-1]["learning_rate_factor"] if rewinds(events) else 1.0
