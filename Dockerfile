# Two images: the trainer, which `docker build .` makes, and the tutorial in JupyterLab (--target notebook).
# docs/containers.md tells how to build, run and change them.

ARG BASE_IMAGE=python:3.11-slim
FROM ${BASE_IMAGE} AS python
# cpu takes PyTorch's build without CUDA, a fifth of the size.
ARG UV_TORCH_BACKEND
# A package index of your own.
ARG PIP_INDEX_URL
WORKDIR /app
# Any user may run the images, one without a home too.
ENV HOME=/tmp PYTHONUNBUFFERED=1

# uv installs the packages, and is not in the images.
FROM python AS uv
RUN pip install --no-cache-dir uv==0.13.8

FROM python AS packages
ARG REQUIREMENTS=docker/requirements.in
COPY ${REQUIREMENTS} requirements.in
# A list of versions, not of packages: it has the notebook's too, and other builds of torch need fewer.
COPY requirements.txt ./
# Byte-code is compiled now: a user who is not root could not keep it.
RUN --mount=from=uv,source=/usr/local/bin/uv,target=/usr/local/bin/uv \
    UV_DEFAULT_INDEX="${PIP_INDEX_URL}" uv pip install --system --system-certs --no-cache --compile-bytecode \
    -r requirements.in -c requirements.txt

FROM packages AS data
COPY mnist.py ./
COPY datasets datasets
RUN python -c "import mnist; mnist.unpack_mnist('datasets')" && rm datasets/MNIST/raw/*.gz

FROM packages AS notebook
LABEL org.opencontainers.image.title="MNIST tutorial in JupyterLab" \
      org.opencontainers.image.licenses="Apache-2.0 AND CC-BY-SA-3.0"
COPY requirements.in ./
RUN --mount=from=uv,source=/usr/local/bin/uv,target=/usr/local/bin/uv \
    UV_DEFAULT_INDEX="${PIP_INDEX_URL}" uv pip install --system --system-certs --no-cache --compile-bytecode \
    -r requirements.in -c requirements.txt
COPY --from=data /app/datasets datasets
COPY LICENSE mnist.py pytorchjob-mnist.yaml ./
COPY notebooks/mnist.ipynb notebooks/
# The notebook writes files, as any user of group 0.
RUN mkdir output && chmod -R g=u *.* notebooks output .
USER 1000:0
EXPOSE 8888
CMD ["jupyter", "lab", "--ip=0.0.0.0", "--no-browser", "notebooks/mnist.ipynb"]

FROM packages AS trainer
LABEL org.opencontainers.image.title="MNIST trainer" \
      org.opencontainers.image.licenses="Apache-2.0 AND CC-BY-SA-3.0"
RUN install -d -m 775 output
COPY --from=data /app/datasets datasets
# Last, for it is what changes most. A trainer of your own takes its place.
ARG TRAINER=mnist.py
COPY LICENSE ./
COPY ${TRAINER} mnist.py
USER 1000:0
ENTRYPOINT ["python", "mnist.py"]
