# docker build -t corr2d . && docker run --rm --read-only --tmpfs /tmp --cap-drop ALL -p 127.0.0.1:8000:8000 corr2d
# All dependencies also have wheels for PYTHON=3.12 and 3.13, and DEBIAN=trixie.
ARG PYTHON=3.11
ARG DEBIAN=bookworm

FROM python:${PYTHON}-slim-${DEBIAN} AS base


FROM base AS dependencies

# The CPU build of torch. For CUDA (5 GB): https://download.pytorch.org/whl/cu130, or empty for the CUDA build on PyPI.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# Optional features, separated by spaces: plot (75 MB), telemetry.
ARG EXTRAS

# For builds behind a package mirror. pip ignores empty values.
ARG PIP_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_TRUSTED_HOST
ENV PIP_EXTRA_INDEX_URL=${TORCH_INDEX} PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1

WORKDIR /build
COPY pyproject.toml constraints.txt ./

# binutils contains strip.
RUN apt-get update && apt-get install --yes --no-install-recommends binutils && rm -rf /var/lib/apt/lists/*

# Only the dependencies: this layer, nearly all of the image, is cached until a dependency changes.
RUN python3 -m venv --without-pip /opt/corr2d \
    && python3 -c 'import sys, tomllib; \
project = tomllib.load(sys.stdin.buffer)["project"]; \
extras = [line for name in sys.argv[1:] for line in project["optional-dependencies"][name]]; \
print(*project["dependencies"], *extras, sep="\n")' ${EXTRAS} < pyproject.toml > dependencies.txt \
    && pip --python /opt/corr2d/bin/python3 install --no-compile --constraint constraints.txt \
        --requirement dependencies.txt \
    # 40 % of the size is tests, C++ headers, tools, the compiler of torch with the packages that only it imports, parts
    # of scipy that neither the service nor scipy.linalg and scipy.special import, bytecode, and symbols for debuggers.
    # torch_shm_manager stays: importing torch requires it.
    && cd /opt/corr2d/lib/python3*/site-packages \
    && rm -rf torch/include torch/test torch/_dynamo torch/_inductor torch/onnx sympy* isympy* networkx* mpmath* \
        setuptools* _distutils_hack distutils-precedence.pth halide/bin halide/include numba/cuda scipy/cluster \
        scipy/fftpack scipy/integrate scipy/interpolate scipy/io scipy/ndimage scipy/optimize scipy/signal scipy/spatial \
        scipy/stats \
    && find torch/bin -type f ! -name torch_shm_manager -delete \
    && find . -type d -name tests -prune -exec rm -rf {} + \
    && strip --strip-unneeded llvmlite/binding/libllvmlite.so torch/lib/libtorch_cpu.so torch/lib/libtorch_python.so \
        uvloop/loop.*.so


FROM dependencies AS project

COPY README.md LICENSE hatch_build.py ./
COPY corr2d corr2d
COPY core core
COPY docs docs
COPY service service
RUN pip --python /opt/corr2d/bin/python3 install --no-compile --no-deps --prefix /project .


FROM base

LABEL org.opencontainers.image.title="corr2d" \
      org.opencontainers.image.description="Convolution as a service: 2-D cross-correlation, Conv2d, learned kernels" \
      org.opencontainers.image.licenses="Apache-2.0"

# Remove pip, which is not needed at run time.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir / --shell /usr/sbin/nologin corr2d \
    && rm -rf /usr/local/bin/pip* /usr/local/bin/wheel /usr/local/lib/python3*/site-packages/*

COPY --from=dependencies /opt/corr2d /opt/corr2d
COPY --from=project /project /opt/corr2d

# The container writes nothing to the root, which may be read-only.
ENV PATH=/opt/corr2d/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 CORR2D_HOST=0.0.0.0 CORR2D_PORT=8000

# Shared memory is writable for any user even if the root is read-only. Compiled engines and the compiled JSON parser
# are cached there for the next start of the same container, and the font list of matplotlib, if it is installed.
ENV MPLCONFIGDIR=/dev/shm/matplotlib XDG_CACHE_HOME=/dev/shm/cache

# Fail the build, not the start, if the service needs a removed file; and compile the bytecode of what it imports.
RUN PYTHONDONTWRITEBYTECODE= python3 -c 'import uvloop, uvicorn.protocols.http.httptools_impl; \
import corr2d.service.cli.main, corr2d.service.server.run, corr2d.service.server.supervisor, corr2d.service.app; \
from corr2d import conv2d, correlate, fit_kernel; \
assert correlate([[1, 2]], [[3]]).output.tolist() == conv2d([[1, 2]], [[3]], engines=("torch",)).output.tolist(); \
assert fit_kernel([[1, 2, 0], [3, 4, 1]], [[1, -2], [1, -3]], kernel_size=(1, 2), solver="exact").status == "converged"'

# A numeric user, because Kubernetes' runAsNonRoot cannot resolve a name.
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM

# /readyz succeeds if the warm-up computation had the right result. The empty ProxyHandler ignores proxy variables.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["python3", "-c", "\
import os, urllib.request as web; \
web.build_opener(web.ProxyHandler({})).open('http://127.0.0.1:' + os.environ['CORR2D_PORT'] + '/readyz', timeout=4)"]

ENTRYPOINT ["corr2d"]
CMD ["serve"]
