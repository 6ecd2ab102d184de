#!/usr/bin/env bash
# Everything there is to learn on a machine with one GPU, in order of importance, each step writing its result as a file:
#   benchmarks/gpu/run.sh OUT [IMAGES]
# OUT is where results go. IMAGES is a data set made by `longhaul prepare` of photographs, for the input path; without it
# that step is left out. A step that fails does not stop the next: OUT/summary.txt says which passed.
set -uo pipefail
cd "$(dirname "$0")/../.."
OUT=$(realpath -m "${1:?usage: benchmarks/gpu/run.sh OUT [IMAGES]}")
IMAGES=${2:-}
PYTHON=${PYTHON:-python3}
export PYTHONPATH=$PWD
mkdir -p "$OUT"

step() { # step NAME SECONDS COMMAND...
    local name=$1 seconds=$2 began=$SECONDS
    shift 2
    timeout "$seconds" "$@" >"$OUT/$name.log" 2>&1
    echo "$name: exit $? after $((SECONDS - began)) s" | tee -a "$OUT/summary.txt"
    cp -r benchmarks/results/gpu-* "$OUT/" 2>/dev/null
}

nvidia-smi >"$OUT/nvidia-smi.txt" 2>&1
# Does GPU DALI decode with our crop boxes and match the CPU's pixels; do losses, resume and deterministic mode hold?
step pytest-gpu 540 "$PYTHON" -m pytest -m gpu -q -x --timeout 300
step throughput 500 "$PYTHON" -m benchmarks.gpu.throughput --device cuda --rounds 3
if [ -n "$IMAGES" ]; then
    # Does the feed keep up? data_wait_seconds in the step events is the answer.
    step feed 300 "$PYTHON" -m launch.cli train resnet50 --data "$IMAGES" --name feed --runs "$OUT/runs" --local \
        duration=200it batch.size=256 batch.micro=256 log.every=20it evaluate.every=1000it checkpoint.every=1000it
fi
cat "$OUT/summary.txt"
