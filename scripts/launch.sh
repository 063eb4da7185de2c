#!/usr/bin/env bash
# Starts qwenvl/train/train_qwen.py through torchrun on this machine's devices, with the flags given:
#
#   scripts/launch.sh configs/sft_qwen3vl_4b.yaml --dataset_use my_dataset --output_dir output/my_run
#
# From the environment, all optional:
#   NPROC_PER_NODE  processes on this machine; default: one for each GPU, else 1
#   NNODES          number of machines; on each of them run the same command with its own NODE_RANK
#   NODE_RANK       number of this machine, from 0
#   MASTER_ADDR     address of machine 0
#   MASTER_PORT     a free port of machine 0; default: 29500, on one machine any from 20001 to 29999
#   OMP_NUM_THREADS threads of each process; default: its share of the cores
#   PYTHON          the Python to use; default: .venv of the repository where it exists and no other is active
#   DRY_RUN=1       print the command instead of running it
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"

count_devices() {
    local count=0
    if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
        count="$(tr ',' '\n' <<<"${CUDA_VISIBLE_DEVICES}" | grep -c . || true)"
    elif command -v nvidia-smi >/dev/null; then
        count="$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)"
    fi
    echo $((count > 0 ? count : 1))
}

python="${PYTHON:-python}"
if [[ -z "${PYTHON:-}${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" && -x "${root}/.venv/bin/python" ]]; then
    python="${root}/.venv/bin/python"
fi

nnodes="${NNODES:-1}"
if [[ "${nnodes}" != 1 && -z "${MASTER_ADDR:-}" ]]; then
    echo "NNODES=${nnodes}: set MASTER_ADDR to the address of machine 0, and NODE_RANK on each machine." >&2
    exit 2
fi
default_port=29500
if [[ "${nnodes}" == 1 ]]; then
    default_port=$((20001 + RANDOM % 9999)) # so that two runs on one machine do not meet
fi

processes="${NPROC_PER_NODE:-$(count_devices)}"
# torchrun gives each of several processes one thread, with which Adam on offloaded weights takes minutes a step.
if [[ -z "${OMP_NUM_THREADS:-}" ]]; then
    cores="$(nproc 2>/dev/null || echo 1)"
    export OMP_NUM_THREADS=$((cores > processes ? cores / processes : 1))
fi

command=(
    "${python}" "${root}/qwenvl/train/launch.py" # torchrun, without a traceback of its own
    --nnodes "${nnodes}"
    --node_rank "${NODE_RANK:-0}"
    --nproc_per_node "${processes}"
    --master_addr "${MASTER_ADDR:-127.0.0.1}"
    --master_port "${MASTER_PORT:-${default_port}}"
    "${root}/qwenvl/train/train_qwen.py" "$@"
)
if [[ "${DRY_RUN:-0}" == 1 ]]; then
    printf '%q ' "${command[@]}"
    echo
else
    exec "${command[@]}"
fi
