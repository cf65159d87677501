"""Maps that the backward pass makes again in place of keeping them, here by PyTorch's operators on the CPU."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from nnunet_lgms.ops import recompute
from nnunet_lgms.ops.recompute import can_be_made_again, keeping_little


@pytest.fixture(autouse=True)
def as_where_kernels_run(monkeypatch):
    monkeypatch.setattr(recompute, "use_kernels", lambda x: True)
    monkeypatch.setattr(recompute, "LEAST", 0)


class Chain:
    """Two activations, of which the second is made of the first; convolutions ask for both, and for a view."""

    def __init__(self):
        torch.manual_seed(0)
        self.weights = [torch.randn(4, 4, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
        self.x = torch.randn(2, 4, 6, 5, dtype=torch.float64, requires_grad=True)
        self.made = []  # names, in the order in which functions are called

    def call(self, name, function, *inputs):
        self.made.append(name)
        return function(*inputs)

    def activated(self, name, function, *inputs):
        return can_be_made_again(
            self.call(name, function, *inputs), lambda *inputs: self.call(name, function, *inputs), *inputs
        )

    def __call__(self, x):
        first = self.activated("first", torch.tanh, x)
        second = self.activated("second", lambda a, b: F.silu(a) + b, first, x)
        out = F.conv2d(first, self.weights[0], padding=1) + F.conv2d(second, self.weights[1], padding=1)
        return out + F.conv2d(second.movedim(2, 3), self.weights[2], padding=1).movedim(2, 3)

    def gradients(self, function, **kwargs):
        out = function(self.x)
        self.made.clear()
        return out, torch.autograd.grad(out.square().sum(), [self.x, *self.weights], **kwargs)


def test_gradients_are_the_same_and_each_map_is_made_once():
    chain = Chain()
    _, expected = chain.gradients(chain)
    assert not chain.made
    _, actual = chain.gradients(lambda x: keeping_little(chain, x))
    assert all(map(torch.equal, actual, expected))
    assert sorted(chain.made) == ["first", "second"]


def test_a_map_lives_until_it_was_used_and_again_until_the_last_gradient():
    chain, alive = Chain(), []

    def watched(*inputs):
        out = F.silu(*inputs)  # which keeps its input
        alive.append(weakref.ref(out.untyped_storage()))
        return out

    def function(x):
        a = can_be_made_again(watched(x), watched, x)
        return F.conv2d(a, chain.weights[0])

    out = keeping_little(function, chain.x)
    gc.collect()
    assert [ref() for ref in alive] == [None]
    out.sum().backward()
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


def test_a_graph_can_be_gone_through_again():
    chain = Chain()
    loss = keeping_little(chain, chain.x).square().sum()
    first, second = (torch.autograd.grad(loss, [chain.x, *chain.weights], retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_second_derivatives():
    weight = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)

    def function(x):
        def of(x):
            a = can_be_made_again(torch.tanh(x), torch.tanh, x)
            return F.conv2d(a, weight) * F.conv2d(a, weight)

        return keeping_little(of, x)

    assert gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


def test_what_is_changed_in_place_is_noticed():
    chain = Chain()
    loss = keeping_little(chain, chain.x).sum()
    with torch.no_grad():
        chain.weights[0].mul_(2)
    with pytest.raises(RuntimeError, match=r"of shape \(4, 4, 3, 3\) .* changed in place"):
        loss.backward()


def test_nothing_is_noted_outside_or_without_a_gradient():
    chain = Chain()
    with torch.no_grad():
        keeping_little(chain, chain.x)
    assert recompute._recipes.get() is None
    _, (*_, gradient) = chain.gradients(chain)
    assert gradient is not None and not chain.made


def test_small_maps_are_kept(monkeypatch):
    monkeypatch.setattr(recompute, "LEAST", 1 << 20)
    chain = Chain()
    chain.gradients(lambda x: keeping_little(chain, x))
    assert not chain.made


def test_transforms_that_refuse_hooks_keep_everything():
    chain = Chain()
    weight = chain.weights[0].detach()

    def function(x):
        return keeping_little(lambda x: F.conv2d(can_be_made_again(x.tanh(), torch.tanh, x), weight).sum(), x)

    torch.testing.assert_close(
        torch.func.grad(function)(chain.x.detach()), torch.autograd.grad(function(chain.x), chain.x)[0]
    )
