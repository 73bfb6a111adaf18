"""What the papers compare with: full fine-tuning, linear probing, BitFit (arXiv 2106.10199), LoRA (arXiv 2106.09685).

Each function prepares a timm model in place (adapters, `requires_grad`) and returns a Report; training is train.fit.
The head is always trained. LoRA's A starts Kaiming-uniform (a = sqrt 5) and B at zero, so the model's output does not
change at the start; the scale is alpha / rank.

The LBP-WHT paper's two baselines (specification, section 5) are arguments of `lora`:

    lora(model, rank=8, alpha=8, qkv_rank=24)                                         # "LoRA": attention only
    lora(model, rank=8, alpha=8, qkv_rank=24, match=in_stage, keep=named_in_stage)    # "LoRA-all": every linear of the
                                                                                      # scope, and its other parameters

Their fused qkv has rank 24 under alpha 8, hence the scale 1/3. Divergence: their code applies no scale to adapted 1x1
convolutions in the forward (the same thing at rank 8, alpha 8); here the scale always counts. Their SwinV2 reads
qkv.weight itself, so that an adapter on qkv never ran; here the layer is made to run (`qkv_bias_separate`).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanvit.sites import join_qkv_bias, separate_qkv_bias
from leanvit.surgery import Match, Report, count, freeze, head_modules, head_parameters, linears, replace

# whole components of a module's name; timm's ViT, DeiT, Swin, EfficientFormer (V2), EVA, BEiT, LeViT
ATTENTION = {"attn", "attention", "self_attn", "token_mixer"}
PROJECTIONS = {"qkv", "q", "k", "v", "kv", "proj", "q_proj", "k_proj", "v_proj", "out_proj"}
TALKING_HEADS = {"talking_head1", "talking_head2"}
BIASES = {"bias", "q_bias", "k_bias", "v_bias"}


def attention_projections(name: str, module: nn.Module) -> bool:
    """True for the linear layers of an attention: q, k, v (or fused qkv), proj, and talking heads."""
    parts = name.split(".")
    inside = next((parts[i + 1 :] for i, p in enumerate(parts) if p in ATTENTION), [])
    return bool(inside) and inside[0] in PROJECTIONS | TALKING_HEADS


def _trained_modules(model: nn.Module) -> list[str]:
    """Names of the modules that own a trainable parameter."""
    return [n for n, m in model.named_modules() if any(p.requires_grad for p in m.parameters(recurse=False))]


def _need_head(model: nn.Module, method: str) -> set[str]:
    head = head_parameters(model)
    if not head:
        raise ValueError(f"{method}: {type(model).__name__} has no classifier head (was it made with num_classes=0?)")
    return head


def full(model: nn.Module) -> Report:
    """Train everything."""
    freeze(model, keep=lambda name: True)
    return Report("full", _trained_modules(model), {}, *count(model))


def linear_probe(model: nn.Module) -> Report:
    """Train the head alone. Raises `ValueError` for a model without one."""
    head = _need_head(model, "linear_probe")
    freeze(model, keep=head.__contains__)
    return Report("linear_probe", _trained_modules(model), {}, *count(model))


def bitfit(model: nn.Module) -> Report:
    """Train every bias (of linear layers, convolutions and norms) and the head. Raises `ValueError` without a bias."""
    head = head_parameters(model)
    biases = {n for n, _ in model.named_parameters() if n.rpartition(".")[2] in BIASES}
    if not biases - head:
        raise ValueError(f"bitfit: {type(model).__name__} has no bias outside of its head")
    freeze(model, keep=(biases | head).__contains__)
    return Report("bitfit", _trained_modules(model), {}, *count(model))


class LoRA(nn.Module):
    """`base(x) + (alpha / rank) * B A x` around an `nn.Linear` (any subclass) or a plain 1x1 `nn.Conv2d`.

    The base is called as a module and its weight is not read, so a layer with a backward of its own (LBP-WHT) stays
    what it is. `lora_A (rank, in)`, `lora_B (out, rank)` for a linear layer and a convolution alike.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float):
        super().__init__()
        conv = isinstance(base, nn.Conv2d)
        inputs, outputs = (base.in_channels, base.out_channels) if conv else (base.in_features, base.out_features)
        like = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.base = base
        self.rank, self.scale = rank, alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, inputs, **like))
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.lora_A, self.lora_B
        if isinstance(self.base, nn.Conv2d):
            return self.base(x) + F.conv2d(F.conv2d(x, a[:, :, None, None]) * self.scale, b[:, :, None, None])
        return self.base(x) + F.linear(F.linear(x, a) * self.scale, b)  # the scale where it is cheap: on the rank

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:.4g}"

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The base with the adapter added to its weight (the sum in float32 at least)."""
        weight = self.base.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        delta = self.scale * self.lora_B.to(wide) @ self.lora_A.to(wide)
        weight.copy_(weight.to(wide) + delta.reshape(weight.shape))
        return self.base


def lora(
    model: nn.Module,
    rank: int = 8,
    alpha: float | None = None,
    match: Match | None = None,
    qkv_rank: int | None = None,
    keep: Callable[[str], bool] | None = None,
) -> Report:
    """Put LoRA around linear layers, in place, and train the adapters and the head only.

    Args:
        rank: of every adapter; `alpha`: the scale is alpha / rank of the layer (default: alpha = rank).
        match: `match(name, module) -> bool` among the linear layers outside of the head; default
            `attention_projections`.
        qkv_rank: the rank of layers named qkv (fused), e.g. 3 * rank.
        keep: `keep(name) -> bool`: further parameters to train, by their name before the adapters came (norms, biases,
            LayerScale, ...). The weight of an adapted layer stays frozen.

    Raises `ValueError` when nothing matches, when LoRA is there already, or for a rank below 1.
    """
    alpha = rank if alpha is None else alpha
    for name, value in (("rank", rank), ("qkv_rank", rank if qkv_rank is None else qkv_rank)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"lora: {name}={value!r} must be a whole number of at least 1")
    if any(isinstance(m, LoRA) for m in model.modules()):
        raise ValueError("lora: this model has LoRA already; merge(model) or detach(model) first")
    heads = head_modules(model)
    candidates = [(n, m) for n, m in linears(model) if not any(n == h or n.startswith(h + ".") for h in heads)]
    found = [(n, m) for n, m in candidates if (match or attention_projections)(n, m)]
    if not found:
        some = ", ".join(n for n, _ in candidates[:4])
        raise ValueError(f"lora: no layer matches in {type(model).__name__}; its linear layers are {some or 'none'}, …")
    head, weights = head_parameters(model), {f"{n}.weight" for n, _ in found}
    freeze(model, keep=lambda n: n in head or (keep is not None and n not in weights and keep(n)))
    separated = separate_qkv_bias(model, lambda n, m: n in dict(found))  # timm would read qkv.weight past the adapter
    note = "qkv biases are added apart from the layer (qkv_bias_separate), so that qkv is called"
    for name, module in found:
        is_qkv = qkv_rank is not None and "qkv" in name.split(".")
        replace(model, name, LoRA(module, qkv_rank if is_qkv else rank, alpha))
    skipped = {n: "not matched" for n, _ in candidates if n not in dict(found)}
    return Report("lora", [n for n, _ in found], skipped, *count(model), [note] if separated else [])


def _restore(model: nn.Module, stock: Callable[[LoRA], nn.Module], method: str) -> None:
    wrapped = [(n, m) for n, m in model.named_modules() if isinstance(m, LoRA)]
    if not wrapped:
        raise ValueError(f"{method}: LoRA is not attached to this {type(model).__name__}")
    for name, module in wrapped:
        replace(model, name, stock(module))
    join_qkv_bias(model)


def merge(model: nn.Module) -> None:
    """Add the adapters to the weights; only the layers that LoRA found are left, with the same outputs."""
    _restore(model, LoRA.merged, "merge")


def detach(model: nn.Module) -> None:
    """Drop the adapters: the layers that LoRA found, bit for bit. What may be trained stays as it is."""
    _restore(model, lambda wrapper: wrapper.base, "detach")
