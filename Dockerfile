# syntax=docker/dockerfile:1
# The trainer and SGLang for nodes of H100: CUDA 13.0, Python 3.12. docs/install.md has the same steps without a container,
# and what of this file has never been run.
ARG CUDA_IMAGE=nvcr.io/nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04
# hadolint ignore=DL3006
FROM ${CUDA_IMAGE}

ARG REVISION=unknown
ARG JOBS=4
LABEL org.opencontainers.image.title="fipo_megatron" \
      org.opencontainers.image.description="A Megatron-Core trainer for FIPO, with SGLang in an environment of its own" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}"

ENV PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1 \
    PATH=/opt/fipo/trainer/bin:${PATH}
WORKDIR /opt/fipo/source

# What takes long comes first and does not depend on the sources of the package.
COPY tools/install tools/install
RUN tools/install/system.sh
COPY constraints constraints
COPY pyproject.toml README.md LICENSE ./
RUN tools/install/trainer.sh --device gpu --venv /opt/fipo/trainer --package none
RUN tools/install/extensions.sh --venv /opt/fipo/trainer --jobs "${JOBS}"
RUN tools/install/nccl.sh --venv /opt/fipo/trainer
RUN tools/install/sglang.sh --device gpu --venv /opt/fipo/sglang
COPY fipo_megatron fipo_megatron
COPY examples examples
RUN tools/install/package.sh --venv /opt/fipo/trainer
RUN tools/install/check.sh --device gpu --venv /opt/fipo/trainer --sglang-venv /opt/fipo/sglang

# The user "ubuntu" of the base image. Models, data and run.output are mounted.
USER 1000:1000
WORKDIR /workspace
ENTRYPOINT []
CMD ["fipo", "--help"]
