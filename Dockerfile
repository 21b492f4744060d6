# The service on a CPU. Build it at the root of the checkout:
#   docker build --tag llm4ehr .

FROM python:3.12-slim AS build
# The address of an index with CPU-only wheels of torch saves some gigabytes of CUDA libraries.
ARG PIP_EXTRA_INDEX_URL
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PATH=/opt/venv/bin:$PATH
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/venv
WORKDIR /src
# The pinned packages form a layer of their own, which changes with the pins alone.
COPY constraints.txt ./
RUN pip install --constraint constraints.txt "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml LICENSE README.md ./
COPY llm4ehr llm4ehr
COPY service service
COPY training training
# For example: otel
ARG EXTRAS
RUN pip install --constraint constraints.txt ".${EXTRAS:+[$EXTRAS]}"
# Beside the installed module; the image that runs has no compiler. Not from here, where the source is.
RUN cd / && python -m service.engine.backends.slot_kernel

FROM python:3.12-slim
# Numeric, so that Kubernetes can see that it is not root.
ARG UID=10001
RUN install --directory --owner=${UID} --group=${UID} --mode=0700 /var/lib/llm4ehr
COPY --from=build /opt/venv /opt/venv
COPY model_repository /opt/llm4ehr/model_repository
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    LLM4EHR_HOST=0.0.0.0 \
    LLM4EHR_PORT=8000 \
    LLM4EHR_LOG_PATH=/var/lib/llm4ehr/log.sqlite \
    LLM4EHR_MODEL_REPOSITORY=/opt/llm4ehr/model_repository
USER ${UID}:${UID}
WORKDIR /var/lib/llm4ehr
VOLUME /var/lib/llm4ehr
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f\"http://127.0.0.1:{os.environ['LLM4EHR_PORT']}/v2/health/live\", timeout=3)"]
CMD ["python", "-m", "service", "serve"]
