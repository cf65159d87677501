"""Cross entropy and Dice of the sums of a softmax: the kernels in Triton's interpreter, and compiled where there is a
GPU, against nnU-Net's loss in float64.

The interpreter must be chosen before Triton is imported, so one subprocess (this file run as a script) computes all
cases and prints what they gave.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple
from unittest.mock import MagicMock, patch

import pytest
import torch
from interpreter import run_interpreted
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import distributed as dist

from nnunet_lgms.nnunet.loss import CrossEntropyAndDice
from nnunet_lgms.ops import softmax_sums
from nnunet_lgms.ops.backend import KernelsSwitchedOff, as_on_gpu, kernels, set_kernels

LAYOUT = {4: torch.channels_last, 5: torch.channels_last_3d}
SCALE = 65536  # of the gradient scaler, at first
PROCESSES = 2


class Case(NamedTuple):
    """What a loss is computed of.

    Attributes:
        shape: of the logits; it is no multiple of what a program holds.
        last: whether their channels are innermost.
        ignore: whether there is an ignore label, which a part of the voxels has.
        spread: standard deviation of the logits, which are at most as large, or 60.
    """

    shape: tuple[int, ...]
    dtype: str = "float16"
    last: bool = True
    ignore: bool = False
    batch_dice: bool = False
    labels: str = "int16"
    spread: float = 2

    @property
    def ignore_label(self) -> int | None:
        return self.shape[1] if self.ignore else None


CASES = {
    "3d": Case((3, 3, 9, 11, 7)),
    "3d_contiguous": Case((1, 3, 9, 11, 7), last=False, ignore=True, labels="int64"),
    "3d_in_runs_of_16": Case((2, 3, 8, 12, 6), "float32", last=False, batch_dice=True),
    "2d": Case((3, 2, 37, 23), "float32", ignore=True, batch_dice=True, labels="float32"),
    "2d_contiguous": Case((1, 2, 37, 23), last=False, labels="uint8"),
    "14_classes": Case((1, 14, 9, 11, 7), ignore=True),
    "14_classes_contiguous": Case((3, 14, 9, 11), "float32", last=False, batch_dice=True),
    "105_classes": Case((3, 105, 3, 5, 7), "float32", ignore=True, batch_dice=True),
    "105_classes_contiguous": Case((1, 105, 9, 15), last=False, ignore=True),
    "bfloat16": Case((1, 4, 9, 11, 7), "bfloat16"),
    "large": Case((3, 3, 9, 11, 7), spread=60),
    "large_and_contiguous": Case((1, 14, 9, 11), spread=60, last=False, batch_dice=True),
    "without_an_exponential_in_float32": Case((2, 3, 9, 11, 7), spread=2000),
    "single_voxel": Case((3, 3, 1, 1), "float32"),
}


def make(case: Case, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and labels of which the last class has none, if there are more than two."""
    generator = torch.Generator().manual_seed(0)
    shape, classes = case.shape, case.shape[1]
    most = max(60, case.spread)
    logits = (case.spread * torch.randn(shape, generator=generator)).clamp(-most, most)
    labels = torch.randint(max(2, classes - 1), (shape[0], 1, *shape[2:]), generator=generator)
    if case.ignore:
        labels[torch.rand(labels.shape, generator=generator) < 0.3] = classes
    logits = logits.to(device, getattr(torch, case.dtype))
    if case.last:
        logits = logits.to(memory_format=LAYOUT[len(shape)])
    return logits, labels.to(device, getattr(torch, case.labels))


def loss_of(case: Case, ddp: bool = False) -> CrossEntropyAndDice:
    return CrossEntropyAndDice(case.batch_dice, ddp, case.ignore_label)


def by_kernels(loss, logits, labels) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and the gradient of its scaled value, where nnU-Net's way would be noticed."""
    logits = logits.detach().requires_grad_()
    forbidden = AssertionError("nnU-Net's own was asked")
    with as_on_gpu(), patch.object(DC_and_CE_loss, "forward", side_effect=forbidden):
        out = loss(logits, labels)
        (gradient,) = torch.autograd.grad(SCALE * out, logits)
    assert out.dtype == torch.float32 and out.shape == ()
    assert gradient.dtype == logits.dtype and gradient.stride() == logits.stride()
    return out.detach(), gradient


def by_nnunet(loss, logits, labels) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits.detach().double().requires_grad_()
    out = loss(logits, labels)
    (gradient,) = torch.autograd.grad(SCALE * out, logits)
    return out.detach(), gradient


def errors(loss, logits, labels) -> dict[str, float]:
    """Of the loss; of the gradient, relative to its norm; and the largest of one number, in units of its last place."""
    (out, gradient), (expected, of_expected) = (by(loss, logits, labels) for by in (by_kernels, by_nnunet))
    of_sums = 1e-6 * of_expected.abs().max()  # what nnU-Net sums in float32, also in a loss of float64
    unit = torch.finfo(gradient.dtype).eps * of_expected.abs() + torch.finfo(gradient.dtype).smallest_normal * 2e-3
    difference = (gradient.double() - of_expected).abs()
    return {
        "loss": ((out.double() - expected).abs() / expected.abs().clamp_min(1)).item(),
        "gradient": (difference.norm() / of_expected.norm().clamp_min(1e-30)).item(),
        "number": ((difference - of_sums).clamp_min(0) / unit).max().item(),
    }


def check(found: dict[str, float], dtype: str) -> None:
    assert found["loss"] < 1e-5
    assert found["gradient"] < {"float32": 1e-5, "float16": 5e-4, "bfloat16": 4e-3}[dtype]
    assert found["number"] < 1  # half of one, where nothing was lost


def repeated(case: Case, device: str) -> bool:
    first, second = (by_kernels(loss_of(case), *make(case, device)) for _ in range(2))
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def all_ignored(device: str) -> list[tuple[float, bool]]:
    """The loss, and whether a gradient is 0 everywhere: the kernels' and nnU-Net's."""
    case = CASES["3d_contiguous"]
    logits, labels = make(case, device)
    labels.fill_(case.ignore_label)
    found = [by(loss_of(case), logits, labels) for by in (by_kernels, by_nnunet)]
    return [(out.item(), not gradient.any().item()) for out, gradient in found]


def no_class(device: str) -> list[bool]:
    """Whether loss and gradient are told to be no numbers where a label is no class, above the last one or below 0."""
    found = []
    for label in (-1, 3, 4, 255):
        logits, labels = make(CASES["3d"], device)
        labels.view(-1)[17] = label
        out, gradient = by_kernels(loss_of(CASES["3d"]), logits, labels)
        found += [out.isnan().item(), gradient.isnan().any().item()]
    return found


def deep_supervision(device: str) -> dict[str, float]:
    """Errors of a loss over several outputs, by their gradients together."""
    cases = [Case((2, 3, 8, 7, 6)), Case((2, 3, 4, 4, 3)), Case((2, 3, 2, 2, 2))]
    loss = DeepSupervisionWrapper(loss_of(cases[0]), (0.7, 0.3, 0))
    logits, labels = zip(*(make(case, device) for case in cases))

    def flat(*parts):
        sizes = [t.numel() for t in logits]
        maps = [p.view(t.shape) for p, t in zip(parts[0].split(sizes), logits, strict=True)]
        return loss(maps, list(labels))

    together = torch.cat([t.contiguous().flatten() for t in logits])
    return errors(flat, together, None)


def inputs_are_kept(device: str) -> bool:
    """Whether the backward pass keeps nothing of the size of the logits but these."""
    case, kept = CASES["3d"], []
    logits, labels = make(case, device)
    with as_on_gpu(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss_of(case)(logits.requires_grad_(), labels)
    large = [t for t in kept if t.numel() > 200]
    return {t.data_ptr() for t in large} == {logits.data_ptr(), labels.data_ptr()}


def process(rank: int, port: int, folder: str) -> None:
    """One of several, each with samples of its own under one Dice over all."""
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=PROCESSES)
    case = CASES["2d"]
    logits, labels = make(case, "cpu")
    mine = slice(rank, rank + 1)
    logits *= 1 + rank
    found = errors(loss_of(case, ddp=True), logits[mine], labels[mine])
    alone = by_nnunet(loss_of(case), logits[mine], labels[mine])[0]
    shared = by_nnunet(loss_of(case, ddp=True), logits[mine], labels[mine])[0]
    Path(folder, str(rank)).write_text(json.dumps({**found, "exchanged": abs(alone - shared).item()}))
    dist.destroy_process_group()


def in_processes() -> list[dict[str, float]]:
    with socket.socket() as s, tempfile.TemporaryDirectory() as folder:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
        s.close()
        torch.multiprocessing.spawn(process, (port, folder), nprocs=PROCESSES)
        return [json.loads(Path(folder, str(rank)).read_text()) for rank in range(PROCESSES)]


# --- in the interpreter ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interpreted() -> dict:
    return run_interpreted(__file__)


@pytest.mark.parametrize("case", CASES)
def test_interpreted_loss_is_nnunets(interpreted, case):
    check(interpreted["cases"][case], CASES[case].dtype)


def test_results_repeat_bit_for_bit(interpreted):
    assert interpreted["repeated"]


def test_a_batch_without_any_label_costs_what_nnunet_says(interpreted):
    ours, theirs = interpreted["all_ignored"]
    assert ours == theirs == [-1, True]


def test_a_label_that_is_no_class_is_no_number(interpreted):
    assert all(interpreted["no_class"])


def test_deep_supervision_is_nnunets(interpreted):
    check(interpreted["deep_supervision"], "float16")


def test_nothing_but_logits_and_labels_is_kept(interpreted):
    assert interpreted["inputs_are_kept"]


def test_processes_share_the_sums_of_a_dice(interpreted):
    for found in interpreted["processes"]:
        assert found["exchanged"] > 1e-3
        check(found, CASES["2d"].dtype)


# --- where they do not run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype", "labels"),
    [
        ((2, 3, 4, 5), torch.float64, (2, 1, 4, 5)),
        ((2, 257, 4, 5), torch.float32, (2, 1, 4, 5)),
        ((2, 3, 4), torch.float32, (2, 1, 4)),
        ((2, 3, 4, 5), torch.float32, (2, 4, 5)),
        ((2, 3, 4, 5), torch.float32, (2, 3, 4, 5)),
        ((0, 3, 4, 5), torch.float32, (0, 1, 4, 5)),
    ],
)
def test_what_the_kernels_do_not_serve_is_left_to_others(shape, dtype, labels):
    pytest.importorskip("triton")
    with as_on_gpu():
        assert softmax_sums(torch.zeros(shape, dtype=dtype), torch.zeros(labels)) is None


def test_strides_of_other_maps_are_left_to_others():
    pytest.importorskip("triton")
    x = torch.zeros(2, 3, 4, 10)[..., ::2]
    with as_on_gpu():
        assert softmax_sums(x, torch.zeros(2, 1, 4, 5)) is None


@pytest.mark.parametrize("on", [True, False])
def test_kernels_run_where_they_are_switched_on(on):
    pytest.importorskip("triton")
    logits = torch.zeros(2, 3, 4, 5, device="meta")
    with as_on_gpu(), kernels("auto" if on else "off"):
        sums = softmax_sums(logits, torch.zeros(2, 1, 4, 5, device="meta"), 3)
    assert sums.shape == (2, 4, 3) if on else sums is None


def test_where_a_kernel_fails_there_are_no_sums(monkeypatch):
    """And the loss is nnU-Net's."""
    pytest.importorskip("triton")
    from nnunet_lgms.ops.triton import softmax_sums as registered

    failed = KernelsSwitchedOff("the Triton kernel _softmax_sums_forward_kernel failed")
    logits, labels = make(CASES["2d"], "cpu")
    on_card = MagicMock(spec=torch.Tensor, shape=logits.shape, is_cuda=True)
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: nullcontext())
    monkeypatch.setattr(registered, "fits", lambda *tensors: True)

    def fail(*arguments):
        set_kernels("off")
        raise failed

    monkeypatch.setattr(registered, "softmax_sums", fail)
    with kernels("auto"), as_on_gpu():
        assert softmax_sums(on_card, labels) is None


def test_a_cpu_s_loss_is_nnunets_own():
    case = CASES["2d"]
    dice = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}
    nnunets = DC_and_CE_loss(dice, {}, 0.5, 1, case.ignore_label, MemoryEfficientSoftDiceLoss)
    (out, gradient), (expected, of_expected) = (
        by_nnunet(loss, *make(case, "cpu")) for loss in (loss_of(case), nnunets)
    )
    assert torch.equal(out, expected) and torch.equal(gradient, of_expected)


# --- on a GPU --------------------------------------------------------------------------------------------------------

COMPILED = {
    **CASES,
    "slices": Case((2, 3, 64, 96, 64), ignore=True),
    "slices_contiguous": Case((2, 3, 64, 96, 64), last=False, batch_dice=True),
    "slices_of_14": Case((2, 14, 63, 65, 66)),
    "slices_of_105": Case((2, 105, 33, 35, 37), "bfloat16"),
    "slices_of_105_contiguous": Case((2, 105, 32, 32, 36), last=False, ignore=True),
    "256_classes": Case((1, 256, 31, 33)),
    "256_classes_contiguous": Case((1, 256, 31, 33), "float32", last=False),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", COMPILED)
def test_compiled_loss_is_nnunets(case):
    check(errors(loss_of(COMPILED[case]), *make(COMPILED[case], "cuda")), COMPILED[case].dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["slices", "slices_contiguous", "slices_of_105"])
def test_compiled_results_repeat_bit_for_bit(case):
    assert repeated(COMPILED[case], "cuda")


@pytest.mark.gpu
def test_what_is_special_on_the_gpu():
    assert all_ignored("cuda") == [(-1, True)] * 2
    assert all(no_class("cuda"))
    check(deep_supervision("cuda"), "float16")
    assert inputs_are_kept("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["3d", "14_classes_contiguous"])
def test_opcheck(case):
    from nnunet_lgms.ops.triton import softmax_sums as registered

    logits, labels = make(CASES[case], "cuda")
    arguments = (logits.requires_grad_(), labels, CASES[case].ignore_label)
    torch.library.opcheck(registered.softmax_sums, arguments, atol=1e-2, rtol=1e-2)


def main() -> None:
    from nnunet_lgms.ops.triton import softmax_sums as module

    torch.set_num_threads(1)
    with patch.multiple(module, WARPS=20, TILE=512):  # several steps of a slice, and several slices of a sample
        found = {name: errors(loss_of(case), *make(case, "cpu")) for name, case in CASES.items()}
        results = {
            "cases": found,
            "repeated": all(repeated(CASES[name], "cpu") for name in ("3d", "105_classes_contiguous")),
            "all_ignored": all_ignored("cpu"),
            "no_class": no_class("cpu"),
            "deep_supervision": deep_supervision("cpu"),
            "inputs_are_kept": inputs_are_kept("cpu"),
        }
    assert all(math.isfinite(e) for case in found.values() for e in case.values())
    print(json.dumps({**results, "processes": in_processes()}))


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(__file__))
    main()
