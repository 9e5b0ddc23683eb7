# syntax=docker/dockerfile:1
# One image for every role: `api`, `worker`, `migrate` are commands of the same entry point.
#   docker build .                                                   CPU, torch from the default index
#   docker build --build-arg TORCH_INDEX_URL=<CPU wheel index> .     CPU, without the CUDA libraries (2 GB smaller)
#   docker build --build-arg VARIANT=cuda .                          CUDA
ARG PYTHON_VERSION=3.11
ARG VARIANT=cpu

FROM python:${PYTHON_VERSION}-slim-bookworm AS build
ARG VARIANT
ARG TORCH_INDEX_URL=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/headwater
ENV PATH="/opt/headwater/bin:$PATH"
WORKDIR /src
COPY constraints.txt ./
RUN case "$VARIANT" in cpu|cuda) ;; *) echo "VARIANT is cpu or cuda, not '$VARIANT'" >&2; exit 1 ;; esac \
    && pip install --constraint constraints.txt ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch
COPY pyproject.toml README.md ./
COPY app app
COPY attribution_core attribution_core
COPY migrations migrations
RUN pip install --constraint constraints.txt ".[hf]"

FROM python:${PYTHON_VERSION}-slim-bookworm AS runtime
ARG VARIANT
LABEL org.opencontainers.image.title="headwater" org.opencontainers.image.licenses="Apache-2.0" headwater.variant="${VARIANT}"
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --create-home --home-dir /var/lib/headwater headwater \
    && mkdir -p /var/lib/headwater/data \
    && chown -R headwater:headwater /var/lib/headwater
COPY --from=build /opt/headwater /opt/headwater
COPY alembic.ini /opt/headwater/alembic.ini
ENV PATH="/opt/headwater/bin:$PATH" \
    PYTHONUNBUFFERED=1 \
    HEADWATER_DATA_DIR=/var/lib/headwater/data \
    HEADWATER_LOG_FORMAT=json \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER headwater
WORKDIR /var/lib/headwater
VOLUME ["/var/lib/headwater/data"]
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=6 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/livez', timeout=4)"]
ENTRYPOINT ["tini", "--", "headwater"]
CMD ["api", "--host", "0.0.0.0", "--port", "8000"]
