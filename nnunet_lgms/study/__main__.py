"""``python -m nnunet_lgms.study STEP STUDY DONE …``: one step of a study, as the rules of ``workflow/`` call it."""

from __future__ import annotations

import sys
from pathlib import Path

from nnunet_lgms.requirements import RequirementError
from nnunet_lgms.sentences import sentence

STEPS = ("convert", "plan", "preprocess", "override", "profile", "train", "validate")
STEPS += ("find_best", "predict", "evaluate", "zeroshot", "report")


def main(step: str, study: str, done: str, *names: str) -> int:
    """Runs a step; ``done`` is the file that says so afterwards, ``names`` are the rule's wildcards."""
    from nnunet_lgms.study.graph import Graph

    if step == "report":  # which needs no PyTorch
        from nnunet_lgms.study.report import write as run
    else:
        from nnunet_lgms.study import steps

        run = getattr(steps, step)
    try:
        run(Graph(study), Path(done).absolute(), *names)
    except (ValueError, OSError, MemoryError, RequirementError) as error:
        print(f"nnunet_lgms.study: {sentence(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 4 or sys.argv[1] not in STEPS:
        sys.exit(f"usage: python -m nnunet_lgms.study STEP STUDY DONE [NAME…], with STEP one of {', '.join(STEPS)}")
    sys.exit(main(*sys.argv[1:]))
