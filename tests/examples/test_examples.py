"""Run docs/python.md as a script, examples/quickstart.ipynb, and a type checker on the public API."""

import os
import re
import subprocess
import sys

import nbformat
import pytest
from helpers.commands import ROOT
from nbclient import NotebookClient

SHORT = {'output_dir="outputs/digits"': 'output_dir="outputs/digits", max_steps=10, use_cpu=True, plots=False'}
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}


@pytest.mark.integration
def test_python_page_runs_as_a_script(tmp_path):
    page = (ROOT / "docs" / "python.md").read_text()
    script = "\n".join(re.findall(r"```py\n(.*?)```", page, flags=re.DOTALL))
    for text, shortened in SHORT.items():
        assert text in script
        script = script.replace(text, shortened, 1)
    (tmp_path / "page.py").write_text(script)
    result = subprocess.run(
        [sys.executable, "page.py"], cwd=tmp_path, env=os.environ | ENVIRONMENT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert {"digits", "dict", "mine", "stock"} <= {path.name for path in (tmp_path / "outputs").iterdir()}


@pytest.mark.slow
@pytest.mark.integration
def test_quickstart_notebook_runs(tmp_path, monkeypatch):
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    first = next(cell for cell in notebook.cells if "hfvit.train" in cell.source)
    first.source = first.source.replace('"outputs/notebook"', '"outputs/notebook", max_steps=10, use_cpu=True')
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)


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
    others = (
        "torch torchvision transformers timm datasets numpy PIL sklearn scipy onnx onnxscript accelerate peft gradio"
    )
    config = "[mypy]\nignore_missing_imports = True\nfollow_imports = silent\n"
    config += "".join(f"[mypy-{name}.*]\nfollow_imports = skip\n" for name in others.split())
    (tmp_path / "mypy.ini").write_text(config)
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", str(script)],
        cwd=tmp_path, env=os.environ | {"MYPYPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    wrong = [line for line in result.stdout.splitlines() if f"{script.name}:" in line and ": error:" in line]
    lines = sorted(int(line.split(":")[1]) for line in wrong)
    assert set(lines) == {9, 10}, result.stdout
