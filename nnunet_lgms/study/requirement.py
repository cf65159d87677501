"""The packages of the extra `[study]`, with the way out if they are missing."""

from __future__ import annotations

from importlib.util import find_spec

from nnunet_lgms.evaluation.requirement import require_evaluation_extra
from nnunet_lgms.requirements import RequirementError, install_extra


def require_study_extra() -> None:
    """Raise RequirementError if something of the extra is not installed. Quick: nothing is imported."""
    if missing := [name for name in ("snakemake", "yaml") if find_spec(name) is None]:
        raise RequirementError(f"A study needs {', '.join(missing)}, which is not installed: {install_extra('study')}")
    require_evaluation_extra()
