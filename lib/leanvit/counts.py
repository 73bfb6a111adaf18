"""Trained parameters of the published comparisons, counted on attached models of the published shapes.

Nothing is trained and no weight is needed: timm builds the models on the meta device, each method is attached, and
what requires a gradient is counted by name. `FORMULAS` says the same in closed form (KAdaptation's specification, 2).

KAdaptation's paper reports the mean over ELEVATER's 20 data sets: a head on CLIP's 512-d projected feature has
513 * classes numbers, 1,151 classes in all, hence 513 * 1151 / 20 = 29,523.15 on average; sums are truncated.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial

import timm
import torch
from torch import nn

from leanvit import baselines, block_expansion, kadaptation
from leanvit.head import few_shot_head
from leanvit.surgery import head_parameters

MEAN_CLASSES = Fraction(1151, 20)
CLIP_B32 = "vit_base_patch32_clip_quickgelu_224.openai"
CLIP_B16 = "vit_base_patch16_clip_quickgelu_224.openai"
DINO_B16 = "vit_base_patch16_224.dino"

# numbers trained outside of the head, by (width d, depth L)
FORMULAS = {
    "linear probing": lambda d, layers: 0,
    "KAdaptation": kadaptation.parameters_formula,
    "Compacter": lambda d, layers, w=64, r=1: layers * (2 * d + 2 * r * (d + w) + w + d),
    "LoRA": lambda d, layers, r=4: layers * 4 * d * r,
    "Adapter": lambda d, layers, w=64: layers * (2 * d * w + w + d + 2 * d),
}


@dataclass(frozen=True)
class Count:
    """Trained numbers of one method: in the backbone (in all, and by kind of tensor) and in the head."""

    backbone: int
    head: int | Fraction
    kinds: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Backbone and head, truncated as the papers do."""
        return int(self.backbone + self.head)

    @property
    def doubled_head(self) -> int:
        """The total with the head counted twice, as PEFT 0.3.0 did (block expansion's specification, 2.1)."""
        return int(self.backbone + 2 * self.head)


def trained(model: nn.Module) -> Count:
    """Count what requires a gradient; the kinds are the names with all blocks taken together (`blocks.*.`)."""
    names, kinds, head = head_parameters(model), {}, 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name in names:
            head += parameter.numel()
            continue
        kind = re.sub(r"^blocks\.\d+\.", "blocks.*.", name)
        kinds[kind] = kinds.get(kind, 0) + parameter.numel()
    return Count(sum(kinds.values()), head, kinds)


PEVIT: dict[str, Callable[[nn.Module], object]] = {
    "KAdaptation": partial(kadaptation.attach, n=32, rank=1, rule_rank=1),
    "linear probing": baselines.linear_probe,
    "full": baselines.full,
    "Adapter": baselines.adapter,
    "Compacter": baselines.compacter,
    "LoRA": baselines.lora_qv,
}


def pevit(method: str, name: str = CLIP_B32) -> Count:
    """What `method` (a key of `PEVIT`) trains on a CLIP tower, with the mean head of the 20 data sets.

    Raises `ValueError` for another method.
    """
    classes = 20
    with torch.device("meta"):
        model = timm.create_model(name)
        few_shot_head(model, classes, keep_projection=True)
    model.fc_norm.bias = None  # of the projection, timm's; OpenAI's has none
    _method(PEVIT, method)(model)
    measured = trained(model)
    return replace(measured, head=Fraction(measured.head, classes) * MEAN_CLASSES)


EXPANSION: dict[str, Callable[[nn.Module], object]] = {
    "All": baselines.full,
    "Top-3": partial(baselines.top_blocks, n=3),
    "Top-3 and final norm": partial(baselines.top_blocks, n=3, norm=True),
    "Linear": baselines.linear_probe,
    **{f"LoRA r={rank}": partial(baselines.lora_qv, rank=rank) for rank in (4, 8, 16)},
    **{f"Block p={p}": partial(block_expansion.attach, p=p) for p in (1, 2, 3, 4)},
}


def expansion(method: str, name: str = DINO_B16, num_classes: int = 100) -> Count:
    """What `method` (a key of `EXPANSION`) trains on a timm ViT, in block expansion's table.

    Raises `ValueError` for another method.
    """
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=num_classes)
    _method(EXPANSION, method)(model)
    return trained(model)


def _method(table: dict[str, Callable], method: str) -> Callable[[nn.Module], object]:
    if method not in table:
        raise ValueError(f"unknown method {method!r}; there are {', '.join(table)}")
    return table[method]
