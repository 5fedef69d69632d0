# syntax=docker/dockerfile:1
# The worker, for linux/amd64, without weights: those come at the first cold start, to MODEL_DIR.
#
# torch brings its own CUDA 13.0 libraries, so the base has only what they expect around them; it
# asks for a driver of CUDA 13.0 or later (R580), as `allowedCudaVersions` in .runpod/hub.json says.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

# gcc and the Python headers: Triton compiles its launchers at run time. tini reaps and passes on
# signals, so that the SDK's ping process ends with the worker.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        ca-certificates gcc libc6-dev python3.12 python3.12-dev python3.12-venv tini \
    && rm -rf /var/lib/apt/lists/* \
    && python3.12 -m venv /venv

# MALLOC_MMAP_THRESHOLD_: without it, glibc keeps gigabytes of decoded pictures that are long freed.
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    MALLOC_MMAP_THRESHOLD_=8388608 \
    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True

WORKDIR /app

# Dependencies in a layer of their own: they are gigabytes, and change seldom.
COPY requirements.txt .
RUN pip install -r requirements.txt

COPY pyproject.toml README.md handler.py test_input.json ./
COPY src src
RUN pip install --no-deps . && rm -rf build src

ENV MODEL=edit-2509 \
    MODEL_DIR=/models/qwen_image_edit_2509 \
    API_HOST=0.0.0.0 \
    HOME=/home/worker

# RunPod mounts network volumes for root, so root is the default; without one, build with
# --build-arg RUN_AS=worker for a user without rights.
ARG RUN_AS=root
RUN useradd --create-home --uid 10001 worker \
    && mkdir -p "$MODEL_DIR" /home/worker \
    && chown -R "$RUN_AS" /models /home/worker /app
USER $RUN_AS

EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=10s --start-period=15m \
    CMD ["python", "-m", "image_worker.serve.health"]
ENTRYPOINT ["tini", "--"]
CMD ["python", "handler.py"]
