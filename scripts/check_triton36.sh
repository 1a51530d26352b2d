#!/usr/bin/env bash
# Proves that the loss's device code compiles on Triton 3.6 (the oldest supported; CI runs 3.9):
# unpacks that wheel beside the environment, compiles the shipped kernels with it, reads the cubins.
# Needs no GPU. Usage: scripts/check_triton36.sh [FOLDER]   (the wheel is kept there; 190 MB)
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:-build/triton36}
python=${PYTHON:-.venv/bin/python}
version=3.6.0
site=$folder/site

mkdir -p "$folder"
if [ ! -d "$site/triton" ]; then
    tag=$("$python" -c 'import sys; print(f"{sys.version_info.major}.{sys.version_info.minor}")')
    ls "$folder"/triton-$version-*.whl >/dev/null 2>&1 ||
        "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$tag" \
            --dest "$folder" "triton==$version"
    "$python" -m zipfile -e "$folder"/triton-$version-*.whl "$site.part"
    # zipfile does not keep the executable bit.
    chmod +x "$site.part"/triton/backends/nvidia/bin/*
    mv "$site.part" "$site"
fi

unset TRITON_INTERPRET
export PYTHONPATH=$site TRITON_CACHE_DIR=$folder/cache
rm -rf "$TRITON_CACHE_DIR"
"$python" -W ignore scripts/compile_kernels.py --dtype bf16 --width 128 256 384 \
    >"$folder/facts.jsonl"
"$python" scripts/read_compile_facts.py "$folder/facts.jsonl" --triton "$version"
