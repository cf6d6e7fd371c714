# hetkv with its CUDA backend and a system UCX with verbs, for hosts with NVIDIA GPUs and RDMA devices.
# Nobody has built this file: it is written from the documents of its parts, and no build of it has been tried.
#   docker build -f docker/cuda.Dockerfile -t hetkv-cuda .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 --ulimit nofile=65536 --device=/dev/infiniband hetkv-cuda doctor
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS build
RUN apt-get update && apt-get install -y --no-install-recommends \
      python3-dev python3-venv cmake ninja-build g++ git ca-certificates \
      autoconf automake libtool make libibverbs-dev librdmacm-dev && rm -rf /var/lib/apt/lists/*
RUN git clone --depth 1 --branch v1.19.0 https://github.com/openucx/ucx /tmp/ucx && cd /tmp/ucx && ./autogen.sh && \
    ./contrib/configure-release --prefix=/opt/ucx --with-verbs --with-rdmacm --with-cuda=/usr/local/cuda --enable-mt && \
    make -j"$(nproc)" install && rm -rf /tmp/ucx
COPY . /src
RUN python3 -m venv /opt/hetkv && \
    HETKV_UCX_WHEEL=none /opt/hetkv/bin/pip install "/src[bench]" --config-settings=cmake.define.HETKV_CUDA=ON --config-settings=cmake.define.HETKV_HIP=OFF

FROM nvidia/cuda:13.0.1-base-ubuntu24.04
RUN apt-get update && apt-get install -y --no-install-recommends python3 libibverbs1 librdmacm1 ibverbs-providers \
      iproute2 && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/ucx /opt/ucx
COPY --from=build /opt/hetkv /opt/hetkv
ENTRYPOINT ["/opt/hetkv/bin/hetkv"]
