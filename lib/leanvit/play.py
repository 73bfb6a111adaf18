"""Interactive corners of the notebooks: choose bases and see the rebuilt gradient; move a budget and see the plan.

`bases` and `plan` give an ipywidgets interface where somebody can move it, and else a picture of a few chosen settings
side by side: under the runner (LEANVIT_RESULT), papermill, nbval and nbconvert, which no one looks at while they run,
and where ipywidgets (extra `[notebooks]`) is missing. Everything drawn is computed by the library on a real model and
a real batch; what is expensive (gradients, scores, singular values) is computed once, before the first picture.
"""

import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from leanvit import extras, lbp_wht, play_bases, play_plan
from leanvit.surgery import Match

Batch = tuple[Tensor, Tensor]  # images (B, C, H, W), labels (B,)


def is_live(live: bool | None = None) -> bool:
    """Whether widgets are wanted: what the caller says, else whether this is a kernel that a person sits in front of.

    JupyterLab names the session in JPY_SESSION_NAME, VS Code puts a name of its own into the notebook; papermill, nbval
    and nbconvert do neither. The runner's LEANVIT_RESULT means a picture. Raises `MissingExtra` (an `ImportError`) for
    `live=True` without ipywidgets.
    """
    if live:
        extras.need("live=True", "notebooks", "ipywidgets")
    if live is not None:
        return live
    there = importlib.util.find_spec("ipywidgets") is not None
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    person = "JPY_SESSION_NAME" in os.environ or "__vsc_ipynb_file__" in getattr(shell, "user_ns", {})
    return there and person and "LEANVIT_RESULT" not in os.environ


def bases(
    model: nn.Module,
    batch: Batch,
    *,
    match: Match | None = None,
    layer: str | None = None,
    shown: Sequence[str] = ("DC", "LP_L1-2", "LP_L1-4", "LP_L1-8"),
    live: bool | None = None,
) -> Any:
    """Choose Walsh functions and see what they leave of a layer's gradient on `batch`.

    A widget, or a figure with the bases `shown` side by side; see `is_live`.

    Args:
        batch: images `(B, C, H, W)` and labels `(B,)`, a few; the loss is cross-entropy, the model stays as it is.
        match: `match(name, module) -> bool` of the layers to choose from.
        layer: the one to start with, by full name; by default one in the middle.
        shown: names as in `lbp_wht.parse_bases`; the widget starts with the last but one.

    Raises:
        ValueError: a layer that is none of them, no layer that gets a gradient, or unknown bases.
        MissingExtra: `live=True` without ipywidgets.
    """
    layers = {found.site.name: found for found in play_bases.capture(model, batch, match)}
    name = layer or [*layers][len(layers) // 2]
    if name not in layers:
        raise ValueError(f"bases: layer={name!r} gets no gradient or does not match; there are {', '.join(layers)}")
    if is_live(live):
        return play_bases.widget(layers, name, batch[0], shown[-2:][0])
    chosen, energy = layers[name], layers[name].energy()
    settings = {what: play_bases.rebuild(chosen, lbp_wht.parse_bases(what, 8, energy)) for what in shown}
    return play_bases.draw(chosen, settings, batch[0])


def plan(
    model: nn.Module,
    batch: Batch,
    *,
    budgets: Sequence[float] = (0.75, 0.5, 0.3, 0.15),
    group: int = 16,
    live: bool | None = None,
) -> Any:
    """Move the FLOPs budget and see what goes, by UVC's scores, by magnitude, and by ComCAT's ranks.

    A widget, or a figure of the `budgets` side by side; see `is_live`. Nothing is trained, so what is lost is what a
    search and a post-training have to bring back.

    Args:
        model: a plain timm ViT; it stays as it is.
        batch: images `(B, C, H, W)` and labels `(B,)` of its own classes: scores and accuracy are measured on them.
        budgets: parts of the dense FLOPs, for the figure.
        group: hidden units go in groups of so many.

    Raises:
        ValueError: a model that cannot be cut, or a budget that cannot be met.
        MissingExtra: `live=True` without ipywidgets.
    """
    plans = play_plan.Plans(model, batch)
    if is_live(live):
        return play_plan.widget(plans, group)
    return play_plan.draw({f"{100 * b:g} % asked": plans.cuts(b, group) for b in budgets}, len(batch[1]))
