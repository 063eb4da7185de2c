#!/usr/bin/env bash
# Makes the environment, then runs the linters, the type check, the import contract and the tests; stops at the first failure.
#
#   bash scripts/test.sh [--long] [pytest arguments]
#
# --long          the tests marked "long" too
# TEST_WORKERS=N  processes that share the tests (default 2; 0 runs them in one, for a debugger)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/environment.sh
source scripts/environment.sh

stage() {
    local name="$1" started="$SECONDS" output status=0
    shift
    output="$("$@" 2>&1)" || status=$?
    if ((status != 0)); then
        printf '%s\n[test] %s: FAILED (%s)\n' "$output" "$name" "$*" >&2
        exit "$status"
    fi
    printf '[test] %s: passed in %d s\n' "$name" "$((SECONDS - started))"
}

markers="not long"
arguments=()
for argument in "$@"; do
    if [[ "$argument" == --long ]]; then markers=""; else arguments+=("$argument"); fi
done

use_environment dev
stage "ruff check" ruff check .
stage "ruff format" ruff format --check .
stage "mypy" mypy
stage "import contract" lint-imports
mapfile -t shell_scripts < <(find scripts .ci -type f \( -name '*.sh' -o -name '*.sbatch' -o -name run \) | sort)
stage "shellcheck" shellcheck -x "${shell_scripts[@]}"

# One thread a process: the workers and the ranks of distributed tests are the parallelism.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
printf '[test] pytest\n'
exec python -m pytest -m "$markers" -n "${TEST_WORKERS:-2}" --dist loadfile "${arguments[@]}"
