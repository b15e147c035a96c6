"""Print the results of scripts/peer_suites.sh as a table.

Usage: `table.py VERSION WORK/FAMILY ...`.
"""

import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

# Tests that hfvit's models fail by design -> reason.
BY_DESIGN = {
    "test_model_weights_reload_no_missing_tied_weights": "a checkpoint without the backbone's weights is an error",
}
KINDS = {"hfvit": "HFViTTest", "stock": "StockTest"}


def read(file: Path) -> dict[str, dict[str, str]]:
    """Return the outcome of each test, by kind of model and name."""
    outcomes: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}
    for case in ElementTree.parse(file).iter("testcase"):
        kind = next((kind for kind, name in KINDS.items() if case.get("classname", "").endswith(name)), None)
        found = {child.tag for child in case}
        outcome = "failed" if found & {"failure", "error"} else "skipped" if "skipped" in found else "passed"
        if kind:
            outcomes[kind][case.get("name")] = outcome
    return outcomes


def main(version: str, *paths: str) -> int:
    """Print the table; return the number of tests that only hfvit fails."""
    print(f"transformers {version}\n")
    print("| family | class | passed | skipped | failed | by design |\n|---|---|--:|--:|--:|--:|")
    wrong: list[str] = []
    shared: set[str] = set()
    for path in map(Path, paths):
        outcomes = read(path.with_suffix(".xml"))
        for kind, tests in outcomes.items():
            count = Counter(tests.values())
            failed = sorted(name for name, outcome in tests.items() if outcome == "failed")
            excused = [name for name in failed if kind == "hfvit" and name in BY_DESIGN]
            print(
                f"| {path.name} | {kind} | {count['passed']} | {count['skipped']} | {len(failed) - len(excused)} |"
                f" {len(excused)} |"
            )
            of_stock = outcomes["stock"]
            if kind == "hfvit":
                shared |= {name for name in failed if of_stock.get(name) == "failed"}
                wrong += [f"{path.name}: {name}" for name in failed if name not in shared and name not in excused]
    print("\nBy design:", *(f"`{name}`: {reason}" for name, reason in BY_DESIGN.items()), sep="\n- ")
    print("\nFailed by the stock class, too:", *sorted(shared), sep="\n- ")
    print("\nFailed by hfvit only:", *(wrong or ["none"]), sep="\n- ")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(min(main(*sys.argv[1:]), 1))
