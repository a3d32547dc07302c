# rlhf_ray on CPU: the locked packages of locks/cpu.txt, set up by scripts/install.sh as outside of containers.
# Build from the root of the repository:
#   docker build -f docker/cpu.Dockerfile -t rlhf-ray:cpu --secret id=pip,src=pip.conf .
# pip.conf names PyTorch's own CPU index (pip's extra-index setting). It is mounted while pip runs and in no layer, so it
# may hold credentials.
ARG BASE=python:3.11.14-slim-bookworm
FROM ${BASE}

# g++ and libaio: DeepSpeed compiles CPUAdam and its NVMe operator where they are first used. libnuma: vLLM on CPU.
# wget: the health checks of KubeRay and docker/compose.yaml.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libaio-dev libnuma1 wget \
    && rm -rf /var/lib/apt/lists/*

ENV RLHF_RAY_VENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH

# The packages are a layer of their own, which only a change of the lock makes anew. All are compiled, since the user of
# a container can't keep byte code; a few of their files are for other Pythons.
COPY scripts/install.sh /opt/rlhf_ray/scripts/
COPY locks/cpu.txt /opt/rlhf_ray/locks/
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    /opt/rlhf_ray/scripts/install.sh cpu --lock-only \
    && { /opt/venv/bin/python -m compileall -qq -j 0 /opt/venv/lib || true; }

COPY LICENSE README.md pyproject.toml /opt/rlhf_ray/
COPY scripts /opt/rlhf_ray/scripts
COPY configs /opt/rlhf_ray/configs
COPY rlhf_ray /opt/rlhf_ray/rlhf_ray
RUN /opt/rlhf_ray/scripts/install.sh cpu

# KubeRay starts Ray in login shells, whose profile sets another PATH. Relative paths of a config are meant from
# /shared, where every node mounts the same storage.
ARG UID=1000
RUN echo "PATH=${RLHF_RAY_VENV}/bin:\$PATH" >/etc/profile.d/rlhf_ray.sh \
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
    org.opencontainers.image.description="Aligns language models on a Ray cluster (CPU set)" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
CMD ["rlhf-ray", "--help"]
