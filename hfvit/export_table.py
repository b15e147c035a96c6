"""What lies exported beside a run: the facts of each file, and the rows of the table that card and report show."""

from datetime import datetime
from pathlib import Path

from hfvit.artefacts import ENGINE_FACTS_FILE
from hfvit.errors import ModelError
from hfvit.export.folder import FACTS_FILE, read_export_facts
from hfvit.json_files import read_object
from hfvit.tables import size


def export_facts(folder: Path) -> dict[str, dict]:
    """File name -> facts of an export folder, from its export.json or engine.json; empty where there is neither."""
    files = read_export_facts(folder)["files"]
    if not isinstance(files, dict):
        raise ModelError(f"{folder / FACTS_FILE} holds no table of files; delete it and export again.")
    found = {name: facts for name, facts in files.items() if isinstance(facts, dict)}
    engine = folder / ENGINE_FACTS_FILE
    if engine.is_file():
        facts = read_object(engine)
        # What is told there of the graph (parity, gate) was not measured on the engine, and is no line of its own.
        found |= {facts.get("file", "model.engine"): {key: facts[key] for key in ("bytes", "gate") if key in facts}}
    return found


def find_exports(output_dir: str | Path, facts: dict) -> tuple[dict[str, dict], list[str]]:
    """Folder -> its `export_facts`, of the exports right below `output_dir`, and the folders that are older than the
    run in it: a training that was repeated leaves the exports of the one before."""
    finished = facts.get("finished")
    since = datetime.fromisoformat(finished).timestamp() if finished else 0.0
    found, stale = {}, []
    for folder in sorted(path for path in Path(output_dir).iterdir() if path.is_dir()):
        files = [folder / name for name in (FACTS_FILE, ENGINE_FACTS_FILE) if (folder / name).is_file()]
        if files and max(file.stat().st_mtime for file in files) < since:
            stale.append(folder.name)
        elif files:
            found[folder.name] = export_facts(folder)
    return found, stale


def export_rows(exports: dict[str, dict]) -> list[dict]:
    """Rows of the table: an empty string for what was not measured."""
    return [_row(f"{folder}/{file}", facts) for folder, files in exports.items() for file, facts in files.items()]


def _row(name: str, facts: dict) -> dict:
    parity, gate = facts.get("parity") or {}, facts.get("gate") or {}
    difference = parity.get("max_abs_difference", gate.get("max_logit_difference"))
    return {
        "file": name,
        "size": size(facts["bytes"]) if "bytes" in facts else "",
        "difference": "" if difference is None else f"{difference:.2g}",
        "accuracy": f"{gate['accuracy']:.2%}" if "accuracy" in gate else "",
        "agreement": f"{gate['agreement']:.2%}" if gate.get("agreement") is not None else "",
    }
