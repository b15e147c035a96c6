"""Downloads within limits of bytes, time, redirects and addresses."""

import os
import ssl
import subprocess
import time
import tracemalloc

import pytest
from helpers.raw_server import raw_server, response

from hfvit.errors import DataError
from hfvit.utils.download import UrlLimits, is_public_address, read_url

BODY = os.urandom(200_000)


def sends(content: bytes):
    return lambda connection, path: connection.sendall(content)


def drips(head: bytes):
    """Send `head`, then a byte every 50 ms."""

    def answer(connection, path):
        connection.sendall(head)
        while True:
            connection.sendall(b"x")
            time.sleep(0.05)

    return answer


def silence(connection, path):
    """Send nothing for 5 seconds."""
    time.sleep(5)


@pytest.mark.parametrize("headers", [{}, {"Content_Length": None}])
def test_read_url_returns_the_body(headers):
    with raw_server(sends(response(BODY, **headers))) as server:
        assert read_url(f"{server.url}/a%20b?c=d") == BODY
    assert server.requests == ["/a%20b?c=d"]


def test_read_url_returns_a_chunked_body():
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (BODY[:70_000], BODY[70_000:], b""))
    head = response(Content_Length=None, Transfer_Encoding="chunked")
    with raw_server(sends(head + chunks)) as server:
        assert read_url(server.url) == BODY


def test_read_url_encodes_letters_and_spaces():
    with raw_server(sends(response(b"1"))) as server:
        assert read_url(f"{server.url}/été 1.png") == b"1"
    assert server.requests == ["/%C3%A9t%C3%A9%201.png"]


@pytest.mark.parametrize(
    "answer",
    [
        silence,
        drips(b""),
        drips(b"HTTP/1.1 200 OK\r\nX: "),
        drips(b"HTTP/1.1 100 Continue\r\nX: "),
        drips(response(Content_Length=10_000)),
        drips(response(Content_Length=None)),
        drips(response(Content_Length=None, Transfer_Encoding="chunked") + b"ffff\r\n"),
    ],
    ids=["silence", "status line", "header", "interim header", "body", "body without length", "chunk"],
)
def test_read_url_of_a_slow_server_ends_in_time(answer):
    with raw_server(answer) as server:
        start = time.monotonic()
        with pytest.raises(DataError, match=r"within 0\.5 seconds"):
            read_url(server.url, UrlLimits(max_seconds=0.5))
        assert time.monotonic() - start < 3


def test_read_url_counts_all_redirects_in_its_time():
    def answer(connection, path):
        time.sleep(0.3)
        connection.sendall(response(status="302 Found", Location=f"/{len(path)}{path[1:]}"))

    with raw_server(answer) as server, pytest.raises(DataError, match=r"within 1 seconds"):
        read_url(server.url, UrlLimits(max_seconds=1, max_redirects=100))


@pytest.mark.parametrize("length", [None, 10**6, 10**15, -1])
def test_read_url_of_endless_body_raises(length):
    def answer(connection, path):
        connection.sendall(response(Content_Length=length))
        while True:
            connection.sendall(bytes(1 << 16))

    tracemalloc.start()
    try:
        with raw_server(answer) as server, pytest.raises(DataError, match=r"limit of 500,000"):
            read_url(server.url, UrlLimits(max_bytes=500_000))
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_read_url_of_truncated_body_raises():
    with raw_server(sends(response(b"12345", Content_Length=10))) as server, pytest.raises(DataError, match="5 of 10"):
        read_url(server.url)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_read_url_follows_redirects(status):
    def answer(connection, path):
        first = path == "/first/place"
        moved = response(b"moved", status=f"{status} Moved", Location="../second")
        connection.sendall(moved if first else response(BODY))

    with raw_server(answer) as server:
        assert read_url(f"{server.url}/first/place") == BODY
    assert server.requests == ["/first/place", "/second"]


def test_read_url_of_redirect_loop_raises():
    loop = response(status="302 Found", Location="/again")
    with raw_server(sends(loop)) as server, pytest.raises(DataError, match=r"more than 3 redirects"):
        read_url(server.url, UrlLimits(max_redirects=3))
    assert len(server.requests) == 4


def test_read_url_never_reads_the_body_of_a_redirect():
    def answer(connection, path):
        connection.sendall(response(status="302 Found", Location="/", Content_Length=10**12))
        while True:
            connection.sendall(bytes(1 << 16))

    with raw_server(answer) as server, pytest.raises(DataError, match=r"more than 5 redirects"):
        read_url(server.url)


@pytest.mark.parametrize("target", ["file:///etc/hostname", "ftp://127.0.0.1/x", "data:,x", "gopher://x", "FILE:/x"])
def test_read_url_of_redirect_to_other_scheme_raises(target):
    redirect = response(status="302 Found", Location=target)
    with raw_server(sends(redirect)) as server, pytest.raises(DataError, match="neither http nor https"):
        read_url(server.url)


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://127.0.0.1/x", "data:,x", "http://", "http://[", "x"])
def test_read_url_of_other_scheme_raises(url):
    with pytest.raises(DataError, match="cannot be downloaded"):
        read_url(url)


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified", "404 Not Found", "500 \x1b[2J"])
def test_read_url_names_the_status(status):
    with raw_server(sends(response(status=status))) as server, pytest.raises(DataError, match=status[:3]):
        read_url(server.url)


@pytest.mark.parametrize(
    "content", [b"", b"\r\n\r\n", b"\x00" * 100_000, b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 10_000]
)
def test_read_url_of_invalid_response_raises(content):
    with raw_server(sends(content)) as server, pytest.raises(DataError, match="cannot be downloaded"):
        read_url(server.url)


PUBLIC_ONLY = UrlLimits(allow_private_addresses=False, max_seconds=5)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0x7f.1", "2130706433", "[::ffff:127.0.0.1]", "0.0.0.0"])
def test_read_url_without_private_addresses_connects_to_none(host):
    refused = pytest.raises(DataError, match="not an address of the public internet")
    with raw_server(sends(response(b"secret"))) as server, refused:
        read_url(f"http://{host}:{server.port}/", PUBLIC_ONLY)
    assert server.requests == []


def test_read_url_without_private_addresses_uses_no_proxy(monkeypatch):
    with raw_server(sends(response(b"secret"))) as server:
        monkeypatch.setenv("http_proxy", server.url)
        assert read_url("http://10.0.0.1/") == b"secret"
        # A proxy with a public address would connect to any address.
        monkeypatch.setattr("hfvit.utils.download.is_public_address", lambda address: address == "127.0.0.1")
        with pytest.raises(DataError, match=r"10\.0\.0\.1 is not an address of the public internet"):
            read_url("http://10.0.0.1/", PUBLIC_ONLY)
    assert server.requests == ["http://10.0.0.1/"]


def test_read_url_checks_the_address_of_each_redirect(monkeypatch):
    """Redirect from a public name, served by the loopback, to a private address."""
    monkeypatch.setattr("hfvit.utils.download.is_public_address", lambda address: address == "127.0.0.1")
    redirect = response(status="302 Found", Location="http://127.0.0.2:{port}/secret")
    with raw_server(sends(response(b"secret"))) as canary:
        redirect = redirect.replace(b"{port}", str(canary.port).encode())
        with raw_server(sends(redirect)) as server, pytest.raises(DataError, match=r"127\.0\.0\.2 is not an address"):
            read_url(server.url, PUBLIC_ONLY)
    assert len(server.requests) == 1
    assert canary.requests == []


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "255.255.255.255", "192.0.2.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1",
        "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:0:0:0:0:80ff:fffe",
        "::127.0.0.1", "::ffff:0:127.0.0.1", "64:ff9b:1::7f00:1", "fec0::1", "5f00::1", "168.63.129.16",
        "::ffff:168.63.129.16",
    ],
)  # fmt: skip
def test_is_public_address_of_private_addresses_is_false(address):
    assert not is_public_address(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_is_public_address_of_public_addresses_is_true(address):
    assert is_public_address(address)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """Write a certificate of 127.0.0.1 and its key to one file."""
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    key = file.with_name("key.pem")
    words = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
    try:
        subprocess.run(["openssl", *words.split(), "-keyout", key, "-out", file], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs openssl")
    file.write_text(file.read_text() + key.read_text())
    return file


@pytest.fixture
def tls(certificate, monkeypatch):
    """Return the TLS context of a server that clients trust."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    return context


def test_read_url_over_tls_checks_certificate_and_address(tls, monkeypatch):
    with raw_server(sends(response(BODY)), tls) as server:
        assert read_url(server.url) == BODY
        with pytest.raises(DataError, match="not an address of the public internet"):
            read_url(server.url, PUBLIC_ONLY)
        monkeypatch.delenv("SSL_CERT_FILE")
        with pytest.raises(DataError, match="CERTIFICATE_VERIFY_FAILED"):
            read_url(server.url)
    assert len(server.requests) == 1


def test_read_url_of_a_dripping_server_over_tls_ends_in_time(tls):
    with raw_server(drips(response(Content_Length=10_000)), tls) as server:
        start = time.monotonic()
        with pytest.raises(DataError, match=r"within 1 seconds"):
            read_url(server.url, UrlLimits(max_seconds=1))
        assert time.monotonic() - start < 4
