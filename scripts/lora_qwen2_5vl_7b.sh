#!/usr/bin/env bash
# LoRA on Qwen2.5-VL-7B with the values of configs/lora_qwen2_5vl_7b.yaml. Written by scripts/recipes.py.
#
#   DATASETS=my_dataset%50,other OUTPUT_DIR=output/my_run scripts/lora_qwen2_5vl_7b.sh [--flag VALUE ...]
#
# What the environment overrides is listed in scripts/sft.sh; train_qwen.py --help explains the flags.
set -euo pipefail
exec "$(dirname -- "${BASH_SOURCE[0]}")/sft.sh" lora_qwen2_5vl_7b "$@"
