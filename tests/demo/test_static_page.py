"""Files and errors of `hfvit demo --static`; export/test_clients.py runs the page in a browser."""

import json
from pathlib import Path

import pytest
from helpers.browser import Visit, chromium, served
from helpers.images import LABELS
from helpers.messages import assert_names, option_of
from helpers.onnx_graphs import write_configs, write_graph
from helpers.records import make_record
from PIL import Image

from hfvit.artifacts.run_sections import CalibratedSplit, OutOfDistribution, Temperature
from hfvit.cli import main
from hfvit.demo.web_runtime import TESTED, TESTED_RUNTIME

OWN = {"index.html", "README.md", "style.css", "page.js", "worker.js", "pixels.js", "icon.svg", "page.json"}
MODEL = {"model/config.json", "model/preprocessor_config.json"}


@pytest.fixture
def export(tmp_path):
    for name in ("model.onnx", "model_quantized.onnx", "model_optimized.onnx"):
        write_graph(tmp_path / "onnx" / name)
    return write_configs(tmp_path / "onnx", labels=["red", "<b>green</b>", "blue"])


@pytest.fixture
def npm(tmp_path):
    """The file names of an npm installation of the tested version."""
    package = tmp_path / "js" / "node_modules" / "@huggingface" / "transformers"
    runtime = tmp_path / "js" / "node_modules" / "onnxruntime-web"
    description = {
        "name": "@huggingface/transformers",
        "version": TESTED,
        "dependencies": {"onnxruntime-web": TESTED_RUNTIME},
    }
    runtime_description = {"name": "onnxruntime-web", "version": TESTED_RUNTIME}
    for folder, content in ((package, description), (runtime, runtime_description)):
        (folder / "dist").mkdir(parents=True)
        (folder / "package.json").write_text(json.dumps(content))
    for file in (
        package / "dist/transformers.min.js",
        runtime / "dist/ort-wasm-simd-threaded.mjs",
        runtime / "dist/ort-wasm-simd-threaded.wasm",
    ):
        file.write_text(file.name)
    return tmp_path / "js"


def demo(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main(["demo", *(str(word) for word in words)])
    printed = capsys.readouterr()
    return stop.value.code, printed.out, printed.err


def files(folder) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_page_has_all_files_and_overwrite_keeps_other_files(capsys, export, npm, tmp_path):
    photo = Image.new("RGB", (900, 600))
    exif = photo.getexif()
    exif[0x010E] = "where it was taken"
    photo.save(tmp_path / "photo.jpg", exif=exif)
    page = tmp_path / "page"
    words = (export, "--static", page, "--vendor", npm / "node_modules", "--examples", tmp_path / "photo.jpg")
    code, out, err = demo(capsys, *words, "--title", "Colors & <shapes>", "--top_k", 2)
    assert (code, err) == (0, "")
    assert "model_quantized.onnx" in out
    vendor = {f"vendor/{name}" for name in ("transformers.min.js", "ort-wasm-simd-threaded.mjs")}
    vendor |= {"vendor/ort-wasm-simd-threaded.wasm"}
    assert files(page) == OWN | MODEL | vendor | {"model/onnx/model_quantized.onnx", "examples/1.webp"}
    assert {path.name for path in tmp_path.iterdir()} == {"onnx", "js", "photo.jpg", "page"}
    text = (page / "index.html").read_text()
    assert "Colors &amp; &lt;shapes&gt;" in text
    assert "&lt;b&gt;green" in text
    assert "https://" not in text
    with Image.open(page / "examples" / "1.webp") as example:
        assert (example.size, len(example.getexif())) == ((768, 512), 0)
    assert json.loads((page / "page.json").read_text())["top_k"] == 2

    (page / ".git").mkdir()
    (page / ".git" / "HEAD").write_text("kept")
    code, out, err = demo(capsys, export, "--static", page)
    assert code == 2
    assert option_of(err) == "static"
    assert_names(err, page, ".git", "--overwrite")
    assert demo(capsys, export / "model.onnx", "--static", page, "--overwrite")[0] == 0
    assert files(page) == OWN | MODEL | {"model/onnx/model.onnx", ".git/HEAD"}
    assert "https://cdn.jsdelivr.net" in (page / "index.html").read_text()


def test_page_of_several_labels_knows_their_thresholds(capsys, export, tmp_path):
    config = json.loads((export / "config.json").read_text())
    config |= {"problem_type": "multi_label_classification", "thresholds": [0.2, 0.5, 0.9]}
    (export / "config.json").write_text(json.dumps(config))
    assert demo(capsys, export, "--static", tmp_path / "page")[0] == 0
    page = json.loads((tmp_path / "page" / "page.json").read_text())
    assert page["multi_label"]
    assert page["thresholds"] == [0.2, 0.5, 0.9]


def test_space_readme_has_valid_metadata(capsys, export, tmp_path):
    from huggingface_hub import RepoCard

    assert demo(capsys, export, "--static", tmp_path / "page", "--title", 'A "title": with #signs')[0] == 0
    card = RepoCard.load(tmp_path / "page" / "README.md", repo_type="space")
    assert card.data.sdk == "static"
    assert card.data.title == 'A "title": with #signs'


@pytest.mark.parametrize(
    ("words", "option", "data"),
    [
        (["{tmp}/nothing", "--static", "{tmp}/page"], "ARTIFACT", ["{tmp}/nothing", "--quantize int8 EXPORT"]),
        (["{tmp}/onnx/model_optimized.onnx", "--static", "{tmp}/page"], "ARTIFACT",
         ["{tmp}/onnx/model_optimized.onnx"]),
        (["{tmp}/onnx", "--static", "{tmp}/onnx", "--overwrite"], "static", ["{tmp}/onnx"]),
        (["{tmp}/onnx", "--static", "{tmp}/js"], "static", ["{tmp}/js", "node_modules"]),
        (["{tmp}/onnx", "--static", "{tmp}/foreign", "--overwrite"], "static", ["{tmp}/foreign", "model/"]),
        (["{tmp}/onnx", "--static", "{tmp}/page", "--vendor", "{tmp}/onnx"], "vendor",
         ["{tmp}/onnx", f"npm install @huggingface/transformers@{TESTED}"]),
        (["{tmp}/onnx", "--static", "{tmp}/page", "--vendor", "{tmp}/old"], "vendor", ["{tmp}/old", "3.0.0"]),
        (["{tmp}/onnx", "--static", "{tmp}/page", "--vendor", "{tmp}/alone"], "vendor", ["{tmp}/alone"]),
        (["{tmp}/onnx", "--static", "{tmp}/page", "--examples", "{tmp}/none"], "examples", ["{tmp}/none"]),
        (["{tmp}/onnx", "--static", "{tmp}/page", "--port", "80"], "port", ["--static"]),
        (["{tmp}/onnx", "--vendor", "{tmp}/js"], "vendor", ["--static"]),
        (["{tmp}/onnx", "--static", "{tmp}/folders", "--overwrite"], "static", ["{tmp}/folders/index.html"]),
        (["{tmp}/onnx", "--port", "99999"], "port", ["99999"]),
        (["{tmp}/onnx", "--examples", "http://127.0.0.1:1/a.png"], "examples", ["http://127.0.0.1:1/a.png"]),
        (["{tmp}/bare", "--static", "{tmp}/page"], None, ["{tmp}/bare", "preprocessor_config.json"]),
    ],
)  # fmt: skip
def test_demo_with_an_invalid_value_names_the_option_and_writes_nothing(
    capsys, export, npm, tmp_path, words, option, data
):
    (tmp_path / "foreign" / "model").mkdir(parents=True)
    (tmp_path / "folders" / "index.html").mkdir(parents=True)
    package = {"name": "@huggingface/transformers", "version": "3.0.0"}
    for name, content in (("old", package), ("alone", package | {"version": TESTED})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "package.json").write_text(json.dumps(content))
    write_graph(tmp_path / "bare" / "model.onnx")
    write_configs(tmp_path / "bare", LABELS, processor=False)
    before = files(tmp_path)
    code, out, err = demo(capsys, *(word.format(tmp=tmp_path) for word in words))
    assert (code, out) == (2, "")
    assert option_of(err) == option
    assert_names(err, *(item.format(tmp=tmp_path) for item in data))
    assert "Traceback" not in err
    assert files(tmp_path) == before
    assert not (tmp_path / "page").exists()


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model_quantized.onnx"])
def test_link_in_an_export_is_refused(capsys, export, npm, tmp_path, name):
    file = export / name
    file.rename(tmp_path / "secret")
    file.symlink_to(tmp_path / "secret")
    code, _, error = demo(capsys, export, "--static", tmp_path / "page", "--vendor", npm)
    assert code == 2
    assert option_of(error) == "static"
    assert_names(error, file, tmp_path / "secret")
    assert not (tmp_path / "page").exists()


def test_link_in_the_place_of_a_page_is_refused(capsys, export, npm, tmp_path):
    (tmp_path / "page").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "page" / "model").symlink_to(tmp_path / "elsewhere")
    words = (export, "--static", tmp_path / "page", "--vendor", npm, "--overwrite")
    code, _, error = demo(capsys, *words)
    assert code == 2
    assert option_of(error) == "static"
    assert not list((tmp_path / "elsewhere").iterdir())


def test_page_is_written_to_the_folder_of_a_link_and_to_the_current_folder(capsys, export, tmp_path, monkeypatch):
    for name in ("target", "current"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "dangling").symlink_to(tmp_path / "new")
    assert demo(capsys, export, "--static", tmp_path / "link")[0] == 0
    assert demo(capsys, export, "--static", tmp_path / "dangling")[0] == 0
    monkeypatch.chdir(tmp_path / "current")
    assert demo(capsys, export, "--static", ".")[0] == 0
    pages = [files(tmp_path / name) for name in ("target", "new", "current")]
    assert pages == [OWN | MODEL | {"model/onnx/model_quantized.onnx"}] * 3
    assert (tmp_path / "link").is_symlink()
    assert files(Path.cwd()) == pages[0]


@pytest.mark.parametrize("failing", range(1, 9))
def test_error_while_a_page_is_replaced_restores_it(capsys, export, tmp_path, monkeypatch, failing):
    page = tmp_path / "page"
    assert demo(capsys, export / "model.onnx", "--static", page, "--title", "earlier")[0] == 0
    (page / "CNAME").write_text("kept")
    before = {name: (page / name).read_bytes() for name in files(page)}
    rename = Path.rename
    calls = []

    def fail(self, target):
        calls.append(self)
        if len(calls) == failing:
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    code, _, error = demo(capsys, export, "--static", page, "--overwrite")
    assert (code, option_of(error)) == (2, "static")
    assert {name: (page / name).read_bytes() for name in files(page)} == before
    assert not list(page.glob(".*"))


@pytest.mark.parametrize("tta", [None, "flip"])
def test_page_shows_temperature_and_threshold_of_single_views_only(capsys, export, tmp_path, tta):
    record = make_record(3)
    record.recipe["eval_tta"] = tta
    record.out_of_distribution = OutOfDistribution(
        score="energy", threshold=-2.0, kept=0.95, fitted_on="validation", images=100
    )
    splits = {name: CalibratedSplit(loss=0.1, ece=0.01, calibration=[]) for name in ("validation", "test")}
    record.temperature = Temperature(value=2.0, fitted_on="validation", images=100, reason=None, splits=splits)
    record.save(export)
    assert demo(capsys, export, "--static", tmp_path / "page")[0] == 0
    page = json.loads((tmp_path / "page" / "page.json").read_text())
    assert (page["temperature"], page["max_energy"]) == ((1.0, None) if tta else (2.0, -2.0))


WORKER = """
const answer = { label: "כלב (גור)", probability: 0.985 };
const seen = { data: new Uint8ClampedArray(4), width: 1, height: 1 };
onmessage = ({ data: { kind, id } }) => {
  if (kind === "start") postMessage({ kind: "ready" });
  if (kind === "classify")
    postMessage({ kind: "answer", id, best: [answer], isUnlike: false, milliseconds: 1, seen, size: [1, 1] });
  if (kind === "explain") postMessage({ kind: "explained", id, seen, label: answer.label });
};
"""


@pytest.mark.slow
def test_names_in_another_writing_direction_are_isolated(capsys, export, tmp_path):
    assert demo(capsys, export, "--static", tmp_path / "page")[0] == 0
    (tmp_path / "page" / "worker.js").write_text(WORKER)
    Image.new("RGB", (1, 1)).save(tmp_path / "image.png")
    with chromium() as browser, served(tmp_path / "page") as address:
        visit = Visit(browser, address)
        visit.wait("ready")
        assert visit.choose(tmp_path / "image.png") == "כלב (גור), 98.5%"
        visit.page.click("#explain")
        visit.wait("explained")
        names = visit.page.eval_on_selector_all(
            "#status bdi, #explained bdi, .name", "all => all.map(e => e.innerText)"
        )
        assert names == ["כלב (גור)"] * 3
        roles = visit.page.eval_on_selector_all("dl > [role], dl > div > [role]", "all => all.length")
        visit.close()
    assert (roles, visit.errors) == (0, [])
