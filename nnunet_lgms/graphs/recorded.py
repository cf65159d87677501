"""A forward pass, and a forward with its backward pass, as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves, tree_map

from nnunet_lgms.graphs.recording import as_recorded, autocast_without_cache, memory_for, recording
from nnunet_lgms.ops.exchange import without_exchange
from nnunet_lgms.ops.launch import only_compiling
from nnunet_lgms.ops.of_weights import MadeOfWeights


class RecordedPrediction:
    """A recorded forward pass, for inputs like x, which makes nothing of the weights that can be made before."""

    def __init__(self, forward: Callable, x: Tensor, weights: Sequence[Tensor]):
        self._input = memory_for(x)
        self._graph = torch.cuda.CUDAGraph()
        self._of_weights = MadeOfWeights(weights)
        self._weights = [w for w in weights if not w.is_inference()]
        self._all_tell = len(self._weights) == len(weights)  # when they change; a tensor of inference mode does not
        with autocast_without_cache():
            with self._of_weights.making():
                forward(self._input)
            with self._of_weights.in_use(), recording(self._graph, torch.cuda.Stream()):
                self._output = forward(self._input)
        self._versions: list[int] | None = self._versions_now()

    def weights_may_have_changed(self) -> None:
        """In their place, without telling."""
        self._versions = None

    def _versions_now(self) -> list[int]:
        return [w._version for w in self._weights]

    def __call__(self, x: Tensor) -> Tensor | list[Tensor]:
        versions = self._versions_now()
        if versions != self._versions or not self._all_tell:
            self._of_weights.renew()
            self._versions = versions
        self._input.copy_(x)
        self._graph.replay()
        return tree_map(torch.clone, self._output)


class RecordedStep:
    """A forward and backward pass, for batches like x, to be recorded."""

    def __init__(self, x: Tensor, parameters: Mapping[str, nn.Parameter], group: dist.ProcessGroup | None = None):
        self._input, self._parameters, self._group = memory_for(x), list(parameters.values()), group
        # The same memory under other names: DDP holds on to where gradients of parameters are gathered, which is on a
        # stream that a recording cannot wait for.
        self._weights = {name: p.detach().requires_grad_() for name, p in parameters.items()}
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self._stream = torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())

    def rehearse(self, forward: Callable) -> None:
        """Compiles the kernels and takes the step once, so that libraries have chosen their algorithms.

        Nothing is exchanged, so that a process that has not enough memory leaves no other one waiting.
        """
        with without_exchange(), torch.cuda.stream(self._stream), as_recorded():
            with only_compiling():
                outputs = forward(self._input, self._weights)
                self._output_gradients = [torch.zeros_like(out) for out in tree_leaves(outputs)]
                self._differentiate(outputs)
            self._differentiate(forward(self._input, self._weights))

    def record(self, forward: Callable) -> None:
        with as_recorded():
            if self._group is not None:
                with torch.cuda.stream(self._stream):  # once for NCCL, in the memory of the rehearsal
                    self._exchange(*self._differentiate(forward(self._input, self._weights)))
            with recording(self._forward, self._stream):
                outputs = forward(self._input, self._weights)
            with recording(self._backward, self._stream, self._forward.pool()):
                self._gradients = self._exchange(*self._differentiate(outputs))
        self._outputs = tree_map(torch.detach, outputs)

    def _differentiate(self, outputs: Tensor | list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        weights = list(self._weights.values())
        gradients = torch.autograd.grad(tree_leaves(outputs), weights, self._output_gradients)
        return _together(gradients, weights)

    def _exchange(self, together: Tensor, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self._group is not None:
            dist.all_reduce(together, dist.ReduceOp.AVG, self._group)
        return gradients

    def end(self) -> None:
        """Destroys the graphs, whoever holds this step. NCCL ends no exchange while a graph has it recorded."""
        self._forward.reset()
        self._backward.reset()

    def __call__(self, x: Tensor) -> Tensor | list[Tensor]:
        self._input.copy_(x)
        outputs = _Replay.apply(self, *self._parameters)
        return outputs[0] if isinstance(self._outputs, Tensor) else list(outputs)

    def replay_forward(self) -> tuple[Tensor, ...]:
        self._forward.replay()
        return tuple(out.detach() for out in tree_leaves(self._outputs))

    def replay_backward(self, output_gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        for memory, gradient in zip(self._output_gradients, output_gradients, strict=True):
            memory.copy_(gradient)
        for parameter, memory in zip(self._parameters, self._gradients, strict=True):
            if parameter.grad is not None and parameter.grad.data_ptr() == memory.data_ptr():
                parameter.grad = parameter.grad.clone()  # of the step before, to which autograd adds this one's
        self._backward.replay()
        return tuple(gradient.detach() for gradient in self._gradients)


def _together(gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Gradients in one piece of memory, which processes exchange at once, and as parts of it.

    They have the strides of their weights: autograd keeps such as they are, and copies others to new memory.
    """
    sizes = [weight.numel() for weight in weights]
    together = gradients[0].new_empty(sum(sizes))
    parts = together.split(sizes)
    layouts = [torch.empty_like(weight, device="meta") for weight in weights]  # made dense
    # Flat: where the strides of one pair differ, PyTorch copies all pairs one by one, two hundred launches.
    flat = [_as_stored(gradient, layout) for gradient, layout in zip(gradients, layouts, strict=True)]
    torch._foreach_copy_(parts, flat)
    shaped = (part.as_strided(layout.shape, layout.stride()) for part, layout in zip(parts, layouts, strict=True))
    return together, tuple(shaped)


def _as_stored(x: Tensor, layout: Tensor) -> Tensor:
    """The numbers of x, flat, in the order in which those of a dense tensor of its shape lie in memory."""
    return x.permute(sorted(range(x.ndim), key=layout.stride, reverse=True)).flatten()


class _Replay(torch.autograd.Function):
    """A recorded step as a function of the network's parameters."""

    @staticmethod
    def forward(ctx, step: RecordedStep, *parameters: nn.Parameter) -> tuple[Tensor, ...]:
        ctx.step = step
        return step.replay_forward()

    @staticmethod
    @once_differentiable
    def backward(ctx, *output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.step.replay_backward(output_gradients)
