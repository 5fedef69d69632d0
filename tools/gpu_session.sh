#!/usr/bin/env bash
# What is measured at full size, in one go, on a machine with a CUDA card: the GPU tests, then the
# benchmark. usage: tools/gpu_session.sh RESULTS_FOLDER CHECKPOINT_FOLDER [configuration numbers]
set -uo pipefail
results=$1 checkpoint=$2
shift 2
mkdir -p "$results" "$checkpoint"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
df -h "$checkpoint" | tail -n 1
python3 -m pytest -q -m gpu tests/gpu 2>&1 | tee "$results/tests.log" | tail -n 5
python3 -m image_worker.bench.full_size "$checkpoint" --log "$results/full_size.jsonl" \
  ${@:+--only "$@"} 2>"$results/full_size.log"
grep -E "plan:|cold start:|WARN|Error" "$results/full_size.log" | tail -n 40
