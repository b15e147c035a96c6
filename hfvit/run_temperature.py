"""The temperature that training fitted (temperature.py), found from a classifier that is to be loaded."""

from pathlib import Path

from hfvit.artefacts import Artefact
from hfvit.checkpoints import RUN_FILE
from hfvit.errors import ModelError
from hfvit.json_files import read_object

_HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")


def run_temperature(artefact: Artefact, **kwargs) -> float:
    """The number in the run.json beside the artefact, or above it as for an export below its checkpoint, or in its
    repository on the Hub; `kwargs` are `from_pretrained`'s. Raises `ModelError` where there is none."""
    name = artefact.file or artefact.source
    path = artefact.beside(RUN_FILE) if artefact.folder else _from_hub(artefact.source, kwargs)
    if path is None:
        raise ModelError(
            f"{name} is not calibrated: there is no {RUN_FILE} beside or above it. Copy the {RUN_FILE} of its run"
            " there, or leave calibration out."
        )
    told = read_object(path).get("temperature")
    if not isinstance(told, dict):
        raise ModelError(
            f"{name} is not calibrated: {path} has no temperature, which runs of an older hfvit did not fit. Train"
            " again, or leave calibration out."
        )
    value = told.get("value")
    if value is None:
        raise ModelError(f"{name} is not calibrated: {told.get('reason')}. Leave calibration out.")
    if not isinstance(value, (int, float)) or not value > 0:
        raise ModelError(f"{path}: the temperature {value!r} is no number above 0; mend it or leave calibration out.")
    return float(value)


def _from_hub(repository: str, kwargs: dict) -> Path | None:
    from transformers.utils import cached_file

    found = cached_file(
        repository,
        RUN_FILE,
        **{key: kwargs[key] for key in _HUB_OPTIONS if key in kwargs},
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found and Path(found)
