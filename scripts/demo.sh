#!/usr/bin/env bash
# Trains a tiny Qwen3-VL from random weights on images and short clips, asks it about ones it has never seen, prints its
# answers and writes a page with them. A few minutes on two cores; uses a GPU where there is one.
#
#   bash scripts/demo.sh [--flag VALUE ...]     flags of train_qwen.py, such as --max_steps 20 for a quick look
#
# A second run reuses what exists: the environment, the starting weights, the data, and a training with the same settings.
#
# DEMO_DIR=PATH     everything it makes, apart from the environment (default: demo in the repository)
# DEMO_LIMIT=N      make and ask at most N samples of a task; default: all
# VENV=PATH         the virtual environment, see scripts/environment.sh; PYTHON=PATH makes it with that Python
# NPROC_PER_NODE=N  processes to train with (default 1)
set -euo pipefail
root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=scripts/environment.sh
source "$root/scripts/environment.sh"

say() { printf '[demo] %s\n' "$*" >&2; }

make_folders() {
    mkdir -p "${DEMO_DIR:-$root/demo}"
    DEMO_DIR="$(cd -- "${DEMO_DIR:-$root/demo}" && pwd)"
    export DEMO_DIR # data/__init__.py reads it
}

choose_threads() {
    local cores
    cores="$(python -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')"
    # Half of the cores, the others prepare samples; more than four only wait for each other in a model this small.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores < 4 ? 1 : cores < 8 ? cores / 2 : 4))}"
    export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
}

make_base() {
    [[ ! -f "$DEMO_DIR/base/config.json" ]] || return 0
    say "building a tiny Qwen3-VL with random weights"
    rm -rf "$DEMO_DIR/base.part"
    python "$root/tools/make_tiny_checkpoint.py" --family qwen3_vl --size demo --output "$DEMO_DIR/base.part" >&2
    mv "$DEMO_DIR/base.part" "$DEMO_DIR/base" # complete or absent
}

make_data() {
    local limit=()
    [[ -z "${DEMO_LIMIT:-}" ]] || limit=(--limit "$DEMO_LIMIT")
    say "data: real handwritten digits, drawn shapes, short clips"
    python "$root/tools/make_demo_data.py" --output "$DEMO_DIR/data" "${limit[@]}" >&2
}

# bfloat16 where a GPU computes in it; prints flags.
precision_flags() {
    python -c '
import torch
if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False):
    print("--bf16\nTrue")
'
}

# What a finished training depends on: settings, data and starting weights.
settings() {
    printf '%s\n' "$@" "limit ${DEMO_LIMIT:-none}"
    cksum <"$root/configs/demo.yaml"
    cksum <"$DEMO_DIR/data/manifest.json"
    cksum <"$DEMO_DIR/base/model.safetensors"
}

train() {
    local model="$DEMO_DIR/model" wanted flags
    wanted="$(settings "$@")"
    if [[ -f "$model/demo_settings.txt" && "$(cat "$model/demo_settings.txt")" == "$wanted" ]]; then
        say "the model in $model is trained already"
        return
    fi
    rm -rf "$model"
    mapfile -t flags < <(precision_flags)
    NPROC_PER_NODE="${NPROC_PER_NODE:-1}" PYTHON=python bash "$root/scripts/launch.sh" "$root/configs/demo.yaml" \
        --model_name_or_path "$DEMO_DIR/base" --output_dir "$model" "${flags[@]}" "$@"
    printf '%s\n' "$wanted" >"$model/demo_settings.txt" # last: an interrupted training is started anew
}

make_report() {
    local limit=()
    [[ -z "${DEMO_LIMIT:-}" ]] || limit=(--limit "$DEMO_LIMIT")
    say "asking the trained model about samples it has never seen"
    python "$root/examples/demo/report.py" --model "$DEMO_DIR/model" --data "$DEMO_DIR/data" \
        --output "$DEMO_DIR/report.html" "${limit[@]}"
}

make_folders
use_environment
choose_threads
make_base
make_data
train "$@"
make_report
say "to serve it with vLLM: bash $(printf %q "$root/scripts/serve.sh") $(printf %q "$DEMO_DIR/model")"
