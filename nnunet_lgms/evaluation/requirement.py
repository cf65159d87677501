"""The packages of the extra `[evaluation]`, with the way out if they are missing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec

from nnunet_lgms.requirements import RequirementError, install_extra


def require_evaluation_extra() -> None:
    """Raise RequirementError if something of the extra is not installed. Quick: nothing is imported."""
    missing = [name for name in ("monai", "jinja2", "scipy") if find_spec(name) is None]
    if missing:
        raise RequirementError(
            f"Evaluation needs {', '.join(missing)}, which is not installed: {install_extra('evaluation')}"
        )


def monai_metrics() -> tuple[Callable, Callable]:
    """MONAI's `compute_hausdorff_distance` and `compute_surface_dice`; importing them takes seconds."""
    require_evaluation_extra()
    # about deprecated arguments that MONAI passes to itself
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"monai\.")
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    return compute_hausdorff_distance, compute_surface_dice
