"""Images/s and latency of `hfvit serve` and of a transformers pipeline behind FastAPI, under load.

  python benchmarks/serving.py --model outputs/quickstart --rounds 1    # about three minutes
  python benchmarks/serving.py --quick                                  # a minute, to test the script
  python benchmarks/serving.py --json serving.json

  pipeline, threads   `pipeline("image-classification")` in a `def` route: FastAPI calls it in up to 40 threads
  pipeline, in turn   the same in an `async def` route: one request after the other
  hfvit fp32          `hfvit serve` with the same checkpoint
  hfvit ONNX fp32     with `model_optimized.onnx` of `optimum-cli export onnx --optimize`
  hfvit ONNX int8     with `model_quantized.onnx` (int8-dynamic), another precision

Without --model, it is timm's ViT-S/16 at 224 px with random weights (--quick: two blocks at 64 px). Every contender
gets the same JPEG files over HTTP on the loopback interface, from clients that each send the next image after the
answer to the last one, on connections that stay open. The clients run on the same cores as the server.

The last lines compare the largest images/s of each contender whose p95 is not above that of the pipeline's fastest
row. At the end, more clients than the queue has places send to hfvit, and wait as long as the answer 429 says: every
request must be answered by 200 or 429.
"""

import contextlib
import http.client
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
from common import answer, in_own_process, interleaved, medians, parse_options, report, spread, workspace

CLIENTS = (1, 4, 16, 64)
FILES = 64
OVERLOAD_CLIENTS = 96
OVERLOAD_QUEUE = 16
GRAPHS = {"hfvit ONNX fp32": "model_optimized.onnx", "hfvit ONNX int8": "model_quantized.onnx"}
PEERS = ("pipeline, threads", "pipeline, in turn")
OURS = ("hfvit fp32", *GRAPHS)
COLUMNS = {
    "contender": "",
    "clients": ".0f",
    "images/s": ",.1f",
    "spread": ".0%",
    "p50 ms": ",.0f",
    "p95 ms": ",.0f",
    "p99 ms": ",.0f",
    "errors": ".0f",
}
OPTIONS = {
    "--model": {"help": "checkpoint of an image classifier [ViT-S/16 at 224 px, random weights]"},
    "--image": {"choices": ("32x32 PNG", "500x375 JPEG"), "default": "500x375 JPEG", "help": "images sent"},
    "--seconds": {"type": float, "help": "duration of each measurement [5, quick 1]"},
    "--clients": {"type": int, "nargs": "+", "default": list(CLIENTS), "help": "numbers of concurrent clients"},
}

PIPELINE_APP = """\
import io, sys
import uvicorn
from fastapi import FastAPI, Request
from PIL import Image
from transformers import pipeline

classifier = pipeline("image-classification", model=sys.argv[1], device="cpu")
app = FastAPI()

def classify(body):
    return classifier(Image.open(io.BytesIO(body)), top_k=5)

if sys.argv[2] == "pipeline, threads":
    from fastapi import Body
    @app.post("/predict")
    def predict(body: bytes = Body(media_type="application/octet-stream")):
        return classify(body)
else:
    @app.post("/predict")
    async def predict(request: Request):
        return classify(await request.body())

uvicorn.run(app, port=int(sys.argv[3]), log_level="warning")
"""


def prepare(folder: str, model: str | None, image: str, quick: bool, **_) -> None:
    """Save the checkpoint, its exports and the image files.

    Args:
        folder: folder to write to.
        model: checkpoint, None for random weights.
        image: kind of images.
        quick: use a small model.
    """
    from images import KINDS, encoded
    from inference import random_checkpoint

    from hfvit.cli.export_onnx import main as export_onnx

    work = Path(folder)
    checkpoint = model or random_checkpoint(work / "checkpoint", quick)
    words = ["--optimize", "--quantize", "int8-dynamic", "--no_gate"]
    with contextlib.suppress(SystemExit):
        export_onnx(["--model", str(checkpoint), *words, str(work / "onnx")])
    (work / "images").mkdir()
    for number in range(FILES):
        (work / "images" / str(number)).write_bytes(encoded(KINDS[image], number))
    (work / "checkpoint.txt").write_text(str(checkpoint))


@contextlib.contextmanager
def server(contender: str, folder: Path, *options: str):
    """Start the server of a contender, and yield its port.

    Args:
        contender: name of the contender.
        folder: folder of `prepare`.
        *options: further options of `hfvit serve`.
    """
    port = free_port()
    checkpoint = (folder / "checkpoint.txt").read_text()
    if contender in PEERS:
        command = [sys.executable, "-c", PIPELINE_APP, checkpoint, contender, str(port)]
    else:
        artifact = str(folder / "onnx" / GRAPHS[contender]) if contender in GRAPHS else checkpoint
        code = "import sys; from hfvit.cli import main; main(sys.argv[1:])"
        words = ["serve", artifact, "--port", str(port), "--device", "cpu", "--timeout", "60", *options]
        command = [sys.executable, "-c", code, *words]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            wait_until_answering(port, process)
            yield port
        finally:
            process.terminate()


def free_port() -> int:
    """Return a free port."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_until_answering(port: int, process: subprocess.Popen) -> None:
    """Wait until a server answers."""
    for _ in range(600):
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/openapi.json")
            connection.getresponse().read()
            return
        except OSError:
            if process.poll() is not None:
                break
            time.sleep(0.1)
    sys.exit("the server did not start")


def load(port: int, files: list[bytes], clients: int, seconds: float) -> dict:
    """Send images from concurrent clients, and return the latencies in seconds and the number of each status.

    Args:
        port: port of the server.
        files: image files to send.
        clients: number of clients.
        seconds: duration.
    """
    latencies: list[float] = []
    statuses: dict[str, int] = {}
    lock = threading.Lock()
    end = time.perf_counter() + seconds

    def client(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        own: list[float] = []
        counts: dict[str, int] = {}
        while time.perf_counter() < end:
            started = time.perf_counter()
            number += 1
            headers = {"Content-Type": "application/octet-stream"}
            try:
                connection.request("POST", "/predict", files[number % len(files)], headers)
                response = connection.getresponse()
                response.read()
                status = str(response.status)
            except (OSError, http.client.HTTPException):
                connection.close()
                status = "lost"
            counts[status] = counts.get(status, 0) + 1
            if status == "200":
                own.append(time.perf_counter() - started)
            elif status == "429":
                time.sleep(float(response.headers["Retry-After"]))
        connection.close()
        with lock:
            latencies.extend(own)
            for status, count in counts.items():
                statuses[status] = statuses.get(status, 0) + count

    threads = [threading.Thread(target=client, args=(number * 7,)) for number in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"latencies": latencies, "statuses": statuses, "seconds": time.perf_counter() - started}


def measure(contender: str, folder: str, clients: list[int], seconds: float, **_) -> dict:
    """Measure a contender at each number of clients.

    Args:
        contender: name of the contender.
        folder: folder of `prepare`.
        clients: numbers of concurrent clients.
        seconds: duration of each measurement.
    """
    work = Path(folder)
    files = [path.read_bytes() for path in sorted((work / "images").iterdir())]
    figures = {}
    with server(contender, work, "--queue_size", str(max(clients) * 2), "--max_images", "1") as port:
        load(port, files, 4, seconds / 4)  # warm-up
        for count in clients:
            found = load(port, files, count, seconds)
            times = np.asarray(found["latencies"]) * 1000
            p50, p95, p99 = np.percentile(times, [50, 95, 99])
            figures |= {
                f"images/s {count}": len(times) / found["seconds"],
                f"p50 ms {count}": p50,
                f"p95 ms {count}": p95,
                f"p99 ms {count}": p99,
                f"errors {count}": sum(found["statuses"].values()) - len(times),
            }
    return figures


def overload(folder: str, seconds: float, **_) -> dict:
    """Send from more clients than the queue has places, and return the number of each status.

    Args:
        folder: folder of `prepare`.
        seconds: duration.
    """
    work = Path(folder)
    files = [path.read_bytes() for path in sorted((work / "images").iterdir())]
    with server(OURS[0], work, "--queue_size", str(OVERLOAD_QUEUE), "--max_images", "1") as port:
        return load(port, files, OVERLOAD_CLIENTS, seconds)["statuses"]


def summary(rows: list[dict], statuses: dict[str, int]) -> list[str]:
    """Return the lines below the table.

    Args:
        rows: rows of the table.
        statuses: number of each status under overload.
    """
    peer = max((row for row in rows if row["contender"] in PEERS), key=lambda row: row["images/s"])
    lines = [f"fastest pipeline row: {peer['images/s']:.1f} images/s at p95 {peer['p95 ms']:.0f} ms"]
    for name in OURS:
        within = [row for row in rows if row["contender"] == name and row["p95 ms"] <= peer["p95 ms"]]
        if within:
            best = max(row["images/s"] for row in within)
            lines.append(f"{name}: {best:.1f} images/s at p95 of at most that, {best / peer['images/s']:.2f} times")
        else:
            lines.append(f"{name}: no row within that p95")
    counts = ", ".join(f"{count:,} x {status}" for status, count in sorted(statuses.items()))
    lines.append(f"overload, {OVERLOAD_CLIENTS} clients and {OVERLOAD_QUEUE} places: {counts}")
    return lines


def main(argv: list[str] | None = None) -> None:
    """Measure all contenders and print the table."""
    options = parse_options(__doc__, argv, 3, OPTIONS)
    if options.worker is not None:
        job = options.worker
        answer({"prepare": prepare, "measure": measure, "overload": overload}[job.pop("task")](**job))
        return
    seconds = options.seconds or (1.0 if options.quick else 5.0)
    model = options.model and os.path.abspath(options.model)
    with workspace() as folder:
        job = {
            "folder": str(folder), "model": model, "image": options.image, "quick": options.quick,
            "seconds": seconds, "clients": options.clients,
        }  # fmt: skip

        def run(task: dict):
            return in_own_process(__file__, {**job, **task}, folder / "cache")

        run({"task": "prepare"})
        jobs = {name: {"task": "measure", "contender": name} for name in (*PEERS, *OURS)}
        results = interleaved(jobs, options.rounds, run)
        statuses = run({"task": "overload"})
    rows = []
    for name, figures in results.items():
        middle = medians(figures)
        for count in options.clients:
            row = {key: middle[f"{key} {count}"] for key in COLUMNS if f"{key} {count}" in middle}
            row |= {"contender": name, "clients": count}
            rows.append({**row, "spread": spread([each[f"images/s {count}"] for each in figures])})
    report("serving", options, rows, COLUMNS, summary(rows, statuses))


if __name__ == "__main__":
    main()
