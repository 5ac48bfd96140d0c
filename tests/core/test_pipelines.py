"""Compiled pipelines: built in a child process, kept on disk, and called without Python's lock."""

# ruff: noqa: SLF001 - what is kept, and by whom it was compiled, no caller sees

import inspect
import os
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
from core.engines import block_fft, column_fft, fourier, implicit_gemm, jit, pipelines, separable, stencil
from core.engines.pipelines import Argument, Built, Pipeline

pytestmark = pytest.mark.skipif(jit.obstacle_of_platform() is not None, reason="Halide is not installed")


folder_for_pipelines: Callable[[], Path | None] = inspect.unwrap(pipelines.cache_folder)
"""Looked for anew at each call."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty cache, and a child process that keeps there what it compiles."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(home))
        patch.setattr(pipelines, "cache_folder", folder_for_pipelines)
        child = pipelines._Child()
        patch.setattr(pipelines, "_child", child)
        yield home / "corr2d"
        child.close()


def rows_pipeline() -> Pipeline:
    """The pipeline of short rows of float64, which this returns anew, from the cache or the compiler, each time."""
    pipelines._linked.pop(name_of_rows(), None)
    return pipelines.compiled(inspect.unwrap(stencil._rows))("float64")


def name_of_rows() -> str:
    return pipelines.build_name("core.engines.stencil", "_rows", ("float64",))


def correlated(pipeline: Pipeline) -> NDArray[np.float64]:
    images, kernel = np.arange(64.0).reshape(1, 1, 2, 32), np.array([[[[1.0, -1.0]]]])
    output = np.empty((1, 1, 2, 31))
    pipeline(images, kernel, output)
    plane: NDArray[np.float64] = output[0, 0]
    return plane


def longest_pause(work: Callable[[], object]) -> tuple[float, float]:
    """The longest time for which another thread of this process did not run during the work, and the work's own."""
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
def test_a_computation_lets_other_threads_run(dtype: core.Dtype) -> None:
    image, kernel = np.ones((2500, 2500), dtype), np.ones((15, 15), dtype)
    machine = core.Machine(1)
    core.correlate(image[:100], kernel, method="direct", dtype=dtype, machine=machine)
    pauses = [
        longest_pause(lambda: core.correlate(image, kernel, method="direct", dtype=dtype, machine=machine))
        for _ in range(3)
    ]
    # A call that held the lock would be one pause as long as itself.
    assert min(pause / seconds for pause, seconds in pauses) < 0.5


def test_compiling_lets_other_threads_run(folder: Path) -> None:
    for path in folder.glob("p*"):
        path.unlink()
    pause, seconds = longest_pause(lambda: pipelines.compiled(inspect.unwrap(stencil._depthwise))("float64"))
    assert seconds > 0.2
    assert pause < 0.5 * seconds
    name = pipelines.build_name("core.engines.stencil", "_depthwise", ("float64",))
    assert [path.name for path in folder.glob("p*")] == [name]


def test_what_was_compiled_is_kept_and_read_by_the_next_process(folder: Path) -> None:
    expected = correlated(rows_pipeline())
    command = "import sys; from core.engines import pipelines, stencil; import numpy as np\n"
    command += "pipelines._start_child = lambda: sys.exit('it compiles again')\n"
    command += "images, output = np.arange(64.0).reshape(1, 1, 2, 32), np.empty((1, 1, 2, 31))\n"
    command += "stencil._rows('float64')(images, np.array([[[[1.0, -1.0]]]]), output); print(output.tolist())\n"
    kept = {path.name for path in folder.glob("p*")}
    # Halide's runtime, which this process had already, is compiled by neither.
    runtime = pipelines.build_name(*pipelines.RUNTIME)
    pipelines.keep(runtime, pipelines._child.build(*pipelines.RUNTIME))
    run = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str([[expected.tolist()]])
    assert {path.name for path in folder.glob("p*")} == kept | {runtime}


def test_a_damaged_file_is_compiled_anew(folder: Path) -> None:
    name = name_of_rows()
    rows_pipeline()
    good = (folder / name).read_bytes()
    for damaged in (b"", b"nothing of the kind", b"\n\n", good[:-1], good[:200] + b"x" + good[201:]):
        (folder / name).write_bytes(damaged)
        assert pipelines.read_kept(name) is None
    pipelines._child.build("core.engines.stencil", "_rows", ("float64",))
    assert pipelines.read_kept(name) is not None


def test_without_a_folder_to_write_to_each_process_compiles(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del folder
    child = pipelines._Child()
    monkeypatch.setattr(pipelines, "_child", child)
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/proc/nowhere")
    assert pipelines.cache_folder() is None
    built = child.build("core.engines.stencil", "_rows", ("float64",))
    assert [argument.dimensions for argument in built.arguments] == [4, 4, 4]
    child.close()


@pytest.mark.skipif(os.name != "posix", reason="folders have no such owners here")
def test_a_folder_that_others_can_write_to_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    assert folder_for_pipelines() == tmp_path / "home" / "corr2d"
    (tmp_path / "home" / "corr2d").chmod(0o777)
    spare = folder_for_pipelines()
    assert spare is not None
    assert spare.parent == tmp_path / "tmp"
    spare.chmod(0o777)
    assert folder_for_pipelines() is None
    spare.rmdir()
    spare.symlink_to(tmp_path)
    assert folder_for_pipelines() is None


def test_old_files_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path
    monkeypatch.setattr(pipelines, "cache_folder", lambda: folder)
    for name, days in (("pold", 2 * pipelines.KEPT_DAYS), ("pnew", 0)):
        (folder / name).write_bytes(b"")
        then = time.time() - 86_400 * days
        os.utime(folder / name, (then, then))
    pipelines.remove_old()
    assert [path.name for path in folder.iterdir()] == ["pnew"]


def test_arrays_of_another_type_or_rank_are_rejected() -> None:
    pipeline = stencil._rows("float64")
    images, kernel, output = np.zeros((1, 1, 2, 32)), np.zeros((1, 1, 1, 2)), np.empty((1, 1, 2, 31))
    for wrong in (
        (images.astype(np.float32), kernel, output),
        (images, kernel[0], output),
        (images, kernel, output[0]),
    ):
        with pytest.raises(TypeError, match=r"argument \d of a pipeline"):
            pipeline(*wrong)
    with pytest.raises(RuntimeError, match="error"):
        pipeline(images[:, :, :1], kernel, output)  # it would read past its input


def test_a_thread_that_must_not_wait_compiles_nothing(folder: Path) -> None:
    del folder
    pipeline = pipelines.compiled(inspect.unwrap(stencil._values))
    with pipelines.compiled_only(), pytest.raises(core.NotCompiled):
        pipeline("float64")
    made = pipeline("float64")
    with pipelines.compiled_only():
        assert pipeline("float64") is made


@pytest.mark.skipif(sys.platform == "win32", reason="kills by signal")
def test_a_child_process_that_dies_is_replaced(folder: Path) -> None:
    del folder
    pipelines._child.build("core.engines.stencil", "_rows", ("float32",))
    process = pipelines._child._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert pipelines._child.build("core.engines.stencil", "_rows", ("float32",)).code


@pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no alarms")
def test_an_idle_child_process_ends_and_the_next_is_started(folder: Path) -> None:
    del folder
    pipelines._child.build("core.engines.stencil", "_rows", ("float32",))
    process = pipelines._child._process
    assert process is not None
    os.kill(process.pid, signal.SIGALRM)  # as after IDLE_S
    assert process.wait(20) == 0
    assert pipelines._child.build("core.engines.stencil", "_rows", ("float32",)).code


def test_the_child_process_ends_with_its_parent(tmp_path: Path) -> None:
    command = "import os; from core.engines import pipelines\n"
    command += "pipelines._child.build('core.engines.stencil', '_rows', ('float32',))\n"
    command += "print(pipelines._child._process.pid, flush=True); os.kill(os.getpid(), 9)"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False, env=environment)
    pid = int(run.stdout)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}/cmdline").exists() and b"compile_pipelines" in Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < deadline, "the child process outlives its parent"
        time.sleep(0.05)


KEYS: dict[Any, list[tuple[object, ...]]] = {
    stencil._tiles: [(...,)],
    stencil._tall_tiles: [(...,)],
    stencil._rows: [(...,)],
    stencil._values: [(...,)],
    stencil._depthwise: [(...,)],
    stencil._filters: [(...,)],
    stencil._strided: [(...,)],
    implicit_gemm._wide: [(..., *tile) for tile in implicit_gemm.TILES],
    implicit_gemm._narrow: [(..., *tile) for tile in implicit_gemm.TILES],
    implicit_gemm._phases: [(...,)],
    separable._passes: [(...,)],
    separable._cross: [()],
    column_fft._pipeline: [(length, vectors, ...) for length in column_fft.RADICES for vectors in column_fft.TILES],
    block_fft._pipeline: [(block, ...) for block in block_fft.BLOCKS],
    block_fft._spectrum: [(block, ...) for block in block_fft.BLOCKS],
    fourier._survey: [(...,)],
}
"""All that is compiled, with its arguments; the type stands where the dots are."""


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("pipeline", KEYS, ids=lambda pipeline: f"{pipeline.__module__}.{pipeline.__name__}")
def test_every_pipeline_can_be_scheduled(pipeline: Any, dtype: str) -> None:
    # In this process and without compiling: that is done in another one, or has been done by an earlier run.
    for key in KEYS[pipeline]:
        scheduled, inputs = inspect.unwrap(pipeline)(*(dtype if part is ... else part for part in key))
        assert scheduled.outputs() if hasattr(scheduled, "outputs") else scheduled.defined()
        assert inputs


def test_the_table_of_pipelines_is_complete() -> None:
    modules = Path(jit.__file__).parent.glob("*.py")
    assert sum(module.read_text().count("\n@jit.compiled\n") for module in modules) == len(KEYS)


@pytest.mark.skipif(sys.platform != "linux", reason="maps memory as Linux does")
def test_pipelines_can_be_linked_however_far_apart_memory_is() -> None:
    script = """
import ctypes, numpy as np
from core.engines import stencil
map_memory = ctypes.CDLL(None).mmap
map_memory.restype = ctypes.c_void_p
map_memory.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
for make in (stencil._tiles, stencil._tall_tiles, stencil._rows, stencil._values):
    for dtype in ("float32", "float64"):
        # Private, anonymous, without a reserve: only addresses are taken, more than a 32-bit offset reaches.
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
    # RuntimeDyld reserves too little for the offset table of an object that calls many functions, which shows where its
    # data almost fill their pages.
    script = """
import llvmlite.binding as llvm
from core.engines.pipelines import Built, _link
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
    _link(f"data_{size}", Built([], machine.emit_object(module)))()
print("linked")
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "linked\n"), run.stderr


def test_where_the_child_process_cannot_compile_this_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Built:
        raise RuntimeError("Unable to create temp directory")

    monkeypatch.setattr(pipelines, "cache_folder", lambda: None)
    monkeypatch.setattr(pipelines._child, "build", fail)
    assert (correlated(rows_pipeline()) == -1).all()


def test_what_cannot_be_compiled_raises_the_compilers_words() -> None:
    with pytest.raises(RuntimeError, match="no_such_pipeline"):
        pipelines._child.build("core.engines.stencil", "no_such_pipeline", ())


def test_what_is_kept_comes_back_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines, "cache_folder", lambda: tmp_path)
    built = Built([Argument("float32", 4), Argument("int32", None)], b"\x7fELF\n\n\x00code")
    pipelines.keep("pname", built)
    assert pipelines.read_kept("pname") == built
    assert pipelines.read_kept("pother") is None
