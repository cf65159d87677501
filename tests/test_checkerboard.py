"""The spectrum of logits at the frequencies of an upsampling."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nnunet_lgms import LGMSNet
from nnunet_lgms.evaluation.checkerboard import checkerboard


def smooth(*shape: int) -> torch.Tensor:
    torch.manual_seed(0)
    x = torch.randn(1, 2, *shape)
    kernel = torch.ones(2, 1, *(5,) * len(shape)) / 5 ** len(shape)
    return (F.conv2d if len(shape) == 2 else F.conv3d)(x, kernel, padding=2, groups=2)


@pytest.mark.parametrize("period", [2, 4])
@pytest.mark.parametrize("axes", [[2], [3], [2, 3]], ids=str)
def test_a_pattern_stands_out_at_its_period(period, axes):
    x = smooth(96, 80)
    assert max(checkerboard(x, (2, 4)).values()) < 15
    where = sum(torch.arange(x.shape[axis]).reshape([-1 if a == axis else 1 for a in range(4)]) for axis in axes)
    pattern = 0.6 * x.std() * (where % period == 0)  # of two axes, a checkerboard or its diagonals
    assert checkerboard(x + pattern, (2, 4))[period] > 50


def test_a_transposed_convolution_is_seen():
    """The textbook case: weights that overlap unevenly."""
    up = nn.ConvTranspose2d(2, 2, 3, stride=2, bias=False)
    nn.init.constant_(up.weight, 0.1)
    assert checkerboard(up(smooth(64, 64) + 1).detach(), (2,))[2] > 50


def test_lgmsnet_has_none_on_random_weights():
    torch.manual_seed(0)
    network = LGMSNet.paper(1, 2, dim=2).eval()
    with torch.inference_mode():
        logits = network(smooth(192, 192)[:, :1])
    assert checkerboard(logits, (2,))[2] < 20


def test_periods_without_room_are_left_out():
    assert list(checkerboard(smooth(40, 24), (2, 16))) == [2]
    assert list(checkerboard(smooth(4, 32, 32), (2,))) == [2]
