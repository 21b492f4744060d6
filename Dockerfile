# syntax=docker/dockerfile:1
# The service. Build it at the root of the checkout:
#   docker build --tag llm4ehr .
#   docker build --tag llm4ehr:gpu --target gpu .
# It runs as a numeric user on a read-only root; only /var/lib/llm4ehr and /tmp need be writable.

# To pin it for good, name the digest: --build-arg PYTHON_IMAGE=python@sha256:...
ARG PYTHON_IMAGE=python:3.12.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# Where to find wheels of torch that are for a CPU alone: that saves some gigabytes of CUDA libraries.
ARG PIP_EXTRA_INDEX_URL
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_PYTHON=/opt/venv/bin/python
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
# Without pip: what runs installs nothing.
RUN python -m venv --without-pip /opt/venv
WORKDIR /src
# The pinned packages form a layer of their own, which changes with the pins alone.
COPY constraints.txt ./
RUN pip install --constraint constraints.txt "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml LICENSE README.md ./
COPY llm4ehr llm4ehr
COPY service service

FROM build AS build-cpu
# For example: onnx,otel
ARG EXTRAS
RUN pip install --constraint constraints.txt ".${EXTRAS:+[$EXTRAS]}"
# Beside the installed module, for there is no compiler where it runs. Not from here, where the
# source is.
WORKDIR /
RUN /opt/venv/bin/python -m service.engine.backends.slot_kernel

FROM build AS build-gpu
ARG EXTRAS=gpu
RUN pip install --constraint constraints.txt ".[$EXTRAS]"

FROM ${PYTHON_IMAGE} AS base
# Numeric, so that Kubernetes can see that it is not root.
ARG UID=10001
RUN install --directory --owner="${UID}" --group="${UID}" --mode=0700 /var/lib/llm4ehr \
    && rm -rf /usr/local/lib/python3*/site-packages/pip* /usr/local/lib/python3*/ensurepip \
        /usr/local/bin/pip*
COPY model_repository /opt/llm4ehr/model_repository
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONFAULTHANDLER=1 \
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
ARG UID=10001
ENV LLM4EHR_BACKEND=torch-cuda \
    TRITON_CACHE_DIR=/tmp/triton
USER ${UID}:${UID}

FROM base AS cpu
COPY --from=build-cpu /opt/venv /opt/venv
ARG UID=10001
USER ${UID}:${UID}
