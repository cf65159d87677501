"""The forms that operators take in the exported file compute what PyTorch computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra [export]")
pytest.importorskip("onnxscript", reason="needs the extra [export]")

from nnunet_lgms.blocks.attention import SparseTransformer  # noqa: E402
from nnunet_lgms.blocks.fusion import FusionBlock  # noqa: E402
from nnunet_lgms.blocks.lms import MultiKernelDepthwise  # noqa: E402
from nnunet_lgms.blocks.norm import BatchNorm2d  # noqa: E402
from nnunet_lgms.export.fold import fold_norms  # noqa: E402
from nnunet_lgms.export.onnx_file import to_onnx  # noqa: E402


def check(network: nn.Module, channels: int, patch: tuple[int, ...], step: tuple[int, ...]):
    """The model, if ONNX Runtime gives PyTorch's output for two batches and, where sizes are free, two sizes."""
    torch.manual_seed(0)
    exported = to_onnx(network, channels, patch, step)
    session = onnxruntime.InferenceSession(exported.model.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        image = torch.randn(batch, channels, *(p + (batch - 1) * s for p, s in zip(patch, exported.steps)))
        with torch.inference_mode():
            expected = network(image).numpy()
        np.testing.assert_allclose(session.run(None, {"image": image.numpy()})[0], expected, atol=2e-5)
    return exported.model


def count(model, operator: str) -> int:
    return sum(node.op_type == operator for node in model.graph.node)


@pytest.mark.parametrize(
    ("groups", "kernels", "convolutions"),
    [
        ([4, 4, 2], [(3, 3), (5, 1), (7, 9)], 1),  # narrow: one convolution of 7 x 9
        ([16, 8], [(3, 3), (5, 5)], 2),
        ([4, 4], [(1, 3, 3), (3, 5, 5)], 3),  # one for each plane of 3 x 5 x 5
        ([16, 16], [(1, 3, 3), (3, 1, 5)], 1 + 3),
    ],
)
def test_depthwise(groups, kernels, convolutions):
    axes = len(kernels[0])
    module = MultiKernelDepthwise(nn.Conv3d if axes == 3 else nn.Conv2d, groups, kernels)
    model = check(module, sum(groups), (8, 6, 10)[:axes], (2,) * axes)
    assert count(model, "Conv") == convolutions


@pytest.mark.slow
@pytest.mark.parametrize("patch", [(8, 12), (7, 10)])  # the second is padded, and attends under a mask
def test_attention_holds_one_matrix_at_a_time(patch):
    step = (4, 4) if patch[0] % 2 == 0 else (0, 0)
    model = check(SparseTransformer(12, 24, (2, 2)), 12, patch, step)
    assert count(model, "Scan") == 1 and count(model, "Softmax") == 0


def test_norms_before_pointwise_convolutions_are_part_of_them():
    torch.manual_seed(0)
    block = FusionBlock(8, 6)
    for norm in (block.norm1, block.norm2, block.norm3):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    block(torch.randn(4, 8, 9, 9))  # running statistics that are not 0 and 1
    block.eval()
    before = {name: value.clone() for name, value in block.state_dict().items()}
    folded, image = fold_norms(block), torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(folded(image), block(image), atol=2e-5, rtol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    assert sum(isinstance(module, BatchNorm2d) for module in folded.modules()) == 1
