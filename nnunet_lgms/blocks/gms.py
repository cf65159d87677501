"""GMS, Global MultiScale block (LGMSNet, arXiv 2508.15476, section 3.3).

Most channels go through sparse attention that spans the map, the rest through a local depthwise branch; the paper's
optimum is 3:1.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from nnunet_lgms.blocks.attention import SparseTransformer
from nnunet_lgms.blocks.conv_norm_act import ConvNormAct, same_padding
from nnunet_lgms.blocks.dimension import conv_for, norm_for, per_axis
from nnunet_lgms.blocks.norm import BATCH_NORM
from nnunet_lgms.ops import concatenate, multi_kernel_depthwise, norm_act


class ConvBranch(nn.Module):
    """Residual depthwise branch: u + BN(dw1(ReLU(BN(dw3(u))))), both depthwise convolutions without bias.

    Its two norms are BatchNorm in 2D and in 3D alike, as in the published network.

    Args:
        conv_op: ``nn.Conv2d`` or ``nn.Conv3d``.
        channels: channels of input and output.
        kernel_size: kernel of the first depthwise convolution (paper: 3 on every axis).
    """

    def __init__(self, conv_op: type[_ConvNd], channels: int, kernel_size: Sequence[int]):
        super().__init__()
        norm_op = BATCH_NORM[len(kernel_size)]
        self.depthwise = conv_op(
            channels, channels, tuple(kernel_size), padding=same_padding(kernel_size), groups=channels, bias=False
        )
        self.norm1 = norm_op(channels)
        self.scale = conv_op(channels, channels, 1, groups=channels, bias=False)
        self.norm2 = norm_op(channels)

    def forward(self, u: Tensor) -> Tensor:
        """(B, C, *spatial) -> (B, C, *spatial)."""
        local = norm_act(multi_kernel_depthwise(u, [self.depthwise.weight]), self.norm1, "relu")
        # A depthwise 1-kernel is one factor per channel; a convolution would be a slow way to multiply.
        local = local * self.scale.weight.to(local.dtype).view(1, -1, *(1,) * (u.ndim - 2))
        return norm_act(local, self.norm2, "none", residual=u)


class GMSBlock(nn.Module):
    """Attention on the first ``transformer_channels`` channels, depthwise convolution on the rest, then a fusing
    convolution.

    Args:
        in_channels: channels of the input (D).
        out_channels: channels of the output (C); as many if None.
        transformer_channels: channels that go through attention, 0 to C; the paper's 3/4 of C if None.
        mlp_channels: hidden channels of the feed-forward part; the paper's 2 C if None.
        kernel_size: kernel of the dense and depthwise convolutions, one number or one per axis (paper: 3).
        patch: pixels of an attention patch, likewise (paper: 2).
        dim: spatial axes, 2 or 3.
        norm_op: norm type of the dense convolutions; the paper's for ``dim`` if None.
        norm_op_kwargs: its keyword arguments.
        n_heads: attention heads (paper: 4).
        head_dim: channels of a head (paper: 8).

    Raises:
        ValueError: ``transformer_channels`` is not between 0 and ``out_channels``, or is left out where 3/4 of them is
            no whole number, or a kernel is even.

    Example:
        >>> GMSBlock(64)(torch.zeros(1, 64, 20, 24)).shape
        torch.Size([1, 64, 20, 24])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        transformer_channels: int | None = None,
        mlp_channels: int | None = None,
        kernel_size: int | Sequence[int] = 3,
        patch: int | Sequence[int] = 2,
        n_heads: int = 4,
        head_dim: int = 8,
        *,
        dim: int = 2,
        norm_op: type[nn.Module] | None = None,
        norm_op_kwargs: dict | None = None,
    ):
        super().__init__()
        conv_op, (norm_op, norm_op_kwargs) = conv_for(dim), norm_for(dim, norm_op, norm_op_kwargs)
        kernel_size, patch = per_axis(kernel_size, dim, "kernel_size", odd=True), per_axis(patch, dim, "patch")
        out_channels = in_channels if out_channels is None else out_channels
        mlp_channels = 2 * out_channels if mlp_channels is None else mlp_channels
        if transformer_channels is None:
            if out_channels % 4:
                raise ValueError(
                    f"A GMS block of {out_channels} channels cannot give 3/4 of them to attention: choose a multiple "
                    "of 4, or give transformer_channels."
                )
            transformer_channels = 3 * out_channels // 4
        conv_channels = out_channels - transformer_channels
        if transformer_channels < 0 or conv_channels < 0:
            raise ValueError(
                f"A GMS block of {out_channels} channels cannot give {transformer_channels} of them to attention: "
                f"choose between 0 and {out_channels}."
            )
        self.split = (transformer_channels, conv_channels)
        norm = {"norm_op": norm_op, "norm_op_kwargs": norm_op_kwargs}
        point = (1,) * len(kernel_size)

        self.conv_in = ConvNormAct(conv_op, in_channels, out_channels, kernel_size, **norm)
        self.mix_in = ConvNormAct(conv_op, out_channels, out_channels, point, **norm)
        self.transformer = (
            SparseTransformer(transformer_channels, mlp_channels, patch, n_heads, head_dim)
            if transformer_channels
            else nn.Identity()
        )
        self.conv_branch = ConvBranch(conv_op, conv_channels, kernel_size) if conv_channels else nn.Identity()
        self.mix_out = ConvNormAct(conv_op, out_channels, out_channels, point, **norm)
        self.fuse = ConvNormAct(conv_op, out_channels + in_channels, out_channels, kernel_size, **norm)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, *spatial) -> (B, C, *spatial)."""
        mixed = self.mix_in(self.conv_in(x))
        if self.split[0] == 0:
            mixed = self.conv_branch(mixed)
        else:
            mixed = self.transformer(mixed, self.conv_branch if self.split[1] else None)
        return self.fuse(concatenate([self.mix_out(mixed), x]))
