# syntax=docker/dockerfile:1
# The service. Build it at the root of the checkout:
#   docker build --tag llm4ehr .
#   docker build --tag llm4ehr:gpu --target gpu .
# It runs as a numeric user on a read-only root; only /var/lib/llm4ehr and /tmp need be writable.

# To pin it for good, name the digest: --build-arg PYTHON_IMAGE=python@sha256:...
ARG PYTHON_IMAGE=python:3.12.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# Where to find a wheel of torch that is for a CPU alone, which saves some gigabytes of CUDA
# libraries. It goes with TORCH=torch-cpu, a file that `make lock` writes for that very index.
ARG PIP_EXTRA_INDEX_URL
ARG TORCH=torch
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_NO_DEPS=1 \
    PIP_ONLY_BINARY=:all: \
    PIP_PYTHON=/opt/venv/bin/python \
    PIP_REQUIRE_HASHES=1
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
# Without pip: what runs installs nothing.
RUN python -m venv --without-pip /opt/venv
# The locked packages form layers of their own, which change with the locks alone.
COPY deploy/requirements /requirements
RUN pip install --requirement "/requirements/${TORCH}.txt"

FROM build AS build-cpu
# `onnx` brings ONNX Runtime as well.
ARG REQUIREMENTS=service
RUN pip install --requirement "/requirements/${REQUIREMENTS}.txt"
WORKDIR /opt/llm4ehr
COPY llm4ehr llm4ehr
COPY service service
# Beside its source, for there is no compiler where it runs.
RUN /opt/venv/bin/python -m service.engine.backends.slot_kernel

FROM build AS build-gpu
RUN pip install --requirement /requirements/gpu.txt

FROM ${PYTHON_IMAGE} AS base
# Numeric, so that Kubernetes can see that it is not root.
ARG UID=10001
RUN install --directory --owner="${UID}" --group="${UID}" --mode=0700 /var/lib/llm4ehr \
    && rm -rf /usr/local/lib/python3*/site-packages/pip* /usr/local/lib/python3*/ensurepip \
        /usr/local/bin/pip*
COPY LICENSE /opt/llm4ehr/LICENSE
COPY model_repository /opt/llm4ehr/model_repository
# Nothing is imported from the folder that can be written, which is where it runs.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONFAULTHANDLER=1 \
    PYTHONPATH=/opt/llm4ehr \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    XDG_CACHE_HOME=/tmp \
    LLM4EHR_HOST=0.0.0.0 \
    LLM4EHR_PORT=8000 \
    LLM4EHR_LOG_FORMAT=json \
    LLM4EHR_LOG_PATH=/var/lib/llm4ehr/log.sqlite \
    LLM4EHR_MODEL_REPOSITORY=/opt/llm4ehr/model_repository
WORKDIR /var/lib/llm4ehr
VOLUME /var/lib/llm4ehr
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f\"http://127.0.0.1:{os.environ['LLM4EHR_PORT']}/v2/health/live\", timeout=3)"]
CMD ["python", "-m", "service", "serve"]

FROM base AS gpu
# Triton compiles its kernel for the device that it finds: this target needs a compiler.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build-gpu /opt/venv /opt/venv
COPY llm4ehr /opt/llm4ehr/llm4ehr
COPY service /opt/llm4ehr/service
ARG UID=10001
ENV LLM4EHR_BACKEND=torch-cuda \
    TRITON_CACHE_DIR=/tmp/triton
USER ${UID}:${UID}

FROM base AS cpu
COPY --from=build-cpu /opt/venv /opt/venv
COPY --from=build-cpu /opt/llm4ehr /opt/llm4ehr
ARG UID=10001
USER ${UID}:${UID}
