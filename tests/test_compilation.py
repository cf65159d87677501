"""How a training's network is compiled; its CUDA graphs are in test_network_kernels.py, for a GPU."""

import torch

from nnunet_lgms.compilation import compile_network


def test_every_shape_of_a_step_is_compiled_for_itself(monkeypatch):
    """Sizes left open make PyTorch's tracing many times as long, and a CUDA graph has one size."""
    compiled = []

    def backend(graph, inputs):
        compiled.append([tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor)])
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network, mode, **kwargs: compile_(network, backend=backend, **kwargs))
    network = compile_network(torch.nn.ReLU())
    for n in (2, 3, 4):
        network(torch.zeros(n, 7))
    assert compiled == [[(2, 7)], [(3, 7)], [(4, 7)]]
