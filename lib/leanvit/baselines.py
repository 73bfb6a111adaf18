"""What the papers compare with. Each function prepares a timm model in place, returns a Report; train.fit trains it.

    full, linear_probe, top_blocks     standard fine-tuning: everything, the head, the last blocks and the head
    bitfit                             every bias (arXiv 2106.10199)
    lora, lora_qv                      low-rank updates (lora.py)
    adapter, compacter                 bottlenecks behind the MLPs (adapters.py)
    vera                               trained vectors around shared random matrices (arXiv 2310.11454), by PEFT
    wise, l2_sp                        full fine-tuning that stays near the start (arXiv 2109.01903, 1802.01483)
    lora_scrambled                     a demonstration of KAdaptation's released LoRA (lora.py)

LP-FT (arXiv 2202.10054) is `linear_probe`, a fit, then `full` and another fit. The head is always trained. `merge`
folds adapters into stock layers where that can be, `detach` drops them.
"""

import math
import re
import warnings
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanvit import extras, qkv
from leanvit.adapters import Adapter, Compacter, adapter, compacter
from leanvit.lora import (
    LoRA,
    LowRank,
    Scrambled,
    attention_projections,
    lora,
    lora_qv,
    lora_scrambled,
)
from leanvit.qkv import SEPARATED
from leanvit.sites import join_qkv_bias, separate_qkv_bias
from leanvit.surgery import (
    Match,
    Merged,
    Report,
    check_whole,
    count,
    fold,
    freeze,
    head_parameters,
    need_head,
    refuse_adapted,
    replace,
)

__all__ = [
    "LoRA", "adapter", "attention_projections", "bitfit", "compacter", "detach", "full", "l2_sp", "linear_probe",
    "lora", "lora_qv", "lora_scrambled", "merge", "top_blocks", "vera", "wise",
]  # fmt: skip

BIASES = {"bias", "q_bias", "k_bias", "v_bias"}


def _trained_modules(model: nn.Module) -> list[str]:
    """Names of the modules that own a trainable parameter."""
    return [n for n, m in model.named_modules() if any(p.requires_grad for p in m.parameters(recurse=False))]


def full(model: nn.Module) -> Report:
    """Train everything.

    >>> from leanvit import baselines, models
    >>> baselines.full(models.create("embedded_vit")).trainable
    683242
    """
    freeze(model, keep=lambda name: True)
    return Report("full", _trained_modules(model), {}, *count(model))


def linear_probe(model: nn.Module) -> Report:
    """Train the head alone. Raises `ValueError` for a model without one.

    >>> from leanvit import baselines, models
    >>> baselines.linear_probe(models.create("embedded_vit")).trainable  # 10 (96 + 1)
    970
    """
    head = need_head(model, "linear_probe")
    freeze(model, keep=head.__contains__)
    return Report("linear_probe", _trained_modules(model), {}, *count(model))


def top_blocks(model: nn.Module, n: int, *, norm: bool = False) -> Report:
    """Train the last `n` blocks and the head; with `norm` the final norm too (`norm`, `fc_norm`).

    Block expansion's row "Top-3" is n=3 (its released code lacks the mode; this is the natural reading of the table,
    and three blocks stacked on top would have the same count).

    Raises `ValueError` for a model without a head or a flat list of blocks, or an `n` outside of 1 .. their number.

    >>> from leanvit import baselines, models
    >>> baselines.top_blocks(models.create("embedded_vit"), n=1).trainable  # 12 D^2 + 13 D, and the head
    112810
    """
    check_whole("top_blocks", n=n)
    head, blocks = need_head(model, "top_blocks"), getattr(model, "blocks", None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)):
        raise ValueError(f"top_blocks: {type(model).__name__} has no flat list `blocks`; a plain ViT is needed")
    if n > len(blocks):
        raise ValueError(f"top_blocks: n={n} is more than the {len(blocks)} blocks of this {type(model).__name__}")
    kept = tuple(f"blocks.{i}." for i in range(len(blocks) - n, len(blocks)))
    if norm:  # a CLIP tower's projection may stand in the place of fc_norm (head.few_shot_head)
        kept += tuple(f"{m}." for m in ("norm", "fc_norm") if not isinstance(getattr(model, m, None), nn.Linear))
    freeze(model, keep=lambda name: name in head or name.startswith(kept))
    return Report("top_blocks", _trained_modules(model), {}, *count(model))


def bitfit(model: nn.Module) -> Report:
    """Train every bias (of linear layers, convolutions and norms) and the head. Raises `ValueError` without a bias.

    >>> from leanvit import baselines, models
    >>> baselines.bitfit(models.create("embedded_vit")).trainable  # 11 D a block, patches and last norm, the head
    7498
    """
    head = head_parameters(model)
    biases = {n for n, _ in model.named_parameters() if n.rpartition(".")[2] in BIASES}
    if not biases - head:
        raise ValueError(f"bitfit: {type(model).__name__} has no bias outside of its head")
    freeze(model, keep=(biases | head).__contains__)
    return Report("bitfit", _trained_modules(model), {}, *count(model))


# ---- VeRA ----------------------------------------------------------------------------------------------------------


def vera(
    model: nn.Module, rank: int = 256, *, d_initial: float = 0.1, seed: int = 0, match: Match | None = None
) -> Report:
    """Put PEFT's VeRA on the layers of queries and values, in place; train its two vectors a layer and the head.

    y = W x + b * (B (d * (A x))) with A, B random, frozen and shared by all layers. At the start d (rank,) is
    `d_initial` and b is 0, so that the output does not change. PEFT knows no part of a layer: a fused qkv is adapted
    whole, keys included, with rank + 3 D parameters a block.

    A and B are not stored: they come from `seed`, which stands in the parameters' names (`vera_lambda_b.seed0`), so
    that loading into a model attached with another seed fails. `match` chooses among the layers.

    Raises `ValueError` as `lora_qv`, and for a d_initial of 0 or none that is finite; `MissingExtra` without PEFT.

    >>> from leanvit import baselines, models
    >>> report = baselines.vera(models.create("embedded_vit"), rank=16)
    >>> report.trainable  # rank + 3 D numbers a block, and the head
    2794
    """
    check_whole("vera", rank=rank)
    check_whole("vera", 0, seed=seed)
    number = isinstance(d_initial, int | float) and not isinstance(d_initial, bool) and math.isfinite(d_initial)
    if not number or d_initial == 0:  # b starts at zero: with d at zero too neither would ever get a gradient
        raise ValueError(f"vera: d_initial={d_initial!r} must be a finite number other than 0")
    refuse_adapted(model, "vera")
    head = need_head(model, "vera")
    rows, skipped = qkv.choose(model, "vera", match)
    found = list(dict.fromkeys(r.layer for r in rows))
    extras.need("vera", "peers", "peft")
    import peft  # on first use: it imports transformers

    trained = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Specified to not save vera_A and vera_B")  # on purpose, see above
            config = peft.VeraConfig(
                r=rank, d_initial=d_initial, projection_prng_key=seed, save_projection=False,
                target_modules="|".join(re.escape(n) for n in found),
            )  # fmt: skip
            peft.VeraModel(model, config, f"seed{seed}")  # replaces the layers in place; the tuner is not needed later
    except Exception:
        for name, module in [(n, m) for n, m in model.named_modules() if _is_vera(m)]:
            replace(model, name, module.get_base_layer())
        for parameter, flag in trained:
            parameter.requires_grad_(flag)
        raise
    del model.peft_config
    for name in found:
        layer = model.get_submodule(name)
        layer.train(layer.get_base_layer().training)
    freeze(model, keep=lambda n: n in head or ".vera_lambda_" in n)
    notes = [SEPARATED] if separate_qkv_bias(model, lambda n, m: n in found) else []
    if any(n.endswith("qkv") for n in found):
        notes.append("PEFT adapts a fused qkv as one layer: the keys are adapted too")
    return Report("vera", found, skipped, *count(model), notes)


def _is_vera(module: nn.Module) -> bool:
    return hasattr(module, "vera_lambda_b")


def _merged_vera(layer: nn.Module) -> nn.Module:
    base, (name,) = layer.get_base_layer(), layer.vera_lambda_b
    wide = torch.promote_types(base.weight.dtype, torch.float32)
    base.weight.copy_(base.weight.to(wide) + layer.get_delta_weight(name).to(wide))
    return base


# ---- back to stock layers ------------------------------------------------------------------------------------------


def _attached(model: nn.Module, method: str) -> list[tuple[str, nn.Module]]:
    """The layers with an adapter of this file, by name."""
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, (LoRA, Adapter, Compacter)) or _is_vera(m)]
    found += qkv.shifted(model, LowRank)
    if not found:
        raise ValueError(f"{method}: none of LoRA, Adapter, Compacter, VeRA is attached to this {type(model).__name__}")
    return found


def merge(model: nn.Module) -> Merged:
    """Add LoRA or VeRA to the weights; only the layers that they found are left, with the same outputs.

    What it returns undoes it: `merged = merge(model)`, later `merged.unmerge()`.
    Raises `ValueError` where no weight can hold the adapter (Adapter, Compacter, `lora_scrambled`), or without one.

    >>> from leanvit import baselines, models
    >>> model = models.create("embedded_vit")
    >>> report = baselines.lora_qv(model)  # and a training
    >>> merged = baselines.merge(model)
    >>> type(model.blocks[0].attn.qkv).__name__
    'Linear'
    >>> merged.unmerge()
    >>> type(model.blocks[0].attn.qkv).__name__
    'Shifted'
    """
    found = _attached(model, "merge")
    for name, module in found:
        if isinstance(module, (Adapter, Compacter)):
            what = f"{type(module).__name__} ({name}) cannot be folded into a weight: {module.reason}"
            raise ValueError(f"merge: {what}. Keep it, or detach(model)")
        if any(isinstance(delta, Scrambled) for delta in module.children()):
            raise ValueError(f"merge: the scrambled LoRA ({name}) mixes tokens and images, which no weight of it does")
    undo = Merged(model, [name for name, _ in found])
    with torch.no_grad():
        for name, module in found:
            if _is_vera(module):
                fold(model, name, _merged_vera(module), "VeRA")
            else:
                fold(model, name, module.merged(), "LoRA")
    join_qkv_bias(model)
    return undo


def detach(model: nn.Module) -> None:
    """Drop the adapters: the layers that they found, bit for bit. What may be trained stays as it is.

    Raises `ValueError` where none is attached.

    >>> from leanvit import baselines, models
    >>> model = models.create("embedded_vit")
    >>> report = baselines.adapter(model)
    >>> baselines.detach(model)
    >>> type(model.blocks[0].mlp).__name__
    'Mlp'
    """
    for name, module in _attached(model, "detach"):
        replace(model, name, module.get_base_layer() if _is_vera(module) else module.base)
    join_qkv_bias(model)


# ---- staying near the start ----------------------------------------------------------------------------------------


def wise(model: nn.Module, before: Mapping[str, Tensor], alpha: float) -> None:
    """WiSE-FT: set every weight and buffer outside of the head to `(1 - alpha) * before + alpha * now`, in place.

    `before` is the state dict of the same model before its fine-tuning, each tensor of the same shape as now (the head
    may be missing or another); alpha 0 is the old backbone, 1 the fine-tuned one, both bit for bit. The head stays as
    it was trained. To look at several alphas, start each from a copy of the fine-tuned model.

    Raises `ValueError` for an alpha outside of [0, 1], or a tensor that `before` lacks or has in another shape; the
    model is then unchanged.

    >>> from leanvit import baselines, models
    >>> before, model = models.create("embedded_vit").state_dict(), models.create("embedded_vit", checkpoint="embedded")
    >>> baselines.wise(model, before, alpha=0.0)
    >>> model.blocks[0].mlp.fc1.weight.equal(before["blocks.0.mlp.fc1.weight"])
    True
    """
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise ValueError(f"wise: alpha={alpha!r} must lie in [0, 1]")
    head = head_parameters(model)
    pairs = []
    stored = model.state_dict().keys()
    for name, now in [*model.named_parameters(), *model.named_buffers()]:  # a shared tensor comes once
        if name in head or name not in stored or not now.is_floating_point():
            continue
        if name not in before:
            raise ValueError(f"wise: the state dict from before the training has no tensor {name}")
        if before[name].shape != now.shape:
            shapes = f"{tuple(before[name].shape)} before the training and {tuple(now.shape)} now"
            raise ValueError(f"wise: {name} has shape {shapes}")
        pairs.append((before[name], now))
    with torch.no_grad():
        for old, now in pairs:
            wide = torch.promote_types(now.dtype, torch.float32)
            now.copy_(torch.lerp(old.to(now.device, wide), now.to(wide), alpha))


def l2_sp(model: nn.Module, alpha: float) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """L2-SP: a loss for `train.fit`, cross-entropy + (alpha / 2) * sum of (w - w0)^2.

    w runs over the trained parameters outside of the head, w0 are their values now: call it after `full` and before
    `fit`. The head, which has no start to stay near, is left out; the recipe's weight decay pulls everything towards
    zero and should be 0. One copy of the trained weights is kept.

    Raises `ValueError` for an alpha below 0, or when nothing outside of the head is trained.

    >>> import torch
    >>> from leanvit import baselines, models
    >>> model = models.create("embedded_vit")
    >>> report = baselines.full(model)
    >>> loss = baselines.l2_sp(model, alpha=0.01)  # for train.fit(..., loss=loss)
    >>> loss(model, torch.rand(2, 3, 32, 32), torch.tensor([0, 1])).shape
    torch.Size([])
    """
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha < math.inf:
        raise ValueError(f"l2_sp: alpha={alpha!r} must be a number of at least 0")
    head = head_parameters(model)
    trained = [p for n, p in model.named_parameters() if p.requires_grad and n not in head]
    if not trained:
        raise ValueError("l2_sp: no parameter outside of the head is trained; call full(model) first")
    start = [p.detach().clone() for p in trained]

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        value = F.cross_entropy(model(images).float(), labels)
        for i, (now, was) in enumerate(zip(trained, start, strict=True)):
            if was.device != now.device:  # fit moves the model
                start[i] = was = was.to(now.device)
            value = value + alpha / 2 * (now.float() - was.float()).square().sum()
        return value

    return loss
