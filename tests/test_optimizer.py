"""The optimiser: PyTorch's numbers, also where the scaler skips steps, and old checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from nnunet_lgms.graphs.optimizer import FusedSGD

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SETTINGS = {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-4}


def network(device: str) -> nn.Module:
    """With weights in either memory format, and one that is never used."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 3).to(memory_format=torch.channels_last))
    net.register_parameter("unused", nn.Parameter(torch.ones(2)))
    return net.to(device)


def steps(net: nn.Module, optimizer: torch.optim.Optimizer, seeds: range, overflow: tuple[int, ...] = ()) -> None:
    """A step for each seed behind a gradient scaler; those in ``overflow`` have infinite gradients."""
    device = next(net.parameters()).device.type
    scaler = torch.amp.GradScaler(device, init_scale=8.0)
    for seed in seeds:
        torch.manual_seed(seed)
        x = torch.randn(2, 3, 8, 8).to(device)
        optimizer.zero_grad(set_to_none=True)
        loss = net(x).square().mean() * (float("inf") if seed in overflow else 1)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), 12)
        scaler.step(optimizer)
        scaler.update()


def weights(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("overflow", [(), (0,), (0, 1, 3)])
def test_steps_are_those_of_sgd(device, overflow):
    fused, plain = network(device), network(device)
    steps(fused, FusedSGD(fused.parameters(), **SETTINGS), range(6), overflow)
    steps(plain, torch.optim.SGD(plain.parameters(), **SETTINGS, foreach=False), range(6), overflow)
    for a, b, begin in zip(weights(fused), weights(plain), weights(network(device)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        assert a.shape == (2,) or not torch.equal(a, begin)


@pytest.mark.parametrize("device", DEVICES)
def test_skipped_first_step_leaves_no_trace(device):
    """PyTorch's fused SGD would go on from a momentum that nothing was written to."""
    net = network(device)
    optimizer = FusedSGD(net.parameters(), **SETTINGS)
    steps(net, optimizer, range(1), overflow=(0,))
    assert all(map(torch.equal, weights(net), weights(network(device))))
    assert not any(state["momentum_buffer"].any() for state in optimizer.state.values())


def test_parameters_that_come_later_begin_with_zeros_as_well():
    first, later = network("cpu"), network("cpu")
    optimizer = FusedSGD(first.parameters(), **SETTINGS)
    optimizer.add_param_group({"params": later.parameters()})
    assert all(not optimizer.state[p]["momentum_buffer"].any() for p in later.parameters())
    assert len(optimizer.state) == len(weights(first)) + len(weights(later))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("before", ["trained", "skipped its only step"])
def test_goes_on_from_a_checkpoint_of_sgd(device, before):
    net, other = network(device), network(device)
    overflow = (0,) if before == "skipped its only step" else ()
    plain = torch.optim.SGD(net.parameters(), **SETTINGS)
    steps(net, plain, range(1), overflow)
    other.load_state_dict(net.state_dict())
    fused = FusedSGD(other.parameters(), **SETTINGS)
    fused.load_state_dict(copy.deepcopy(plain.state_dict()))  # or both would have the same momentum
    steps(net, plain, range(1, 4))
    steps(other, fused, range(1, 4))
    for a, b in zip(weights(other), weights(net), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_checkpoint_serves_sgd_as_well():
    """Models of this version load in the one before."""
    net = network("cpu")
    fused = FusedSGD(net.parameters(), **SETTINGS)
    steps(net, fused, range(2))
    plain = torch.optim.SGD(net.parameters(), **SETTINGS)
    plain.load_state_dict(fused.state_dict())
    for p in net.parameters():
        assert torch.equal(plain.state[p]["momentum_buffer"], fused.state[p]["momentum_buffer"])
