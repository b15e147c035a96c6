#!/usr/bin/env bash
# Measure hfvit on a CUDA machine: bash day.sh STEP ... (see README.md). Each step has a time limit and appends its
# results to $OUT/results.jsonl as it goes. Tables of all results come last.
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
bundle=$root/.gpu1

default_source=$root
[ -f "$bundle/hfvit.tar.gz" ] && default_source=/tmp/hfvit
export KIT_SOURCE=${KIT_SOURCE:-$default_source}
export KIT_DATA=${KIT_DATA:-/tmp/kit_data}
export KIT_WORK=${KIT_WORK:-/tmp/kit_work}
export OUT=${OUT:-/tmp/kit_out}
python=${KIT_PYTHON:-python3}
site=${KIT_SITE:-/tmp/site}
dinov2=${KIT_DINO:-$root/.gpu2/dinov2s}
ort=$KIT_WORK/ort
mkdir -p "$OUT" "$KIT_WORK"

export HF_HUB_OFFLINE=1 HF_HOME=$KIT_WORK/hf TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export PATH=$site/bin:$PATH
# Carried packages come before those of the machine.
export PYTHONPATH=$KIT_SOURCE:$KIT_SOURCE/benchmarks:$site
[ -f "$ort/done" ] && export PYTHONPATH=$KIT_SOURCE:$KIT_SOURCE/benchmarks:$ort/site:$site

# Seconds that a step may take: SECONDS_STEP=NAME:SECONDS,... or its default.
limit_of() {
  local own
  own=$(tr , '\n' <<<"${SECONDS_STEP:-}" | sed -n "s/^$1://p")
  if [ -n "$own" ]; then
    echo "$own"
    return
  fi
  case $1 in
    setup) echo 60 ;;
    facts) echo 40 ;;
    prep) echo 40 ;;
    amp) echo 230 ;;
    survive) echo 100 ;;
    real) echo 150 ;;
    records) echo 10800 ;;
    latency) echo 110 ;;
    syncs) echo 75 ;;
    tests) echo 110 ;;
    ort) echo 40 ;;
    *) echo 60 ;;
  esac
}

# The first folder cifar10 of the bundle or the checkout.
find_cifar10() {
  local folder
  for folder in "$KIT_CIFAR10" "$bundle/cifar10" "$root"/data/cifar10 "$root"/*/data/cifar10; do
    if [ -d "$folder" ]; then
      echo "$folder"
      return
    fi
  done
  echo "no folder cifar10 in $bundle, $root/data or $root/*/data; set KIT_CIFAR10" >&2
  return 1
}

# Unpack the source, and install the carried wheels beside the machine's own packages.
setup() {
  mkdir -p "$KIT_SOURCE" && tar xzf "$bundle/hfvit.tar.gz" -C "$KIT_SOURCE" || return
  timeout "$1" "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$site" "$bundle"/whl/*.whl 2>&1 | grep -v WARNING
  "$python" -c "
import datasets, hfvit, timm, torch, transformers
for package in (torch, transformers, timm, datasets, hfvit):
    print(package.__name__, package.__version__, package.__file__)
print('CUDA:', torch.cuda.is_available())"
}

prepare() {
  local cifar10
  cifar10=$(find_cifar10) || return
  timeout "$1" "$python" "$here/prep.py" "$cifar10"
}

# DINOv2-S is optional: without it the recipe from scratch trains alone.
train_recipes() {
  local folder=()
  [ -d "$dinov2" ] && folder=("$dinov2")
  timeout $(($1 + 25)) "$python" "$here/real.py" "$1" "${folder[@]}"
}

# records.py ends its runs itself, with a checkpoint.
train_for_records() {
  [ -d "$dinov2" ] && export KIT_DINO=$dinov2
  # shellcheck disable=SC2086  # KIT_RECORDS may hold several words
  "$python" "$here/records.py" "$1" ${KIT_RECORDS:-}
}

run_tests() {
  local code
  cd "$KIT_SOURCE" || return
  # shellcheck disable=SC2086  # KIT_TESTS may hold several words
  timeout "$1" "$python" -m pytest -q -p no:cacheprovider -n "${KIT_JOBS:-12}" --timeout 90 \
    --basetemp "$KIT_WORK/pytest" --junitxml "$OUT/tests.xml" ${KIT_TESTS:-tests}
  code=$?
  [ -f "$OUT/tests.xml" ] && "$python" "$here/junit.py" "$OUT/tests.xml"
  return $code
}

# One part of ONNX Runtime's CUDA wheel a call; the last one installs it.
join_onnx_runtime() {
  local parts=("$root"/.gpu_ort_*)
  mkdir -p "$ort" && cp -n "$root"/.gpu_ort_*/part-* "$ort/"
  timeout "$1" "$python" "$here/join_wheel.py" "${parts[0]}/whole.json" "$ort"
}

run_step() {
  local seconds=$2
  case $1 in
    setup) setup "$seconds" ;;
    facts) timeout "$seconds" "$python" "$here/facts.py" ;;
    prep) prepare "$seconds" ;;
    # shellcheck disable=SC2086  # AMP_ROWS holds several words
    amp) timeout "$seconds" "$python" "$here/amp.py" $((seconds - 6)) ${AMP_ROWS:-} ;;
    survive) timeout $((seconds + 10)) "$python" "$here/survive.py" "$seconds" ;;
    real) train_recipes "$seconds" ;;
    records) train_for_records "$seconds" ;;
    latency) timeout "$seconds" "$python" "$here/latency.py" "$seconds" ;;
    syncs) timeout "$seconds" "$python" "$here/syncs.py" "$seconds" ;;
    tests) run_tests "$seconds" ;;
    ort) join_onnx_runtime "$seconds" ;;
    *)
      echo "no step '$1' (steps: setup facts prep amp survive real records latency syncs tests ort)"
      return 2
      ;;
  esac
}

main() {
  local failed=0 name seconds log began code took
  for name in "$@"; do
    seconds=$(limit_of "$name")
    log=$OUT/$name.log
    began=$(date +%s)
    echo "=== $name (at most $seconds s)"
    (run_step "$name" "$seconds") >"$log" 2>&1
    code=$?
    grep -E "^RESULT|Error|passed|failed" "$log" | tail -n "${KIT_LINES:-12}" | cut -c1-240
    if [ $code -ne 0 ]; then
      failed=1
      tail -n 8 "$log" | cut -c1-300
    fi
    took=$(($(date +%s) - began))
    echo "{\"step\": \"day\", \"name\": \"$name\", \"code\": $code, \"seconds\": $took}" >>"$OUT/results.jsonl"
    echo "=== $name: exit code $code, $took s"
  done
  "$python" "$here/table.py" "$OUT/results.jsonl" | tee "$OUT/table.txt"
  (cd "$OUT" && tar czf logs.tar.gz ./*.log && rm -f ./*.log tests.xml)
  return $failed
}

main "$@"
exit
