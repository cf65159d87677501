"""Batches that are fetched ahead, on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nnunet_lgms.nnunet.loading import LoadedAhead

pytestmark = pytest.mark.gpu
N = 2**22  # numbers of a batch: its copy takes longer than a launch


def batches(n: int, asked: list[int]) -> Iterator[dict]:
    for i in range(n):
        asked.append(i)
        data = torch.full((N,), float(i)).pin_memory()
        yield {"data": data, "target": [data[: N // 2], data[:1]], "keys": [f"case_{i}"]}


def test_batches_come_in_order_and_whole():
    """Each is summed up by work that is queued behind longer work: its memory must not go to the next batch before."""
    device, asked = torch.device("cuda"), []
    loader = LoadedAhead(batches(6, asked), device)
    matrix, sums = torch.randn(4096, 4096, device=device), []
    for i in range(6):
        batch = next(loader)
        assert batch["keys"] == [f"case_{i}"] and batch["data"].is_cuda
        for _ in range(10):
            matrix = (matrix @ matrix).clamp(-1, 1)
        sums.append(torch.stack([batch["data"].mean(), batch["target"][0].mean(), batch["target"][1][0]]))
        if i < 5:
            loader.fetch()
            loader.fetch("what a hook is called with")
        del batch
    assert torch.stack(sums).tolist() == [[i, i, i] for i in range(6)]
    assert asked == list(range(6)) and loader.waited > 0
    with pytest.raises(StopIteration):
        next(loader)


def test_without_fetching_it_is_the_loader():
    asked = []
    assert [batch["keys"] for batch in LoadedAhead(batches(3, asked), torch.device("cuda"))] == [
        ["case_0"],
        ["case_1"],
        ["case_2"],
    ]
