"""Reads checkpoints of the LGMSNet authors' implementation.

The names are facts about their files (listed in the specification that this package was written from); no code of
theirs is used. Everything that can differ between checkpoints is inferred from the tensors' shapes: dimension, input
channels, classes, widths, LMS kernels and repetitions, the split and the feed-forward width of every GMS block.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor, nn

from nnunet_lgms.architecture.lgmsnet import LGMSNet
from nnunet_lgms.blocks.norm import BATCH_NORM, INSTANCE_NORM
from nnunet_lgms.checkpoint import read_checkpoint
from nnunet_lgms.files import shown

WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LMS_LEVELS = (1, 2, 3)
GMS_LEVELS = (4, 5)
LMS_KERNEL_NAMES = ("local_dwc", "global_dwc_s", "global_dwc_m", "global_dwc_l")
#: authors' name -> ours, inside an LMS block
LMS_NAMES = {
    **{name: f"depthwise.{i}" for i, name in enumerate(LMS_KERNEL_NAMES)},
    "norm_act.0": "norm",
    "conv_1x1_bn.0": "squeeze.conv",
    "conv_1x1_bn.1": "squeeze.norm",
    "conv_nxn_bn.0": "expand.conv",
    "conv_nxn_bn.1": "expand.norm",
}
#: the same inside a GMS block; the authors' 2D and 3D blocks name the depthwise convolutions after their kernels
GMS_NAMES = {
    "conv1.0": "conv_in.conv",
    "conv1.1": "conv_in.norm",
    "conv2.0": "mix_in.conv",
    "conv2.1": "mix_in.norm",
    "conv3.0": "mix_out.conv",
    "conv3.1": "mix_out.norm",
    "conv4.0": "fuse.conv",
    "conv4.1": "fuse.norm",
    "conv_spilt.dwconv3x3": "conv_branch.depthwise",
    "conv_spilt.dwconv3x3x3": "conv_branch.depthwise",
    "conv_spilt.bn1": "conv_branch.norm1",
    "conv_spilt.dwconv1x1": "conv_branch.scale",
    "conv_spilt.dwconv1x1x1": "conv_branch.scale",
    "conv_spilt.bn2": "conv_branch.norm2",
    "transformer.layers.0.0.norm": "transformer.norm1",
    "transformer.layers.0.0.to_qkv": "transformer.attention.qkv",
    "transformer.layers.0.0.to_out.0": "transformer.attention.proj",
    "transformer.layers.0.1.net.0": "transformer.norm2",
    "transformer.layers.0.1.net.1": "transformer.feed_forward.0",
    "transformer.layers.0.1.net.4": "transformer.feed_forward.2",
}
#: the same inside a Fusion block
FUSION_NAMES = {
    "conv.0": "grouped",
    "conv.2": "norm1",
    "conv.3": "expand",
    "conv.5": "norm2",
    "conv.6": "squeeze",
    "conv.8": "norm3",
}
CONV_NORM_NAMES = {"0": "conv", "1": "norm"}
BLOCK_NAMES = {"lms": LMS_NAMES, "gms": GMS_NAMES, "fusion": FUSION_NAMES}


def rename_block(state_dict: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """State dict of a single block, authors' names -> ours; ``kind`` is "lms", "gms" or "fusion"."""
    return {_rename(key, "", BLOCK_NAMES[kind], ""): value for key, value in state_dict.items()}


def load_official(checkpoint: str | Path | Mapping[str, Tensor]) -> LGMSNet:
    """Builds the :class:`LGMSNet` that a checkpoint of the authors describes and loads the weights.

    Args:
        checkpoint: a file, which is read without running code (:func:`nnunet_lgms.checkpoint.read_checkpoint`), or
            what is in it: parameters and buffers by the authors' names. A prefix "module." (DataParallel) is accepted.

    Returns:
        the network in training mode, float32 or the checkpoint's own precision, without auxiliary heads.

    Raises:
        ValueError: this is no state dict, its names or shapes are not those of an LGMSNet checkpoint, or its tensors
            cannot be weights; the message names them.
        FileNotFoundError: there is no such file.
    """
    if isinstance(checkpoint, str | Path):
        checkpoint = read_checkpoint(checkpoint)
    state_dict = _checked(checkpoint)
    # without memory until every shape is known to fit: shapes in a file are only claims
    with torch.device("meta"):
        network = _build(state_dict)
    renamed = dict(_rename_network(state_dict))
    expected = network.state_dict()
    missing, unexpected = sorted(expected.keys() - renamed.keys()), sorted(renamed.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"This is not a complete LGMSNet checkpoint: missing {missing[:3]}, not known {unexpected[:3]} "
            f"({len(missing)} and {len(unexpected)} in all); give the state dict of the authors' LGMSNet."
        )
    for key, value in renamed.items():
        if value.shape != expected[key].shape:
            raise ValueError(
                f"The checkpoint's {key} has shape {tuple(value.shape)} where its other tensors ask for "
                f"{tuple(expected[key].shape)}: the file mixes networks of different widths."
            )
    # The widest precision of the file: none of its tensors is rounded.
    network.to(reduce(torch.promote_types, (value.dtype for value in renamed.values() if value.is_floating_point())))
    network.to_empty(device="cpu")
    network.load_state_dict(renamed)
    return network


def _checked(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without DataParallel's prefix; only names and tensors that can be weights."""
    if not isinstance(state_dict, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state_dict.items()
    ):
        raise ValueError(
            f"load_official takes a state dict (names and tensors), not this {type(state_dict).__name__}: take the "
            "state dict out of what is around it."
        )
    for key, value in state_dict.items():
        counts = key.endswith("num_batches_tracked")
        fits = value.dtype in ((torch.int64,) if counts else WEIGHT_DTYPES)
        fits = fits and value.layout is torch.strided and not value.is_meta
        # a view may claim terabytes of a few bytes
        if not fits or value.untyped_storage().nbytes() < value.nbytes or not value.isfinite().all():
            raise ValueError(
                f"The checkpoint's {shown(key)} is {value.dtype}, or holds NaN or infinity, or no numbers at all: "
                "weights are finite floating-point numbers; the file is damaged or not the authors'."
            )
    renamed = {key.removeprefix("module."): value for key, value in state_dict.items()}
    if len(renamed) != len(state_dict):
        twice = next(key for key in state_dict if f"module.{key}" in state_dict)
        raise ValueError(
            f"The checkpoint has {shown(twice)} twice, with and without 'module.': keep the one that was trained."
        )
    return renamed


def _get(state_dict: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in state_dict:
        raise ValueError(
            f"This is not an LGMSNet checkpoint: it has no {key!r} (it begins with {list(state_dict)[:3]}); give the "
            "state dict of the authors' LGMSNet, not a file around it."
        )
    value = state_dict[key]
    if value.ndim < 2 or not value.numel():
        raise ValueError(f"The checkpoint's {key} has shape {tuple(value.shape)}, which no weight of LGMSNet has.")
    return value


def _lms_prefixes(state_dict: Mapping[str, Tensor], level: int) -> list[str]:
    """Names of the LMS blocks of an encoder level; the released 3D "L" presets repeat the block."""
    pattern = re.compile(rf"(encoder{level}\.\d+)\.{LMS_KERNEL_NAMES[0]}\.weight")
    found = [match[1] for match in map(pattern.fullmatch, state_dict) if match]
    return sorted(found, key=lambda name: int(name.rsplit(".", 1)[1]))


def _after(prefix: str) -> str:
    """Name of the module that follows ``prefix`` in a Sequential."""
    stem, index = prefix.rsplit(".", 1)
    return f"{stem}.{int(index) + 1}"


def _build(state_dict: Mapping[str, Tensor]) -> LGMSNet:
    stem = _get(state_dict, "stem.conv.0.weight")
    head = _get(state_dict, "Conv_1x1.weight")
    dim = stem.ndim - 2
    if dim not in (2, 3):
        raise ValueError(f"stem.conv.0.weight has shape {tuple(stem.shape)}: an LGMSNet checkpoint is 2D or 3D.")

    widths, kernels, n_blocks = [], [], []
    for level in LMS_LEVELS:
        prefixes = _lms_prefixes(state_dict, level)
        if not prefixes:
            _get(state_dict, f"encoder{level}.0.{LMS_KERNEL_NAMES[0]}.weight")
        widths.append(_get(state_dict, f"{_after(prefixes[-1])}.0.weight").shape[0])
        kernels.append([list(_get(state_dict, f"{prefixes[0]}.{name}.weight").shape[2:]) for name in LMS_KERNEL_NAMES])
        n_blocks.append(len(prefixes))
    for level in GMS_LEVELS:
        widths.append(_get(state_dict, f"encoder{level}.0.conv1.0.weight").shape[0])
        kernels.append(kernels[0])
        n_blocks.append(1)

    encoder_splits = {level: _gms_split(state_dict, f"encoder{level}.0") for level in GMS_LEVELS}
    decoder_splits = {4: _gms_split(state_dict, "Up_conv5"), 3: _gms_split(state_dict, "Up_conv4.1")}
    default = ((3, 1), 2)
    encoder_gms = [encoder_splits.get(level, default) for level in range(1, 6)]
    decoder_gms = [decoder_splits.get(level, default) for level in range(1, 6)]
    inner = _get(state_dict, "encoder4.0.transformer.layers.0.0.to_qkv.weight").shape[0] // 3
    # Heads leave no trace in the shapes: 4, as published.
    has_running_statistics = "stem.conv.1.running_mean" in state_dict
    return LGMSNet(
        input_channels=stem.shape[1],
        num_classes=head.shape[0],
        n_stages=5,
        features_per_stage=widths,
        conv_op=nn.Conv2d if dim == 2 else nn.Conv3d,
        kernel_sizes=[3] * 5,
        strides=[1, 2, 2, 2, 2],
        lms_kernels=kernels,
        gms_ratio=[split for split, _ in encoder_gms],
        decoder_gms_ratio=[split for split, _ in decoder_gms],
        mlp_ratio=[mlp for _, mlp in encoder_gms],
        decoder_mlp_ratio=[mlp for _, mlp in decoder_gms],
        n_blocks_per_stage=n_blocks,
        n_heads=4,
        head_dim=inner // 4,
        norm_op=BATCH_NORM[dim] if has_running_statistics else INSTANCE_NORM[dim],
        norm_op_kwargs={"affine": "stem.conv.1.weight" in state_dict},
        auxiliary_heads=False,
    )


def _gms_split(state_dict: Mapping[str, Tensor], prefix: str) -> tuple[tuple[int, int], Fraction]:
    """((Transformer, Conv) channels, feed-forward channels over the width) of a GMS block."""
    width = _get(state_dict, f"{prefix}.conv1.0.weight").shape[0]
    mlp, transformer = _get(state_dict, f"{prefix}.transformer.layers.0.1.net.1.weight").shape[:2]
    return (transformer, width - transformer), Fraction(mlp, width)


def _rename_network(state_dict: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yields (our name, tensor); a name that is not known is passed on as it is, to be reported."""
    modules: list[tuple[str, dict[str, str], str]] = [("stem.conv", CONV_NORM_NAMES, "encoder.stem")]
    for level in LMS_LEVELS:
        prefixes = _lms_prefixes(state_dict, level)
        first = int(level > 1)  # a stage below the first begins with its pooling
        for i, prefix in enumerate(prefixes):
            modules.append((prefix, LMS_NAMES, f"encoder.stages.{level - 1}.{first + i}"))
        last = f"encoder.stages.{level - 1}.{first + len(prefixes)}"
        modules.append((_after(prefixes[-1]), CONV_NORM_NAMES, last))
    for level in GMS_LEVELS:
        modules.append((f"encoder{level}.0", GMS_NAMES, f"encoder.stages.{level - 1}.1"))
    for stage, level in enumerate((5, 4, 3, 2)):  # the authors name a decoder stage after the level below it
        modules.append((f"Up{level}.up", {"1": "conv", "2": "norm"}, f"decoder.ups.{stage}.conv"))
    modules += [
        ("Up_conv5", GMS_NAMES, "decoder.stages.0.0"),
        ("Up_conv4.0", FUSION_NAMES, "decoder.stages.1.0"),
        ("Up_conv4.1", GMS_NAMES, "decoder.stages.1.1"),
        ("Up_conv3", FUSION_NAMES, "decoder.stages.2.0"),
        ("Up_conv2", FUSION_NAMES, "decoder.stages.3.0"),
        ("Conv_1x1", {"": ""}, "decoder.seg_layers.0"),
    ]
    for key, value in state_dict.items():
        for prefix, names, ours in modules:
            if key.startswith(prefix + "."):
                yield _rename(key, prefix + ".", names, ours + "."), value
                break
        else:
            yield key, value


def _rename(key: str, prefix: str, names: Mapping[str, str], ours: str) -> str:
    """Replaces ``prefix`` and the module name behind it; a name that is not in ``names`` is kept."""
    module, _, tensor = key.removeprefix(prefix).rpartition(".")
    if module not in names:
        return key
    return ".".join(part for part in (ours.rstrip("."), names[module], tensor) if part)
