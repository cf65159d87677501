"""The page that evaluations, zero-shot tests and studies share: one style, intervals below means, pictures inside."""

from __future__ import annotations

import math
from importlib import resources
from typing import Any

from nnunet_lgms.evaluation.statistics import PairedTest

SHARED = ("page.html", "tables.html")
"""What every report extends, and the macros of their tables."""

NO_DIFFERENCE = "no difference shown"


def render(package: str, template: str, **content: Any) -> str:
    """A report as one HTML text that needs no other file.

    Args:
        package: where the template lies.
        template: its name; it extends `page.html`.
        content: its variables. Text is escaped.
    """
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    def read(name: str) -> str:
        return resources.files(__package__ if name in SHARED else package).joinpath(name).read_text("utf-8")

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, loader=FunctionLoader(read), trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(**content)


def number(value: float) -> str:
    """Three decimals for fractions, two for distances; a dash for none."""
    if math.isnan(value):
        return "–"
    return f"{value:.3f}" if abs(value) < 2 else f"{value:.2f}"


def signed(value: float) -> str:
    """A difference; a dash for none."""
    return number(value) if math.isnan(value) else ("+" if value >= 0 else "−") + number(abs(value))


def interval(low: float, high: float) -> str:
    """`[0.812, 0.874]`, empty if there is none."""
    return "" if math.isnan(low) else f"[{number(low)}, {number(high)}]"


def p_value(value: float) -> str:
    """Three decimals, and powers of ten for what these would show as nothing."""
    if math.isnan(value):
        return "–"
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}".replace("e-0", "e-")


def verdict(test: PairedTest) -> str:
    """Which model is better, if the corrected test shows that; `NO_DIFFERENCE` otherwise."""
    return f"{test.better} is better" if test.better else NO_DIFFERENCE
