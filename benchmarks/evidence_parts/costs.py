"""Parameters and GMAC of everything in the tables, counted on the meta device."""

from __future__ import annotations

from pathlib import Path

import torch
from compared import NETWORKS, build

from nnunet_lgms.files import read_json
from nnunet_lgms.planning.profile import LGMSNET, NNUNET, Subject, count_gmac

from .runs import STAGES

SIZES = {"2D 256²": (3, 1, 7, (256, 256)), "3D 96³": (1, 14, 6, (96, 96, 96))}  # channels, classes, nnU-Net's levels


def count_costs(preprocessed: Path) -> dict[str, dict]:
    """``{"runs": {dataset: {model: {parameters, gmac}}}, "sizes": {size: {network: …}}}``; GMAC of one patch."""
    rows: dict[str, dict] = {}
    for stage in STAGES.values():
        for name, model in stage.models.items():
            plans = read_json(preprocessed / stage.dataset / f"{model.plans_name}.json")
            kind = NNUNET if model.trainer == "nnUNetTrainer" else LGMSNET
            description = read_json(preprocessed / stage.dataset / "dataset.json")
            subject = Subject(kind, plans, stage.configuration, description)
            with torch.device("meta"):
                network = subject.build(deep_supervision=False)
            rows.setdefault(stage.dataset, {})[name] = _cost(network, subject.input_shape(batch=1))
    sizes: dict[str, dict] = {}
    for size, (channels, classes, levels, shape) in SIZES.items():
        for name in NETWORKS:
            with torch.device("meta"):
                network = build(name, len(shape), channels, classes, levels)
            sizes.setdefault(size, {})[name] = _cost(network, (1, channels, *shape))
    return {"runs": rows, "sizes": sizes}


def _cost(network: torch.nn.Module, shape: tuple[int, ...]) -> dict:
    return {"parameters": sum(p.numel() for p in network.parameters()), "gmac": count_gmac(network, shape)}
