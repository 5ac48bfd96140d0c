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
    # 45 % of the size is tests, files for compilers and type checkers, the compiler of torch with the packages that only
    # it imports, what neither the service nor scipy.linalg and scipy.special import of torch and scipy, Halide's
    # automatic schedulers, Pillow's fonts, AVIF and colour profiles, bytecode, and symbols for debuggers.
    # torch_shm_manager stays: importing torch requires it.
    && cd /opt/corr2d/lib/python3*/site-packages \
    && rm -rf torch/include torch/share torch/test torch/_dynamo torch/_inductor torch/onnx torchgen/packaged \
        torch/lib/libaoti_custom_ops.so torch/lib/libbackend_with_compiler.so torch/lib/lib*_test.so \
        sympy* isympy* networkx* mpmath* setuptools* _distutils_hack distutils-precedence.pth \
        halide/bin halide/include halide/share halide/lib64/cmake halide/lib64/libautoschedule_* imageio* numba/cuda \
        PIL/_avif.* PIL/_imagingcms.* PIL/_imagingft.* \
        pillow.libs/libavif-* pillow.libs/libbrotli* pillow.libs/libfreetype-* pillow.libs/libharfbuzz-* \
        pillow.libs/liblcms2-* numpy/_core/_simd.* scipy/special/cython_special.* \
    && find scipy -mindepth 1 -maxdepth 1 -type d ! -name '_*' ! -name linalg ! -name special -exec rm -rf {} + \
    && find torch/testing/_internal -type f ! -name __init__.py ! -name common_dtype.py ! -name logging_tensor.py -delete \
    && find torch/bin -type f ! -name torch_shm_manager -delete \
    && find . -type d -name tests -prune -exec rm -rf {} + \
    && find . -type f -regex '.*\.\(a\|c\|cc\|cpp\|h\|hpp\|pxd\|pyi\|pyx\)' -delete \
    # Libraries in *.libs have been patched in a way that strip does not know: numpy cannot load its stripped OpenBLAS.
    && find . -type f -name '*.so*' ! -path '*.libs/*' -exec strip --strip-unneeded {} +


FROM dependencies AS project

COPY README.md LICENSE hatch_build.py ./
COPY corr2d corr2d
COPY core core
COPY docs docs
COPY service service
RUN pip --python /opt/corr2d/bin/python3 install --no-compile --no-deps --prefix /project .


FROM base AS root

# Remove what is not needed at run time: pip, parts of Python for development, the package manager with its libraries
# and perl, and the C library's character sets, of which Python has its own.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir / --shell /usr/sbin/nologin corr2d \
    && cd /usr/local && rm -rf bin/pip* bin/wheel bin/idle* bin/pydoc* bin/2to3* include lib/python3*/site-packages/* \
    && cd lib/python3* && rm -rf ensurepip idlelib lib2to3 pydoc_data tkinter turtledemo config-* \
    && dpkg --purge --force-depends --force-remove-essential apt gpgv libidn2-0 libp11-kit0 perl-base \
        $(dpkg-query --show --showformat '${Package} ' 'libapt-pkg*' 'libgnutls*' 'libunistring*') \
    && rm -rf /usr/lib/*/gconv


# Without the layers of the base image, which contain the removed files.
FROM scratch

LABEL org.opencontainers.image.title="corr2d" \
      org.opencontainers.image.description="Convolution as a service: 2-D cross-correlation, Conv2d, learned kernels" \
      org.opencontainers.image.licenses="Apache-2.0"

COPY --from=root / /
COPY --from=dependencies /opt/corr2d /opt/corr2d
COPY --from=project /project /opt/corr2d

# The container writes nothing to the root, which may be read-only.
ENV PATH=/opt/corr2d/bin:/usr/local/bin:/usr/bin:/bin LANG=C.UTF-8 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
ENV CORR2D_HOST=0.0.0.0 CORR2D_PORT=8000

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
