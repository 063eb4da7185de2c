#!/usr/bin/env bash
# Makes the environment, then runs the linters, the type check, the import contract and the tests; stops at the first failure.
#
#   bash scripts/test.sh [--long] [pytest arguments]
#   bash scripts/test.sh --versions [pytest arguments]
#   bash scripts/test.sh --clients [pytest arguments]
#
# --long          the tests marked "long" too
# --versions      only the tests of tests/core.txt, twice: with the lower bounds of requirements.txt on the oldest Python that
#                 is found, then with the newest releases on the newest Python; in environments of their own, .venv-oldest
#                 and .venv-newest, and without FFmpeg. Remove .venv-newest to have releases that appeared after it was made.
# --clients       only tests/clients: saved folders in vLLM (on the CPU), transformers 4.57, lmms-eval and llama.cpp, which
#                 get environments of their own in .venv-clients; see scripts/clients.sh. Writes what each test found into
#                 docs/compatibility.md. About half an hour on two cores.
# TEST_WORKERS=N  processes that share the tests (default 2; 0 runs them in one, for a debugger)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/clients.sh
source scripts/clients.sh

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

# One thread a process: the workers and the ranks of distributed tests are the parallelism.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

run_pytest() { python -m pytest -n "${TEST_WORKERS:-2}" --dist loadfile "$@"; }

# The loader tries the folders of LD_LIBRARY_PATH first, and an empty file is no library: torchcodec finds no FFmpeg.
hide_ffmpeg() {
    local folder="$VIRTUAL_ENV/no-ffmpeg"
    mkdir -p "$folder"
    touch "$folder"/libavutil.so.{56..69}
    export LD_LIBRARY_PATH="$folder${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
}

test_versions() (
    kind="$1" VENV="${VENV:-$PWD/.venv}-$1"
    shift
    use_environment "$kind"
    hide_ffmpeg
    printf '[test] %s versions: %s, %s\n' "$kind" "$(python --version)" \
        "$(python -m pip freeze | grep -E '^(torch|transformers|accelerate|deepspeed|peft)==' | paste -sd ' ')"
    run_pytest -m "not long" @tests/core.txt "$@"
)

markers="not long"
versions="" clients=""
arguments=()
for argument in "$@"; do
    case "$argument" in
        --long) markers="" ;;
        --versions) versions=yes ;;
        --clients) clients=yes ;;
        *) arguments+=("$argument") ;;
    esac
done

if [[ -n "$versions" ]]; then
    for kind in oldest newest; do test_versions "$kind" "${arguments[@]}"; done
    exit
fi

use_environment dev
if [[ -n "$clients" ]]; then
    use_clients
    CLIENTS_RECORD="$PWD/docs" python -m pytest -n 0 tests/clients "${arguments[@]}"
    exit
fi
stage "ruff check" ruff check .
stage "ruff format" ruff format --check .
stage "mypy" mypy
stage "import contract" lint-imports
mapfile -t shell_scripts < <(find scripts .ci -type f \( -name '*.sh' -o -name '*.sbatch' -o -name run \) | sort)
stage "shellcheck" shellcheck -x "${shell_scripts[@]}"

printf '[test] pytest\n'
run_pytest -m "$markers" "${arguments[@]}"
