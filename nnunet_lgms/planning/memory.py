"""Peak memory of a training step, without a GPU: the step runs on PyTorch's "meta" device, where tensors have sizes
but no numbers, and every byte that is alive is counted.

What is counted is nnU-Net's step: float16 autocast, loss, backward pass, SGD with momentum, on the path that a GPU
takes: :func:`nnunet_lgms.ops.backend.as_on_gpu` switches the Triton kernels on, :class:`Lifetimes` leaves out their
launches, and :class:`OnGPU` repeats autocast, which does not work on meta tensors. The network's passes are CUDA
graphs, whose memory nobody else may use, so what the loss takes comes on top. A tensor counts from its birth to its
last use; PyTorch's own tracker (``torch.distributed._tools.mem_tracker``) counts it until Python lets go of it, a
little longer, and does not see what an operator allocates on the way.

:data:`CALIBRATION` is the place for what a GPU needs beside the tensors (workspaces, blocks that the allocator cannot
fill). ``benchmarks/memory.py`` measures steps, writes them beside the estimates and fits the constants.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch._ops import HigherOrderOperator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from nnunet_lgms.config import LGMSSettings, settings_of
from nnunet_lgms.config.resolve import Topology
from nnunet_lgms.dataset_json import n_channels
from nnunet_lgms.ops.backend import as_on_gpu, use_kernels
from nnunet_lgms.ops.memory_format import CHANNELS_LAST, channels_last
from nnunet_lgms.planning.override import build_on_meta

CLEARLY_MORE = 1.1
ALLOCATOR_BLOCK = 512  # bytes; every allocation on CUDA is rounded up to it


@dataclass(frozen=True)
class Calibration:
    """From counted to needed bytes.

    Attributes:
        activations: bytes that a GPU needs per counted byte that grows with the batch.
        fixed: bytes that any step needs, beside parameters, gradients and momentum: cuBLAS's, for one.
        context: bytes that CUDA and the libraries take on the card before the first tensor.
    """

    activations: float
    fixed: int
    context: int


# Fitted to the steps in benchmarks/results/memory.md, so that the largest relative deviation is smallest: 2.7 % in 2D,
# 7.0 % in 3D. CUDA graphs hold an eighth to a third more than their step's tensors need at once, in the smallest step
# half: blocks that were taken for one size and serve no other, and cuDNN's workspaces. In 3D nothing is fixed.
CALIBRATION = {
    2: Calibration(activations=1.125, fixed=33 * 2**20, context=600 * 2**20),
    3: Calibration(activations=1.237, fixed=0, context=600 * 2**20),
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


def trace_training_step(network: nn.Module, input_shape: Sequence[int], n_classes: int) -> StepMemory:
    """Counts the live bytes of one training step of ``network`` on a batch of ``input_shape`` (B, C, *patch).

    Args:
        network: on the meta device; see :func:`nnunet_lgms.planning.override.build_on_meta`.
        input_shape: batch, channels, patch in voxels.
        n_classes: channels of the output, background included.
    """
    from nnunet_lgms.nnunet.loss import cross_entropy_and_dice, deep_supervision_weights

    loss_function = cross_entropy_and_dice(label_manager(n_classes), batch_dice=True, ddp=False)
    # gradients live only within the step, so parameters and momentum are all that stays
    static = sum(_nbytes(t) for t in [*network.parameters(), *network.buffers()])
    static += sum(_nbytes(p) for p in network.parameters() if p.requires_grad)
    passes, of_loss = Lifetimes(), Lifetimes()
    with as_on_gpu():
        if not use_kernels(torch.empty(0)):  # which take the place of the whole loss
            loss_function.dc = _CompiledDice()
        with passes, OnGPU():
            data = torch.empty(tuple(input_shape), device="meta")
            outputs = network(data)
        outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]  # several with deep supervision
        weights = deep_supervision_weights(len(outputs))
        with of_loss:
            batch = torch.empty(tuple(input_shape), device="meta")
            targets = [torch.empty((len(o), 1, *o.shape[2:]), dtype=torch.int16, device="meta") for o in outputs]
            leaves = [o.detach().requires_grad_() for o in outputs]
            with OnGPU():
                loss = sum(w * loss_function(o, t) for w, o, t in zip(weights, leaves, targets, strict=True) if w)
            loss.backward()
        with passes:
            weighed = [o for w, o in zip(weights, outputs, strict=True) if w]
            incoming = [torch.empty_like(o) for o in weighed]
            torch.autograd.backward(weighed, incoming)
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    # The optimizer comes last, and takes nothing.
    peaks = passes.peak(kept=[data, *outputs, *incoming, *gradients]), of_loss.peak(kept=[batch, *targets])
    return StepMemory(static, sum(peaks))


def estimate_training_memory(
    settings: LGMSSettings, topology: Topology, batch_size: int, input_channels: int, n_classes: int
) -> int:
    """Peak of allocated GPU memory, in bytes, of a training step of LGMSNet."""
    network = build_on_meta(settings, topology, input_channels, n_classes)
    counted = trace_training_step(network, (batch_size, input_channels, *topology.patch_size), n_classes)
    return needed_bytes(counted, topology.dim)


def memory_remarks(
    old: dict[str, Any], new: dict[str, Any], configurations: Sequence[str] | None, dataset_json: dict[str, Any]
) -> list[tuple[str, bool]]:
    """What the training steps of ``new`` plans need, a sentence each, and whether that is clearly more or too much.

    Of configurations that need clearly more memory than in ``old``, that have another patch, batch or number of levels,
    or that need more than this machine's card has.
    """
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    channels = n_channels(dataset_json)
    classes = len(dataset_json["labels"])
    own = [name for name, content in new["configurations"].items() if "inherits_from" not in content]

    def shape_of(plans: dict[str, Any], name: str) -> tuple[Topology, int]:
        manager = PlansManager(plans).get_configuration(name)
        return Topology.of(manager.configuration), manager.batch_size

    def gib(plans: dict[str, Any], name: str) -> float:
        manager = PlansManager(plans).get_configuration(name)
        topology = Topology.of(manager.configuration)
        return estimate_training_memory(settings_of(manager), topology, manager.batch_size, channels, classes) / 2**30

    card = torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else math.inf
    remarks = []
    for name in configurations or own:
        try:
            before = gib(old, name)
        except ValueError:  # settings that no network can be built from: nothing to compare with
            continue
        after = gib(new, name)
        is_more = after > min(card, CLEARLY_MORE * before)
        if is_more or shape_of(old, name) != shape_of(new, name):
            more = f", more than the {card:.1f} of this card" if after > card else ""
            needs = f"{name}: a training step needs about {after:.1f} GiB instead of {before:.1f}{more}"
            remarks.append((needs, is_more))
    return remarks


def needed_bytes(memory: StepMemory, dim: int) -> int:
    """Peak of allocated GPU memory, in bytes, of a training step."""
    calibration = CALIBRATION[dim]
    return round(memory.static + calibration.fixed + calibration.activations * memory.activations)


class Watched(TorchDispatchMode):
    """Shows its subclass what a step on the meta device calls, as a GPU would be called.

    Custom operators are followed into their descriptions (see ``torch.library``), so that what they allocate and launch
    on the way is seen as well; the Triton kernels that they launch compute nothing.
    """

    supports_higher_order_operators = True  # a Triton kernel's launch is one

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_launch = isinstance(function, HigherOrderOperator)
        description = None if is_launch else OPDEFS.get(function._schema.name)
        if description is not None:
            with self:
                return description._abstract_fn(*args, **kwargs)
        out = None if is_launch else function(*args, **kwargs)
        if function in (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default):
            out = _as_from_cudnn(args, out)
        self.see(function, args, kwargs, out)
        return out

    def see(self, function: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        """A call of an operator of PyTorch's, or a launch, which gives None."""
        raise NotImplementedError


class Lifetimes(Watched):
    """Records when the memory of every tensor that comes to life inside is taken and when it is used last."""

    def __init__(self):
        super().__init__()
        self._now = 0
        self._spans: list[list[int]] = []  # bytes, first and last use
        self._span_of = WeakIdKeyDictionary()  # by storage

    def see(self, function: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        self._now += 1
        given = [t.untyped_storage() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        for storage in given:
            if storage in self._span_of:
                self._span_of[storage][2] = self._now
        known = {id(s) for s in given}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._take(tensor.untyped_storage(), known)

    def _take(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        if storage in self._span_of or id(storage) in given:  # a view, or changed in place
            return
        n = -(-storage.nbytes() // ALLOCATOR_BLOCK) * ALLOCATOR_BLOCK
        self._span_of[storage] = span = [n, self._now, self._now]
        self._spans.append(span)

    def peak(self, kept: Iterable[Tensor] = ()) -> int:
        """Most bytes at once, if every tensor is given back after its last use and ``kept`` are held to the end."""
        for tensor in kept:
            self._span_of[tensor.untyped_storage()][2] = self._now
        changes = Counter()
        for n, first, last in self._spans:
            changes[first] += n
            changes[last + 1] -= n
        return max(accumulate(n for _, n in sorted(changes.items())), default=0)


def _as_from_cudnn(args: tuple, out: Any) -> Any:
    """Results of a convolution in the memory format of its maps, as on CUDA; the meta device knows it in 2D only."""
    memory_format = CHANNELS_LAST[args[0].ndim]
    if not any(channels_last(t) for t in args[:2]):  # map and weight, or gradient and map
        return out
    return tree_map(
        lambda t: torch.empty_like(t, memory_format=memory_format) if isinstance(t, Tensor) and t.ndim > 1 else t, out
    )


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


class _Pooling(torch.autograd.Function):
    """The memory of pooling without indices: the input is kept and searched again."""

    @staticmethod
    def forward(ctx, x: Tensor, stride: Sequence[int]) -> Tensor:
        ctx.save_for_backward(x)
        size = [-(-n // s) for n, s in zip(x.shape[2:], stride, strict=True)]
        return x.new_empty(*x.shape[:2], *size)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return torch.empty_like(ctx.saved_tensors[0]), None


class _FusedDice(torch.autograd.Function):
    """The memory of nnU-Net's Dice, compiled: a one-hot target and two sums of a softmax per voxel are kept."""

    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor) -> Tensor:
        one_hot = torch.empty(logits.shape, dtype=torch.bool, device=logits.device)
        sums = logits.new_empty((2, *target.shape), dtype=torch.float32)
        ctx.save_for_backward(logits, one_hot, sums)
        return logits.new_empty(())

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return torch.empty_like(ctx.saved_tensors[0]), None


class _CompiledDice(nn.Module):
    def forward(self, logits: Tensor, target: Tensor, loss_mask: Tensor | None = None) -> Tensor:
        return _FusedDice.apply(logits, target)


class OnGPU(TorchFunctionMode):
    """On any device, the dtypes and the kept tensors of nnU-Net's step on a GPU.

    Convolutions and products work in float16 and losses in float32, as under ``torch.autocast("cuda")``. Where
    PyTorch's operators run instead of this package's kernels, norms stay in the dtype that comes and keep their input
    only, and pooling keeps no indices.
    """

    HALF = {"conv2d", "conv3d", "linear", "matmul", "bmm", "mm", "addmm", "baddbmm"}
    HALF_OPERATORS = {"nnunet_lgms::multi_kernel_depthwise"}
    FULL = {"softmax", "log_softmax", "cross_entropy", "nll_loss", "cross_entropy_loss"}
    FULL |= {"binary_cross_entropy_with_logits"}
    AS_IT_COMES = {"layer_norm", "group_norm"}
    POOLING = {"max_pool2d", "max_pool3d"}

    def __enter__(self):
        self._before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        torch.set_autocast_enabled("cuda", True)  # what this package's operators ask
        torch.set_autocast_dtype("cuda", torch.float16)
        return super().__enter__()

    def __exit__(self, *exception):
        torch.set_autocast_enabled("cuda", self._before[0])
        torch.set_autocast_dtype("cuda", self._before[1])
        return super().__exit__(*exception)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "").strip("_").split(".")[0]
        if name == "scaled_dot_product_attention":
            return _FusedAttention.apply(*_cast(args[:3], torch.float16))
        if name in self.POOLING:
            return _Pooling.apply(args[0], args[1])
        schema = getattr(function, "_schema", None)
        if name in self.HALF or (schema is not None and schema.name in self.HALF_OPERATORS):
            args, kwargs = _cast((args, kwargs), torch.float16)
        elif name in self.FULL:
            args, kwargs = _cast((args, kwargs), torch.float32)
        elif name in self.AS_IT_COMES:
            args, kwargs = _cast((args, kwargs), args[0].dtype)  # weights that are float32
        return function(*args, **kwargs)


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, tree)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def label_manager(n_classes: int):
    """Labels 0 to ``n_classes - 1``, as nnU-Net describes them."""
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    return LabelManager({"background": 0, **{str(i): i for i in range(1, n_classes)}}, None)
