#!/bin/sh
# What only an accelerator can show, within ten minutes of one: that methods give there what they give on the processor,
# worlds of coordinating agents, merges of 8 billion weights, and the studies that take hours of a processor.
#
#     benchmarks/gpu.sh [FOLDER IN MEMORY FOR 80 GB]
#
# Results go to benchmarks/results/ as those of every benchmark.
set -u
work=${1:-${TMPDIR:-/tmp}/modicum-merge-accelerator}
run() { echo "== $*"; timeout "$seconds" python3 -m "$@" || echo "-- ended with $?"; }

seconds=120 run pytest -q -m gpu tests
seconds=90 run benchmarks.speed.submodular --parts accelerator
seconds=240 run benchmarks.speed.merging_accelerator --work "$work"
rm -rf "$work"
seconds=120 run benchmarks.claims.submodular.smollm2 &
seconds=200 run benchmarks.claims.sewa.smollm2 &
wait
