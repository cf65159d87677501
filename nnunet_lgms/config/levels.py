"""Values that differ from level to level.

A plan decides how many levels there are, so a setting must be able to say "level 3" and "level 4 and all below" without
knowing that number. A per-level setting is therefore one of

- one value, for every level;
- a list, one entry per level, full resolution first;
- a table from level to value: ``{"1": a, "3": b, "4+": c}``, where ``"4+"`` means level 4 and every level below it, if
  there is any. The most exact name wins; levels that are not named keep the default.

Levels are counted from 1 at full resolution, as in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import Field, StringConstraints

from nnunet_lgms.files import shown

LevelName = Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]?\+?$")]
Value = TypeVar("Value")
NotEmpty = Field(min_length=1)
ByLevel = Annotated[list[Value], NotEmpty] | Annotated[dict[LevelName, Value], NotEmpty]
PerLevel = Value | Annotated[list[Value], NotEmpty] | Annotated[dict[LevelName, Value], NotEmpty]


def spread(
    setting: Any, n_levels: int, default: Callable[[int], Any], name: str, is_single: Callable[[Any], bool]
) -> list[Any]:
    """One value per level.

    Args:
        setting: a validated per-level setting; None is the default at every level.
        n_levels: levels that the plan has for it.
        default: value of a level that the setting does not name, by its number.
        name: of the setting, for messages.
        is_single: tells one value for all levels from a list of values.

    Raises:
        ValueError: a list has the wrong length, or a table names a level that the plan does not have.
    """
    levels = range(1, n_levels + 1)
    if setting is None:
        return [default(level) for level in levels]
    if isinstance(setting, Mapping):
        return _spread_table(setting, levels, default, name)
    if is_single(setting):
        return [setting for _ in levels]
    if len(setting) != n_levels:
        raise ValueError(
            f"lgmsnet.{name} has {len(setting)} entries ({shown(setting)}), but the plan has {n_levels} levels for "
            f'it: give {n_levels} entries, one value for all, or a table such as {{"1": …, "2+": …}}.'
        )
    return list(setting)


def _spread_table(table: Mapping[str, Any], levels: Sequence[int], default: Callable, name: str) -> list[Any]:
    for key in table:
        # "7+" may be empty: it lets one override serve plans of different depth. "7" by itself is a claim.
        if not key.endswith("+") and int(key) not in levels:
            raise ValueError(
                f"lgmsnet.{name} names level {key}, which it does not have in this plan: allowed are levels 1 to "
                f'{len(levels)}, or "{key}+" for "level {key} and below, if there is one".'
            )
    values = []
    for level in levels:
        key = key_for(table, level)
        values.append(default(level) if key is None else table[key])
    return values


def key_for(table: Mapping[str, Any], level: int) -> str | None:
    """The most exact name that a table has for a level; None where it has none."""
    if str(level) in table:
        return str(level)
    open_ends = [int(key[:-1]) for key in table if key.endswith("+") and int(key[:-1]) <= level]
    return f"{max(open_ends)}+" if open_ends else None
