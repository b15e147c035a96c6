"""Tokens and passwords in texts."""

import logging
import sys

import pytest

from hfvit.errors import mask_credentials
from hfvit.utils.credentials import mask_values
from hfvit.utils.terminal import PrintableFormatter, print_traceback

HUB_TOKEN = "hf_" + "a1B2" * 8


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        (f"--hub_token {HUB_TOKEN}!", "--hub_token ***!"),
        ("https://user:pass@host/a?b=c", "https://***@host/a?b=c"),
        ("at 's3://key:sec/ret@bucket'", "at 's3://key:sec/ret@bucket'"),
        ("ssh://git@host and http://a@b", "ssh://***@host and http://***@b"),
        ("a@b.c, https://host/@x, hf_transfer", "a@b.c, https://host/@x, hf_transfer"),
        ("key planted-secret in words", "key *** in words"),
        ("key other-planted in words", "key *** in words"),
        ("http://user:p@ss@host/a and http://user:pa'ss@host/a", "http://***@host/a and http://***@host/a"),
        ("http://host/a?b=c@d", "http://host/a?b=c@d"),
        ("token hf_oauth_eyJhbGciOi.eyJz-dWI_.x, hf_oauth_flow", "token ***, hf_oauth_flow"),
        ("https://a/b?X-Amz-Date=1&X-Amz-Signature=0af: no", "https://a/b?X-Amz-Date=1&X-Amz-Signature=***: no"),
        ("('https://a/b?sv=1&sig=x%2Fy%3D#z')", "('https://a/b?sv=1&sig=***#z')"),
        ("https://a/b?access_token=x&tokens=2&design=3", "https://a/b?access_token=***&tokens=2&design=3"),
        ("https://a/b?X-Goog-Credential=x&Signature=y", "https://a/b?X-Goog-Credential=***&Signature=***"),
        ("https://a/b?x-amz-security-token=x&apikey=y", "https://a/b?x-amz-security-token=***&apikey=***"),
        ("https://a/b?api_key=x&password=y&secret=z", "https://a/b?api_key=***&password=***&secret=***"),
    ],
)
def test_mask_credentials(text, masked, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "planted-secret")
    monkeypatch.setenv("SOME_SECRET_KEY", "other-planted")
    monkeypatch.setenv("OTHER_TOKEN", "words")  # too short to be one
    assert mask_credentials(text) == masked
    assert mask_values({"a": [text, 1, None], "b": {"c": text}}) == {"a": [masked, 1, None], "b": {"c": masked}}


@pytest.mark.parametrize(
    "name", ["AWS_SECRET_ACCESS_KEY", "AZURE_STORAGE_KEY", "CLIENT_SECRET", "DB_PASSWORD", "DB_PASSWD", "PASSPHRASE"]
)
def test_values_of_secret_variables_are_masked(name, monkeypatch):
    monkeypatch.setenv(name, "planted-value")
    monkeypatch.setenv("KEYBOARD", "other-value")
    assert mask_credentials("planted-value, other-value") == "***, other-value"


def test_log_records_and_tracebacks_are_masked(capsys):
    record = logging.LogRecord("x", logging.INFO, "", 0, "read %s\x1b[2J", (f"https://u:{HUB_TOKEN}@h",), None)
    assert PrintableFormatter("%(message)s").format(record) == "read https://***@h\\x1b[2J"
    try:
        raise ValueError(f"no access with {HUB_TOKEN}")
    except ValueError as error:
        print_traceback(type(error), error, error.__traceback__)
    err = capsys.readouterr().err
    assert "no access with ***" in err
    assert HUB_TOKEN not in err.replace(f'HUB_TOKEN = "{HUB_TOKEN}"', "")
    assert sys.exc_info()[0] is None
