"""`hfvit serve`."""

import argparse
import logging
import os
import signal
import sys

from hfvit.cli.options import (
    ARTIFACT_KINDS,
    add_classifier_options,
    add_revision,
    add_score_options,
    exit_codes,
    hub_options,
    non_negative_float,
    non_negative_int,
    parse_providers,
    positive_int,
)
from hfvit.errors import HFViTError
from hfvit.utils.collector import importing
from hfvit.utils.quiet import quiet_libraries
from hfvit.utils.terminal import PrintableFormatter

EPILOG = f"""\
Install the server with: pip install "hfvit[serve]"
It listens on 127.0.0.1 only, unless --host is given. SIGTERM or Ctrl-C stops it after the requests in progress.

  POST /predict   classify images: raw bytes, a multipart form, or JSON with base64
  GET /health     whether the server can classify
  GET /metrics    Prometheus metrics
  GET /docs       OpenAPI page

examples:
  hfvit serve outputs/quickstart
  hfvit serve outputs/quickstart/onnx --port 8080 --batch_size 32
  curl -H "Content-Type: image/png" --data-binary @digit.png http://127.0.0.1:8000/predict
  curl -F images=@a.png -F images=@b.png "http://127.0.0.1:8000/predict?top_k=1"
  hfvit serve outputs/quickstart/onnx --docker container

{exit_codes(0, 2)}"""

MIB = 2**20
HOST, PORT = "127.0.0.1", 8000
# Options that --docker writes to CMD.
CONTAINER_OPTIONS = (
    "top_k", "calibrated", "batch_size", "threads", "objective", "bf16", "tta", "max_delay_ms", "queue_size",
    "timeout", "max_image_mib", "max_pixels", "max_images",
)  # fmt: skip


def add(commands) -> None:
    """Add the parser of `hfvit serve`."""
    parser = commands.add_parser(
        "serve",
        help="serve a classifier over HTTP",
        description="Serve a classifier over HTTP with dynamic batching, or write the files of a container.",
        epilog=EPILOG,
    )
    parser.add_argument("artifact", metavar="ARTIFACT", help=ARTIFACT_KINDS)
    parser.add_argument("--host", default=HOST, help="address to listen on; 0.0.0.0 for all [%(default)s]")
    parser.add_argument("--port", type=non_negative_int, default=PORT, help="port, 0 for a free one [%(default)s]")
    add_revision(parser)
    add_score_options(parser)
    add_classifier_options(parser)
    queue = parser.add_argument_group("batching and limits")
    queue.add_argument(
        "--max_delay_ms", type=non_negative_float, default=5.0,
        help="longest time that an image waits for others that are being read while the model is idle, in milliseconds"
        " [%(default)s]",
    )  # fmt: skip
    queue.add_argument(
        "--queue_size", type=positive_int, default=128,
        help="images being read, waiting or running; further requests get 429 [%(default)s]",
    )  # fmt: skip
    queue.add_argument(
        "--timeout", type=non_negative_float, default=30.0,
        help="time to receive a request, and to classify its images, in seconds [%(default)s]",
    )  # fmt: skip
    queue.add_argument("--max_image_mib", type=positive_int, default=20, help="size of an image file [%(default)s]")
    queue.add_argument(
        "--max_pixels", type=positive_int, default=32_000_000, help="width times height of an image [%(default)s]"
    )
    queue.add_argument("--max_images", type=positive_int, default=32, help="images per request [%(default)s]")
    parser.add_argument(
        "--docker", metavar="DIR",
        help="write Dockerfile, model, and handler.py of Inference Endpoints into this folder, and start no server",
    )  # fmt: skip
    parser.set_defaults(command=serve)


def show_log() -> None:
    """Show the log of the server on stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("hfvit").setLevel(logging.INFO)


def exit_on_sigterm_as_init() -> None:
    """Exit on SIGTERM if this is the first process of a container.

    The kernel ignores the signal there without a handler. That of the running server replaces this one.
    """
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def write_docker(options: argparse.Namespace) -> None:
    """Write the files of `--docker DIR`, with the options of the server in CMD."""
    from hfvit.artifacts.artifact import find_artifact

    artifact = find_artifact(options.artifact)
    for name, default in (("host", HOST), ("port", PORT), ("device", None), ("providers", None)):
        if getattr(options, name) != default:
            raise HFViTError(
                f"--{name}: not available with --docker, got {getattr(options, name)}. The server of the container"
                " runs on the CPU and listens on port 8000, which `docker run -p` maps to an address."
            )
    from hfvit.inference.classifier import check_options, run_temperature  # imports torch
    from hfvit.serve.container import write_container

    check_options(artifact, objective=options.objective, threads=options.threads, bf16=options.bf16)
    if options.calibrated:
        run_temperature(artifact, options.tta)
    words = []
    for name in CONTAINER_OPTIONS:
        value = getattr(options, name)
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            words += [f"--{name}", str(value)]
    write_container(artifact, options.docker, words)
    print(f"Wrote {options.docker}. Build the image: docker build -t hfvit-serve {options.docker}")


def serve(options: argparse.Namespace) -> None:
    """Run `hfvit serve ARTIFACT`."""
    hub = hub_options(options)
    if options.timeout == 0:
        raise HFViTError("--timeout: must be positive, got 0.")
    if options.max_images > options.queue_size:
        raise HFViTError(f"--max_images: must be at most --queue_size, got {options.max_images}.")
    if options.docker is not None:
        write_docker(options)
        return
    exit_on_sigterm_as_init()
    providers = parse_providers(options)
    with importing():
        from hfvit.serve.app import load_libraries

        load_libraries()
        quiet_libraries()
    show_log()
    from dataclasses import replace

    from hfvit.data.open_image import UPLOAD_LIMITS
    from hfvit.inference.classifier import load_classifier
    from hfvit.serve.app import ServerOptions
    from hfvit.serve.payload import RequestLimits
    from hfvit.serve.server import listening_socket
    from hfvit.serve.server import serve as run_server

    max_bytes = options.max_image_mib * MIB
    image = replace(UPLOAD_LIMITS, max_bytes=max_bytes, max_pixels=options.max_pixels)
    server_options = ServerOptions(
        max_batch_size=options.batch_size,
        max_delay=options.max_delay_ms / 1000,
        queue_size=options.queue_size,
        timeout=options.timeout,
        top_k=options.top_k,
        limits=RequestLimits(max_bytes, options.max_images, image),
    )
    with listening_socket(options.host, options.port) as bound:
        classifier = load_classifier(
            options.artifact,
            options.device,
            options.threads,
            providers=providers,
            objective=options.objective,
            bf16=options.bf16,
            calibrated=options.calibrated,
            tta=options.tta,
            **hub,
        )
        run_server(classifier, bound, server_options)
