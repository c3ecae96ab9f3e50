# The image of docs/cluster.md: train.py and all commands, without models or data.
# torch 2.13 from PyPI brings its own CUDA 13.0 libraries; of the base image it needs the settings for
# the NVIDIA driver alone.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

# Triton compiles a launcher for each kernel where it first runs: with gcc and Python's headers.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# A user of its own. Any other (docker run --user) can write the caches, too.
RUN useradd --create-home --uid 1001 qlora \
    && mkdir --mode 1777 /cache
ENV HF_HOME=/cache/huggingface \
    QLORA_CACHE=/cache/qlora \
    TRITON_CACHE_DIR=/cache/triton \
    MPLCONFIGDIR=/cache/matplotlib \
    PATH=/opt/venv/bin:$PATH

WORKDIR /opt/qlora
# torch first: its layer of gigabytes stays when the program changes.
COPY constraints.txt ./
RUN python3 -m venv /opt/venv \
    && pip install --no-cache-dir --constraint constraints.txt torch
COPY . ./
RUN pip install --no-cache-dir --constraint constraints.txt --editable '.[evaluate]'

USER 1001
CMD ["python", "train.py", "--help"]
