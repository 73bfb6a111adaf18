"""The figures of the house: one style, colours for the colour-blind, and the pictures that several notebooks draw."""

from collections.abc import Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

# Okabe and Ito's palette: told apart with every common colour blindness, and in print
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = "#000000 #E69F00 #56B4E9 #009E73 #0072B2 #D55E00 #CC79A7".split()
GREY = "#7F7F7F"
COLORS = [BLUE, VERMILION, GREEN, ORANGE, SKY, PURPLE, BLACK, "#7A6A00"]  # yellow would vanish on white
MARKERS = "oDs^vP*X<>hd"
VERDICT_COLORS = {"matches": "#D9EFE6", "differs": "#FBE3D4", "not run": "#EEEEEE"}


def house() -> None:
    """Set matplotlib's defaults to the style of the house; call it once, in the set-up cell."""
    plt.rcParams.update(
        {
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "font.size": 9.5,
            "axes.titlesize": 10.5,
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#E6E6E6",
            "axes.prop_cycle": plt.cycler(color=COLORS),
            "legend.frameon": False,
            "lines.markersize": 6,
            "image.cmap": "viridis",
        }
    )


def figure(columns: int = 1, rows: int = 1, *, width: float = 4.2, height: float = 3.2, **keywords):
    """`(figure, axes)` of panels of `width` x `height` inches; closed for pyplot, so that a cell shows it once."""
    fig, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), **keywords)
    plt.close(fig)
    return fig, axes


def tiles(
    images: Sequence, titles: Sequence[str] | None = None, *, columns: int = 8, size: float = 0.8, marked=(), **imshow
) -> Figure:
    """Small pictures `(H, W)` or `(H, W, 3)` in a grid; the indices in `marked` get a frame that stands out."""
    rows = -(-len(images) // columns)
    fig, axes = figure(columns, rows, width=size, height=size * (1.25 if titles else 1.0), squeeze=False)
    for i, ax in enumerate(axes.flat):
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
        if i >= len(images):
            ax.axis("off")
            continue
        ax.imshow(np.asarray(images[i]), **imshow)
        frame = {"color": VERMILION, "lw": 2.5} if i in marked else {"color": "#BBBBBB", "lw": 0.5}
        ax.spines[:].set(visible=True, **frame)
        if titles:
            ax.set_title(titles[i], fontsize=7.5, loc="center", pad=2)
    return fig


def heatmap(ax: Axes, values, rows: Sequence, columns: Sequence, *, label: str | None, numbers: str = "", **imshow):
    """A matrix with named rows and columns; `label` of the colour bar (None: no bar), `numbers` a format for cells.

    A cell that is NaN reads "–".
    """
    values = np.asarray(values, dtype=float)
    image = ax.imshow(values, aspect="auto", **imshow)
    ax.grid(False)
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(rows)), rows)
    if numbers:
        dark = image.norm(values) < 0.55
        for (i, j), value in np.ndenumerate(values):
            ink = "white" if dark[i, j] else "black"
            text = "–" if np.isnan(value) else format(value, numbers)
            ax.text(j, i, text, ha="center", va="center", fontsize=7, color=ink)
    if label is not None:
        ax.figure.colorbar(image, ax=ax, label=label)
    return image


def looks(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """A colour and a marker for each name, the same in every figure that is given the same list.

    >>> from leanvit import plots
    >>> plots.looks(["ours", "theirs"])["ours"]
    {'color': '#0072B2', 'marker': 'o'}
    """
    return {
        name: {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]} for i, name in enumerate(names)
    }


def trade_off(
    ax: Axes,
    points: Mapping[str, tuple[float | Mapping, Mapping]],
    look: Mapping[str, Mapping[str, str]],
    *,
    joined: Sequence[str] = (),
    floor: tuple[str, Mapping] | None = None,
    hollow: bool = False,
) -> None:
    """Quality over cost: `{name: (cost, {"mean", "std"})}`, with bars of one standard deviation.

    A cost may be a summary, too. A line joins the names in `joined` (one method at several settings); `floor` is a
    name and summary without a cost, drawn as a band; `hollow` markers are for numbers that are not ours.
    """
    costs = {name: x if isinstance(x, Mapping) else {"mean": x, "std": 0} for name, (x, _) in points.items()}
    line = [name for name in joined if name in points]
    ax.plot([costs[n]["mean"] for n in line], [points[n][1]["mean"] for n in line], color=GREY, lw=1, zorder=1)
    if floor is not None:
        mean, std = floor[1]["mean"], floor[1]["std"]
        ax.axhline(mean, color=GREY, ls="--", lw=1)
        ax.axhspan(mean - std, mean + std, color=GREY, alpha=0.15, lw=0)
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right"}
        ax.annotate(floor[0], (1, mean), (-2, 3), color=GREY, **place)
    for name, (_, y) in points.items():
        face = "white" if hollow else look[name]["color"]
        style = {**look[name], "ls": "none", "mfc": face, "capsize": 3, "label": name, "zorder": 3}
        ax.errorbar(costs[name]["mean"], y["mean"], xerr=costs[name]["std"] or None, yerr=y["std"] or None, **style)


def log_axis(ax: Axes) -> None:
    """A logarithmic x axis with plain numbers at 1, 2, 5, 10, ..."""
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())


def legend_beside(fig: Figure, axes: Iterable[Axes], **keywords) -> None:
    """One legend for all panels, to the right of the figure, each name once."""
    entries: dict[str, object] = {}
    for ax in axes:
        for handle, name in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(name, handle)
    fig.legend(entries.values(), entries.keys(), loc="outside right upper", **keywords)


def dots(ax: Axes, results: Mapping[str, Mapping], colors: Sequence[str]) -> None:
    """One line for each name: mean and standard deviation of `{"mean", "std", "values"}`, a tick for each value."""
    for i, ((_, result), color) in enumerate(zip(results.items(), colors, strict=True)):
        ax.errorbar(result["mean"], i, xerr=result["std"] or None, color=color, marker="o", capsize=3, ls="none")
        ax.plot(result["values"], [i + 0.2] * len(result["values"]), "|", color=color, alpha=0.7)
    ax.set(yticks=range(len(results)), ylim=(len(results) - 0.5, -0.5))
    ax.set_yticklabels(results)


def block_stack(ax: Axes, depth: int, sources: Sequence[int], *, height: int | None = None) -> None:
    """The blocks of a transformer, its input at the bottom, with a copy on top of each block in `sources` (from 0).

    Numbers on the left are places in the expanded stack, those in the boxes the original blocks. What learns is
    coloured; frozen blocks in front of the first copy, which need no backward pass, are pale. `height`: rows to leave
    room for, so that panels side by side have boxes of one size.
    """
    names = [(old, copied) for old in range(depth) for copied in (False, True)[: 1 + (old in sources)]]
    for place, (old, copied) in enumerate(names):
        color = BLUE if copied else "#C9C9C9" if old > min(sources) else "#EFEFEF"
        ax.barh(place, 1, height=0.84, color=color, edgecolor="#999999", lw=0.5)
        style = {"color": "white" if copied else "black", "fontsize": 7}
        ax.text(0.5, place, f"copy of {old}" if copied else str(old), ha="center", va="center", **style)
    ax.barh(len(names), 1, height=0.84, color=BLUE, edgecolor="#999999", lw=0.5)
    ax.text(0.5, len(names), "head", ha="center", va="center", color="white", fontsize=7)
    ax.set(xticks=[], xlim=(0, 1), ylim=(-0.6, (height or len(names)) + 0.6), yticks=range(len(names)))
    ax.tick_params(axis="y", labelsize=6, length=0)
    ax.spines[:].set_visible(False)
    ax.grid(False)


def paint(verdict: str) -> str:
    """The CSS of a table cell with a verdict."""
    return f"background-color: {VERDICT_COLORS[verdict]}; color: black"


def ledger(frame: pd.DataFrame):
    """The table of `claims.table` with a colour for each verdict, for display."""
    left = [{"selector": "th, td", "props": "text-align: left; vertical-align: top"}]
    return frame.style.map(paint, subset=["verdict"]).hide(axis="index").set_table_styles(left)
