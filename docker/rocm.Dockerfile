# hetkv with its HIP backend and a system UCX with verbs, for hosts with AMD GPUs and RDMA devices.
# Nobody has built this file: it is written from the documents of its parts, and no build of it has been tried.
#   docker build -f docker/rocm.Dockerfile -t hetkv-rocm .
#   docker run --device=/dev/kfd --device=/dev/dri --ipc=host --ulimit memlock=-1 --ulimit nofile=65536 \
#     --device=/dev/infiniband hetkv-rocm doctor
FROM rocm/dev-ubuntu-24.04:6.4-complete AS build
RUN apt-get update && apt-get install -y --no-install-recommends \
      python3-dev python3-venv cmake ninja-build g++ git ca-certificates \
      autoconf automake libtool make libibverbs-dev librdmacm-dev && rm -rf /var/lib/apt/lists/*
RUN git clone --depth 1 --branch v1.19.0 https://github.com/openucx/ucx /tmp/ucx && cd /tmp/ucx && ./autogen.sh && \
    ./contrib/configure-release --prefix=/opt/ucx --with-verbs --with-rdmacm --with-rocm=/opt/rocm --enable-mt && \
    make -j"$(nproc)" install && rm -rf /tmp/ucx
COPY . /src
RUN python3 -m venv /opt/hetkv && \
    HETKV_UCX_WHEEL=none /opt/hetkv/bin/pip install "/src[bench]" --config-settings=cmake.define.HETKV_CUDA=OFF --config-settings=cmake.define.HETKV_HIP=ON \
      "--config-settings=cmake.define.HETKV_HIP_ARCHITECTURES=gfx90a;gfx942"

FROM rocm/dev-ubuntu-24.04:6.4
RUN apt-get update && apt-get install -y --no-install-recommends python3 libibverbs1 librdmacm1 ibverbs-providers \
      iproute2 && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/ucx /opt/ucx
COPY --from=build /opt/hetkv /opt/hetkv
ENTRYPOINT ["/opt/hetkv/bin/hetkv"]
