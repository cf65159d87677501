"""Batches that are fetched ahead; on the CPU, streams are stand-ins and only the order of things is looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from test_trainer import make_trainer

from nnunet_lgms.nnunet.loading import LoadedAhead

N = 2**22  # numbers of a batch: its copy takes longer than a launch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch) -> torch.device:
    if request.param == "cpu":
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(wait_stream=lambda s: None))
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    return torch.device(request.param)


def batches(n: int, asked: list[int], device: torch.device) -> Iterator[dict]:
    for i in range(n):
        asked.append(i)
        data = torch.full((N,), float(i))
        data = data.pin_memory() if device.type == "cuda" else data
        yield {"data": data, "target": [data[: N // 2], data[:1]], "keys": [f"case_{i}"]}


def test_batches_come_in_order_and_whole(device):
    """Each is summed up by work that is queued behind longer work: its memory must not go to the next batch before."""
    asked = []
    loader = LoadedAhead(batches(6, asked, device), device)
    size = 4096 if device.type == "cuda" else 16
    matrix, sums = torch.randn(size, size, device=device), []
    for i in range(6):
        batch = next(loader)
        assert batch["keys"] == [f"case_{i}"] and batch["data"].device.type == device.type
        for _ in range(10):
            matrix = (matrix @ matrix).clamp(-1, 1)
        sums.append(torch.stack([batch["data"].mean(), batch["target"][0].mean(), batch["target"][1][0]]))
        if i < 5:
            loader.fetch()
            loader.fetch("what a hook is called with")
            assert asked[-1] == i + 1
        del batch
    assert torch.stack(sums).tolist() == [[i, i, i] for i in range(6)]
    assert asked == list(range(6)) and loader.waited > 0


def test_without_fetching_it_is_the_loader(device):
    keys = [batch["keys"] for batch in LoadedAhead(batches(3, [], device), device)]
    assert keys == [["case_0"], ["case_1"], ["case_2"]]


def test_an_error_comes_when_the_batch_is_asked_for(device):
    """And not in the step before, which has its batch."""

    def broken():
        yield from batches(1, [], device)
        raise RuntimeError("no longer alive")

    loader = LoadedAhead(broken(), device)
    next(loader)
    loader.fetch()
    loader.fetch()
    with pytest.raises(RuntimeError, match="no longer alive"):
        next(loader)
    with pytest.raises(StopIteration):  # as a generator that failed
        next(loader)


def test_the_rest_is_the_loaders(device):
    ended = []
    loader = SimpleNamespace(_finish=lambda: ended.append(True), generator="its own")
    ahead = LoadedAhead(loader, device)
    ahead._finish()
    assert ended and ahead.generator == "its own" and not hasattr(ahead, "what it has not")


def test_a_training_that_ended_fetches_no_more(device, tmp_path, monkeypatch):
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))
    trainer, asked = make_trainer(), []
    loader = batches(9, asked, device)
    trainer.dataloader_train = LoadedAhead(loader, device)
    trainer.fetching = trainer.optimizer.register_step_post_hook(trainer.dataloader_train.fetch)
    trainer.optimizer.step()
    trainer.optimizer.step()
    assert asked == [0]
    for _ in range(2):  # once is enough
        trainer._fetch_no_more()
        next(trainer.dataloader_train)
        trainer.optimizer.step()
        assert trainer.dataloader_train is loader
    assert asked == [0, 1, 2]
