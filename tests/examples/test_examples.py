"""Run docs/python.md as a script, examples/quickstart.ipynb, and a type checker on the public API."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from helpers.commands import ROOT, run_command
from nbclient import NotebookClient

SHORT = {'output_dir="outputs/digits"': 'output_dir="outputs/digits", max_steps=10, use_cpu=True, plots=False'}
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}


@pytest.mark.slow
@pytest.mark.integration
def test_python_page_runs_as_a_script(tmp_path):
    page = (ROOT / "docs" / "python.md").read_text()
    script = "\n".join(re.findall(r"```py\n(.*?)```", page, flags=re.DOTALL))
    for text, shortened in SHORT.items():
        assert text in script
        script = script.replace(text, shortened, 1)
    (tmp_path / "page.py").write_text(script)
    result = run_command(sys.executable, "page.py", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr
    assert {"digits", "dict", "mine", "stock"} <= {path.name for path in (tmp_path / "outputs").iterdir()}


# Name of a notebook -> replacements that make its training short.
NOTEBOOKS = {
    "quickstart": {'"outputs/notebook")\nrecord': '"outputs/notebook", max_steps=10, use_cpu=True)\nrecord'},
    "own_folder": {"COUNT = 60": "COUNT = 20", "num_train_epochs=20": "max_steps=4, use_cpu=True"},
    "multilabel": {
        "train=1000, test=200": "train=150, test=50",
        "num_train_epochs=20": "max_steps=4, use_cpu=True",
    },
    "export_and_serve": {"num_train_epochs=10": "max_steps=10, use_cpu=True"},
}


def run_notebook(name: str, folder) -> list:
    """Execute a notebook with shortened training and return its code cells."""
    notebook = nbformat.read(ROOT / "examples" / f"{name}.ipynb", as_version=4)
    for old, new in NOTEBOOKS[name].items():
        (cell,) = [cell for cell in notebook.cells if old in cell.source]
        cell.source = cell.source.replace(old, new)
    shutil.copytree(ROOT / "examples", folder / "examples")
    (folder / "work").mkdir()
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder / "work")}}).execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs(name, tmp_path, monkeypatch):
    if name == "export_and_serve":
        for module in ("fastapi", "uvicorn", "prometheus_client", "python_multipart"):
            pytest.importorskip(module)
    for variable, value in ENVIRONMENT.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    cells = run_notebook(name, tmp_path)
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    pages = [output["data"]["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    progress = [page for page in pages if "Validation Loss" in page or "Training Loss" in page]
    summaries = [page for page in pages if "<th>split</th>" in page]
    assert progress
    assert summaries
    assert "data:image/png" in summaries[0]
    (training,) = [cell for cell in cells if "hfvit.train(" in cell.source]
    printed = "".join(output.get("text", "") for output in training.outputs)
    assert "Writing model shards" not in printed
    assert "{'" not in printed


TYPED = """
import hfvit

record = hfvit.train("quickstart", output_dir="out")
accuracy: float = record.result.accuracy if record else 0.0
classifier: hfvit.Classifier = hfvit.load_classifier("out")
passed: bool = hfvit.validate("out").passed
url: str = hfvit.push("out", "user/name", private=True)
hfvit.no_such_name
record.no_such_attribute
"""


@pytest.mark.integration
def test_type_checker_finds_the_public_names(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(TYPED)
    # Of other packages, nothing is read: their types are not what is tested.
    config = "[mypy]\nignore_missing_imports = True\nfollow_imports = skip\n[mypy-hfvit.*]\nfollow_imports = silent\n"
    config += "[mypy-numpy.*]\nfollow_imports_for_stubs = True\n"
    (tmp_path / "mypy.ini").write_text(config)
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", str(script)],
        cwd=tmp_path, env=os.environ | {"MYPYPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    wrong = [line for line in result.stdout.splitlines() if f"{script.name}:" in line and ": error:" in line]
    lines = sorted(int(line.split(":")[1]) for line in wrong)
    assert set(lines) == {9, 10}, result.stdout
