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
# The command is made by tools/serve.py (also: qwenvl serve). For images and videos in requests see docs/serving.md.
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python}"
if [[ -z "${PYTHON:-}${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" && -x "$root/.venv/bin/python" ]]; then
    python="$root/.venv/bin/python"
fi
exec "$python" "$root/tools/serve.py" "$@"
