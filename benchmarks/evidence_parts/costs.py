"""Parameters and GMAC of the networks in the tables, counted on the meta device."""

from __future__ import annotations

import torch
from compared import NETWORKS, build, parameters

from nnunet_lgms.planning.profile import count_gmac

SIZES = {"2D 256²": (3, 1, 7, (256, 256)), "3D 96³": (1, 14, 6, (96, 96, 96))}  # channels, classes, nnU-Net's levels


def count_costs() -> dict[str, dict]:
    """``{"sizes": {size: {network: {parameters, gmac}}}}``; GMAC of one patch."""
    sizes: dict[str, dict] = {}
    for size, (channels, classes, levels, shape) in SIZES.items():
        for name in NETWORKS:
            with torch.device("meta"):
                network = build(name, len(shape), channels, classes, levels)
            gmac = count_gmac(network, (1, channels, *shape))
            sizes.setdefault(size, {})[name] = {"parameters": parameters(network), "gmac": gmac}
    return {"sizes": sizes}
