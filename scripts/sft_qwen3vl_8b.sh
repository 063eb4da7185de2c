#!/usr/bin/env bash
# Full fine-tuning of Qwen3-VL-8B, with the values of the official recipe.
#
#   DATASETS=my_dataset%50,other OUTPUT_DIR=output/my_run scripts/sft_qwen3vl_8b.sh [--flag VALUE ...]
#
# Flags come last and override what stands here; train_qwen.py --help explains them. Machines, processes and DRY_RUN=1
# are explained in scripts/launch.sh.
set -euo pipefail

scripts="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
batch_size="${BATCH_SIZE:-4}" # samples on each GPU at once

arguments=(
    --model_name_or_path "${MODEL:-Qwen/Qwen3-VL-8B-Instruct}"
    --dataset_use "${DATASETS:-my_dataset}" # names of data/__init__.py
    --output_dir "${OUTPUT_DIR:-output/sft_qwen3vl_8b}"
    --tune_mm_llm True
    --tune_mm_mlp True
    --tune_mm_vision False
    --data_flatten True
    --model_max_length 8192
    --max_pixels 50176
    --min_pixels 784
    --num_train_epochs 0.5
    --per_device_train_batch_size "${batch_size}"
    --per_device_eval_batch_size "$((batch_size * 2))"
    --gradient_accumulation_steps "${GRAD_ACCUM:-4}"
    --learning_rate "${LR:-1e-5}"
    --lr_scheduler_type cosine
    --warmup_ratio 0.03
    --weight_decay 0
    --max_grad_norm 1
    --bf16 True
    --gradient_checkpointing True
    --dataloader_num_workers 4
    --logging_steps 1
    --save_strategy steps
    --save_steps 1000
    --save_total_limit 1
    --run_name "${RUN_NAME:-sft_qwen3vl_8b}"
)
deepspeed="${DEEPSPEED-${scripts}/../configs/zero3.json}" # DEEPSPEED= goes without
if [[ -n "${deepspeed}" ]]; then
    arguments+=(--deepspeed "${deepspeed}")
fi

exec "${scripts}/launch.sh" "${arguments[@]}" "$@"
