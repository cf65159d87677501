"""The Triton kernels of dense convolution, norm and activation, pooling and upsampling, in Triton's interpreter on the
CPU.

The interpreter must be chosen before Triton is imported, so one subprocess (this file run as a script) computes all
cases and prints their relative errors against PyTorch. The compiled kernels run where there is a GPU.
"""

import copy
import json
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from interpreter import run_interpreted
from torch import nn

from nnunet_lgms.blocks.norm import InstanceNorm3d
from nnunet_lgms.ops import kernels, linear_upsample, max_pool, norm_act
from nnunet_lgms.ops.backend import as_on_gpu
from nnunet_lgms.ops.norms import NormSpec, bias_cancels

LAYOUT = {4: torch.channels_last, 5: torch.channels_last_3d}
CONV = {2: F.conv2d, 3: F.conv3d}
CONVOLUTIONS = {  # input shape, output channels, kernel, groups
    "wide": ((2, 16, 3, 4, 5), 16, (3, 3, 3), 1),
    "narrow": ((2, 4, 3, 5, 5), 16, (3, 3, 3), 1),
    "one_channel": ((1, 1, 4, 5, 3), 16, (3, 3, 3), 1),
    "thick_slices": ((1, 16, 4, 5, 6), 4, (1, 3, 3), 1),
    "flat_x": ((2, 8, 4, 5, 5), 8, (3, 3, 1), 1),
    "flat_y": ((2, 8, 4, 5, 5), 8, (3, 1, 3), 1),
    "2d": ((2, 12, 7, 9), 20, (3, 3), 1),
    "two_groups": ((2, 8, 3, 5, 6), 12, (3, 3, 3), 2),
    "point": ((2, 32, 5, 5), 64, (1, 1), 1),
    "one_plane": ((3, 5, 1, 4, 7), 7, (3, 3, 3), 1),
    "two_planes": ((1, 16, 2, 9, 9), 32, (3, 3, 3), 1),
    "planes_of_two_walks": ((1, 3, 17, 5, 14), 4, (3, 3, 3), 1),
    "along_z": ((2, 20, 5, 3, 3), 6, (3, 1, 1), 1),
    "2d_of_two_walks": ((3, 1, 33, 7), 16, (3, 3), 1),
    "2d_one_row": ((1, 4, 1, 9), 8, (3, 3), 1),
    "2d_along_y": ((2, 8, 5, 70), 8, (3, 1), 1),
    "2d_along_x": ((2, 8, 5, 7), 4, (1, 3), 1),
    "2d_three_groups": ((2, 9, 6, 7), 12, (3, 3), 3),
}
WEIGHT_GRADIENTS = {  # likewise; what is left of the last parts of channels, and of the last blocks
    **CONVOLUTIONS,
    "parts": ((1, 36, 3, 4, 9), 20, (3, 3, 3), 2),
    "parts_2d": ((1, 19, 6, 35), 34, (3, 3), 1),
    "blocks_2d": ((2, 2, 21, 70), 4, (3, 3), 2),
    "point_3d": ((2, 16, 5, 6, 20), 3, (1, 1, 1), 1),
}
EPILOGUES = {  # input shape, output channels, kernel, groups, activation, scale and shift, residual
    "relu": ((2, 6, 4, 5, 7), 16, (3, 3, 3), 1, "relu", True, True),
    "gelu_before_two_groups": ((1, 8, 3, 5, 6), 6, (3, 3, 3), 2, "gelu_first", True, False),
    "2d_silu": ((3, 12, 7, 9), 20, (3, 3), 1, "silu", True, True),
    "2d_point": ((2, 16, 7, 9), 4, (1, 1), 1, "gelu", False, True),
}
# Sweeping through the map where that can be done, also if its planes are small, and never.
WAYS = {"LEAST_FULL": 0}, {"LEAST_FULL": 2}
NORMS = {  # input shape, norm, activation, mean of the input
    "instance_silu": ((2, 16, 5, 6, 7), InstanceNorm3d(16), "silu", 1),
    "instance_large_mean": ((2, 4, 3, 3, 3), InstanceNorm3d(4), "relu", 30),
    "group_gelu": ((2, 12, 9, 10), nn.GroupNorm(4, 12), "gelu", 1),
    "group_3d": ((2, 8, 24, 8, 40), nn.GroupNorm(4, 8), "gelu", 1),
    "batch_none": ((3, 12, 9, 10), nn.BatchNorm2d(12), "none", 1),
    "gelu_before_batch": ((3, 8, 9, 10), nn.BatchNorm2d(8), "gelu_first", 1),
    "gelu_before_instance": ((1, 64, 4, 5, 6), InstanceNorm3d(64), "gelu_first", 1),
}
BIASED = {  # input shape, norm, activation: what the bias of a convolution is left to
    "instance_relu": ((2, 16, 5, 6, 7), InstanceNorm3d(16), "relu"),
    "batch_relu": ((3, 12, 9, 10), nn.BatchNorm2d(12), "relu"),
    "group_silu": ((2, 12, 9, 10), nn.GroupNorm(4, 12), "silu"),
    "gelu_before_batch": ((3, 20, 9, 10), nn.BatchNorm2d(20), "gelu_first"),
    "gelu_before_instance": ((1, 64, 4, 5, 6), InstanceNorm3d(64), "gelu_first"),
}
BOTTLENECKS = {  # input shape, output channels, norms of input and hidden channels
    "instance": ((2, 16, 5, 6, 7), 16, InstanceNorm3d(16), InstanceNorm3d(32)),
    "batch": ((3, 16, 9, 10), 32, nn.BatchNorm2d(16), nn.BatchNorm2d(32)),
    "group": ((1, 32, 96, 90), 16, nn.GroupNorm(4, 32), nn.GroupNorm(8, 64)),
    "wide": ((1, 32, 4, 5, 6), 32, InstanceNorm3d(32, affine=True), InstanceNorm3d(64, affine=True)),
}
UPSAMPLINGS = {  # input shape, scale, voxels cropped
    "2x": ((2, 3, 3, 4, 5), (2, 2, 2), 0),
    "anisotropic_cropped": ((2, 4, 3, 4, 5), (1, 2, 2), 1),
    "factors_3_and_4": ((1, 3, 4, 3), (4, 3), 1),
    "single_pixel": ((1, 3, 1, 1), (2, 2), 1),
    "more_planes_than_a_program_has": ((1, 16, 11, 2, 3), (2, 2, 2), 1),
    "odd_factors_and_one_that_stays": ((1, 2, 3, 5, 2), (3, 1, 4), 2),
    "thick_slices": ((2, 8, 3, 4, 5), (1, 2, 2), 0),
}
POOLINGS = {  # input shape, stride
    "2x": ((2, 8, 4, 6, 8), (2, 2, 2)),
    "rounded_up": ((2, 5, 5, 7, 3), (2, 2, 2)),
    "anisotropic": ((1, 4, 3, 5, 5), (1, 2, 2)),
    "2d": ((2, 12, 7, 9), (2, 2)),
}


def relative(actual, expected):
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def draw(shape, device, mean=0.0):
    return (torch.randn(shape) + mean).to(device).to(memory_format=LAYOUT[len(shape)])


def both_ways(errors):
    """The errors that the function finds, by either kernel of the convolution."""
    from nnunet_lgms.ops.triton import conv_kernels

    found = []
    for way in WAYS:
        with patch.multiple(conv_kernels, **way):
            found += errors(conv_kernels)
    return found


def half(device):
    """As the operator is used; the interpreter's numbers are compared in float32."""
    return torch.float16 if device == "cuda" else torch.float32


def convolution_errors(shape, out_channels, kernel, groups, device):
    x = draw(shape, device).to(half(device)).requires_grad_()
    weight = torch.randn(out_channels, shape[1] // groups, *kernel).to(device)
    bias, padding = torch.randn(out_channels).to(device), [k // 2 for k in kernel]
    expected = CONV[len(kernel)](x.double(), weight.double(), bias.double(), padding=padding, groups=groups)
    grad = draw(expected.shape, device).to(x.dtype)
    (grad_x,) = torch.autograd.grad(expected, x, grad.double())
    x, expected = x.detach(), expected.detach()
    parts = [part.contiguous(memory_format=LAYOUT[x.ndim]) for part in x.chunk(groups, 1)]

    def errors(kernels):
        grad_parts = kernels.convolve_transposed(grad, weight, groups, groups)
        return [
            relative(kernels.convolve([x], weight, bias, groups), expected),
            relative(kernels.convolve(parts, weight, bias, groups), expected),
            relative(kernels.convolve_transposed(grad, weight, groups, 1)[0], grad_x),
            relative(torch.cat(grad_parts, 1), grad_x),
        ]

    return both_ways(errors)


def weight_gradient_errors(shape, out_channels, kernel, groups, device):
    from nnunet_lgms.ops.triton import conv_weight_kernels as kernels

    found = []
    weight = torch.empty(out_channels, shape[1] // groups, *kernel, device=device)
    for dtype in (torch.float16, torch.bfloat16) if device == "cuda" else (torch.float16,):
        x = draw(shape, device).to(dtype)
        grad = draw((shape[0], out_channels, *shape[2:]), device).to(dtype)
        exact = torch.zeros_like(weight, dtype=torch.float64).requires_grad_()
        out = CONV[len(kernel)](x.double(), exact, padding=[k // 2 for k in kernel], groups=groups)
        (expected,) = torch.autograd.grad(out, exact, grad.double())
        parts = [part.contiguous(memory_format=LAYOUT[x.ndim]) for part in x.chunk(groups, 1)]
        with patch.object(kernels, "WEIGHTS", 2048 if device == "cpu" else kernels.WEIGHTS):  # fewer programs
            apart, again, together = (kernels.weight_gradient(grad, xs, weight, groups) for xs in (parts, parts, [x]))
        assert torch.equal(apart, again)
        found += [relative(apart, expected), relative(together, expected)]
    return found


def epilogue_errors(shape, out_channels, kernel, groups, activation, affine, residual, device):
    """Convolution, norm of known statistics, activation and residual in one, against one after the other."""
    x = draw(shape, device).to(half(device))
    weight = torch.randn(out_channels, shape[1] // groups, *kernel).to(device)
    bias = torch.randn(out_channels).to(device)
    norm = {4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[x.ndim](out_channels, affine=affine).to(device).eval()
    norm.requires_grad_(False).running_mean.normal_()
    norm.running_var.uniform_(0.5, 2).mul_(weight[0].numel())  # about that of the convolution
    if affine:
        norm.weight.normal_()
        norm.bias.normal_()
    padding = [k // 2 for k in kernel]
    expected = CONV[len(kernel)](x.double(), weight.double(), bias.double(), padding=padding, groups=groups)
    residual = draw(expected.shape, device).to(x.dtype) if residual else None
    known = norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps, activation, residual
    added = None if residual is None else residual.double()
    expected = norm_act(expected, copy.deepcopy(norm).double(), activation, added)

    def errors(kernels):
        return [relative(kernels.convolve([x], weight, bias, groups, kernels.Epilogue(*known)), expected)]

    return both_ways(errors)


def norm_errors(shape, norm, activation, mean, device):
    from nnunet_lgms.ops.triton import norm_act_kernels as kernels

    x, residual, grad = draw(shape, device, mean).requires_grad_(), draw(shape, device), draw(shape, device)
    norm = norm.to(device).double().train()  # never PyTorch's instance norm: its gradient is wrong for a batch of one
    if norm.weight is not None:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    spec = NormSpec.of(norm)
    weight, bias = (None if p is None else p.detach().float() for p in (norm.weight, norm.bias))
    expected = norm_act(x.double(), norm, activation, residual.double())
    wanted = [x, *norm.parameters()]
    gradients = torch.autograd.grad(expected, wanted, grad.double())
    x = x.detach()
    kind, groups, eps = spec
    found = []
    for layout in (LAYOUT[x.ndim], torch.contiguous_format):
        x = x.contiguous(memory_format=layout)
        statistics = kernels.moments(x, kind, groups, activation)
        record = kernels.Norm(*statistics, weight, bias, eps)
        out = kernels.forward(x, record, residual, kind, groups, activation)
        actual = kernels.backward(grad, x, record, kind, groups, activation)
        assert out.is_contiguous(memory_format=LAYOUT[x.ndim]) and actual[0].is_contiguous(memory_format=layout)
        found += [relative(out, expected.detach()), *map(relative, actual[: len(wanted)], gradients)]
    return found


def biased_errors(shape, norm, activation, device):
    """Result, gradients, running statistics and prediction with a bias added to the channels in front of the norm."""
    x, residual, grad = draw(shape, device).requires_grad_(), draw(shape, device), draw(shape, device)
    bias = (2 * torch.randn(shape[1])).to(device).requires_grad_()
    norm = norm.to(device).train()
    for p in norm.parameters():
        nn.init.normal_(p)

    def results(norm, residual):
        out = norm_act(x.to(residual.dtype), norm, activation, residual, bias.to(residual.dtype))
        of_x, of_bias, *others = torch.autograd.grad(out, [x, bias, *norm.parameters()], grad.to(out.dtype))
        if bias_cancels(NormSpec.of(norm).kind, activation):  # but for rounding
            assert of_bias.abs().max() < 1e-9
            of_bias = torch.zeros_like(bias)
        with torch.no_grad():
            predicted = norm_act(x.to(out.dtype), norm.eval(), activation, bias=bias.to(out.dtype))
        buffers = [b.double().view(-1) for b in norm.buffers()]
        return [out.detach(), of_x, of_bias, *others, predicted, *buffers]

    with kernels("off"):
        expected = results(copy.deepcopy(norm).double(), residual.double())
    with as_on_gpu():
        actual = results(norm, residual)
    assert actual[0].is_contiguous(memory_format=LAYOUT[x.ndim])
    return [relative(a, e) for a, e in zip(actual, expected, strict=True)]


def bottleneck_errors(shape, out_channels, norm1, norm2, device):
    from nnunet_lgms.ops.triton import bottleneck

    hidden = norm2.num_channels if isinstance(norm2, nn.GroupNorm) else norm2.num_features
    conv_op = {4: nn.Conv2d, 5: nn.Conv3d}[len(shape)]
    modules = nn.ModuleList([norm1, conv_op(shape[1], hidden, 1), norm2, conv_op(hidden, out_channels, 1)]).to(
        device, torch.float64
    )
    parameters = [p for m in modules for p in (m.weight, m.bias)]
    for p in parameters:
        if p is not None:
            nn.init.normal_(p)

    def one_by_one(x):
        for norm, conv in (modules[:2], modules[2:]):
            x = conv(norm_act(x, norm, "gelu_first"))
        return x

    x = draw(shape, device).to(half(device)).requires_grad_()
    expected = one_by_one(x.double())
    grad = draw(expected.shape, device).to(x.dtype)
    wanted = [x, *(p for p in parameters if p is not None)]
    gradients = torch.autograd.grad(expected, wanted, grad.double())
    x, parameters = x.detach(), [None if p is None else p.detach().float() for p in parameters]
    specs = [spec for norm in (norm1, norm2) for spec in NormSpec.of(norm)]
    out, *statistics = bottleneck._inverted_bottleneck(x, *parameters, *specs)
    actual = bottleneck._inverted_bottleneck_backward(grad, x, *statistics, *parameters, *specs)
    actual = [actual[0], *(g for g, p in zip(actual[1:], parameters, strict=True) if p is not None)]
    errors = [relative(out, expected.detach())]
    errors += [relative(a.view_as(e), e) for a, e in zip(actual, gradients, strict=True)]
    if isinstance(norm1, nn.BatchNorm2d):
        modules.eval()
        norms = [s.float() for n in (norm1, norm2) for s in (n.running_mean, n.running_var)]
        known = bottleneck._inverted_bottleneck_known(x, *norms, *parameters, norm1.eps, norm2.eps)
        errors.append(relative(known, one_by_one(x.double()).detach()))
    return errors


def upsampling_errors(shape, scale, crop, device):
    from nnunet_lgms.ops.triton import upsample as kernels

    size = [n * s - (crop if s > 1 else 0) for n, s in zip(shape[2:], scale, strict=True)]
    x = draw(shape, device).requires_grad_()
    expected = linear_upsample(x.double(), scale, size)
    grad = draw(expected.shape, device)
    (grad_x,) = torch.autograd.grad(expected, x, grad.double())
    found = []
    for programs in (1, kernels.PROGRAMS):  # of many planes, of one
        with patch.object(kernels, "PROGRAMS", programs):
            found.append(kernels.linear_upsample(x.detach(), scale, size))
            found.append(kernels._upsample_backward(grad, scale, shape[2:]))
    out, out_grad, *again = found
    assert torch.equal(out, again[0]) and torch.equal(out_grad, again[1])
    return [relative(out, expected.detach()), relative(out_grad, grad_x)]


def pooling_errors(shape, stride, device):
    from nnunet_lgms.ops.triton import max_pool as kernels

    x = torch.randint(0, 5, shape).float().to(device).to(memory_format=LAYOUT[len(shape)]).requires_grad_()  # many ties
    expected = max_pool(x.double(), stride)
    grad = draw(expected.shape, device)
    (grad_x,) = torch.autograd.grad(expected, x, grad.double())
    return [
        relative(kernels.max_pool(x.detach(), stride), expected.detach()),
        relative(kernels._max_pool_backward(grad, x.detach(), stride), grad_x),
    ]


LAYOUTS = {"3d": ((2, 5, 3, 4, 7),), "2d": ((3, 16, 9, 8),)}  # shape


def layout_errors(shape, device):
    from nnunet_lgms.ops.triton import layout as kernels

    x = torch.randn(shape).to(device)
    last = kernels._channels_last(x)
    first = kernels._channels_first(last)
    assert last.is_contiguous(memory_format=LAYOUT[x.ndim]) and first.is_contiguous()
    return [relative(last, x), relative(first, x)]


CHANNELS = {"3d": ((2, 7, 3, 4, 5), (4, 3)), "2d": ((1, 24, 9, 8), (8, 12, 4))}  # shape, channels of the parts


def channels_errors(shape, sizes, device):
    from nnunet_lgms.ops.triton import concatenate as kernels

    x = draw(shape, device)
    parts = kernels._split(x, list(sizes))
    assert all(part.is_contiguous(memory_format=LAYOUT[x.ndim]) for part in parts)
    errors = [relative(a, b) for a, b in zip(parts, x.split(sizes, dim=1), strict=True)]
    return [*errors, relative(kernels._concatenate(parts), x)]


INFINITE = {"3d": ((1, 16, 9, 4, 5), 16, (3, 3, 3)), "few_channels": ((1, 4, 9, 4, 5), 8, (3, 3, 3))}


def infinite_errors(shape, out_channels, kernel, device):
    """Planes that an infinite number reaches, against PyTorch: its neighbours and no others."""
    x, weight = draw(shape, device).to(half(device)), torch.randn(out_channels, shape[1], *kernel).to(device)
    x[0, :, 3, 2, 2] = float("inf")
    expected = F.conv3d(x.float(), weight, padding=1).isfinite()
    found = both_ways(lambda kernels: [kernels.convolve([x], weight.to(x.dtype), None, 1).isfinite()])
    return [float(not torch.equal(finite.all((1, 3, 4)), expected.all((1, 3, 4)))) for finite in found]


GROUPS = {
    "channels": (CHANNELS, channels_errors),
    "layout": (LAYOUTS, layout_errors),
    "convolution": (CONVOLUTIONS, convolution_errors),
    "infinite": (INFINITE, infinite_errors),
    "weight_gradient": (WEIGHT_GRADIENTS, weight_gradient_errors),
    "epilogue": (EPILOGUES, epilogue_errors),
    "norm": (NORMS, norm_errors),
    "biased": (BIASED, biased_errors),
    "bottleneck": (BOTTLENECKS, bottleneck_errors),
    "upsampling": (UPSAMPLINGS, upsampling_errors),
    "pooling": (POOLINGS, pooling_errors),
}
CASES = [(group, case) for group, (cases, _) in GROUPS.items() for case in cases]


def errors(group, case, device):
    torch.manual_seed(0)
    cases, compute = GROUPS[group]
    return compute(*cases[case], device)


def network_errors():
    """Output, gradient, buffers and prediction of a small network with every kernel on, against every kernel off.

    The second result is whether they are the same, bit for bit, where the backward pass makes nothing again.
    """
    from nnunet_lgms import LGMSNet
    from nnunet_lgms.architecture import lgmsnet
    from nnunet_lgms.ops import depthwise, recompute
    from nnunet_lgms.ops.triton import bottleneck, conv, conv_kernels, conv_weight_kernels

    found, same = [], []
    conv_kernels.LEAST_FULL = recompute.LEAST = 0
    conv_weight_kernels.WEIGHTS = 2048  # fewer programs
    made = []  # again
    keeping_little, make_again = lgmsnet.keeping_little, recompute._Recipe.__call__
    recompute._Recipe.__call__ = lambda recipe: made.append(recipe) or make_again(recipe)
    depthwise._triton_kernels = lambda *_: None  # they take minutes here, and have a test of their own
    for module in (bottleneck, conv):  # float32 as the half precision of training
        module.HALF, module.compute_dtype = (torch.float32,), lambda x: x.dtype
    for conv_op, shape in ((nn.Conv2d, (2, 3, 12, 10)), (nn.Conv3d, (1, 1, 5, 6, 4))):
        torch.manual_seed(0)
        network = LGMSNet(shape[1], 2, 3, [16, 8, 8], conv_op, 3, [1, 2, 2], encoder_blocks=["LMS", "LMS", "GMS"])
        state = {key: value.clone() for key, value in network.state_dict().items()}
        x = draw(shape, "cpu")
        results = []
        # every kernel, the same without making anything again, libraries', none
        for on, min_voxels, keep in (("auto", 0, False), ("auto", 0, True), ("auto", 1 << 40, False), ("off", 0, True)):
            made.clear()
            lgmsnet.keeping_little = (lambda function, x: function(x)) if keep else keeping_little
            network.load_state_dict(state)
            network.zero_grad()
            conv.MIN_VOXELS = conv.MIN_VOXELS_EPILOGUE = min_voxels
            with kernels(on), as_on_gpu():
                out = network(x)
                out.square().mean().backward()
                assert bool(made) != keep
                assert all(recipe._waiting >= 0 for recipe in made)  # nobody asks more often than was promised
                gradient = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
                buffers = torch.cat([b.flatten().double() for b in network.buffers()])
                with torch.no_grad():
                    predicted = network.eval()(x)
            network.train()
            results.append((out.detach(), gradient, buffers, predicted))
        same.append(all(map(torch.equal, results[0], results.pop(1))))
        *with_kernels, without = results
        found.append([relative(a, b) for actual in with_kernels for a, b in zip(actual, without, strict=True)])
    return found, same


GRIDS = {  # input shape, output channels, kernel, whether the map is swept
    "3d": ((2, 32, 128, 128, 128), 16, (3, 3, 3), True),
    "3d_wide": ((2, 32, 64, 64, 64), 32, (3, 3, 3), True),
    "3d_few_channels": ((2, 4, 128, 128, 128), 16, (3, 3, 3), True),
    "3d_columns": ((2, 64, 128, 128, 128), 32, (3, 3, 1), True),
    "3d_wide_columns": ((2, 64, 128, 128, 128), 64, (3, 3, 1), False),  # its bands alone are 96 KiB
    "3d_thick_slices": ((2, 16, 128, 128, 128), 16, (1, 3, 3), False),
    "2d": ((16, 32, 256, 256), 16, (3, 3), True),
    "2d_narrow": ((16, 32, 256, 40), 16, (3, 3), False),
    "point": ((16, 32, 256, 256), 16, (1, 1), False),
}


@pytest.mark.parametrize("case", GRIDS)
def test_convolutions_sweep_where_that_is_faster(case):
    kernels = pytest.importorskip("nnunet_lgms.ops.triton.conv_kernels")
    shape, out_channels, kernel, sweeps = GRIDS[case]
    x = torch.empty(shape, dtype=torch.float16, device="meta")
    grid = kernels._LaunchGrid.of(x, kernel, shape[1], out_channels)
    assert grid.function is (kernels._conv_sweep_kernel if sweeps else kernels._conv_flat_kernel)
    blocks = -(-grid.tiles // grid.block) * (grid.size[0] if sweeps else 1)
    assert blocks <= grid.programs * grid.steps < 1.1 * blocks  # all of the map, and none has much less to do


def test_maps_of_one_channel_are_swept_by_more_programs():
    kernels = pytest.importorskip("nnunet_lgms.ops.triton.conv_kernels")
    one, two = (torch.empty((2, c, 128, 128, 128), dtype=torch.float16, device="meta") for c in (1, 2))
    grid = kernels._LaunchGrid.of(one, (3, 3, 3), 1, 16)
    assert grid.function is kernels._conv_sweep_kernel
    assert grid.programs == 2 * kernels._LaunchGrid.of(two, (3, 3, 3), 2, 16).programs


@pytest.fixture(scope="module")
def interpreted():
    return run_interpreted(__file__)


@pytest.mark.slow
@pytest.mark.parametrize(("group", "case"), CASES)
def test_interpreted_kernels_match_float64(interpreted, group, case):
    assert max(interpreted[f"{group} {case}"]) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("dim", [2, 3])
def test_interpreted_kernels_leave_the_network_as_it_is(interpreted, dim):
    errors, _ = interpreted["network"]
    assert max(errors[dim - 2]) < 1e-4


@pytest.mark.slow
def test_what_is_made_again_is_what_was(interpreted):
    _, same = interpreted["network"]
    assert all(same)


@pytest.mark.gpu
@pytest.mark.parametrize(("group", "case"), CASES)
def test_compiled_kernels_match_float64(group, case):
    limit = {"convolution": 2e-3, "epilogue": 2e-3, "bottleneck": 5e-3}.get(group, 2e-5)  # float16
    assert max(errors(group, case, "cuda")) < limit


@pytest.mark.gpu
@pytest.mark.parametrize("case", [((2, 32, 40, 52, 72), 32, (3, 3, 3), 2), ((8, 4, 250, 190), 16, (3, 3), 1)])
def test_weight_gradients_of_programs_with_many_places_match_float64(case):
    assert max(weight_gradient_errors(*case, "cuda")) < 2e-5


if __name__ == "__main__":
    table = {f"{group} {case}": errors(group, case, "cpu") for group, case in CASES}
    table["network"] = network_errors()
    print(json.dumps(table))
