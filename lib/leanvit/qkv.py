"""Trained deltas on the query and value rows of an attention, with the keys left alone.

timm computes queries, keys and values in one fused linear layer (rows [0, d), [d, 2d), [2d, 3d) of `attn.qkv`), or, in
some EVA models, in three. `find` says where the rows are, `Shifted` adds deltas to them before the heads are split and
before queries are scaled, `merge` folds the deltas into the stock layer and `detach` drops them.

A delta is a module with `forward(x (..., inputs)) -> (..., width)`, `weight() -> (width, inputs)` and
`bias() -> (width,) or None`; weight and bias are what it adds to the stock layer's rows. A delta that is low-rank just
then may offer `factors() -> (P (inputs, rank), Q (width, rank)) or None`, with `weight() = Q P^T`: all deltas of a
layer then run as one op (`kernels/lowrank.py`). Used by KAdaptation (arXiv 2203.16329; its specification, 1.9) and by
LoRA on queries and values (section 2 there).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanvit.kernels import lowrank
from leanvit.sites import join_qkv_bias, separate_qkv_bias
from leanvit.surgery import Match, Merged, fold, head_modules, replace

SEPARATED = "qkv biases are added apart from the layer (qkv_bias_separate), so that qkv is called"


@dataclass(frozen=True)
class Rows:
    """Where the queries or values ("q" or "v") of one attention come from: rows of a linear layer."""

    attention: str  # full name of the attention module
    role: str
    layer: str  # full name of the linear layer
    first: int
    width: int
    inputs: int
    heads: int


def _widths(attention: nn.Module, rows: int) -> list[int] | None:
    """How many rows of a fused qkv are queries, keys and values; None where they are not one after the other."""
    if hasattr(attention, "widths"):  # heads factored by ComCAT or sliced by UVC
        return list(attention.widths)
    # EfficientFormer and TinyViT (key_dim) and MaxViT (head_first) lay q, k and v out head by head; GCViT's global
    # attention has no q of its own
    other = hasattr(attention, "key_dim") or any(getattr(attention, a, False) for a in ("head_first", "use_global"))
    return None if other or rows % 3 else [rows // 3] * 3


def _place(attention: nn.Module, role: str) -> tuple[str, int, int] | None:
    """`(layer, first row, rows)` of a role in an attention, or None where no rows of a linear layer are its own."""
    fused, split = getattr(attention, "qkv", None), getattr(attention, f"{role}_proj", None)
    widths = _widths(attention, fused.out_features) if isinstance(fused, nn.Linear) else None
    if widths is not None:
        place = "qkv".index(role)
        return "qkv", sum(widths[:place]), widths[place]
    return (f"{role}_proj", 0, split.out_features) if isinstance(split, nn.Linear) else None


def find(model: nn.Module, roles: tuple[str, ...] = ("q", "v")) -> list[Rows]:
    """The rows of every attention of a timm model, in the order of its modules (`[]` where there is none).

    >>> import timm
    >>> from leanvit import qkv
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2,
    ...                           num_heads=2, num_classes=4)
    >>> [(rows.layer, rows.role, rows.first, rows.width) for rows in qkv.find(model)][:2]
    [('blocks.0.attn.qkv', 'q', 0, 32), ('blocks.0.attn.qkv', 'v', 64, 32)]
    """
    found, heads = [], head_modules(model)
    for name, module in model.named_modules():
        count = getattr(module, "num_heads", None)
        if not isinstance(count, int) or any(name == h or name.startswith(h + ".") for h in heads):
            continue
        for role in roles:
            place = _place(module, role)
            if place is not None:
                layer, first, width = place
                full = f"{name}.{layer}" if name else layer
                inputs = getattr(module, layer).in_features
                found.append(Rows(name, role, full, first, width, inputs, count))
    return found


def choose(model: nn.Module, method: str, match: Match | None) -> tuple[list[Rows], dict[str, str]]:
    """The rows of `find` whose layer matches (`match(name, layer)`, default all), and why the others were skipped.

    Raises `ValueError`, in the name of `method`, where there are none.
    """
    rows = find(model)
    layers = list(dict.fromkeys(r.layer for r in rows))
    if not rows:
        raise ValueError(f"{method}: {type(model).__name__} has no attention whose queries and values are linear rows")
    chosen = [n for n in layers if match is None or match(n, model.get_submodule(n))]
    if not chosen:
        raise ValueError(f"{method}: match chose none of the query and value layers {', '.join(layers[:4])}, …")
    return [r for r in rows if r.layer in chosen], {n: "not matched" for n in layers if n not in chosen}


class Shifted(nn.Module):
    """`base(x)` with deltas added to some of its output rows; the other rows are the base's, bit for bit.

    `deltas` maps a role ("q", "v") to (first row, delta). A base that is no plain frozen `nn.Linear` is called as a
    module, so a layer with a backward of its own (LBP-WHT) stays what it is.
    """

    def __init__(self, base: nn.Module, deltas: Mapping[str, tuple[int, nn.Module]]):
        super().__init__()
        self.base = base
        self.first = {role: first for role, (first, _) in deltas.items()}
        for role, (_, delta) in deltas.items():
            self.add_module(role, delta)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., inputs) -> (..., outputs)`: the base's output, with the deltas added to their rows.

        Differentiable once where all of them offer factors.
        """
        deltas = [getattr(self, role) for role in self.first]
        factors = [delta.factors() if hasattr(delta, "factors") else None for delta in deltas]
        if all(pair is not None for pair in factors):
            bias = [b for b in (delta.bias() for delta in deltas) if b is not None]
            return lowrank.linear(self.base, x, factors, bias, list(self.first.values()))
        y = self.base(x)
        for first, delta in zip(self.first.values(), deltas, strict=True):
            shift = delta(x)
            y[..., first : first + shift.shape[-1]] += shift
        return y

    @torch.no_grad()
    def merged(self, biases: Mapping[str, Tensor] | None = None) -> nn.Module:
        """The base with the deltas folded in (the sums in float32 at least).

        `biases`, `(width,)` each, are the attention's own ("q", "v") where the layer has none, as in BEiT and EVA. A
        layer without any gets one.
        """
        for role, first in self.first.items():
            delta = getattr(self, role)
            weight, bias = delta.weight(), delta.bias()
            rows = slice(first, first + len(weight))
            _add_(self.base.weight[rows], weight)
            if bias is not None and biases and biases.get(role) is not None:
                _add_(biases[role], bias)
            elif bias is not None:
                if self.base.bias is None:
                    zeros = torch.zeros_like(self.base.weight[:, 0])
                    self.base.bias = nn.Parameter(zeros, requires_grad=self.base.weight.requires_grad)
                if len(self.base.bias) < self.base.out_features:  # a factored head's values have no bias of their own
                    missing = self.base.out_features - len(self.base.bias)
                    self.base.bias = nn.Parameter(F.pad(self.base.bias, (0, missing)), self.base.bias.requires_grad)
                _add_(self.base.bias[rows], bias)
        return self.base


def _add_(own: Tensor, more: Tensor) -> None:
    wide = torch.promote_types(torch.promote_types(own.dtype, more.dtype), torch.float32)
    own.copy_(own.to(wide) + more.to(wide))


def shifted(model: nn.Module, kind: type[nn.Module]) -> list[tuple[str, Shifted]]:
    """The layers whose deltas are of class `kind`."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, Shifted)]
    return [(name, m) for name, m in layers if all(isinstance(getattr(m, role), kind) for role in m.first)]


def install(model: nn.Module, deltas: Mapping[str, Mapping[str, tuple[int, nn.Module]]]) -> list[str]:
    """Put `Shifted` with `deltas[layer]` around every layer named; returns notes for a `Report`."""
    separated = separate_qkv_bias(model, lambda name, module: name in deltas)
    for layer, own in deltas.items():
        replace(model, layer, Shifted(model.get_submodule(layer), own))
    return [SEPARATED] if separated else []


def merge(
    model: nn.Module, kind: type[nn.Module], title: str, parts: Iterable[tuple[nn.Module, str]] = ()
) -> Merged:
    """Fold the deltas of class `kind` into the stock layers, which take their places again; `parts` leave the model.

    Returns what can undo it.
    """
    layers = shifted(model, kind)
    undo = Merged(model, [name for name, _ in layers], parts)
    for name, layer in layers:
        attention = model.get_submodule(name.rpartition(".")[0])
        biases = {role: getattr(attention, f"{role}_bias", None) for role in layer.first}
        fold(model, name, layer.merged(biases), title)
    join_qkv_bias(model)
    for owner, part, _ in undo.parts:
        delattr(owner, part)
    return undo


def detach(model: nn.Module, kind: type[nn.Module]) -> None:
    """Put the stock layers back as they were found, without the deltas of class `kind`."""
    for name, layer in shifted(model, kind):
        replace(model, name, layer.base)
    join_qkv_bias(model)


def check_scrambled(model: nn.Module, rows: list[Rows], method: str) -> None:
    """Raise `ValueError` for an attention to which the released computation (`scrambled`) has no counterpart."""
    for r in rows:
        attention = model.get_submodule(r.attention)
        # queries that are normed (SwinV2, XCiT: to length one) or turned (RoPE) after the layer
        other = any(hasattr(attention, name) for name in ("logit_scale", "temperature", "rotate_half"))
        normed = not isinstance(getattr(attention, "q_norm", nn.Identity()), nn.Identity)
        if other or normed or r.width % r.heads or not r.layer.endswith("qkv"):
            raise ValueError(
                f"{method} is defined for a fused qkv whose queries are only divided by sqrt(head width), not for "
                f"{r.attention} ({type(attention).__name__})"
            )


def scrambled(delta: Tensor, heads: int) -> Tensor:
    """What the released KAdaptation and its LoRA add for `delta (B, N, C)`, in that shape (its specification, 1.6c).

    They hold the delta as (tokens, batch, C) and read that memory as (batch * heads, tokens, C / heads), without the
    transpose that belongs there: tokens, heads and the images of a batch are mixed. In the order of `qkv`'s output.
    Raises `ValueError` for a delta that is not three-dimensional.
    """
    if delta.dim() != 3:
        raise ValueError(f"the released update is defined on tokens (B, N, C), got {tuple(delta.shape)}")
    images, tokens, width = delta.shape
    memory = delta.transpose(0, 1).reshape(images, heads, tokens, width // heads)
    return memory.transpose(1, 2).reshape(delta.shape)
