#!/usr/bin/env bash
# Everything about the kernels that needs a CUDA host, in one call: build, test, sanitize, measure. No package registry.
#   usage: bench/gpu/host.sh OUT [PART...]      parts: build test sanitize bench (default: all)
# Each part writes its log into OUT; one that fails does not stop the others.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=$(realpath -m "$1"); shift
parts=${*:-build test sanitize bench}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=4
failed=0

step() {  # step NAME SECONDS COMMAND...: the end of its output is shown
  local name=$1 seconds=$2; shift 2
  local began=$SECONDS
  timeout "$seconds" "$@" >"$out/$name.log" 2>&1
  local code=$?
  printf '== %s: exit %d after %ds\n' "$name" "$code" $((SECONDS - began))
  if [ $code -ne 0 ]; then failed=1; tail -n 40 "$out/$name.log"; else tail -n "${lines:-3}" "$out/$name.log"; fi
}

build() {
  cmake -S . -B build/gpu -G Ninja -DCMAKE_BUILD_TYPE=Release -DHETKV_CUDA=ON -DHETKV_HIP=OFF \
    -DHETKV_CUDA_ARCHITECTURES="${HETKV_ARCH:-90}" -DPython_EXECUTABLE="$(command -v python3)" &&
    cmake --build build/gpu -j "$(nproc)" && cmake --install build/gpu --prefix .
}

for part in $parts; do
  case $part in
    build) lines=3 step build 200 bash -c "$(declare -f build); build" ;;
    test) lines=5 step test 130 python3 -m pytest tests/remap/test_remap_gpu.py tests/remap/test_scaled_gpu.py -m gpu -p no:cacheprovider --durations=5 ;;
    sanitize)
      for tool in memcheck racecheck; do
        lines=2 step "$tool" 90 compute-sanitizer --tool "$tool" --error-exitcode 9 \
          python3 bench/gpu/sanitize.py
      done ;;
    bench) lines=200 COLUMNS=130 step bench 240 python3 -m hetkv bench remap --device cuda:0 --repeats "${REPEATS:-20}" \
      --json "$out/remap-gpu.json" ;;
    *) echo "unknown part $part"; exit 2 ;;
  esac
done
exit $failed
