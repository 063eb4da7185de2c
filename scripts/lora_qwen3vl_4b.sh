#!/usr/bin/env bash
# LoRA on Qwen3-VL-4B with the values of configs/lora_qwen3vl_4b.yaml. Written by scripts/recipes.py.
#
#   DATASETS=my_dataset%50,other OUTPUT_DIR=output/my_run scripts/lora_qwen3vl_4b.sh [--flag VALUE ...]
#
# What the environment overrides is listed in scripts/sft.sh; train_qwen.py --help explains the flags.
set -euo pipefail
exec "$(dirname -- "${BASH_SOURCE[0]}")/sft.sh" lora_qwen3vl_4b "$@"
