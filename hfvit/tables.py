"""Text tables for the terminal."""


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """One line a row, each column as wide as its widest cell."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
