"""LoRA (arXiv 2106.09685) on any linear layers, and on the queries and values of a fused qkv.

A starts Kaiming-uniform (a = sqrt 5) and B at zero, so the model's output does not change at the start; the scale is
alpha / rank.

The LBP-WHT paper's two baselines (specification, section 5) are arguments of `lora`:

    lora(model, rank=8, alpha=8, qkv_rank=24)                                         # "LoRA": attention only
    lora(model, rank=8, alpha=8, qkv_rank=24, match=in_stage, keep=named_in_stage)    # "LoRA-all": every linear of the
                                                                                      # scope, and its other parameters

Their fused qkv has rank 24 under alpha 8, hence the scale 1/3. Divergence: their code applies no scale to adapted 1x1
convolutions in the forward (the same thing at rank 8, alpha 8); here the scale always counts. Their SwinV2 reads
qkv.weight itself, so that an adapter on qkv never ran; here the layer is made to run (`qkv_bias_separate`).

KAdaptation's and block expansion's LoRA (specifications, section 2) is `lora_qv`: two adapters of rank r, on queries
and on values, keys untouched, 4 N D r parameters. One adapter on the fused layer has the same count and moves the keys.
`lora_scrambled` is what KAdaptation's released code computes instead, as a demonstration.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanvit import qkv
from leanvit.kernels import lowrank
from leanvit.qkv import SEPARATED
from leanvit.sites import separate_qkv_bias
from leanvit.surgery import (
    Match,
    Report,
    check_whole,
    count,
    freeze,
    head_modules,
    head_parameters,
    linears,
    need_head,
    refuse_adapted,
    replace,
)

# whole components of a module's name; timm's ViT, DeiT, Swin, EfficientFormer (V2), EVA, BEiT, LeViT
ATTENTION = {"attn", "attention", "self_attn", "token_mixer"}
PROJECTIONS = {"qkv", "q", "k", "v", "kv", "proj", "q_proj", "k_proj", "v_proj", "out_proj"}
TALKING_HEADS = {"talking_head1", "talking_head2"}


def attention_projections(name: str, module: nn.Module) -> bool:
    """True for the linear layers of an attention: q, k, v (or fused qkv), proj, and talking heads."""
    parts = name.split(".")
    inside = next((parts[i + 1 :] for i, p in enumerate(parts) if p in ATTENTION), [])
    return bool(inside) and inside[0] in PROJECTIONS | TALKING_HEADS


class LowRank(nn.Module):
    """`(alpha / rank) * B A x`, with `lora_A (rank, inputs)` and `lora_B (outputs, rank)`; a delta of `qkv.Shifted`.

    Equation 3 of arXiv 2106.09685. `like` gives dtype and device.
    """

    def __init__(self, inputs: int, outputs: int, rank: int, alpha: float, like: Tensor):
        super().__init__()
        kind = {"dtype": like.dtype, "device": like.device}
        self.rank, self.scale = rank, alpha / rank
        self.settings = {"class": type(self).__name__, "scale": self.scale}  # `state.load` compares them
        self.lora_A = nn.Parameter(torch.empty(rank, inputs, **kind))
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank, **kind))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """`(..., inputs) -> (..., outputs)`."""
        return F.linear(F.linear(x, self.lora_A) * self.scale, self.lora_B)  # the scale where it is cheap: on the rank

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """`P (inputs, rank)`, `Q (outputs, rank)` with weight Q P^T: both deltas of a layer run as one op."""
        return (self.scale * self.lora_A).T, self.lora_B

    def weight(self) -> Tensor:
        """What it adds to a weight `(outputs, inputs)`, in float32 at least."""
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)
        return self.scale * self.lora_B.to(wide) @ self.lora_A.to(wide)

    def bias(self) -> None:
        """It adds nothing to a bias."""

    def extra_repr(self) -> str:
        """Rank and scale, for printing."""
        return f"rank={self.rank}, scale={self.scale:.4g}"


class LoRA(LowRank):
    """`base(x) + (alpha / rank) * B A x` around an `nn.Linear` (any subclass) or a plain 1x1 `nn.Conv2d`.

    In eager mode a stock frozen `nn.Linear` runs as one with the adapter (`kernels/lowrank.py`), differentiable once.
    Any other base is called as a module and its weight is not read, so a layer with a backward of its own (LBP-WHT)
    stays what it is. The output has the base's dtype.
    `lora_A (rank, in)`, `lora_B (out, rank)` for a linear layer and a convolution alike.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float):
        conv = isinstance(base, nn.Conv2d)
        inputs, outputs = (base.in_channels, base.out_channels) if conv else (base.in_features, base.out_features)
        super().__init__(inputs, outputs, rank, alpha, base.weight)
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in) -> (..., out)`; of a convolution `(B, in, H, W) -> (B, out, H, W)`."""
        if isinstance(self.base, nn.Conv2d):
            a, b = self.lora_A[:, :, None, None], self.lora_B[:, :, None, None]
            return self.base(x) + F.conv2d(F.conv2d(x, a) * self.scale, b)
        if lowrank.eager(x):
            return lowrank.linear(self.base, x, [self.factors()], None, [0])
        return self.base(x) + super().forward(x)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The base with the adapter added to its weight (the sum in float32 at least)."""
        weight, delta = self.base.weight, self.weight()
        weight.copy_(weight.to(delta.dtype) + delta.reshape(weight.shape))
        return self.base


class Scrambled(LowRank):
    """The delta of KAdaptation's released LoRA (specification, 1.6 c and d): heads, tokens and images are mixed.

    The released code holds the delta as (tokens, batch, width) and reads that memory as (batch * heads, tokens,
    width / heads) without the transpose; and it adds the queries' delta after their division by sqrt(width / heads),
    hence `gain`. A starts as N(0, 0.02). There is no weight that does this, so it cannot be merged. On `(B, N, C)`;
    `like` gives dtype and device.
    """

    def __init__(self, rows: qkv.Rows, rank: int, alpha: float, like: Tensor):
        super().__init__(rows.inputs, rows.width, rank, alpha, like)
        nn.init.normal_(self.lora_A, std=0.02)
        self.heads = rows.heads
        self.gain = math.sqrt(rows.width // rows.heads) if rows.role == "q" else 1.0

    def factors(self) -> None:
        """It is no matrix on the channels."""

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, inputs) -> (B, N, outputs)`; `ValueError` for other than tokens."""
        return self.gain * qkv.scrambled(super().forward(x), self.heads)


def _check_alpha(method: str, alpha: float) -> None:
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
        raise ValueError(f"{method}: alpha={alpha!r} must be a number above 0")


def lora(
    model: nn.Module,
    rank: int = 8,
    alpha: float | None = None,
    match: Match | None = None,
    qkv_rank: int | None = None,
    keep: Callable[[str], bool] | None = None,
) -> Report:
    """Put LoRA around linear layers, in place, and train the adapters and the head only.

    >>> import timm
    >>> from leanvit.lora import lora
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2,
    ...                           num_heads=2, num_classes=4)
    >>> lora(model, rank=2).matched
    ['blocks.0.attn.qkv', 'blocks.0.attn.proj', 'blocks.1.attn.qkv', 'blocks.1.attn.proj']

    Args:
        rank: of every adapter; `alpha`: the scale is alpha / rank of the layer (default: alpha = rank).
        match: `match(name, module) -> bool` among the linear layers outside of the head; default
            `attention_projections`.
        qkv_rank: the rank of layers named qkv (fused), e.g. 3 * rank.
        keep: `keep(name) -> bool`: further parameters to train, by their name before the adapters came (norms, biases,
            LayerScale, ...). The weight of an adapted layer stays frozen.

    Raises `ValueError` when nothing matches, when an adapter is there already, for a rank below 1 or an alpha not
    above 0; the model is then unchanged.
    """
    alpha = rank if alpha is None else alpha
    check_whole("lora", rank=rank, qkv_rank=rank if qkv_rank is None else qkv_rank)
    _check_alpha("lora", alpha)
    refuse_adapted(model, "lora")
    heads = head_modules(model)
    candidates = [(n, m) for n, m in linears(model) if not any(n == h or n.startswith(h + ".") for h in heads)]
    found = [(n, m) for n, m in candidates if (match or attention_projections)(n, m)]
    if not found:
        some = ", ".join(n for n, _ in candidates[:4])
        raise ValueError(f"lora: no layer matches in {type(model).__name__}; its linear layers are {some or 'none'}, …")
    head, weights = head_parameters(model), {f"{n}.weight" for n, _ in found}
    freeze(model, keep=lambda n: n in head or (keep is not None and n not in weights and keep(n)))
    separated = separate_qkv_bias(model, lambda n, m: n in dict(found))  # timm would read qkv.weight past the adapter
    for name, module in found:
        is_qkv = qkv_rank is not None and "qkv" in name.split(".")
        replace(model, name, LoRA(module, qkv_rank if is_qkv else rank, alpha))
    skipped = {n: "not matched" for n, _ in candidates if n not in dict(found)}
    return Report("lora", [n for n, _ in found], skipped, *count(model), [SEPARATED] if separated else [])


Make = Callable[[qkv.Rows, Tensor], LowRank]


def _on_queries_and_values(
    model: nn.Module, method: str, rank: int, alpha: float, match: Match | None, make: Make
) -> Report:
    """Add the deltas `make(rows, weight)` to the queries and values of every attention that matches."""
    check_whole(method, rank=rank)
    _check_alpha(method, alpha)
    refuse_adapted(model, method)
    head = need_head(model, method)
    rows, skipped = qkv.choose(model, method, match)
    deltas: dict[str, dict[str, tuple[int, nn.Module]]] = {}
    for r in rows:
        deltas.setdefault(r.layer, {})[r.role] = (r.first, make(r, model.get_submodule(r.layer).weight))
    freeze(model, keep=head.__contains__)
    notes = qkv.install(model, deltas)
    return Report(method, [*deltas], skipped, *count(model), notes)


def lora_qv(model: nn.Module, rank: int = 4, alpha: float | None = None, match: Match | None = None) -> Report:
    """Put one LoRA on the queries and one on the values of every attention, in place; train them and the head.

    Keys stay bit for bit what they were. `2 * rank * (inputs + width)` parameters an attention, 4 N D r for a ViT of N
    blocks of width D. `match(name, module)` chooses among the (fused) linear layers. The names are
    `blocks.0.attn.qkv.q.lora_A (rank, D)` and so on (KAdaptation's specification, section 2).

    >>> import timm
    >>> from leanvit.lora import lora_qv
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2,
    ...                           num_heads=2, num_classes=4)
    >>> print(lora_qv(model, rank=2))  # 2 blocks x 4 x 2 x 32, and a head of 4 x 33
    lora_qv: 2 layers, 644 of 32,868 parameters trained

    Raises `ValueError` for a rank below 1, a model without a head or without attentions of this kind, or when an
    adapter is there already; the model is then unchanged.
    """
    alpha = rank if alpha is None else alpha

    def make(rows: qkv.Rows, like: Tensor) -> LowRank:
        return LowRank(rows.inputs, rows.width, rank, alpha, like)

    return _on_queries_and_values(model, "lora_qv", rank, alpha, match, make)


def lora_scrambled(model: nn.Module, rank: int = 4, alpha: float = 128.0, match: Match | None = None) -> Report:
    """A demonstration, not for use: LoRA as KAdaptation's released code computes it, see `Scrambled`.

    The defaults are the released ones (scale 32). Identity at the start; as soon as B is not zero, the logits of an
    image depend on the other images of its batch. Raises `ValueError` as `lora_qv`, and for an attention of another
    kind (normed or rotated queries, a qkv that is not fused).
    """

    def make(rows: qkv.Rows, like: Tensor) -> LowRank:
        qkv.check_scrambled(model, [rows], "lora_scrambled")
        return Scrambled(rows, rank, alpha, like)

    report = _on_queries_and_values(model, "lora_scrambled", rank, alpha, match, make)
    report.notes.append("a demonstration of a defect: predictions depend on the other images of the batch")
    return report
