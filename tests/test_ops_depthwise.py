"""The multi-kernel depthwise operator against PyTorch's own convolutions in float64, and its manners."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nnunet_lgms.ops import depthwise, multi_kernel_depthwise

CONV = {2: F.conv2d, 3: F.conv3d}
PAPER = (3, 5, 7, 9)
# groups of channels, kernels, spatial size
CASES = {
    "paper_3d": ([2] * 4, [(k,) * 3 for k in PAPER], (10, 12, 11)),
    "paper_2d": ([1] * 4, [(k,) * 2 for k in PAPER], (33, 20)),
    "unequal_groups": ([1, 3, 2], [(9, 9), (3, 3), (5, 5)], (17, 40)),
    "thick_slices": ([2, 1], [(1, 3, 3), (1, 7, 5)], (4, 13, 18)),
    "one_long_axis": ([1, 2], [(9, 1, 1), (1, 1, 11)], (6, 5, 19)),
    "smaller_than_kernel": ([2], [(9, 9, 9)], (2, 3, 1)),
    "single_pixel": ([3], [(7, 7)], (1, 1)),
}


def make(case, batch=2, dtype=torch.float64, bias=True, seed=0):
    channels, kernels, size = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    x = draw(batch, sum(channels), *size)
    weights = [draw(c, 1, *k) for c, k in zip(channels, kernels)]
    biases = [draw(c) for c in channels] if bias else None
    return x, weights, biases


def reference(x, weights, biases):
    parts = x.split([w.shape[0] for w in weights], 1)
    conv = CONV[x.dim() - 2]
    return torch.cat(
        [
            conv(part, w, b, padding=[k // 2 for k in w.shape[2:]], groups=w.shape[0])
            for part, w, b in zip(parts, weights, biases or [None] * len(weights))
        ],
        1,
    )


def with_gradients(function, x, weights, biases, grad):
    leaves = [t.detach().clone().requires_grad_() for t in [x, *weights, *(biases or [])]]
    n = len(weights)
    out = function(leaves[0], leaves[1 : n + 1], leaves[n + 1 :] or None)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def error(a, b):
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_matches_float64(case, batch, bias, dtype, limit):
    x, weights, biases = make(case, batch, dtype, bias)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = with_gradients(multi_kernel_depthwise, x, weights, biases, grad)
    exact = [None if t is None else [s.double() for s in t] for t in (weights, biases)]
    want = with_gradients(reference, x.double(), *exact, grad)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        assert error(a, b) < limit


@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_residual(dtype, limit):
    x, weights, biases = make("paper_3d", dtype=dtype)
    grad = torch.randn_like(x)
    got = with_gradients(lambda *args: multi_kernel_depthwise(*args, residual=True), x, weights, biases, grad)
    want = with_gradients(lambda *args: reference(*args) + args[0], x, weights, biases, grad)
    for a, b in zip(got, want, strict=True):
        assert error(a, b.double()) < limit


def test_backward_inside_autocast_keeps_its_precision():
    x, weights, biases = make("paper_2d", dtype=torch.float32)
    grad = torch.randn_like(x)
    want = with_gradients(multi_kernel_depthwise, x, weights, biases, grad)
    leaf = x.clone().requires_grad_()
    leaves = [w.requires_grad_() for w in weights]
    out = multi_kernel_depthwise(leaf, leaves, biases)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(out, [leaf, *leaves], grad)
    for a, b in zip(got, want[1:]):
        torch.testing.assert_close(a, b)


def test_large_batch_goes_in_chunks(monkeypatch):
    x, weights, biases = make("paper_3d", batch=3)
    grad = torch.randn_like(x)
    whole = with_gradients(multi_kernel_depthwise, x, weights, biases, grad)
    monkeypatch.setattr(depthwise, "CPU_CHUNK", 1)
    for a, b in zip(with_gradients(multi_kernel_depthwise, x, weights, biases, grad), whole):
        torch.testing.assert_close(a, b)


def test_second_derivatives():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    parameters = [
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in [(1, 1, 3, 1), (2, 1, 1, 5), (1,), (2,)]
    ]
    function = lambda x, a, b, c, d: multi_kernel_depthwise(x, [a, b], [c, d], residual=True)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, *parameters))
    assert torch.autograd.gradgradcheck(function, (x, *parameters))


@pytest.mark.parametrize("case", ["paper_3d", "unequal_groups"])
@pytest.mark.parametrize("flip", [False, True])
def test_opcheck(case, flip):
    x, weights, _ = make(case, dtype=torch.float32)
    channels, kernels = [w.shape[0] for w in weights], [k for w in weights for k in w.shape[2:]]
    parameters = torch.cat([w.flatten() for w in weights]).requires_grad_()
    torch.library.opcheck(
        depthwise._convolve, (x.requires_grad_(), parameters, channels, kernels, False, flip, not flip)
    )
    torch.library.opcheck(depthwise._correlate, (x, torch.randn_like(x).requires_grad_(), channels, kernels))


class Net(torch.nn.Module):
    def __init__(self, weights, biases):
        super().__init__()
        self.weights = torch.nn.ParameterList(weights)
        self.biases = torch.nn.ParameterList(biases)

    def forward(self, x):
        return multi_kernel_depthwise(x, list(self.weights), list(self.biases)).relu()


@pytest.mark.parametrize("case", ["paper_3d", "paper_2d"])
def test_compiles_in_one_graph(case):
    x, weights, biases = make(case, dtype=torch.float32)
    net = Net(weights, biases)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    want, got = net(x), compiled(x)
    torch.testing.assert_close(got, want)
    want_grads = torch.autograd.grad(want.square().sum(), net.parameters())
    got_grads = torch.autograd.grad(got.square().sum(), net.parameters())
    for a, b in zip(got_grads, want_grads):
        torch.testing.assert_close(a, b)


def test_compiles_under_autocast():
    x, weights, biases = make("paper_2d", dtype=torch.float32)
    net = Net(weights, biases)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.compile(net, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(got, net(x))
    assert got.dtype == torch.bfloat16


def test_exports_with_any_batch_and_size():
    x, weights, biases = make("paper_2d", dtype=torch.float32)
    net = Net(weights, biases)
    dims = {0: torch.export.Dim("batch", min=2, max=8), 2: torch.export.Dim("height", min=8, max=64)}
    program = torch.export.export(net, (x,), dynamic_shapes=(dims,))
    other = torch.randn(3, x.shape[1], 21, x.shape[3])
    torch.testing.assert_close(program.module()(other), net(other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    x, weights, biases = make("paper_3d", dtype=torch.float32)
    net = Net(weights, biases)
    with torch.autocast("cpu", dtype):
        out = net(x)
    assert out.dtype == dtype
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())
    want = reference(x.double(), [w.double() for w in weights], [b.double() for b in biases]).relu()
    assert error(out, want) < 1e-2
    with torch.autocast("cpu", dtype):
        assert net.double()(x.double()).dtype == torch.float64  # as PyTorch's own convolutions


def test_half_precision_input_with_float32_parameters():
    x, weights, biases = make("paper_2d", dtype=torch.float32)
    leaves = [w.requires_grad_() for w in weights]
    out = multi_kernel_depthwise(x.bfloat16(), leaves, biases)
    assert out.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.float().sum(), leaves))


@pytest.mark.parametrize("case", ["paper_3d", "paper_2d"])
def test_keeps_channels_last(case):
    x, weights, biases = make(case)
    memory_format = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    last = x.to(memory_format=memory_format)
    out = multi_kernel_depthwise(last, weights, biases)
    assert out.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(out, reference(x, weights, biases))
    assert multi_kernel_depthwise(x, weights, biases).is_contiguous()
    sliced = F.pad(x, (1, 1))[..., 1:-1]
    torch.testing.assert_close(multi_kernel_depthwise(sliced, weights, biases), reference(x, weights, biases))


def test_only_asked_gradients_are_computed(monkeypatch):
    x, weights, biases = make("paper_2d", dtype=torch.float32)
    calls = []
    for name in ("_convolve", "_correlate"):
        real = getattr(depthwise, name)
        monkeypatch.setattr(depthwise, name, lambda *a, real=real, name=name: calls.append(name) or real(*a))

    multi_kernel_depthwise(x.requires_grad_(), weights, biases).sum().backward()  # frozen weights
    assert calls == ["_convolve", "_convolve"]
    assert x.grad is not None
    calls.clear()
    net = Net(weights, biases)
    net(x.detach()).sum().backward()  # first layer
    assert calls == ["_convolve", "_correlate"]


def test_gradients_repeat_bit_for_bit():
    x, weights, biases = make("paper_3d", dtype=torch.float32)
    grad = torch.randn_like(x)
    torch.use_deterministic_algorithms(True)
    try:
        first = with_gradients(multi_kernel_depthwise, x, weights, biases, grad)
        second = with_gradients(multi_kernel_depthwise, x, weights, biases, grad)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_activation_checkpointing():
    x, weights, biases = make("paper_2d", dtype=torch.float32)
    net = Net(weights, biases)
    want = torch.autograd.grad(net(x).square().sum(), net.parameters())
    got = torch.autograd.grad(checkpoint(net, x, use_reentrant=False).square().sum(), net.parameters())
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_shapes_without_data():
    x, weights, biases = make("paper_3d", dtype=torch.float32)
    meta = lambda t: t.to("meta")  # noqa: E731
    assert multi_kernel_depthwise(meta(x), list(map(meta, weights)), list(map(meta, biases))).shape == x.shape


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda x, w, b: (x[0, 0], w, b), "(B, C, H, W)"),
        (lambda x, w, b: (x.long(), w, b), "floating point"),
        (lambda x, w, b: (x, [w[0][..., :2], *w[1:]], b), "odd size"),
        (lambda x, w, b: (x, w[1:], b[1:]), "add up to the channels"),
        (lambda x, w, b: (x, [], None), "add up to the channels"),
        (lambda x, w, b: (x, [w[0].unsqueeze(-1), *w[1:]], b), "spatial axes"),
        (lambda x, w, b: (x, [w[0].expand(-1, 2, -1, -1), *w[1:]], b), "spatial axes"),
        (lambda x, w, b: (x, w, b[:-1]), "biases"),
    ],
)
def test_bad_input_is_one_sentence(spoil, message):
    with pytest.raises(ValueError) as caught:
        multi_kernel_depthwise(*spoil(*make("paper_2d", dtype=torch.float32)))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dim", [2, 3])
def test_an_empty_batch_has_zero_gradients(dim):
    x = torch.zeros(0, 4, *(6,) * dim, requires_grad=True)
    weight = torch.randn(4, 1, *(5,) * dim, requires_grad=True)
    multi_kernel_depthwise(x, [weight]).sum().backward()
    assert x.grad.shape == x.shape and not weight.grad.any()
