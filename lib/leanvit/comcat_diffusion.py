"""ComCAT's adapter for diffusion models: low-rank terms on the products W_QK and W_VO of frozen attention heads.

Paper, section on customisation (arXiv 2305.17235; specification 4.5): with everything frozen, each head gets

    scores = (q k^T + s^2 q' k'^T) / sqrt(d_h)        output = A v W_O + s^2 A v' S_O

with q', k', v' of width r (2 in the paper) and one scale s on all four maps. Both sums are one attention of width
d_h + r: queries [q, s q'], keys [k, s k'], values [v, s v']. That is how it runs, and how `merge` leaves it; the dense
maps at their old width cannot take the terms in.

Works on attention modules as Stable Diffusion's U-Net has them, in diffusers and in the original code: `to_q`, `to_k`,
`to_v`, `to_out` (a linear layer, or a sequence that begins with one) and `heads`; keys and values may come from a
context of another width. Known divergence: the released code starts all maps at random, so that the model is disturbed
before the first step (mode="faithful"); here k' and S_O start at zero, and the model starts as it was.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanvit import surgery
from leanvit.comcat_plan import MODES
from leanvit.surgery import Report

# attention blocks of Stable Diffusion 1.x's U-Net: width of the tokens, and how many blocks have it; the context is 768
STABLE_DIFFUSION_1 = {320: 5, 640: 5, 1280: 6}


def parameters_formula(rank: int = 2, heads: int = 8, context: int = 768, blocks: dict[int, int] | None = None) -> int:
    """Trained numbers for a self- and a cross-attention in each block: `sum (6 C + 2 context) heads rank`.

    `blocks`: how many have each width C, by default Stable Diffusion 1.x's (specification 4.5).
    """
    blocks = STABLE_DIFFUSION_1 if blocks is None else blocks
    return sum(n * (6 * width + 2 * context) * heads * rank for width, n in blocks.items())


def _output(module: nn.Module) -> nn.Linear:
    """The output map of an attention: `to_out`, or its first layer."""
    return module.to_out if isinstance(module.to_out, nn.Linear) else module.to_out[0]


def is_attention(module: nn.Module) -> bool:
    """True for a module with linear `to_q`, `to_k`, `to_v`, `to_out` and a number of `heads`."""
    maps = (getattr(module, n, None) for n in ("to_q", "to_k", "to_v"))
    out = getattr(module, "to_out", None)
    out = out[0] if isinstance(out, (nn.Sequential, nn.ModuleList)) and len(out) else out
    return all(isinstance(m, nn.Linear) for m in (*maps, out)) and isinstance(getattr(module, "heads", None), int)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float) -> Tensor:
    """Attention of `q (B, N, h w), k (B, M, h w), v (B, M, h w)` head by head: `(B, N, h, w)`."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


class WideAttention(nn.Module):
    """A plain attention whose heads are wider than their scale says, `to_q` .. `to_out`: what `merge` leaves.

    `(B, N, C)` and, for a cross-attention, a context `(B, M, context)` -> `(B, N, C)`.
    """

    def __init__(self, to_q: nn.Linear, to_k: nn.Linear, to_v: nn.Linear, to_out: nn.Module, heads: int, scale: float):
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = to_q, to_k, to_v, to_out
        self.heads, self.scale = heads, scale

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        y = attend(self.to_q(hidden_states), self.to_k(context), self.to_v(context), self.heads, self.scale).flatten(2)
        for layer in self.to_out if isinstance(self.to_out, (nn.Sequential, nn.ModuleList)) else [self.to_out]:
            y = layer(y)
        return y


class ProductAdapter(nn.Module):
    """A frozen attention `base` with low-rank terms on its products (paper, section on customisation).

    Trained: `comcat_q (h r, C)`, `comcat_k (h r, context)`, `comcat_v (h r, context)` and `comcat_o (C, h r)`. With
    `s` = 0 the base runs alone, bit for bit.
    """

    def __init__(self, base: nn.Module, rank: int, s: float, mode: str, generator: torch.Generator | None):
        super().__init__()
        self.base, self.rank, self.s, self.heads = base, rank, s, base.heads
        self.head_dim = base.to_q.out_features // base.heads
        self.scale = float(getattr(base, "scale", self.head_dim**-0.5))
        inputs, context, outputs = base.to_q.in_features, base.to_k.in_features, _output(base).out_features
        width, like = base.heads * rank, base.to_q.weight

        def start(*shape: int, zero: bool = False) -> nn.Parameter:
            value = torch.zeros(shape)
            if mode == "faithful" or not zero:
                value.normal_(std=shape[1] ** -0.5, generator=generator)
            return nn.Parameter(value.to(like.device, like.dtype))

        self.comcat_q, self.comcat_k = start(width, inputs), start(width, context, zero=True)
        self.comcat_v, self.comcat_o = start(width, context), start(outputs, width, zero=True)

    def _joined(self, dense: Tensor, low: Tensor) -> Tensor:
        """Head by head, the dense coordinates and then the low-rank ones: `(..., h (d_h + r))`."""
        both = (dense.unflatten(-1, (self.heads, -1)), low.unflatten(-1, (self.heads, -1)))
        return torch.cat(both, -1).flatten(-2)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None) -> Tensor:
        base, s = self.base, self.s
        if s == 0:
            return base(hidden_states, encoder_hidden_states)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q = self._joined(base.to_q(hidden_states), s * F.linear(hidden_states, self.comcat_q))
        k = self._joined(base.to_k(context), s * F.linear(context, self.comcat_k))
        v = self._joined(base.to_v(context), s * F.linear(context, self.comcat_v))
        y = attend(q, k, v, self.heads, self.scale)
        dense, low = y[..., : self.head_dim].flatten(2), y[..., self.head_dim :].flatten(2)
        y = _output(base)(dense) + s * F.linear(low, self.comcat_o)
        for layer in base.to_out[1:] if isinstance(base.to_out, (nn.Sequential, nn.ModuleList)) else []:
            y = layer(y)
        return y

    @torch.no_grad()
    def merged(self) -> WideAttention:
        """A plain attention with heads of width d_h + r, with the same outputs."""
        base, width = self.base, self.heads * (self.head_dim + self.rank)

        def wide(layer: nn.Linear, low: Tensor) -> nn.Linear:
            new = _like(layer, layer.in_features, width)
            new.weight.copy_(self._joined(layer.weight.T, self.s * low.T).T)
            if layer.bias is not None:
                new.bias.copy_(self._joined(layer.bias, layer.bias.new_zeros(self.heads * self.rank)))
            return new

        old = _output(base)
        out = _like(old, width, old.out_features)
        out.weight.copy_(self._joined(old.weight, self.s * self.comcat_o))
        if old.bias is not None:
            out.bias.copy_(old.bias)
        if isinstance(base.to_out, (nn.Sequential, nn.ModuleList)):
            out = (
                type(base.to_out)([out, *base.to_out[1:]])
                if isinstance(base.to_out, nn.ModuleList)
                else (nn.Sequential(out, *base.to_out[1:]))
            )
        maps = wide(base.to_q, self.comcat_q), wide(base.to_k, self.comcat_k), wide(base.to_v, self.comcat_v)
        return WideAttention(*maps, out, self.heads, self.scale)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, s={self.s:g}"


def _like(layer: nn.Linear, inputs: int, outputs: int) -> nn.Linear:
    weight = layer.weight
    return nn.Linear(inputs, outputs, layer.bias is not None, device=weight.device, dtype=weight.dtype)


def attach(
    model: nn.Module, rank: int = 2, *, s: float = 1.0, mode: str = "corrected", seed: int | None = None
) -> Report:
    """Give every attention of `model` an adapter, and train nothing else. In place.

    Raises `ValueError` for a rank below 1, an s that is no finite number, an unknown mode, a model without such
    attentions, or one adapted already.
    """
    if mode not in MODES:
        raise ValueError(f"ComCAT adapter: mode={mode!r} is none of {', '.join(MODES)}")
    surgery.check_whole("ComCAT adapter", rank=rank)
    if isinstance(s, bool) or not isinstance(s, (int, float)) or not math.isfinite(s):
        raise ValueError(f"ComCAT adapter: s={s!r} must be a finite number")
    surgery.refuse_adapted(model, "ComCAT adapter")
    found = [name for name, m in model.named_modules() if is_attention(m)]
    if not found:
        raise ValueError(
            f"ComCAT adapter: {type(model).__name__} has no attention with to_q, to_k, to_v, to_out and heads; for a "
            "vision transformer use lora or kadaptation"
        )
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for name in found:
        base = model.get_submodule(name)
        surgery.replace(model, name, ProductAdapter(base, rank, s, mode, generator))
    surgery.freeze(model, lambda name: ".comcat_" in f".{name}")
    return Report("ComCAT adapter", found, {}, *surgery.count(model))


def adapters(model: nn.Module) -> list[tuple[str, ProductAdapter]]:
    """The adapters of a model, by name."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, ProductAdapter)]


def merge(model: nn.Module) -> None:
    """Put plain attentions of width d_h + r in the places of the adapted ones, with the same outputs.

    Raises `ValueError` where none is attached.
    """
    for name, module in _attached(model, "merge"):
        surgery.replace(model, name, module.merged())


def detach(model: nn.Module) -> None:
    """Put the frozen attentions back as they were. Raises `ValueError` where no adapter is attached."""
    for name, module in _attached(model, "detach"):
        surgery.replace(model, name, module.base)


def _attached(model: nn.Module, what: str) -> list[tuple[str, ProductAdapter]]:
    found = adapters(model)
    if not found:
        raise ValueError(f"{what}: ComCAT's adapter is not attached to this {type(model).__name__}; attach it first")
    return found
