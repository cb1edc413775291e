# Two images: the trainer, which `docker build .` makes, and the tutorial in JupyterLab (--target notebook).
# docs/containers.md tells how to build, run and change them.

ARG BASE_IMAGE=python:3.11-slim
FROM ${BASE_IMAGE} AS python
WORKDIR /app
# Any user may run the images, even one without a home.
ENV HOME=/tmp PYTHONUNBUFFERED=1

# uv installs the packages, and stays out of the images. UV_DEFAULT_INDEX names another package index.
FROM python AS uv
ARG UV_DEFAULT_INDEX
RUN PIP_INDEX_URL="${UV_DEFAULT_INDEX}" pip install --no-cache-dir uv==0.13.8

# PyTorch, in the build that UV_TORCH_BACKEND names: cpu is far smaller, and without it you get CUDA.
# Byte-code is compiled now, for a user who is not root could not keep it.
FROM python AS packages
ARG UV_DEFAULT_INDEX
ARG UV_TORCH_BACKEND
ARG REQUIREMENTS=docker/requirements.in
COPY ${REQUIREMENTS} requirements.in
COPY requirements.txt ./
RUN --mount=from=uv,source=/usr/local/bin/uv,target=/usr/local/bin/uv \
    uv pip install --system --system-certs --no-cache --compile-bytecode \
    -r requirements.in -c requirements.txt && rm -f /tmp/uv-*.lock

# The digits. The trainer checks them whenever it reads them.
FROM python AS data
COPY datasets datasets
RUN gunzip datasets/MNIST/raw/*.gz

FROM packages AS notebook
LABEL org.opencontainers.image.title="MNIST tutorial in JupyterLab" \
      org.opencontainers.image.licenses="Apache-2.0 AND CC-BY-SA-3.0"
# Tk, for a person who wants matplotlib's windows. Any version will do.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends libtk8.6 && rm -rf /var/lib/apt/lists/*
ARG UV_DEFAULT_INDEX
COPY requirements.in ./
RUN --mount=from=uv,source=/usr/local/bin/uv,target=/usr/local/bin/uv \
    uv pip install --system --system-certs --no-cache --compile-bytecode \
    -r requirements.in -c requirements.txt && rm -f /tmp/uv-*.lock
COPY --from=data /app/datasets datasets
COPY LICENSE mnist.py pytorchjob-mnist.yaml ./
COPY notebooks/mnist.ipynb notebooks/draw.js notebooks/
# The notebook writes the trainer and the manifest, so any user of group 0 may.
RUN mkdir output && chmod g=u . output notebooks notebooks/mnist.ipynb mnist.py pytorchjob-mnist.yaml
USER 1000:0
EXPOSE 8888
CMD ["jupyter", "lab", "--ip=0.0.0.0", "--no-browser"]

FROM packages AS trainer
LABEL org.opencontainers.image.title="MNIST trainer" \
      org.opencontainers.image.licenses="Apache-2.0 AND CC-BY-SA-3.0"
RUN install -d -m 775 output
COPY --from=data /app/datasets datasets
COPY LICENSE ./
# Last, for it changes most. A trainer of your own takes the place of mnist.py.
ARG TRAINER=mnist.py
COPY ${TRAINER} mnist.py
USER 1000:0
ENTRYPOINT ["python", "mnist.py"]
