"""Run the HTTP server until SIGTERM or Ctrl-C."""

import math
import signal
import socket
import sys

from PIL import Image

from hfvit.errors import HFViTError, one_line, printable
from hfvit.inference.classifier import Classifier
from hfvit.serve.app import ServerOptions, build_app
from hfvit.serve.protocol import limited_protocol

KEEP_ALIVE_SECONDS = 20


def listening_socket(host: str, port: int) -> socket.socket:
    """Bind a socket, so that an address in use is reported before the model is loaded.

    Args:
        host: IPv4 or IPv6 address, or host name.
        port: TCP port, 0 for a free one.

    Raises:
        HFViTError: the address is not available.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except BaseException:
            bound.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        raise _not_available(host, port, error) from None
    return bound


def _not_available(host: str, port: int, error: Exception) -> HFViTError:
    return HFViTError(f"--host, --port: cannot listen on {host}:{port} ({one_line(error)}).")


def uvicorn_server(classifier: Classifier, options: ServerOptions):
    """Create the `uvicorn.Server` of a classifier.

    Args:
        classifier: classifier of images, without texts.
        options: options of the server.
    """
    app = build_app(classifier, options)
    import uvicorn

    config = uvicorn.Config(
        app,
        http=limited_protocol(options.timeout),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        # A request in progress at SIGTERM has `timeout` to arrive and `timeout` to be classified.
        timeout_graceful_shutdown=math.ceil(2 * options.timeout) + 1,
    )
    return uvicorn.Server(config)


def serve(classifier: Classifier, bound: socket.socket, options: ServerOptions) -> None:
    """Serve until SIGTERM or Ctrl-C, then answer the requests in progress.

    Args:
        classifier: classifier of images, without texts.
        bound: socket of `listening_socket`.
        options: options of the server.
    """
    server = uvicorn_server(classifier, options)
    classifier.logits([Image.new("RGB", (64, 64))])  # warm-up
    host, port = bound.getsockname()[:2]
    try:
        bound.listen()  # so that a request that is sent once the address is printed waits for uvicorn
    except OSError as error:  # two servers can bind an address on which none listens yet
        raise _not_available(host, port, error) from None
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def stop(*_) -> None:
        server.should_exit = True

    # uvicorn has handlers of its own while it runs, and raises the signal again after the shutdown. Python drops a
    # KeyboardInterrupt that is raised in a finalizer.
    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        print(f"{printable(classifier.name)}: {address}/predict (API: {address}/docs; Ctrl-C stops it)", flush=True)
        server.run(sockets=[bound])
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if not server.started:
        sys.exit(1)
