"""Python a step ahead of the GPU; on the CPU, streams are stand-ins and only the order of things is looked at."""

from __future__ import annotations

import copy
import pickle
import re
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.collate_outputs import collate_outputs
from tiny_trainer import make_batch, make_trainer

from nnunet_lgms.graphs.ahead import LossOfAStep, StepResult, copied_ahead
from nnunet_lgms.nnunet.errors import TrainingError
from nnunet_lgms.nnunet.graphed import MAX_STEPS_LEFT_OUT

N = 2**22  # numbers of a batch: its copy takes longer than a launch
ONE = torch.ones(())  # a norm of gradients
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

pytestmark = pytest.mark.usefixtures("nnunet_folders")


def make_numbers(i: int, device: str) -> dict:
    data = torch.full((N,), float(i))
    data = data.pin_memory() if device == "cuda" else data
    return {"data": data, "target": [data[: N // 2], data[:1]], "keys": [f"case_{i}"]}


def keep_busy(device: str) -> None:
    """For longer than a copy of `make_numbers` takes."""
    if device == "cuda":
        torch.cuda._sleep(1_000_000_000)  # half a second: Python may be kept waiting on a busy machine


@pytest.mark.parametrize("device", DEVICES)
def test_batches_come_whole(device):
    """Each is summed up by work that is queued behind longer work: its memory must not go to the next batch before."""
    sums = []
    for i in range(6):
        batch = copied_ahead(make_numbers(i, device), torch.device(device))
        assert batch["keys"] == [f"case_{i}"] and batch["data"].device.type == device
        keep_busy(device)
        sums.append(torch.stack([batch["data"].mean(), batch["target"][0].mean(), batch["target"][1][0]]))
        del batch
    assert torch.stack(sums).tolist() == [[i, i, i] for i in range(6)]


@pytest.mark.gpu
def test_copies_do_not_wait_for_what_the_gpu_computes():
    done = torch.cuda.Event()
    copied_ahead(make_numbers(0, "cuda"), torch.device("cuda"))  # memory and stream are there
    torch.cuda.synchronize()
    keep_busy("cuda")
    done.record()
    computing = torch.cuda.current_stream()
    with torch.cuda.stream(torch.cuda.Stream()) as _:
        batch = copied_ahead(make_numbers(1, "cuda"), torch.device("cuda"))
        assert batch["data"][-1].item() == 1  # waits for the copy
    assert not done.query()
    computing.synchronize()


@pytest.mark.parametrize("device", DEVICES)
def test_results_are_what_nnunet_collates(device):
    losses = torch.arange(5.0, device=device, requires_grad=True)
    keep_busy(device)
    results = [StepResult(loss=LossOfAStep(loss, ONE.to(device))) for loss in losses * 2]
    collated = collate_outputs(results)
    assert list(collated) == ["loss"] and collated["loss"].dtype == np.float32
    np.testing.assert_array_equal(collated["loss"], np.arange(0, 10, 2, dtype=np.float32)[:, None])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "read",
    [
        lambda result: result["loss"],
        lambda result: result.get("loss"),
        lambda result: dict(result)["loss"],
        lambda result: (result | {"more": 1})["loss"],
        lambda result: copy.deepcopy(result)["loss"],
        lambda result: pickle.loads(pickle.dumps(result))["loss"],
        lambda result: float(re.search(r"array\((\d)", repr(result)).group(1)),
        lambda result: result.copy().pop("loss"),
    ],
    ids=["item", "get", "dict", "or", "copy", "pickle", "repr", "pop"],
)
def test_whoever_reads_a_loss_waits_for_it(device, read):
    loss = torch.zeros((), device=device)
    LossOfAStep(loss.add_(0), ONE.to(device))  # loads kernels, which the GPU waits for
    keep_busy(device)
    loss.add_(3)
    arriving = LossOfAStep(loss, ONE.to(device))
    result = StepResult(loss=arriving)
    loss.fill_(5)  # as a graph does with the next step
    assert arriving._copied is None or not arriving._copied.query()
    assert read(result) == 3 and read(result) == 3


def test_what_is_written_into_a_result_stays():
    result = StepResult(loss=LossOfAStep(ONE, ONE))
    result["loss"], result["more"] = 42.0, 3
    assert dict(result) == {"loss": 42.0, "more": 3}


def ahead():
    """A trainer on the CPU that is a step ahead, as on a GPU."""
    trainer = make_trainer()
    trainer.steps_ahead = 1
    return trainer, make_batch(trainer)


def with_nan(batch: dict) -> dict:
    data = batch["data"].clone()
    data[1, 0, 3] = float("nan")
    return {"data": data, "target": batch["target"], "keys": ["case_0", "case_1"]}


def test_an_unreadable_image_is_named_a_step_later():
    trainer, batch = ahead()
    trainer.on_train_epoch_start()
    trainer.train_step(batch)
    trainer.train_step(with_nan(batch))
    with pytest.raises(TrainingError, match="The preprocessed image of case_1 holds NaN or infinity"):
        trainer.train_step(batch)


def test_an_epoch_ends_when_all_its_losses_were_looked_at():
    trainer, batch = ahead()
    trainer.on_train_epoch_start()
    results = [trainer.train_step(batch), trainer.train_step(with_nan(batch))]
    with pytest.raises(TrainingError, match="case_1 holds NaN or infinity"):
        trainer.on_train_epoch_end(results)
    assert not trainer.logger.get_value("train_losses", step=None)


def test_a_training_begins_with_nothing_of_the_one_before(monkeypatch):
    """Whose last step was not looked at, as the one before it ended it."""
    trainer, batch = ahead()
    trainer.on_train_epoch_start()
    trainer.train_step(with_nan(batch))
    with pytest.raises(TrainingError, match="case_1"):
        trainer.train_step(with_nan(batch))
    trainer.steps_left_out_in_a_row = MAX_STEPS_LEFT_OUT
    assert trainer.launched
    monkeypatch.setattr(nnUNetTrainer, "run_training", lambda self: None)
    trainer.run_training()
    assert not trainer.launched and trainer.steps_left_out_in_a_row == 0


def test_a_subclass_may_rename_what_a_step_gives():
    trainer, batch = ahead()
    trainer.on_train_epoch_start()
    for _ in range(3):
        result = trainer.train_step(batch)
        result["total"] = result.pop("loss")
    assert np.isfinite(result["total"])


def test_losses_are_those_of_a_trainer_that_waits():
    (trainer, batch), waits = ahead(), make_trainer()
    waits.network.load_state_dict(trainer.network.state_dict())
    losses = []
    for one in (trainer, waits):
        one.on_train_epoch_start()
        results = [one.train_step(batch) for _ in range(3)]
        assert len(one.launched) == one.steps_ahead
        one.on_train_epoch_end(results)
        assert not one.launched
        losses.append(one.logger.get_value("train_losses", step=0))
    assert losses[0] == losses[1]


def test_copies_have_their_own_stream(monkeypatch):
    """What the CPU can show of it: the computing stream waits for the copies, and memory is kept for it."""
    said = []
    stream = SimpleNamespace(
        wait_stream=lambda other: said.append(("waits for", other)), device=torch.device("cuda", 7)
    )
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "copying")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: said.append(("in", stream)) or nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: said.append(("keeps", tensor.numel())))
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, non_blocking: tensor)
    copied_ahead((torch.zeros(2), [torch.zeros(3)]), torch.device("cuda", 7))
    assert said == [("in", "copying"), ("waits for", "copying"), ("keeps", 2), ("keeps", 3)]
