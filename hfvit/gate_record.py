"""What the gate found, entered in the files beside the artefacts: run.json, export.json, engine.json."""

from collections.abc import Sequence
from pathlib import Path

from hfvit.artefacts import ENGINE_FACTS_FILE, Artefact, find_artefact
from hfvit.checkpoints import RUN_FILE
from hfvit.errors import ModelError
from hfvit.export.folder import FACTS_FILE, read_export_facts, write_export_facts
from hfvit.json_files import check_replaceable, read_object, told_of, write_object
from hfvit.validate import Comparison


def check_recordable(paths: Sequence[str | Path]) -> None:
    """For before the work: raise `ModelError` where `record` of the same `paths` could not read or replace a file."""
    artefacts = [find_artefact(path) for path in paths]
    files = [_run_file(artefacts[0])] + [a.folder / FACTS_FILE for a in artefacts if _export_entry(a) is not None]
    files += [_engine_file(a) for a in artefacts]
    for file in dict.fromkeys(filter(None, files)):
        check_replaceable(file)


def record(comparison: Comparison, paths: Sequence[str | Path]) -> list[Path]:
    """Enter the result beside the artefacts: run.json of the reference, export.json of each ONNX file and engine.json
    of each engine. The files written.

    `paths` are those of `comparison.rows`. Nothing written names a folder of this machine. Raises `ModelError` for a
    file that cannot be read or written.
    """
    artefacts = [find_artefact(path) for path in paths]
    base = artefacts[0].folder if artefacts[0].is_checkpoint else None
    rows = [
        {**row, "artefact": " ".join([_public_name(artefact, base), *_changes(row["artefact"])])}
        for row, artefact in zip(comparison.rows, artefacts, strict=True)
    ]
    written = []
    if run_file := _run_file(artefacts[0]):
        write_object(run_file, {**read_object(run_file), "gate": Comparison(rows, comparison.facts).to_dict()})
        written.append(run_file)
    for artefact, row in zip(artefacts, rows, strict=True):
        if engine_file := _engine_file(artefact):
            write_object(engine_file, {**read_object(engine_file), "gate": _gate(comparison, row, rows[0])})
            written.append(engine_file)
        if (entry := _export_entry(artefact)) is not None:
            gate = _gate(comparison, row, rows[0])
            with told_of(artefact.folder / FACTS_FILE):
                write_export_facts(artefact.folder, artefact.file.name, {**entry, "gate": gate})
            written.append(artefact.folder / FACTS_FILE)
    return list(dict.fromkeys(written))


def _gate(comparison: Comparison, row: dict, reference: dict) -> dict:
    return {**comparison.facts, **row, "passed": row["failure"] is None, "reference": reference}


def _engine_file(artefact: Artefact) -> Path | None:
    """engine.json of an engine."""
    return artefact.beside(ENGINE_FACTS_FILE) if artefact.is_engine else None


def _run_file(reference: Artefact) -> Path | None:
    """run.json of a checkpoint that a run left."""
    file = reference.folder / RUN_FILE if reference.is_checkpoint and reference.folder else None
    return file if file and file.is_file() else None


def _export_entry(artefact: Artefact) -> dict | None:
    """What the export.json beside an ONNX file tells of it."""
    if not artefact.is_graph:
        return None
    files = read_export_facts(artefact.folder)["files"]
    if not isinstance(files, dict) or not isinstance(files.get(artefact.file.name, {}), dict):
        raise ModelError(f"{artefact.folder / FACTS_FILE} holds no table of files; delete it and export again.")
    return files.get(artefact.file.name)


def _changes(name: str) -> list[str]:
    """What `load_classifier` was asked to change of a checkpoint, as its name says."""
    return [word for word in name.split(" ") if word.startswith(("patch_size=", "merge_tokens="))]


def _public_name(artefact: Artefact, base: Path | None) -> str:
    """The artefact's place below the reference, else its last two names, else its Hub id."""
    path = artefact.file or artefact.folder
    if path is None:
        return artefact.source
    path = path.resolve()
    if base and path != base.resolve() and path.is_relative_to(base.resolve()):
        return path.relative_to(base.resolve()).as_posix()
    return f"{path.parent.name}/{path.name}" if artefact.file else path.name
