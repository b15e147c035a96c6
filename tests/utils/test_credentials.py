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
    ],
)
def test_mask_credentials(text, masked, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "planted-secret")
    monkeypatch.setenv("OTHER_TOKEN", "words")  # too short to be one
    assert mask_credentials(text) == masked
    assert mask_values({"a": [text, 1, None], "b": {"c": text}}) == {"a": [masked, 1, None], "b": {"c": masked}}


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
