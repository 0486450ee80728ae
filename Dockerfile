# docker build -t llava-next .                                  CPU
# docker build -t llava-next --build-arg TORCH_BUILD=default .  pip's own build of torch, with CUDA
# docker run --gpus all --shm-size 16g -v DATA:/data llava-next train name=... data.store_root=/data/stores
FROM python:3.11-bookworm
ARG TORCH_BUILD=cpu
# A C++ compiler and Python's headers are in the image: DeepSpeed compiles its operators at run time.
RUN apt-get update && apt-get install -y --no-install-recommends g++ git pdsh openssh-client && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/llava-next
COPY . .
RUN TORCH_BUILD=${TORCH_BUILD} ./scripts/setup.sh --extras lora,tensorboard
ENV PATH=/opt/llava-next/.venv/bin:$PATH LLAVA_NEXT_PYTHON=/opt/llava-next/.venv/bin/python
WORKDIR /work
ENTRYPOINT ["llava-next"]
