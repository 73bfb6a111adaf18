"""A model that a search cuts again and again: its factors of now, and what was dropped, kept aside to grow back.

Corrected mode: only modules whose ranks change are replaced, and the directions that a cut drops are kept, so that a
later cut may take them in again, up to the dense layer. Faithful mode: everything is factored anew at every cut, with
all of Sigma on the right, and what was dropped is gone (specification 2.4).
"""

from dataclasses import replace as changed

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanvit import cuts, surgery
from leanvit.comcat_calibrate import Statistics, spectrum
from leanvit.comcat_cut import Cutter, product, remember
from leanvit.comcat_factors import Spectrum
from leanvit.comcat_modules import FactoredAttention, FactoredLinear, read_linear
from leanvit.comcat_plan import PLAN, Part, make_plan, part_of

Ranks = dict[str, int | None]


def settled(found: list[Part], ranks: Ranks) -> dict[str, int]:
    """Ranks as a plan holds them: an attention with one factored part is factored as a whole."""
    touched = {p.module for p in found if ranks.get(p.name) is not None}
    full = {p.name: p.full for p in found if p.kind != "fc" and p.module in touched}
    return full | {n: r for n, r in ranks.items() if r is not None}


def current_ranks(model: nn.Module, found: list[Part]) -> dict[str, int]:
    """The ranks per head of the parts as they are now; dense ones are absent."""
    ranks = {}
    for part in found:
        module = model.get_submodule(part.module)
        if isinstance(module, FactoredAttention):
            ranks[part.name] = module.key_dim if part.kind == "qk" else module.value_dim
        elif isinstance(module, FactoredLinear):
            ranks[part.name] = module.rank
    return ranks


class Recut:
    """A model, the plan it is cut by (none of it at first), and the directions dropped so far in `reserve`.

    Raises `ValueError` for a model that was cut in another mode or has an adapter, for statistics of another model, and
    what `parts` raises.
    """

    def __init__(self, model: nn.Module, mode: str, statistics: Statistics | None = None):
        surgery.refuse_adapted(model, "RankSearch")
        before = getattr(model, PLAN, None)
        if before is not None and before.mode != mode:
            raise ValueError(f"RankSearch: this model was cut in {before.mode} mode; go on with mode={before.mode!r}")
        done = cuts.history(model)
        if before is not None and done[-1][0] != "comcat":
            raise ValueError(
                f"RankSearch: this model was cut by {done[-1][0]} after it was factored; search before that"
            )
        self.model, self.statistics, self.fresh = model, statistics, before is None
        self.plan = before or make_plan(model, {}, mode=mode)
        if statistics is not None:
            statistics.check(self.plan)
        self.faithful = mode == "faithful"
        self.parts = [part_of(name, shape) for name, shape in self.plan.shapes.items()]
        self.reserve: dict[str, tuple[Tensor, Tensor]] = {}

    def spectra(self) -> dict[str, Spectrum]:
        """The singular values and vectors of every part as it is now, with the directions kept aside."""
        result = {}
        for part in self.parts:
            a, b = product(self.model, part, self.plan.bias == "absorb")
            if part.name in self.reserve:
                more = self.reserve[part.name]
                a, b = torch.cat([a, more[0].to(a)], -1), torch.cat([b, more[1].to(b)], -2)
            result[part.name] = spectrum(part.name, a, b, self.statistics)
        return result

    def ranks(self) -> Ranks:
        """The ranks as they are, None for dense parts and for parts of full rank of an attention."""
        ranks = current_ranks(self.model, self.parts)
        return {p.name: r if (r := ranks.get(p.name)) != p.full or p.kind == "fc" else None for p in self.parts}

    @torch.no_grad()
    def cut(self, ranks: Ranks) -> None:
        """Bring the model to these ranks (None: dense), in place."""
        spectra, reserve, now, new = self.spectra(), dict(self.reserve), self.ranks(), {}
        attention = {p.name: p.full for p in self.parts if p.kind != "fc"}
        plan = changed(self.plan, ranks=attention | {n: r for n, r in ranks.items() if r is not None})

        def cut(name: str, a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
            left, right = spectra[name].factors(plan.ranks[name], not self.faithful)
            if self.faithful:
                return _padded(left, right, plan.ranks[name])
            reserve[name] = spectra[name].factors(None, first=plan.ranks[name])
            return left, right

        cutter = Cutter(plan, cut, None if self.statistics is None else self.statistics.shift)
        changing = {p.module for p in self.parts if self.faithful or ranks[p.name] != now[p.name]}
        for part in self.parts:
            if part.module not in changing or part.module in new:
                continue
            module = self.model.get_submodule(part.module)
            if part.kind == "fc" and ranks[part.name] is None:
                new[part.module] = self._dense(part, module, *spectra[part.name].factors())
                reserve.pop(part.name, None)
            else:
                new[part.module] = cutter.make(part, module)
        for name, module in new.items():
            surgery.replace(self.model, name, module)
        self.reserve = reserve
        self.plan = changed(self.plan, ranks=current_ranks(self.model, self.parts))
        remember(self.model, self.plan if self.plan.ranks else None)

    def _dense(self, part: Part, m: FactoredLinear, left: Tensor, right: Tensor) -> nn.Linear:
        """The plain linear layer of a factored one and what was kept aside of it."""
        a, b, bias = read_linear(m)
        if bias is not None and self.statistics is not None:
            bias = bias + self.statistics.shift(part.name, a, b, left, right)
        new = nn.Linear(m.in_features, m.out_features, bias is not None, device="meta", dtype=a.dtype)
        new = new.to_empty(device=a.device)
        new.weight.copy_((left @ right).T)
        if bias is not None:
            new.bias.copy_(bias)
        return new.requires_grad_(m.first.weight.requires_grad)


def _padded(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A product at a larger rank: more orthonormal columns on the left, zero rows on the right (specification 2.4)."""
    more = rank - left.shape[-1]
    if more <= 0:
        return left, right
    basis = torch.linalg.qr(left, mode="complete").Q[..., left.shape[-1] : rank]
    return torch.cat([left, basis], -1), F.pad(right, (0, 0, 0, more))
