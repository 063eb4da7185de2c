#!/usr/bin/env bash
# The virtual environment that demo.sh and test.sh share.
#
#   bash scripts/environment.sh [KIND]                    make it
#   source scripts/environment.sh; use_environment [KIND] make it, and put its programs first on PATH
#
# KIND: nothing  what requirements.txt names
#       dev      the tools of the tests too
#       oldest   as dev, requirements.txt at its lower bounds, with the oldest Python that is found
#       newest   as dev, the newest releases within the ranges, with the newest Python that is found
#
# VENV=PATH     use that folder in place of .venv in the repository; one that exists is added to, never cleared
# PYTHON=PATH   make it with that Python (3.10 or newer)
#
# A second run sees from a stamp, written last, that nothing changed, and takes no time. An interrupted run is finished by
# the next one.

ENVIRONMENT_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

_say() { printf '[environment] %s\n' "$*" >&2; }

_fail() {
    printf '[environment] error: %s\n' "$*" >&2
    exit 1
}

# Prints the path of a Python that is recent enough. Version managers leave a python3.x on PATH that only prints an error,
# so each candidate is run, not just found; pyenv's runs when it is told its version.
_recent_python() {
    local version="${1#python}"
    [[ "$version" != 3.* ]] || local -x PYENV_VERSION="$version"
    "$1" -c 'import sys; sys.exit(print(sys.executable) if sys.version_info >= (3, 10) else 1)' 2>/dev/null
}

_find_python() {
    local candidate candidates
    case "${1:-}" in
        oldest) candidates=(python3.1{0..3} python3 python) ;;
        newest) candidates=(python3.1{3..0} python3 python) ;;
        *) candidates=(python3 python3.1{3..0} python) ;;
    esac
    if [[ -n "${PYTHON:-}" ]]; then
        _recent_python "$PYTHON" || _fail "PYTHON=$PYTHON is not a Python 3.10 or newer that runs."
        return
    fi
    for candidate in "${candidates[@]}"; do
        ! _recent_python "$candidate" || return 0
    done
    _fail "no Python 3.10 or newer found. Install one (sudo apt install python3 python3-venv), or name it: PYTHON=/path/to/python3"
}

_works() { "$1/bin/python" -m pip --version >/dev/null 2>&1; }

_make_venv() {
    local venv="$1" python
    if [[ -e "$venv" && ! -f "$venv/pyvenv.cfg" && -n "$(ls -A "$venv")" ]]; then
        _fail "$venv exists and is not a virtual environment. Choose another folder with VENV=PATH."
    fi
    python="$(_find_python "${2:-}")" || exit 1
    # Debian and Ubuntu ship these two modules in a package of their own.
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        _fail "$("$python" --version) has no venv module. Install it: sudo apt install python3-venv"
    _say "making $venv with $("$python" --version)"
    "$python" -m venv "$venv" || _fail "$python could not make $venv (its message is above)."
}

# pip writes INSTALLER after all of a package's files: without it the package was cut off half-way, and pip, which looks at
# the folder alone, would take it for installed.
_drop_half_installed() {
    find "$1" -type d -name '*.dist-info' -path '*/site-packages/*' -prune \
        ! -exec test -e '{}/INSTALLER' \; -exec rm -rf '{}' +
}

# One line that tells how long pip has been at it and what it does; where nobody watches, one line a minute.
_show_progress() {
    local pip_pid="$1" log="$2" started="$SECONDS" next_line=60 elapsed last
    while kill -0 "$pip_pid" 2>/dev/null; do
        elapsed=$((SECONDS - started))
        last="$(tail -n 1 "$log" 2>/dev/null | cut -c 1-80)"
        if [[ -t 2 ]]; then
            printf '\r\033[K[environment] %4d s  %s' "$elapsed" "$last" >&2
        elif ((elapsed >= next_line)); then
            _say "$elapsed s  $last"
            next_line=$((elapsed + 60))
        fi
        sleep 0.5
    done
    [[ ! -t 2 ]] || printf '\r\033[K' >&2
}

_install() {
    local venv="$1" log="$1/install.log" pip_pid started="$SECONDS"
    shift
    _say "installing (about 6 GB with torch; the log is $log)"
    _drop_half_installed "$venv"
    # pip unpacks in TMPDIR, and /tmp is often a small memory disk.
    mkdir -p "$venv/tmp"
    TMPDIR="$venv/tmp" "$venv/bin/python" -m pip install --disable-pip-version-check --no-input "$@" >"$log" 2>&1 &
    pip_pid=$!
    trap 'kill "$pip_pid" 2>/dev/null; wait "$pip_pid" 2>/dev/null || true; exit 130' INT TERM
    _show_progress "$pip_pid" "$log"
    if ! wait "$pip_pid"; then
        tail -n 15 "$log" >&2
        _fail "pip could not install the requirements; the end of $log is above. Run the same command again to continue."
    fi
    trap - INT TERM
    rm -rf "$venv/tmp"
    _say "installed in $((SECONDS - started)) s"
}

_digest() { cat "$@" | cksum; }

# The lower bounds of requirements.txt as pip's constraints: "name>=1.2,<2; marker" becomes "name==1.2; marker".
oldest_versions() { sed -nE 's/^([A-Za-z0-9_.-]+)>=([^,;]+),<[^,;]+/\1==\2/p' "$ENVIRONMENT_ROOT/requirements.txt"; }

# _make_environment VENV [KIND], in a subshell: an error ends the subshell, and the caller sees its status.
_make_environment() (
    set -euo pipefail
    venv="$1" kind="${2:-}" options=()
    runtime="$ENVIRONMENT_ROOT/requirements.txt"
    dev="$ENVIRONMENT_ROOT/requirements-dev.txt"
    case "$kind" in
        "") files=("$runtime") stamp="$venv/.stamp-runtime" ;;
        dev | oldest | newest) files=("$runtime" "$dev") stamp="$venv/.stamp-$kind" ;;
        *) _fail "unknown kind '$kind': dev, oldest, newest or nothing." ;;
    esac
    is_current() { [[ -f "$stamp" && "$(cat "$stamp")" == "$(_digest "${files[@]}")" ]] && "$venv/bin/python" -c ""; }
    ! is_current || exit 0
    mkdir -p "$(dirname "$venv")" || _fail "cannot write $(dirname "$venv"). Choose another folder with VENV=PATH."
    if command -v flock >/dev/null; then # two runs at once: the second waits, then finds the work done
        exec 9>"$venv.lock"
        flock -n 9 || { _say "waiting for another run that is making $venv" && flock 9; }
        ! is_current || exit 0
    fi
    _works "$venv" || _make_venv "$venv" "$kind"
    rm -f "$venv"/.stamp-*
    for file in "${files[@]}"; do options+=(-r "$file"); done
    case "$kind" in
        oldest) oldest_versions >"$venv/oldest.txt" && options+=(-c "$venv/oldest.txt") ;;
        newest) options+=(--upgrade) ;;
    esac
    _install "$venv" "${options[@]}"
    _digest "$runtime" >"$venv/.stamp-runtime"
    _digest "${files[@]}" >"$stamp"
)

use_environment() {
    local venv="${VENV:-$ENVIRONMENT_ROOT/.venv}"
    [[ "$venv" == /* ]] || venv="$PWD/$venv"
    _make_environment "$venv" "${1:-}" || return
    export VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH"
    hash -r
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
    use_environment "$@"
fi
