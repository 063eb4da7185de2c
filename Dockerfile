# The trainer with CUDA, the declared versions and FFmpeg; docs/install.md says how to build and run it.
# The CUDA of the PyTorch wheels (python -c "import torch; print(torch.version.cuda)"): DeepSpeed compiles with its nvcc.
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-devel-ubuntu24.04
FROM ${CUDA_IMAGE}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# gcc and the Python headers: Triton and DeepSpeed compile kernels at run time. FFmpeg: torchcodec decodes videos with it.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        build-essential ffmpeg git python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/qwenvl/.venv \
    PATH=/opt/qwenvl/.venv/bin:${PATH} \
    PYTHONUNBUFFERED=1

WORKDIR /opt/qwenvl

# Before the code, so that a change of code does not install torch anew.
COPY requirements.txt .
RUN python3 -m venv "${VIRTUAL_ENV}" \
    && pip install --no-cache-dir -r requirements.txt

COPY . .
# Editable: configs/, scripts/ and the registry data/__init__.py of this folder are those that qwenvl finds.
RUN pip install --no-cache-dir --no-deps --editable .

WORKDIR /workspace
ENTRYPOINT ["qwenvl"]
CMD ["--help"]
