"""Types of command-line options: a value out of range is told by argparse, in words, before anything is loaded."""

import argparse
import math


def above_0(text: str) -> int:
    """A whole number, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
    return int(text)


def from_0(text: str) -> int:
    """A whole number, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 0 on")
    return int(text)


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = _number(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is no share from 0 to 1; 99 % is 0.99")
    return value


def points(text: str) -> float:
    """Points of accuracy, 0 to 100."""
    value = _number(text)
    if not 0.0 <= value <= 100.0:
        raise argparse.ArgumentTypeError(f"{text} is no number of points from 0 to 100; half a percent is 0.5")
    return value


def not_negative(text: str) -> float:
    """A finite number, 0 or more."""
    value = _number(text)
    if not (math.isfinite(value) and value >= 0.0):
        raise argparse.ArgumentTypeError(f"{text} is no number from 0 on")
    return value


def _number(text: str) -> float:
    """NaN, which every comparison refuses, for what is no number."""
    try:
        return float(text)
    except ValueError:
        return math.nan
