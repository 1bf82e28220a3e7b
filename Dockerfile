# Two images from one file: `app` (API, migrations; no torch) and `worker` (trainer and engine).
#   docker build --target app -t stillhouse-app .
#   docker build --target worker -t stillhouse-worker .
FROM python:3.11-slim AS base
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN useradd --create-home --uid 10001 stillhouse && mkdir /data && chown stillhouse /data
WORKDIR /srv/stillhouse
COPY pyproject.toml README.md LICENSE ./
COPY app app
COPY migrations migrations

FROM base AS app
RUN pip install --editable '.[s3,otel,trackers]'
USER stillhouse
ENV STILLHOUSE_DATA_DIR=/data STILLHOUSE_HOST=0.0.0.0
EXPOSE 8400
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8400/health/live', timeout=2)"]
CMD ["stillhouse", "api"]

FROM base AS worker
# for the C kernels of workers on a CPU (worker/cpu/kernels)
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY worker worker
# A worker on another type of processor builds them again.
RUN pip install --editable '.[worker,s3,otel]' && stillhouse kernels build
USER stillhouse
ENV STILLHOUSE_DATA_DIR=/data HF_HUB_OFFLINE=1
STOPSIGNAL SIGTERM
CMD ["stillhouse", "train-worker"]
