"""LGMSNet that replays CUDA graphs in place of launching its kernels one by one.

A training step of LGMSNet is about a thousand kernels, a prediction three hundred, most of them shorter than what
Python takes to launch one: launched one by one, the GPU waits for Python most of the time. Recorded once as a CUDA
graph, all of them start at a word. A graph knows its tensors by their place in memory, so it belongs to one shape of
input.

Nothing here is computed in another way, and `torch.compile`, export, the CPU and inputs of other shapes take the way of
:class:`LGMSNet`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping
from contextlib import nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd

from nnunet_lgms.architecture.lgmsnet import LGMSNet
from nnunet_lgms.graphs.recorded import RecordedPrediction, RecordedStep
from nnunet_lgms.graphs.recording import can_be_recorded, in_all_or_none
from nnunet_lgms.ops.backend import nothing_prepared, use_kernels
from nnunet_lgms.ops.launch import only_compiling
from nnunet_lgms.ops.of_weights import of_weights

# Predictions of one kind that are computed before one is recorded: a graph takes as long as these to make.
BEFORE_RECORDING = 2


class GraphedLGMSNet(LGMSNet):
    """:class:`LGMSNet` whose predictions, and training steps once :meth:`record_training` was called, are CUDA graphs.

    Graphs are made and replayed on NVIDIA GPUs, of the Triton kernels or of PyTorch's operators (see
    :func:`use_kernels`): neither asks the GPU for a number. Predictions are recorded by themselves, when inputs of the
    same shape come again and again, as windows of an image do; only the latest graph is kept. A graph ends when the
    weights move to another place (``.to``, ``.half``, ``load_state_dict(..., assign=True)``), not when they change:
    what predictions make of the weights alone is made again then. A change through ``weight.data`` is not seen before
    the next :meth:`train` or ``eval()``.

    Attributes:
        few_predictions: whether so few are to come that what is compiled or tried out for them takes longer than it
            saves: they go through PyTorch's operators then, with cuDNN's first choice of algorithms.
    """

    few_predictions = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._training_step: RecordedStep | None = None
        self.forget_graphs()
        self.register_load_state_dict_post_hook(_end_graphs_of_weights_elsewhere)

    def forget_graphs(self) -> None:
        """Frees their memory; predictions are recorded anew, a training step by :meth:`record_training`."""
        if self._training_step is not None:
            self._training_step.end()
        self._training_step, self._training_kind = None, None
        self._prediction_kind: Hashable = None
        self._prediction: RecordedPrediction | None = None
        self._computed = 0  # predictions of this kind
        self._places: list[int] | None = None  # of the weights in memory, when something was recorded

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """As :meth:`LGMSNet.forward`; in training, the result of a graph is overwritten by the next step."""
        if torch.compiler.is_compiling() or not self._has_graphs(x):
            return super().forward(x)
        with torch.cuda.device_of(x):
            if not self.training and not torch.is_grad_enabled():
                with nothing_prepared() if self.few_predictions else nullcontext():
                    return self._predict(x)
            return self._training_step(x) if self._kind(x) == self._training_kind else super().forward(x)

    @staticmethod
    def _has_graphs(x: Tensor) -> bool:
        return can_be_recorded(x) and not torch.cuda.is_current_stream_capturing()

    @property
    def has_recorded_training(self) -> bool:
        """Whether a training step was recorded, whose memory is the graphs' until they are forgotten."""
        return self._training_step is not None

    def replays(self, x: Tensor) -> bool:
        """Whether a training step on x is a graph, as things stand (autocast, mode)."""
        return self.training and self._has_graphs(x) and self._kind(x) == self._training_kind

    def record_training(self, x: Tensor, group: dist.ProcessGroup | None = None) -> None:
        """Records forward and backward pass of a step on a batch like x, to be replayed whenever such a batch comes.

        Call it in training mode, under the autocast of the training. Weights and running statistics stay as they are.
        With empty caches, all kernels are compiled first, on all cores.

        Args:
            x: (B, input_channels, *patch) on a GPU.
            group: processes over which the gradients are averaged, by NCCL; each of them records at the same time.

        Raises:
            RuntimeError: the GPU has not enough memory, or something in the step cannot be recorded, here or in another
                process of the group: with and without a graph they would exchange different things.
        """
        self.forget_graphs()
        statistics = [b.clone() for b in self.buffers()]
        parameters = {name: p for name, p in _WithoutGraphs(self).named_parameters() if p.requires_grad}
        try:
            with in_all_or_none(group, x.device):
                self._training_step = RecordedStep(x, parameters, group)
                self._training_step.rehearse(self._with_converted_weights)
            with in_all_or_none(group, x.device):
                self._training_step.record(self._with_converted_weights)
            self._training_kind, self._places = self._kind(x), self._places_now()
        except RuntimeError:
            self.forget_graphs()
            raise
        finally:
            for buffer, before in zip(self.buffers(), statistics, strict=True):
                buffer.copy_(before)

    def _predict(self, x: Tensor) -> Tensor | list[Tensor]:
        kind = self._kind(x), use_kernels(x), self.few_predictions
        if kind != self._prediction_kind:
            self._prediction_kind, self._prediction, self._computed = kind, None, 0
            if use_kernels(x):
                with only_compiling():
                    self._with_converted_weights(x)
        if self._prediction is None and self._computed == BEFORE_RECORDING:
            try:
                self._prediction = RecordedPrediction(self._with_converted_weights, x, list(self.parameters()))
                self._places = self._places_now()
            except RuntimeError as error:  # out of memory, most likely, which a graph holds for as long as it lives
                warnings.warn(f"Predictions are not recorded as a CUDA graph ({error}).", stacklevel=2)
        self._computed += 1
        return self._with_converted_weights(x) if self._prediction is None else self._prediction(x)

    def train(self, mode: bool = True) -> GraphedLGMSNet:
        """As PyTorch's; the next prediction looks at the weights anew, as not every change of them can be seen."""
        if self._prediction is not None:
            self._prediction.weights_may_have_changed()
        return super().train(mode)

    def _with_converted_weights(
        self, x: Tensor, parameters: Mapping[str, Tensor] | None = None
    ) -> Tensor | list[Tensor]:
        """The forward pass without graphs; one kernel converts what autocast would convert one by one.

        With other tensors than the network's own as ``parameters``, if they are given by their names.
        """
        plain = _WithoutGraphs(self)
        parameters = dict(plain.named_parameters() if parameters is None else parameters)
        if torch.is_autocast_enabled("cuda"):
            modules = {name: module for name, module in plain.named_modules() if _is_converted(module)}
            names = [f"{name}.weight" for name in modules]
            # A convolution's bias goes to operators that read it as it is.
            names += [f"{name}.bias" for name, m in modules.items() if isinstance(m, nn.Linear) and m.bias is not None]
            dtype, tensors = torch.get_autocast_dtype("cuda"), [parameters[name] for name in names]
            convert = _Convert.apply if torch.is_grad_enabled() else partial(of_weights, _converted)
            converted = convert(dtype, *tensors)
            parameters.update(zip(names, converted, strict=True))
        return functional_call(plain, parameters, (x,))

    def _kind(self, x: Tensor) -> Hashable:
        """What a graph is good for."""
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        grad = torch.is_grad_enabled()
        return x.shape, x.dtype, x.device, autocast, grad, self.training, self.decoder.deep_supervision

    def _apply(self, fn: Callable, recurse: bool = True) -> GraphedLGMSNet:
        super()._apply(fn, recurse)
        _end_graphs_of_weights_elsewhere(self)
        return self

    def _places_now(self) -> list[int]:
        return [t.data_ptr() for t in chain(self.parameters(), self.buffers())]

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles record their own graphs."""
        graphs = "_training_kind", "_training_step", "_prediction_kind", "_prediction"
        return {**self.__dict__, **dict.fromkeys(graphs), "_places": None, "_computed": 0}


def _end_graphs_of_weights_elsewhere(network: GraphedLGMSNet, *_: Any) -> None:
    """After what may have moved weights: a conversion, or ``load_state_dict(..., assign=True)``."""
    if network._places is not None and network._places != network._places_now():
        network.forget_graphs()


class _WithoutGraphs(nn.Module):
    def __init__(self, network: LGMSNet):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        return LGMSNet.forward(self.network, x)


def _is_converted(module: nn.Module) -> bool:
    """Whether autocast rounds this module's weight; depthwise kernels go to their operator in float32."""
    depthwise = isinstance(module, _ConvNd) and module.weight.shape[1] == 1 and module.groups > 1
    return isinstance(module, (_ConvNd, nn.Linear)) and not depthwise and module.weight.requires_grad


class _Convert(torch.autograd.Function):
    """Tensors in another dtype, all by one kernel, and so their gradients."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = tensors[0].dtype
        return _converted(dtype, *tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_converted(ctx.dtype, *gradients)


def _converted(dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
    out = tuple(torch.empty_like(t, dtype=dtype) for t in tensors)
    torch._foreach_copy_(out, tensors)
    return out
