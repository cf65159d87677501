"""Inputs, weights, outputs and gradients of the authors' network."""

from pathlib import Path

import numpy as np
import torch

VECTORS = Path(__file__).parent / "vectors"


def load(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights by the authors' names, and all arrays of the file."""
    with np.load(VECTORS / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    weights = {key.removeprefix("weights/"): value for key, value in arrays.items() if key.startswith("weights/")}
    return weights, arrays
