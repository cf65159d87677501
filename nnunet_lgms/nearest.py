"""What somebody may have meant by a name that is not known."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

#: below it two names have no more in common than any two words
NEAR = 0.65
#: behind the nearest by more than this, a name is none that was meant as well
BEHIND = 0.1
#: a name that only shares a word counts for less than one that is written alike
PART = 0.9


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"did you mean 'gms_ratio' or 'mlp_ratio'?"``: up to three names as near as each other, or "" if none is near.

    Capitals do not count, and ``ratio`` is near ``gms_ratio`` for the word that they share.
    """
    scores = {candidate: _nearness(name.casefold()[:80], candidate.casefold()) for candidate in known}
    best = max(scores.values(), default=0)
    # sorted() is stable: of names equally near, the first known comes first
    near = [c for c in sorted(scores, key=scores.get, reverse=True) if scores[c] >= max(NEAR, best - BEHIND)][:3]
    if not near:
        return ""
    *first, last = map(repr, near)
    return f"did you mean {', '.join(first)}{' or ' if first else ''}{last}?"


def _nearness(name: str, candidate: str) -> float:
    words = candidate.split("_")
    parts = [PART * _alike(name, word) for word in words] if len(words) > 1 else []
    return max([_alike(name, candidate), *parts])


def _alike(a: str, b: str) -> float:
    return SequenceMatcher(None, b, a, autojunk=False).ratio()
