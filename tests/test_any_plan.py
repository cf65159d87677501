"""Plans that nnU-Net can produce, and plans that it did produce: every one builds, steps and loads again."""

from __future__ import annotations

import json
import math
import os
from importlib.metadata import version
from pathlib import Path

import planned
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from planned_by_nnunet import make

from nnunet_lgms.nnunet.builder import build_network
from nnunet_lgms.nnunet.loss import cross_entropy_and_dice, deep_supervision_weights
from nnunet_lgms.planning.memory import label_manager

FOLDER = Path(make.__file__).parent
STEP_VOXELS = 1500  # of a patch that a step on the CPU is taken with
N_COMPILED = int(os.environ.get("NNUNET_LGMS_COMPILED_PLANS", "3"))


def smaller(patch: tuple[int, ...], voxels: int = STEP_VOXELS) -> tuple[int, ...]:
    """The patch, its longest axis halved until it has no more than ``voxels``."""
    patch = list(patch)
    while math.prod(patch) > voxels:
        patch[patch.index(max(patch))] = -(-max(patch) // 2)
    return tuple(patch)


def sizes(patch: tuple[int, ...], strides: list) -> list[tuple[int, ...]]:
    """Of the outputs of all levels but the lowest, full resolution first."""
    found, size = [], patch
    for stride in strides[:-1]:
        size = tuple(-(-n // s) for n, s in zip(size, stride, strict=True))
        found.append(size)
    return found


def loss_of(network, x: torch.Tensor, classes: int, deep_supervision: bool) -> torch.Tensor:
    """nnU-Net's loss of one forward pass, against labels that are the same at every call."""
    random = torch.Generator().manual_seed(0)
    outputs = network(x)
    loss = cross_entropy_and_dice(label_manager(classes), batch_dice=False, ddp=False)
    outputs = outputs if deep_supervision else [outputs]
    targets = [torch.randint(classes, (len(x), 1, *o.shape[2:]), generator=random, dtype=torch.int16) for o in outputs]
    if not deep_supervision:
        return loss(outputs[0], targets[0])
    return DeepSupervisionWrapper(loss, deep_supervision_weights(len(outputs), True))(outputs, targets)


def check_step(manager, patch: tuple[int, ...], channels: int, classes: int, deep_supervision: bool) -> None:
    """One training step is finite, and prediction loads the weights into its own network."""
    torch.manual_seed(0)
    network = build_network(manager, channels, classes, deep_supervision)
    x = torch.randn(1, channels, *patch)
    loss = loss_of(network, x, classes, deep_supervision)
    assert math.isfinite(loss.item())
    loss.backward()
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    predicting = build_network(manager, channels, classes, enable_deep_supervision=False).eval()
    predicting.load_state_dict(network.state_dict(), strict=True)
    with torch.inference_mode():
        trained = network.eval()(x)
        torch.testing.assert_close(predicting(x), trained[0] if deep_supervision else trained, rtol=1e-4, atol=1e-4)


def check_sizes(manager, patch: tuple[int, ...], strides: list, channels: int, classes: int) -> None:
    """Sizes of all outputs at the planned patch, without its memory."""
    with torch.device("meta"):
        network = build_network(manager, channels, classes, enable_deep_supervision=True)
        outputs = network(torch.empty(1, channels, *patch))
    assert [tuple(o.shape) for o in outputs] == [(1, classes, *size) for size in sizes(patch, strides)]


def check_compiled(manager, patch: tuple[int, ...], channels: int, classes: int, deep_supervision: bool) -> None:
    """Compiled as one graph, a step has the loss and the gradients of the network as it is.

    In float64: where two voxels in a pooling window are nearly equal, the gradient jumps with a rounding.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    network = build_network(manager, channels, classes, deep_supervision).double()
    x = torch.randn(1, channels, *patch, dtype=torch.float64)
    results = []
    for runs in (network, torch.compile(network, backend="aot_eager", fullgraph=True)):
        network.zero_grad()
        loss = loss_of(runs, x, classes, deep_supervision)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)])
    assert len(results[0]) > 30
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-9)
    torch._dynamo.reset()


@st.composite
def plans(draw, most_stages: int = 8):
    """Patch, strides and kernels of a plan, channels, classes and whether it has deep supervision."""
    dim, n = draw(st.sampled_from([2, 3])), draw(st.integers(2, most_stages))
    patch = tuple(draw(st.lists(st.integers(16, 320), min_size=dim, max_size=dim)))
    axes = st.lists(st.sampled_from([1, 2]), min_size=dim, max_size=dim)
    strides = [[1] * dim, *(draw(axes) for _ in range(n - 1))]
    kernels = [draw(st.lists(st.sampled_from([3, 3, 1]), min_size=dim, max_size=dim)) for _ in range(n)]
    return patch, strides, kernels, draw(st.integers(1, 10)), draw(st.integers(2, 60)), draw(st.booleans())


def manager_of(patch, strides, kernels):
    return planned.manager(patch, len(strides), strides=strides, kernel_sizes=kernels)


relaxed = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.too_slow]}


@pytest.mark.slow
@settings(max_examples=30, **relaxed)
@given(plans())
def test_any_plan_has_outputs_of_the_planned_sizes(plan):
    patch, strides, kernels, channels, classes, _ = plan
    check_sizes(manager_of(patch, strides, kernels), patch, strides, channels, classes)


@pytest.mark.slow
@settings(max_examples=20, **relaxed)
@given(plans())
def test_any_plan_steps_and_loads_again(plan):
    patch, strides, kernels, channels, classes, deep_supervision = plan
    check_step(manager_of(patch, strides, kernels), smaller(patch), channels, classes, deep_supervision)


@pytest.mark.slow
@settings(max_examples=N_COMPILED, phases=[Phase.generate], **relaxed)
@given(plans(8 if N_COMPILED > 10 else 4))
def test_any_plan_compiles_to_the_same_steps(plan):
    """A few; NNUNET_LGMS_COMPILED_PLANS=30 for more, and with more stages, each of which costs some two seconds."""
    patch, strides, kernels, channels, classes, deep_supervision = plan
    check_compiled(manager_of(patch, strides, kernels), smaller(patch), channels, classes, deep_supervision)


# --- plans that nnU-Net made -----------------------------------------------------------------------------------------


def stored(name: str) -> tuple[dict, dict, dict]:
    """Fingerprint, dataset.json and plans."""
    return tuple(
        json.loads((FOLDER / name / f"{stem}.json").read_text()) for stem in ("fingerprint", "dataset", "nnUNetPlans")
    )


def configurations() -> list[tuple[str, str]]:
    return [(name, configuration) for name in make.FINGERPRINTS for configuration in stored(name)[2]["configurations"]]


@pytest.mark.skipif(
    not version("nnunetv2").startswith(f"{make.PLANNED_WITH}."), reason=f"planned with nnunetv2 {make.PLANNED_WITH}"
)
@pytest.mark.parametrize("name", make.FINGERPRINTS)
def test_nnunet_still_makes_the_stored_plans(name):
    fingerprint, dataset_json, plans = stored(name)
    assert make.plan(fingerprint, dataset_json, plans["dataset_name"]) == plans


def test_the_stored_fingerprints_are_those_of_the_script(hippocampus):
    for name in make.FINGERPRINTS:
        assert stored(name)[0] == make.fingerprint(name, hippocampus / "imagesTr")


@pytest.mark.parametrize(("name", "configuration"), configurations())
def test_plans_of_nnunet_build_and_step(name, configuration):
    _, dataset_json, plans = stored(name)
    manager = PlansManager(plans)
    configured = manager.get_configuration(configuration)
    channels = determine_num_input_channels(manager, configured, dataset_json)
    classes = manager.get_label_manager(dataset_json).num_segmentation_heads
    strides = configured.network_arch_init_kwargs["strides"]
    patch = tuple(configured.patch_size)
    check_sizes(configured, patch, strides, channels, classes)
    check_step(configured, smaller(patch), channels, classes, deep_supervision=True)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "configuration"), [("cardiac_mri_thick_slices", "3d_fullres"), ("hippocampus", "2d")])
def test_compiled_steps_are_the_same(name, configuration):
    """As one graph; that Inductor makes code of such graphs is tests/test_network_runtimes.py's matter."""
    configured = PlansManager(stored(name)[2]).get_configuration(configuration)
    check_compiled(configured, smaller(tuple(configured.patch_size)), 1, 2, deep_supervision=False)
