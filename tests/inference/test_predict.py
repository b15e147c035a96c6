"""`hfvit predict`: input files, output formats and errors."""

import csv
import json
import os
import signal
import threading
import time
import warnings
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from helpers.commands import run_command, run_into, running_command
from helpers.images import LABELS, colored_image
from helpers.messages import assert_names, option_of
from helpers.onnx_graphs import expected_logits, write_configs, write_graph
from PIL import Image
from pyarrow import parquet
from scipy.special import softmax

from hfvit.cli import main
from hfvit.data.decode import find_images
from hfvit.errors import ModelError
from hfvit.inference.backends import OnnxBackend
from hfvit.inference.classifier import load_classifier
from hfvit.inference.predict import Prediction, predictions, write_grid
from hfvit.inference.prediction_file import complete_file
from hfvit.utils.csv_files import write_csv
from hfvit.utils.threads import map_in_threads


@pytest.fixture
def model(tmp_path):
    write_graph(tmp_path / "onnx" / "model.onnx")
    return write_configs(tmp_path / "onnx")


@pytest.fixture
def photos(tmp_path):
    """Write an image of each class, one in a subfolder, and a file that is not an image."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for index, name in enumerate(("a.png", "b.PNG", "more/c.png")):
        colored_image(index, rng).save(folder / name, format="PNG")
    (folder / "notes.txt").write_text("not a image")
    return folder


def command(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main(["predict", *(str(word) for word in words)])
    printed = capsys.readouterr()
    return stop.value.code, printed.out, printed.err


def expected_probabilities(image) -> dict[str, float]:
    return dict(zip(LABELS, softmax(expected_logits(Image.open(image))), strict=True))


def test_predict_json_has_the_probabilities_of_numpy(capsys, model, photos):
    code, out, err = command(capsys, model, photos, "--json", "--batch_size", 2, "--threads", 1)
    assert (code, err) == (0, "")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["image"] for line in lines] == [str(photos / name) for name in ("a.png", "b.PNG", "more/c.png")]
    for line, label in zip(lines, LABELS, strict=True):
        found = {entry["label"]: entry["probability"] for entry in line["predictions"]}
        assert found == pytest.approx(expected_probabilities(line["image"]), abs=1e-6)
        assert list(found.values()) == sorted(found.values(), reverse=True)
        assert next(iter(found)) == label


def test_predict_prints_a_table(capsys, model, photos):
    code, out, _ = command(capsys, model / "model.onnx", photos / "a.png", "--top_k", 2)
    name, first, second = out.splitlines()
    assert code == 0
    assert name == str(photos / "a.png")
    assert first.split()[1] == "red"
    assert float(first.split()[0].rstrip("%")) == pytest.approx(
        100 * expected_probabilities(photos / "a.png")["red"], abs=0.01
    )
    assert second.split()[1] in ("green", "blue")


def test_predict_calibrated_reads_the_run_of_an_export(capsys, model, photos):
    words = (model, photos / "a.png", "--json", "--calibrated")
    code, out, err = command(capsys, *words)
    assert (code, out) == (2, "")
    assert option_of(err) == "calibrated"
    assert_names(err, "run.json", model / "model.onnx")
    run_file = model.parent / "run.json"
    for content, data in (
        ("{}", [run_file]),
        ('{"temperature": {"value": null, "reason": "all was right"}}', [model / "model.onnx", "all was right"]),
        ('{"temperature": {"value": -1}}', [run_file, -1]),
    ):
        run_file.write_text(content)
        code, out, err = command(capsys, *words)
        assert (code, out) == (2, "")
        assert option_of(err) == "calibrated"
        assert_names(err, *data)
    run_file.write_text('{"temperature": {"value": 3.5}}')
    code, out, _ = command(capsys, *words)
    assert code == 0
    found = {entry["label"]: entry["probability"] for entry in json.loads(out)["predictions"]}
    expected = softmax(expected_logits(Image.open(photos / "a.png")) / 3.5)
    assert found == pytest.approx(dict(zip(LABELS, expected, strict=True)), abs=1e-6)


def test_predict_of_bad_images_names_and_skips_them(capsys, model, photos):
    (photos / "broken.png").write_bytes((photos / "a.png").read_bytes()[:80])
    code, out, err = command(capsys, model, photos, "nowhere.png", "--json")
    assert code == 1
    lines = [json.loads(line) for line in out.splitlines()]
    assert [("error" in line) for line in lines] == [False, False, True, False]
    assert [line["predictions"][0]["label"] for line in lines if "predictions" in line] == LABELS
    missing, unreadable, count = err.splitlines()
    assert_names(missing, "nowhere.png")
    assert_names(unreadable, photos / "broken.png")
    assert_names(count, 2)
    code, out, err = command(capsys, model, photos / "broken.png")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("hfvit: error: ")
    assert_names(err, photos / "broken.png")


def test_predict_with_nan_logits_is_an_error(capsys, model, photos):
    write_graph(model / "model.onnx", np.full((3, 3), np.nan))
    code, out, err = command(capsys, model, photos / "a.png", "--json")
    assert code == 2
    answer = json.loads(out)
    assert answer.keys() == {"image", "error"}
    assert answer["image"] == str(photos / "a.png")
    assert_names(answer["error"], photos / "a.png", "NaN")
    assert err.startswith(f"hfvit: {answer['error']}\n")


def test_find_images_of_files_folders_patterns_and_urls(photos, tmp_path):
    url = "http://127.0.0.1/x.png"
    a, b, c = (str(photos / name) for name in ("a.png", "b.PNG", "more/c.png"))
    assert find_images([str(photos)]) == ([a, b, c], [])
    assert find_images([c, a, str(photos), url]) == ([c, a, b, url], [])
    assert find_images([f"{photos}/*.png"]) == ([a], [])
    assert find_images([f"{photos}/**/*.png"]) == ([a, c], [])
    assert find_images([f"{photos}/mor?"]) == ([c], [])
    (tmp_path / "empty").mkdir()
    names = [f"{photos}/*.gif", str(tmp_path / "empty"), "absent"]
    found, wrong = find_images(names)
    assert found == []
    for name, sentence in zip(names, wrong, strict=True):
        assert_names(sentence, name)


def test_predict_of_url_downloads_it(capsys, model, photos):
    handler = partial(SimpleHTTPRequestHandler, directory=str(photos))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        code, out, err = command(capsys, model, f"{address}/more/c.png", f"{address}/gone.png", "--json", "--top_k", 1)
    finally:
        server.shutdown()
        server.server_close()
    good, bad = (json.loads(line) for line in out.splitlines())
    assert code == 1
    assert good["predictions"] == [
        {
            "label": "blue",
            "probability": pytest.approx(expected_probabilities(photos / "more/c.png")["blue"], abs=1e-6),
        }
    ]
    assert "404" in bad["error"]
    assert "404" in err


def test_predict_grid_shows_the_images(capsys, model, photos, tmp_path):
    code, out, err = command(capsys, model, photos, "--save_grid", tmp_path / "grid.png", "--json")
    assert code == 0
    assert len(out.splitlines()) == 3
    assert_names(err, tmp_path / "grid.png", 3)
    with Image.open(tmp_path / "grid.png") as loaded:
        pixels = np.asarray(loaded.convert("RGB"), dtype=np.int64)
    for channel in range(3):  # each image is visible: pixels dominated by its channel
        others = np.delete(pixels, channel, axis=2).max(axis=2)
        assert (pixels[..., channel] > others + 40).sum() > 1000


def test_predict_grid_draws_or_spells_characters_that_the_default_font_lacks(tmp_path):
    label = "猫 𒀀"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of matplotlib, for boxes instead of characters
        write_grid([Prediction("犬.png", {label: 1.0}, thumbnail=Image.new("RGB", (16, 16)))], tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as loaded:
        assert min(loaded.size) > 100


def test_thumbnails_belong_to_their_predictions_after_nan_logits(model, photos, monkeypatch):
    compute = OnnxBackend.__call__

    def nan_for_red(backend, batch, texts=None):
        logits = compute(backend, batch, texts)
        logits[logits.argmax(axis=1) == 0] = np.nan
        return logits

    monkeypatch.setattr(OnnxBackend, "__call__", nan_for_red)
    names, _ = find_images([str(photos)])
    red, *others = predictions(load_classifier(model, device="cpu"), names, thumbnails=2)
    assert red.error
    assert len(others) == 2
    for prediction in others:
        brightest = np.asarray(prediction.thumbnail).mean(axis=(0, 1)).argmax()
        assert LABELS[brightest] == next(iter(prediction.probabilities))


def test_credentials_in_urls_are_masked_in_every_output(capsys, model, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    token = "hf_" + "x" * 34
    handler = partial(SimpleHTTPRequestHandler, directory=str(photos))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    urls = [f"http://127.0.0.1:{server.server_port}/{name}?token={token}" for name in ("a.png", "none.png")]
    texts = []
    try:
        for words in (["--json"], ["--output", tmp_path / "o.jsonl"], ["--output", tmp_path / "o.csv"], []):
            code, out, err = command(capsys, model, *urls, *words)
            assert code == 1
            texts += [out, err]
    finally:
        server.shutdown()
        server.server_close()
    texts += [(tmp_path / name).read_text() for name in ("o.jsonl", "o.csv")]
    assert all(token not in text for text in texts)
    assert [json.loads(line)["image"] for line in texts[0].splitlines()] == [url.replace(token, "***") for url in urls]


@pytest.mark.parametrize("ending", [".csv", ".parquet", ".jsonl"])
def test_file_names_are_written_as_they_are(capsys, model, photos, tmp_path, monkeypatch, ending):
    monkeypatch.setenv("MYSQL_PASSWORD", "wordpress")
    files = [tmp_path / "wordpress" / name for name in ("a.png?token=abcdefgh.png", "a.png?token=ijklmnop.png")]
    files[0].parent.mkdir()
    for file in files:
        os.link(photos / "a.png", file)
    code, _, _ = command(capsys, model, files[0].parent, "--output", tmp_path / f"out{ending}", "--top_k", 1)
    assert code == 0
    if ending == ".jsonl":
        names = [json.loads(line)["image"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    else:
        names = [row["image"] for row in read_output(tmp_path / f"out{ending}")]
    assert names == list(map(str, files))


@pytest.mark.parametrize(
    ("words", "option", "data"),
    [
        (["{tmp}/nothing", "{photos}"], None, ["{tmp}/nothing"]),
        (["{model}", "{tmp}/*.gif"], "IMAGE", ["{tmp}/*.gif"]),
        (["{model}", "{photos}", "--save_grid", "{tmp}/grid.docx"], "save_grid", ["{tmp}/grid.docx", ".png"]),
        (["{model}", "{photos}", "--save_grid", "{tmp}/no/grid.png"], "save_grid", ["{tmp}/no"]),
        (["{model}", "{photos}", "--device", "npu"], "device", ["'npu'"]),
        (["{model}", "{photos}", "--top_k", "0"], "top_k", ["0"]),
        (["{model}", "{photos}", "--json", "--output", "{tmp}/a.csv"], "json", ["{tmp}/a.csv", "--output"]),
    ],
)
def test_predict_with_a_wrong_value_names_option_and_data(capsys, model, photos, tmp_path, words, option, data):
    places = {"model": model, "photos": photos, "tmp": tmp_path}
    code, out, err = command(capsys, *(word.format(**places) for word in words))
    assert (code, out) == (2, "")
    assert option_of(err) == option
    assert_names(err, *(item.format(**places) for item in data))
    assert "Traceback" not in err


@pytest.mark.integration
def test_predict_into_closed_pipe_succeeds(model, photos):
    reader, writer = os.pipe()
    os.close(reader)
    assert run_into(writer, "hfvit", "predict", model, photos, "--json") == (141, "")
    os.close(writer)


@pytest.mark.integration
def test_predict_command_prints_clean_output(model, photos, tmp_path):
    """Run the console command: no messages of libraries."""
    words = ["hfvit", "predict", model, f"{photos}/*.png", photos, "--json", "--top_k", 1]
    result = run_command(*words, new_process=True)
    assert result.returncode == 0
    assert [json.loads(line)["predictions"][0]["label"] for line in result.stdout.splitlines()] == LABELS
    assert result.stderr == ""


def read_output(file):
    """Return the rows of a .csv or .parquet file of predictions."""
    if file.suffix == ".csv":
        with file.open(encoding="utf-8", newline="") as lines:
            return list(csv.DictReader(lines))
    return parquet.read_table(file).to_pylist()


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_predict_output_has_a_row_per_image_and_class(capsys, model, photos, tmp_path, ending):
    (photos / "bad.png").write_bytes(b"no image")
    output = tmp_path / f"predictions{ending}"
    code, out, _ = command(capsys, model, photos, "--output", output, "--top_k", 2)
    assert (code, out) == (1, "")
    rows = read_output(output)
    names = ("a.png", "b.PNG", "bad.png", "more/c.png")
    first = [row for row in rows if row["rank"] in (None, "", 1, "1")]
    assert [row["image"] for row in first] == [str(photos / name) for name in names]
    assert [row["image"] for row in rows if row["error"]] == [str(photos / "bad.png")]
    for name in (names[0], names[1], names[3]):
        found = {row["label"]: float(row["probability"]) for row in rows if row["image"] == str(photos / name)}
        expected = expected_probabilities(photos / name)
        assert found == pytest.approx({label: expected[label] for label in found}, abs=1e-6)
        assert len(found) == 2
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_predict_output_jsonl_equals_the_printed_lines(capsys, model, photos, tmp_path):
    code, _, _ = command(capsys, model, photos, "--output", tmp_path / "predictions.jsonl")
    _, printed, _ = command(capsys, model, photos, "--json")
    assert code == 0
    assert (tmp_path / "predictions.jsonl").read_text() == printed


def test_predict_output_csv_guards_formulas_and_odd_names(capsys, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["=1+1.png", "@a,b.png", 'x\n"y".png', "caf\u00e9.png", os.fsdecode(b"\xff.png")]
    for name in names:
        colored_image(0, np.random.default_rng(0)).save(tmp_path / name, format="PNG")
    code, _, _ = command(capsys, model, *names, "--output", "out.csv", "--top_k", 1)
    assert code == 0
    found = [row["image"] for row in read_output(tmp_path / "out.csv")]
    assert found == ["'=1+1.png", "'@a,b.png", 'x\\n"y".png', "caf\u00e9.png", "\\xff.png"]
    code, _, _ = command(capsys, model, *names, "--output", "out.parquet", "--top_k", 1)
    found = [row["image"] for row in read_output(tmp_path / "out.parquet")]
    assert found == ["=1+1.png", "@a,b.png", 'x\\n"y".png', "caf\u00e9.png", "\\xff.png"]


@pytest.mark.parametrize("label", ["=1+1", " =1+1", "\n=1+1", "\uff1d1+1", "\x1b[31mred", "a\x00b", "\ud800"])
def test_predict_output_csv_of_hostile_labels_equals_write_csv(capsys, model, photos, tmp_path, label):
    config = json.loads((model / "config.json").read_text())
    config["id2label"]["0"] = label
    (model / "config.json").write_text(json.dumps(config))
    code, _, _ = command(capsys, model, photos / "a.png", "--output", tmp_path / "out.csv", "--top_k", 1)
    assert code == 0
    write_csv(tmp_path / "expected.csv", ["label"], [[label]])
    with (tmp_path / "expected.csv").open(encoding="utf-8", newline="") as lines:
        expected = list(csv.DictReader(lines))
    assert [row["label"] for row in read_output(tmp_path / "out.csv")] == [row["label"] for row in expected]


@pytest.mark.parametrize("output", ["predictions.xlsx", "missing/predictions.csv"])
def test_predict_with_wrong_output_names_the_option(capsys, model, photos, output, tmp_path):
    code, _, err = command(capsys, model, photos, "--output", tmp_path / output)
    assert code == 2
    assert option_of(err) == "output"


def test_predict_bf16_of_an_export_names_the_option(capsys, model, photos):
    code, _, err = command(capsys, model, photos, "--bf16")
    assert code == 2
    assert option_of(err) == "bf16"


@pytest.mark.parametrize("name", ["predict", "embed", "serve", "demo"])
def test_revision_is_that_of_a_hub_id(capsys, model, photos, tmp_path, monkeypatch, name):
    loaded = {}

    def load(*_, **options):
        loaded.update(options)
        raise ModelError("model: not loaded.")

    monkeypatch.setattr("hfvit.inference.classifier.load_classifier", load)
    more = {"predict": [photos], "embed": [photos, "--output", tmp_path / "x.parquet"], "serve": ["--port", "0"]}
    words = [*more.get(name, []), "--revision", "v1"]
    for artifact, option, found in ((model, "revision", {}), ("user/flowers", "model", {"revision": "v1"})):
        with pytest.raises(SystemExit) as stop:
            main([name, *map(str, (artifact, *words))])
        assert stop.value.code == 2
        assert option_of(capsys.readouterr().err) == option
        assert found.items() <= loaded.items()
    assert loaded


def test_map_in_threads_keeps_order_and_reads_ahead_at_most():
    taken = []

    def items():
        for index in range(20):
            taken.append(index)
            yield index

    results = map_in_threads(lambda index: index**2, items(), 3)
    assert [next(results) for _ in range(2)] == [0, 1]
    assert len(taken) <= 5
    assert list(results) == [index**2 for index in range(2, 20)]


def test_map_in_threads_raises_where_the_result_is_due():
    results = map_in_threads(lambda value: 1 // value, [1, 0, 1], 3)
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_sigterm_leaves_no_part_of_an_output(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    (tmp_path / "out.csv").write_text("earlier")

    def write() -> None:
        with complete_file(tmp_path / "out.csv") as temporary:
            temporary.write_text("part")
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as stop:
        write()
    assert stop.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]
    assert (tmp_path / "out.csv").read_text() == "earlier"


@pytest.mark.integration
def test_sigterm_ends_predict_without_a_part_of_its_output(model, photos, tmp_path):
    for number in range(5000):
        os.link(photos / "a.png", photos / f"a{number}.png")
    words = ["hfvit", "predict", model, photos, "--output", tmp_path / "out.csv", "--threads", 1]
    with running_command(*words, log=tmp_path / "log") as (process, _):
        while not list(tmp_path.glob(".out.*")):
            time.sleep(0.005)
        process.terminate()
        assert process.wait(30) == 143
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
    assert "Traceback" not in (tmp_path / "log").read_text()
