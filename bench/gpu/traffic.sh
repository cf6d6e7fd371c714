#!/usr/bin/env bash
# Steps of many requests, and small ones, between two GPUs of a CUDA host, in one call: builds in place, then the PARTS
# that are named. Each part has a time limit and goes on where another failed; without `peers` under 9 minutes in all.
#   usage: bench/gpu/traffic.sh DIR [tests traffic transfer peers]...     (default: tests traffic transfer)
# `peers` needs nixl-cu13 next to this Python (`PY`), and 9 minutes of its own.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=$1
shift
parts=${*:-tests traffic transfer}
mkdir -p "$out"
PY=${PY:-python3}
export PY PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" COLUMNS=150

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
for part in $parts; do
  case $part in
    tests)
      LINES_SHOWN=30 step kernels 60 "$PY" -m pytest -q tests/remap/test_remap_gpu.py \
        -k "frames_of or several or fills or nothing" -p no:cacheprovider
      LINES_SHOWN=30 step tests 90 "$PY" -m pytest -q tests/device/test_gpu.py -m gpu -p no:cacheprovider
      ;;
    traffic)
      LINES_SHOWN=60 step traffic 280 "$PY" -m hetkv bench traffic --device --peers none --json "$out/traffic-device.json"
      ;;
    transfer)
      LINES_SHOWN=20 step transfer 100 "$PY" -m hetkv bench transfer --device --peers none --rounds 3 \
        --json "$out/transfer-device.json"
      ;;
    peers)
      LINES_SHOWN=40 step peers 560 "$PY" -m hetkv bench traffic --device --peers-only --json "$out/traffic-peers.json"
      ;;
    *) echo "unknown part $part" ;;
  esac
done
(cd "$out" && tar -czf logs.tgz ./*.log && rm -f ./*.log)
