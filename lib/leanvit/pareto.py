"""Which of many models are worth having: Pareto fronts over costs and merits, drawn, and a choice under limits."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

FAINT = 0.28  # opacity of what is dominated


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of the points `(cost, merit)` that no other dominates, by rising cost.

    One dominates another where it costs no more, is at least as good, and differs in one of the two; equal points
    stand side by side. Raises `ValueError` for a coordinate that is not finite.

    >>> from leanvit import pareto
    >>> pareto.front({"cheap": (1, 0.5), "good": (2, 0.9), "neither": (2, 0.7)})
    ['cheap', 'good']
    """
    for name, point in points.items():
        if not all(math.isfinite(value) for value in point):
            raise ValueError(f"front: {name} lies at {point}; costs and merits must be finite numbers")

    def dominated(point: tuple[float, float]) -> bool:
        cost, merit = point
        return any(c <= cost and m >= merit and (c, m) != (cost, merit) for c, m in points.values())

    return sorted((n for n, p in points.items() if not dominated(tuple(p))), key=lambda n: tuple(points[n]))


def draw(
    ax: Axes,
    points: Mapping[str, tuple[Mapping, Mapping]],
    look: Mapping[str, Mapping[str, str]],
    *,
    label: Mapping[str, str] | None = None,
) -> list[str]:
    """Merit over cost, both summaries `{"mean", "std"}`; a stair joins the front of the means, the rest is faint.

    `look` and `label` are by name (without a label, the name is in the legend). Returns the front; raises `ValueError`
    as it does.
    """
    best = front({n: (cost["mean"], merit["mean"]) for n, (cost, merit) in points.items()})
    stairs = [(points[n][0]["mean"], points[n][1]["mean"]) for n in best]
    ax.step(*zip(*stairs, strict=True), where="post", color="#999999", lw=1, zorder=1)
    for name, (cost, merit) in points.items():
        strong = {"alpha": 1.0, "zorder": 3} if name in best else {"alpha": FAINT, "zorder": 2}
        style = {**look[name], "ls": "none", "capsize": 2, "elinewidth": 0.8, "label": (label or {}).get(name, name)}
        spread = {"xerr": cost["std"] or None, "yerr": merit["std"] or None}
        ax.errorbar(cost["mean"], merit["mean"], **spread, **style, **strong)
    return best


def choose(
    rows: Sequence[Mapping[str, Any]],
    most: str,
    *,
    at_most: Mapping[str, float] | None = None,
    at_least: Mapping[str, float] | None = None,
) -> Mapping[str, Any] | None:
    """The row with the largest `most` among those within all limits (by column), or None where none is.

    A row whose value is missing (None or NaN) does not keep a limit. Equals: the earlier row. Raises `KeyError` for a
    column that a row does not have.

    >>> from leanvit import pareto
    >>> rows = [{"name": "a", "accuracy": 0.9, "ms": 8}, {"name": "b", "accuracy": 0.8, "ms": 2}]
    >>> pareto.choose(rows, "accuracy", at_most={"ms": 5})["name"]
    'b'
    """

    def known(value: float | None) -> bool:
        return value is not None and not math.isnan(value)

    def kept(row: Mapping[str, Any]) -> bool:
        low = all(known(row[c]) and row[c] <= limit for c, limit in (at_most or {}).items())
        return low and all(known(row[c]) and row[c] >= limit for c, limit in (at_least or {}).items())

    return max((r for r in rows if kept(r) and known(r[most])), key=lambda r: r[most], default=None)
