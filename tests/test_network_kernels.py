"""The published network with every kernel against PyTorch's operators, on a GPU, in the half precision of training."""

import copy

import pytest
import torch

from nnunet_lgms import LGMSNet
from nnunet_lgms.blocks import ConvNormAct
from nnunet_lgms.ops import set_kernels
from nnunet_lgms.ops.memory_format import channels_last

SHAPE = {2: (4, 3, 96, 120), 3: (2, 1, 40, 48, 44)}

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dim", [2, 3])
def test_maps_are_channels_last_from_the_first_convolution_on(dim, channels):
    """A map of one channel is contiguous in both formats, and cuDNN goes by its strides."""
    network = LGMSNet.paper(channels, 2, dim=dim).cuda()
    found = {}
    for name, module in network.named_modules():
        if isinstance(module, ConvNormAct):
            module.register_forward_hook(lambda m, x, out, name=name: found.update({name: channels_last(out)}))
    with torch.autocast("cuda"):
        network(torch.randn(2, channels, *(32,) * dim, device="cuda"))
    assert found and all(found.values()), found


@pytest.fixture(params=[2, 3])
def network_and_batch(request, monkeypatch):
    from nnunet_lgms.ops.triton import conv

    for threshold in ("MIN_VOXELS", "MIN_VOXELS_EPILOGUE"):  # the kernels of large maps on small ones
        monkeypatch.setattr(conv, threshold, 0)
    torch.manual_seed(0)
    shape = SHAPE[request.param]
    yield LGMSNet.paper(shape[1], 3, dim=request.param).cuda(), torch.randn(shape, device="cuda")
    set_kernels("auto")


def run(network, x, kernels, half=True, compiled=False):
    """Output and all gradients in float64."""
    set_kernels(kernels)
    network = copy.deepcopy(network)
    network, x = (network, x) if half else (network.double(), x.double())
    if compiled:  # the copy: one of a compiled network has forgotten that sizes are fixed
        network = torch.compile(network, fullgraph=True, dynamic=False)
    with torch.autocast("cuda", enabled=half):
        out = network(x)
    grad = torch.linspace(-1, 1, out.numel(), device="cuda").view_as(out)
    (1024 * (out.double() * grad).mean()).backward()
    gradients = torch.cat([p.grad.flatten().double() for p in network.parameters() if p.grad is not None])
    with torch.no_grad(), torch.autocast("cuda", enabled=half):
        predicted = network.eval()(x)
    return out.detach().double(), gradients, predicted.double()


def error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_errors_are_those_of_half_precision(network_and_batch, compiled):
    """A network that is not trained passes on what is rounded: gradients err by a tenth, whoever rounds."""
    network, x = network_and_batch
    expected = run(network, x, "off", half=False)
    pytorch = run(network, x, "off")
    ours = run(network, x, "auto", compiled=compiled)
    for name, want, theirs, mine in zip(("output", "gradient", "prediction"), expected, pytorch, ours, strict=True):
        print(f"{name}: PyTorch {error(theirs, want):.2e}, kernels {error(mine, want):.2e}")
        assert error(mine, want) < 1.5 * error(theirs, want) + 1e-4


def test_gradients_repeat_bit_for_bit(network_and_batch, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    first = run(*network_and_batch, "auto")
    second = run(*network_and_batch, "auto")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
