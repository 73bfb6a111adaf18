"""Where the linear layers of a vision transformer sit on its token grid, and what their backward pass costs.

The counts are those of LBP-WHT's paper and of INSTANT (specification sections 3 and 6.3): per image, 2 FLOPs a
multiply-add, +-1 work counted as additions, linear layers only.
"""

import math
from dataclasses import dataclass

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from leanvit import surgery
from leanvit.kernels import walsh
from leanvit.surgery import Match

# architectures whose token axis is not the image row by row
SHUFFLED = {"Hiera": "in the order of its mask units", "Nest": "block by block"}
NARROWEST = 16  # below this width the transforms cost more than the product they save (talking heads, LoRA factors)


def exact_flops(tokens: int, in_features: int, out_features: int) -> int:
    """FLOPs of the backward of a plain linear layer, both gradients: `4 L Ci Co` (specification 3.1).

    >>> from leanvit import sites
    >>> sites.exact_flops(tokens=197, in_features=192, out_features=768)
    116195328
    """
    return 4 * tokens * in_features * out_features


def flops(in_features: int, out_features: int, blocks: int, rank: int, prefix: int = 0, rule: str = "paper") -> int:
    """FLOPs that LBP-WHT adds to training one layer: two projections, two products, one expansion.

    >>> from leanvit import sites
    >>> sites.flops(192, 768, blocks=4, rank=10)  # 0.23 of the exact backward's
    26542080

    Args:
        blocks: order-8 blocks of the grid (`P`). rank: bases kept (`R`). prefix: exact class tokens.
        rule: "paper" (specification 3.1) or "instant", the count of INSTANT (ICLR 2026; specification 6.3).

    Raises `ValueError` for another rule.
    """
    ci, co, rows = in_features, out_features, rank * blocks
    if rule == "paper":
        return 4 * rows * ci * co + 64 * rows * (2 * ci + co) + exact_flops(prefix, ci, co)
    if rule != "instant":
        raise ValueError(f"rule {rule!r} is neither 'paper' nor 'instant'")
    low_rank = rows * ci * (2 * co - 1) + rows * co * ci + rank * (blocks - 1) * co * ci + (rank - 1) * co * ci
    return 127 * rows * (ci + co) + 64 * blocks * ci * (2 * rank - 1) + low_rank + exact_flops(prefix, ci, co)


@dataclass(frozen=True)
class Site:
    """Where a linear layer sits: its token grid and its widths."""

    name: str
    layout: str  # "tokens" (B, N, C), "hwc" (B, H, W, C) or "chw" (B, C, H, W)
    grid: tuple[int, int]
    prefix: int
    in_features: int
    out_features: int
    calls: float = 1.0  # images of this layer for each image of the model: windows of a window attention

    @property
    def tokens(self) -> int:
        """Tokens of its input, prefix included."""
        return self.prefix + self.grid[0] * self.grid[1]

    def as_tokens(self, t: Tensor) -> Tensor:
        """The layer's input or output, laid out as `layout` says, as `(B, N, C)`."""
        return t.flatten(2).transpose(1, 2) if self.layout == "chw" else t.flatten(1, -2)

    def blocks(self, order: int = 8) -> int:
        """Blocks of `order` x `order` tokens that cover the grid."""
        return walsh.blocks(*self.grid, order)

    def rows(self, rank: int, order: int = 8) -> int:
        """Rows that are left of the tokens at `rank` bases, prefix included."""
        return walsh.rows(*self.grid, self.prefix, rank, order)

    def exact_flops(self) -> int:
        """FLOPs of the exact backward for one image of the model."""
        return int(self.calls * exact_flops(self.tokens, self.in_features, self.out_features))

    def flops(self, rank: int, rule: str = "paper") -> int:
        """FLOPs of LBP-WHT (blocks of order 8) for one image of the model; `ValueError` for an unknown rule, see the
        room's `flops`.
        """
        one = flops(self.in_features, self.out_features, self.blocks(8), rank, self.prefix, rule)
        return int(self.calls * one)

    def saved_bytes(self, rank: int | None, order: int = 8, itemsize: int = 4) -> int:
        """Bytes of the saved layer input of one image; `rank=None` is the exact layer."""
        return int(self.calls * (self.rows(rank, order) if rank else self.tokens) * self.in_features * itemsize)


def blank_images(model: nn.Module, batch: int = 2) -> Tensor:
    """Images `(batch, C, H, W)` of zeros, of the size, dtype and device of the model's own.

    Raises `ValueError` for a model without parameters, `TypeError` where they are not floating-point.
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    size = (
        getattr(getattr(model, "patch_embed", None), "img_size", None) or config.get("input_size", (3, 224, 224))[-2:]
    )
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise ValueError(f"{type(model).__name__} has no parameters: a timm vision transformer is needed")
    if not parameter.is_floating_point():
        raise TypeError(f"{type(model).__name__} has {parameter.dtype} parameters: floating-point ones are needed")
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    return torch.zeros(batch, channels, *size, device=parameter.device, dtype=parameter.dtype)


def _window(model: nn.Module, name: str) -> tuple[int, int] | None:
    """The window of the nearest module around `name` that has one."""
    path = name.split(".")
    for depth in range(len(path) - 1, 0, -1):
        module = model.get_submodule(".".join(path[:depth]))
        window = getattr(module, "window_size", None) or getattr(module, "partition_size", None)
        if window is not None:
            return to_2tuple(window)
    return None


def _token_grid(model: nn.Module, name: str, tokens: int, image: torch.Size, seen: tuple[int, int] | None):
    """`(grid, prefix)` of a `(B, N, C)` layer input, from the model, its window or the last feature map; or None."""
    prefix = getattr(model, "num_prefix_tokens", 0)
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    candidates = []
    if patch is not None:
        rows, columns = to_2tuple(patch)
        candidates += [((image[-2] // rows, image[-1] // columns), prefix)]
    candidates += [(grid, 0) for grid in (_window(model, name), seen) if grid is not None]
    if tokens > prefix:  # later stages pool the first grid; a square that does so is taken for theirs
        side, first = math.isqrt(tokens - prefix), candidates[0][0] if candidates else None
        candidates += [((side, side), prefix)] if first is None or first[0] % side == first[1] % side == 0 else []
    return next(((g, p) for g, p in candidates if g[0] * g[1] > 0 and p + g[0] * g[1] == tokens), None)


def find_sites(
    model: nn.Module,
    match: Match | None = None,
    example: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    prefix_tokens: int | None = None,
    narrow: bool | None = None,
) -> tuple[list[Site], dict[str, str]]:
    """Linear layers that see a token grid, found by one forward pass of `example` without gradients.

    >>> import timm
    >>> from leanvit import sites
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2,
    ...                           num_heads=2, num_classes=4)
    >>> found, skipped = sites.find_sites(model)
    >>> found[0].name, found[0].grid, found[0].prefix
    ('blocks.0.attn.qkv', (4, 4), 1)
    >>> skipped
    {'head': 'the classifier stays exact'}

    Args:
        example: images `(B, 3, H, W)`, B >= 2 (meta tensors do); by default two blank ones of the model's own size.
        grid, prefix_tokens: for `(B, N, C)` inputs whose grid cannot be told from the model.
        narrow: also layers below `NARROWEST` channels; by default only where `match` asks for them.

    Returns:
        The sites, in the order of the model, and `{name: reason}` for the linear layers that are none.

    Raises `ValueError` for a model whose tokens are not in the image's order, and a grid or example of another form.
    """
    if type(model).__name__ in SHUFFLED:
        raise ValueError(f"{type(model).__name__} keeps its tokens {SHUFFLED[type(model).__name__]}, not row by row")
    if prefix_tokens is not None and grid is None:
        raise ValueError(f"prefix_tokens={prefix_tokens} belongs to a grid; give grid=(rows, columns), too")
    if grid is not None and (not isinstance(grid, tuple | list) or len(grid) != 2):
        raise ValueError(f"grid={grid!r} must be a pair (rows, columns)")
    example = blank_images(model) if example is None else example
    if not isinstance(example, Tensor) or example.dim() != 4:
        what = tuple(example.shape) if isinstance(example, Tensor) else repr(example)
        raise ValueError(f"example must be a batch of images (B, 3, H, W), got {what}")
    if example.shape[0] < 2:
        raise ValueError(
            f"example has a batch of {example.shape[0]}: two images are needed to tell the batch dimension"
        )
    heads = set(surgery.head_modules(model))
    layers = surgery.linears(model, match)
    sites: dict[str, Site] = {}
    skipped: dict[str, str] = {}
    seen: list[tuple[int, int] | None] = [None]

    def look(name: str, module: nn.Module, x: Tensor) -> Site | str:
        ci, co = (
            (module.in_features, module.out_features) if isinstance(module, nn.Linear) else module.weight.shape[1::-1]
        )
        calls = x.shape[0] / example.shape[0]
        if x.dim() < 3:
            return "its input has no tokens"
        if x.shape[0] % example.shape[0]:
            return "its input does not carry the batch"
        if isinstance(module, nn.Conv2d):
            return Site(name, "chw", tuple(x.shape[2:]), 0, ci, co, calls)
        if x.dim() == 4:
            like_the_image = x.shape[1] * example.shape[3] == x.shape[2] * example.shape[2]
            if not like_the_image and tuple(x.shape[1:3]) != _window(model, name):
                return f"its {x.shape[1]}x{x.shape[2]} tokens are no grid of the image and no window"
            return Site(name, "hwc", tuple(x.shape[1:3]), 0, ci, co, calls)
        if x.dim() != 3:
            return f"its input has {x.dim()} dimensions"
        found = (grid, prefix_tokens or 0) if grid else _token_grid(model, name, x.shape[1], example.shape, seen[0])
        if found is None or found[1] + found[0][0] * found[0][1] != x.shape[1]:
            what = (
                "form no known grid" if found is None else f"do not match grid={grid} with {found[1]} prefix token(s)"
            )
            return f"its {x.shape[1]} tokens {what}; pass grid=(h, w) and prefix_tokens="
        return Site(name, "tokens", found[0], found[1], ci, co, calls)

    def watch(name: str):
        def hook(module, inputs):
            result = look(name, module, inputs[0])
            (sites if isinstance(result, Site) else skipped)[name] = result

        return hook

    def see(module, inputs, output):
        if isinstance(output, Tensor) and output.dim() == 4:
            seen[0] = tuple(output.shape[2:])

    hooks = []
    modes = {m: m.training for m in model.modules()}
    separated = separate_qkv_bias(model, match)
    try:
        for name, module in layers:
            too_narrow = min(module.weight.shape[:2]) < NARROWEST
            plain = getattr(type(module), "stock", type(module)) in (nn.Linear, nn.Conv2d)
            if name in heads:
                skipped[name] = "the classifier stays exact"
            elif not plain:
                skipped[name] = f"{type(module).__name__} has a forward of its own"
            elif too_narrow and not (match is not None if narrow is None else narrow):
                skipped[name] = f"narrower than {NARROWEST} channels: the transforms would cost more than they save"
            else:
                hooks.append(module.register_forward_pre_hook(watch(name)))
        hooks += [m.register_forward_hook(see) for m in model.modules() if isinstance(m, nn.Conv2d)]
        with torch.no_grad():
            model.eval()(example)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
        if separated:
            join_qkv_bias(model)
    for name, _ in layers:
        if name not in sites and name not in skipped:
            skipped[name] = "its forward is never called (the block reads the weight itself)"
    return [sites[name] for name, _ in layers if name in sites], skipped


def last_stage(model: nn.Module) -> tuple[str, ...]:
    """Name prefixes of the last stage: the last third of the blocks of a flat ViT, the last stage of the others.

    EfficientFormerV2's stage goes without its attention down-sampling, as in the released configurations. What follows
    the blocks (final norm, attention pooling, class-attention blocks) is not part of it (LBP-WHT's specification, 4.2).
    Raises `ValueError` for a model without blocks, stages or layers.
    """
    blocks = getattr(model, "blocks", None)
    if isinstance(blocks, (nn.Sequential, nn.ModuleList)):
        first = len(blocks) - max(1, round(len(blocks) / 3))
        return tuple(f"blocks.{i}." for i in range(first, len(blocks)))
    for attribute in ("stages", "layers"):
        stages = getattr(model, attribute, None)
        if isinstance(stages, (nn.Sequential, nn.ModuleList)):
            inner = "blocks." if type(model).__name__ == "EfficientFormerV2" else ""
            return (f"{attribute}.{len(stages) - 1}.{inner}",)
    raise ValueError(
        f"{type(model).__name__} has no blocks, stages or layers: name the layers with match= and scope=None"
    )


def separate_qkv_bias(model: nn.Module, match: Match | None = None) -> int:
    """Let attention blocks call their `qkv` layer: SwinV2, BEiT and EVA read its weight themselves unless told to add
    their biases apart (timm's `qkv_bias_separate`). Returns how many blocks were told so.
    """
    changed = 0
    for name, module in model.named_modules():
        fused = getattr(module, "qkv_bias_separate", True) is False and getattr(module, "q_bias", None) is not None
        qkv = getattr(module, "qkv", None)
        if fused and qkv is not None and (match is None or match(f"{name}.qkv", qkv)):
            module.qkv_bias_separate = module.separated_by_leanvit = True
            changed += 1
    return changed


def join_qkv_bias(model: nn.Module) -> None:
    """Undo `separate_qkv_bias` where `qkv` is the stock layer again, or still."""
    for module in model.modules():
        if getattr(module, "separated_by_leanvit", False) and type(module.qkv) is nn.Linear:
            module.qkv_bias_separate = False
            del module.separated_by_leanvit
