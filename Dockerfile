# docker build -t ebnas .                          # on a CPU
# docker build -t ebnas --build-arg TORCH=cu126 .  # with CUDA 12.6, for `docker run --gpus all`
# docker run --rm -it -v "$PWD/runs:/ebnas/runs" ebnas python train_search.py --set shapes --epochs 2

FROM python:3.11-slim

# cpu, or a version of CUDA as PyTorch's wheels name it
ARG TORCH=cpu

# the kernels of training and of packed networks are compiled at first use
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev make git \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /ebnas
COPY requirements.txt ./
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --index-url "https://download.pytorch.org/whl/${TORCH}" torch torchvision \
    && pip install --no-cache-dir -r requirements.txt

COPY . .
CMD ["python", "infer.py", "docs/star.png"]
