"""ComCAT's super-network as the authors run it: every candidate as a dense matrix, mixed by weights p.

The reference that the spectral mask of `comcat_search` is measured against, for value, gradient and time. It multiplies
by a d x d matrix for each head and candidate (specification 2.2): ten times the work of a dense DeiT-S.
"""

import torch
from torch import Tensor, nn

from leanvit.comcat_factors import Spectrum


def truncations(spectrum: Spectrum, ranks: list[int | None]) -> Tensor:
    """`(candidates, [H,] m, n)`: the dense products of every rank (None: all directions)."""
    pairs = [spectrum.factors(rank) for rank in ranks]
    return torch.stack([left @ right for left, right in pairs])


class MixedAttention(nn.Module):
    """Attention by mixtures of products: `qk (A, H, d [+ 1], d)`, `vo (A', H, d, out)`, weights in `p_qk` and `p_vo`.

    Scores are mixed before the softmax. A last row of `qk` is the queries' absorbed bias; `bias (out,)` is added.
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
