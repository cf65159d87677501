"""The schema of the configuration key ``"lgmsnet"``: names, types, defaults and what each setting does.

This is the one place of truth. Builder, command line and the table in ``docs/reference/plans.md`` are made from it.
Defaults are the paper's network (arXiv 2508.15476) on whatever topology nnU-Net planned.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from packaging.version import InvalidVersion, Version
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StringConstraints,
    ValidationError,
)

from nnunet_lgms import __version__
from nnunet_lgms.complaints import Complaint, allowed_in, described, first_complaint
from nnunet_lgms.config.levels import ByLevel, PerLevel
from nnunet_lgms.files import shown
from nnunet_lgms.nearest import did_you_mean

KEY = "lgmsnet"

# The first release that reads every setting below; raise it with each new setting. Plans that override something carry
# it, so that an older plugin can say what it lacks instead of stumbling over an unknown name.
READABLE_SINCE = "0.1.0"

AUTO = "auto"
MAX_LMS_GROUPS = 8

# Far above what anybody trains, and low enough that a slip such as 100000 repetitions is refused instead of built.
MAX_WIDTH, MAX_DEPTH, MAX_KERNEL, MAX_HEADS, MAX_HEAD_DIM, MAX_MLP_RATIO = 4096, 64, 511, 256, 1024, 64


def _odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError("must be odd")
    return value


def _ratio_from_text(value: Any) -> Any:
    """ "3:1" -> [3, 1]; everything else is left to the types."""
    if isinstance(value, str) and value.count(":") == 1 and value.replace(":", "").isdigit():
        return [int(part) for part in value.split(":")]
    return value


def _not_both_zero(value: list[int]) -> list[int]:
    if not any(value):
        raise ValueError("must leave channels to a branch")
    return value


def _count(largest: int) -> Any:
    return Annotated[int, Field(strict=True, ge=1, le=largest)]


Width, Depth, Heads, HeadDim = map(_count, (MAX_WIDTH, MAX_DEPTH, MAX_HEADS, MAX_HEAD_DIM))
OddKernel = Annotated[_count(MAX_KERNEL), AfterValidator(_odd)]
AxisKernels = Annotated[list[OddKernel], Field(min_length=2, max_length=3)]
FlatGroups = Annotated[list[OddKernel], Field(min_length=1, max_length=MAX_LMS_GROUPS)]
Groups = Annotated[list[OddKernel | AxisKernels], Field(min_length=1, max_length=MAX_LMS_GROUPS)]
GroupChannels = Annotated[list[Width], Field(min_length=1, max_length=MAX_LMS_GROUPS)]
Ratio = Annotated[
    list[Annotated[int, Field(strict=True, ge=0, le=MAX_WIDTH)]],
    Field(min_length=2, max_length=2),
    BeforeValidator(_ratio_from_text),
    AfterValidator(_not_both_zero),
]
Patch = _count(MAX_KERNEL)
AxisPatch = Annotated[list[Patch], Field(min_length=2, max_length=3)]
Factor = Annotated[float, Field(strict=True, gt=0, le=MAX_MLP_RATIO)]
EncoderBlock = Literal["LMS", "GMS", "Conv"]
DecoderBlocks = Annotated[str, StringConstraints(pattern=r"^(Fusion|GMS|Conv)(\+(Fusion|GMS|Conv)){0,15}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BlocksByLevel(_Strict):
    """Which block stands at which level."""

    encoder: PerLevel[EncoderBlock] | None = described(
        None, '"LMS", "GMS", "Conv", per level', "block of an encoder level; null: LMS at levels 1 to 3, GMS below"
    )
    decoder: PerLevel[DecoderBlocks] | None = described(
        None,
        '"Fusion", "GMS", "Conv" or several joined by "+", per level but the lowest',
        "blocks of a decoder level; null: Fusion at levels 1 and 2, Fusion+GMS at level 3, GMS below",
    )


class LGMSSettings(_Strict):
    """What a configuration's ``"lgmsnet"`` key may hold."""

    requires: str | None = described(
        None, f'a version such as "{READABLE_SINCE}"', "lowest version of this plugin that can read these settings"
    )
    widths: PerLevel[Width] | None = described(
        None, f"whole numbers from 1 to {MAX_WIDTH}, per level", "channels of a level; null: 16, 32, 64, then 128"
    )
    depths: PerLevel[Depth] = described(
        1, f"whole numbers from 1 to {MAX_DEPTH}, per level", "repetitions of the encoder's block"
    )
    block_by_level: BlocksByLevel = described(
        BlocksByLevel(),
        'a table with "encoder" and "decoder": each "LMS", "GMS", "Conv" (encoder) or "Fusion", "GMS", "Conv", joined '
        'by "+" (decoder), per level',
        "which block stands where",
    )
    lms_kernels: Literal["auto"] | FlatGroups | ByLevel[Groups] = described(
        [3, 5, 7, 9],
        f"a list of 1 to {MAX_LMS_GROUPS} odd whole numbers up to {MAX_KERNEL}, or per level a list of such numbers "
        'or of one number per axis, or "auto"',
        'depthwise kernel of each channel group of an LMS block; "auto": from the sizes of the objects in the dataset',
    )
    lms_group_channels: GroupChannels | ByLevel[GroupChannels | None] | None = described(
        None,
        "a list with one whole number per kernel, which sum to the channels entering the block, per level",
        "channels of each LMS group; null: as equal as they can be, the first groups one larger",
    )
    gms_ratio: PerLevel[Ratio] = described(
        [3, 1],
        f'"a:b" or [a, b] with whole numbers up to {MAX_WIDTH}, not both 0, per level',
        "Transformer:Conv, how a GMS block splits its channels",
    )
    gms_patch: Patch | AxisPatch = described(
        2,
        f"a whole number from 1 to {MAX_KERNEL}, or one per axis",
        "pixels of an attention patch; p per axis make p^d sequences",
    )
    heads: Heads = described(4, f"a whole number from 1 to {MAX_HEADS}", "attention heads")
    head_dim: HeadDim = described(8, f"a whole number from 1 to {MAX_HEAD_DIM}", "channels of an attention head")
    mlp_ratio: PerLevel[Factor] = described(
        2,
        f"positive numbers up to {MAX_MLP_RATIO}, per level",
        "hidden channels of the feed-forward part over the level's width",
    )
    norm: Literal["paper", "batch", "instance", "group"] = described(
        "paper",
        '"paper", "batch", "instance", "group"',
        "norm of the dense convolutions; paper: batch in 2D, instance without affine in 3D",
    )
    deep_supervision: StrictBool = described(
        False, "true or false", "whether the loss also sees the levels below full resolution"
    )

    @classmethod
    def from_plan(cls, value: Any) -> LGMSSettings:
        """Validates the content of a ``"lgmsnet"`` key.

        Raises:
            ValueError: it needs a newer plugin, holds an unknown name, or a value that is not allowed. One sentence
                names the value, what is allowed, and the way out.
        """
        if not isinstance(value, Mapping):
            raise ValueError(f'"{KEY}" is {shown(value)}: it must be a table of settings, see docs/reference/plans.md.')
        check_required_version(value.get("requires"))
        if strange := [key for key in value if not (isinstance(key, str) and key.isidentifier())]:
            raise ValueError(_unknown(strange[0], list(cls.model_fields)))
        try:
            return cls.model_validate(dict(value))
        except ValidationError as error:
            raise ValueError(_sentence(first_complaint(error, cls, dict(value)))) from None

    def explicit(self) -> dict[str, Any]:
        """The settings that were given, as they stand in a plans file; defaults are left out."""
        return self.model_dump(mode="json", exclude_unset=True)


def merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the settings of ``override``; the two parts of ``block_by_level`` are merged one by one."""
    merged = {**base, **override}
    if isinstance(base.get("block_by_level"), Mapping) and isinstance(override.get("block_by_level"), Mapping):
        merged["block_by_level"] = {**base["block_by_level"], **override["block_by_level"]}
    return merged


def check_required_version(required: Any) -> None:
    """Refuses settings that a newer plugin wrote.

    Raises:
        ValueError: ``required`` is no version, or a newer one than is installed.
    """
    if required is None:
        return
    try:
        if not isinstance(required, str) or len(required) > 40:
            raise InvalidVersion
        required_version = Version(required)
    except InvalidVersion:
        raise ValueError(f'lgmsnet.requires is {shown(required)}: give a version such as "{READABLE_SINCE}".') from None
    if required_version > Version(__version__):
        raise ValueError(
            f"These plans need nnunet_lgms {required_version} or newer, but {__version__} is installed: "
            f"pip install --upgrade 'nnunet-lgms>={required_version}'"
        )


def _sentence(complaint: Complaint) -> str:
    name = ".".join(complaint.path)
    if complaint.kind == "unknown":
        return _unknown(name, list(complaint.known))
    return f"{KEY}.{name} is {complaint.given}: allowed is {complaint.allowed}; see docs/reference/plans.md."


def _unknown(name: Any, known: list[str]) -> str:
    parent, _, child = str(name)[:80].partition(".")
    if parent in known and child:
        return f'lgmsnet has no setting {shown(name)}; write it as {{"{parent}": {{"{child}": ...}}}}.'
    hint = did_you_mean(str(name)[:80].rsplit(".", 1)[-1], known) or f"known are {', '.join(known)}."
    return f"lgmsnet has no setting {shown(name)}; {hint}"


def settings_table() -> str:
    """The table of ``docs/reference/plans.md``, in Markdown."""
    lines = ["| setting | default | allowed | what it does |", "|---|---|---|---|"]
    for name, field in LGMSSettings.model_fields.items():
        if name == "block_by_level":
            for part, sub in BlocksByLevel.model_fields.items():
                lines.append(_row(f"{name}.{part}", sub))
        else:
            lines.append(_row(name, field))
    return "\n".join(lines)


def _row(name: str, field: Any) -> str:
    cells = [f"`{name}`", f"`{json.dumps(field.default)}`", allowed_in(field), field.description]
    return "| " + " | ".join(cells) + " |"
