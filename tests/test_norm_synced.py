"""Norm and activation with statistics of several processes: two of them on the CPU, in Triton's interpreter.

Each has a part of the batch, of different sizes; together they must give what PyTorch gives for the whole in float64.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from interpreter import run_interpreted
from torch import distributed as dist
from torch import nn
from torch._library.triton import is_wrap_triton_enabled

from nnunet_lgms.ops.backend import as_on_gpu
from nnunet_lgms.ops.exchange import without_exchange
from nnunet_lgms.ops.launch import launch
from nnunet_lgms.ops.norm_act import ACTIVATIONS, norm_act

LAYOUT = {4: torch.channels_last, 5: torch.channels_last_3d}
SAMPLES = (1, 2)  # of each process


class Case(NamedTuple):
    shape: tuple[int, ...]  # of the whole batch
    activation: str
    affine: bool = True
    residual: bool = False
    bias: bool = False
    contiguous: bool = False  # the input
    mean: float = 1.0


CASES = {
    "2d_silu": Case((3, 12, 9, 10), "silu"),
    "3d_relu": Case((3, 5, 4, 5, 6), "relu", contiguous=True),
    "3d_none_residual": Case((3, 8, 3, 5, 7), "none", residual=True),
    "2d_large_mean": Case((3, 4, 6, 7), "relu", mean=1000.0),
    "2d_gelu_first_biased": Case((3, 20, 5, 6), "gelu_first", bias=True, mean=0.0),
    "2d_gelu_biased": Case((3, 6, 5, 6), "gelu", residual=True, bias=True),
    "2d_not_affine": Case((3, 7, 5, 6), "silu", affine=False, contiguous=True),
}


def make(case: Case) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A norm, and input, residual, bias and gradient of the output, all in float64."""
    shape = case.shape
    torch.manual_seed(0)
    norm = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm3d)(shape[1], affine=case.affine).double()
    for p in norm.parameters():
        nn.init.normal_(p, 1, 0.5)
    x, residual, grad = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    x += case.mean * over_channels(torch.linspace(0.5, 1.5, shape[1]), x)
    # numbers that float32 has, too
    return norm, {
        "x": x.float().double(),
        "residual": residual,
        "bias in front": torch.randn(shape[1]).double(),
        "grad": grad,
    }


def over_channels(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return values.view(-1, *[1] * (x.ndim - 2))


def reference(case: Case) -> dict[str, torch.Tensor]:
    norm, tensors = make(case)
    x, residual, bias = (tensors[name].requires_grad_() for name in ("x", "residual", "bias in front"))
    value = x + over_channels(bias, x) if case.bias else x
    first = case.activation == "gelu_first"
    out = norm(F.gelu(value)) if first else ACTIVATIONS[case.activation](norm(value))
    out = out + residual if case.residual else out
    out.backward(tensors["grad"])
    found = {"out": out, "x": x.grad, "residual": residual.grad, "bias in front": bias.grad}
    return collected(found, norm)


def part(case: Case, rank: int) -> dict[str, torch.Tensor]:
    """What a process computes, in float32."""
    norm, tensors = make(case)
    norm = nn.SyncBatchNorm.convert_sync_batchnorm(norm.float())
    mine = slice(sum(SAMPLES[:rank]), sum(SAMPLES[: rank + 1]))
    x, residual, grad = (
        tensors[n].float()[mine].contiguous(memory_format=LAYOUT[len(case.shape)]) for n in ("x", "residual", "grad")
    )
    x = (x.contiguous() if case.contiguous else x).requires_grad_()
    residual, bias = residual.requires_grad_(), tensors["bias in front"].float().requires_grad_()
    added, left = residual if case.residual else None, bias if case.bias else None
    out = norm_act(x, norm, case.activation, added, left)
    out.backward(grad)
    return collected({"out": out, "x": x.grad, "residual": residual.grad, "bias in front": bias.grad}, norm)


def collected(found: dict[str, torch.Tensor | None], norm: nn.Module) -> dict[str, torch.Tensor]:
    if norm.affine:
        found |= {"weight": norm.weight.grad, "bias": norm.bias.grad}
    found |= {"running_mean": norm.running_mean, "running_var": norm.running_var}
    return {name: tensor.detach() for name, tensor in found.items() if tensor is not None}


def as_it_is(kernel: object) -> object:
    """`launch`, for kernels that are not wrapped for a compiler: those cannot be compiled ahead, and are slow."""
    assert not is_wrap_triton_enabled(), kernel
    return launch(kernel)


def differences_alone(case: Case) -> float:
    """Of a process that exchanges nothing from a batch norm of its part, in output and gradient of the input."""
    found = []
    for synced in (True, False):
        norm, tensors = make(case)
        norm = nn.SyncBatchNorm.convert_sync_batchnorm(norm.float()) if synced else norm.float()
        x, grad = (tensors[n].float()[: SAMPLES[0]].contiguous(memory_format=LAYOUT[4]) for n in ("x", "grad"))
        x.requires_grad_()
        with without_exchange():
            out = norm_act(x, norm, case.activation) if synced else ACTIVATIONS[case.activation](norm(x))
            out.backward(grad)
        found.append((out.detach(), x.grad))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*found, strict=True))


def process(rank: int, port: int, folder: str) -> None:
    from nnunet_lgms.ops.triton import norm_act_kernels as kernels

    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=len(SAMPLES))
    with (
        as_on_gpu(),
        patch.object(kernels, "launch", as_it_is),
        patch.object(nn.SyncBatchNorm, "forward", side_effect=AssertionError("PyTorch's own was asked")),
    ):
        torch.save({name: part(case, rank) for name, case in CASES.items()}, f"{folder}/{rank}.pt")
        if rank == 0:  # while the other one does something else
            Path(folder, "alone").write_text(str(differences_alone(CASES["2d_silu"])))
    dist.destroy_process_group()


def differences(case: Case, parts: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Of everything from float64, relative to its largest number; parts are joined, sums of processes added."""
    found = {}
    for name, expected in reference(case).items():
        if name in ("out", "x", "residual"):
            actual = torch.cat([p[name] for p in parts])
        elif name in ("running_mean", "running_var"):
            actual = parts[0][name]
            assert torch.equal(actual, parts[1][name])
        else:
            actual = sum(p[name] for p in parts)
        found[name] = float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-3))
    return found


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    return run_interpreted(__file__)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_norm_as_one(interpreted, case):
    limit = 2e-3 if CASES[case].mean == 1000 else 2e-5
    assert {"out", "x", "running_mean", "running_var"} <= set(interpreted[case])
    assert max(interpreted[case].values()) < limit, interpreted[case]


@pytest.mark.slow
def test_a_process_that_exchanges_nothing_has_statistics_of_its_own(interpreted):
    assert interpreted["alone"]["largest"] < 2e-5


def main() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(process, (port, folder), nprocs=len(SAMPLES))
        parts = [torch.load(Path(folder, f"{rank}.pt")) for rank in range(len(SAMPLES))]
        alone = float(Path(folder, "alone").read_text())
    found = {name: differences(case, [p[name] for p in parts]) for name, case in CASES.items()}
    print(json.dumps({**found, "alone": {"largest": alone}}))


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(__file__))
    main()
