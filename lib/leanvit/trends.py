"""Trends: what a few seeds can say about "A is more than B".

A trend is a difference paired by seed (the same seed on both sides), summed up by `record.summary`. The rule of every
notebook: a difference is clear when three seeds or more agree so far that its mean exceeds its spread (the sample
standard deviation, ddof = 1).
"""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from leanvit import record

Summary = dict[str, Any]
SEEDS = 3  # fewer decide nothing


def less(one: Sequence[float], other: Sequence[float]) -> Summary:
    """Summary of `one` less `other`, value by value, in their unit. Raises `ValueError` for unequal lengths.

    >>> from leanvit import trends
    >>> trends.less([3.0, 5.0], [1.0, 4.0])["values"]
    [2.0, 1.0]
    """
    if len(one) != len(other):
        raise ValueError(f"less: {len(one)} and {len(other)} values; differences are paired, one of each a seed")
    return record.summary(np.subtract(one, other))


def clear(difference: Summary) -> bool:
    """More than zero, and not by chance: three seeds or more, mean above the spread."""
    return bool(difference["n"] >= SEEDS and difference["mean"] > difference["std"])


def outcome(difference: Summary, holds: bool | None = None) -> str:
    """"holds", "reversed" (clearly less), "undecided" (drowned in the spread) or "too few seeds".

    `holds` takes the place of `clear` where a trend has a rule of its own, such as "within one point".
    """
    if difference["n"] < SEEDS:
        return "too few seeds"
    if clear(difference) if holds is None else holds:
        return "holds"
    return "reversed" if clear({**difference, "mean": -difference["mean"]}) else "undecided"


def weakest(differences: dict[Hashable, Summary]) -> tuple[Hashable, Summary]:
    """The pair on which "all of these hold" hangs: one that is not clear, else the smallest mean."""
    return min(differences.items(), key=lambda item: (clear(item[1]), item[1]["mean"]))
