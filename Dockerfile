# nnU-Net with LGMSNet. On a CPU:
#   docker build -t nnunet-lgms .
# On NVIDIA GPUs (run with --gpus all --shm-size=8g):
#   docker build -t nnunet-lgms --build-arg BASE=pytorch/pytorch:2.10.0-cuda12.8-cudnn9-runtime --build-arg TORCH_INDEX= .
ARG BASE=python:3.12-slim
FROM ${BASE}

# gcc and the headers are for torch.compile and Triton, which build small launchers.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends --yes gcc g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# The base image for GPUs has torch already, which is kept.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# hadolint ignore=DL3013
RUN if [ -n "$TORCH_INDEX" ]; then pip install --no-cache-dir torch torchvision --index-url "$TORCH_INDEX"; fi

COPY . /src
RUN pip install --no-cache-dir "/src[evaluation,export]" && rm -rf /src

ENV nnUNet_raw=/data/raw nnUNet_preprocessed=/data/preprocessed nnUNet_results=/data/results
RUN useradd --create-home user && mkdir -p /data/raw /data/preprocessed /data/results && chown -R user /data
USER user
WORKDIR /data
VOLUME /data
CMD ["nnunet_lgms", "doctor"]
