"""The super-network of ComCAT's search in spectral-mask form: all candidate ranks of all parts in one factored pass.

Candidates are truncations of one SVD, so a mixture of them with weights p is `U diag(sigma * c) V^T` with the mask
`c_j = sum of p_a with r_a > j` (specification 2.2). The mask multiplies the inner coordinates of the factored
modules: the products cost what the largest candidate costs, and value and gradient are those of the mixture.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanvit import surgery
from leanvit.comcat_cut import Cutter
from leanvit.comcat_factors import Spectrum
from leanvit.comcat_modules import FactoredAttention
from leanvit.comcat_plan import Part, Plan


def coverage(ranks: list[int | None], directions: int) -> Tensor:
    """`(directions, candidates)`: 1 where a candidate keeps a direction; `c = coverage @ p`."""
    limits = torch.tensor([directions if r is None else r for r in ranks])
    return (limits[None] > torch.arange(directions)[:, None]).float()


@contextmanager
def swapped(model: nn.Module, new: Mapping[str, nn.Module]) -> Iterator[None]:
    """Other modules in the model for a while; nothing needs a gradient inside, and flags and modes come back."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    old = {name: surgery.replace(model, name, module) for name, module in new.items()}
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        yield
    finally:
        for name, module in old.items():
            surgery.replace(model, name, module)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


class Supernet:
    """The factored modules of all parts at their largest rank, whose inner coordinates are multiplied by masks.

    `masks[part] (directions,)` is what the hooks read at each call. With statistics, a coordinate that a mask takes
    out leaves its mean behind, as the bias of a cut part does.
    """

    def __init__(self, model: nn.Module, found: list[Part], spectra: Mapping[str, Spectrum], plan: Plan, statistics):
        self.masks: dict[str, Tensor] = {}
        cutter = Cutter(plan, lambda name, a, b: spectra[name].factors(plan.ranks[name], plan.mode == "corrected"))
        self.modules: dict[str, nn.Module] = {}
        names = {p.name for p in found}
        for part in found:
            if part.module in self.modules:
                continue
            new = cutter.make(part, model.get_submodule(part.module))
            means = None if statistics is None else statistics.moments
            if part.kind == "fc":
                mean = None if means is None else self._mean(means[part.name].mean, new.first.weight)
                new.first.register_forward_hook(self._linear_hook(part.name, mean))
            else:
                vo = f"{part.module}.vo"
                rows = new.qkv.weight[sum(new.widths[:2]) :].unflatten(0, (new.num_heads, -1))
                mean = None if means is None or vo not in names else self._mean(means[vo].mean, rows).flatten()
                new.qkv.register_forward_hook(self._attention_hook(part.module, new, names, mean))
            self.modules[part.module] = new

    @staticmethod
    def _mean(mean: Tensor, rows: Tensor) -> Tensor:
        return (rows.double() @ mean[..., None])[..., 0].to(rows.dtype).detach()

    def _linear_hook(self, name: str, mean: Tensor | None):
        def hook(module, inputs, y):
            mask = self.masks[name].to(y.dtype)
            return y * mask if mean is None else torch.lerp(mean, y, mask)

        return hook

    def _attention_hook(self, name: str, new: FactoredAttention, names: set[str], mean: Tensor | None):
        def hook(module, inputs, y):
            ones = y.new_ones(new.widths[1])
            qk = self.masks[f"{name}.qk"].repeat(new.num_heads) if f"{name}.qk" in names else ones
            vo = self.masks[f"{name}.vo"].repeat(new.num_heads) if f"{name}.vo" in names else None
            vo = y.new_ones(new.widths[2]) if vo is None else vo
            y = y * torch.cat([qk, ones, vo]).to(y.dtype)
            return y if mean is None else y + F.pad((1 - vo).to(y.dtype) * mean, (sum(new.widths[:2]), 0))

        return hook
