"""Budgets to play with: what UVC's scores, magnitude and ComCAT's ranks leave of a model. See `play.plan`."""

import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from leanvit import comcat, comcat_ranks, plots, surgery, uvc_budget, uvc_importance, uvc_plan, uvc_slicing
from leanvit.comcat_cut import Cutter
from leanvit.evaluate import device_of
from leanvit.play_bases import panels, png
from leanvit.uvc_cost import FlopsCost
from leanvit.uvc_math import group_norms
from leanvit.uvc_training import Hooks, cross_entropy


@dataclass(frozen=True)
class Cut:
    """A model cut to a budget and not trained again: bars by block, and what is left."""

    kept: dict[str, list[float]]  # {kind of group: part of it that stays, by block}; NaN in skipped blocks
    flops: float  # part of the dense FLOPs, classifier left out
    parameters: int
    accuracy: float  # on the images at hand


class Plans:
    """Scores of a model's groups and singular values of its layers, computed once; then plans for any budget.

    `batch`: images `(B, 3, H, W)` and labels `(B,)`.
    """

    def __init__(self, model: nn.Module, batch: tuple[Tensor, Tensor]):
        self.model = copy.deepcopy(model).eval()
        self.images, self.labels = (t.to(device_of(model)) for t in batch)
        self.shapes = uvc_plan.read_shapes(self.model)
        self.cost = FlopsCost(self.shapes)
        self.importance = self._importance()
        self.magnitude = group_norms(self.model, self.shapes)
        self.statistics = comcat.calibrate(self.model, [self.images])
        self.spectra = comcat.spectra(self.model, self.statistics)
        self.curves = self._curves()
        # blocks go only where widths cannot meet the budget, the least important first
        self.gates = [float(n.heads.sum() + n.units.sum()) for n in self.importance]

    def _importance(self) -> list:
        net = copy.deepcopy(self.model).train()
        hooks = Hooks(net, self.shapes.prefix, self.shapes.patches)
        hooks.probes = {}
        cross_entropy(net, self.images, self.labels).backward()
        return uvc_importance.as_norms(self.shapes, uvc_importance.squares(self.shapes, hooks.probes))

    def _curves(self) -> dict[str, comcat_ranks.Points]:
        """By part in the blocks, what each rank takes (multiply-adds of an image, without padding) and keeps."""
        curves, tokens = {}, self.shapes.tokens
        for part in (p for p in comcat.parts(self.model)[0] if p.name.startswith("blocks.")):
            energy = self.spectra[part.name].energy
            pairs = 0 if part.kind == "fc" else tokens**2 * part.heads  # of queries and keys, of scores and values
            curves[part.name] = [
                (rank, tokens * weights + pairs * (rank or part.full), gain)
                for rank, weights, gain in comcat_ranks.curve(part, energy, weight=1 / float(energy.sum()))
            ]
        return curves

    def smallest(self, group: int) -> float:
        """The smallest part of the FLOPs that a plan in groups of so many units can have."""
        return uvc_budget.floor(self.cost, round_units=group, round_dims=None, skip=True)

    def uvc(self, budget: float, group: int = 16, by: str = "importance") -> uvc_plan.Plan:
        """The plan at `budget` of the dense FLOPs that keeps most of a score: "importance" (`uvc_importance`, on the
        images at hand) or "magnitude" (norms of the weights); hidden units go in groups of `group`.
        """
        norms, absolute = (self.importance, True) if by == "importance" else (self.magnitude, False)
        how = {"gates": self.gates, "round_units": group, "absolute": absolute}
        return uvc_budget.meet(self.cost, norms, budget, **how)

    def pruned(self, budget: float, group: int = 16, by: str = "importance") -> Cut:
        """`uvc`'s plan, carried out."""
        plan, net = self.uvc(budget, group, by), copy.deepcopy(self.model)
        uvc_slicing.apply(net, plan)
        pairs = [*zip(self.shapes.blocks, plan.blocks, strict=True)]
        heads = [float("nan") if b is None else len(b.heads) / s.heads for s, b in pairs]
        units = [float("nan") if b is None else len(b.units) / s.hidden for s, b in pairs]
        return Cut({"heads": heads, "hidden units": units}, plan.ratio(), surgery.count(net)[1], self._accuracy(net))

    def ranks(self, budget: float) -> dict[str, int | None]:
        """Ranks of all parts in the blocks (None: dense) that keep most energy within `budget` of the dense FLOPs."""
        curves = self.curves
        best = {name: points[0][0] for name, points in curves.items()}
        least = sum(points[0][1] for points in curves.values())
        limit = int(budget * self.cost.dense)
        aim = limit - self._macs({}) + sum(points[-1][1] for points in curves.values())
        for _ in range(8):  # padding is known only with the ranks
            found = comcat_ranks.project(curves, max(aim, least))
            over = self._macs(found) - limit
            if over <= 0 and self._macs(found) > self._macs(best):
                best = found
            if -limit // 200 < over <= 0:
                break
            aim -= over + limit // 1000
        return best

    def _macs(self, ranks: dict[str, int | None]) -> int:
        """Multiply-adds of one image at these ranks, as torch counts them."""
        blocks = []
        for i, shape in enumerate(self.shapes.blocks):
            qk, vo, *mlp = (ranks.get(f"blocks.{i}.{part}") for part in ("attn.qk", "attn.vo", "mlp.fc1", "mlp.fc2"))
            values = (vo,) * shape.heads if vo else shape.values
            padded = bool(qk or vo) or shape.padded
            new = replace(shape, head_dim=qk or shape.head_dim, values=values, mlp_ranks=tuple(mlp), padded=padded)
            blocks.append(new)
        return uvc_plan.dense_macs(replace(self.shapes, blocks=tuple(blocks)))

    def factored(self, budget: float) -> Cut:
        """ComCAT's plan of the greedy `ranks`, carried out with data-aware factors."""
        ranks, net = self.ranks(budget), copy.deepcopy(self.model)
        chosen = comcat.make_plan(net, ranks)
        factors = {n: self.spectra[n].factors(r) for n, r in chosen.ranks.items()}
        cutter = Cutter(chosen, lambda name, a, b: factors[name], self.statistics.shift)
        found = {p.name: p for p in comcat.parts(net)[0]}
        with torch.no_grad():
            for module in dict.fromkeys(found[n].module for n in chosen.ranks):
                part = next(p for p in found.values() if p.module == module)
                surgery.replace(net, module, cutter.make(part, net.get_submodule(module)))
        kept = {}
        for part in found.values():
            if part.name in ranks:
                share = min(chosen.ranks.get(part.name, part.full), part.full) / part.full
                kept.setdefault(part.name.rpartition(".")[2], []).append(share)
        flops = self._macs(chosen.ranks) / self.cost.dense
        return Cut(kept, flops, surgery.count(net)[1], self._accuracy(net))

    def cuts(self, budget: float, group: int = 16) -> dict[str, Cut]:
        """All three ways to meet a budget, by name."""
        return {
            "UVC, by importance": self.pruned(budget, group),
            "by magnitude": self.pruned(budget, group, "magnitude"),
            "ComCAT, ranks": self.factored(budget),
        }

    @torch.no_grad()
    def _accuracy(self, net: nn.Module) -> float:
        return (net.eval()(self.images).argmax(1) == self.labels).float().mean().item()


def draw(settings: dict[str, dict[str, Cut]], images: int, across: bool = False) -> Figure:
    """Bars of what stays, by block: a row for each way to cut and a column for each of the settings (or `across`)."""
    ways = len(next(iter(settings.values())))
    shape = (ways, len(settings)) if across else (len(settings), ways)
    fig, axes = panels(*shape, width=3.6 if across else 2.7, height=2.5, gaps=(0.45, 0.65))
    for column, (asked, cuts) in zip(axes if across else axes.T, settings.items(), strict=True):
        for ax, (name, cut) in zip(column, cuts.items(), strict=True):
            _blocks(ax, cut)
            size = f"{cut.parameters / 1e3:.0f} k" if cut.parameters < 1e6 else f"{cut.parameters / 1e6:.1f} M"
            ax.set_title(f"{name}, {asked}\nFLOPs {cut.flops:.1%}, {size} param., {cut.accuracy:.0%} right", fontsize=8)
    for ax in axes[-1]:
        ax.set_xlabel("block", fontsize=8)
    title = f"What a FLOPs budget leaves of each block (right: of {images} images, cut and not trained again)"
    fig.suptitle(title, fontsize=10.5)
    return fig


def _blocks(ax: Axes, cut: Cut) -> None:
    """Grouped bars, one group a block; a cross where the whole block goes."""
    width = 0.8 / len(cut.kept)
    for i, (kind, share) in enumerate(cut.kept.items()):
        places = np.arange(len(share)) + (i - (len(cut.kept) - 1) / 2) * width
        ax.bar(places, np.nan_to_num(share), width, color=plots.COLORS[i], label=kind)
    for block in np.flatnonzero(np.isnan(next(iter(cut.kept.values())))):
        ax.text(block, 0.05, "×", ha="center", color=plots.VERMILION, fontsize=12)
    ax.set(ylim=(0, 1.25), yticks=[0, 0.5, 1], yticklabels=["0", "half", "all"], xticks=range(len(share)))
    ax.tick_params(labelsize=8)
    ax.legend(fontsize=7, ncols=len(cut.kept), loc="upper right", handlelength=1, columnspacing=0.8)


def widget(plans: Plans, group: int) -> Any:
    """The budget, and the size of the groups of hidden units, above the picture."""
    import ipywidgets as w

    budget = w.FloatSlider(0.5, min=0.01, max=1, step=0.01, description="budget", readout_format=".0%")
    groups = w.SelectionSlider(options=sorted({1, 4, 16, 64, group}), value=group, description="units by")
    shown = w.Image(format="png", layout={"max_width": "100%"})

    def show(_: Any = None) -> None:
        cuts = plans.cuts(budget.value, groups.value)
        shown.value = png(draw({f"{budget.value:.0%} asked": cuts}, len(plans.labels), across=True))

    def bound(_: Any = None) -> None:
        """The slider ends where no plan is left; moving its end may move the budget, which shows it."""
        before = budget.value
        budget.min = np.ceil(100 * plans.smallest(groups.value)) / 100
        if budget.value == before:
            show()

    budget.observe(show, "value")
    groups.observe(bound, "value")
    bound()
    return w.VBox([w.HBox([budget, groups]), shown])
