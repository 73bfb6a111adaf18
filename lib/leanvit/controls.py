"""What a search has to beat at equal FLOPs: random pruning, pruning by magnitude, and the library one would take.

`cut(model, kind, budget)` gives a smaller copy of a vision transformer whose multiply-adds are at most the budget, and
less than one group below it; nothing is trained. The kinds:

- "random", "magnitude": plans of `uvc_budget`, which take whole heads and hidden units in steps of 16.
- "isomorphic": Torch-Pruning with isomorphic ranking (Fang, Ma, Mi, Wang: "Isomorphic Pruning for Vision Models",
  ECCV 2024, arXiv 2407.04616). It takes heads, hidden units and the width of the residual stream, each kind ranked for
  itself over all blocks. With batches the ranking is by first-order Taylor terms, as in that paper, else by magnitude.
- "isomorphic_narrow": the same, with the residual stream as wide as it was: the groups that UVC's plans know.

ToMe is not among them: it merges tokens while it runs and takes no weight away, so that it would stand beside any of
these, not against them (and its kernel is no part of torch or timm).
"""

import copy
import warnings
from collections.abc import Callable, Iterable

import torch
from timm.layers.attention import Attention
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from leanvit import extras, surgery
from leanvit.distill import cross_entropy
from leanvit.evaluate import device_of
from leanvit.sites import blank_images
from leanvit.uvc_budget import check_budget, magnitude_plan, random_plan
from leanvit.uvc_cost import FlopsCost
from leanvit.uvc_plan import dense_macs, head_macs, read_shapes
from leanvit.uvc_slicing import apply
from leanvit.uvc_training import Loss

KINDS = ("random", "magnitude", "isomorphic", "isomorphic_narrow")
HALVINGS = 8  # of the interval of ratios: 1/256 of each kind of group


def cut(
    model: nn.Module,
    kind: str,
    budget: float,
    *,
    seed: int = 0,
    batches: Iterable[tuple[Tensor, Tensor]] | None = None,
    loss: Loss | None = None,
) -> nn.Module:
    """A copy of `model` with at most `budget` of its multiply-adds (classifiers not counted).

    Args:
        model: a timm vision transformer with a flat list of blocks; it stays as it is.
        kind: one of `KINDS`.
        seed: of "random".
        batches, loss: for the Taylor terms of the isomorphic kinds: images `(B, 3, H, W)` and labels `(B,)`;
            cross-entropy by default.

    Raises `ValueError`: a kind that is none, a budget that cannot be met, a model that cannot be cut. `MissingExtra`:
    an isomorphic kind without Torch-Pruning.
    """
    if kind not in KINDS:
        raise ValueError(f"cut: {kind!r} is none of {', '.join(KINDS)}")
    if kind.startswith("isomorphic"):
        return isomorphic(model, budget, batches=batches, loss=loss, residual=kind == "isomorphic")
    plan = magnitude_plan(model, budget) if kind == "magnitude" else random_plan(model, budget, seed)
    smaller = copy.deepcopy(model)
    apply(smaller, plan)
    return smaller


def macs(model: nn.Module) -> int:
    """Multiply-adds of one image, counted by torch, without the classifiers: what R is a ratio of."""
    # a copy without gradients, not no_grad, under which torch's counter stops at queries that are parameters
    probe = copy.deepcopy(model).requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        probe(blank_images(model, 1))
    return counter.get_total_flops() // 2 - head_macs(model)


def isomorphic(
    model: nn.Module,
    budget: float,
    *,
    batches: Iterable[tuple[Tensor, Tensor]] | None = None,
    loss: Loss | None = None,
    residual: bool = True,
) -> nn.Module:
    """Torch-Pruning's isomorphic pruning to a budget; see `cut`.

    One ratio for every kind of group is found by bisection, so that the model just meets the budget; heads are few and
    coarse, so what is left over then goes back to hidden units, the least important last. `batches` of images
    `(B, 3, H, W)` and labels `(B,)`. Raises `ValueError` as `cut` and for no batch, `MissingExtra` without the library.
    """
    shapes = read_shapes(model)
    extras.need("isomorphic pruning", "peers", "torch_pruning")
    _check_library(model)
    check_budget(budget, FlopsCost(shapes), 0.0)
    limit = int(budget * dense_macs(shapes) * (1 + 1e-12))
    gradients = None if batches is None else _gradients(model, batches, loss or cross_entropy)
    low, high = 0.0, 1.0  # low may exceed the budget, high never does
    found = None
    for _ in range(HALVINGS):
        ratio = (low + high) / 2
        trial = _pruned(model, ratio, ratio, gradients, residual)
        if macs(trial) <= limit:
            high, found = ratio, trial
        else:
            low = ratio
    if budget == 1:
        return copy.deepcopy(model)
    if found is None:
        least = macs(trial) / dense_macs(shapes)
        raise ValueError(
            f"isomorphic: budget={budget:g} cannot be met: Torch-Pruning leaves one group of each kind, {least:.4f}"
        )
    return _filled(model, high, found, limit, gradients, residual)


def _check_library(model: nn.Module) -> None:
    """Raise `ValueError` for an attention that Torch-Pruning does not follow."""
    if getattr(model, "attn_pool", None) is not None:
        raise ValueError(
            f"isomorphic: {type(model).__name__} pools by an attention of its own, which Torch-Pruning would cut as "
            "any layer; use kind='magnitude'"
        )
    for i, block in enumerate(model.blocks):
        if type(block.attn) is not Attention:
            raise ValueError(
                f"isomorphic: blocks.{i}.attn is {type(block.attn).__name__} of an earlier cut, and Torch-Pruning "
                "follows timm's Attention alone; use it before that cut"
            )
        if not all(isinstance(m, nn.Identity) for m in (block.attn.q_norm, block.attn.k_norm)):
            raise ValueError(
                f"isomorphic: blocks.{i} normalises queries and keys, which Torch-Pruning does not follow; use "
                "kind='magnitude'"
            )


def _filled(model: nn.Module, ratio: float, found: nn.Module, limit: int, gradients, residual: bool) -> nn.Module:
    """As many more hidden units as fit under the limit."""
    unit = 2 * read_shapes(found).tokens * found.embed_dim
    whole, kept = (sum(b.mlp.fc1.out_features for b in m.blocks) for m in (model, found))
    spare = min((limit - macs(found)) // unit, whole - kept)
    while spare > 0:
        # + 0.5: Torch-Pruning rounds the number that stays down
        trial = _pruned(model, ratio, 1 - (kept + spare + 0.5) / whole, gradients, residual)
        if macs(trial) <= limit:
            return trial
        spare -= 1
    return found


def _pruned(model: nn.Module, ratio: float, unit_ratio: float, gradients, residual: bool) -> nn.Module:
    """A copy of `model` without this part of its heads and its width, and that part of its hidden units."""
    import torch_pruning  # two seconds of import, for those who need it

    small = copy.deepcopy(model)
    for p in small.parameters():
        p.requires_grad_(True)
    if gradients is not None:
        for p, gradient in zip(small.parameters(), gradients, strict=True):
            p.grad = gradient.clone()
    stay = [small.get_submodule(name) for name in surgery.head_modules(small)]
    if not residual:
        stay += [small.patch_embed, *(layer for b in small.blocks for layer in (b.attn.proj, b.mlp.fc2))]
    heads = {b.attn.qkv: b.attn.num_heads for b in small.blocks}
    widths, units = [b.attn.head_dim for b in small.blocks], sum(b.mlp.fc1.out_features for b in small.blocks)
    kinds = torch_pruning.importance
    importance = kinds.GroupMagnitudeImportance() if gradients is None else kinds.GroupTaylorImportance()
    with warnings.catch_warnings(), torch.enable_grad():  # its graph is the one of autograd
        warnings.filterwarnings("ignore", module="torch_pruning")
        pruner = torch_pruning.pruner.BasePruner(
            small.eval(), blank_images(small, 1), _best_kept(importance, heads),
            global_pruning=True, isomorphic=True, pruning_ratio=_leaving(1, small.embed_dim, ratio),
            head_pruning_ratio=_leaving(len(widths), sum(heads.values()), ratio),
            pruning_ratio_dict={tuple(b.mlp.fc1 for b in small.blocks): _leaving(len(widths), units, unit_ratio)},
            num_heads=heads, prune_num_heads=True, prune_head_dims=False, ignored_layers=stay,
            # dictionaries of its own: the library's defaults are shared between calls
            in_channel_groups={}, out_channel_groups={}, unwrapped_parameters=_loose(small),
        )  # fmt: skip
        pruner.step()
    for block, width in zip(small.blocks, widths, strict=True):
        # from the layer, not from the library's count, which is 0 where it wanted all heads and could not have them
        block.attn.num_heads = block.attn.qkv.out_features // (3 * width)
        block.attn.attn_dim = block.attn.num_heads * width
    small.embed_dim = small.num_features = small.head_hidden_size = small.blocks[0].attn.qkv.in_features
    for p, old in zip(small.parameters(), model.parameters(), strict=True):
        p.requires_grad_(old.requires_grad)
        p.grad = None
    return small.train(model.training)


def _leaving(least: int, whole: int, ratio: float) -> float:
    """The ratio, so that at least that many of the whole stay (the library rounds what stays down)."""
    return min(max(ratio, 0.0), 1 - (least + 0.5) / whole)


def _best_kept(importance: Callable, heads: dict[nn.Module, int]) -> Callable:
    """The same importance with the best head of each attention and the best channel of each other group out of reach.

    Torch-Pruning refuses to take all channels of a layer and then takes none: a block that it finds the least useful of
    all would stay whole.
    """

    import torch_pruning

    def scored(group) -> Tensor | None:
        scores = importance(group)
        if scores is not None:
            # the residual stream meets qkv, too, but at its input
            outputs = [d.target.module for d, _ in group if d.handler == torch_pruning.prune_linear_out_channels]
            parts = scores.view(next((heads[m] for m in outputs if m in heads), len(scores)), -1)
            parts[parts.mean(1).argmax()] = float("inf")
        return scores

    return scored


def _loose(model: nn.Module) -> list[tuple[nn.Parameter, int]]:
    """Parameters outside of layers (class token, positions, LayerScale), each with the dimension of the width."""
    own = (nn.Linear, nn.Conv2d, nn.LayerNorm)
    layers = [m for m in model.modules() if not isinstance(m, own)]
    return [(p, p.dim() - 1) for m in layers for p in m.parameters(recurse=False)]


def _gradients(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], loss: Loss) -> list[Tensor]:
    """Of the mean loss over the batches, one for each parameter."""
    probe, device, count = copy.deepcopy(model).eval(), device_of(model), 0
    for p in probe.parameters():
        p.requires_grad_(True)
    for images, labels in batches:
        loss(probe, images.to(device), labels.to(device)).backward()
        count += 1
    if not count:
        raise ValueError("isomorphic: there are no batches")
    return [torch.zeros_like(p) if p.grad is None else p.grad / count for p in probe.parameters()]
