"""The settings under a configuration's ``"lgmsnet"`` key."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnunet_lgms.config.settings import KEY, LGMSSettings, merge

if TYPE_CHECKING:
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

__all__ = ["KEY", "LGMSSettings", "merge", "settings_of"]


def settings_of(configuration_manager: ConfigurationManager) -> LGMSSettings:
    """The settings of a configuration; the paper's where its plan says nothing.

    Raises:
        ValueError: they are invalid or need a newer plugin.
    """
    return LGMSSettings.from_plan(configuration_manager.configuration.get(KEY, {}))
