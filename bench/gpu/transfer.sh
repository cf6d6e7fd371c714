#!/usr/bin/env bash
# Everything about transfers between devices on a CUDA host, in one call: builds in place, then the PARTS that are named.
# Each part has a time limit and goes on where another failed. Results and logs go into DIR.
#   usage: bench/gpu/transfer.sh DIR [tests probe transfer overlap pair]...
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=$1
shift
parts=${*:-tests probe transfer overlap pair}
mkdir -p "$out"
PY=${PY:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

step() {  # step NAME SECONDS COMMAND...
  local name=$1 limit=$2 began=$SECONDS
  shift 2
  timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1
  local status=$?
  printf '\n== %s: status %s, %s s\n' "$name" "$status" "$((SECONDS - began))"
  tail -n "${LINES_SHOWN:-25}" "$out/$name.log"
}

build() {
  local jobs
  jobs=$(nproc)
  cmake -S . -B build/gpu -G Ninja -DCMAKE_BUILD_TYPE=Release -DHETKV_CUDA=ON -DHETKV_HIP=OFF \
    -DHETKV_CUDA_ARCHITECTURES=90 -DPython_EXECUTABLE="$(command -v "$PY")" &&
    cmake --build build/gpu -j "$jobs" && cmake --install build/gpu --prefix .
}
export -f build
export PY
LINES_SHOWN=4 step build 240 bash -c build
for part in $parts; do
  case $part in
    tests) LINES_SHOWN=60 step tests 150 "$PY" -m pytest -q tests/device/test_gpu.py -m gpu --timeout 60 -p no:cacheprovider ;;
    probe) step probe 60 "$PY" -m hetkv probe --json "$out/probe.json" ;;
    transfer) step transfer 200 "$PY" -m hetkv bench transfer --device --json "$out/transfer-device.json" ${TRANSFER:-} ;;
    overlap) step overlap 220 "$PY" -m hetkv bench overlap --json "$out/overlap.json" ${OVERLAP:-} ;;
    pair)
      step pair 120 "$PY" -m hetkv demo --prefill-device cuda:0 --decode-device cpu --prefill-layout hnd \
        --prefill-block 16 --prefill-dtype float32 --decode-layout rocm --decode-block 64 --decode-dtype float32 \
        --json "$out/pair.json" --trace "$out/pair-trace.json"
      ;;
    *) echo "unknown part $part" ;;
  esac
done
(cd "$out" && tar -czf logs.tgz ./*.log && rm -f ./*.log)
