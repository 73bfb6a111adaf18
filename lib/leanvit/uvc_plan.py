"""What UVC counts and decides: the shapes of a model, its multiply-adds, and a plan of what stays.

Multiply-adds of one image (UVC's specification, 1.6; FLOPs are twice that): the patch embedding E and, for a block of
width D on N tokens, with heads of d query and key dimensions and v_i value dimensions and H hidden units,

    sum_i ( 2 N D d + N^2 d + v_i (2 N D + N^2) )  +  2 N D H

Heads that ComCAT has factored are padded to the wider of d and v_i in both N^2 terms. An attention pooling of timm's
(SigLIP's) is counted as well. The classifier, norms, biases, softmax and activations are not, as in the authors' code.
R = MACs / M0 is the part of the dense model's. The authors' own R leaves the V rows of a removed head dimension in
(`paper_macs`).
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from timm.layers import AttentionPoolLatent, Mlp
from timm.layers.attention import Attention
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from leanvit import surgery
from leanvit.comcat_modules import FactoredAttention, FactoredLinear, PackedLinear
from leanvit.sites import blank_images
from leanvit.uvc_modules import SlicedAttention

FORMAT = 1  # of a plan's JSON


@dataclass(frozen=True)
class BlockShape:
    """One block: heads of `head_dim` query and key dimensions, the value dimensions of each head, hidden units.

    `mlp_ranks`: the ranks of fc1 and fc2 where ComCAT has factored them, None where they are dense. `padded`: the fused
    product runs at the wider of `head_dim` and the values, as in a `FactoredAttention`.
    """

    heads: int
    head_dim: int
    values: tuple[int, ...]
    hidden: int
    mlp_ranks: tuple[int | None, int | None] = (None, None)
    padded: bool = False


@dataclass(frozen=True)
class Shapes:
    """A flat vision transformer as UVC sees it.

    `embed_macs` are those of the patch embedding of one image; an attention pooling takes `pool_macs[0] + pool_macs[1]
    N` on N tokens.
    """

    model: str  # its class
    architecture: str | None  # timm's name of it
    width: int
    prefix: int  # class, distillation and register tokens
    patches: int
    embed_macs: int
    blocks: tuple[BlockShape, ...]
    pool_macs: tuple[int, int] = (0, 0)

    @property
    def tokens(self) -> int:
        """Tokens of an image in the blocks."""
        return self.prefix + self.patches

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `from_dict` reads it back."""
        data = json.loads(json.dumps(asdict(self)))
        # what stock models do not have is left out, so that their plans' texts stay what they were
        if not any(self.pool_macs):
            del data["pool_macs"]
        for block in data["blocks"]:
            if not block["padded"]:
                del block["padded"]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Shapes":
        """The shapes of `to_dict`; what stock models do not have may be left out."""
        blocks = tuple(
            BlockShape(**{k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in b.items()})
            for b in data["blocks"]
        )
        return cls(**{**data, "blocks": blocks, "pool_macs": tuple(data.get("pool_macs", (0, 0)))})


@dataclass(frozen=True)
class BlockPlan:
    """What stays of a block, all by number from 0: heads, of each kept head its value dimensions, hidden units."""

    heads: tuple[int, ...]
    values: tuple[tuple[int, ...], ...]  # one entry a kept head
    units: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """The decision of a search, as plain data: `blocks[l]` is None where block l goes, `patches` None where all stay.

    `shapes` are those of the model the plan is for; `origin` says how it was found (mode, budget, steps ...). Raises
    `ValueError` for numbers that contradict the shapes.
    """

    shapes: Shapes
    blocks: tuple[BlockPlan | None, ...]
    patches: tuple[int, ...] | None = None  # kept patch positions, row by row
    origin: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        problem = _problem(self)
        if problem:
            raise ValueError(f"plan: {problem}")

    @property
    def tokens(self) -> int:
        """Tokens in the blocks."""
        return self.shapes.tokens if self.patches is None else self.shapes.prefix + len(self.patches)

    def macs(self) -> int:
        """Multiply-adds of one image of the sliced model, without the classifier: exactly what torch counts / 2."""
        blocks = [_kept_shape(s, b) for s, b in zip(self.shapes.blocks, self.blocks, strict=True) if b is not None]
        fixed = fixed_macs(self.shapes, self.tokens)
        return fixed + sum(block_macs(b, self.shapes.width, self.tokens) for b in blocks)

    def paper_macs(self) -> int:
        """The same as the authors' R counts it: the V rows of removed dimensions of kept heads stay in."""
        removed = 0
        for shape, block in zip(self.shapes.blocks, self.blocks, strict=True):
            if block is not None:
                kept = sum(len(v) for v in block.values)
                removed += sum(shape.values[i] for i in block.heads) - kept
        return self.macs() + self.tokens * self.shapes.width * removed

    def ratio(self) -> float:
        """R of the sliced model: `macs()` as a part of the dense model's (specification, 1.6)."""
        return self.macs() / dense_macs(self.shapes)

    def to_json(self) -> str:
        """One line of JSON; `Plan.from_json` reads it back to an equal plan."""
        data = {"format": FORMAT, "method": "uvc", **asdict(self), "shapes": self.shapes.to_dict()}
        return json.dumps(data, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Raises `ValueError` for text that is no plan of ours, or one that contradicts its own shapes."""
        try:
            data = json.loads(text)
            if data.get("method") != "uvc" or data.get("format") != FORMAT:
                raise ValueError(f"method {data.get('method')!r}, format {data.get('format')!r}")
            blocks = tuple(None if b is None else _block_plan(b) for b in data["blocks"])
            patches = None if data["patches"] is None else tuple(data["patches"])
            shapes = Shapes.from_dict(data["shapes"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"this text is no UVC plan of format {FORMAT} ({type(error).__name__}: {error}), see Plan.to_json"
            ) from error
        return cls(shapes, blocks, patches, data.get("origin", {}))

    def __str__(self) -> str:
        """The architecture, one block a line."""
        rows = [f"UVC plan for {self.shapes.architecture or self.shapes.model}: R = {self.ratio():.4f}"]
        for i, (shape, block) in enumerate(zip(self.shapes.blocks, self.blocks, strict=True)):
            if block is None:
                rows.append(f"  block {i:2d}  skipped")
                continue
            widths = sorted({len(v) for v in block.values})
            values = f"{widths[0]}" if len(widths) == 1 else f"{widths[0]}..{widths[-1]}"
            rows.append(
                f"  block {i:2d}  heads {len(block.heads)} of {shape.heads}, value dimensions {values} of "
                f"{max(shape.values)}, units {len(block.units)} of {shape.hidden}"
            )
        if self.patches is not None:
            rows.append(f"  patches {len(self.patches)} of {self.shapes.patches}")
        return "\n".join(rows)


def _block_plan(data: Mapping[str, Any]) -> BlockPlan:
    return BlockPlan(tuple(data["heads"]), tuple(tuple(v) for v in data["values"]), tuple(data["units"]))


def _ascending(numbers: Iterable[int], bound: int) -> bool:
    numbers = list(numbers)
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
    return whole and bool(numbers) and numbers == sorted(set(numbers)) and 0 <= numbers[0] and numbers[-1] < bound


def _problem(plan: Plan) -> str | None:
    """Why a plan contradicts its shapes, in words."""
    if len(plan.blocks) != len(plan.shapes.blocks):
        return f"it has {len(plan.blocks)} blocks, its shapes have {len(plan.shapes.blocks)}"
    if plan.patches is not None and not _ascending(plan.patches, plan.shapes.patches):
        return f"patches must be ascending numbers of 0..{plan.shapes.patches - 1}, at least one"
    for i, (shape, block) in enumerate(zip(plan.shapes.blocks, plan.blocks, strict=True)):
        if block is None:
            continue
        if not _ascending(block.heads, shape.heads):
            return f"heads of block {i} must be ascending numbers of 0..{shape.heads - 1}, at least one; skip it whole"
        if not _ascending(block.units, shape.hidden):
            return f"units of block {i} must be ascending numbers of 0..{shape.hidden - 1}, at least one"
        if len(block.values) != len(block.heads):
            return f"block {i} keeps {len(block.heads)} heads and lists the values of {len(block.values)}"
        for head, values in zip(block.heads, block.values, strict=True):
            if not _ascending(values, shape.values[head]):
                return f"values of head {head} of block {i} must be ascending numbers of 0..{shape.values[head] - 1}"
    return None


# --- counting --------------------------------------------------------------------------------------------------------


def attention_macs(shape: BlockShape, width: int, tokens: int) -> int:
    """Multiply-adds of the attention of one image: qkv, the two products, projection (specification, 1.6)."""
    if shape.padded:
        wide = sum(max(shape.head_dim, v) for v in shape.values)
        rows = 2 * shape.heads * shape.head_dim + 2 * sum(shape.values)
        return tokens * width * rows + 2 * tokens**2 * wide
    per_head = 2 * tokens * width * shape.head_dim + tokens**2 * shape.head_dim
    return shape.heads * per_head + sum(shape.values) * (2 * tokens * width + tokens**2)


def mlp_macs(shape: BlockShape, width: int, tokens: int) -> int:
    """Multiply-adds of the MLP of one image (specification, 1.6); a layer factored at rank r takes `r (in + out)` a
    token.
    """
    return sum(tokens * (width * shape.hidden if r is None else r * (width + shape.hidden)) for r in shape.mlp_ranks)


def block_macs(shape: BlockShape, width: int, tokens: int) -> int:
    """Multiply-adds of a block of one image."""
    return attention_macs(shape, width, tokens) + mlp_macs(shape, width, tokens)


def fixed_macs(shapes: Shapes, tokens: int) -> int:
    """Multiply-adds of one image outside of the blocks: patch embedding and attention pooling of so many tokens."""
    return shapes.embed_macs + shapes.pool_macs[0] + shapes.pool_macs[1] * tokens


def dense_macs(shapes: Shapes) -> int:
    """M0: multiply-adds of one image of the model as it is, without the classifier."""
    blocks = sum(block_macs(b, shapes.width, shapes.tokens) for b in shapes.blocks)
    return fixed_macs(shapes, shapes.tokens) + blocks


def head_macs(model: nn.Module) -> int:
    """Multiply-adds of the classifiers on one image."""
    modules = (model.get_submodule(name) for name in surgery.head_modules(model))
    return sum(m.weight.numel() for head in modules for m in head.modules() if isinstance(m, nn.Linear))


def _kept_shape(shape: BlockShape, block: BlockPlan) -> BlockShape:
    values = tuple(len(v) for v in block.values)
    # uneven heads are computed run by run (SlicedAttention), without padding
    padded = shape.padded and len(set(values)) == 1
    return BlockShape(len(block.heads), shape.head_dim, values, len(block.units), shape.mlp_ranks, padded)


# --- reading a model -------------------------------------------------------------------------------------------------


def _check_block(i: int, block: nn.Module) -> None:
    """Raise `ValueError` for a block whose attention or MLP cannot be cut."""
    attn, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
    if type(attn) not in (Attention, SlicedAttention, FactoredAttention):
        raise ValueError(
            f"UVC cuts timm's Attention; blocks.{i} ({type(block).__name__}) has {type(attn).__name__} as attn"
        )
    if type(mlp) is not Mlp:
        raise ValueError(f"UVC cuts timm's Mlp; blocks.{i} ({type(block).__name__}) has {type(mlp).__name__} as mlp")
    if not isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity) or not isinstance(mlp.norm, nn.Identity):
        raise ValueError(
            f"blocks.{i} normalises over all heads or hidden units (scale norm): a removed one would change the others"
        )
    if getattr(attn, "gate", None) is not None:
        raise ValueError(f"blocks.{i} gates the attention's output by a layer of its own, which UVC does not cut")
    layers = {"attn.qkv": attn.qkv, "attn.proj": attn.proj, "mlp.fc1": mlp.fc1, "mlp.fc2": mlp.fc2}
    for name in ("mlp.fc1", "mlp.fc2"):
        if type(layer := layers[name]) is FactoredLinear:
            del layers[name]
            layers |= {f"{name}.first": layer.first, f"{name}.second": layer.second}
    for name, layer in layers.items():
        packed = name == "attn.qkv" and type(attn) is FactoredAttention and type(layer) is PackedLinear
        if type(layer) is not nn.Linear and not packed:
            raise ValueError(
                f"blocks.{i}.{name} is {type(layer).__name__}, UVC cuts nn.Linear; merge or detach what was attached "
                "to it, or cut first and attach afterwards"
            )


def value_dims(attn: nn.Module) -> tuple[int, ...]:
    """The value dimensions of each head."""
    return tuple(getattr(attn, "values", None) or [attn.head_dim] * attn.num_heads)


def _shape(block: nn.Module) -> BlockShape:
    attn, mlp = block.attn, block.mlp
    ranks = tuple(layer.rank if type(layer) is FactoredLinear else None for layer in (mlp.fc1, mlp.fc2))
    padded = type(attn) is FactoredAttention
    return BlockShape(attn.num_heads, attn.head_dim, value_dims(attn), mlp.fc1.out_features, ranks, padded)


def embed_macs(model: nn.Module) -> int:
    """Multiply-adds of the patch embedding of one image, counted by torch."""
    images = blank_images(model, 1)
    with torch.no_grad(), surgery.undisturbed(model), FlopCounterMode(display=False) as counter:
        model.patch_embed(images)
    return counter.get_total_flops() // 2


def pool_macs(model: nn.Module) -> tuple[int, int]:
    """`(a, b)`: timm's attention pooling takes a + b N multiply-adds an image, with N tokens in the blocks.

    a is negative where much of the prefix is left out of the pooling. The paper's models have none.

    Raises `ValueError` for another pooling with layers of its own.
    """
    pool = getattr(model, "attn_pool", None)
    if pool is None:
        return 0, 0
    if type(pool) is not AttentionPoolLatent:
        raise ValueError(f"UVC counts timm's AttentionPoolLatent; attn_pool is {type(pool).__name__}")
    width, latents = pool.num_heads * pool.head_dim, pool.latent_len
    whole, kv = (sum(m.weight.numel() for m in part.modules() if isinstance(m, nn.Linear)) for part in (pool, pool.kv))
    each = kv + 2 * latents * width
    unseen = 0 if getattr(model, "pool_include_prefix", False) else getattr(model, "num_prefix_tokens", 0)
    return latents * (whole - kv) - unseen * each, each


def read_shapes(model: nn.Module) -> Shapes:
    """The shapes of a timm vision transformer with a flat list of blocks of timm's Attention and Mlp.

    >>> import timm
    >>> from leanvit.uvc_plan import dense_macs, read_shapes
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2,
    ...                           num_heads=2, num_classes=4)
    >>> shapes = read_shapes(model)
    >>> shapes.tokens, dense_macs(shapes)  # multiply-adds of one image
    (17, 553088)

    Raises `ValueError` that names the block for anything else (hierarchical models, RoPE, gated MLPs, adapters).
    """
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)):
        raise ValueError(f"{type(model).__name__} has no flat list of blocks (model.blocks); UVC needs a plain ViT")
    surgery.refuse_adapted(model, "UVC")
    for i, block in enumerate(blocks):
        _check_block(i, block)
    patches = getattr(getattr(model, "patch_embed", None), "num_patches", None)
    width = getattr(model, "embed_dim", None)
    if not isinstance(patches, int) or not isinstance(width, int):
        raise ValueError(f"{type(model).__name__} does not tell its patches (patch_embed.num_patches) and embed_dim")
    kept = getattr(getattr(model, "patch_drop", None), "uvc_keep", None)
    seen = tuple(_shape(b) for b in blocks)
    config = getattr(model, "pretrained_cfg", None) or {}
    return Shapes(
        type(model).__name__,
        config.get("architecture"),
        width,
        getattr(model, "num_prefix_tokens", 0),
        patches if kept is None else len(kept),
        embed_macs(model),
        seen,
        pool_macs(model),
    )


def whole_plan(shapes: Shapes) -> Plan:
    """The plan that removes nothing."""
    return Plan(shapes, tuple(whole_block(b) for b in shapes.blocks))


def whole_block(shape: BlockShape) -> BlockPlan:
    """A block that stays as it is."""
    return BlockPlan(
        tuple(range(shape.heads)), tuple(tuple(range(v)) for v in shape.values), tuple(range(shape.hidden))
    )
