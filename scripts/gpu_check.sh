#!/usr/bin/env bash
# Everything this project wants to know of a GPU, in calls of at most ten minutes. No network.
#
#   scripts/gpu_check.sh FOLDER [kernels|loader|step|score|photos|all] [--rehearse]
#
# Before any timing, in every part: one training step and one scoring batch, and by the profiler's
# kernel names that nvJPEG, DALI's paste operator, the preprocessing kernel and the fused loss ran.
# Needs what training needs and DALI; where they lack it is left out, and said.
#
# kernels  a warm compile, correctness of bf16 at D = 256 and 384, the targets at both, a profile, other
#          tiles, all baselines, every size beside a bare product, the loss's share of a step, a CUDA
#          graph, counters; then correctness of every type and width, and compute-sanitizer.
#          Needs PyTorch >= 2.11, Triton >= 3.6, numpy, click, jaxtyping, tqdm (timm for the share).
# loader   images per second by decoder (hardware, CUDA cores, CPU) beside webdataset with Pillow and
#          beside DALI's reader; pixels and scores by decoder.        These three need DALI and
# step     whole training steps of ViT-S/16 by batch size, beside the usual loop.   webdataset too:
# score    `lmcl score` beside the bare model.                                   docs/kernels.md.
# photos   training on real photographs: squeezenet-vit, a ViT-S/16 from scratch, the ablation ladder
#          with five seeds. Needs a packed set, and no DALI. Runs lie in GPU_CHECK_RUNS
#          (build/photos-runs), one folder per version of code, set and stem; they go on too.
#
# What a call does not finish the next one goes on with: give the same FOLDER. It holds at most
# eight files: JSON lines per part, log.txt, about.txt, summary.txt. --rehearse does the same steps,
# tiny, on a CPU (kernels interpreted). GPU_CHECK_SECONDS: the call's time, 570 unless told.
# GPU_CHECK_MODEL: a released model for the scores by decoder. GPU_CHECK_PHOTOS: the packed set
# (build/photos). GPU_CHECK_STEM: SqueezeNet weights, .npz (random). PYTHON: the interpreter.
#
# Exit code: 0 all done, correct, and every target met; 1 something wrong or missed (summary.txt);
# 2 wrong arguments or nothing to run on; 3 time was up, call again.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

usage="usage: scripts/gpu_check.sh FOLDER [kernels|loader|step|score|photos|all] [--rehearse]"
folder="" part="" rehearse=""
for argument in "$@"; do
    case $argument in
        --rehearse) rehearse=--rehearse ;;
        kernels | loader | step | score | photos | all) part=$argument ;;
        -*) echo "$argument: no such option; $usage" >&2; exit 2 ;;
        *) [ -z "$folder" ] || { echo "$argument: no such part; $usage" >&2; exit 2; }
           folder=$argument ;;
    esac
done
[ -n "$folder" ] || { echo "$usage" >&2; exit 2; }
parts=${part:-all}
[ "$parts" = all ] && parts="kernels loader step score photos"

python=${PYTHON:-python3}
# A rehearsal has nobody waiting for its machine, and may share a slow one.
patience=1 call_s=570
[ -n "$rehearse" ] && patience=6 call_s=3600
photos=${GPU_CHECK_PHOTOS:-build/photos}
deadline=$((SECONDS + ${GPU_CHECK_SECONDS:-$call_s}))
mkdir -p "$folder" && folder=$(cd "$folder" && pwd) || exit 2
log=$folder/log.txt
work=$(mktemp -d) || exit 2

# What is started ends with this script: by its traps, and where it is killed by the kernel.
running=() ending=()
command -v setpriv >/dev/null && ending=(setpriv --pdeathsig TERM --)
end_children() {
    [ ${#running[@]} -gt 0 ] && kill "${!running[@]}" 2>/dev/null
    wait
    rm -rf "$work"
}
trap end_children EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} TRITON_DEFAULT_FP_FUSION=1 PYTHONUNBUFFERED=1
if [ -n "$rehearse" ]; then export TRITON_INTERPRET=1; else unset TRITON_INTERPRET; fi

# Results of two versions of the code must not stand in one file.
shopt -s globstar
version_of() {
    local files=(scripts/gpu_check.sh scripts/gpu_check_book.py kernels/**/*.py lmcl/bench/contrastive*.py)
    if [ "$1" = kernels ]; then files+=(scripts/gpu_check_kernels.py)
    elif [ "$1" = photos ]; then
        files+=(scripts/gpu_check_photos.py {shards,pipeline,lmcl}/**/*.py
                configs/biq2021-small.toml configs/paper/base.toml configs/ablations/{base,ladder/*}.toml)
    elif [ "$1" = engines ]; then
        files+=(scripts/gpu_check_engines.py {shards,pipeline,lmcl}/**/*.py configs/smoke.toml)
    else files+=(scripts/gpu_check_loader.py {shards,pipeline,lmcl}/**/*.py); fi
    echo "$1 $(cat "${files[@]}" | sha256sum | cut -c1-16) ${rehearse:-gpu}"
}
for current in $parts; do
    if grep -qs "^$current " "$folder/about.txt" && ! grep -qx "$(version_of "$current")" "$folder/about.txt"; then
        echo "$folder: holds results of another version or mode of $current (see its about.txt); give a new folder" >&2
        exit 2
    fi
done
if [ ! -f "$folder/about.txt" ]; then
    { date -u; git log -1 --format=%H 2>/dev/null; uname -sr; nproc
      nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null
      "$python" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
    } >"$folder/about.txt" 2>>"$log"
fi

wrong=() unfinished=() skipped=()

finished() { grep -qs "^{\"finished\": \"$1\"}" "$folder/$current.jsonl"; }

# step NAME SECONDS COMMAND...: unless it is done, run it for so long, or for what is left.
step() {
    begin "$@" || return
    [ -z "$pid" ] || ended "$pid"
}

# begin NAME SECONDS COMMAND...: start it and go on; its process is $pid, or empty if it is done.
begin() {
    pid=""
    local name=$1 most=$(($2 * patience)) left=$((deadline - SECONDS))
    shift 2
    finished "$name" && return 0
    if [ "$left" -lt 20 ]; then unfinished+=("$current/$name"); return 3; fi
    echo "$current/$name: at most $((most < left ? most : left)) s" | tee -a "$log"
    # A simple command, so that it is this script's own child.
    "${ending[@]}" timeout --kill-after=10 $((most < left ? most : left)) "${ending[@]}" "$@" >>"$log" 2>&1 &
    pid=$!
    running[pid]=$name
}

ended() {
    local name=${running[$1]} code
    wait "$1"
    code=$?
    unset "running[$1]"
    case $code in
        0) ;;
        124 | 137) unfinished+=("$current/$name") ;;
        *) wrong+=("$current/$name") ;;
    esac
    return $code
}

# The first of everything, once per folder and version of code; false: no timing is to be taken.
engines() {
    local mark sentence
    mark=$(version_of engines)
    grep -qsx "$mark" "$folder/about.txt" && return 0
    if ! sentence=$("$python" -W ignore scripts/gpu_check_needs.py engines $rehearse 2>&1); then
        echo "$sentence" | tee -a "$log"
        skipped+=(engines)
        # Said once.
        engines() { true; }
        return 0
    fi
    step engines 180 "$python" -W ignore scripts/gpu_check_engines.py $rehearse
    case $? in
        0) echo "$mark" >>"$folder/about.txt"; grep -h '"engines"' "$log" | tail -n 2; return 0 ;;
        3 | 124 | 137) ;;
        *) tail -n 1 "$log" ;;
    esac
    return 1
}

# A command that keeps no book of its own: its step is finished when it succeeds.
plain_step() {
    local name=$1
    step "$@" && { finished "$name" || printf '{"finished": "%s"}\n' "$name" >>"$folder/$current.jsonl"; }
}

kernels() {
    local check=("$python" -W ignore scripts/gpu_check_kernels.py --book "$folder/kernels.jsonl")
    [ -n "$rehearse" ] && check+=(--rehearse)
    local dtype
    # Compiling is what takes the time; whatever fails here is met again, and judged, below.
    step warm 100 "${check[@]}" warm
    if step correctness-first 60 "${check[@]}" correctness-first; then timed "${check[@]}"
    else
        echo "kernels: correctness of bf16 failed or is not finished; nothing is timed before" | tee -a "$log"
    fi
    # All timings are of bf16: another type that fails stops none of them.
    for dtype in bf16 fp16 fp32; do
        step correctness-$dtype 150 "${check[@]}" correctness-$dtype
    done
    sanitized "${check[@]}"
}

# What is most wanted first.
timed() {
    step targets 60 "$@" targets
    step stages 40 "$@" stages
    step sweep 90 "$@" sweep
    step cases 120 "$@" cases
    step ladder 40 "$@" ladder
    if "$python" -c 'import timm' 2>/dev/null; then step share 60 "$@" share
    else echo "kernels/share: this machine lacks timm" | tee -a "$log"; fi
    step graph 30 "$@" graph
    step counters 60 "$@" counters
}

sanitized() {
    local tool=(compute-sanitizer --tool memcheck --error-exitcode 9)
    if [ -n "$rehearse" ]; then tool=()
    elif ! command -v compute-sanitizer >/dev/null; then
        echo "kernels/sanitized: compute-sanitizer is not on this machine" | tee -a "$log"; return
    fi
    # Without torch's pool every tensor is an allocation of its own, whose borders are watched.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step sanitized 180 "${tool[@]}" "$@" sanitized
}

loader() {
    local check=("$python" -W ignore scripts/gpu_check_loader.py --book "$folder/loader.jsonl" --work "$work")
    [ -n "$rehearse" ] && check+=(--rehearse)
    [ -n "${GPU_CHECK_MODEL:-}" ] && check+=(--model "$GPU_CHECK_MODEL")
    step rates 420 "${check[@]}" rates
    step parity 200 "${check[@]}" parity
}

step_part() {
    local bench=("$python" -W ignore -m lmcl bench step --no-progress --output "$folder/step.jsonl") size
    if [ -n "$rehearse" ]; then
        plain_step step-2 300 "${bench[@]}" --batch-sizes 2 --steps 1 --rounds 1 --workers 1 --no-compile \
            --set encoder.name=conv-vit --set crops.size=64 --set crops.random=2 --set runtime.precision=no
        return
    fi
    for size in 64 32 128 16 256; do
        plain_step "step-$size" 280 "${bench[@]}" --device cuda --batch-sizes $size --steps 10 --workers 16 \
            --set encoder.name=deit3_small_patch16_224 --set runtime.precision=bf16
    done
}

score() {
    local bench=("$python" -W ignore -m lmcl bench score --json "$folder/score.jsonl") precision
    if [ -n "$rehearse" ]; then
        plain_step score 200 "${bench[@]}" --images 2 --rounds 1 --encoder conv-vit --threads 1
        return
    fi
    for precision in bfloat16 float32; do
        plain_step "score-$precision" 200 "${bench[@]}" --images 512 --rounds 5 --device cuda --threads 16 \
            --precision $precision
    done
}

photos() {
    local root=${GPU_CHECK_RUNS:-build/photos-runs} packed=$photos stem=${GPU_CHECK_STEM:-} runs check run
    # Runs outlive the folder, so it is their place that says what they are of.
    if [ -n "$rehearse" ]; then
        root=${GPU_CHECK_RUNS:-$work/photos-runs} packed=$root/demo
        runs=$root/$(version_of photos | sha256sum | cut -c1-16)
    else
        runs=$root/$({ version_of photos; cat "$packed/manifest.json" "$packed"/splits/*.json ${stem:+"$stem"}
            } | sha256sum | cut -c1-16)
    fi
    check=("$python" -W ignore scripts/gpu_check_photos.py --book "$folder/photos.jsonl"
           --photos "$packed" --runs "$runs" ${stem:+--stem "$stem"} $rehearse)
    for run in squeezenet-vit vit-s ladder; do
        plain_step $run 570 "${check[@]}" $run
        # A ladder that was stopped has finished runs too.
        "${check[@]}" lines >>"$log" 2>&1 || wrong+=("photos/lines")
    done
}

for current in $parts; do
    if ! sentence=$("$python" -W ignore scripts/gpu_check_needs.py "$current" $rehearse --photos "$photos" 2>&1); then
        echo "$sentence" | tee -a "$log"
        skipped+=("$current")
        continue
    fi
    engines || break
    # A part that was left out may be tried again when the code is another.
    grep -qs "^$current " "$folder/about.txt" || version_of "$current" >>"$folder/about.txt"
    case $current in step) step_part ;; *) $current ;; esac
done
[ "${skipped[*]}" = "$parts" ] && exit 2

"$python" scripts/gpu_check_summary.py "$folder" $rehearse | tee "$folder/summary.txt"
met=${PIPESTATUS[0]}
[ ${#skipped[@]} -gt 0 ] && echo "left out: ${skipped[*]} (see above)" | tee -a "$folder/summary.txt"
[ ${#wrong[@]} -gt 0 ] && echo "wrong: ${wrong[*]} (log.txt)" | tee -a "$folder/summary.txt"
if [ ${#unfinished[@]} -gt 0 ]; then
    echo "time was up in: ${unfinished[*]}; call again with the same folder" | tee -a "$folder/summary.txt"
    exit 3
fi
[ ${#wrong[@]} -eq 0 ] && [ ${#skipped[@]} -eq 0 ] && [ "$met" -eq 0 ]
