"""ComCAT's surgery (arXiv 2305.17235, Eq. 1 to 3): physically smaller modules in the places that a plan names.

Also the files of models so made.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from leanvit import cuts, surgery
from leanvit.comcat_factors import Spectrum
from leanvit.comcat_modules import (
    FactoredAttention,
    FactoredLinear,
    factored_attention,
    factored_linear,
    query_side,
    read_heads,
    read_linear,
)
from leanvit.comcat_plan import PLAN, Part, Plan, check_plan, parts, plan_of
from leanvit.surgery import Report

Cut = Callable[[str, Tensor, Tensor | None], tuple[Tensor, Tensor]]


class Cutter:
    """Makes the factored modules of a plan, from dense modules or from factored ones.

    `cut(part, a, b)` factors the product `a b`, `([H,] in, out)` (or `a` alone, where b is None) into `left ([H,] in,
    r)` and `right ([H,] r, out)`; `shift(part, a, b, left, right)` is the mean output `(out,)` that this loses, for the
    bias to take over.
    """

    def __init__(self, plan: Plan, cut: Cut, shift: Callable[..., Tensor] | None = None):
        self.plan, self.cut, self.shift = plan, cut, shift

    @classmethod
    def by_svd(cls, plan: Plan, statistics=None) -> "Cutter":
        """Truncated SVDs, weighted by `statistics` where given. Its `make` raises `ValueError` for weights with NaN."""

        def cut(name: str, a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
            rank = plan.ranks[name]
            if a.is_meta:
                outputs = (a if b is None else b).shape[-1]
                return a.new_empty(*a.shape[:-1], rank), a.new_empty(*a.shape[:-2], rank, outputs)
            weighting = (None, None) if statistics is None else statistics.weighting(name, a.shape[-2])
            try:
                return Spectrum(a, b, *weighting).factors(rank, plan.mode == "corrected")
            except ValueError as error:
                raise ValueError(f"ComCAT: {name} cannot be factored: {error}") from None

        return cls(plan, cut, None if statistics is None else statistics.shift)

    def make(self, part: Part, module: nn.Module) -> nn.Module:
        """What takes the place of the module that `part` belongs to."""
        return (self.linear if part.kind == "fc" else self.attention)(part.module, module)

    def attention(self, name: str, m: nn.Module) -> FactoredAttention:
        """The attention `m` with the plan's ranks, its biases absorbed where the plan says so (specification 1.3)."""
        h, ranks, bias = read_heads(m), self.plan.ranks, self.plan.bias
        qk, vo = f"{name}.qk" in ranks, f"{name}.vo" in ranks
        # something between queries and keys, or behind the values, needs their own biases
        product = f"{name}.qk" in self.plan.shapes
        merged = f"{name}.vo" in self.plan.shapes
        dense_o = h.v, h.o
        if qk:
            left, right = self.cut(f"{name}.qk", query_side(h, bias == "absorb"), h.k.mT)
            h.q, h.k = left[:, : h.q.shape[1]], right.mT
            h.bq = left[:, -1] if bias == "absorb" else left.new_zeros(left.shape[0], left.shape[2])
        if product:
            h.bk = torch.zeros_like(h.bq)
        if vo:
            h.v, h.o = self.cut(f"{name}.vo", h.v, h.o)
        if merged and bias == "absorb":
            h.bo = h.bo + torch.einsum("hk,hko->o", h.bv, dense_o[1])
            if vo and self.shift is not None:
                h.bo = h.bo + self.shift(f"{name}.vo", *dense_o, h.v, h.o)
        if merged:
            h.bv = h.v.new_zeros(h.v.shape[0], h.v.shape[2])
        if bias != "absorb":
            h.bq, h.bk, h.bv, h.bo = (torch.zeros_like(b) for b in (h.bq, h.bk, h.bv, h.bo))
        rows = h.q.shape[0] * h.q.shape[2]
        biased = {"none": 0, "zero": 2 * rows + h.bv.numel()}.get(bias)
        if biased is None:
            biased = rows if merged and product else 2 * rows if merged else 2 * rows + h.bv.numel()
        return factored_attention(m, h, biased=biased, proj_bias=bias != "none")

    def linear(self, name: str, m: nn.Module) -> FactoredLinear:
        """The linear layer `m`, dense or factored, with the rank of the plan."""
        a, b, bias = read_linear(m)
        left, right = self.cut(name, a, b)
        if bias is not None and self.shift is not None:
            bias = bias + self.shift(name, a, b, left, right)
        return factored_linear(m, left, right, bias)


@torch.no_grad()
def apply(model: nn.Module, plan: Plan, statistics=None) -> Report:
    """Put physically smaller modules in the places that `plan` names. In place, all or nothing.

    Args:
        statistics: `comcat_calibrate.calibrate(...)` of this model, for data-aware factors; without it plain SVD.

    Returns:
        A `Report`: the parts factored, those that cannot be with the reason, the parameter counts.

    Raises:
        ValueError: the plan is for other shapes, the model is factored already, or a weight holds NaN; `TypeError` for
            something that is no plan. The model is then as it was.

    >>> from leanvit import comcat, models
    >>> model = models.create("embedded_vit", depth=1)
    >>> report = comcat.apply(model, comcat.make_plan(model, {"qk": 16, "vo": 16, "fc1": 32}))
    >>> model.blocks[0].mlp.fc1.first, model.blocks[0].mlp.fc1.second
    (Linear(in_features=96, out_features=32, bias=False), Linear(in_features=32, out_features=384, bias=True))
    """
    found = check_plan(model, plan)
    skipped = parts(model)[1]
    if statistics is not None:
        statistics.check(plan)
    cutter, new = Cutter.by_svd(plan, statistics), {}
    for part in found:
        if part.name not in plan.ranks or part.module in new:
            continue
        new[part.module] = cutter.make(part, model.get_submodule(part.module))
    drop = [n for n in new if getattr(getattr(model.get_submodule(n), "attn_drop", None), "p", 0) > 0]
    for name, module in new.items():
        surgery.replace(model, name, module)
    remember(model, plan)
    kept = {p.name: "stays dense" for p in found if p.name not in plan.ranks}
    report = Report("ComCAT", [p.name for p in found if p.name in plan.ranks], skipped | kept, *surgery.count(model))
    report.notes.append("plain SVD" if statistics is None else f"data-aware factors from {statistics.images} images")
    if statistics is not None:
        report.notes += statistics.notes
    if plan.bias != "absorb":
        report.notes.append("the biases of the attention are thrown away, as in the released code")
    elif drop:
        report.notes.append("attention dropout: the values' bias is absorbed exactly in eval mode only")
    return report


def product(model: nn.Module, part: Part, absorb: bool = True) -> tuple[Tensor, Tensor | None]:
    """The thin factors `([H,] in, k)` and `([H,] k, out)` of a part as it is now, dense or factored.

    `(W, None)` of a dense layer. `absorb`: the queries' bias is a last row of the left factor of W_QK.
    """
    module = model.get_submodule(part.module)
    if part.kind == "fc":
        return read_linear(module)[:2]
    h = read_heads(module)
    return (query_side(h, absorb), h.k.mT) if part.kind == "qk" else (h.v, h.o)


# --- save and load ---------------------------------------------------------------------------------------------------


def save(model: nn.Module, path: str | Path, header: dict | None = None) -> Path:
    """Write every tensor of a factored model, with its plan in the header: 4 bytes a parameter and the header.

    Raises `ValueError` for a model that is not factored, `OSError` when the file cannot be written.
    """
    plan_of(model, "save")
    return cuts.save(model, path, header=header)


def load(model: nn.Module, path: str | Path) -> dict:
    """Make `model`, dense and of the saved architecture, the saved one: the plan's shapes, then the tensors. In place.

    What UVC cut before or afterwards is cut, too. Returns the file's header. Raises `ValueError` for a file without a
    plan of ComCAT or another architecture, and `FileNotFoundError`; the model is then as it was.
    """
    if not any(method == "comcat" for method, _ in cuts.stored(path)):
        raise ValueError(f"load: {path} holds no model factored by ComCAT")
    return cuts.load(model, path)


@torch.no_grad()
def rebuild(model: nn.Module, text: str) -> None:
    """Give a dense `model` the shapes of a plan (JSON), without the SVDs: the values come from a file.

    Raises `ValueError` for a text that is no plan, and as `check_plan` (`ValueError`, `TypeError`) for another model.
    """
    plan = Plan.from_json(text)
    found = check_plan(model, plan)
    cutter, new = Cutter.by_svd(plan), {}
    for part in found:
        if part.name in plan.ranks and part.module not in new:
            old = model.get_submodule(part.module)
            empty, weight = cutter.make(part, copy.deepcopy(old).to("meta")), next(old.parameters())
            new[part.module] = empty.to_empty(device=weight.device).requires_grad_(weight.requires_grad)
    for name, module in new.items():
        surgery.replace(model, name, module)
    remember(model, plan)


def remember(model: nn.Module, plan: Plan | None) -> None:
    """Note the plan by which a model is factored now, instead of the one before; None: it is dense again."""
    setattr(model, PLAN, plan)
    if plan is None:
        cuts.forget(model, "comcat")
    else:
        cuts.record(model, "comcat", plan.to_json(), instead=True)
