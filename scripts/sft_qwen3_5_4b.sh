#!/usr/bin/env bash
# Full fine-tuning of Qwen3.5-4B with the values of configs/sft_qwen3_5_4b.yaml. Written by scripts/recipes.py.
#
#   DATASETS=my_dataset%50,other OUTPUT_DIR=output/my_run scripts/sft_qwen3_5_4b.sh [--flag VALUE ...]
#
# What the environment overrides is listed in scripts/sft.sh; train_qwen.py --help explains the flags.
set -euo pipefail
exec "$(dirname -- "${BASH_SOURCE[0]}")/sft.sh" sft_qwen3_5_4b "$@"
