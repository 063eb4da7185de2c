#!/usr/bin/env bash
# Trains a tiny Qwen3-VL from random weights to say what is drawn, freezes it, learns masks of its phrases from its
# attention, prints how well they fit on scenes it has never seen, and draws a page. Ten minutes on two cores that had
# other work.
#
#   bash scripts/demo_masks.sh [--flag VALUE ...]     flags of train_qwen.py for both trainings, such as --max_steps 5
#
# DEMO_DIR=PATH     everything it makes, apart from the environment (default: demo in the repository)
# SCENES=N          scenes to learn from (default 3000); a fifteenth of them to evaluate on
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

scenes="${SCENES:-3000}"
python "$root/tools/make_mask_data.py" --output "$DEMO_DIR/mask_scenes" --train "$scenes" --heldout "$((scenes / 15))"
python "$root/tools/make_tiny_checkpoint.py" --family qwen3_vl --size demo --output "$DEMO_DIR/mask_base"
PYTHON=python bash "$root/scripts/launch.sh" "$root/configs/demo.yaml" --model_name_or_path "$DEMO_DIR/mask_base" \
    --dataset_use demo_masks --eval_dataset_use demo_masks_heldout --max_pixels "128*192" --max_steps 700 \
    --per_device_train_batch_size 12 --eval_steps 350 --output_dir "$DEMO_DIR/mask_model" "$@"
PYTHON=python bash "$root/scripts/launch.sh" "$root/configs/demo_masks.yaml" \
    --model_name_or_path "$DEMO_DIR/mask_model" --output_dir "$DEMO_DIR/masks" "$@"
asked=(--model_name_or_path "$DEMO_DIR/masks" --dataset_use demo_masks_heldout --min_pixels "64*64" --max_pixels "128*192")
python "$root/tools/evaluate_masks.py" "${asked[@]}" --known_use demo_masks
python "$root/tools/show_attention.py" "${asked[@]}" --output "$DEMO_DIR/attention.html"
