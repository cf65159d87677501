"""Kernels that workers compile, for a GPU that need not be there."""

import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from offline_kernels import compiling_for  # noqa: E402

from nnunet_lgms.ops import compiling  # noqa: E402
from nnunet_lgms.ops import launch as launching  # noqa: E402
from nnunet_lgms.ops.backend import Decision  # noqa: E402
from nnunet_lgms.ops.compiling import workers_begin  # noqa: E402
from nnunet_lgms.ops.launch import launch, only_compiling  # noqa: E402
from nnunet_lgms.ops.triton import attention_kernels  # noqa: E402
from nnunet_lgms.ops.triton.layout import _transpose_kernel  # noqa: E402

COMPILED_HERE, FOUND = False, True
DIES = "raise SystemExit(1)"
HANGS = "import time; time.sleep(60)"
FORKS_ONCE = """import os
fork, allowed = os.fork, [True]
def fork_once():
    if not allowed:
        raise BlockingIOError("processes")
    return allowed.clear() or fork()
os.fork = fork_once
"""
NEVER_COMPILED = """import signal, sys, time
sys.path[:] = sys.argv[2:]
from nnunet_lgms.ops import compiling
def never(*job):
    print(open("/proc/self/oom_score_adj").read(), end="", flush=True)
    time.sleep(60)
def fork(method, get_context=compiling.get_context):
    assert compiling.PATIENCE == 1 or 0 < signal.alarm(0) <= compiling.PATIENCE
    compiling.PATIENCE = 1
    return get_context(method)
compiling._compile, compiling.get_context = never, fork
compiling.work(2)
"""


class Step:
    """Two launches, and what became of them: ``compiled`` has an entry each, ``started`` the workers."""

    def __init__(self):
        self.compiled, self.started, self.popen, self.tried = [], [], subprocess.Popen, 0

    def take(self) -> list[bool]:
        """As in a new process, whose kernels are in Triton's cache on the disk or nowhere."""
        _transpose_kernel.device_caches.clear()
        self.compiled.clear()
        with only_compiling():
            self.launch()
        return list(self.compiled)

    def launch(self) -> None:
        half, whole = (torch.zeros(2, dtype=dtype) for dtype in (torch.float16, torch.float32))
        for x in (half, whole):
            launch(_transpose_kernel)[(1,)](x, x, 64, TO_LAST=True, C=4, LANES=4, ROWS=64)

    def start(self, command: list[str], **kwargs) -> subprocess.Popen:
        self.tried += "-c" in command
        process = self.popen(command, **kwargs)
        self.started += [process] if "-c" in command else []  # Triton starts others
        return process


@pytest.fixture
def step(monkeypatch, tmp_path):
    step = Step()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda cache_hit, **_: step.compiled.append(cache_hit))
    monkeypatch.setattr(compiling, "cores", lambda: 4)
    monkeypatch.setattr(compiling, "WORTH_WORKERS", 2)
    monkeypatch.setattr(compiling.subprocess, "Popen", step.start)
    monkeypatch.setattr(launching, "build_launcher", lambda kernel: None)
    with compiling_for("sm_90"):
        yield step
    _transpose_kernel.device_caches.clear()
    assert all(worker.returncode is not None for worker in step.started)


@pytest.mark.slow
def test_what_workers_compile_is_found_and_nobody_is_started_for_what_is_there(step):
    assert step.take() == [FOUND, FOUND]
    assert len(step.started) == 1
    step.started.clear()
    assert step.take() == [FOUND, FOUND]
    assert not step.started


@pytest.fixture
def gpu(monkeypatch) -> torch.device:
    """A device that the kernels run on."""
    monkeypatch.setattr(compiling, "kernels_for", lambda device: Decision("kernels", "They do."))
    return torch.device("cuda")


@pytest.mark.slow
def test_workers_that_begin_early_compile_what_comes_next(step, gpu, monkeypatch):
    monkeypatch.setattr(compiling, "WORTH_WORKERS", 3)
    with workers_begin(gpu), workers_begin(gpu):
        assert len(step.started) == 1 and step.started[0].poll() is None
        assert step.take() == [FOUND, FOUND]
    assert len(step.started) == 1 and compiling._begun is None


def test_workers_that_nobody_needed_end(step, gpu, monkeypatch):
    monkeypatch.setattr(compiling, "_PROGRAM", HANGS)
    with pytest.raises(RuntimeError, match="no memory"), workers_begin(gpu):
        with workers_begin(gpu):
            pass
        assert step.started[0].poll() is None  # of the first to begin
        raise RuntimeError("no memory")
    assert step.started[0].returncode == -signal.SIGKILL and compiling._begun is None


@pytest.mark.slow
def test_workers_that_ended_meanwhile_have_others_in_their_place(step, gpu, monkeypatch):
    works = compiling._PROGRAM
    monkeypatch.setattr(compiling, "_PROGRAM", DIES)
    with workers_begin(gpu):
        step.started[0].wait()
        monkeypatch.setattr(compiling, "_PROGRAM", works)
        assert step.take() == [FOUND, FOUND]
    assert len(step.started) == 2


def test_who_leaves_ends_nobody_that_began_meanwhile(step, gpu, monkeypatch):
    monkeypatch.setattr(compiling, "_PROGRAM", HANGS)
    with workers_begin(gpu):
        taken = compiling._take_begun()
        other = compiling._begin(gpu)
    assert compiling._begun is other and other.are_there()
    for workers in (taken, compiling._take_begun()):
        workers.end()
        workers.end()  # a second time is nothing
        assert not workers.are_there()


def test_workers_of_the_process_that_forked_this_one_are_not_its_own(step, gpu, monkeypatch):
    monkeypatch.setattr(compiling, "_PROGRAM", HANGS)
    monkeypatch.setattr(compiling, "WORTH_WORKERS", 3)
    with workers_begin(gpu):
        begun = compiling._begun
        with monkeypatch.context() as patch:
            patch.setattr(compiling.os, "getpid", lambda: begun._parent + 1)
            assert step.take() == [COMPILED_HERE, COMPILED_HERE]
        assert step.started[0].poll() is None
    begun.end()


def test_threads_that_begin_at_once_begin_once(step, gpu, monkeypatch):
    monkeypatch.setattr(compiling, "_PROGRAM", HANGS)
    monkeypatch.setattr(compiling, "_cache_is_empty", lambda: time.sleep(0.1) or True)
    threads = [threading.Thread(target=compiling._begin, args=(gpu,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(step.started) == 1
    compiling._take_begun().end()


def test_without_a_thread_that_hands_out_nobody_waits(step, monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    with only_compiling(), monkeypatch.context() as patch:
        patch.setattr(compiling.threading.Thread, "start", refuse)
        step.launch()
    assert step.compiled == [COMPILED_HERE, COMPILED_HERE]
    assert step.started[0].returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_kernel_is_compiled_while_others_are_noted(step, tmp_path):
    with only_compiling():
        step.launch()
        for _ in range(600):
            if len(list(tmp_path.rglob("*.cubin"))) == 2:
                break
            time.sleep(0.1)
        assert len(list(tmp_path.rglob("*.cubin"))) == 2 and not step.compiled


@pytest.mark.parametrize("reason", ["another path", "few cores", "a filled cache", "no cache"])
def test_nobody_begins_early_in_vain(step, gpu, reason: str, monkeypatch, tmp_path):
    if reason == "another path":
        monkeypatch.setattr(compiling, "kernels_for", lambda device: Decision("pytorch", "They do not."))
    elif reason == "few cores":
        monkeypatch.setattr(compiling, "cores", lambda: 3)
    elif reason == "a filled cache":
        for name in range(compiling.EMPTY):
            (tmp_path / str(name)).mkdir()
    else:
        (tmp_path / "file").touch()
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file"))
    with workers_begin(gpu):
        assert not step.started and compiling._begun is None


def test_a_cache_that_is_not_there_is_empty(step, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "new"))
    assert compiling._cache_is_empty()
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(compiling.os, "access", lambda path, mode: Path(path) != tmp_path)
    assert not compiling._cache_is_empty()  # nor can it be made


@pytest.mark.slow
def test_workers_without_their_process_end(step):
    command = [sys.executable, "-c", compiling._PROGRAM, "2", *sys.path]
    assert subprocess.run(command, input=b"", timeout=120).returncode == 0


def test_a_job_that_does_not_fit_the_pipe_is_compiled_here(step, monkeypatch):
    monkeypatch.setattr(compiling, "JOB", 64)
    with pytest.raises(ValueError, match="_transpose_kernel has arguments of .* bytes"):
        compiling._job(_transpose_kernel, (torch.float16,), {})
    assert step.take() == [COMPILED_HERE, COMPILED_HERE]


def test_a_few_kernels_are_compiled_by_threads(step, monkeypatch):
    monkeypatch.setattr(compiling, "WORTH_WORKERS", 3)
    assert step.take() == [COMPILED_HERE, COMPILED_HERE]
    assert step.take() == [FOUND, FOUND]
    assert not step.started


@pytest.mark.parametrize("worker", [DIES, HANGS])
def test_without_workers_all_is_compiled_here(step, monkeypatch, worker: str):
    monkeypatch.setattr(compiling, "_PROGRAM", worker)
    monkeypatch.setattr(compiling, "PATIENCE", 0.1)
    assert step.take() == [COMPILED_HERE, COMPILED_HERE]
    assert step.started


@pytest.mark.parametrize("python", ["/no/such/program", "", None])
def test_a_program_that_cannot_be_started_is_no_error_and_tried_once(step, monkeypatch, python: str | None):
    monkeypatch.setattr(sys, "executable", python)
    monkeypatch.setattr(compiling, "WORTH_WORKERS", 1)
    assert step.take() == [COMPILED_HERE, COMPILED_HERE]
    assert step.tried == 1 and not step.started


@pytest.mark.slow
def test_one_worker_does_it_all_where_no_more_can_be_forked(step, monkeypatch):
    monkeypatch.setattr(compiling, "_PROGRAM", FORKS_ONCE + compiling._PROGRAM)
    assert step.take() == [FOUND, FOUND]
    assert step.started[0].returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/oom_score_adj").exists(), reason="Linux tells it")
def test_workers_end_in_time_by_themselves_and_first_where_memory_is_short(step):
    job = compiling._job(_transpose_kernel, (torch.float16, torch.float16, 64), {})
    command = [sys.executable, "-c", NEVER_COMPILED, "2", *sys.path]
    process = subprocess.run(command, input=2 * job, stdout=subprocess.PIPE, timeout=50)
    assert process.returncode == 0 and process.stdout.split() == [b"1000", b"1000"]


def test_an_error_of_the_compiler_leaves_triton_as_it_was(step, monkeypatch):
    monkeypatch.setattr(compiling, "WORTH_WORKERS", 9)
    mode = pytest.importorskip("triton.runtime._async_compile").active_mode
    x = torch.zeros(2)
    with only_compiling():
        launch(_transpose_kernel)[(1,)](x, x, 64, TO_LAST=True, C=4, LANES=3, ROWS=64)  # not a power of two
    assert mode.get() is None
    assert step.take() == [COMPILED_HERE, COMPILED_HERE]


def test_a_cache_that_cannot_be_written_is_no_error_before_a_launch(step, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert step.take() == []


def test_after_an_error_no_worker_is_left(step, monkeypatch):
    monkeypatch.setattr(compiling, "_PROGRAM", HANGS)
    with pytest.raises(RuntimeError, match="no memory"), only_compiling():
        step.launch()
        raise RuntimeError("no memory")
    assert not step.compiled


@pytest.mark.slow
def test_what_cannot_be_compiled_keeps_nobody_from_the_rest(step):
    arguments = (torch.float16, torch.float16, 64), dict(TO_LAST=True, C=4, LANES=4, ROWS=64)
    good, bad = compiling._job(_transpose_kernel, *arguments), compiling._job(_transpose_kernel, (), {})
    unknown = pickle.dumps((pickle.loads(good)[0], "nnunet_lgms.no_module", "no_kernel", (), {})).ljust(compiling.JOB)
    broken = b"no pickle".ljust(compiling.JOB)
    command = [sys.executable, "-c", compiling._PROGRAM, "2", *sys.path]
    subprocess.run(command, input=bad + unknown + 2 * broken + good + 2 * compiling._LAST, check=True, timeout=120)
    assert step.take() == [FOUND, COMPILED_HERE]


def test_who_looks_for_kernels_is_in_nobody_s_way(step, monkeypatch):
    monkeypatch.setattr(compiling._here, "only_looks", True, raising=False)
    cache = compiling._only_looking(triton.runtime.cache.FileCacheManager)("KEY")
    with pytest.raises(compiling._NotCompiled):
        cache.get_group("kernel.json")
    found = []
    other = threading.Thread(target=lambda: found.append(cache.get_group("kernel.json")))
    other.start()
    other.join()
    assert found == [None]


def test_threads_that_look_at_once_leave_triton_s_manager_as_it_was(step):
    class Kernel:
        def __init__(self, *meanwhile: threading.Thread):
            self.meanwhile = meanwhile

        def warmup(self, grid):
            for thread in self.meanwhile:
                thread.start()
            time.sleep(0.1 if self.meanwhile else 0.3)

    other = threading.Thread(target=lambda: compiling._is_compiled(Kernel(), (), {}))
    assert compiling._is_compiled(Kernel(other), (), {})
    other.join()
    assert triton.knobs.cache.manager_class is None


def test_keys_do_not_depend_on_what_was_compiled_before():
    """Both gradients of attention call a function with constants."""
    functions = [f for f in vars(attention_kernels).values() if isinstance(f, triton.JITFunction)]
    gradients = [f for f in functions if "gradient_kernel" in f.__name__]
    keys = []
    for order in (gradients, gradients[::-1]):
        for function in functions:
            function.hash, function.used_global_vals = None, {}
        for gradient in order:
            compiling.fix_key(gradient)
        keys.append([gradient.cache_key for gradient in gradients])
    assert len(gradients) == 2 and keys[0] == keys[1]


@pytest.mark.parametrize(
    ("cores", "ranks", "workers"), [(3, 1, 0), (4, 1, 4), (16, 1, 16), (128, 1, 16), (16, 4, 4), (16, 8, 0)]
)
def test_the_cores_are_shared(monkeypatch, cores: int, ranks: int, workers: int):
    monkeypatch.setattr(compiling, "cores", lambda: cores)
    monkeypatch.setattr(compiling.dist, "is_initialized", lambda: ranks > 1)
    monkeypatch.setattr(compiling.dist, "get_world_size", lambda: ranks)
    assert compiling._most_workers() == workers


def test_an_application_that_is_no_python_starts_none(monkeypatch):
    monkeypatch.setattr(compiling, "cores", lambda: 16)
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert compiling._most_workers() == 0


def test_a_triton_with_other_knobs_is_no_error(monkeypatch):
    monkeypatch.setattr(compiling, "cores", lambda: 16)
    monkeypatch.setattr(triton.knobs, "compilation", object())
    assert compiling._most_workers() == 0


def test_who_always_compiles_needs_no_workers(monkeypatch):
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")
    monkeypatch.setattr(compiling, "cores", lambda: 16)
    assert compiling._most_workers() == 0
