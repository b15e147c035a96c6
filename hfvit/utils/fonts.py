"""Fonts for class names that matplotlib's default font does not have."""

import logging
import unicodedata
import warnings
from collections.abc import Iterable
from functools import cache

from matplotlib import font_manager, get_data_path, rcParams, style
from matplotlib.ft2font import FT2Font

from hfvit.errors import printable

logger = logging.getLogger(__name__)


def families(texts: Iterable[str]) -> list[str]:
    """Return font families for the characters of some texts, default first.

    Matplotlib takes each character from the first family that has it.
    """
    return [_default_family(), *_fallbacks(frozenset("".join(texts)))]


def drawable(text: str) -> str:
    """Replace characters that no installed font has.

    An emoji is replaced by its name, another character by its code point.
    """
    return "".join(character if _has_glyph(character) else _spelled(character) for character in text)


@cache
def _default_family() -> str:
    with style.context({}, after_reset=True):
        return font_manager.FontProperties(family=rcParams["font.family"]).get_name()


@cache
def _fallbacks(characters: frozenset[str]) -> tuple[str, ...]:
    found = dict.fromkeys(filter(None, map(_family_of, sorted(characters))))
    missing = sorted(filter(lambda character: not _has_glyph(character), characters))
    if missing:
        _report_missing("".join(missing))
    return tuple(name for name in found if name != _default_family())


@cache
def _report_missing(characters: str) -> None:
    shown = " ".join(characters[:8]) + (" ..." if len(characters) > 8 else "")
    logger.warning(
        "Figures: no installed font has %s, which are spelled out. report.html shows them; for other figures, install"
        " a font such as Noto Sans CJK.",
        shown,
    )


def _has_glyph(character: str) -> bool:
    is_escaped = printable(character) != character
    return is_escaped or _is_invisible(character) or _family_of(character) is not None


def _is_invisible(character: str) -> bool:
    """Return whether a character joins or varies others.

    U+FE0F and U+200D do so in emoji.
    """
    return unicodedata.category(character) == "Cf" or "\ufe00" <= character <= "\ufe0f"


@cache
def _family_of(character: str) -> str | None:
    """Return the first font family that has a character, the default one first."""
    if _covers(font_manager.findfont(_default_family()), character):
        return _default_family()
    for font in font_manager.fontManager.ttflist:
        is_plain = font.style == "normal" and font.weight in (400, "normal") and "Color" not in font.name
        # Matplotlib cannot draw the bitmaps of colored emoji. Its own other fonts are for formulas, or of boxes.
        if is_plain and not font.fname.startswith(get_data_path()) and _covers(font.fname, character):
            return font.name
    return None


def _covers(file: str, character: str) -> bool:
    return ord(character) in _characters(file)


@cache
def _characters(file: str) -> frozenset[int]:
    """Return the code points of a font, none if it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return frozenset(FT2Font(file).get_charmap())
    except (OSError, RuntimeError, ValueError):
        return frozenset()


def _spelled(character: str) -> str:
    if unicodedata.category(character) == "So":
        name = unicodedata.name(character, "").lower().replace(" ", "_")
        if name:
            return f":{name}:"
    return f"U+{ord(character):04X}"
