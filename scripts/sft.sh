#!/usr/bin/env bash
# Trains with a recipe of configs/; the environment overrides the recipe, and flags override both:
#
#   DATASETS=my_dataset%50,other OUTPUT_DIR=output/my_run scripts/sft.sh sft_qwen3vl_4b [--flag VALUE ...]
#
# From the environment, all optional:
#   MODEL, DATASETS, OUTPUT_DIR, RUN_NAME, EPOCHS
#   LR            learning rate
#   BATCH_SIZE    samples on each GPU at once (evaluation takes twice as many)
#   GRAD_ACCUM    batches of each GPU in one optimizer step
#   DEEPSPEED     DeepSpeed configuration; empty for none
#   NPROC_PER_NODE, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, PYTHON, DRY_RUN: see scripts/launch.sh
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
recipe="${root}/configs/${1:?name a recipe of configs/, such as sft_qwen3vl_4b}.yaml"
shift

flags=()
override() { # VARIABLE FLAG
    if [[ -n "${!1:-}" ]]; then flags+=("--$2" "${!1}"); fi
}
override MODEL model_name_or_path
override DATASETS dataset_use
override OUTPUT_DIR output_dir
override RUN_NAME run_name
override EPOCHS num_train_epochs
override LR learning_rate
override BATCH_SIZE per_device_train_batch_size
override GRAD_ACCUM gradient_accumulation_steps
override DEEPSPEED deepspeed
if [[ -n "${BATCH_SIZE:-}" ]]; then flags+=(--per_device_eval_batch_size "$((BATCH_SIZE * 2))"); fi
if [[ -n "${DEEPSPEED+set}" && -z "${DEEPSPEED}" ]]; then flags+=(--deepspeed null); fi

exec "${root}/scripts/launch.sh" "${recipe}" "${flags[@]}" "$@"
