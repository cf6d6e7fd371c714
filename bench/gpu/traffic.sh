#!/usr/bin/env bash
# Bundles and batches between two GPUs of a CUDA host, in one call: builds in place, runs the GPU tests, and measures the
# shapes of bench/gpu/traffic.py. Each step has a time limit and goes on where another failed; under 8 minutes in all.
#   usage: bench/gpu/traffic.sh DIR
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=$1
mkdir -p "$out"
PY=${PY:-python3}
export PY PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

step() {  # step NAME SECONDS COMMAND...
  local name=$1 limit=$2 began=$SECONDS
  shift 2
  timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1
  printf '\n== %s: status %s, %s s\n' "$name" "$?" "$((SECONDS - began))"
  tail -n "${LINES_SHOWN:-25}" "$out/$name.log"
}

build() {
  cmake -S . -B build/gpu -G Ninja -DCMAKE_BUILD_TYPE=Release -DHETKV_CUDA=ON -DHETKV_HIP=OFF \
    -DHETKV_CUDA_ARCHITECTURES=90 -DPython_EXECUTABLE="$(command -v "$PY")" &&
    cmake --build build/gpu -j "$(nproc)" && cmake --install build/gpu --prefix .
}
export -f build
LINES_SHOWN=4 step build 200 bash -c build
LINES_SHOWN=40 step kernels 60 "$PY" -m pytest -q tests/remap/test_remap_gpu.py -k "frames_of or several or fills or nothing" -p no:cacheprovider
LINES_SHOWN=40 step tests 90 "$PY" -m pytest -q tests/device/test_gpu.py -m gpu -p no:cacheprovider
LINES_SHOWN=30 step traffic 120 "$PY" bench/gpu/traffic.py cuda:0 cuda:1 "$out/traffic-device.json"
