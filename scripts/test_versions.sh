#!/usr/bin/env bash
# Run the tests on the lowest and on the highest versions that pyproject.toml allows.
#
#   scripts/test_versions.sh [lowest|highest|both] [pytest arguments]
#
# PYTHON_LOWEST and PYTHON_HIGHEST name the interpreters (python3.11, python3.13). Environments are made under VERSIONS_DIR
# (.versions), 7 GB each, and kept: delete the folder to make them again.
set -euo pipefail
cd "$(dirname "$0")/.."

which=${1:-both}
shift || true
root=${VERSIONS_DIR:-.versions}
export HF_HOME="$PWD/$root/hf"

test_on() { # NAME PYTHON RESOLUTION [pytest arguments]
    local name=$1 python=$2 resolution=$3
    shift 3
    if [ ! -x "$root/$name/bin/python" ]; then
        "$root/uv/bin/uv" venv --quiet --seed --python "$python" "$root/$name"
        "$root/uv/bin/uv" pip install --quiet --python "$root/$name" --resolution "$resolution" -e ".[dev]"
    fi
    "$root/$name/bin/python" --version
    "$root/uv/bin/uv" pip freeze --quiet --python "$root/$name" > "$root/$name.txt"
    "$root/$name/bin/python" -m pytest "$@"
}

mkdir -p "$root"
[ -x "$root/uv/bin/uv" ] || { python3 -m venv "$root/uv" && "$root/uv/bin/pip" install --quiet uv; }
case $which in
    lowest) test_on lowest "${PYTHON_LOWEST:-python3.11}" lowest-direct "$@" ;;
    highest) test_on highest "${PYTHON_HIGHEST:-python3.13}" highest "$@" ;;
    both)
        status=0
        bash scripts/test_versions.sh lowest "$@" || status=$?
        bash scripts/test_versions.sh highest "$@" || status=$?
        exit "$status"
        ;;
    *) echo "usage: $0 [lowest|highest|both] [pytest arguments]" >&2; exit 2 ;;
esac
