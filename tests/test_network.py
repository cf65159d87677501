"""What the network promises on maps of any size, and how its attention works."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from networks import tiny_network
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from nnunet_lgms import LGMSNet
from nnunet_lgms.blocks import FusionBlock, GMSBlock, LMSBlock
from nnunet_lgms.blocks.attention import PositionGroupAttention, SparseTransformer, real_token_mask
from nnunet_lgms.ops import tokens
from nnunet_lgms.ops.tokens import fold_positions, unfold_positions

SIZES = {
    2: [(32, 32), (33, 47), (1, 1), (5, 40), (2, 3), (17, 16)],
    3: [(16, 16, 16), (9, 14, 11), (1, 1, 1), (1, 20, 7), (5, 6, 7), (3, 2, 17)],
}
CASES = [pytest.param(dim, size, id="x".join(map(str, size))) for dim, sizes in SIZES.items() for size in sizes]


# --- published size ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "channels", "classes", "expected"), [(2, 3, 1, 2_321_393), (3, 1, 14, 6_193_742)])
def test_parameters_are_the_published_ones(dim, channels, classes, expected):
    assert sum(p.numel() for p in LGMSNet.paper(channels, classes, dim).parameters()) == expected


# --- any size ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("dim", "size"), CASES)
def test_any_size(dim, size, training):
    torch.manual_seed(0)
    network = tiny_network(dim).train(training)
    x = torch.randn(2, 1, *size, requires_grad=True)
    out = network(x)
    assert out.shape == (2, 2, *size)
    out.square().mean().backward()
    assert torch.isfinite(out).all() and torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("patch", "strides", "kernel_sizes"),
    [
        # thick slices: the first axis is neither pooled nor convolved at high resolution
        ((5, 40, 33), [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [1, 2, 2]], [[1, 3, 3]] * 2 + [[3, 3, 3]] * 3),
        ((20, 24, 16), [[1, 1, 1], [1, 2, 2]], [[1, 3, 3], [3, 3, 3]]),
        ((24, 20, 28), [[1] * 3] + [[2] * 3] * 2 + [[1, 2, 2], [2, 1, 1], [1, 1, 2], [1, 2, 1]], [[3] * 3] * 7),
        ((48, 30), [[1, 1], [3, 2], [2, 3], [4, 2]], [[3, 3]] * 4),
    ],
    ids=["thick slices", "two stages", "seven stages", "strides of 3 and 4"],
)
def test_planned_strides_and_kernels(patch, strides, kernel_sizes):
    network = tiny_network(
        len(patch), len(strides), strides=strides, kernel_sizes=kernel_sizes, deep_supervision=True
    ).eval()
    outputs = network(torch.randn(1, 1, *patch))
    assert len(outputs) == len(strides) - 1
    size = patch
    for output, stride in zip(outputs, strides, strict=False):
        size = tuple(math.ceil(n / s) for n, s in zip(size, stride, strict=True))
        assert output.shape == (1, 2, *size)
    assert [list(s) for s in network.encoder.strides] == strides
    assert [list(k) for k in network.encoder.kernel_sizes] == kernel_sizes


def test_a_kernel_of_1_holds_for_every_convolution_of_its_level():
    """Slices that the plan keeps apart at level 1 meet below it only, so one slice cannot reach its neighbour there."""
    network = tiny_network(3, 2, strides=[[1] * 3, [1, 2, 2]], kernel_sizes=[[1, 3, 3], [1, 3, 3]]).eval()
    x = torch.randn(1, 1, 4, 8, 8)
    changed = x.clone()
    changed[:, :, 2] += 1
    # InstanceNorm and GroupNorm see the whole map; without them only the changed slice may differ
    for block in list(network.modules()):
        for name, module in block.named_children():
            if isinstance(module, torch.nn.InstanceNorm3d | torch.nn.GroupNorm):
                setattr(block, name, torch.nn.Identity())
    difference = (network(changed) - network(x)).abs().amax((0, 1, 3, 4))
    assert difference[2] > 0 and (difference[[0, 1, 3]] == 0).all()


@pytest.mark.parametrize("dim", [2, 3])
def test_deep_supervision_switches_outputs_only(dim):
    network = tiny_network(dim, deep_supervision=True).eval()
    x = torch.randn(1, 1, *SIZES[dim][1])
    outputs = network(x)
    assert len(outputs) == 4 and outputs[0].shape[2:] == x.shape[2:]
    network.decoder.deep_supervision = False
    torch.testing.assert_close(network(x), outputs[0], rtol=0, atol=0)
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    network(x).sum().backward()
    assert trained == {name for name, p in network.named_parameters() if p.grad is not None}


# --- attention -----------------------------------------------------------------------------------------------------


def garbage_instead_of_zeros(monkeypatch: pytest.MonkeyPatch) -> list:
    """Every padding of a map on its way to the attention is filled with large noise; returns what was padded."""
    padded = []

    def pad(x, widths):
        padded.append(tuple(x.shape[2:]))
        inside = F.pad(torch.ones_like(x, dtype=torch.bool), widths)
        noise = 1e3 * torch.randn(inside.shape, dtype=x.dtype)
        return torch.where(inside, F.pad(x, widths), noise)

    monkeypatch.setattr(tokens, "F", SimpleNamespace(pad=pad))
    return padded


@pytest.mark.parametrize("patch", [2, 3], ids=["patch 2", "patch 3"])
@pytest.mark.parametrize(("dim", "size"), CASES)
def test_padding_never_reaches_a_real_voxel(dim, size, patch, monkeypatch):
    torch.manual_seed(0)
    network = tiny_network(dim, gms_patch=patch).double().eval()  # one sample of one voxel has no batch statistics
    x = torch.randn(1, 1, *size, dtype=torch.float64, requires_grad=True)

    def run():
        network.zero_grad()
        out = network(x)
        gradients = torch.autograd.grad(out.square().sum(), [x, *(p for p in network.parameters() if p.requires_grad)])
        return out.detach(), gradients

    expected, expected_gradients = run()
    padded = garbage_instead_of_zeros(monkeypatch)
    out, gradients = run()
    levels = [[-(-n // 2**level) for n in size] for level in range(2, 5)]  # where GMS blocks stand
    assert bool(padded) == any(n % patch for level in levels for n in level)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    for gradient, value in zip(gradients, expected_gradients, strict=True):
        assert torch.isfinite(gradient).all()
        torch.testing.assert_close(gradient, value, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("size", "patch"), [((4, 6), (2, 2)), ((6, 4), (3, 2)), ((4, 2, 6), (2, 2, 2)), ((3, 4, 2), (1, 2, 2))]
)
def test_unfolding_puts_every_pixel_in_its_group(size, patch):
    x = torch.randn(2, 5, *size)
    tokens = unfold_positions(x, patch)
    n_patches = [n // p for n, p in zip(size, patch, strict=True)]
    assert tokens.shape == (2, math.prod(patch), math.prod(n_patches), 5)
    for group, position in enumerate(itertools.product(*map(range, patch))):
        for token, where in enumerate(itertools.product(*map(range, n_patches))):  # row-major over patches
            pixel = [w * p + i for w, p, i in zip(where, patch, position, strict=True)]
            assert torch.equal(tokens[:, group, token], x[(slice(None), slice(None), *pixel)])
    assert torch.equal(fold_positions(tokens, patch, size), x)


def naive_attention(module: PositionGroupAttention, tokens, mask):
    out = torch.zeros(*tokens.shape[:3], module.n_heads * module.head_dim, dtype=tokens.dtype)
    for b, group in itertools.product(range(tokens.shape[0]), range(tokens.shape[1])):
        q, k, v = module.qkv(tokens[b, group]).chunk(3, dim=-1)
        for head in range(module.n_heads):
            part = slice(head * module.head_dim, (head + 1) * module.head_dim)
            scores = q[:, part] @ k[:, part].T / math.sqrt(module.head_dim)
            if mask is not None:
                scores = scores.masked_fill(~mask[group], -math.inf)
            out[b, group, :, part] = scores.softmax(-1) @ v[:, part]
    return module.proj(out)


@pytest.mark.parametrize("size", [(4, 6), (5, 3), (1, 7), (4, 4, 4), (3, 5, 1)])
def test_attention_is_softmax_inside_each_group(size):
    torch.manual_seed(0)
    patch = (2,) * len(size)
    padded = [n + n % 2 for n in size]
    module = PositionGroupAttention(6, n_heads=2, head_dim=4).double()
    tokens = unfold_positions(torch.randn(2, 6, *padded, dtype=torch.float64), patch)
    mask = real_token_mask(size, patch, tokens.device) if list(size) != padded else None
    torch.testing.assert_close(module(tokens, mask), naive_attention(module, tokens, mask), rtol=1e-10, atol=1e-12)


class LargestTensor(TorchDispatchMode):
    """Remembers the most numbers that any operator returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return out


@pytest.mark.parametrize("size", [(128, 128), (127, 125)], ids=["no mask", "mask"])
def test_attention_matrix_is_never_stored(size):
    """Only the fused kernel is allowed, and nothing in forward or backward has as many numbers as one N x N matrix."""
    transformer = SparseTransformer(8, 16, (2, 2))
    x = torch.randn(1, 8, *size, requires_grad=True)
    n_tokens = 64 * 64
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]), LargestTensor() as largest:
        transformer(x).sum().backward()
    assert 0 < largest.numel < n_tokens**2 / 10
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize(
    "make, channels, out",
    [
        (lambda dim: LMSBlock(32, dim=dim), 32, 32),
        (lambda dim: LMSBlock(8, (3, 5), 1, dim=dim), 8, 8),
        (lambda dim: GMSBlock(16, dim=dim), 16, 16),
        (lambda dim: GMSBlock(8, 16, dim=dim), 8, 16),
        (lambda dim: FusionBlock(8, dim=dim), 8, 4),
    ],
)
def test_blocks_for_own_code_have_the_papers_defaults(make, channels, out, dim):
    size = (6, 7, 5)[:dim]
    assert make(dim)(torch.randn(2, channels, *size)).shape == (2, out, *size)


def test_blocks_for_own_code_refuse_in_one_sentence():
    for make, sentence in (
        (lambda: LMSBlock(32, dim=1), "not dim=1: choose dim=2 or dim=3"),
        (lambda: LMSBlock(32, (3, 4)), "depthwise_kernel_sizes holds 4: give one odd"),
        (lambda: GMSBlock(6), "6 channels cannot give 3/4 of them"),
        (lambda: GMSBlock(8, kernel_size=(3, 3, 3)), "kernel_size holds .*the 2 axes"),
    ):
        with pytest.raises(ValueError, match=sentence):
            make()


def test_the_published_network_with_deep_supervision():
    network = LGMSNet.paper(1, 2, dim=2, deep_supervision=True)
    assert [tuple(y.shape[2:]) for y in network(torch.randn(1, 1, 32, 32))] == [(32, 32), (16, 16), (8, 8), (4, 4)]
