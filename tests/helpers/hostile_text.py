"""Names with control characters that act on a terminal or page."""

HOSTILE = [
    "\x1b]0;owned\x07\x1b[2Jcat",
    "\x9b2J",
    "b\n  99.99%  fake",
    "a\rb",
    "\x85next",
    "\u2028line",
    "\u202egnp.exe",
    "\ud800",
    "\udcff.png",
    "\U0001f600",
    "été",
    "\x00",
    "$x^2$",
    "n" * 240,
]
