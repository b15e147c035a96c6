"""Download a URL into memory, with limits on bytes, time, redirects and addresses."""

import http.client
import ipaddress
import socket
import ssl
import string
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import quote, urljoin, urlsplit, urlunsplit
from urllib.request import (
    HTTPHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    UnknownHandler,
)

import hfvit
from hfvit.errors import DataError, one_line

SCHEMES = ("http", "https")
REDIRECTS = (301, 302, 303, 307, 308)
CHUNK = 64 * 1024
NAT64 = ipaddress.ip_network("64:ff9b::/96")
# All public IPv6 addresses; the rest has forms that embed IPv4 addresses, and networks that Python calls global.
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
AZURE_HOST = ipaddress.ip_address("168.63.129.16")  # the host of a virtual machine, under a public address


@dataclass(frozen=True)
class UrlLimits:
    """Limits of a download.

    Args:
        max_bytes: maximum size of the body.
        max_seconds: maximum duration, redirects included; name resolution has the resolver's limit.
        max_redirects: maximum number of redirects, to http or https URLs.
        allow_private_addresses: whether private networks and this machine are allowed. Servers should set it to False:
            each address is then checked when connecting, also after redirects, and proxies are not used.
    """

    max_bytes: int = 64 * 2**20
    max_seconds: float = 60.0
    max_redirects: int = 5
    allow_private_addresses: bool = True


DEFAULT_URL_LIMITS = UrlLimits()


def read_url(url: str, limits: UrlLimits = DEFAULT_URL_LIMITS) -> bytes:
    """Download the body of an http or https URL.

    Raises:
        DataError: the download fails, or exceeds the limits.
    """
    download = _Download(limits)
    try:
        return download.read(url)
    except Exception as error:
        reason = download.error_reason(error)
    finally:
        download.close()
    raise DataError(f"{url}: cannot be downloaded: {reason}.")


def is_public_address(address: str) -> bool:
    """Return whether an IP address is public, also if it embeds another address."""
    ip = ipaddress.ip_address(address)
    embedded = None
    if ip.version == 6:
        embedded = ip.ipv4_mapped or ip.sixtofour
        if ip in NAT64:
            embedded = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    if embedded is not None:
        return is_public_address(str(embedded))
    if ip.version == 6 and ip not in GLOBAL_UNICAST:
        return False
    return ip.is_global and not ip.is_multicast and ip != AZURE_HOST


class _LimitError(ValueError):
    """Report an exceeded limit or an invalid response."""


class _Download:
    """Run one download with its deadline, opener and sockets."""

    def __init__(self, limits: UrlLimits):
        self.limits = limits
        self.end = time.monotonic() + limits.max_seconds
        self.sockets: list[socket.socket] = []
        self.timer = threading.Timer(limits.max_seconds, self._shut_down)
        self.timer.daemon = True
        self.timer.start()
        self.opener = OpenerDirector()  # without file:, ftp: and redirect handlers
        proxies = None if limits.allow_private_addresses else {}
        for handler in (ProxyHandler(proxies), UnknownHandler(), _Http(self._connect), _Https(self._connect)):
            self.opener.add_handler(handler)

    def read(self, url: str) -> bytes:
        """Return the body of a URL, following redirects."""
        for _ in range(self.limits.max_redirects + 1):
            # Some servers reject urllib's user agent.
            request = Request(_encoded(url), headers={"User-Agent": f"hfvit/{hfvit.__version__}"})
            with self.opener.open(request, timeout=self._left()) as response:
                target = response.headers.get("Location")
                if response.status not in REDIRECTS or target is None:
                    return self._body(response)
            url = urljoin(url, quote(target, safe=string.punctuation, encoding="latin-1"))
            if urlsplit(url).scheme not in SCHEMES:
                raise _LimitError(f"redirected to {url[:200]}, which is neither http nor https")
        raise _LimitError(f"more than {self.limits.max_redirects} redirects")

    def error_reason(self, error: Exception) -> str:
        """Describe an error of `read`; any error after the deadline is a timeout."""
        if time.monotonic() >= self.end or isinstance(error, TimeoutError):
            return f"not complete within {self.limits.max_seconds:g} seconds"
        if isinstance(error, _LimitError):
            return str(error)
        cause = getattr(error, "reason", error)  # urllib wraps what a connection raises
        if isinstance(cause, _LimitError):
            return str(cause)
        return one_line(f"{type(error).__name__}: {cause}")

    def close(self) -> None:
        """Cancel the deadline and close all sockets."""
        self.timer.cancel()
        for opened in self.sockets:
            opened.close()

    def _body(self, response: http.client.HTTPResponse) -> bytes:
        if response.status != 200:
            raise _LimitError(f"the server responded with {response.status} {one_line(response.reason)[:200]}")
        announced = response.length
        if announced is not None and announced > self.limits.max_bytes:
            raise _LimitError(f"{announced:,} bytes are more than the limit of {self.limits.max_bytes:,}")
        chunks = []
        size = 0
        while chunk := response.read(CHUNK):
            size += len(chunk)
            if size > self.limits.max_bytes:
                raise _LimitError(f"the body has more than the limit of {self.limits.max_bytes:,} bytes")
            chunks.append(chunk)
        self._left()
        if announced is not None and size < announced:
            raise _LimitError(f"the connection was closed after {size:,} of {announced:,} bytes")
        return b"".join(chunks)

    def _left(self) -> float:
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def _connect(self, address: tuple[str, int], *_) -> socket.socket:
        """Connect to the first allowed address of a host that accepts the connection."""
        error: Exception | None = None
        for family, kind, protocol, _, where in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
            if not self.limits.allow_private_addresses and not is_public_address(where[0]):
                error = _LimitError(f"{where[0]} is not an address of the public internet")
                continue
            connection = socket.socket(family, kind, protocol)
            try:
                connection.settimeout(self._left())
                connection.connect(where)
            except OSError as failure:
                connection.close()
                error = failure
                continue
            # TLS takes over the socket, so that the deadline needs a second handle.
            self.sockets.append(connection.dup())
            return connection
        raise error or OSError(f"{address[0]} has no address")

    def _shut_down(self) -> None:
        # A socket's timeout applies to each read, so that a slow server never reaches it.
        for opened in list(self.sockets):
            with suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)


def _encoded(url: str) -> str:
    """Percent-encode path and query of a URL; `http.client` encodes the host."""
    parts = urlsplit(url)
    path, query = (quote(part, safe=string.punctuation) for part in (parts.path, parts.query))
    return urlunsplit(parts._replace(path=path, query=query))


Connect = Callable[..., socket.socket]


def _connection_type(base: type[http.client.HTTPConnection], connect: Connect) -> Callable:
    def make(host: str, **options) -> http.client.HTTPConnection:
        connection = base(host, **options)
        # "Stored as an instance variable to allow unit tests to replace" (http/client.py, CPython 3.5 to 3.14).
        connection._create_connection = connect
        return connection

    return make


class _Http(HTTPHandler):
    """Open http URLs with a custom connect function."""

    def __init__(self, connect: Connect):
        super().__init__()
        self.connection_type = _connection_type(http.client.HTTPConnection, connect)

    def http_open(self, request: Request) -> http.client.HTTPResponse:
        return self.do_open(self.connection_type, request)


class _Https(HTTPSHandler):
    """Open https URLs with a custom connect function."""

    def __init__(self, connect: Connect):
        super().__init__()
        self.connection_type = _connection_type(http.client.HTTPSConnection, connect)

    def https_open(self, request: Request) -> http.client.HTTPResponse:
        return self.do_open(self.connection_type, request, context=ssl.create_default_context())
