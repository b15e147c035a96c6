"""Plain-text tables, durations and sizes."""

from collections.abc import Sequence

from hfvit.errors import printable


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align cells, escaped for a terminal, in columns; returns one line per row."""
    from rich.cells import cell_len, set_cell_size  # two columns for a Chinese, Japanese or Korean character

    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(cell_len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(set_cell_size(*cell) for cell in zip(row, widths, strict=True)).rstrip() for row in rows]


def duration(seconds: float) -> str:
    """Format seconds in hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def size(number: int) -> str:
    """Format a number of bytes with decimal units."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return f"{number} B"


def counted(number: float, word: str, plural: str | None = None) -> str:
    """Format a number of things: `1 image`, `2,000 images`, `1.5 epochs`.

    Args:
        number: their number; a fraction is rounded to four digits.
        word: name of one thing.
        plural: name of several. Default: `word` with an s.
    """
    text = f"{number:,}" if isinstance(number, int) else f"{number:.4g}"
    return f"{text} {word if number == 1 else plural or word + 's'}"


def shortened(names: Sequence[str], most: int = 8) -> str:
    """Join the first names, with `...` if there are more.

    Args:
        names: names to join.
        most: largest number of names.
    """
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
