"""Join a wheel from its parts and install it, when all parts have been copied.

python join_wheel.py WHOLE_JSON FOLDER

WHOLE_JSON has the wheel's `name`, its number of `parts` and its `sha256`. FOLDER has `part-01`, `part-02`, ...; the
wheel is installed to FOLDER/site, and then FOLDER/done is created.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

PIP = ("-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile")


def main(description: Path, folder: Path) -> None:
    whole = json.loads(description.read_text())
    parts = sorted(folder.glob("part-*"))
    print(f"RESULT {len(parts)} of {whole['parts']} parts of {whole['name']}")
    if len(parts) < whole["parts"]:
        return
    content = b"".join(part.read_bytes() for part in parts)
    if hashlib.sha256(content).hexdigest() != whole["sha256"]:
        sys.exit(f"{folder}: the parts do not make {whole['name']} (SHA-256 differs). Copy them again.")
    wheel = folder / whole["name"]
    wheel.write_bytes(content)
    subprocess.run([sys.executable, *PIP, "--target", str(folder / "site"), str(wheel)], check=True)
    (folder / "done").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
