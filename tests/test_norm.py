"""Norms against their definition, in every memory layout and for the smallest maps."""

import itertools

import pytest
import torch

from nnunet_lgms.blocks.norm import BATCH_NORM, INSTANCE_NORM

LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(
        memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    ),
}


def by_definition(x, axes):
    centred = x - x.mean(axes, keepdim=True)
    return centred / (centred.square().mean(axes, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize("shape", [(1, 4, 4, 5), (2, 4, 4, 5), (1, 4, 3, 4, 5), (2, 4, 3, 4, 5)])
@pytest.mark.parametrize("kind", ["instance", "batch"])
def test_gradients_are_right_in_every_layout(kind, shape):
    # PyTorch's instance norm fails this for a batch of one and a channels-last output gradient.
    dim = len(shape) - 2
    norm = (INSTANCE_NORM if kind == "instance" else BATCH_NORM)[dim](shape[1]).double().train()
    axes = tuple(range(2, 2 + dim)) if kind == "instance" else (0, *range(2, 2 + dim))
    torch.manual_seed(0)
    values, gradient = torch.randn(shape, dtype=torch.double), torch.randn(shape, dtype=torch.double)
    for x_layout, gradient_layout in itertools.product(LAYOUTS.values(), repeat=2):
        x, grad = x_layout(values).requires_grad_(), gradient_layout(gradient)
        actual, expected = norm(x), by_definition(x, axes)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual, x, grad, retain_graph=True), torch.autograd.grad(expected, x, grad)
        )


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("norms", [INSTANCE_NORM, BATCH_NORM], ids=["instance", "batch"])
def test_a_single_value_is_its_own_mean(norms, dim):
    norm = norms[dim](3, affine=True).train()
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(1, 3, *(1,) * dim, requires_grad=True)
    out = norm(x)
    torch.testing.assert_close(out, norm.bias.view(1, 3, *(1,) * dim))
    out.sum().backward()
    assert (x.grad == 0).all()
