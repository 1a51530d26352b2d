#!/usr/bin/env bash
# Everything the loss wants to know of a GPU, in one call of at most ten minutes: correctness of
# every configuration first, then timings. No network; needs PyTorch >= 2.11, Triton >= 3.6, click,
# jaxtyping, numpy, tqdm. Results are JSON lines in the folder named by the argument.
#
#   scripts/gpu_check.sh FOLDER              on a GPU
#   scripts/gpu_check.sh FOLDER --rehearse   the same steps, tiny and interpreted, on a CPU
#
# Exit code: 0 all correct and every target met; 1 something is wrong or missed, summary.txt says what.
set -uo pipefail
cd "$(dirname "$0")/.."

folder=${1:?usage: scripts/gpu_check.sh FOLDER [--rehearse]}
rehearse=${2:-}
python=${PYTHON:-python3}
check=("$python" -W ignore scripts/gpu_check_kernels.py --output "$folder" ${rehearse:+--rehearse})

mkdir -p "$folder"
rm -f "$folder"/*.jsonl "$folder"/summary.txt
export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$PWD TRITON_DEFAULT_FP_FUSION=1 PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$folder/triton-cache}
if [ "$rehearse" = --rehearse ]; then export TRITON_INTERPRET=1; else unset TRITON_INTERPRET; fi

# Correctness: the three element types at once, because compiling is what takes the time.
pids=()
for dtype in bf16 fp16 fp32; do
    timeout 240 "${check[@]}" correctness --dtype "$dtype" >"$folder/correctness-$dtype.log" 2>&1 &
    pids+=($!)
done
correct=0
for pid in "${pids[@]}"; do wait "$pid" || correct=1; done
if [ $correct -ne 0 ]; then
    echo "correctness failed or ran out of time; no timing is taken of a wrong kernel" |
        tee "$folder/summary.txt"
    tail -n 5 "$folder"/correctness-*.log
    exit 1
fi

# Timings, one process at a time so that each has the GPU to itself. 240 + 60 + 150 + 60 + 40 s.
timeout 60 "${check[@]}" targets >"$folder/targets.log" 2>&1
timeout 150 "${check[@]}" cases >"$folder/cases.log" 2>&1
timeout 60 "${check[@]}" sweep >"$folder/sweep.log" 2>&1
timeout 40 "${check[@]}" graph >"$folder/graph.log" 2>&1
"${check[@]}" summary | tee "$folder/summary.txt"
exit "${PIPESTATUS[0]}"
