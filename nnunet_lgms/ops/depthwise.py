"""Multi-kernel depthwise convolution as one operator: the first step of the LMS block (paper section 3.2).

The channels are split into groups in order; every group has its own odd kernel, e.g. 3, 5, 7 and 9. PyTorch has no such
operator, and its depthwise gradients are slow. Here there are two operators, both registered with `torch.library`:

* `nnunet_lgms::multi_kernel_depthwise`, the convolution. The gradient of its input is the same operator with mirrored
  kernels (`flip=True`).
* `nnunet_lgms::multi_kernel_depthwise_weight_grad`, the correlation of input and output gradient.

The two are closed under differentiation, so second derivatives work too. All kernels and biases travel in one flat
tensor: one argument, one gradient, and one small copy in place of a launch per group.

Both go to the kernels of `triton/depthwise.py` where those apply; float32 on the CPU takes the forms of
`cpu/depthwise.py`, and all else the PyTorch path below. All give the same results up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_lgms.ops.backend import operator, use_kernels
from nnunet_lgms.ops.cpu import depthwise as depthwise_cpu
from nnunet_lgms.ops.layout import to_channels_first, to_channels_last
from nnunet_lgms.ops.library import custom_op
from nnunet_lgms.ops.memory_format import CHANNELS_LAST
from nnunet_lgms.ops.of_weights import of_weights

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
# Outputs along x that share one matrix product in the weight gradient on the CPU, and the most numbers that its copies
# of the output gradient may hold at once (64 MiB of float32).
CPU_TILE = 16
CPU_CHUNK = 1 << 24


@operator
def multi_kernel_depthwise(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    residual: bool = False,
) -> Tensor:
    """Depthwise "same" convolution with a kernel of its own for every group of channels.

    Args:
        x: (B, C, H, W) or (B, C, D, H, W), floating point.
        weights: one (C_i, 1, *k_i) tensor for each group, in the order of the channels; the C_i add up to C, and
            every k is odd (1 is allowed, e.g. across thick slices).
        biases: one (C_i,) tensor for each group, or None.
        residual: add x to the result, on the GPU in the same pass over memory.

    Returns:
        (B, C, *spatial) in the dtype of x (in autocast's dtype where that is on) and in its memory format, but for the
        kernels, whose result is contiguous: norms read it as it is. Weights and biases may stay in float32 below
        half-precision x: they are rounded where they are used, and their gradients come back in their own dtype.

    Raises:
        ValueError: x is no 4D or 5D floating point tensor, a kernel is even, or the groups do not add up to C.
    """
    weights = list(weights)
    biases = None if biases is None else list(biases)
    _check(x, weights, biases)
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    channels = [w.shape[0] for w in weights]
    kernels = [k for w in weights for k in w.shape[2:]]
    parameters = of_weights(_flat, *weights, *(biases or []))
    if depthwise_cpu.fits(x):
        return _convolve(x, parameters, channels, kernels, biases is not None, False, residual)
    # The operators want x-contiguous maps. A change of layout here, outside of them, is one that Inductor can fuse into
    # whatever wrote x and whatever reads the result.
    out = _convolve(to_channels_first(x), parameters, channels, kernels, biases is not None, False, residual)
    if _memory_format(x) == torch.contiguous_format or (use_kernels(x) and not torch.compiler.is_compiling()):
        return out
    return to_channels_last(out)


def _check(x: Tensor, weights: list[Tensor], biases: list[Tensor] | None) -> None:
    if x.dim() not in (4, 5) or not x.is_floating_point():
        raise ValueError(
            f"multi_kernel_depthwise takes a floating point (B, C, H, W) or (B, C, D, H, W) tensor, "
            f"not {tuple(x.shape)} of {x.dtype}; reshape or cast it first."
        )
    for w in weights:
        if w.dim() != x.dim() or w.shape[1] != 1:
            raise ValueError(
                f"multi_kernel_depthwise got a weight of shape {tuple(w.shape)} for {x.dim() - 2} spatial axes; "
                f"give (channels, 1, {', '.join(['k'] * (x.dim() - 2))})."
            )
        if any(k % 2 == 0 for k in w.shape[2:]):
            raise ValueError(
                f"multi_kernel_depthwise got kernel {tuple(w.shape[2:])}; use an odd size (1, 3, 5, ...) on every axis."
            )
    if sum(w.shape[0] for w in weights) != x.shape[1]:
        raise ValueError(
            f"multi_kernel_depthwise got kernels for {' + '.join(str(w.shape[0]) for w in weights) or 0} channels and "
            f"an input with {x.shape[1]}; the groups must add up to the channels of the input."
        )
    if biases is not None and [tuple(b.shape) for b in biases] != [(w.shape[0],) for w in weights]:
        raise ValueError(
            f"multi_kernel_depthwise got biases of shapes {[tuple(b.shape) for b in biases]}; "
            f"give one of shape (channels,) for every weight, or None: {[(w.shape[0],) for w in weights]}."
        )


def _flat(*parameters: Tensor) -> Tensor:
    """All of them, one after the other."""
    parameters = [p.reshape(-1) for p in parameters]
    return parameters[0] if len(parameters) == 1 else torch.cat(parameters)


def _memory_format(x: Tensor) -> torch.memory_format:
    channels_last = CHANNELS_LAST[x.dim()]
    if not x.is_contiguous() and x.is_contiguous(memory_format=channels_last):
        return channels_last
    return torch.contiguous_format


# --- the operators ---------------------------------------------------------------------------------------------------
# parameters: the weights of all groups, flattened, one after the other, then (has_bias) one bias a channel.
# channels: how many channels each group has. kernels: the kernel sizes of all groups in one flat list.
# flip: with mirrored kernels. residual: plus x.


@custom_op("nnunet_lgms::multi_kernel_depthwise", mutates_args=())
def _convolve(
    x: Tensor,
    parameters: Tensor,
    channels: Sequence[int],
    kernels: Sequence[int],
    has_bias: bool,
    flip: bool,
    residual: bool,
) -> Tensor:
    if depthwise_cpu.fits(x):
        return depthwise_cpu.convolve(x, *_unpack(parameters.to(x.dtype), channels, kernels, has_bias), flip, residual)
    x = x.contiguous()
    triton_kernels = _triton_kernels(x, channels, kernels)
    if triton_kernels is not None:
        return triton_kernels.convolve(x, parameters, channels, kernels, has_bias, flip, residual)
    weights, biases = _unpack(parameters.to(x.dtype), channels, kernels, has_bias)
    convolve, axes = CONV[x.dim() - 2], tuple(range(2, x.dim()))
    with torch.autocast(x.device.type, enabled=False):
        out = [
            convolve(part, w.flip(axes) if flip else w, b, padding=[k // 2 for k in w.shape[2:]], groups=w.shape[0])
            for part, w, b in zip(x.split(list(channels), 1), weights, biases)
        ]
    out = torch.cat(out, 1)
    return out.add_(x) if residual else out


@_convolve.register_fake
def _(x, parameters, channels, kernels, has_bias, flip, residual):
    return torch.empty_like(x, memory_format=_memory_format(x) if depthwise_cpu.fits(x) else torch.contiguous_format)


def _convolve_setup(ctx, inputs, output):
    x, parameters, ctx.channels, ctx.kernels, ctx.has_bias, ctx.flip, ctx.residual = inputs
    ctx.save_for_backward(x, parameters)


def _convolve_backward(ctx, grad):
    x, parameters = ctx.saved_tensors
    if not depthwise_cpu.fits(grad):
        grad = grad.contiguous()  # here and not in the operator, for Inductor, as above
    grad_x = grad_parameters = None
    if ctx.needs_input_grad[0]:
        grad_x = _convolve(grad, parameters, ctx.channels, ctx.kernels, False, not ctx.flip, ctx.residual)
    if ctx.needs_input_grad[1]:
        # Mirroring the kernel is the same as swapping the two sides of the correlation.
        sides = (grad, x) if ctx.flip else (x, grad)
        grad_parameters = _correlate(*sides, ctx.channels, ctx.kernels)
        if ctx.has_bias:
            grad_parameters = torch.cat([grad_parameters, _sum_per_channel(grad)])
        else:  # the operator ignores what follows the weights
            grad_parameters = F.pad(grad_parameters, (0, parameters.numel() - grad_parameters.numel()))
        grad_parameters = grad_parameters.to(parameters.dtype)
    return grad_x, grad_parameters, None, None, None, None, None


_convolve.register_autograd(_convolve_backward, setup_context=_convolve_setup)


@custom_op("nnunet_lgms::multi_kernel_depthwise_weight_grad", mutates_args=())
def _correlate(x: Tensor, grad: Tensor, channels: Sequence[int], kernels: Sequence[int]) -> Tensor:
    """Gradient of the flat weights, in float32 (float64 for float64 input)."""
    axes = x.dim() - 2
    sizes = [tuple(kernels[i : i + axes]) for i in range(0, len(kernels), axes)]
    if depthwise_cpu.fits(x):
        return torch.cat([taps.flatten() for taps in depthwise_cpu.correlate(x, grad, channels, sizes)])
    x, grad = x.contiguous(), grad.contiguous()
    triton_kernels = _triton_kernels(x, channels, kernels)
    if triton_kernels is not None:
        return triton_kernels.correlate(x, grad, channels, kernels)
    parts = zip(x.split(list(channels), 1), grad.split(list(channels), 1), sizes)
    with torch.autocast(x.device.type, enabled=False):
        return torch.cat([_weight_grad(*part).flatten() for part in parts])


@_correlate.register_fake
def _(x, grad, channels, kernels):
    return x.new_empty(_number_of_weights(channels, kernels), dtype=_accumulator(x.dtype))


def _correlate_setup(ctx, inputs, output):
    x, grad, ctx.channels, ctx.kernels = inputs
    ctx.save_for_backward(x, grad)


def _correlate_backward(ctx, weights):
    x, grad = ctx.saved_tensors
    weights = weights.contiguous()
    grad_x = grad_grad = None
    if ctx.needs_input_grad[0]:
        grad_x = _convolve(grad, weights, ctx.channels, ctx.kernels, False, True, False)
    if ctx.needs_input_grad[1]:
        grad_grad = _convolve(x, weights, ctx.channels, ctx.kernels, False, False, False)
    return grad_x, grad_grad, None, None


_correlate.register_autograd(_correlate_backward, setup_context=_correlate_setup)


# --- the PyTorch path ------------------------------------------------------------------------------------------------


def _number_of_weights(channels: Sequence[int], kernels: Sequence[int]) -> int:
    axes = len(kernels) // len(channels)
    return sum(c * math.prod(kernels[i * axes : (i + 1) * axes]) for i, c in enumerate(channels))


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _sum_per_channel(grad: Tensor) -> Tensor:
    if use_kernels(grad) and not torch.is_grad_enabled():  # the kernel has no gradient
        from nnunet_lgms.ops.triton.norm_act import channel_sums

        return channel_sums(grad)
    return grad.sum([0, *range(2, grad.dim())], dtype=_accumulator(grad.dtype))


def _unpack(
    parameters: Tensor, channels: Sequence[int], kernels: Sequence[int], has_bias: bool
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Views of the flat parameters: a (C_i, 1, *k_i) weight and a (C_i,) bias or None for each group."""
    axes = len(kernels) // len(channels)
    shapes = [(c, 1, *kernels[i * axes : (i + 1) * axes]) for i, c in enumerate(channels)]
    weights, start = [], 0
    for shape in shapes:
        weights.append(parameters[start : start + math.prod(shape)].view(shape))
        start += math.prod(shape)
    if not has_bias:
        return weights, [None] * len(weights)
    return weights, list(parameters[start : start + sum(channels)].split(list(channels)))


def _weight_grad(x: Tensor, grad: Tensor, kernel: tuple[int, ...]) -> Tensor:
    # 3x3 in 2D is the one case where PyTorch's own loop over taps is as fast on the CPU.
    products = x.device.type == "cpu" and (len(kernel) == 3 or math.prod(kernel) > 9)
    return _weight_grad_products(x, grad, kernel) if products else _weight_grad_aten(x, grad, kernel)


def _weight_grad_aten(x: Tensor, grad: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """PyTorch's own weight gradient, (C, 1, *kernel)."""
    axes, c = len(kernel), x.shape[1]
    one, zero, padding = [1] * axes, [0] * axes, [k // 2 for k in kernel]
    weight = x.new_empty(c, 1, *kernel)
    mask = [False, True, False]
    out = torch.ops.aten.convolution_backward(grad, x, weight, None, one, padding, one, False, zero, c, mask)
    return out[1].to(_accumulator(x.dtype))


def _weight_grad_products(x: Tensor, grad: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """Weight gradient (C, *kernel) of a depthwise convolution by matrix products, for half precision on the CPU.

    A row is cut into tiles of `t` outputs; what they read is a window of `t + kx - 1` inputs. For one shift along y,
    the products of all windows with all tiles, summed over rows, planes and batch, are one matrix product per channel:
    (window, rows) x (rows, kz * t). Its entries with `window - t == dx` add up to the gradient of tap dx. PyTorch's own
    loop over taps does fewer multiplications, and is 5 to 14 times slower (2 x 4 x 32^3, kernels 5 to 9, 2 cores).
    """
    if len(kernel) == 2:
        return _weight_grad_products(x.unsqueeze(2), grad.unsqueeze(2), (1, *kernel)).squeeze(1)
    kz = kernel[0]
    dtype = _accumulator(x.dtype)
    if not x.numel():  # an empty batch
        return x.new_zeros(x.shape[1], *kernel, dtype=dtype)
    samples = max(1, CPU_CHUNK // (kz * x[0].numel()))  # bounds the kz copies of the gradient
    return sum(
        _weight_grad_chunk(xs.to(dtype), gs.to(dtype), kernel) for xs, gs in zip(x.split(samples), grad.split(samples))
    )


def _weight_grad_chunk(x: Tensor, grad: Tensor, kernel: tuple[int, int, int]) -> Tensor:
    b, c, d, h, w = x.shape
    kz, ky, kx = kernel
    pz, py, px = kz // 2, ky // 2, kx // 2
    t = min(CPU_TILE, w)
    tiles = -(-w // t)
    window = t + kx - 1

    # Rows are ordered (y, b, z, tile): a shift along y is then a slice, and costs no copy.
    windows = F.pad(x, (px, tiles * t - w + px)).unfold(4, window, t)
    windows = windows.permute(1, 3, 0, 2, 4, 5).reshape(c, h, b * d * tiles, window)
    # Input plane z meets the gradients of planes z - pz .. z + pz.
    grads = F.pad(grad, (0, tiles * t - w, 0, 0, pz, pz)).unfold(2, kz, 1)
    grads = grads.reshape(b, c, d, h, tiles, t, kz).permute(1, 3, 0, 2, 4, 6, 5).reshape(c, h, b * d * tiles, kz * t)

    products = x.new_zeros(c, ky, window, kz * t)
    for i in range(ky):
        shift = i - py
        low, high = max(0, -shift), min(h, h - shift)
        if low < high:
            inputs = windows[:, low + shift : high + shift].flatten(1, 2)
            products[:, i] = torch.bmm(inputs.transpose(1, 2), grads[:, low:high].flatten(1, 2))
    # (c, kz, ky, t, window); a step along t and one along the window stays on the diagonal of a tap.
    products = products.view(c, ky, window, kz, t).permute(0, 3, 1, 4, 2).contiguous()
    strides = (*products.stride()[:3], window + 1, 1)
    taps = products.as_strided((c, kz, ky, t, kx), strides).sum(3)
    return taps.flip(1)  # the last of the kz gradient planes belongs to the first tap


def _triton_kernels(x: Tensor, channels: Sequence[int], kernels: Sequence[int]) -> ModuleType | None:
    """The module with the Triton kernels if it can serve this call, else None."""
    if not use_kernels(x):
        return None
    from nnunet_lgms.ops.triton import depthwise as triton_kernels

    return triton_kernels if triton_kernels.fits(x, channels, kernels) else None
