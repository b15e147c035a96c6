"""Chromium with a loopback server; other requests are blocked and recorded."""

import shutil
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

LOAD_MS = 30_000


class _Handler(SimpleHTTPRequestHandler):
    headers_sent: tuple[tuple[str, str], ...] = ()

    def end_headers(self):
        for name, value in self.headers_sent:
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, *_):
        pass


@contextmanager
def served(folder: Path, headers: tuple[tuple[str, str], ...] = ()):
    """Serve a folder on a free loopback port and yield its URL."""
    handler = type("Handler", (_Handler,), {"headers_sent": headers})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def chromium():
    """Start a headless Chromium; skip the test if it is not installed."""
    playwright = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium on PATH")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-dev-shm-usage"])
        try:
            yield browser
        finally:
            browser.close()


class Visit:
    """Open a page, and record its errors and its requests to other hosts.

    Args:
        browser: browser of `chromium`.
        address: URL of the page.
        answers: maps the URL of a request to another host to a file to answer with; None blocks the request.
        **context: arguments of Playwright's `new_context`.

    Attributes:
        elsewhere: requested URLs on other hosts.
        errors: error messages of the page.
    """

    def __init__(self, browser, address: str, answers=None, **context):
        self.elsewhere = []
        self.errors = []
        self.context = browser.new_context(**context)
        self.page = self.context.new_page()
        self.page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

        def decide(route):
            url = route.request.url
            if url.startswith((address, "blob:", "data:")):
                return route.continue_()
            self.elsewhere.append(url)
            if answers and (file := answers(url)):
                return route.fulfill(path=file, headers={"access-control-allow-origin": "*", **_CDN_HEADERS})
            return route.abort()

        self.context.route("**/*", decide)
        self.page.goto(address)

    def wait(self, *states: str) -> str:
        """Wait until the page is in one of the states, and return its status text."""
        # The content security policy forbids eval, which wait_for_function uses.
        self.page.wait_for_selector(",".join(f"body[data-state={state}]" for state in states), timeout=LOAD_MS)
        return self.page.inner_text("#status")

    def bars(self) -> dict[str, float]:
        """Return the classes shown and their probabilities."""
        rows = self.page.eval_on_selector_all(
            "#results li",
            "rows => rows.map(row => [row.querySelector('.name').textContent, +row.dataset.probability])",
        )
        return dict(rows)

    def choose(self, image: Path) -> str:
        """Choose a file, and return the status text."""
        self.page.set_input_files("#file", str(image))
        return self.wait("answered", "refused", "failed")

    def drop(self, image: Path) -> str:
        """Drop a file on the page, and return the status text."""
        transfer = self.page.evaluate_handle(
            """([name, bytes]) => {
                const transfer = new DataTransfer();
                transfer.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
                return transfer;
            }""",
            [image.name, list(image.read_bytes())],
        )
        self.page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})
        return self.wait("answered", "refused", "failed")

    def press_example(self) -> str:
        """Press the first example with the keyboard, and return the status text."""
        self.page.evaluate("document.querySelector('#results').replaceChildren()")
        self.page.focus("#examples button")
        self.page.keyboard.press("Enter")
        self.page.wait_for_selector("#results li", timeout=LOAD_MS)
        return self.wait("answered")

    def close(self):
        self.context.close()


_CDN_HEADERS = {"cross-origin-resource-policy": "cross-origin"}
