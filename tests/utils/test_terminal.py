"""Escaping of hostile text for terminals."""

import io
import json
import os
import sys

import pytest
from helpers.hostile_text import HOSTILE
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hfvit.errors import DataError, is_unprintable, printable, run
from hfvit.utils.terminal import encoding_of, prepare_streams, printable_json

MANY = settings(max_examples=500, deadline=None, derandomize=True, database=None)
# Include surrogates, which hypothesis omits by default, and more rare characters.
HOSTILE_TEXT = st.one_of(
    st.text(st.characters(codec=None, categories=None)),
    st.text(st.sampled_from("a\x00\x07\x1b\x7f\x85\x9b\n\r\t\u2028\u2029\u202e\u200d\u2066\ud800\udcff\U0001f600é\\")),
    st.sampled_from(HOSTILE),
)
ENCODINGS = st.sampled_from(["utf-8", "latin-1", "ascii", "cp1252", "utf-16"])


@MANY
@given(HOSTILE_TEXT)
@example("\x1b]0;owned\x07\x1b[2J")
def test_printable_returns_one_line_without_control_characters(text):
    shown = printable(text)
    assert not any(is_unprintable(character) for character in shown)
    assert len(shown.splitlines()) <= 1
    shown.encode("utf-8")
    assert printable(shown) == shown


@pytest.mark.parametrize("text", ["red", "été", "\U0001f600", "日本 語", "\u05d0\u200c\u05d1", "C:\\new\\x1b"])
def test_printable_keeps_words(text):
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J", r"\x1b[2J"),
        ("a\n  99.99%  b", r"a\n  99.99%  b"),
        ("\x9b1m", r"\x9b1m"),
        ("\u202egnp.a", r"\u202egnp.a"),
        (os.fsdecode(b"\xff.png"), r"\xff.png"),
        ("\ud83d", r"\ud83d"),
        ("\U000e0001", r"\U000e0001"),
    ],
)
def test_printable_shows_escapes(text, shown):
    assert printable(text) == shown


def joined(text: str) -> str:
    """Join surrogate pairs, as JSON does."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


@MANY
@given(HOSTILE_TEXT, HOSTILE_TEXT, ENCODINGS)
def test_printable_json_has_the_same_value(key, value, encoding):
    line = printable_json(json.dumps({key: value}, ensure_ascii=False), encoding)
    [(read_key, read_value)] = json.loads(line).items()
    assert (read_key, read_value) == (joined(key), joined(value))
    assert not any(is_unprintable(character) for character in line)
    assert line.encode(encoding).decode(encoding) == line


def test_printable_json_keeps_characters_of_the_encoding():
    text = json.dumps({"é": "\U0001f600"}, ensure_ascii=False)
    assert printable_json(text) == text
    assert printable_json(text, "latin-1") == '{"é": "\\ud83d\\ude00"}'
    assert printable_json(text, "ascii") == '{"\\u00e9": "\\ud83d\\ude00"}'


def stream_of(encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict", write_through=True)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_prepare_streams_accept_any_text(encoding, monkeypatch):
    monkeypatch.setattr(sys, "stdout", stream_of(encoding))
    monkeypatch.setattr(sys, "stderr", stream_of(encoding))
    prepare_streams()
    for stream in (sys.stdout, sys.stderr):
        stream.write("é\U0001f600\udcff")
        assert stream.buffer.getvalue().decode(encoding).endswith("\\udcff")
    assert encoding_of(sys.stdout) == encoding


def test_prepare_streams_opens_closed_streams(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    prepare_streams()
    try:
        print("nowhere")
        print("nowhere", file=sys.stderr)
        assert sys.stdin.read() == ""
    finally:
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            stream.close()
    assert encoding_of(None) == "utf-8"


def fail(error: Exception):
    raise error


@MANY
@given(HOSTILE_TEXT)
def test_run_prints_messages_without_control_characters(text):
    with io.StringIO() as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        assert run(lambda: fail(DataError(f"x{text}"))) == DataError.exit_code
        shown = stream.getvalue()
    assert not any(is_unprintable(character) for character in shown.replace("\n", ""))


def test_run_of_too_long_name_prints_one_error(capsys):
    assert run(lambda: os.stat("x" * 5000)) == 2
    assert capsys.readouterr().err.startswith("hfvit: error: File name too long (xxx")
