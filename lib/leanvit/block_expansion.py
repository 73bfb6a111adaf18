"""Block expansion: adapt a frozen vision transformer by new blocks that start as the identity.

Bafghi, Harilal, Monteleoni, Raissi: "Parameter Efficient Fine-tuning of Self-supervised ViTs without Catastrophic
Forgetting", CVPR 2024 workshops, arXiv 2404.17245. Written from the paper's description; covers where the blocks go,
what is trained, and the way back to the old model.

The N blocks are cut into p groups; after the last block of each group comes a copy of it whose residual-writing layers
(`attn.proj` and `mlp.fc2` of a pre-norm block, weights and biases) are zero. Every branch of the copy then adds an
exact zero, so the model computes what it did, bit for bit. Only the copies and the head are trained: p (12 D^2 + 13 D)
+ C (D + 1) parameters at MLP ratio 4. Nothing below the lowest copy has a gradient, so autograd records nothing there.

Known divergences from the authors' released code:
* p groups have N / p blocks, as in the paper; the released p = 1 configurations copy block 10 of 12, one below the
  top: `positions=[10]`;
* the zeroed layers are found by module, not by parts of parameter names (the released rule fails on DINOv2);
* blocks with a norm behind each branch (ResPost) zero that norm's weight and bias: a zero linear layer in front of it
  would leave the norm's bias, and a gradient a thousand times too large.

A copy keeps the drop path and dropout rates of its source. Dropped zeros are zeros, but they draw random numbers: in
train mode the model as a whole repeats the old one bit for bit where those rates are zero. (torch may also choose
another attention kernel where a relative position bias needs no gradient; BEiT frozen and BEiT trained differ so.)
"""

import copy
import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from leanvit import state, surgery
from leanvit.evaluate import modes_restored
from leanvit.sites import blank_images
from leanvit.surgery import Report, is_whole

# the layers that write into the residual stream, by their full name within a timm block: pre-norm blocks (in parallel
# ones the layers stand in attns and ffns; factored by ComCAT the second factor writes), ParallelScalingBlock
WRITERS = re.compile(r"(attns\.\d+\.)?attn\.proj|(ffns\.\d+\.)?mlp\.fc2(\.second)?|(attn_|mlp_)?out_proj")
SMALL_SCALE = 1e-2  # LayerScale below this slows the first steps of the new blocks noticeably
ATTACHED = "block_expansion"  # attribute of an expanded model

# --- positions and counts --------------------------------------------------------------------------------------------


def group_tops(depth: int, p: int) -> list[int]:
    """Source blocks of `p` new ones: the last block of each group of `depth / p`, from 0 (specification 1.1).

    Raises `ValueError` unless `p` divides `depth`.
    """
    if not is_whole(p) or depth % p:
        divisors = ", ".join(str(d) for d in range(1, depth + 1) if depth % d == 0)
        raise ValueError(
            f"p={p!r} does not divide the depth {depth}; p can be {divisors}, or name the source blocks with positions="
        )
    return [depth // int(p) * (j + 1) - 1 for j in range(p)]


def count_formula(width: int, p: int, num_classes: int) -> int:
    """Trained parameters `p (12 D^2 + 13 D) + C (D + 1)` of plain blocks of MLP ratio 4 (specification 1.4)."""
    return p * (12 * width**2 + 13 * width) + num_classes * (width + 1)


def _sources(depth: int, p: int | None, positions: Iterable[int] | None) -> list[int]:
    if (p is None) == (positions is None):
        raise ValueError(f"block expansion takes either p or positions; got p={p!r}, positions={positions!r}")
    if p is not None:
        return group_tops(depth, p)
    if not isinstance(positions, Iterable):
        raise ValueError(f"positions={positions!r} must be a list of block numbers")
    sources = list(positions)
    wrong = [i for i in sources if not is_whole(i, 0) or i >= depth]
    if wrong or not sources:
        raise ValueError(
            f"positions={sources}: {f'{wrong[0]!r} is no block' if wrong else 'name at least one'} of 0..{depth - 1}"
        )
    if len(set(sources)) != len(sources):
        twice = next(i for i in sources if sources.count(i) > 1)
        raise ValueError(f"positions={sources}: block {twice} is named twice; each block takes one copy")
    return sorted(map(int, sources))


# --- what is kept beside an expanded model ---------------------------------------------------------------------------


@dataclass
class Expansion:
    """What attach did, and what the way back needs: the head that was there and which parameters were trainable."""

    sources: tuple[int, ...]  # of the original stack, ascending
    depth: int  # of the original stack
    feature_info: list | None
    heads: dict[str, nn.Module]  # copies, by their full name
    num_classes: int | None
    trainable: dict[str, bool] = field(repr=False)  # by the original name
    bypassed: int | None = None  # id of the model that bypass holds; a copy made there has another and is a plain model

    @property
    def added(self) -> tuple[int, ...]:
        """Indices of the new blocks in the expanded stack."""
        return tuple(s + j + 1 for j, s in enumerate(self.sources))

    def new(self, old: int) -> int:
        """Where original block `old` is now. Raises `ValueError` for a block that it has not."""
        if not 0 <= old < self.depth:
            raise ValueError(f"block {old} is outside 0..{self.depth - 1}, the blocks of the original model")
        return old + sum(s < old for s in self.sources)

    def old(self, new: int) -> int | None:
        """Which original block is at `new` of the expanded stack; None for a new block.

        Raises `ValueError` for an index outside of the expanded stack.
        """
        if not 0 <= new < self.depth + len(self.sources):
            raise ValueError(f"block {new} is outside 0..{self.depth + len(self.sources) - 1} of the expanded model")
        return None if new in self.added else new - sum(a < new for a in self.added)


def _attached(model: nn.Module) -> Expansion | None:
    expansion = vars(model).get(ATTACHED)  # not what a wrapper (torch.compile, PEFT) hands through
    return None if expansion is None or expansion.bypassed not in (None, id(model)) else expansion


def _expansion(model: nn.Module, what: str) -> Expansion:
    expansion = _attached(model)
    if expansion is None:
        raise ValueError(
            f"{what}: block expansion is not attached to this {type(model).__name__} (of a wrapped model, name the "
            "one inside)"
        )
    if expansion.bypassed is not None:
        raise ValueError(f"{what}: the new blocks are bypassed; leave the bypass(model) block first")
    return expansion


def new_index(model: nn.Module, old: int) -> int:
    """Index in the expanded stack of block `old` of the original model, e.g. for `forward_intermediates(indices=)`.

    Raises `ValueError` where nothing is attached, inside `bypass`, or for a block that the model has not.
    """
    return _expansion(model, "new_index").new(old)


def old_index(model: nn.Module, new: int) -> int | None:
    """Index in the original model of block `new` of the expanded stack; None for a new block.

    Raises `ValueError` as `new_index`.
    """
    return _expansion(model, "old_index").old(new)


# --- the surgery -----------------------------------------------------------------------------------------------------


def _flat_blocks(model: nn.Module) -> nn.Sequential | nn.ModuleList:
    blocks = model._modules.get("blocks")  # not what a wrapper hands through: new ones would be put beside the old
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or len(blocks) == 0:
        raise ValueError(
            f"{type(model).__name__} has no flat list of blocks (model.blocks); hierarchical networks cannot be "
            "expanded, and a model is expanded before it is wrapped"
        )
    return blocks


def _writers(block: nn.Module) -> list[str]:
    """Names of the modules of a block whose zeros make it the identity; `[]` for a block that is not understood."""
    if "Post" in type(block).__name__:  # x + norm(branch(x)): the norm writes
        return [n for n in ("norm1", "norm2") if hasattr(block, n)]
    return [n for n, m in block.named_modules() if surgery.is_linear(m) and WRITERS.fullmatch(n)]


def _check_blocks(model: nn.Module, blocks: nn.Module) -> None:
    surgery.refuse_adapted(model, "block expansion")
    widths = []
    for i, block in enumerate(blocks):
        writers = _writers(block)
        if not writers:
            raise ValueError(
                f"blocks.{i} is a {type(block).__name__} whose residual-writing layers are not known "
                "(attn.proj and mlp.fc2, or out_proj), so that no identity can be made of it"
            )
        widths += [block.get_submodule(w).weight.shape[0] for w in writers]
    if len(set(widths)) > 1:
        raise ValueError(
            f"the blocks of {type(model).__name__} have widths {min(widths)} to {max(widths)}; hierarchical networks "
            "cannot be expanded"
        )


def _scales(block: nn.Module) -> list[nn.Parameter]:
    """The LayerScale parameters of a block."""
    return [p for n, p in block.named_parameters() if n.rpartition(".")[2].startswith("gamma")]


def _identity_copy(block: nn.Module, reset_layer_scale: bool) -> nn.Module:
    """A deep copy that adds exact zeros to its input, all of whose parameters can be trained."""
    new = copy.deepcopy(block)
    with torch.no_grad():
        for name in _writers(new):
            for parameter in new.get_submodule(name).parameters():
                parameter.zero_()
        if reset_layer_scale:
            for scale in _scales(new):
                scale.fill_(1)
    return new.requires_grad_(True)


def _put_blocks(model: nn.Module, blocks: list[nn.Module]) -> None:
    old = model.blocks
    new = nn.Sequential(*blocks) if isinstance(old, nn.Sequential) else nn.ModuleList(blocks)
    new.training = old.training
    model.blocks = new


def _mixed_rope(model: nn.Module) -> bool:
    return getattr(model, "rope_mixed", False) or getattr(model, "rope_is_mixed", False)  # Eva, NaFlexVit


def _rows(model: nn.Module, index: list[int]) -> None:
    """A rotary table with a row for every block ("mixed" RoPE) gets the rows at `index`."""
    if not _mixed_rope(model):
        return
    rope = model.rope
    rope.freqs.data = rope.freqs.data[:, index].clone()  # (2, depth, heads, frequencies); the parameter stays itself
    rope.depth = len(index)


def _put_heads(model: nn.Module, heads: dict[str, nn.Module], num_classes: int | None) -> None:
    for name, head in heads.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, head)
    if num_classes is not None:
        model.num_classes = num_classes


def _heads(model: nn.Module) -> dict[str, nn.Module]:
    return {name: model.get_submodule(name) for name in surgery.head_modules(model)}


def _expand(model: nn.Module, expansion: Expansion, new: list[nn.Module]) -> None:
    """Put the new blocks in; `model.blocks` is the original stack."""
    blocks, copies = list(model.blocks), dict(zip(expansion.sources, new, strict=True))
    _put_blocks(model, [b for i, block in enumerate(blocks) for b in (block, copies.get(i)) if b is not None])
    _rows(model, [i for i in range(len(blocks)) for _ in range(1 + (i in copies))])
    if expansion.feature_info is not None:
        by_source = [expansion.feature_info[i] for i in range(len(blocks)) for _ in range(1 + (i in copies))]
        model.feature_info = [dict(info, module=f"blocks.{i}") for i, info in enumerate(by_source)]


def _collapse(model: nn.Module, expansion: Expansion) -> list[nn.Module]:
    """Take the new blocks out and return them."""
    added = [model.blocks[i] for i in expansion.added]
    kept = [i for i in range(len(model.blocks)) if i not in expansion.added]
    _put_blocks(model, [model.blocks[i] for i in kept])
    _rows(model, kept)
    if expansion.feature_info is not None:
        model.feature_info = expansion.feature_info
    return added


@torch.no_grad()
def _tokens(model: nn.Module) -> Tensor:
    """What the model makes of one random image, in eval mode."""
    images = blank_images(model, 1)
    images.copy_(torch.randn(images.shape, generator=torch.Generator().manual_seed(0)))
    with modes_restored(model):
        return model.eval().forward_features(images)


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    # on an accelerator two runs of one kernel may differ in the last bits
    return torch.equal(a, b) if a.device.type == "cpu" else torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def attach(
    model: nn.Module,
    p: int | None = None,
    positions: Iterable[int] | None = None,
    *,
    reset_layer_scale: bool = False,
) -> Report:
    """Insert new identity blocks into a timm ViT with a flat list of blocks, and train them and the head only.

    In place. The features stay what they were, which is tried on one random image (not on the meta device). The head
    is the model's own, trained from where it is; `model.reset_classifier(C)` before or after gives a new one.

    Args:
        p: how many, one on top of each of p equal groups; it must divide the depth.
        positions: instead of p, the original blocks (from 0) that get a copy behind them; `[10]` of 12 is the published
            p = 1.
        reset_layer_scale: start the LayerScale of the new blocks at 1: a pretrained one of 1e-5 would make their first
            gradients 1e5 times smaller.

    Returns:
        A `Report`: the new blocks by their names, and the parameter counts.

    Raises:
        ValueError: p does not divide the depth, positions out of range or repeated, attached already, adapters
            attached or merged, no flat list of blocks (a hierarchical network, a wrapper), blocks of an unknown kind,
            or no identity; the model is then as it was.

    >>> from leanvit import block_expansion, models
    >>> model = models.create("embedded_vit")
    >>> report = block_expansion.attach(model, p=3)
    >>> report.matched, report.trainable  # 3 (12 D^2 + 13 D) numbers, and the head
    (['blocks.2', 'blocks.5', 'blocks.8'], 336490)
    """
    if _attached(model) is not None:
        raise ValueError("block expansion is attached already; detach(model) first")
    blocks = _flat_blocks(model)
    sources = _sources(len(blocks), p, positions)
    _check_blocks(model, blocks)
    if reset_layer_scale and not any(_scales(blocks[i]) for i in sources):
        raise ValueError(f"reset_layer_scale: the blocks of {type(model).__name__} have no LayerScale")
    heads = _heads(model)
    trainable = {n: q.requires_grad for n, q in model.named_parameters()}
    info = getattr(model, "feature_info", None)
    expansion = Expansion(
        tuple(sources),
        len(blocks),
        info if isinstance(info, list) and len(info) == len(blocks) else None,
        {name: copy.deepcopy(head).requires_grad_(False) for name, head in heads.items()},
        getattr(model, "num_classes", None),
        trainable,
    )
    meta = next(model.parameters()).is_meta
    before = None if meta else _tokens(model)
    if before is not None and not torch.isfinite(before).all():
        raise ValueError(
            f"{type(model).__name__} gives features that are not finite: 0 * inf is no zero, mend its weights"
        )
    new = [_identity_copy(blocks[i], reset_layer_scale) for i in sources]
    _expand(model, expansion, new)
    error, same = None, False
    try:
        same = meta or _same(before, _tokens(model))
    except Exception as e:  # an architecture whose forward goes by block index; kept as the cause
        error = e
    if not same:
        _collapse(model, expansion)
        raise ValueError(
            f"block expansion would change the output of {type(model).__name__}: its forward treats blocks by their "
            f"index, or {type(new[0]).__name__} writes into the residual stream beside {', '.join(_writers(new[0]))}"
        ) from error
    prefixes = tuple(f"blocks.{i}." for i in expansion.added)
    head_names = surgery.head_parameters(model)
    surgery.freeze(model, keep=lambda name: name.startswith(prefixes) or name in head_names)
    for parameter in model.parameters():
        parameter.grad = None  # a stale gradient of a frozen tensor would still move it
    model.block_expansion = expansion
    notes = [
        f"blocks.{a} is a copy of block {s} of the original model"
        for a, s in zip(expansion.added, sources, strict=True)
    ]
    smallest = min((g.abs().max().item() for b in new for g in _scales(b) if not meta), default=1.0)
    if smallest < SMALL_SCALE:
        notes.append(f"LayerScale of {smallest:.1g} slows the new blocks; reset_layer_scale=True starts it at 1")
    return Report("block expansion", [q.rstrip(".") for q in prefixes], {}, *surgery.count(model), notes)


def detach(model: nn.Module) -> None:
    """Take the new blocks out and put the old head back: the model of before, bit for bit, in every respect.

    The trained blocks and the trained head are lost; `save` them first. Raises `ValueError` where nothing is attached.
    """
    expansion = _expansion(model, "detach")
    _collapse(model, expansion)
    _put_old_heads(model, expansion)
    del model.block_expansion
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(expansion.trainable.get(name, parameter.requires_grad))


def _put_old_heads(model: nn.Module, expansion: Expansion) -> None:
    like = next(model.blocks.parameters())  # the model may have moved since
    for head in expansion.heads.values():
        head.to(like.device, like.dtype).train(model.training)
    _put_heads(model, expansion.heads, expansion.num_classes)


@contextmanager
def bypass(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, `model` is the old model bit for bit (outputs, state dict, head), also after a training; then trained
    again.

    The old head is the one that was there at `attach`, with its values of then, frozen. Train or eval mode set inside
    reaches the new blocks at the end. Raises `ValueError` where nothing is attached, or inside another bypass.

    >>> from leanvit import block_expansion, models
    >>> model = models.create("embedded_vit")
    >>> report = block_expansion.attach(model, p=3)
    >>> with block_expansion.bypass(model):
    ...     len(model.blocks)
    6
    >>> len(model.blocks)
    9
    """
    expansion = _expansion(model, "bypass")
    heads, num_classes, training = _heads(model), getattr(model, "num_classes", None), model.training
    added = _collapse(model, expansion)
    _put_old_heads(model, expansion)
    expansion.bypassed = id(model)
    try:
        yield model
    finally:
        expansion.bypassed = None
        _put_heads(model, heads, num_classes)
        _expand(model, expansion, added)
        if model.training != training:
            for module in (*added, *heads.values()):
                module.train(model.training)


# --- save and load ---------------------------------------------------------------------------------------------------


def _head_prefixes(model: nn.Module) -> tuple[str, ...]:
    return tuple(f"{head}." for head in surgery.head_modules(model))


def base_hash(model: nn.Module) -> str:
    """SHA-256 of the original model without its head (names, dtypes, shapes, values), expanded or not."""
    expansion, tensors = _attached(model), {}
    expanded, heads = expansion is not None and expansion.bypassed is None, _head_prefixes(model)
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor) or name.startswith(heads):
            continue
        parts = name.split(".")
        if expanded and parts[0] == "blocks":
            old = expansion.old(int(parts[1]))
            if old is None:
                continue
            name = ".".join(["blocks", str(old), *parts[2:]])
        elif expanded and name == "rope.freqs" and _mixed_rope(model):
            tensor = tensor[:, [expansion.new(i) for i in range(expansion.depth)]]
        tensors[name] = tensor
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _width(model: nn.Module) -> int:
    return int(model.blocks[0].get_submodule(_writers(model.blocks[0])[0]).weight.shape[0])


def save(model: nn.Module, path: str | Path) -> Path:
    """Write the new blocks, the head, the positions and a hash of the base, and nothing else: 4 bytes a parameter.

    Raises `ValueError` where nothing is attached, or something else is trained too (`leanvit.save` stores all that
    is); `OSError` when the file cannot be written.
    """
    expansion = _expansion(model, "save")
    prefixes = (*(f"blocks.{i}." for i in expansion.added), *_head_prefixes(model))
    mine = [n for n in model.state_dict() if n.startswith(prefixes)]
    others = [n for n, q in model.named_parameters() if q.requires_grad and n not in set(mine)]
    if others:
        raise ValueError(
            f"save: {others[0]} (of {len(others)}) is trained but is neither in a new block nor in the head; "
            "leanvit.save stores everything that is trained"
        )
    header = {
        "method": ATTACHED,
        "positions": list(expansion.sources),
        "depth": expansion.depth,
        "width": _width(model),
        "num_classes": getattr(model, "num_classes", None),
        "base": base_hash(model),
    }
    return state.save(model, path, names=mine, header=header)


# what a file's header must hold, so that a damaged one ends in a sentence
_HEADER = {
    "positions": lambda value: isinstance(value, list) and all(is_whole(i, 0) for i in value),
    "depth": is_whole,
    "width": is_whole,
    "num_classes": lambda value: value is None or is_whole(value, 0),
    "base": lambda value: isinstance(value, str),
}


def load(model: nn.Module, path: str | Path) -> dict:
    """Bring a saved expansion onto its base and return the file's header; the outputs are those of the saved model.

    `model` is the fresh base (it is expanded here, and gets a head of the saved number of classes), or one with the
    same blocks attached.

    Raises `ValueError` for another depth, width, positions or other base weights, for a head of another kind, for a
    file of another method or with a damaged header; `FileNotFoundError`. The model is then as it was.
    """
    header = state.read_header(path)
    if header.get("method") != ATTACHED:
        raise ValueError(f"load: {path} holds no block expansion (method {header.get('method')!r})")
    damaged = [key for key, fits in _HEADER.items() if not fits(header.get(key))]
    if damaged:
        told = ", ".join(f"{key}={header.get(key)!r}" for key in damaged)
        raise ValueError(f"load: the header of {path} is damaged ({told}); save the expansion again")
    attached = _attached(model) is not None
    depth = _expansion(model, "load").depth if attached else len(_flat_blocks(model))
    _check_blocks(model, model.blocks)
    for what, theirs, mine in (("depth", header["depth"], depth), ("width", header["width"], _width(model))):
        if theirs != mine:
            raise ValueError(f"load: {path} was saved from a base of {what} {theirs}; this model's is {mine}")
    if attached and header["positions"] != list(model.block_expansion.sources):
        raise ValueError(
            f"load: {path} copies blocks {header['positions']}; this model has copies of "
            f"{list(model.block_expansion.sources)} attached"
        )
    if (digest := base_hash(model)) != header["base"]:
        raise ValueError(
            f"load: {path} belongs to other base weights (hash {header['base'][:12]}, this model's is {digest[:12]}); "
            "load the weights and the dtype that the blocks were trained on"
        )
    heads, num_classes = _heads(model), getattr(model, "num_classes", None)
    if not attached:
        attach(model, positions=header["positions"])
    try:
        if header["num_classes"] is not None and header["num_classes"] != num_classes:
            model.reset_classifier(header["num_classes"])
        return state.load(model, path)
    except Exception:
        _put_heads(model, heads, num_classes)
        if not attached:
            model.block_expansion.heads = heads  # themselves, not copies
            detach(model)
        raise
