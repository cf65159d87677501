"""Peak memory of a training step, without a GPU: the step runs on PyTorch's "meta" device, where tensors have sizes
but no numbers, and every byte that is alive is counted.

What is counted is nnU-Net's step: float16 autocast, loss, backward pass, SGD with momentum. Autocast does not work on
meta tensors, so :class:`HalfPrecision` repeats what it does to dtypes on a GPU. Attention never stores its matrix
there, and neither does :class:`_FusedAttention`. What a GPU needs beside the tensors (workspaces of convolutions,
blocks that the allocator cannot fill) and what compilation saves by fusing (intermediate maps that are never written)
is in :data:`CALIBRATION`, fitted to measured steps; ``benchmarks/memory.py`` measures and writes the table.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ALLOCATOR_BLOCK = 512  # bytes; every allocation on CUDA is rounded up to it


@dataclass(frozen=True)
class Calibration:
    """From counted to needed bytes.

    Attributes:
        activations: bytes that a GPU needs per counted byte that grows with the batch.
        fixed: bytes that any step needs, beside parameters, gradients and momentum.
        context: bytes that CUDA and the libraries take on the card before the first tensor.
    """

    activations: float
    fixed: int
    context: int


CALIBRATION = {
    2: Calibration(activations=1.0, fixed=64 * 2**20, context=600 * 2**20),
    3: Calibration(activations=1.0, fixed=64 * 2**20, context=600 * 2**20),
}


@dataclass(frozen=True)
class StepMemory:
    """Counted bytes of a training step.

    Attributes:
        static: parameters, buffers and momentum: there between steps.
        activations: what the step adds at its peak.
    """

    static: int
    activations: int


def trace_training_step(
    network: nn.Module, input_shape: Sequence[int], n_classes: int, deep_supervision: bool = False
) -> StepMemory:
    """Counts the live bytes of one training step of ``network`` on a batch of ``input_shape`` (B, C, *patch).

    Args:
        network: on the meta device; see :func:`nnunet_lgms.planning.override.build_on_meta`.
        input_shape: batch, channels, patch in voxels.
        n_classes: channels of the output, background included.
        deep_supervision: whether the network returns one output per level.
    """
    from nnunet_lgms.nnunet.loss import cross_entropy_and_dice, deep_supervision_weights

    batch, _, *patch = input_shape
    loss_function = cross_entropy_and_dice(label_manager(n_classes), batch_dice=True, ddp=False)
    # gradients live only within the step, so parameters and momentum are all that stays
    static = sum(_nbytes(t) for t in [*network.parameters(), *network.buffers()])
    static += sum(_nbytes(p) for p in network.parameters() if p.requires_grad)
    with LiveBytes() as live:
        data = torch.empty(tuple(input_shape), device="meta")
        with HalfPrecision():
            output = network(data)
            outputs = output if deep_supervision else [output]
            weights = deep_supervision_weights(len(outputs)) if deep_supervision else [1.0]
            loss = sum(
                w * loss_function(o, torch.empty((batch, 1, *o.shape[2:]), dtype=torch.int16, device="meta"))
                for w, o in zip(weights, outputs, strict=True)
                if w
            )
            loss.backward()
    return StepMemory(static, live.peak)


def needed_bytes(memory: StepMemory, dim: int) -> int:
    """Peak of allocated GPU memory, in bytes, of a compiled training step."""
    calibration = CALIBRATION[dim]
    return round(memory.static + calibration.fixed + calibration.activations * memory.activations)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that come to life inside, and remembers the most that lived at once."""

    def __init__(self):
        super().__init__()
        self.live = 0
        self.peak = 0
        self._storages: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._storages:
            return
        n = -(-storage.nbytes() // ALLOCATOR_BLOCK) * ALLOCATOR_BLOCK
        self._storages.add(storage)
        self.live += n
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, n)

    def _release(self, n: int) -> None:
        self.live -= n


class _FusedAttention(torch.autograd.Function):
    """The memory of fused attention: output and one number per row are kept for the backward pass."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


class HalfPrecision(TorchFunctionMode):
    """Casts as ``torch.autocast("cuda", torch.float16)`` does, on any device.

    Convolutions and products work in float16, statistics and losses in float32; all else in the dtype that comes.
    """

    HALF = {"conv2d", "conv3d", "linear", "matmul", "bmm", "mm", "addmm", "baddbmm", "scaled_dot_product_attention"}
    HALF_OPERATORS = {"nnunet_lgms::multi_kernel_depthwise"}
    FULL = {"layer_norm", "group_norm", "softmax", "log_softmax", "cross_entropy", "nll_loss", "cross_entropy_loss"}
    FULL |= {"binary_cross_entropy_with_logits"}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "").split(".")[0]
        if function is F.scaled_dot_product_attention:
            query, key, value = _cast(args[:3], torch.float16)
            return _FusedAttention.apply(query, key, value)
        schema = getattr(function, "_schema", None)
        if name in self.HALF or (schema is not None and schema.name in self.HALF_OPERATORS):
            args, kwargs = _cast((args, kwargs), torch.float16)
        elif name in self.FULL:
            args, kwargs = _cast((args, kwargs), torch.float32)
        return function(*args, **kwargs)


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, tree)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def label_manager(n_classes: int):
    """Labels 0 to ``n_classes - 1``, as nnU-Net describes them."""
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    return LabelManager({"background": 0, **{str(i): i for i in range(1, n_classes)}}, None)
