"""The trainers without any training command: what nnU-Net finds, calls and expects back."""

from __future__ import annotations

import copy
import inspect
import os
import runpy
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny_plans import LABELS, REGIONS, configuration, dataset_json, plans
from tiny_trainer import EPOCHS, IN_TRAINERS, NAMES, TRAINERS, make_batch, make_trainer

from nnunet_lgms.architecture.lgmsnet import LGMSNet
from nnunet_lgms.graphs import compilation
from nnunet_lgms.graphs.optimizer import FusedSGD
from nnunet_lgms.graphs.update import RecordedUpdate
from nnunet_lgms.nnunet import graphed, robust
from nnunet_lgms.nnunet import trainer as trainers
from nnunet_lgms.nnunet.augmentation import patch_to_turn, rotation_axes, rotations_and_flips, said_of_rotations
from nnunet_lgms.nnunet.loss import (
    cross_entropy_and_dice,
    deep_supervision_weights,
)
from nnunet_lgms.ops.backend import KernelsSwitchedOff

PATCH = {2: [16, 16], 3: [8, 12, 8]}

pytestmark = pytest.mark.usefixtures("nnunet_folders")


# --- found and called by nnU-Net ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_stock_finder_finds_every_trainer(clean_env):
    code = f"""
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
import nnunet_lgms, sys
assert nnunet_lgms.__file__ == {str(ROOT / "nnunet_lgms" / "__init__.py")!r}, nnunet_lgms.__file__  # the checkout's
for name in {[IN_TRAINERS[0], *IN_TRAINERS[2:4]]}:
    found = find(name)
    assert found.__name__ == name, found
    assert found.__module__ in ("nnunet_lgms.nnunet.trainer", "nnunet_lgms.nnunet.smoke"), found.__module__
    assert sys.modules[found.__module__].__dict__[name] is found  # pickling looks it up there
"""
    env = {**clean_env, "nnUNet_extTrainer": str(ROOT / "trainers"), "PYTHONPATH": _search_path()}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert {name for name in runpy.run_path(ROOT / "trainers" / "lgmsnet.py")["__all__"]} == set(IN_TRAINERS)


def _search_path() -> str:
    import os

    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["__init__", "build_network_architecture"])
def test_signatures_are_nnunets(name, method):
    assert inspect.signature(getattr(TRAINERS[name], method)) == inspect.signature(getattr(nnUNetTrainer, method))


@pytest.mark.parametrize("name", NAMES)
def test_every_override_takes_the_same_arguments(name):
    trainer = TRAINERS[name]
    for attribute, stock in vars(nnUNetTrainer).items():
        if inspect.isroutine(stock) and not attribute.startswith("__"):
            ours = inspect.getattr_static(trainer, attribute)
            assert isinstance(ours, staticmethod) == isinstance(stock, staticmethod), attribute
            ours, stock = (inspect.signature(getattr(owner, attribute)) for owner in (trainer, nnUNetTrainer))
            assert list(ours.parameters) == list(stock.parameters), attribute


@pytest.mark.parametrize("name", NAMES)
def test_init_arguments_go_into_the_checkpoint(name):
    trainer = make_trainer(name)
    assert set(trainer.my_init_kwargs) == {"plans", "configuration", "fold", "dataset_json", "device"}
    assert trainer.my_init_kwargs["configuration"] == "only"


# --- recipe --------------------------------------------------------------------------------------------------------


def test_recipe_is_the_papers():
    trainer = make_trainer()
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch) == (500, 250)
    (group,) = trainer.optimizer.param_groups
    assert isinstance(trainer.optimizer, torch.optim.SGD)
    assert (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]) == (0.02, 0.9, 1e-4, False)
    assert trainer.batch_size == 2  # the plan's
    assert [make_trainer(f"nnUNetTrainerLGMSNet_{n}epochs").num_epochs for n in EPOCHS] == list(EPOCHS)
    assert make_trainer("nnUNetTrainerLGMSNet_nnUNetDA").num_epochs == 500


def test_the_recipe_of_the_3d_script():
    trainer = make_trainer("nnUNetTrainerLGMSNet_paper3D")
    (group,) = trainer.optimizer.param_groups
    assert isinstance(trainer.optimizer, torch.optim.AdamW) and group["weight_decay"] == 1e-5
    rates = []
    for epoch in (0, 5, 10, 255, 500):
        trainer.lr_scheduler.step(epoch)
        rates.append(group["lr"])
    np.testing.assert_allclose(rates, [1e-5, 5.05e-4, 1e-3, 5e-4, 0], atol=1e-12)
    np.random.seed(0), torch.manual_seed(0)
    transform = trainer.get_training_transforms((3, 3), (), None, (0,), False)
    image = torch.arange(9.0).reshape(1, 3, 3)
    flipped = [not torch.equal(transform(image=image)["image"], image) for _ in range(500)]
    assert 0.14 < np.mean(flipped) < 0.26
    transform = trainer.get_training_transforms((3, 3), (0, 1), None, None, False)
    turned = [not torch.equal(transform(image=image)["image"], image) for _ in range(500)]
    assert 0.14 < np.mean(turned) < 0.26


@pytest.mark.parametrize("name", ["nnUNetTrainerLGMSNet_paper2D", "nnUNetTrainerLGMSNet_paper3D"])
def test_an_epoch_of_the_paper_is_one_pass(name, monkeypatch):
    def datasets(self):
        return tuple(SimpleNamespace(identifiers=list(range(n))) for n in (485, 162))

    monkeypatch.setattr(robust.RobustTrainer, "get_tr_and_val_datasets", datasets)
    trainer = make_trainer(name, batch_size=16)
    trainer.get_tr_and_val_datasets()
    assert (trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch) == (31, 11)
    assert trainer.num_epochs * trainer.num_iterations_per_epoch == 15_500


def test_demo_fits_two_cores():
    trainer = make_trainer("nnUNetTrainerLGMSNet_demo")
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    assert trainer.batch_size == 1 and trainer.num_epochs * trainer.num_iterations_per_epoch == 400
    image = torch.randn(1, 8, 12, 8)
    rotation, dummy_2d, patch, mirror = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    transform = trainer.get_training_transforms(patch, rotation, None, mirror, dummy_2d)
    sample = transform(image=image.clone(), segmentation=torch.zeros(1, 8, 12, 8))
    assert torch.equal(sample["image"], image)
    assert trainer.inference_allowed_mirroring_axes is None  # and none at prediction


def test_rate_decays_every_iteration():
    trainer = make_trainer()
    trainer.num_epochs, trainer.num_iterations_per_epoch = 3, 4
    trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers()
    batch = make_batch(trainer)
    rates = []
    for trainer.current_epoch in range(3):
        trainer.on_train_epoch_start()
        for _ in range(4):
            trainer.train_step(batch)
            rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.on_train_epoch_end([{"loss": np.zeros(1)}])
    np.testing.assert_allclose(rates, [0.02 * (1 - i / 12) ** 0.9 for i in range(12)], rtol=1e-12)


def test_rate_of_a_continued_training_goes_on():
    """A new process knows the epoch alone; its first rate is that of an uninterrupted training."""
    trainer = make_trainer()
    trainer.num_epochs, trainer.num_iterations_per_epoch = 4, 5
    trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers()
    trainer.current_epoch = 2
    trainer.on_train_epoch_start()
    trainer.train_step(make_batch(trainer))
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.02 * 0.5**0.9)


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(("LGMSNet", "DA", "smoke", "3D", "demo"))])
@pytest.mark.parametrize("labels", [LABELS, REGIONS], ids=["labels", "regions"])
@pytest.mark.parametrize("dim", [2, 3])
def test_steps_on_one_batch_lower_its_loss(name, labels, dim):
    """Of every recipe; the others differ in their epochs alone."""
    torch.manual_seed(0)
    trainer = make_trainer(name, labels, patch_size=PATCH[dim])
    batch = make_batch(trainer)
    trainer.on_train_epoch_start()
    losses = [float(trainer.train_step(batch)["loss"]) for _ in range(8)]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    trainer.on_validation_epoch_start()
    with torch.no_grad():
        outputs = trainer.validation_step(copy.deepcopy(batch))
    assert len(outputs["tp_hard"]) == 2  # foreground labels or regions


# --- loss ----------------------------------------------------------------------------------------------------------


def soft_dice(probabilities, onehot, mask, axes):
    overlap = (probabilities * onehot * mask).sum(axes)
    size = ((probabilities + onehot) * mask).sum(axes)
    return ((2 * overlap + 1e-5) / (size + 1e-5)).mean()


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("ignore", [False, True])
def test_loss_of_labels(batch_dice, ignore):
    labels = {**LABELS, "ignore": 3} if ignore else LABELS
    logits = torch.randn(2, 3, 4, 5, 6)
    target = torch.randint(0, 4 if ignore else 3, (2, 1, 4, 5, 6))
    loss = make_trainer(labels=labels, batch_dice=batch_dice).loss(logits, target)

    mask = target != 3
    probabilities = logits.softmax(1)
    onehot = torch.stack([(target[:, 0] == c).float() for c in range(3)], dim=1)
    cross_entropy = -(probabilities.log() * onehot).sum(1, keepdim=True)[mask].mean()
    axes = (0, 2, 3, 4) if batch_dice else (2, 3, 4)
    dice = soft_dice(probabilities[:, 1:], onehot[:, 1:], mask, axes)  # the background takes no part
    torch.testing.assert_close(loss, 0.5 * cross_entropy - dice)


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("ignore", [False, True])
def test_loss_of_regions(batch_dice, ignore):
    labels = {**REGIONS, "ignore": 3} if ignore else REGIONS
    logits = torch.randn(2, 2, 4, 5, 6)
    target = torch.randint(0, 2, (2, 3 if ignore else 2, 4, 5, 6)).bool()
    loss = make_trainer(labels=labels, batch_dice=batch_dice).loss(logits, target if ignore else target.float())

    mask = ~target[:, 2:] if ignore else torch.ones(2, 1, 4, 5, 6, dtype=torch.bool)
    probabilities, onehot = logits.sigmoid(), target[:, :2].float()
    cross_entropy = -(onehot * probabilities.log() + (1 - onehot) * (1 - probabilities).log())
    cross_entropy = cross_entropy[mask.expand_as(cross_entropy)].mean()
    axes = (0, 2, 3, 4) if batch_dice else (2, 3, 4)
    dice = soft_dice(probabilities, onehot, mask, axes)
    torch.testing.assert_close(loss, 0.5 * cross_entropy - dice)


@pytest.mark.parametrize("labels", [LABELS, REGIONS], ids=["labels", "regions"])
def test_an_ignore_label_that_no_voxel_has_changes_nothing(labels):
    logits = torch.randn(2, 3 if labels is LABELS else 2, 4, 5, 6)
    if labels is LABELS:
        target = with_ignore = torch.randint(0, 3, (2, 1, 4, 5, 6))
    else:
        target = torch.randint(0, 2, (2, 2, 4, 5, 6)).bool()
        with_ignore = torch.cat((target, torch.zeros(2, 1, 4, 5, 6, dtype=torch.bool)), dim=1)
    losses = []
    for given, of in ((labels, target), ({**labels, "ignore": 3}, with_ignore)):
        manager = PlansManager(plans()).get_label_manager(dataset_json(given))
        of = of if "ignore" in given else of.float()
        losses.append(cross_entropy_and_dice(manager, batch_dice=False, ddp=False)(logits, of))
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("labels", [LABELS, REGIONS], ids=["labels", "regions"])
def test_perfect_prediction_costs_minus_one(labels):
    manager = PlansManager(plans()).get_label_manager(dataset_json(labels))
    loss = cross_entropy_and_dice(manager, batch_dice=False, ddp=False)
    segmentation = torch.zeros(1, 1, 4, 4, 4)
    segmentation[..., 1:3] = 1
    segmentation[..., 3] = 2
    if labels is LABELS:
        target, truth = segmentation, torch.cat([segmentation == c for c in range(3)], dim=1)
    else:
        target = truth = torch.cat((segmentation > 0, segmentation == 2), dim=1).float()
    torch.testing.assert_close(loss(200 * truth.float() - 100, target), torch.tensor(-1.0))


@pytest.mark.parametrize("labels", [LABELS, REGIONS], ids=["labels", "regions"])
@pytest.mark.parametrize("supervised", [False, True])
def test_dice_is_compiled_where_the_network_is(labels, supervised, monkeypatch):
    trainer = make_trainer(labels=labels, lgmsnet={"deep_supervision": supervised})
    wrapped = []
    monkeypatch.setattr(torch, "compile", lambda module: wrapped.append(module) or module)
    for compiled in (False, True):
        monkeypatch.setattr(trainer, "_do_i_compile", lambda: compiled)  # noqa: B023
        loss = trainer._build_loss()
        own = loss.loss if supervised else loss
        assert isinstance(loss, DeepSupervisionWrapper) == supervised
        assert wrapped == ([own.dc] if compiled else [])


# --- deep supervision ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_stages", [2, 3, 5, 7])
@pytest.mark.parametrize("dim", [2, 3])
def test_outputs_match_targets_and_weights(n_stages, dim):
    patch = [16] * dim
    strides = [[1] * dim] + [[2] * dim] * 2 + [[1] * (dim - 1) + [2]] * 2 + [[2] + [1] * (dim - 1)] * 2
    more = {"strides": strides[:n_stages], "lgmsnet": {"deep_supervision": True}}
    trainer = make_trainer(patch_size=patch, **more)
    assert trainer.enable_deep_supervision
    batch = make_batch(trainer)
    outputs = trainer.network(batch["data"])
    assert isinstance(trainer.loss, DeepSupervisionWrapper)
    assert len(outputs) == len(batch["target"]) == len(trainer.loss.weight_factors) == n_stages - 1
    assert [o.shape[2:] for o in outputs] == [t.shape[2:] for t in batch["target"]]
    assert np.isfinite(float(trainer.train_step(batch)["loss"]))


def test_no_deep_supervision_unless_the_plan_asks():
    trainer = make_trainer()
    assert not trainer.enable_deep_supervision and trainer._get_deep_supervision_scales() is None
    batch = make_batch(trainer)
    assert trainer.network(batch["data"]).shape == (2, 3, 8, 12, 8)
    # perform_actual_validation ends with set_deep_supervision_enabled(True)
    trainer.set_deep_supervision_enabled(True)
    assert not trainer.network.decoder.deep_supervision


def test_deep_supervision_is_switched_where_it_is_on():
    trainer = make_trainer(lgmsnet={"deep_supervision": True})
    trainer.set_deep_supervision_enabled(False)
    assert isinstance(trainer.network(torch.zeros(1, 1, 8, 12, 8)), torch.Tensor)
    trainer.set_deep_supervision_enabled(True)
    assert len(trainer.network(torch.zeros(1, 1, 8, 12, 8))) == 2


def test_deep_supervision_weights():
    np.testing.assert_allclose(deep_supervision_weights(4), np.array([4, 2, 1, 0]) / 7)
    np.testing.assert_allclose(deep_supervision_weights(1), [1])
    weights = deep_supervision_weights(3, every_head_needs_gradient=True)
    assert 0 < weights[-1] < 1e-5 and weights.sum() == pytest.approx(1)
    np.testing.assert_allclose(deep_supervision_weights(1, every_head_needs_gradient=True), [1])


@pytest.mark.parametrize("trained_with", [False, True])
def test_weights_load_strictly_at_prediction(trained_with):
    trainer = make_trainer(lgmsnet={"deep_supervision": trained_with})
    predicting = trainer.build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 1, 3, enable_deep_supervision=False
    )
    assert isinstance(predicting, LGMSNet)
    predicting.load_state_dict(trainer.network.state_dict(), strict=True)
    x = torch.randn(1, 1, 8, 12, 8)
    trainer.set_deep_supervision_enabled(False)
    torch.testing.assert_close(predicting.eval()(x), trainer.network.eval()(x), rtol=0, atol=0)


# --- augmentation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patch_size", "spacing", "expected"),
    [
        ([256, 256], [1, 1], (0, 1)),
        ([512, 448], [0.5, 0.5], (0, 1)),
        ([512, 200], [0.5, 0.5], ()),  # a turn would leave more than half of it empty
        ([128, 128, 128], [1, 1, 1], (0, 1, 2)),
        ([40, 56, 40], [1, 1, 1], (0, 1, 2)),
        ([40, 100, 60], [1, 1, 1], (0, 2)),
        ([20, 320, 320], [3.0, 0.7, 0.7], (1, 2)),
        ([20, 320, 256], [3.0, 0.7, 0.7], (1, 2)),
        ([96, 96, 96], [2.0, 1.5, 1.5], (1, 2)),  # equal lengths, but the anatomy would be stretched
        ([64, 64], [3.0, 0.7], ()),
        ([256, 256], [999, 1, 1], (0, 1)),  # 2D data with the spacing of three axes
    ],
)
def test_axes_that_may_rotate(patch_size, spacing, expected):
    assert rotation_axes(patch_size, spacing) == expected


@pytest.mark.parametrize("patch_size", [(5, 5), (4, 5), (5, 5, 5), (5, 6, 5), (4, 5, 6)])
def test_image_and_labels_turn_together(patch_size):
    """Every voxel has its own number; what comes out is a rotation or flip of it, in the allowed planes only."""
    torch.manual_seed(0)
    np.random.seed(0)
    dim = len(patch_size)
    axes = rotation_axes(patch_size, [1] * dim)
    taken = patch_to_turn(patch_size, axes)
    transform = rotations_and_flips(axes, range(dim), None, patch_size=patch_size)
    numbered = torch.arange(np.prod(taken)).reshape(1, *taken)
    begin = [(n - p) // 2 for n, p in zip(taken, patch_size, strict=True)]
    middle = (slice(None), *(slice(b, b + p) for b, p in zip(begin, patch_size, strict=True)))
    allowed = {
        tuple(turned.flatten().tolist())
        for turned in rotations(numbered, axes)
        for turned in flips(turned[middle], range(1, dim + 1))
    }
    seen = set()
    for _ in range(500):
        sample = transform(image=numbered.float(), segmentation=numbered.short())
        assert sample["image"].shape == sample["segmentation"].shape == (1, *patch_size)
        assert torch.equal(sample["image"].short(), sample["segmentation"])
        seen.add(tuple(sample["image"].long().flatten().tolist()))
    assert seen <= allowed
    assert len(seen) > 0.8 * len(allowed)


def test_square_patches_turn_as_ever():
    """Nothing is cut, and no other random number is drawn."""
    samples = []
    for patch_size in (None, (6, 6)):
        np.random.seed(1), torch.manual_seed(1)
        transform = rotations_and_flips((0, 1), (0, 1), None, patch_size=patch_size)
        image = torch.arange(36.0).reshape(1, 6, 6)
        samples.append([transform(image=image, segmentation=image.short())["image"] for _ in range(10)])
    assert all(torch.equal(a, b) for a, b in zip(*samples, strict=True))


@pytest.mark.parametrize(
    ("patch_size", "spacing", "said"),
    [
        ((64, 64), (1, 1), "Planes of axes 0-1 rotate by 90 degrees, and all axes flip."),
        ((512, 640), (1, 1), "Planes of axes 0-1 rotate by 90 degrees, cut from patches of 640x640 voxels, and all"),
        (
            (20, 320, 256),
            (3, 0.7, 0.7),
            "Planes of axes 1-2 rotate by 90 degrees, cut from patches of 20x320x320 voxels",
        ),
        ((96, 96), (3, 0.7), "No plane rotates by 90 degrees: none has equal spacing (3 x 0.7 mm)"),
    ],
)
def test_log_says_which_planes_rotate(patch_size, spacing, said):
    assert said in said_of_rotations(patch_size, spacing, rotation_axes(patch_size, spacing))


def rotations(x, axes):
    yield x
    for i, a in enumerate(axes):
        for b in axes[i + 1 :]:
            yield from (torch.rot90(x, k, (a + 1, b + 1)) for k in (1, 2, 3))


def flips(x, axes):
    axes = list(axes)
    for chosen in range(2 ** len(axes)):
        yield torch.flip(x, [a for i, a in enumerate(axes) if chosen >> i & 1])


def test_recipe_changes_no_intensity():
    trainer = make_trainer(patch_size=(8, 8, 8))
    rotation, dummy_2d, initial_patch, mirror = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    assert not dummy_2d and list(initial_patch) == [8, 8, 8]  # nothing needs voxels from outside the patch
    assert mirror == trainer.inference_allowed_mirroring_axes == (0, 1, 2)
    transform = trainer.get_training_transforms([8, 8, 8], rotation, None, mirror, dummy_2d)
    image = torch.randn(1, 8, 8, 8)
    for _ in range(20):
        out = transform(image=image, segmentation=torch.zeros(1, 8, 8, 8))["image"]
        assert torch.equal(out.flatten().sort().values, image.flatten().sort().values)


def test_nnunet_da_is_nnunets():
    trainer = make_trainer("nnUNetTrainerLGMSNet_nnUNetDA", patch_size=(8, 8, 8))
    stock = nnUNetTrainer(plans(only=configuration([8, 8, 8])), "only", 0, dataset_json(), torch.device("cpu"))
    ours, theirs = (t.configure_rotation_dummyDA_mirroring_and_inital_patch_size() for t in (trainer, stock))
    assert str(ours) == str(theirs)
    assert trainer.get_training_transforms is nnUNetTrainer.get_training_transforms


def test_cascade_gets_the_previous_stage_as_one_hot_channels():
    torch.manual_seed(0)
    transform = rotations_and_flips((0, 2), (0, 1, 2), None, is_cascaded=True, foreground_labels=[1, 2])
    segmentation = torch.randint(0, 3, (2, 8, 12, 8)).short()
    sample = transform(image=torch.randn(1, 8, 12, 8), segmentation=segmentation)
    assert sample["image"].shape == (3, 8, 12, 8) and sample["segmentation"].shape == (1, 8, 12, 8)
    assert set(sample["image"][1:].unique().tolist()) <= {0.0, 1.0}


def test_regions_with_ignore_label_end_in_the_ignore_channel():
    transform = rotations_and_flips((), None, None, regions=[(1, 2), 2], ignore_label=3)
    segmentation = torch.tensor([[0, 1, 2, 3, -1]]).short()[None]
    out = transform(image=torch.zeros(1, 1, 5), segmentation=segmentation)["segmentation"]
    expected = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0]])[:, None]
    assert torch.equal(out.long(), expected)


def test_the_step_that_is_recorded_is_the_training_step(monkeypatch):
    """On one GPU, in on_train_start: planned batch and patch, training mode, deep supervision as it will be."""
    trainer = make_trainer(patch_size=(8, 12, 8), lgmsnet={"deep_supervision": True})
    trainer.num_input_channels = 1
    recorded = []

    def record(x, group):
        recorded.append((tuple(x.shape), trainer.network.training, trainer.network.decoder.deep_supervision))

    monkeypatch.setattr(trainer.network, "record_training", record)
    trainer.network.eval()
    trainer.set_deep_supervision_enabled(False)
    trainer._record_step()
    assert recorded == [((trainer.batch_size, 1, 8, 12, 8), True, True)]


@pytest.mark.parametrize("scaled", [False, True], ids=["float32", "scaled"])
@pytest.mark.parametrize("labels", [LABELS, REGIONS], ids=["labels", "regions"])
@pytest.mark.parametrize("dim", [2, 3])
def test_the_step_is_nnunets(labels, dim, scaled):
    """To the last bit, so that a change of nnU-Net's own step is noticed here."""
    stepped = []
    for step in (trainers.nnUNetTrainerLGMSNet.train_step, nnUNetTrainer.train_step):
        torch.manual_seed(0)
        np.random.seed(0)
        trainer = make_trainer(labels=labels, patch_size=PATCH[dim], lgmsnet={"deep_supervision": True})
        trainer.grad_scaler = torch.amp.GradScaler("cpu") if scaled else None
        trainer.lr_scheduler = SimpleNamespace(step=lambda epoch: None)  # nnU-Net sets the rate once an epoch
        batch = make_batch(trainer)
        losses = [step(trainer, batch)["loss"] for _ in range(3)]
        assert all(isinstance(loss, np.ndarray) and loss.shape == () for loss in losses)
        stepped.append([*losses, *(p.detach() for p in trainer.network.parameters())])
    for ours, theirs in zip(*stepped, strict=True):
        assert (ours == theirs).all()


class CountingSGD(FusedSGD):
    """What is more in its step would be left out by a graph."""


@pytest.mark.parametrize(("optimizer", "recorded"), [(FusedSGD, True), (CountingSGD, False), (torch.optim.SGD, False)])
def test_only_the_update_of_the_own_optimiser_is_recorded(optimizer, recorded, monkeypatch):
    trainer = make_trainer()
    trainer.num_input_channels = 1
    trainer.optimizer = optimizer(trainer.network.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    monkeypatch.setattr(trainer.network, "record_training", lambda x, group: None)
    trainer._record_step()
    assert isinstance(trainer.recorded_update, RecordedUpdate) == recorded
    assert np.isfinite(trainer.train_step(make_batch(trainer))["loss"])


@pytest.mark.parametrize("replaced", ["optimizer", "grad_scaler", "nothing"])
def test_a_replaced_optimiser_is_the_one_that_steps(replaced, monkeypatch):
    trainer, recorded = make_trainer(), []
    trainer.num_input_channels = 1
    monkeypatch.setattr(trainer.network, "record_training", lambda x, group: None)
    trainer._record_step()
    monkeypatch.setattr(RecordedUpdate, "__call__", lambda update: recorded.append(update) or torch.ones(()))
    if replaced == "optimizer":
        trainer.optimizer = torch.optim.SGD(trainer.network.parameters(), 0.5)
    elif replaced == "grad_scaler":
        trainer.grad_scaler = torch.amp.GradScaler("cpu")
    before = [p.detach().clone() for p in trainer.network.parameters()]
    trainer.train_step(make_batch(trainer))
    assert bool(recorded) == (replaced == "nothing")
    moved = any(not torch.equal(p, old) for p, old in zip(trainer.network.parameters(), before, strict=True))
    assert moved != bool(recorded)


def test_a_step_that_cannot_be_recorded_is_taken_without(monkeypatch, capsys):
    trainer = make_trainer()
    trainer.num_input_channels = 1

    def fail(x, group):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer.network, "record_training", fail)
    trainer._record_step()
    assert "could not be recorded (CUDA out of memory)" in capsys.readouterr().out
    assert np.isfinite(trainer.train_step(make_batch(trainer))["loss"])


@pytest.mark.parametrize(("switch", "graphs"), [(None, True), ("f", False)])
def test_graphs_are_where_nnunet_would_compile(switch, graphs, monkeypatch):
    trainer = make_trainer()
    assert not trainer._trains_on_graphs()  # a CPU
    trainer.device = torch.device("cuda")
    monkeypatch.setattr(graphed, "use_kernels", lambda parameter: True)
    monkeypatch.setattr(graphed, "why_not_compiled", lambda device: None)
    monkeypatch.delenv("nnUNet_compile", raising=False)
    if switch:
        monkeypatch.setenv("nnUNet_compile", switch)
    assert trainer._trains_on_graphs() == graphs


CARDS_WITHOUT_KERNELS = {  # compute capability and system; whether the network is compiled, and whether recorded
    "T4": ((7, 5), "posix", True, False),
    "V100": ((7, 0), "posix", True, False),
    "P100": ((6, 0), "posix", False, True),
    "RTX 4090 in Windows": ((8, 9), "nt", False, True),
}


@pytest.mark.parametrize("switch", [None, "f"])
@pytest.mark.parametrize("card", CARDS_WITHOUT_KERNELS)
def test_pytorchs_operators_are_compiled_or_else_recorded(card, switch, monkeypatch):
    """Never both, and neither where the user has switched it off."""
    capability, system, compiles, records = CARDS_WITHOUT_KERNELS[card]
    trainer = make_trainer()
    trainer.device = torch.device("cuda")
    properties = SimpleNamespace(name=card, major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(compilation, "find_spec", lambda name: name)
    monkeypatch.setattr(graphed, "can_be_recorded", lambda parameter: True)
    monkeypatch.delenv("nnUNet_compile", raising=False)
    if switch:
        monkeypatch.setenv("nnUNet_compile", switch)
    monkeypatch.setattr(os, "name", system)
    decided = trainer._do_i_compile(), trainer._trains_on_graphs()
    why = compilation.why_not_compiled("cuda")
    trainer.is_ddp = True
    with_others = trainer._trains_on_graphs()
    monkeypatch.undo()  # pathlib asks for the system
    assert decided == ((compiles, records) if switch is None else (False, False))
    assert not with_others
    assert (why is None) == compiles and (system != "posix" or compiles or "P100 has 6.0" in why)


def test_without_triton_nothing_is_compiled_and_the_log_says_so(monkeypatch, capsys):
    trainer = make_trainer()
    trainer.device = torch.device("cuda")
    monkeypatch.setattr(compilation, "find_spec", lambda name: None)
    monkeypatch.setattr(graphed, "can_be_recorded", lambda parameter: True)
    monkeypatch.setattr(nnUNetTrainer, "initialize", lambda self: None)
    monkeypatch.setattr(robust, "check_preprocessed", lambda *args: None)
    monkeypatch.delenv("nnUNet_compile", raising=False)
    network = trainer.network
    trainer.initialize()
    assert "The network is not compiled. torch.compile needs the package triton" in capsys.readouterr().out
    assert trainer.network is network and trainer._trains_on_graphs()


def test_a_kernel_that_fails_in_the_recording_leaves_a_recording_without(monkeypatch, capsys):
    trainer, tried = make_trainer(), []
    trainer.num_input_channels = 1

    def record(x, group):
        tried.append(x)
        if len(tried) == 1:
            raise KernelsSwitchedOff("the Triton kernel _conv_sweep_kernel failed")

    monkeypatch.setattr(trainer.network, "record_training", record)
    trainer._record_step()
    assert len(tried) == 2 and trainer.recorded_update is not None
    assert "could not be recorded" not in capsys.readouterr().out


@pytest.mark.parametrize("step", ["train_step", "validation_step"])
def test_graphs_give_their_memory_back_where_it_is_short(step, monkeypatch, capsys):
    trainer = make_trainer()
    trainer.network._training_step = SimpleNamespace(end=lambda: None)
    compute, computed = type(trainer.network).forward, []

    def forward(self, x):
        computed.append(trainer.network.has_recorded_training)
        if computed[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(self, x)

    monkeypatch.setattr(type(trainer.network), "forward", forward)
    for _ in range(2):
        assert np.isfinite(getattr(trainer, step)(make_batch(trainer))["loss"])
    assert computed == [True, False, False]
    assert capsys.readouterr().out.count("training goes on, slower, without CUDA graphs") == 1


@pytest.mark.parametrize("is_ddp", [True, False], ids=["several processes", "without graphs"])
def test_memory_that_is_short_otherwise_is_an_error(is_ddp, monkeypatch):
    trainer, computed = make_trainer(), []
    monkeypatch.setattr(trainer, "_own_network", lambda: SimpleNamespace(has_recorded_training=is_ddp))
    trainer.is_ddp = is_ddp

    def forward(x):
        computed.append(x)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer.network, "forward", forward)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train_step(make_batch(trainer))
    assert len(computed) == 1


@pytest.mark.parametrize("error", [None, RuntimeError("stopped")])
def test_graphs_end_with_the_training(error, monkeypatch):
    """NCCL's processes wait for each other's end while a graph holds an exchange of theirs."""
    trainer = make_trainer()
    ended = []
    step = SimpleNamespace(end=lambda: ended.append(True))

    def run_training(self):
        self.network._training_step = step
        if error:
            raise error

    monkeypatch.setattr(nnUNetTrainer, "run_training", run_training)
    with pytest.raises(RuntimeError, match="stopped") if error else nullcontext():
        trainer.run_training()
    assert ended and trainer.network._training_step is None


@pytest.fixture
def kernels_run(monkeypatch):
    """As on a GPU of which nnU-Net would compile the networks."""
    monkeypatch.setattr(graphed, "use_kernels", lambda parameter: True)
    monkeypatch.setattr(graphed, "why_not_compiled", lambda device: None)
    monkeypatch.delenv("nnUNet_compile", raising=False)


@pytest.mark.parametrize("ddp", [False, True])
def test_what_trains_on_graphs_is_not_compiled(ddp, kernels_run, monkeypatch):
    trainer = make_trainer()
    network, trainer.is_ddp = trainer.network, ddp

    def initialize(self):
        assert not self._do_i_compile()
        if ddp:
            self.network = SimpleNamespace(module=network, parameters=network.parameters)

    monkeypatch.setattr(nnUNetTrainer, "initialize", initialize)
    monkeypatch.setattr(robust, "check_preprocessed", lambda *args: None)
    wrap = lambda module, device_ids: SimpleNamespace(wrapped=module, parameters=module.parameters)  # noqa: E731
    monkeypatch.setattr(graphed, "GraphedDataParallel", wrap)
    monkeypatch.setattr(torch, "compile", lambda *args: pytest.fail("compiled"))
    trainer.device = torch.device("cuda")
    trainer.initialize()
    assert trainer._trains_on_graphs()
    assert (trainer.network.wrapped if ddp else trainer.network) is network


@pytest.mark.parametrize("switch", [None, "f"])
def test_workers_begin_before_the_network_is_made(switch, kernels_run, monkeypatch):
    trainer, happened = make_trainer(), []
    if switch:
        monkeypatch.setenv("nnUNet_compile", switch)
    trainer.device, trainer.was_initialized = torch.device("cuda"), False
    monkeypatch.setattr(graphed, "workers_begin", lambda device: happened.append(f"begin on {device}") or nullcontext())
    monkeypatch.setattr(trainer, "initialize", lambda: happened.append("initialize"))
    monkeypatch.setattr(trainer, "_record_step", lambda: happened.append("record"))
    monkeypatch.setattr(robust.RobustTrainer, "on_train_start", lambda self: None)
    trainer.on_train_start()
    assert happened == (["initialize"] if switch else ["begin on cuda", "initialize", "record"])


@pytest.mark.parametrize("ddp", [False, True])
def test_a_trainer_that_compiles_in_any_case_trains_on_graphs(ddp, kernels_run, monkeypatch):
    """What is compiled never replays its graphs, and processes would not share their gradients."""
    trainer = make_trainer()
    network, trainer.is_ddp, trainer.device = trainer.network, ddp, torch.device("cuda")
    monkeypatch.setattr(trainer, "_do_i_compile", lambda: True)

    def initialize(self):
        compiled = torch.compile(network)
        self.network = SimpleNamespace(module=compiled, parameters=compiled.parameters) if ddp else compiled

    monkeypatch.setattr(nnUNetTrainer, "initialize", initialize)
    monkeypatch.setattr(robust, "check_preprocessed", lambda *args: None)
    wrap = lambda module, device_ids: SimpleNamespace(wrapped=module, parameters=module.parameters)  # noqa: E731
    monkeypatch.setattr(graphed, "GraphedDataParallel", wrap)
    trainer.initialize()
    assert (trainer.network.wrapped if ddp else trainer.network) is network


def test_a_trainer_that_compiles_nothing_records_nothing(kernels_run, monkeypatch):
    trainer = make_trainer()
    trainer.device = torch.device("cuda")
    monkeypatch.setattr(trainer, "_do_i_compile", lambda: False)
    monkeypatch.setattr(graphed, "workers_begin", lambda device: pytest.fail("began"))
    monkeypatch.setattr(trainer, "_record_step", lambda: pytest.fail("recorded"))
    monkeypatch.setattr(robust.RobustTrainer, "on_train_start", lambda self: None)
    trainer.was_initialized = True
    trainer.on_train_start()
    assert not trainer._trains_on_graphs()


def test_a_gpu_without_memory_is_one_sentence(monkeypatch):
    def run(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 8 GiB")

    monkeypatch.setattr(robust.OwnFolderTrainer, "run_training", run)
    with pytest.raises(SystemExit) as error:
        make_trainer(batch_size=4).run_training()
    said = error.value.code
    assert "\n" not in said and "memory for 4 patches of 8x12x8 (CUDA out of memory" in said
    assert said.endswith("override 999 --plans nnUNetPlans --batch-size 2 --patch-size 8 12 8 -c only")
