"""Which path operators take on which device, and what happens where a kernel cannot be built or run."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from nnunet_lgms.graphs.step import training_step
from nnunet_lgms.ops import backend
from nnunet_lgms.ops.backend import KernelsSwitchedOff, kernels_for, operator, set_kernels, use_kernels, with_fallback
from nnunet_lgms.ops.launch import launch

H100 = {"name": "NVIDIA H100", "major": 9, "minor": 0, "shared_memory_per_block_optin": 232_448}
CARDS = {  # what differs from an H100, and what the reason must say
    "T4": ({"name": "Tesla T4", "major": 7, "minor": 5, "shared_memory_per_block_optin": 65_536}, "7.5"),
    "little shared memory": ({"shared_memory_per_block_optin": 65_536}, "65536"),
    "an A10": ({"name": "NVIDIA A10", "major": 8, "minor": 6, "shared_memory_per_block_optin": 101_376}, None),
    "an RTX 5090": ({"major": 12, "shared_memory_per_block_optin": 101_376}, None),
    "H100": ({}, None),
}


class Card:
    """The CUDA device that the machine of the tests has not."""

    def __init__(self, monkeypatch, **properties):
        self.asked = 0
        self._properties = SimpleNamespace(**{**H100, **properties})
        monkeypatch.setattr(torch.cuda, "get_device_properties", self._get)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        triton = pytest.importorskip("triton")
        monkeypatch.setattr(triton.language, "tuple", tuple, raising=False)  # Triton 3.2 has none, see below
        monkeypatch.setattr(backend, "_failed", {})

    def _get(self, device):
        self.asked += 1
        return self._properties


@pytest.fixture(autouse=True)
def decided_anew():
    backend._hardware.cache_clear()
    yield
    backend._hardware.cache_clear()
    set_kernels("auto")


@pytest.mark.parametrize("card", CARDS)
def test_kernels_run_on_the_cards_that_they_are_made_for(card, monkeypatch):
    properties, refused = CARDS[card]
    card = Card(monkeypatch, **properties)
    kernels_for("cuda")
    asked = card.asked
    for device in ("cuda", "cuda:0", torch.device("cuda", 0)):
        decision = kernels_for(device)
        assert decision.path == ("kernels" if refused is None else "pytorch")
        assert (refused or card._properties.name) in decision.reason and decision.reason.endswith(".")
    assert card.asked == asked


def test_a_triton_without_tuples_is_too_old(monkeypatch):
    Card(monkeypatch)
    monkeypatch.delattr(sys.modules["triton"].language, "tuple")
    decision = kernels_for("cuda")
    assert decision.path == "pytorch" and "Triton 3.3, which comes with PyTorch 2.7, and this is" in decision.reason


def test_every_reason_is_one_sentence(monkeypatch):
    Card(monkeypatch)
    reasons = [kernels_for("cpu").reason]
    with backend.kernels("off"):
        reasons.append(kernels_for("cuda").reason)
        assert kernels_for("cuda").path == "pytorch"
    assert kernels_for("cuda").path == "kernels"
    for patched in (
        patch.object(torch.version, "hip", "6.4"),
        patch.object(backend, "HAS_TRITON", False),
        patch.dict(sys.modules, {"triton": None}),
    ):
        with patched:
            backend._hardware.cache_clear()
            assert kernels_for("cuda").path == "pytorch"
            reasons.append(kernels_for("cuda").reason)
        backend._hardware.cache_clear()
    assert [word in reason for word, reason in zip(("'cpu'", "switched off", "AMD", "package triton"), reasons)] == [
        1
    ] * 4


@pytest.mark.parametrize("setting", ["yes", None, "AUTO"])
def test_a_switch_has_three_settings(setting):
    with pytest.raises(ValueError, match=f"'auto', 'on' or 'off', not {setting!r}"):
        set_kernels(setting)


@pytest.mark.parametrize(("value", "setting"), [("off", "off"), ("ON", "on"), ("auto", "auto")])
def test_the_environment_variable_is_the_first_setting(value, setting):
    assert backend._setting_of(value) == setting
    with pytest.raises(ValueError, match="NNUNET_LGMS_KERNELS is 'no': set it to auto, on or off, or unset it."):
        backend._setting_of("no")


@pytest.mark.parametrize("setting", ["auto", "on", "off"])
def test_where_nothing_is_prepared_a_thread_goes_without_kernels_that_are_not_asked_for(setting, monkeypatch):
    Card(monkeypatch)
    cudnn = SimpleNamespace(benchmark=True)
    monkeypatch.setattr(torch.backends, "cudnn", cudnn)

    def path() -> str:
        return kernels_for("cuda").path

    outside = {"auto": "kernels", "on": "kernels", "off": "pytorch"}[setting]
    set_kernels(setting)
    with backend.nothing_prepared():
        assert path() == (outside if setting == "on" else "pytorch") and cudnn.benchmark == (setting == "on")
        with ThreadPoolExecutor(1) as other:
            assert other.submit(path).result() == outside
        with backend.nothing_prepared():
            assert kernels_for("cuda").reason.endswith(".")
        assert path() == (outside if setting == "on" else "pytorch")
    assert path() == outside and cudnn.benchmark
    with pytest.raises(KeyError), backend.nothing_prepared():
        raise KeyError
    assert path() == outside and cudnn.benchmark


def test_threads_that_prepare_nothing_leave_cudnn_as_it_was(monkeypatch):
    cudnn = SimpleNamespace(benchmark=True)
    monkeypatch.setattr(torch.backends, "cudnn", cudnn)
    first, second = backend.nothing_prepared(), backend.nothing_prepared()
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        one.submit(first.__enter__).result()
        other.submit(second.__enter__).result()
        one.submit(first.__exit__, None, None, None).result()
        assert not cudnn.benchmark  # the other is still inside
        other.submit(second.__exit__, None, None, None).result()
    assert cudnn.benchmark


def test_a_decision_is_a_constant_of_compiled_code_and_the_switch_compiles_anew(monkeypatch):
    card = Card(monkeypatch)

    def function(x):
        return x + 1 if backend._setting != "off" and backend._chosen(0) else x - 1

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    x = torch.zeros(2)
    assert compiled(x)[0].item() == 1
    asked = card.asked
    assert [compiled(x)[0].item() for _ in range(3)] == [1] * 3 and card.asked == asked
    with backend.kernels("off"):
        assert compiled(x)[0].item() == -1
    assert compiled(x)[0].item() == 1


# --- a kernel that fails ---------------------------------------------------------------------------------------------


class OnCard(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True
    device = torch.device("cuda", 0)


def on_card(*shape):
    return torch.ones(shape).as_subclass(OnCard)


class Kernel:
    """A kernel of which every launch raises."""

    __name__ = "_pool_forward_kernel"

    def __init__(self, error):
        self.error, self.launched = error, 0

    def __getitem__(self, grid):
        def run(*args):
            self.launched += 1
            raise self.error

        return run


def errors():
    pytest.importorskip("triton")
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources

    return [
        OutOfResources(200_000, 101_376, "shared memory"),
        CompilationError("tl.dot(a, b)", None, "wrong"),
        RuntimeError("PassManager::run failed"),
        subprocess.CalledProcessError(1, ["gcc"]),
        PermissionError(13, "Permission denied", "/.triton"),
    ]


@pytest.fixture
def card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: patch.object(torch, "_unused", create=True))
    return Card(monkeypatch)


@pytest.mark.parametrize("number", range(5))
def test_an_operator_goes_on_without_the_kernel_that_failed(number, card):
    kernel = Kernel(errors()[number])

    @operator
    def double(x):
        if use_kernels(x):
            launch(kernel)[(1,)](None, x, 3)
            return None
        return x + x

    with pytest.warns(RuntimeWarning, match="_pool_forward_kernel failed on cuda:0.*PyTorch's operators") as warned:
        for _ in range(3):
            assert torch.equal(torch.as_tensor(double(on_card(2))), torch.full((2,), 2.0))
    assert kernel.launched == 1 and len(warned) == 1
    decision = kernels_for("cuda:0")
    assert decision.path == "pytorch" and "_pool_forward_kernel failed on cuda:0" in decision.reason
    assert kernels_for("cuda:1").path == "kernels"


def test_a_step_whose_backward_pass_failed_is_taken_again(card):
    kernel, steps = Kernel(errors()[0]), []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            if use_kernels(on_card(1)):
                launch(kernel)[(1,)](on_card(1))
            return grad * 2

    def step(x):
        steps.append(x)
        (gradient,) = torch.autograd.grad(Double.apply(x).sum(), x)
        return gradient

    with pytest.warns(RuntimeWarning, match="PyTorch's operators"):
        assert with_fallback(step, torch.ones(1, requires_grad=True)).item() == 2
    assert len(steps) == 2


def test_the_training_step_is_taken_again_with_gradients_of_one_step():
    failures = [KernelsSwitchedOff("once"), None, None]

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            if failures.pop(0):
                raise KernelsSwitchedOff("once")
            return grad

    weights = []
    for _ in range(2):
        network = torch.nn.Linear(2, 1)
        torch.nn.init.ones_(network.weight)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        data = torch.tensor([[1.0, 2.0]])
        # the gradient of the bias, beside the function that fails, is there before
        training_step(network, lambda out, target: Fails.apply(out * 2).sum() + out.sum(), optimizer, None, data, None)
        weights.append(network.weight.detach())
    assert torch.equal(*weights) and not failures


@pytest.mark.parametrize("error", [RuntimeError("Triton Error [CUDA]: an illegal memory access"), KeyError("x")])
def test_other_errors_are_errors(error, card):
    pytest.importorskip("triton")
    kernel = Kernel(error)
    with pytest.raises(type(error)) as caught:
        with_fallback(launch(kernel)[(1,)], on_card(1))
    assert caught.value is error and kernel.launched == 1 and kernels_for("cuda:0").path == "kernels"


def test_processes_that_train_together_stop(card, monkeypatch):
    monkeypatch.setattr(backend.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(backend.dist, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="set NNUNET_LGMS_KERNELS=off for all processes") as caught:
        with_fallback(launch(Kernel(errors()[0]))[(1,)], on_card(1))
    assert not isinstance(caught.value, KernelsSwitchedOff)


# --- who asks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["blocks", "architecture"])
def test_blocks_and_networks_call_operators_and_ask_nothing(package):
    """What decides between kernels and PyTorch, and what is private to either, is the operators' alone."""
    private = ("ops.backend", "ops.triton", "ops.cpu", "ops.launch", "ops.memory_format", "use_kernels", "kernels_for")
    modules = sorted(Path(backend.__file__).parents[1].joinpath(package).glob("*.py"))
    asked = [(module.name, name) for module in modules for name in private if name in module.read_text("utf-8")]
    assert modules and not asked


# --- without Triton --------------------------------------------------------------------------------------------------

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # an import of it fails
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else find(name, *a)
import torch
from nnunet_lgms import LGMSNet
from nnunet_lgms.ops.backend import HAS_TRITON, kernels_for
network = LGMSNet(1, 2, 2, [8, 8], torch.nn.Conv2d, 3, [1, 2])
network(torch.randn(1, 1, 8, 8)).sum().backward()
assert not HAS_TRITON
"""


@pytest.mark.slow
def test_without_triton_the_package_works_and_is_silent(clean_env):
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], env=clean_env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == ""


# --- older versions of PyTorch and Triton ----------------------------------------------------------------------------


def test_a_triton_that_compiles_one_kernel_after_the_other_is_told(monkeypatch):
    triton = pytest.importorskip("triton")
    Card(monkeypatch)
    monkeypatch.delattr(triton, "knobs", raising=False)  # Triton 3.3
    decision = kernels_for("cuda")
    assert decision.path == "kernels" and "so the first step takes longer" in decision.reason


def test_a_triton_without_tuples_in_kernels_is_refused(monkeypatch):
    """Triton 3.2, of PyTorch 2.6: the compiler says "bands is not defined" of a convolution's kernel."""
    triton = pytest.importorskip("triton")
    Card(monkeypatch)
    monkeypatch.delattr(triton.language, "tuple", raising=False)
    decision = kernels_for("cuda")
    assert decision.path == "pytorch" and "need Triton 3.3" in decision.reason


def test_such_a_triton_compiles_all_the_same(monkeypatch):
    triton = pytest.importorskip("triton")
    from nnunet_lgms.ops import launch as launching

    monkeypatch.delattr(triton, "AsyncCompileMode", raising=False)
    monkeypatch.setattr(launching, "build_launcher", lambda kernel: None)
    asked = []
    kernel = SimpleNamespace(warmup=lambda *args, grid, **kwargs: asked.append((args, kwargs)))
    launching._compile([(kernel, (1, 2), (("K", 3),))])
    assert asked == [((1, 2), {"K": 3})]


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_asked_of_a_pytorch_that_has_one_switch_only(monkeypatch, allowed):
    pytest.importorskip("triton")
    from nnunet_lgms.ops.triton import depthwise

    monkeypatch.setattr(torch.backends, "cudnn", SimpleNamespace(allow_tf32=allowed))
    assert depthwise._precision(torch.float32) == ("tf32" if allowed else "tf32x3")
    assert depthwise._precision(torch.float16) == "tf32"


def test_operators_return_what_torch_2_6_can_read():
    """Its `infer_schema` knows typing.List and no list, as the result of an operator."""
    folder = Path(backend.__file__).parent
    for file in (*folder.glob("*.py"), *folder.glob("triton/*.py")):
        operators = file.read_text().split("@triton_op(")[1:] + file.read_text().split(".custom_op(")[1:]
        for text in operators:
            assert "-> list[" not in text.split(":\n", 1)[0].split('"""')[0], file
