"""Put a wheel together from its parts and install it, once all parts are there.

python join_wheel.py WHOLE_JSON FOLDER

WHOLE_JSON holds the wheel's `name`, the number of `parts` and the `sha256` of the whole. FOLDER holds `part-01`,
`part-02`, ...; the wheel is installed to FOLDER/site, and FOLDER/done says so.
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
