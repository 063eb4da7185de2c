#!/usr/bin/env bash
# LoRA on Qwen3.6-35B-A3B with the values of configs/lora_qwen3_6_35b_a3b.yaml. Written by scripts/recipes.py.
#
#   DATASETS=my_dataset%50,other OUTPUT_DIR=output/my_run scripts/lora_qwen3_6_35b_a3b.sh [--flag VALUE ...]
#
# What the environment overrides is listed in scripts/sft.sh; train_qwen.py --help explains the flags.
set -euo pipefail
exec "$(dirname -- "${BASH_SOURCE[0]}")/sft.sh" lora_qwen3_6_35b_a3b "$@"
