#!/usr/bin/env bash
# Run the common model and pipeline tests of transformers on hfvit's models and on the stock class.
#
#   scripts/peer_suites.sh [WORK_FOLDER] [FAMILY ...]     default: all families of scripts/peer_suites/test_models.py
#
# Downloads the source distribution of the installed transformers (its wheel has no tests) into WORK_FOLDER, and
# prints a table of passed, skipped and failed tests. PEER_RUNNER is a command to prefix each pytest with.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python}
work=${1:-$(mktemp -d)}
shift || true
families=("$@")
if [ ${#families[@]} -eq 0 ]; then
  families=(vit beit eva02 swin convnext resnet mobilenetv3 volo image_text)
fi

version=$("$python" -c 'import transformers; print(transformers.__version__)')
if [ ! -d "$work/tests" ]; then
  mkdir -p "$work"
  "$python" -m pip download -q --no-binary transformers --no-deps -d "$work" "transformers==$version"
  tar xzf "$work/transformers-$version.tar.gz" -C "$work" --strip-components=1 "transformers-$version/tests"
fi

if [ ! -d "$work/packages" ]; then
  "$python" -m pip install -q --no-deps --target "$work/packages" parameterized  # imported by the tests
fi

export HF_HUB_OFFLINE=1 PEER_WORK=$work PYTHONPATH="$work:$work/packages:$(dirname "$here")${PYTHONPATH:+:$PYTHONPATH}"
for family in "${families[@]}"; do
  PEER_FAMILY=$family ${PEER_RUNNER:-} "$python" -m pytest -q -c /dev/null --rootdir "$work" -p no:cacheprovider \
    --no-header --tb=short --junitxml "$work/$family.xml" "$here/peer_suites/test_models.py" >"$work/$family.log" 2>&1 || true
  echo "$family: $(tail -1 "$work/$family.log")" >&2
done
"$python" "$here/peer_suites/table.py" "$version" "${families[@]/#/$work/}"
