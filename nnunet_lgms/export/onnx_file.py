"""A network as an ONNX model of plain operators, through `torch.export` and PyTorch's ONNX exporter.

`torch.export` records this package's operators by their names, which no other runtime knows. The one that exists on the
CPU is translated by :func:`.operators.depthwise`; the others are for CUDA and never enter a graph recorded on the CPU.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import onnx
import onnxscript.optimizer
import torch
from torch import Tensor, nn
from torch._dynamo.exc import UserError
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError

import nnunet_lgms.ops.depthwise  # noqa: F401  registers the operator that is translated here
from nnunet_lgms.export.fold import fold_norms
from nnunet_lgms.export.operators import attention, depthwise

OPSET = 20  # the first with Gelu
INPUT, OUTPUT = "image", "logits"
MAX_STEPS = 1024  # of a free axis; a bound has to be named


@dataclass(frozen=True)
class Exported:
    """An ONNX model and the sizes that it takes: axis i may be `patch_size[i] + n * steps[i]`; a step of 0 is fixed."""

    model: onnx.ModelProto
    patch_size: tuple[int, ...]
    steps: tuple[int, ...]


class MeanLogits(nn.Module):
    """The mean of several networks' logits; what nnU-Net does with folds, as its sliding window is linear."""

    def __init__(self, networks: Sequence[nn.Module]):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, *spatial) -> (B, heads, *spatial)."""
        first, *others = (network(image) for network in self.networks)
        for logits in others:
            first = first + logits
        return first / len(self.networks)


def to_onnx(network: nn.Module, input_channels: int, patch_size: Sequence[int], step: Sequence[int]) -> Exported:
    """`network` for a batch of any size, and for maps that differ from the patch by whole steps.

    Args:
        network: takes (B, input_channels, *spatial).
        input_channels: channels of the image.
        patch_size: what nnU-Net planned.
        step: by how much each axis may grow or shrink: the total stride, times the attention's patch.

    Returns:
        the model; its input is `image`, its output `logits`, both float32. Where PyTorch cannot keep an axis free, all
        are fixed to the patch.
    """
    network = fold_norms(network.cpu().float().eval())
    try:
        model, steps = _translate(network, input_channels, patch_size, step), tuple(step)
    except (UserError, ConstraintViolationError):  # some size would have to be a constant
        steps = (0,) * len(patch_size)
        model = _translate(network, input_channels, patch_size, steps)
    return Exported(model, tuple(patch_size), steps)


def _translate(
    network: nn.Module, input_channels: int, patch_size: Sequence[int], step: Sequence[int]
) -> onnx.ModelProto:
    # PyTorch takes a size of 1 for a constant, also deep inside: the example is a batch of 2 and larger than the patch.
    example = torch.zeros(2, input_channels, *(size + 2 * stride for size, stride in zip(patch_size, step)))
    sizes = {0: Dim("batch", min=1, max=MAX_STEPS)}
    for axis, (size, stride) in enumerate(zip(patch_size, step, strict=True)):
        if stride:
            sizes[axis + 2] = stride * Dim(f"steps_{axis}", min=min(size // stride, 1), max=MAX_STEPS) + size % stride
    with torch.no_grad(), quiet("torch.onnx", "onnxscript", "onnx_ir"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            network,
            (example,),
            dynamic_shapes=(sizes,),
            strict=False,
            # Halves the time: what PyTorch would prove about every size is true by the steps above.
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            custom_translation_table={
                torch.ops.nnunet_lgms.multi_kernel_depthwise.default: depthwise,
                torch.ops.aten.scaled_dot_product_attention.default: attention,
            },
            verbose=False,
        )
    # The exporter folds small constants only; the depthwise weights, packed for our operator, are to be plain weights.
    model = onnxscript.optimizer.optimize(
        exported.model_proto, input_size_limit=1 << 24, output_size_limit=1 << 24, onnx_shape_inference=False
    )
    foreign = {f"{n.domain}::{n.op_type}" for n in model.graph.node if n.domain not in ("", "ai.onnx")}
    if foreign or model.functions:
        raise RuntimeError(f"The exported file has operators that are not ONNX's own: {', '.join(sorted(foreign))}.")
    return model


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Keeps loggers to errors: exporters tell their own story of stages, and what matters comes as an exception."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
