#!/usr/bin/env bash
# What waits for a real GPU, in order of worth, in at most 12 minutes on one H100:
#
#     bash benchmarks/gpu_day.sh [OUT]             on a GPU; rows are appended to benchmarks/results/ as they come
#     DEVICE=cpu bash benchmarks/gpu_day.sh [OUT]  the same commands with tiny shapes, keeping no rows: does the script still run?
#
# Each part has a time of its own and is stopped at its end, the next one goes on: a script that is cut off has kept what it measured.
# OUT (default: gpu-day) gets a log of each part, and `parts.tsv`: its name, its exit code, its seconds. Exit code 1 if a part failed;
# a part that ran out of time counts as such only on the CPU.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu-day}
python=${PYTHON:-.venv/bin/python}
device=${DEVICE:-cuda}
mkdir -p "$out"
failed=0

part() { # part NAME SECONDS COMMAND…
    local name=$1 limit=$2 began=$SECONDS code=0
    shift 2
    timeout --signal=INT --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
    printf '%s\t%s\t%s\n' "$name" "$code" "$((SECONDS - began))" | tee -a "$out/parts.tsv"
    [ $code = 0 ] || { [ $code = 124 ] && [ "$device" = cuda ]; } || failed=1
}

if [ "$device" = cuda ]; then
    pair=(--shape qwen3-0.6b --teacher-shape qwen3-8b) small=(--shape qwen3-0.6b --teacher-shape qwen3-1.7b) large=(--shape qwen3-4b --teacher-shape qwen3-8b)
    size=(--device cuda --dtype bfloat16 --batch 1 --tokens 4096 --rounds 1 --repetitions 5)
    fractions=() chunks=(512 1024 2048) contenders=()
    for one in ours liger trl paper liger-triton; do contenders+=(--contender "$one"); done # of a part that is cut off the first are kept
else
    pair=(--shape tiny --teacher-shape tiny) small=("${pair[@]}") large=("${pair[@]}")
    size=(--device cpu --batch 1 --tokens 64 --rounds 1 --repetitions 1 --threads 1 --no-keep)
    fractions=(--fraction 0.5) chunks=() contenders=(--contender ours)
fi

part doctor 60 "$python" -m mlx_distill doctor --backend torch
[ "$device" = cpu ] || part tests 120 "$python" -m pytest -m cuda -n 0 tests/test_cuda.py
part loss 120 "$python" benchmarks/bench_step.py run "${pair[@]}" "${size[@]}" "${contenders[@]}" --part head
part step 180 "$python" benchmarks/bench_step.py run "${small[@]}" "${size[@]}" "${contenders[@]}" --part step
for chunk in "${chunks[@]}"; do
    part "chunk-$chunk" 40 "$python" benchmarks/bench_step.py run "${pair[@]}" "${size[@]}" --part head --contender ours --chunk-tokens "$chunk"
done
part fractions 120 "$python" benchmarks/bench_fraction.py run "${large[@]}" "${size[@]}" "${fractions[@]}"
if [ "$device" = cuda ] && "$python" -c 'import importlib.metadata as m; m.version("mlx-cuda")' 2>/dev/null; then
    part mlx-on-cuda 60 "$python" -m mlx_distill doctor --backend mlx
fi
exit $failed
