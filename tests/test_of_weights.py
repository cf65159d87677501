"""What predictions make of weights alone: made once, and again when the weights changed."""

import pytest
import torch
from torch import Tensor

from nnunet_lgms import LGMSNet
from nnunet_lgms.ops.of_weights import MadeOfWeights, of_weights


def doubled(weight: Tensor) -> Tensor:
    return weight * 2


def parts(weight: Tensor, n: int) -> tuple[Tensor, ...]:
    return tuple(part.clone() for part in weight.chunk(n))


def forward(weight: Tensor) -> tuple[Tensor, ...]:
    """Made of a weight, of a view of it, of what was made, and of settings."""
    twice = of_weights(doubled, weight[1:])
    return of_weights(Tensor.to, twice, torch.float64), *of_weights(parts, weight, 2), of_weights(doubled, twice)


@pytest.mark.parametrize("inference", [True, False])
def test_made_once_and_again_for_other_weights(inference):
    weight = torch.arange(4.0)
    made = MadeOfWeights([weight])
    with torch.inference_mode(inference), made.making():
        first = forward(weight)
    with made.in_use():
        kept = forward(weight)
    assert all(a is b for a, b in zip(first, kept, strict=True))
    weight.add_(10)
    with torch.inference_mode(not inference), made.in_use():
        assert torch.equal(forward(weight)[0], torch.tensor([2.0, 4.0, 6.0]))  # not renewed
    with torch.inference_mode(not inference):
        made.renew()
    with made.in_use():
        again = forward(weight)
    assert all(a is b for a, b in zip(first, again, strict=True))
    for a, b in zip(again, forward(weight), strict=True):
        assert a is not b and torch.equal(a, b)


def test_what_is_no_copy_stays_a_view():
    weight = torch.zeros(3)
    made = MadeOfWeights([weight])
    with made.making():
        assert of_weights(Tensor.to, weight, torch.float32) is weight
    weight.fill_(5)
    version = weight._version
    made.renew()
    assert (weight == 5).all()
    assert weight._version == version  # or it would look changed


def test_a_tensor_that_is_no_weight_is_refused():
    """It would be another one in the next prediction."""
    with pytest.raises(RuntimeError, match="what doubled is given is not made of weights"):
        with MadeOfWeights([torch.zeros(3)]).making():
            of_weights(doubled, torch.zeros(3))


@pytest.mark.parametrize("asks", [[parts], [doubled, doubled]], ids=["for another", "for more"])
def test_who_asks_for_something_else_is_told(asks):
    weight = torch.zeros(4)
    made = MadeOfWeights([weight])
    with made.making():
        of_weights(doubled, weight)
    with pytest.raises(RuntimeError, match="of the weights is asked for where something else was before"):
        with made.in_use():
            for function in asks:
                of_weights(function, weight, *([2] if function is parts else []))
    assert of_weights(doubled, weight) is not of_weights(doubled, weight)  # outside, all is made whenever asked for


@pytest.mark.parametrize("dim", [2, 3])
def test_a_network_is_the_same_with_what_was_made_before(dim):
    torch.manual_seed(0)
    network = LGMSNet.paper(1, 2, dim=dim).eval()
    x = torch.randn(1, 1, *[32] * dim)
    made = MadeOfWeights(network.parameters())
    with torch.inference_mode():
        with made.making():
            assert torch.equal(network(x), network(x))
        for parameter in network.parameters():
            parameter.mul_(1.1)
        made.renew()
        with made.in_use():
            kept = network(x)
        assert len(made._made) > 0 and torch.equal(kept, network(x))
