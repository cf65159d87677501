"""Numbers that go wrong: what the network makes of hostile images, and what stops a training that is lost."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hostile import RunsCode
from networks import tiny_network
from tiny_trainer import make_batch, make_trainer

from nnunet_lgms.checkpoint import read_checkpoint
from nnunet_lgms.graphs.optimizer import FusedSGD
from nnunet_lgms.graphs.update import update_weights
from nnunet_lgms.nnunet.errors import TrainingError
from nnunet_lgms.nnunet.graphed import MAX_STEPS_LEFT_OUT
from nnunet_lgms.nnunet.loss import cross_entropy_and_dice
from nnunet_lgms.planning.memory import label_manager
from nnunet_lgms.study.steps import _training_record

# Four levels, none of them 2 deep: oneDNN 3.12 leaves a bfloat16 weight gradient uninitialised where a map that deep
# meets a 3x3x3 kernel (torch 2.13 on a CPU with AVX-512). nnU-Net trains in float32 on a CPU.
SIZE = {2: (32, 32), 3: (24, 16, 16)}

pytestmark = pytest.mark.usefixtures("nnunet_folders")


def one_voxel(target: torch.Tensor) -> torch.Tensor:
    target[(0, 0, *(n // 2 for n in target.shape[2:]))] = 1
    return target


IMAGES = {
    "constant": torch.ones_like,
    "zero": torch.zeros_like,
    "1e4": lambda noise: 1e4 * noise,
    "-1e4, constant": lambda noise: torch.full_like(noise, -1e4),
    "one bright voxel": lambda noise: one_voxel(torch.zeros_like(noise)) * 1e4,
    "tiny": lambda noise: 1e-30 * noise,
}
TARGETS = {
    "background": lambda target: target,
    "one voxel": one_voxel,
    "foreground": lambda target: target + 1,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("image", IMAGES)
def test_hostile_images_and_labels_give_finite_steps(image, dim, dtype):
    """Two steps of nnU-Net's kind: the loss is finite, and so are the weights, whatever the image did to gradients.

    On a map that is almost constant every instance norm multiplies a gradient by up to 1 / sqrt(eps) = 316. After
    twenty of them it may overflow, which of the images depends on the order of sums, and the step is left out.
    """
    torch.manual_seed(0)
    x = IMAGES[image](torch.randn(2, 1, *SIZE[dim]))
    for name, batch_dice in (("background", False), ("background", True), ("one voxel", False), ("foreground", True)):
        target = TARGETS[name](torch.zeros(2, 1, *SIZE[dim], dtype=torch.int16))
        network = tiny_network(dim, n_stages=4)
        loss_function = cross_entropy_and_dice(label_manager(2), batch_dice, ddp=False)
        optimizer = FusedSGD(network.parameters(), 0.02, momentum=0.9, weight_decay=1e-4)
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
                output = network(x)
            loss = loss_function(output.float(), target)
            loss.backward()
            update_weights(network, optimizer)
            assert loss.isfinite(), name
            assert all(p.isfinite().all() for p in network.parameters()), name
        with torch.inference_mode():
            assert network.eval()(x).isfinite().all(), name


# --- the trainer stops instead of losing a run -----------------------------------------------------------------------


@pytest.mark.parametrize("patch_size", [(16, 16), (8, 12, 8)], ids=["2D", "3D"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", ["train_step", "validation_step"])
def test_an_image_that_is_not_finite_is_named(step, value, patch_size):
    trainer = make_trainer(patch_size=patch_size)
    batch = make_batch(trainer)
    batch["keys"] = [f"case_{i}" for i in range(len(batch["data"]))]
    getattr(trainer, step)(batch)
    batch["data"][(1, 0, *(0 for _ in patch_size))] = value
    with pytest.raises(TrainingError) as error:
        getattr(trainer, step)(batch)
    assert "The preprocessed image of case_1 holds NaN or infinity" in str(error.value)
    assert "\n" not in str(error.value) and "--c" in str(error.value)


def break_network(trainer) -> None:
    with torch.no_grad():
        next(trainer.network.parameters()).fill_(float("nan"))


def test_a_training_that_diverged_stops():
    trainer = make_trainer()
    batch = make_batch(trainer)
    trainer.train_step(batch)
    break_network(trainer)
    with pytest.raises(TrainingError, match="The loss is nan in epoch 0, for images that are finite"):
        trainer.train_step(batch)


@pytest.mark.slow
def test_float16_may_skip_some_steps_but_not_all():
    """The scaler keeps the weights through steps that overflow, so a few of them are no reason to stop."""
    trainer = make_trainer()
    trainer.grad_scaler = torch.amp.GradScaler("cpu")
    batch = make_batch(trainer)
    whole = {key: value.clone() for key, value in trainer.network.state_dict().items()}
    break_network(trainer)
    for _ in range(MAX_STEPS_LEFT_OUT - 1):
        assert np.isnan(trainer.train_step(batch)["loss"])
    trainer.network.load_state_dict(whole)
    assert np.isfinite(trainer.train_step(batch)["loss"])
    break_network(trainer)
    for _ in range(MAX_STEPS_LEFT_OUT - 1):
        trainer.train_step(batch)
    with pytest.raises(TrainingError, match="the training diverged"):
        trainer.train_step(batch)


def overflow(trainer, steps: set[int]) -> None:
    """Gradients of the given steps, counted from now, become infinite; losses stay as they are."""
    calls = iter(range(10**6))

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * (float("inf") if next(calls) in steps else 1.0)

    next(trainer.network.parameters()).register_hook(hook)


def state(trainer) -> list[torch.Tensor]:
    momentum = (s["momentum_buffer"] for s in trainer.optimizer.state.values())
    return [t.detach().clone() for t in (*trainer.network.parameters(), *momentum)]


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("scaled", [False, True], ids=["float32", "scaled"])
def test_a_step_without_finite_gradients_is_left_out_counted_and_said(scaled, ahead, capsys):
    trainer = make_trainer(patch_size=(16, 16))
    trainer.grad_scaler = torch.amp.GradScaler("cpu") if scaled else None
    trainer.steps_ahead, trainer.num_iterations_per_epoch = ahead, 5
    batch = make_batch(trainer)
    overflow(trainer, {1, 3})
    trainer.on_train_epoch_start()
    results, states = [], [state(trainer)]
    for _ in range(5):
        results.append(trainer.train_step(batch))
        states.append(state(trainer))
    stayed = [all(map(torch.equal, a, b)) for a, b in zip(states, states[1:], strict=False)]
    assert stayed == [False, True, False, True, False]
    trainer.on_train_epoch_end(results)
    sentence = "2 of 5 steps were left out: their gradients were not finite."
    assert capsys.readouterr().out.count(sentence) == 1
    trainer.current_epoch += 1
    trainer.on_train_epoch_start()
    trainer.on_train_epoch_end([trainer.train_step(batch)])
    assert "left out" not in capsys.readouterr().out


def test_a_training_of_which_no_step_can_be_taken_stops():
    trainer = make_trainer(patch_size=(16, 16))
    batch, before = make_batch(trainer), state(trainer)
    overflow(trainer, set(range(MAX_STEPS_LEFT_OUT)))
    trainer.on_train_epoch_start()
    for _ in range(MAX_STEPS_LEFT_OUT - 1):
        trainer.train_step(batch)
    with pytest.raises(TrainingError, match="The gradients are not finite in epoch 0, 20 steps in a row.*diverged"):
        trainer.train_step(batch)
    assert all(map(torch.equal, before, state(trainer)))


# --- checkpoints of others -------------------------------------------------------------------------------------------


def trained(tmp_path):
    """A trainer after a step, with all that nnU-Net's log holds after an epoch, and its checkpoint."""
    trainer = make_trainer()
    trainer.was_initialized = True
    loss = trainer.train_step(make_batch(trainer))["loss"]
    trainer.logger.log("train_losses", loss, 0)
    trainer.logger.log("dice_per_class_or_region", [np.float32(0.5)], 0)
    trainer.logger.log("ema_fg_dice", np.float64(0.5), 0)
    trainer._best_ema = np.float64(0.5)
    path = tmp_path / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(path))
    return trainer, path


def test_what_the_trainer_saves_is_read_without_running_code(tmp_path):
    trainer, path = trained(tmp_path)
    content = read_checkpoint(path)
    assert content["trainer_name"] == "nnUNetTrainerLGMSNet" and content["_best_ema"] == 0.5
    assert content["init_args"]["device"] == torch.device("cpu")
    trainer.current_epoch = 7
    trainer.load_checkpoint(str(path))
    assert trainer.current_epoch == 1


def test_the_trainer_runs_no_code_of_a_checkpoint(tmp_path):
    trainer, path = trained(tmp_path)
    content = torch.load(path, weights_only=False)
    torch.save({**content, "x": RunsCode(tmp_path / "made")}, path)
    with pytest.raises(TrainingError, match="mkdir.*would run code when loaded: it is not opened"):
        trainer.load_checkpoint(str(path))
    assert not os.path.exists(tmp_path / "made")


def test_a_study_runs_no_code_of_a_checkpoint(tmp_path):
    trainer, path = trained(tmp_path)
    for key in ("epoch_start_timestamps", "epoch_end_timestamps", "val_losses"):
        trainer.logger.log(key, 2.0, 0)
    trainer.save_checkpoint(str(path))
    record = _training_record(path, "cpu")
    assert record["epochs"] == 1 and record["ema_fg_dice"] == [0.5] and record["val_losses"] == [2.0]
    torch.save({**torch.load(path, weights_only=False), "x": RunsCode(tmp_path / "made")}, path)
    with pytest.raises(ValueError, match="would run code when loaded"):
        _training_record(path, "cpu")
    assert not os.path.exists(tmp_path / "made")
