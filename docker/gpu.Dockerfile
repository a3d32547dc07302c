# rlhf_ray on NVIDIA GPUs: the locked packages of locks/gpu.txt, set up by scripts/install.sh as outside of containers.
# Build from the root of the repository; building needs no GPU, running needs the NVIDIA Container Toolkit:
#   docker build -f docker/gpu.Dockerfile -t rlhf-ray:gpu .
# Where pip needs settings, add `--secret id=pip,src=pip.conf`: mounted while pip runs, and in no layer.
ARG BASE=python:3.11.14-slim-bookworm
# The CUDA release that the locked torch is built with.
ARG CUDA=13.0
ARG TOOLKIT=nvidia/cuda:13.0.2-devel-ubuntu22.04

FROM ${TOOLKIT} AS toolkit
ARG CUDA
# torch's wheels bring the CUDA libraries; nothing links static copies of them.
RUN find "/usr/local/cuda-${CUDA}/" -name '*_static*.a' ! -name 'libcudart_static.a' -delete

FROM ${BASE}
ARG CUDA

# g++ and libaio: DeepSpeed compiles CPUAdam and its NVMe operator where they are first used; Triton needs g++ too.
# ibverbs and rdmacm: NCCL over InfiniBand and RoCE. wget: the health checks of KubeRay and docker/compose.yaml.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ ibverbs-providers libaio-dev libibverbs1 libnuma1 \
    librdmacm1 wget \
    && rm -rf /var/lib/apt/lists/*

# nvcc and headers, for kernels that DeepSpeed and FlashInfer compile where they are first used.
COPY --from=toolkit /usr/local/cuda-${CUDA} /usr/local/cuda
ENV CUDA_HOME=/usr/local/cuda \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

ENV RLHF_RAY_VENV=/opt/venv \
    PATH=/opt/venv/bin:/usr/local/cuda/bin:$PATH

# The packages are a layer of their own, which only a change of the lock makes anew. All are compiled, since the user of
# a container can't keep byte code; a few of their files are for other Pythons.
COPY scripts/install.sh /opt/rlhf_ray/scripts/
COPY locks/gpu.txt /opt/rlhf_ray/locks/
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    /opt/rlhf_ray/scripts/install.sh gpu --lock-only \
    && { /opt/venv/bin/python -m compileall -qq -j 0 /opt/venv/lib || true; }

COPY LICENSE README.md pyproject.toml /opt/rlhf_ray/
COPY scripts /opt/rlhf_ray/scripts
COPY configs /opt/rlhf_ray/configs
COPY rlhf_ray /opt/rlhf_ray/rlhf_ray
RUN /opt/rlhf_ray/scripts/install.sh gpu

# KubeRay starts Ray in login shells, whose profile sets another PATH. Relative paths of a config are meant from
# /shared, where every node mounts the same storage.
ARG UID=1000
RUN echo "PATH=${RLHF_RAY_VENV}/bin:${CUDA_HOME}/bin:\$PATH" >/etc/profile.d/rlhf_ray.sh \
    && useradd --uid "${UID}" --create-home rlhf \
    && install --directory --owner=rlhf --group=rlhf /shared
# By number, which is how Kubernetes sees that it isn't root.
USER ${UID}
WORKDIR /shared

# A cluster of this image has a token, whoever starts it; nothing is reported to Ray's makers; hub models are
# downloaded once for all nodes.
ENV RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0 \
    HF_HOME=/shared/huggingface

ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="rlhf_ray" \
    org.opencontainers.image.description="Aligns language models on a Ray cluster (GPU set)" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
CMD ["rlhf-ray", "--help"]
