#!/usr/bin/env bash
# The whole check on a GPU: correctness, compute-sanitizer, benchmarks. One command, in a bare checkout without network:
#   benchmarks/gpu_check.sh [output folder]
# Each step's log and result lands in the output folder; the last line says which steps failed. Exits 1 if any did.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-benchmarks/results/gpu}
mkdir -p "$out"
python=${PYTHON:-python3}
paths=$(mktemp -d)
ln -s "$PWD/kernels" "$paths/layalign_kernels" # as an installation would have it, without one
export PYTHONPATH="$PWD:$paths${PYTHONPATH:+:$PYTHONPATH}"
failed=()

step() { # step NAME SECONDS COMMAND...
  local name=$1 seconds=$2 start=$SECONDS
  shift 2
  echo "== $name"
  timeout "$seconds" "$@" > "$out/$name.log" 2>&1
  local code=$?
  tail -n 3 "$out/$name.log"
  echo "   exit $code after $((SECONDS - start)) s"
  [ $code -eq 0 ] || failed+=("$name")
}

# The extension, for this GPU only, beside the package as an editable installation has it.
arch=$("$python" -c "import torch; print('%d%d' % torch.cuda.get_device_capability())" 2> /dev/null || echo 90)
built=$(mktemp -d)
LAYALIGN_CUDA=1 LAYALIGN_CUDA_ARCHS=$arch step build 300 "$python" csrc/builder.py extension --output "$built"
cp "$built"/_C*.so layalign/ 2> /dev/null || true

step facts 60 "$python" benchmarks/facts.py "$out/facts.json"
step tests 600 "$python" -m pytest -q -p no:cacheprovider tests/test_ops.py tests/test_layer_kernels.py \
  tests/test_gated_cross_attention.py tests/test_gated_cross_attention_op.py tests/test_triton_kernels.py \
  tests/test_extension.py tests/test_cuda_graphs.py
step sanitize 120 "$python" benchmarks/sanitize.py
if command -v compute-sanitizer > /dev/null; then
  step memcheck 300 compute-sanitizer --tool memcheck --error-exitcode 1 "$python" benchmarks/sanitize.py
  step racecheck 300 compute-sanitizer --tool racecheck --error-exitcode 1 "$python" benchmarks/sanitize.py
else
  echo "== memcheck, racecheck: compute-sanitizer is not here"
fi
step bench 1200 env LAYALIGN_BENCH=gpu "$python" -m pytest -q -p no:cacheprovider benchmarks --results "$out"
step report 60 "$python" benchmarks/report.py "$out"

if [ ${#failed[@]} -gt 0 ]; then
  echo "FAILED: ${failed[*]}"
  exit 1
fi
echo "all steps passed; results in $out"
