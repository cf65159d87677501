"""Maps without variance: what instance and group norms make of them, and a network of a blank patch."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from interpreter import run_interpreted
from torch import nn

from nnunet_lgms.blocks import FusionBlock
from nnunet_lgms.blocks.norm import GroupNorm, InstanceNorm3d
from nnunet_lgms.ops.norm_act import norm_act


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("make", [InstanceNorm3d, GroupNorm], ids=["instance", "group"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_constant_channel_becomes_the_bias(make, dtype, channels_last, batch):
    """Beside channels with variance, which become what PyTorch makes of them."""
    torch.manual_seed(0)
    norm = make(16, affine=True).to(dtype)
    nn.init.normal_(norm.bias)
    x = torch.randn(batch, 16, 7, 9, 11, dtype=dtype)
    x[0, :8] = 0.1  # of which no sum is exact
    x[0, 1] = 0
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    x.requires_grad_()
    constant = slice(0, 8) if make is InstanceNorm3d else slice(2, 8)  # two channels a group: 0.1 and 0 is no constant
    out = norm_act(x, norm, "none")
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    assert (out[0, constant] == norm.bias[constant].view(-1, 1, 1, 1)).all() and (grad[0, constant] == 0).all()
    expected = norm(x)
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(out[0, 8:], expected[0, 8:], **tolerance)
    torch.testing.assert_close(out[1:], expected[1:], **tolerance)


@pytest.mark.parametrize("share, is_flat", [(1e-8, True), (1e-3, False)])
def test_what_is_above_rounding_is_kept(share, is_flat):
    x = 1 + share * torch.randn(2, 8, 6, 8, 10, dtype=torch.float64).clamp(-2, 2)
    norm = InstanceNorm3d(8)
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        out = norm_act(x.contiguous(memory_format=layout), norm, "none")
        torch.testing.assert_close(out, torch.zeros_like(x) if is_flat else norm(x))


def test_derivatives_of_the_gradient_hold():
    x = torch.randn(2, 8, 2, 3, 2, dtype=torch.float64).contiguous(memory_format=torch.channels_last_3d)
    x[0, 3] = 0.1
    x.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: norm_act(x, InstanceNorm3d(8), "none")[1], x)
    (grad,) = torch.autograd.grad(norm_act(x, InstanceNorm3d(8), "none").pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    assert second.isfinite().all() and (second[0, 3] == 0).all()


@pytest.mark.parametrize("value", [0.0, 0.1])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_a_fusion_of_constant_maps_is_nothing(value, layout):
    torch.manual_seed(0)
    block = FusionBlock(16, 8, 1, dim=3)
    x = torch.full((2, 16, 6, 8, 10), value).contiguous(memory_format=layout).requires_grad_()
    out = block(x)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert (out == 0).all() and (grad == 0).all()


def test_a_network_of_a_blank_patch_gives_its_prior():
    """The same in float32 and float64: without the rule these logits differ by more than they are."""
    from exported import PATCH, hippocampus_plans
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunet_lgms.nnunet.builder import build_network

    torch.manual_seed(0)
    configuration = PlansManager(hippocampus_plans()).get_configuration("3d_fullres")
    network = build_network(configuration, 1, 3, enable_deep_supervision=False)
    blank = torch.zeros(1, 1, *PATCH)
    logits = network(blank)
    logits.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())
    network = network.eval()
    with torch.inference_mode():
        logits, exact = network(blank), network.double()(blank.double())
    torch.testing.assert_close(logits.double(), exact, atol=1e-5, rtol=0)
    assert exact.flatten(2).std(2).max() < 1e-6


# --- the kernels, in Triton's interpreter ----------------------------------------------------------------------------


@pytest.mark.slow
def test_kernels_give_the_bias_for_a_constant_channel():
    interpreted = run_interpreted(__file__)
    for kind in ("instance", "group"):
        assert interpreted[kind] == {"constant": 0.0, "gradient": 0.0, "others": True}
    assert interpreted["batch"] == {"variance_is_finite": True}


def _interpreted() -> dict:
    """What the kernels make of a map whose first eight channels are constant."""
    from nnunet_lgms.ops.triton import norm_act_kernels as kernels

    torch.manual_seed(0)
    x = torch.randn(2, 16, 6, 7, 9)
    x[:, :8] = 0.1
    x = x.contiguous(memory_format=torch.channels_last_3d)
    weight, bias = torch.randn(16), torch.randn(16)
    report = {}
    for kind, groups in (("instance", 1), ("group", 8)):
        norm = kernels.Norm(*kernels.moments(x, kind, groups, "none"), weight, bias, 1e-5)
        out = kernels.forward(x, norm, None, kind, groups, "none")
        grad, *_ = kernels.backward(torch.ones_like(x), x, norm, kind, groups, "none")
        expected = F.group_norm(x, 16 if kind == "instance" else groups, weight, bias, 1e-5)
        report[kind] = {
            "constant": (out[:, :8] - bias[:8].view(-1, 1, 1, 1)).abs().max().item(),
            "gradient": grad[:, :8].abs().max().item(),
            "others": torch.allclose(out[:, 8:], expected[:, 8:], atol=1e-4),
        }
    _, variance = kernels.moments(x, "batch", 1, "none")
    report["batch"] = {"variance_is_finite": bool(variance.isfinite().all())}
    return report


if __name__ == "__main__":
    print(json.dumps(_interpreted()))
