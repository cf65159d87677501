"""The operators that have a form of their own on the CPU, against PyTorch in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nnunet_lgms import LGMSNet
from nnunet_lgms.ops.conv import same_conv
from nnunet_lgms.ops.cpu import bottleneck as bottleneck_cpu
from nnunet_lgms.ops.cpu import conv as conv_cpu
from nnunet_lgms.ops.cpu import depthwise as depthwise_cpu
from nnunet_lgms.ops.cpu import norm_act as norm_cpu
from nnunet_lgms.ops.depthwise import multi_kernel_depthwise
from nnunet_lgms.ops.memory_format import CHANNELS_LAST, channels_last, wants_channels_last
from nnunet_lgms.ops.norm_act import norm_act

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
MAPS = [(3, 6, 9, 13), (1, 6, 9, 13), (2, 6, 5, 7, 3), (1, 6, 1, 7, 3)]
NORMS = {
    2: [nn.BatchNorm2d, nn.InstanceNorm2d],
    3: [nn.BatchNorm3d, nn.InstanceNorm3d],
}


def random_map(*shape):
    torch.manual_seed(sum(shape))
    return torch.randn(shape).contiguous(memory_format=CHANNELS_LAST[len(shape)]).requires_grad_()


def double(x):
    return x.detach().double().contiguous().requires_grad_()


def assert_same(out, inputs, reference, reference_inputs, tolerance=2e-5):
    """Results and gradients agree, relative to the largest value of each."""
    grad = torch.randn(out.shape, dtype=torch.float64)
    grads = torch.autograd.grad(out, inputs, grad.float())
    expected = torch.autograd.grad(reference, reference_inputs, grad)
    for value, target in zip((out, *grads), (reference, *expected), strict=True):
        torch.testing.assert_close(
            value.double(), target, rtol=0, atol=tolerance * float(target.detach().abs().max()) + 1e-7
        )


@pytest.mark.parametrize("shape", MAPS)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("chunk", [100, 1 << 19])
def test_bottleneck(shape, affine, kind, training, chunk, monkeypatch):
    monkeypatch.setattr(bottleneck_cpu, "CHUNK", chunk)
    dim = len(shape) - 2
    norm = NORMS[dim][kind]
    modules = nn.ModuleList([norm(6, affine=affine), CONV[dim](6, 20, 1), norm(20, affine=affine), CONV[dim](20, 5, 1)])
    with torch.no_grad():
        for tensor in [*modules.parameters(), *modules.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor))
    modules.train(training)
    precise = copy.deepcopy(modules).double()
    norm1, expand, norm2, squeeze = precise
    x = random_map(*shape)
    y = double(x)

    assert bottleneck_cpu.fits(x, modules[0], modules[2])
    out = bottleneck_cpu.inverted_bottleneck(x, *modules)
    assert channels_last(out)
    expected = squeeze(norm2(F.gelu(expand(norm1(F.gelu(y))))))
    assert_same(out, [x, *modules.parameters()], expected, [y, *precise.parameters()], tolerance=1e-4)
    for buffer, target in zip(modules.buffers(), precise.buffers(), strict=True):
        torch.testing.assert_close(buffer.double(), target.double(), rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # makes its maps anew in every pass
        again = bottleneck_cpu.inverted_bottleneck(x, *modules)
        torch.testing.assert_close(again, out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("sets", [1, 2])
def test_bottleneck_derivatives(affine, known, sets, monkeypatch):
    monkeypatch.setattr(bottleneck_cpu, "CHUNK", 20)
    torch.manual_seed(0)

    def random(*shape):
        return torch.rand(shape, dtype=torch.float64).add_(0.3).requires_grad_()

    norms = [(random(3), random(3)), (random(4), random(4))] if affine else [(None, None)] * 2
    parameters = [*norms[0], random(4, 3), random(4), *norms[1], random(2, 4), None]
    x = torch.randn(sets, 7, 3, dtype=torch.float64, requires_grad=True)
    statistics = [bottleneck_cpu.Known(*torch.rand(2, sets, n, dtype=torch.float64).add_(0.3)) for n in (3, 4)]
    if not known:
        statistics = [bottleneck_cpu.Known()] * 2
    given = [p for p in parameters if p is not None]

    def bottleneck(x, *values):
        values = iter(values)
        full = [None if p is None else next(values) for p in parameters]
        return bottleneck_cpu._Bottleneck.apply(x, *full, (1e-5, 1e-3), tuple(statistics))[0]

    assert torch.autograd.gradcheck(bottleneck, (x, *given))
    assert torch.autograd.gradgradcheck(bottleneck, (x, *given))


@pytest.mark.parametrize("shape", [*MAPS, (3, 20, 4, 5), (2, 20, 4, 2, 3)])
@pytest.mark.parametrize("kind", ["batch", "instance", "instance, affine", "group"])
@pytest.mark.parametrize("activation", ["none", "relu", "silu", "gelu", "gelu_first"])
@pytest.mark.parametrize("memory_format", ["channels last", "contiguous"])
def test_norm_act(shape, kind, activation, memory_format):
    dim, channels = len(shape) - 2, shape[1]
    norm = {
        "batch": lambda: NORMS[dim][0](channels),
        "instance": lambda: NORMS[dim][1](channels),
        "instance, affine": lambda: NORMS[dim][1](channels, affine=True),
        "group": lambda: nn.GroupNorm(2, channels),
    }[kind]()
    x, residual = random_map(*shape), random_map(*shape)
    if memory_format == "contiguous":
        x, residual = (t.detach().contiguous().requires_grad_() for t in (x, residual))
    assert norm_cpu.fits(x, norm)
    precise, y, added = copy.deepcopy(norm).double(), double(x), double(residual)
    act = {"none": lambda t: t, "relu": F.relu, "silu": F.silu, "gelu": F.gelu}
    expected = precise(F.gelu(y)) if activation == "gelu_first" else act[activation](precise(y))
    before = x.detach().clone()
    out = norm_act(x, norm, activation, residual)
    assert_same(out, [x, residual, *norm.parameters()], expected + added, [y, added, *precise.parameters()])
    assert torch.equal(x, before)
    assert channels_last(out) == channels_last(x)
    with torch.no_grad():
        torch.testing.assert_close(norm_act(x, norm, activation, residual), out)


def test_norm_act_leaves_its_input_alone_without_a_norm():
    x = random_map(2, 4, 5, 6).detach()
    before = x.clone()
    norm_act(x, nn.Identity(), "silu", residual=x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("affine", [False, True])
def test_instance_norm_derivatives(affine):
    x = random_map(3, 2, 2, 3).detach().double().requires_grad_()
    parameters = [torch.rand(2, dtype=torch.float64, requires_grad=True) for _ in range(2)] if affine else [None] * 2

    def norm(x, *parameters):
        return norm_cpu.instance_norm(x, *(parameters or (None, None)), 1e-5)

    inputs = [x, *parameters] if affine else [x]
    assert torch.autograd.gradcheck(norm, inputs)
    assert torch.autograd.gradgradcheck(norm, inputs)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize(
    ("channels", "out_channels", "size", "groups", "halves"),
    [
        (1, 5, 6, 1, False),
        (3, 8, 9, 1, False),
        (8, 16, 9, 2, False),
        (8, 16, 9, 2, True),  # one convolution for each half
        (64, 8, 9, 2, True),  # joined first
        (48, 64, 2, 1, False),  # more weights than voxels
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_same_conv(dim, kernel, channels, out_channels, size, groups, halves, bias):
    x = random_map(1, channels, *[size, size + 1, 2][:dim])
    conv = CONV[dim](channels, out_channels, kernel, padding=kernel // 2, groups=groups, bias=bias)
    precise, y = copy.deepcopy(conv).double(), double(x)
    maps = [part.contiguous(memory_format=CHANNELS_LAST[x.ndim]) for part in x.chunk(2, 1)] if halves else x
    out = same_conv(maps, conv.weight, conv.bias, groups)
    assert_same(out, [x, *conv.parameters()], precise(y), [y, *precise.parameters()])
    small = kernel > 1 and conv.weight.numel() > 2 * x.numel()
    assert out.is_contiguous() if small else channels_last(out)


@pytest.mark.parametrize("size", [(5, 18), (40, 7), (3, 5, 18), (17, 2, 6), (4, 1, 33)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("memory_format", ["channels last", "contiguous"])
@pytest.mark.parametrize("bias", [False, True])
def test_depthwise(size, batch, memory_format, bias):
    dim = len(size)
    kernels = [(1, 1, 1)[:dim], (1, 5, 3)[:dim], (3, 3, 3)[:dim], (7, 1, 9)[-dim:]]
    channels = [1, 3, 2, 4]
    x = random_map(batch, sum(channels), *size)
    x = x if memory_format == "channels last" else x.detach().contiguous().requires_grad_()
    weights = [torch.randn(c, 1, *k, requires_grad=True) for c, k in zip(channels, kernels, strict=True)]
    biases = [torch.randn(c, requires_grad=True) for c in channels] if bias else None
    assert depthwise_cpu.fits(x)
    out = multi_kernel_depthwise(x, weights, biases, residual=True)
    assert channels_last(out) == channels_last(x)

    y = double(x)
    precise = [double(t) for t in weights]
    precise_biases = [double(t) for t in biases or []]
    conv = {2: F.conv2d, 3: F.conv3d}[dim]
    parts = zip(y.split(channels, 1), precise, precise_biases or [None] * 4, strict=True)
    expected = [conv(part, w, b, padding=[k // 2 for k in w.shape[2:]], groups=len(w)) for part, w, b in parts]
    assert_same(
        out, [x, *weights, *(biases or [])], torch.cat(expected, 1) + y, [y, *precise, *precise_biases]
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(2, 2, 40, 37), (1, 2, 40, 37), (2, 1, 33, 20, 18), (1, 1, 33, 20, 18)])
def test_network_has_the_gradients_of_double_precision(shape):
    """Double precision does not take these paths. Sizes at which no norm has but a few voxels, which enlarge errors."""
    torch.manual_seed(0)
    network = LGMSNet.paper(shape[1], 3, dim=len(shape) - 2)
    precise = copy.deepcopy(network).double()
    x = torch.randn(shape)
    assert wants_channels_last(x)
    assert not wants_channels_last(x.double())
    out, expected = network(x), precise(x.double())
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-3 * float(expected.detach().abs().max()))
    grad = torch.randn_like(expected)
    out.backward(grad.float())
    expected.backward(grad)
    # The gradient of a bias in front of a norm is zero but for rounding.
    typical = torch.stack([q.grad.norm() for q in precise.parameters()]).median()
    for (name, p), q in zip(network.named_parameters(), precise.parameters(), strict=True):
        assert (p.grad - q.grad).norm() < 1e-2 * (q.grad.norm() + typical), name


def test_convolution_of_a_single_small_sample_is_onednn(monkeypatch):
    """PyTorch's own choice for it is a loop of matrix products."""
    called = []
    onednn = torch.mkldnn_convolution
    monkeypatch.setattr(torch, "mkldnn_convolution", lambda *args: called.append(1) or onednn(*args))
    conv_cpu.same_conv([random_map(1, 8, 8, 8, 8)], torch.randn(8, 8, 3, 3, 3), None, 1)
    assert called
