# Two images: the trainer (docker build .) and the tutorial in JupyterLab (--target notebook).
# docs/containers.md explains how to build, run and change them. Every file that is copied in gets its mode here,
# because any user must be able to read it, and the builder's umask may forbid that.

ARG BASE_IMAGE=python:3.11-slim
FROM ${BASE_IMAGE} AS python
WORKDIR /app
# Any user can run the images, even one without a home folder.
ENV HOME=/tmp PYTHONUNBUFFERED=1

# uv installs the packages, and is in neither image. dumb-init is a single file, and goes into both.
# UV_DEFAULT_INDEX names another package index. A Python of Debian's own would have packages come from apt only.
FROM python AS uv
ARG UV_DEFAULT_INDEX
RUN PIP_BREAK_SYSTEM_PACKAGES=1 PIP_INDEX_URL="${UV_DEFAULT_INDEX}" \
    pip install --no-cache-dir uv==0.13.8 dumb-init==1.2.5.post1

# UV_TORCH_BACKEND chooses the build of PyTorch: by default you get CUDA, and cpu is far smaller.
# Byte-code is compiled now, because only root could store it later.
FROM python AS packages
COPY --from=uv /usr/local/bin/dumb-init /usr/local/bin/
ARG UV_DEFAULT_INDEX
ARG UV_TORCH_BACKEND
ARG REQUIREMENTS=docker/requirements.in
ARG VERSIONS=requirements.txt
COPY --chmod=644 ${REQUIREMENTS} requirements.in
COPY --chmod=644 ${VERSIONS} requirements.txt
RUN --mount=from=uv,source=/usr/local/bin/uv,target=/usr/local/bin/uv \
    uv pip install --system --break-system-packages --system-certs --no-cache --compile-bytecode \
    -r requirements.in -c requirements.txt && rm -f /tmp/uv-*.lock && \
    { command -v python || ln -s "$(command -v python3)" /usr/local/bin/python; }

# The digits: packed for the notebook, unpacked for the trainer, and the checksums with which it compares them.
# A trainer that does not need them is built with DATA=nothing.
FROM python AS data
ARG DATA=digits
COPY datasets datasets
RUN case $DATA in \
        digits) gunzip --keep datasets/MNIST/raw/*.gz ;; \
        nothing) rm -r datasets ;; \
        *) echo "DATA is $DATA: it must be digits or nothing" && exit 1 ;; \
    esac && chmod -R u=rwX,go=rX .

FROM packages AS notebook
LABEL org.opencontainers.image.title="MNIST tutorial in JupyterLab" \
      org.opencontainers.image.licenses="Apache-2.0 AND CC-BY-SA-3.0"
# Tk shows matplotlib's windows. Any version will do.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends libtk8.6 && rm -rf /var/lib/apt/lists/*
ARG UV_DEFAULT_INDEX
COPY --chmod=644 requirements.in ./
RUN --mount=from=uv,source=/usr/local/bin/uv,target=/usr/local/bin/uv \
    uv pip install --system --break-system-packages --system-certs --no-cache --compile-bytecode \
    -r requirements.in -c requirements.txt && rm -f /tmp/uv-*.lock
COPY --from=data /app/datasets datasets
# The notebook writes the trainer and the manifest, so any user in group 0 may change them.
COPY --chmod=664 LICENSE mnist.py pytorchjob-mnist.yaml ./
COPY --chmod=664 notebooks/mnist.ipynb notebooks/draw.js notebooks/
COPY --chmod=644 docker/*.py docker/
RUN mkdir output && chmod 775 . output notebooks
USER 1000:0
EXPOSE 8888
# Kernels and terminals come and go. An init cleans up after those whose parent has died.
ENTRYPOINT ["dumb-init", "--"]
CMD ["jupyter", "lab", "--ip=0.0.0.0", "--no-browser"]

FROM packages AS trainer
ARG TITLE="MNIST trainer"
ARG LICENSES="Apache-2.0 AND CC-BY-SA-3.0"
LABEL org.opencontainers.image.title="${TITLE}" \
      org.opencontainers.image.licenses="${LICENSES}"
RUN install -d -m 775 output
COPY --from=data /app ./
COPY --chmod=644 LICENSE ./
# Last, because it changes most: mnist.py, or your own trainer, which keeps its path in the project.
ARG TRAINER=mnist.py
ENV TRAINER=${TRAINER}
COPY --chmod=644 ${TRAINER} ${TRAINER}
USER 1000:0
# Whatever the base image says of these: a healthy trainer answers to nobody, and is stopped by SIGTERM.
STOPSIGNAL SIGTERM
HEALTHCHECK NONE
# A container's first process ignores signals that it does not handle, and inherits all orphans. So it is an
# init. It passes signals on to the trainer only, which tells its own processes what to do.
ENTRYPOINT ["dumb-init", "--single-child", "--", "sh", "-c", "exec python \"$TRAINER\" \"$@\"", "sh"]
