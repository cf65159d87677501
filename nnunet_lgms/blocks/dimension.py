"""What a number of spatial axes stands for: the kind of convolution, and sizes that are given once for all axes."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from nnunet_lgms.blocks.norm import paper_norm
from nnunet_lgms.files import shown

CONV = {2: nn.Conv2d, 3: nn.Conv3d}


def conv_for(dim: int) -> type[_ConvNd]:
    """The convolution for ``dim`` spatial axes.

    Raises:
        ValueError: ``dim`` is neither 2 nor 3.
    """
    if dim not in CONV:
        raise ValueError(f"LGMSNet's blocks have 2 or 3 dimensions, not dim={dim!r}: choose dim=2 or dim=3.")
    return CONV[dim]


def norm_for(dim: int, norm_op: type[nn.Module] | None, norm_op_kwargs: dict | None) -> tuple[type[nn.Module], dict]:
    """The norm that was given with its keyword arguments, or the paper's for ``dim`` spatial axes."""
    return paper_norm(dim) if norm_op is None else (norm_op, norm_op_kwargs or {})


def is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def plain(value: Any) -> Any:
    """NumPy's arrays and numbers, and tensors, as Python's lists and numbers, also inside lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def per_axis(value: Any, dim: int, name: str, odd: bool = False) -> tuple[int, ...]:
    """One positive whole number per axis: a number is repeated, a sequence must have ``dim`` entries.

    Raises:
        ValueError: it is something else.
    """
    value = plain(value)
    entries = (value,) * dim if is_int(value) else value
    if (
        not isinstance(entries, Sequence)
        or len(entries) != dim
        or not all(is_int(e) and e >= 1 and (e % 2 or not odd) for e in entries)
    ):
        kind = "odd positive whole number" if odd else "positive whole number"
        raise ValueError(f"{name} holds {shown(value)}: give one {kind}, or one for each of the {dim} axes.")
    return tuple(int(e) for e in entries)
