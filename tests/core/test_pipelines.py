"""Compiled pipelines: built in a child process, cached on disk, and called without the GIL."""

# ruff: noqa: SLF001 - functions that define pipelines, and the state of the compiler process, are private

import inspect
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import core
from core.engines import (
    block_fft_pipelines,
    column_fft,
    halide_jit,
    low_rank_factors,
    padded_stencil,
    separable,
    stencil,
    value_stats,
)
from core.engines.compilation import compiler_process, pipeline_cache, pipelines
from core.engines.compilation.pipeline_cache import Argument, ObjectFile
from core.engines.compilation.pipeline_linker import Pipeline
from core.engines.layers import (
    implicit_gemm_pipelines,
    implicit_gemm_tiling,
    packed_gemm,
    winograd,
    winograd_pipelines,
    winograd_precision,
)

pytestmark = [
    pytest.mark.skipif(halide_jit.platform_unsupported_reason() is not None, reason="Halide is not installed"),
    pytest.mark.slow,
]


find_cache_folder: Callable[[], Path | None] = inspect.unwrap(pipeline_cache.cache_folder)
"""`cache_folder` without its cache: it reads the environment at each call."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Provide an empty cache folder, and a compiler process that uses it."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(home))
        patch.setattr(pipeline_cache, "cache_folder", find_cache_folder)
        child = compiler_process.CompilerProcess()
        patch.setattr(compiler_process, "compiler", child)
        yield home / "corr2d"
        child.close()


def load_rows_pipeline() -> Pipeline:
    """Load the float64 pipeline for short rows from the disk cache or the compiler, never from memory."""
    pipelines._linked_pipelines.pop(build_rows_name(), None)
    return pipelines.cached_pipeline(inspect.unwrap(stencil._rows_pipeline))("float64")


def build_rows_name() -> str:
    return pipeline_cache.pipeline_name("core.engines.stencil", "_rows_pipeline", ("float64",))


def run_pipeline(pipeline: Pipeline) -> NDArray[np.float64]:
    images, kernel = np.arange(64.0).reshape(1, 1, 2, 32), np.array([[[[1.0, -1.0]]]])
    output = np.empty((1, 1, 2, 31))
    pipeline(images, kernel, output)
    plane: NDArray[np.float64] = output[0, 0]
    return plane


def measure_thread_pause(work: Callable[[], object]) -> tuple[float, float]:
    """Return the longest pause of another thread during `work`, and the duration of `work`, in seconds."""
    over = threading.Event()
    pauses: list[float] = []

    def beat() -> None:
        last = time.perf_counter()
        while not over.is_set():
            time.sleep(0.0005)
            now = time.perf_counter()
            pauses.append(now - last)
            last = now

    thread = threading.Thread(target=beat)
    thread.start()
    time.sleep(0.01)
    pauses.clear()
    start = time.perf_counter()
    try:
        work()
        seconds = time.perf_counter() - start
    finally:
        over.set()
        thread.join()
    return max(pauses), seconds


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_computation_does_not_block_other_threads(dtype: core.Dtype) -> None:
    image, kernel = np.ones((2500, 2500), dtype), np.ones((15, 15), dtype)
    machine = core.Machine(1)
    core.correlate(image[:100], kernel, method="direct", dtype=dtype, machine=machine)
    pauses = [
        measure_thread_pause(lambda: core.correlate(image, kernel, method="direct", dtype=dtype, machine=machine))
        for _ in range(3)
    ]
    # A call that holds the GIL pauses the other thread for its whole duration.
    assert min(pause / seconds for pause, seconds in pauses) < 0.5


def test_compilation_does_not_block_other_threads(folder: Path) -> None:
    for path in folder.glob("p*"):
        path.unlink()
    pause, seconds = measure_thread_pause(
        lambda: pipelines.cached_pipeline(inspect.unwrap(stencil._depthwise_pipeline))("float64")
    )
    assert seconds > 0.2
    assert pause < 0.5 * seconds
    name = pipeline_cache.pipeline_name("core.engines.stencil", "_depthwise_pipeline", ("float64",))
    assert [path.name for path in folder.glob("p*")] == [name]


def test_compiled_pipeline_is_reused_by_the_next_process(folder: Path) -> None:
    expected = run_pipeline(load_rows_pipeline())
    command = "import sys; from core.engines.compilation import compiler_process\n"
    command += "from core.engines import stencil; import numpy as np\n"
    command += "compiler_process._start_compiler = lambda: sys.exit('it compiles again')\n"
    command += "images, output = np.arange(64.0).reshape(1, 1, 2, 32), np.empty((1, 1, 2, 31))\n"
    command += (
        "stencil._rows_pipeline('float64')(images, np.array([[[[1.0, -1.0]]]]), output); print(output.tolist())\n"
    )
    cached = {path.name for path in folder.glob("p*")}
    # This process loaded Halide's runtime before the cache was emptied: add it, so that the next one does not compile.
    runtime = pipeline_cache.pipeline_name(*compiler_process.HALIDE_RUNTIME_KEY)
    pipeline_cache.write_cached(runtime, compiler_process.compiler.build(*compiler_process.HALIDE_RUNTIME_KEY))
    run = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str([[expected.tolist()]])
    assert {path.name for path in folder.glob("p*")} == cached | {runtime}


def test_damaged_file_is_recompiled(folder: Path) -> None:
    name = build_rows_name()
    load_rows_pipeline()
    good = (folder / name).read_bytes()
    for damaged in (b"", b"nothing of the kind", b"\n\n", good[:-1], good[:200] + b"x" + good[201:]):
        (folder / name).write_bytes(damaged)
        assert pipeline_cache.read_cached(name) is None
    compiler_process.compiler.build("core.engines.stencil", "_rows_pipeline", ("float64",))
    assert pipeline_cache.read_cached(name) is not None


def test_each_process_compiles_without_a_writable_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del folder
    child = compiler_process.CompilerProcess()
    monkeypatch.setattr(compiler_process, "compiler", child)
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/proc/nowhere")
    assert pipeline_cache.cache_folder() is None
    built = child.build("core.engines.stencil", "_rows_pipeline", ("float64",))
    assert [argument.dimensions for argument in built.arguments] == [4, 4, 4]
    child.close()


@pytest.mark.skipif(os.name != "posix", reason="folders have no such owners here")
def test_folder_writable_by_others_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    assert find_cache_folder() == tmp_path / "home" / "corr2d"
    (tmp_path / "home" / "corr2d").chmod(0o777)
    spare = find_cache_folder()
    assert spare is not None
    assert spare.parent == tmp_path / "tmp"
    spare.chmod(0o777)
    assert find_cache_folder() is None
    spare.rmdir()
    spare.symlink_to(tmp_path)
    assert find_cache_folder() is None


def test_old_files_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path
    monkeypatch.setattr(pipeline_cache, "cache_folder", lambda: folder)
    for name, days in (("pold", 2 * pipeline_cache.CACHE_MAX_AGE_DAYS), ("pnew", 0)):
        (folder / name).write_bytes(b"")
        then = time.time() - 86_400 * days
        os.utime(folder / name, (then, then))
    pipeline_cache.prune_cache()
    assert [path.name for path in folder.iterdir()] == ["pnew"]


def test_arrays_of_another_type_or_rank_are_rejected() -> None:
    pipeline = stencil._rows_pipeline("float64")
    images, kernel, output = np.zeros((1, 1, 2, 32)), np.zeros((1, 1, 1, 2)), np.empty((1, 1, 2, 31))
    for wrong in (
        (images.astype(np.float32), kernel, output),
        (images, kernel[0], output),
        (images, kernel, output[0]),
    ):
        with pytest.raises(TypeError, match=r"argument \d of a pipeline"):
            pipeline(*wrong)
    with pytest.raises(RuntimeError, match="error"):
        pipeline(images[:, :, :1], kernel, output)  # would read beyond its input


def test_nonblocking_thread_does_not_compile(folder: Path) -> None:
    del folder
    pipeline = pipelines.cached_pipeline(inspect.unwrap(stencil._values_pipeline))
    with pipelines.compiled_only(), pytest.raises(core.NotCompiled):
        pipeline("float64")
    made = pipeline("float64")
    with pipelines.compiled_only():
        assert pipeline("float64") is made


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_crashed_child_process_is_replaced(folder: Path) -> None:
    del folder
    compiler_process.compiler.build("core.engines.stencil", "_rows_pipeline", ("float32",))
    process = compiler_process.compiler._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert compiler_process.compiler.build("core.engines.stencil", "_rows_pipeline", ("float32",)).code


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGALRM")
def test_idle_child_process_exits_and_the_next_is_started(folder: Path) -> None:
    del folder
    compiler_process.compiler.build("core.engines.stencil", "_rows_pipeline", ("float32",))
    process = compiler_process.compiler._process
    assert process is not None
    os.kill(process.pid, signal.SIGALRM)  # sent by the process itself after IDLE_TIMEOUT_S
    assert process.wait(20) == 0
    assert compiler_process.compiler.build("core.engines.stencil", "_rows_pipeline", ("float32",)).code


def test_child_process_ends_with_its_parent(tmp_path: Path) -> None:
    command = "import os; from core.engines.compilation import compiler_process\n"
    command += "compiler_process.compiler.build('core.engines.stencil', '_rows_pipeline', ('float32',))\n"
    command += "print(compiler_process.compiler._process.pid, flush=True); os.kill(os.getpid(), 9)"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False, env=environment)
    pid = int(run.stdout)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}/cmdline").exists() and b"compile_pipelines" in Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < deadline, "the child process outlives its parent"
        time.sleep(0.05)


STRIDES = ((1, 1), (1, 2), (2, 1), (2, 2))

PIPELINE_KEYS: dict[Any, list[tuple[object, ...]]] = {
    stencil._tiles_pipeline: [(...,)],
    stencil._tall_tiles_pipeline: [(...,)],
    stencil._rows_pipeline: [(...,)],
    stencil._values_pipeline: [(...,)],
    stencil._depthwise_pipeline: [(...,)],
    stencil._layer_pipeline: [(...,)],
    stencil._strided_pipeline: [(...,)],
    padded_stencil.layer_pipeline: [
        (..., rows, stride, 4, 4) for rows in (*padded_stencil.UNROLLED_KERNEL_ROWS, 0) for stride in STRIDES
    ],
    implicit_gemm_pipelines.rows_pipeline: [(..., *tile) for tile in implicit_gemm_tiling.GEMM_TILES],
    implicit_gemm_pipelines.bands_pipeline: [(..., *tile) for tile in implicit_gemm_tiling.GEMM_TILES],
    implicit_gemm_pipelines.strips_pipeline: [(..., 8, 2, stride, 4) for stride in STRIDES],
    implicit_gemm_pipelines.polyphase_pipeline: [(..., clamped) for clamped in (False, True)],
    packed_gemm.layer_pipeline: [
        (..., tile, (2, 1), lanes) for tiles in packed_gemm.TILES.values() for tile in tiles for lanes in (0, 4)
    ],
    separable._passes_pipeline: [(...,)],
    low_rank_factors.cross_approximation_pipeline: [()],
    column_fft._strip_pipeline: [
        (length, vectors, ...) for length in column_fft.TRANSFORM_RADICES for vectors in column_fft.PRODUCT_TILES
    ],
    block_fft_pipelines.block_pipeline: [(block, ...) for block in block_fft_pipelines.FFT_BLOCKS],
    block_fft_pipelines.kernel_spectrum_pipeline: [(block, ...) for block in block_fft_pipelines.FFT_BLOCKS],
    value_stats._stats_pipeline: [(...,)],
    winograd_pipelines.kernel_pipeline: [(tile,) for tile in winograd_precision.TILES],
    winograd_precision.fit_pipeline: [(lanes,) for lanes in (4, 8, 16)],
    winograd_pipelines.layer_pipeline: [
        (tile, *sums, 4) for tile in winograd_precision.TILES for sums in winograd.GEMM_TILES.values()
    ],
}
"""Every compiled pipeline and its arguments; `...` stands for the dtype."""


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("pipeline", PIPELINE_KEYS, ids=lambda pipeline: f"{pipeline.__module__}.{pipeline.__name__}")
def test_every_pipeline_can_be_scheduled(pipeline: Any, dtype: str) -> None:
    # Only schedule, in this process: pipelines are compiled in the child process, or were cached by an earlier run.
    for key in PIPELINE_KEYS[pipeline]:
        scheduled, inputs = inspect.unwrap(pipeline)(*(dtype if part is ... else part for part in key))
        assert scheduled.outputs() if hasattr(scheduled, "outputs") else scheduled.defined()
        assert inputs


def test_pipeline_table_is_complete() -> None:
    modules = Path(halide_jit.__file__).parent.rglob("*.py")
    assert sum(module.read_text().count("\n@pipelines.cached_pipeline\n") for module in modules) == len(PIPELINE_KEYS)


@pytest.mark.skipif(sys.platform != "linux", reason="uses the mmap flags of Linux")
def test_pipelines_link_at_any_memory_distance() -> None:
    script = """
import ctypes, numpy as np
from core.engines import stencil
map_memory = ctypes.CDLL(None).mmap
map_memory.restype = ctypes.c_void_p
map_memory.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
for make in (stencil._tiles_pipeline, stencil._tall_tiles_pipeline, stencil._rows_pipeline, stencil._values_pipeline):
    for dtype in ("float32", "float64"):
        # MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE: take addresses, not memory, beyond the reach of 32-bit offsets.
        for _ in range(2):
            map_memory(None, 3 << 30, 0, 0x4022, -1, 0)
        pipeline = make(dtype)
images, kernel, output = np.arange(9.0).reshape(1, 1, 3, 3), np.ones((1, 1, 2, 2)), np.empty((1, 1, 2, 2))
pipeline(images, kernel, output)
print(output.tolist())
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.stdout == "[[[[8.0, 12.0], [20.0, 24.0]]]]\n", run.stderr


def test_objects_link_whatever_the_size_of_their_data() -> None:
    # RuntimeDyld reserves too little memory for the offset table of an object that calls many functions; the error
    # appears if the data almost fill their pages.
    script = """
import llvmlite.binding as llvm
from core.engines.compilation.pipeline_cache import ObjectFile
from core.engines.compilation.pipeline_linker import link_pipeline
llvm.initialize_native_target()
llvm.initialize_native_asmprinter()
machine = llvm.Target.from_default_triple().create_target_machine(reloc="pic")
names = "abs atof atoi calloc free getenv labs malloc memmove qsort rand realloc srand strcat strcmp strcpy strlen"
for size in range(3840, 4097, 8):
    text = f'''
@data = internal global [{size} x i8] c"{"1" * size}", align 8
define i32 @data_{size}_argv(ptr %arguments) {{
  %first = load volatile i8, ptr @data
  %unchanged = icmp eq i8 %first, 49
  br i1 %unchanged, label %done, label %calls
done:
  ret i32 0
calls:
'''
    text += "".join(f"  call void @{name}()\\n" for name in names.split()) + "  ret i32 1\\n}\\n"
    text += "".join(f"declare void @{name}()\\n" for name in names.split())
    module = llvm.parse_assembly(text)
    module.triple = llvm.get_process_triple()
    link_pipeline(f"data_{size}", ObjectFile([], machine.emit_object(module)))()
print("linked")
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "linked\n"), run.stderr


def test_process_compiles_itself_if_the_child_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> ObjectFile:
        raise RuntimeError("Unable to create temp directory")

    monkeypatch.setattr(pipeline_cache, "cache_folder", lambda: None)
    monkeypatch.setattr(compiler_process.compiler, "build", fail)
    assert (run_pipeline(load_rows_pipeline()) == -1).all()


def test_compile_error_contains_the_compiler_message() -> None:
    with pytest.raises(RuntimeError, match="no_such_pipeline"):
        compiler_process.compiler.build("core.engines.stencil", "no_such_pipeline", ())


def test_cached_pipeline_is_restored_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_cache, "cache_folder", lambda: tmp_path)
    built = ObjectFile([Argument("float32", 4), Argument("int32", None)], b"\x7fELF\n\n\x00code")
    pipeline_cache.write_cached("pname", built)
    assert pipeline_cache.read_cached("pname") == built
    assert pipeline_cache.read_cached("pother") is None


COUNT_PAGE_FAULTS = """
import resource, numpy as np, core
layer, images = core.Conv2d(np.ones((64, 64, 3, 3), "f4"), padding=1, method="winograd"), np.ones((64, 56, 56), "f4")
for _ in range(20):
    layer(images)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    layer(images)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs the malloc of glibc")
def test_calls_use_the_memory_of_the_calls_before() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", COUNT_PAGE_FAULTS]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    # Without core.resources.keep_freed_memory there are 600.
    assert float(result.stdout) < 60
