#!/usr/bin/env bash
# The check on a GPU: correctness, compute-sanitizer, benchmarks; in a bare checkout, without network or installation.
#   benchmarks/gpu_check.sh [-o FOLDER] [-t SECONDS] [STEP ...]
# Steps, all of them by default, always in this order:
#   build facts sanitize tests memcheck racecheck bench report
# -t: for all steps together. What is running then is stopped, and the benchmarks leave the rows they have; what has not
#     begun is not run. So a short lease can be used up in a few calls: "-t 500 build facts sanitize tests", "-t 200 bench".
# BENCH: more arguments for the benchmarks, e.g. BENCH='--patience 0.3'.
# FOLDER (benchmarks/results/gpu): check.log, facts.json, bench.json, and the report made of it. Exits 1 if a step failed
# or was not run, 2 for a wrong argument.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
known=(build facts sanitize tests memcheck racecheck bench report)
out=benchmarks/results/gpu end=0
while getopts o:t: option; do
  case $option in
    o) out=$OPTARG ;;
    t) [[ $OPTARG =~ ^[1-9][0-9]*$ ]] || { echo "-t: expected seconds, got $OPTARG" >&2; exit 2; }
      end=$((SECONDS + OPTARG)) ;;
    *) exit 2 ;;
  esac
done
shift $((OPTIND - 1))
wanted=" ${*:-${known[*]}} "
for name in $wanted; do
  [[ " ${known[*]} " == *" $name "* ]] || { echo "$name: expected a step of ${known[*]}" >&2; exit 2; }
done
mkdir -p "$out"
log=$out/check.log
python=${PYTHON:-python3}
paths=$(mktemp -d)
trap 'rm -rf "$paths"' EXIT
ln -s "$PWD/kernels" "$paths/layalign_kernels" # as an installation would have it, without one
export PYTHONPATH="$PWD:$paths${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
failed=()

step() { # step NAME SECONDS COMMAND...
  local name=$1 seconds=$2 start=$SECONDS from
  shift 2
  echo "== $name" | tee -a "$log"
  if [ "$end" -gt 0 ] && [ $((end - start)) -lt "$seconds" ]; then seconds=$((end - start)); fi
  if [ "$seconds" -le 0 ]; then
    echo "   not run: no time left" | tee -a "$log"
    failed+=("$name")
    return 0
  fi
  from=$(wc -l < "$log")
  timeout --kill-after 20 "$seconds" "$@" >> "$log" 2>&1
  local code=$?
  tail -n +$((from + 1)) "$log" | tail -n 5
  echo "   exit $code after $((SECONDS - start)) of $seconds s" | tee -a "$log"
  [ $code -eq 0 ] || failed+=("$name")
}

build() { # the extension, for this GPU only, beside the package as an editable installation has it
  local arch
  arch=$("$python" -c "import torch; print('%d%d' % torch.cuda.get_device_capability())" 2> /dev/null || echo 90)
  LAYALIGN_CUDA=1 LAYALIGN_CUDA_ARCHS=$arch step build 300 "$python" csrc/builder.py extension --output "$paths/built"
  cp "$paths"/built/_C*.so layalign/ 2> /dev/null || true
}

tests() {
  local workers=() # compiling the kernels takes the CPU's cores more than the GPU
  "$python" -c "import xdist" 2> /dev/null && workers=(-n "$(($(nproc) < 8 ? $(nproc) : 8))")
  step tests 600 "$python" -m pytest -q -p no:cacheprovider "${workers[@]}" \
    tests/ops/test_layer_mix.py tests/ops/test_layer_projection.py tests/ops/test_gated_cross_attention.py \
    tests/ops/test_gated_cross_attention_kernels.py tests/ops/test_triton_kernels.py tests/ops/test_launch.py \
    tests/ops/test_extension.py tests/ops/test_cuda_graphs.py
}

sanitizer() { # sanitizer TOOL
  if command -v compute-sanitizer > /dev/null; then
    step "$1" 300 compute-sanitizer --tool "$1" --error-exitcode 1 "$python" benchmarks/sanitize.py
  else
    echo "== $1: compute-sanitizer is not here" | tee -a "$log"
  fi
}

bench() {
  local command='exec "$0" -m pytest -q -p no:cacheprovider benchmarks --results "$1" '${BENCH:-} # with quotes of its own
  LAYALIGN_BENCH=${LAYALIGN_BENCH:-gpu} step bench 1200 bash -c "$command" "$python" "$out"
}

for name in "${known[@]}"; do
  [[ $wanted == *" $name "* ]] || continue
  case $name in
    facts) step facts 60 "$python" benchmarks/facts.py "$out/facts.json" ;;
    sanitize) step sanitize 120 "$python" benchmarks/sanitize.py ;;
    memcheck | racecheck) sanitizer "$name" ;;
    report) step report 60 "$python" benchmarks/report.py "$out" ;;
    *) "$name" ;; # build, tests, bench
  esac
done

if [ ${#failed[@]} -gt 0 ]; then
  echo "FAILED: ${failed[*]}"
  exit 1
fi
echo "all steps passed; results in $out"
