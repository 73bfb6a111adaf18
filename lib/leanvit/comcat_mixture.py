"""ComCAT's super-network as the authors run it: every candidate as a dense matrix, mixed by weights p.

The reference that the spectral mask of `comcat_search` is measured against, for value, gradient and time. It multiplies
by a d x d matrix for each head and candidate (specification 2.2): ten times the work of a dense DeiT-S.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from leanvit.comcat_factors import Spectrum
from leanvit.comcat_modules import read_heads
from leanvit.comcat_plan import Part


def truncations(spectrum: Spectrum, ranks: list[int | None]) -> Tensor:
    """`(candidates, [H,] m, n)`: the dense products of every rank (None: all directions)."""
    pairs = [spectrum.factors(rank) for rank in ranks]
    return torch.stack([left @ right for left, right in pairs])


class MixedAttention(nn.Module):
    """Attention by mixtures of products: `qk (A, H, d [+ 1], d)`, `vo (A', H, d, out)`, weights in `p_qk` and `p_vo`.

    Scores are mixed before the softmax (specification 2.2). A last row of `qk` is the queries' absorbed bias;
    `bias (out,)` is added.
    """

    def __init__(self, qk: Tensor, vo: Tensor, scale: float, bias: Tensor | None):
        super().__init__()
        self.scale, self.bias = scale, bias
        self.register_buffer("qk", qk)
        self.register_buffer("vo", vo)
        self.p_qk = self.p_vo = None

    def forward(self, x: Tensor, **ignored) -> Tensor:
        d, keys = x.shape[-1], x[:, None].mT
        scores = 0.0
        for p, matrices in zip(self.p_qk, self.qk, strict=True):
            left = x[:, None] @ matrices[:, :d]
            if matrices.shape[1] > d:
                left = left + matrices[:, d:]
            scores = scores + p * self.scale * (left @ keys)
        attention = scores.softmax(-1)
        y = 0.0
        for p, matrices in zip(self.p_vo, self.vo, strict=True):
            y = y + p * (attention @ (x[:, None] @ matrices)).sum(1)
        return y if self.bias is None else y + self.bias


class MixedLinear(nn.Module):
    """`sum_a p_a x W^(a) + bias` for `weights (A, in, out)` and the weights in `p`."""

    def __init__(self, weights: Tensor, bias: Tensor | None):
        super().__init__()
        self.bias = bias
        self.register_buffer("weights", weights)
        self.p = None

    def forward(self, x: Tensor) -> Tensor:
        y = 0.0
        for p, weight in zip(self.p, self.weights, strict=True):
            y = y + p * (x @ weight)
        return y if self.bias is None else y + self.bias


class Mixture:
    """The mixtures of all parts of a model, to be put in its layers' places (`comcat_supernet.swapped`).

    `ranks[part]` are the candidates (None: all directions). All parts of an attention must be there, and its biases
    are absorbed. `weigh({part: p (candidates,)})` sets the weights.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Iterable[Part],
        spectra: Mapping[str, Spectrum],
        ranks: Mapping[str, list[int | None]],
    ):
        self.modules: dict[str, nn.Module] = {}
        for part in parts:
            module = model.get_submodule(part.module)
            if part.kind == "fc":
                self.modules[part.module] = MixedLinear(truncations(spectra[part.name], ranks[part.name]), module.bias)
            elif part.module not in self.modules:
                heads = read_heads(module)
                bias = heads.bo + torch.einsum("hk,hko->o", heads.bv, heads.o)
                names = (f"{part.module}.{kind}" for kind in ("qk", "vo"))
                qk, vo = (truncations(spectra[name], ranks[name]) for name in names)
                self.modules[part.module] = MixedAttention(qk, vo, module.scale, bias)

    def weigh(self, weights: Mapping[str, Tensor]) -> None:
        """Set the weights `(candidates,)` of every part's candidates."""
        for name, module in self.modules.items():
            if isinstance(module, MixedLinear):
                module.p = weights[name]
            else:
                module.p_qk, module.p_vo = weights[f"{name}.qk"], weights[f"{name}.vo"]
