#!/usr/bin/env bash
# Trains a tiny Qwen3.5 from random weights on a mixture of plain and thinking answers, and asks it both ways about digits
# it has never seen: one model, which thinks when it is asked to. About ten minutes on two cores.
#
#   bash scripts/demo_thinking.sh [--flag VALUE ...]     flags of train_qwen.py, such as --max_steps 20 for a quick look
#
# DEMO_DIR=PATH     everything it makes, apart from the environment (default: demo in the repository)
# COUNT=N           comparisons to learn from (default 2000); a twentieth of them to evaluate on
# VENV=PATH         the virtual environment, see scripts/environment.sh
set -euo pipefail
root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=scripts/environment.sh
source "$root/scripts/environment.sh"

mkdir -p "${DEMO_DIR:-$root/demo}"
DEMO_DIR="$(cd -- "${DEMO_DIR:-$root/demo}" && pwd)"
export DEMO_DIR # data/__init__.py reads it
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
use_environment

python "$root/tools/make_demo_data.py" --output "$DEMO_DIR/data"
python "$root/examples/thinking/mixture.py" --data "$DEMO_DIR/data" --count "${COUNT:-2000}"
python "$root/tools/make_tiny_checkpoint.py" --family qwen3_5 --size demo --output "$DEMO_DIR/thinking_base"
PYTHON=python bash "$root/scripts/launch.sh" "$root/configs/demo.yaml" --model_name_or_path "$DEMO_DIR/thinking_base" \
    --dataset_use "demo_digits%150,demo_compare" --eval_strategy no --eval_generate 0 --max_pixels "64*64" \
    --output_dir "$DEMO_DIR/thinking_model" "$@"
for kind in plain thinking; do
    python "$root/tools/evaluate.py" --model_name_or_path "$DEMO_DIR/thinking_model" \
        --dataset_use "demo_compare_${kind}_heldout" --max_new_tokens 24 --output "$DEMO_DIR/thinking_${kind}"
done
