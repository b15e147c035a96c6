"""Record the outcome of a pytest run from its JUnit XML file.

python junit.py XML_FILE
"""

import sys
from pathlib import Path
from xml.etree import ElementTree

from kit import record


def summarize(file: Path) -> dict:
    """Return counts, seconds, messages of failed tests, and reasons of the first skipped tests."""
    suite = next(ElementTree.parse(file).getroot().iter("testsuite"))
    failed = {}
    skipped = []
    for case in suite.iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        for outcome in case:
            message = outcome.get("message", "")
            if outcome.tag in ("failure", "error"):
                failed[name] = message[:300]
            elif outcome.tag == "skipped":
                skipped.append(f"{name}: {message[:80]}")
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    return {**counts, "seconds": float(suite.get("time", 0)), "failed": failed, "skipped_tests": skipped[:30]}


def main(file: Path) -> None:
    summary = summarize(file)
    record("tests", **summary)
    for name, message in summary["failed"].items():
        print("RESULT", name, "|", " ".join(message[:150].split()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
