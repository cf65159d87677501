"""Kernels that are compiled in place of being launched; with real ones in test_graphs.py, on a GPU."""

import threading

import pytest
import torch

pytest.importorskip("triton")

from nnunet_lgms.ops import launch as launching
from nnunet_lgms.ops.launch import _name, launch, only_compiling


class Kernel:
    """As much of Triton's kernel as is used."""

    def __init__(self):
        self.launched, self.compiled = [], []

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launched.append((grid, args, kwargs))

    def warmup(self, *args, grid, **kwargs):
        self.compiled.append((args, kwargs))
        return self


def test_a_launch_is_a_launch():
    kernel, x = Kernel(), torch.zeros(2)
    launch(kernel)[(3,)](x, 1, C=4)
    assert kernel.launched == [((3,), (x, 1), {"C": 4})] and not kernel.compiled


def test_nothing_is_launched_and_each_version_compiled_once(monkeypatch):
    kernel, built = Kernel(), []
    monkeypatch.setattr(launching, "build_launcher", lambda k: built.append((k, threading.current_thread())))
    with only_compiling():
        for _ in range(3):
            launch(kernel)[(3,)](torch.zeros(2), None, 1, C=4)
        launch(kernel)[(3,)](torch.zeros(2, dtype=torch.float16), None, 1, C=4)
        assert not kernel.compiled
    assert not kernel.launched
    assert kernel.compiled == [((torch.float32, None, 1), {"C": 4}), ((torch.float16, None, 1), {"C": 4})]
    ((of, thread),) = built
    assert of is kernel and thread is not threading.main_thread()
    launch(kernel)[(1,)]()
    assert len(kernel.launched) == 1


def test_a_thread_that_computes_meanwhile_launches(monkeypatch):
    monkeypatch.setattr(launching, "build_launcher", lambda kernel: None)
    kernel, other = Kernel(), Kernel()
    with only_compiling():
        thread = threading.Thread(target=lambda: launch(other)[(3,)](1))
        thread.start()
        thread.join()
        launch(kernel)[(3,)](torch.zeros(2))
        assert not torch._C._is_multithreading_enabled()  # gradients are of this thread, also on a GPU
    assert torch._C._is_multithreading_enabled()
    assert other.launched == [((3,), (1,), {})] and not other.compiled
    assert not kernel.launched


def test_what_triton_does_not_compile_needs_no_launcher():
    class Interpreted(Kernel):
        def warmup(self, *args, grid, **kwargs):
            super().warmup(*args, grid=grid, **kwargs)

    kernel = Interpreted()
    with only_compiling():
        launch(kernel)[(3,)](1)
    assert kernel.compiled == [((1,), {})]


def test_a_kernel_that_cannot_be_compiled_ahead_fails_where_it_is_launched():
    from triton.compiler.errors import CompilationError

    class Wrong(Kernel):
        def warmup(self, *args, grid, **kwargs):
            raise CompilationError("tl.dot(a, b)", None, "wrong")

    with only_compiling():
        launch(Wrong())[(3,)](1)


def test_after_an_error_nothing_is_compiled_and_launches_are_launches():
    kernel = Kernel()
    with pytest.raises(RuntimeError, match="no memory"), only_compiling():
        launch(kernel)[(3,)](1)
        raise RuntimeError("no memory")
    assert not kernel.compiled
    launch(kernel)[(1,)]()
    assert len(kernel.launched) == 1


def test_the_name_of_a_kernel_is_found_in_what_compilers_see():
    from torch.library import wrap_triton

    from nnunet_lgms.ops.triton.layout import _transpose_kernel

    for kernel in (_transpose_kernel, wrap_triton(_transpose_kernel)):
        assert _name(kernel) == "_transpose_kernel"
