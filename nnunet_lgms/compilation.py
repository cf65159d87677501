"""How a training compiles its network on one GPU: with CUDA graphs.

A step of LGMSNet is about a thousand short kernels, and what limits it on a small patch is how fast Python can start
them: compiled the way nnU-Net does it, 16 images of 256^2 take 65 ms on an H100, of which the GPU works 13. A CUDA
graph starts all of them at once.
"""

from __future__ import annotations

import torch
from torch import nn
from torch._dynamo import OptimizedModule


def compile_network(network: nn.Module) -> nn.Module:
    """The network, compiled for steps of one shape.

    The result of a call lives in memory that the next call takes back: copy what has to live longer. So a prediction
    that sums up mirrored results needs another network, :func:`without_graphs`. A step of another shape is compiled
    anew: with the sizes left open PyTorch traced a small network for 380 s in place of 18, and a graph has one size
    anyway.
    """
    return torch.compile(network, mode="reduce-overhead", dynamic=False)


def without_graphs(network: nn.Module) -> nn.Module:
    """The network as it is, and the memory of all CUDA graphs free again; one that was not compiled is as it is."""
    if not isinstance(network, OptimizedModule):
        return network
    torch.compiler.reset()
    return network._orig_mod
