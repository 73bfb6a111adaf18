"""What UVC removes is gone: heads, value dimensions, hidden units, whole blocks, patches (UVC's specification, 5.3).

Where whole heads alone go, timm's own `Attention` stays, with fewer heads. Where a head loses value dimensions,
`SlicedAttention` takes its place. The outputs are those of the model whose weights were masked (`mask`), up to the
rounding of shorter sums.
"""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from leanvit import cuts, surgery
from leanvit.comcat_modules import FactoredAttention, FactoredLinear, Heads, factored_attention, read_heads
from leanvit.surgery import Report
from leanvit.uvc_modules import KeepPatches, SlicedAttention, refuse_open_search
from leanvit.uvc_plan import BlockPlan, Plan, Shapes, dense_macs, read_shapes, value_dims

ATTACHED = "uvc_plans"  # attribute of a cut model: the plans that were applied, in their order


# --- which rows and columns stay -------------------------------------------------------------------------------------


def value_columns(values: Sequence[int], block: BlockPlan) -> list[int]:
    """Columns of `attn.proj` that stay: the kept value dimensions of the kept heads. `values`: dims of each head."""
    starts = [sum(values[:i]) for i in range(len(values))]
    return [starts[h] + j for h, kept in zip(block.heads, block.values, strict=True) for j in kept]


def _qkv_rows(heads: int, head_dim: int, values: Sequence[int], block: BlockPlan) -> list[int]:
    inner = heads * head_dim
    own = [h * head_dim + j for h in block.heads for j in range(head_dim)]
    return own + [inner + r for r in own] + [2 * inner + c for c in value_columns(values, block)]


def _cut(layer: nn.Linear, rows: list[int] | None = None, columns: list[int] | None = None) -> nn.Linear:
    """A linear layer of its own with some rows or columns of `layer`."""
    weight, bias = layer.weight.detach(), layer.bias
    if rows is not None:
        index = torch.tensor(rows, device=weight.device)
        if bias is not None:  # of the first rows only, in a factored attention
            bias = F.pad(bias.detach(), (0, len(weight) - len(bias)))[index]
        weight = weight[index]
    if columns is not None:
        weight = weight[:, torch.tensor(columns, device=weight.device)]
    new = nn.Linear(1, 1, bias=bias is not None, device="meta", dtype=weight.dtype)
    new.out_features, new.in_features = weight.shape
    new.weight = nn.Parameter(weight.clone(), requires_grad=layer.weight.requires_grad)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().clone(), requires_grad=layer.bias.requires_grad)
    return new.train(layer.training)


def _factored_heads(m: FactoredAttention, block: BlockPlan) -> FactoredAttention:
    """The kept heads of a factored attention, all of them with the same number of value dimensions."""
    h, heads = read_heads(m), list(block.heads)
    kept = torch.tensor(block.values, device=h.v.device)  # (heads, value dimensions)
    here = torch.tensor(heads, device=h.v.device)[:, None]
    v, o, bv = h.v.mT[here, kept].mT, h.o[here, kept], h.bv[here, kept]
    sections = [0 if m.qkv.bias is None else len(m.qkv.bias) - sum(m.widths[:i]) for i in range(3)]
    widths = (h.q[heads].shape[0] * m.key_dim,) * 2 + (kept.numel(),)
    biased = sum(w for w, left in zip(widths, sections, strict=True) if left > 0)
    new = Heads(h.q[heads], h.k[heads], v, o, h.bq[heads], h.bk[heads], bv, h.bo)
    return factored_attention(m, new, biased=biased, proj_bias=m.proj.bias is not None)


def _units(layer: nn.Module, units: list[int], side: str) -> dict[str, nn.Linear]:
    """What holds the hidden units, by its name in `layer` ("out" of fc1, "in" of fc2), cut to some of them."""
    name = {"out": ".second", "in": ".first"}[side] if isinstance(layer, FactoredLinear) else ""
    linear = layer.get_submodule(name[1:])
    return {name: _cut(linear, rows=units) if side == "out" else _cut(linear, columns=units)}


def _by_width(block: BlockPlan) -> BlockPlan:
    """The same block with its heads sorted by width, so that equal ones are neighbours."""
    order = sorted(range(len(block.heads)), key=lambda i: (-len(block.values[i]), block.heads[i]))
    return BlockPlan(tuple(block.heads[i] for i in order), tuple(block.values[i] for i in order), block.units)


# --- the surgery -----------------------------------------------------------------------------------------------------


def check_fits(plan: Plan, shapes: Shapes) -> None:
    """Raise `ValueError` that names the first difference where `plan` is for another model than that of `shapes`.

    `TypeError` for something that is no plan.
    """
    if not isinstance(plan, Plan):
        kind = f"{type(plan).__module__}.{type(plan).__name__}"
        raise TypeError(f"UVC: a leanvit.uvc_plan.Plan is needed, got {kind}; see uvc.search and Plan.from_json")
    theirs, ours = plan.shapes.to_dict(), shapes.to_dict()
    for name in ("model", "architecture", "width", "prefix", "patches", "embed_macs"):
        if theirs[name] != ours[name] and (name != "architecture" or None not in (theirs[name], ours[name])):
            raise ValueError(f"this plan is for a model of {name} {theirs[name]}; this one has {ours[name]}")
    if len(theirs["blocks"]) != len(ours["blocks"]):
        raise ValueError(f"this plan is for {len(theirs['blocks'])} blocks; this model has {len(ours['blocks'])}")
    for i, (a, b) in enumerate(zip(theirs["blocks"], ours["blocks"], strict=True)):
        # a plan of before the padding was counted does not know of it
        name = next((n for n in a if n != "padded" and a[n] != b[n]), None)
        if name is not None:
            raise ValueError(f"this plan is for a block {i} of {name} {a[name]}; this model's has {b[name]}")


def _sliced(block: nn.Module, plan: BlockPlan) -> dict[str, nn.Module]:
    """The new modules of a block, by their names in it; where heads alone go, `attn` stays the module that it is."""
    attn, mlp, new = block.attn, block.mlp, {}
    values = value_dims(attn)
    kept = [len(v) for v in plan.values]
    stock = all(k == attn.head_dim for k in kept)
    factored = type(attn) is FactoredAttention
    if (len(kept) < attn.num_heads or sum(kept) < sum(values)) and factored and len(set(kept)) == 1:
        new["attn"] = _factored_heads(attn, plan)
    elif len(kept) < attn.num_heads or sum(kept) < sum(values):
        plan = plan if stock else _by_width(plan)
        qkv = _cut(attn.qkv, rows=_qkv_rows(attn.num_heads, attn.head_dim, values, plan))
        proj = _cut(attn.proj, columns=value_columns(values, plan))
        if stock and not factored and not isinstance(attn, SlicedAttention):
            new |= {"attn.qkv": qkv, "attn.proj": proj}
        else:
            new["attn"] = SlicedAttention(attn, qkv, proj, [len(v) for v in plan.values])
    if len(plan.units) < mlp.fc1.out_features:
        units = list(plan.units)
        new |= {f"mlp.fc1{n}": m for n, m in _units(mlp.fc1, units, "out").items()}
        new |= {f"mlp.fc2{n}": m for n, m in _units(mlp.fc2, units, "in").items()}
    return new


def apply(model: nn.Module, plan: Plan) -> Report:
    """Cut `model` as `plan` says, in place and for good; all or nothing.

    >>> import timm, torch
    >>> from leanvit import uvc
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2,
    ...                           num_heads=2, num_classes=4)
    >>> plan = uvc.random_plan(model, 0.5, seed=0, skip=[1])
    >>> report = uvc.apply(model, plan)
    >>> len(model.blocks), tuple(model.eval()(torch.zeros(1, 3, 32, 32)).shape)
    (1, (1, 4))

    Args:
        model: a timm vision transformer with the shapes of the plan.

    Returns:
        A `Report`: the layers that were made smaller, the blocks that went, MACs of before and after.

    Raises:
        ValueError: the plan is for another model, the model cannot be cut, or a search is open on it; `TypeError` for
            something that is no plan. The model is then as it was.
    """
    refuse_open_search(model, "apply")
    shapes = read_shapes(model)
    check_fits(plan, shapes)
    kept = [i for i, block in enumerate(plan.blocks) if block is not None]
    new = {i: _sliced(model.blocks[i], plan.blocks[i]) for i in kept}
    keeper = _keeper(model, plan, shapes)
    # from here on nothing can fail
    for i in kept:
        block = model.blocks[i]
        for name, module in new[i].items():
            surgery.replace(block, name, module)
        if type(block.attn) not in (SlicedAttention, FactoredAttention):
            block.attn.num_heads = len(plan.blocks[i].heads)
            block.attn.attn_dim = block.attn.num_heads * block.attn.head_dim
    _keep_blocks(model, kept)
    if keeper is not None:
        model.patch_drop = keeper
    setattr(model, ATTACHED, [*getattr(model, ATTACHED, []), plan])
    cuts.record(model, "uvc", plan.to_json())
    return _report(model, plan, kept, new)


def _keeper(model: nn.Module, plan: Plan, shapes: Shapes) -> KeepPatches | None:
    if plan.patches is None:
        return None
    now = getattr(model, "patch_drop", None)
    if not isinstance(now, (nn.Identity, KeepPatches)):
        raise ValueError(
            f"patches go where {type(model).__name__} drops patches at random (patch_drop), "
            f"which must be there and off; it is {type(now).__name__}"
        )
    keep, tokens = plan.patches, shapes.tokens
    if isinstance(now, KeepPatches):
        keep, tokens = [now.uvc_keep[i] for i in plan.patches], now.tokens
    return KeepPatches(keep, shapes.prefix, tokens).to(next(model.parameters()).device)


def _keep_blocks(model: nn.Module, kept: list[int]) -> None:
    old = model.blocks
    if len(kept) == len(old):
        return
    blocks = [old[i] for i in kept]
    model.blocks = nn.Sequential(*blocks) if isinstance(old, nn.Sequential) else nn.ModuleList(blocks)
    model.blocks.training = old.training
    info = getattr(model, "feature_info", None)
    if isinstance(info, list) and len(info) == len(old):
        model.feature_info = [dict(info[i], module=f"blocks.{j}") for j, i in enumerate(kept)]


def _report(model: nn.Module, plan: Plan, kept: list[int], new: dict[int, dict[str, nn.Module]]) -> Report:
    names = [f"blocks.{j}.{name}" for j, i in enumerate(kept) for name in new[i]]
    gone = [i for i in range(len(plan.blocks)) if i not in kept]
    notes = [f"{dense_macs(plan.shapes):,} -> {plan.macs():,} MACs an image, R = {plan.ratio():.4f}"]
    if gone:
        notes.append(f"blocks {', '.join(map(str, gone))} of the original are gone; the others moved up")
    if plan.patches is not None:
        notes.append(f"{len(plan.patches)} of {plan.shapes.patches} patches go through the blocks")
    return Report("uvc", names, {}, *surgery.count(model), notes)


def kept_blocks(model: nn.Module) -> list[int]:
    """For each block of a cut model, its number in the original one: the index map for feature extraction.

    Raises `ValueError` where no plan was applied.
    """
    plans = _plans(model, "kept_blocks")
    numbers = list(range(len(plans[0].blocks)))
    for plan in plans:
        numbers = [n for n, block in zip(numbers, plan.blocks, strict=True) if block is not None]
    return numbers


@torch.no_grad()
def mask(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of `model` as the authors leave it: zeros in the weights, skipped blocks, all shapes as they were.

    For comparison: it computes what the sliced model does at nearly the dense model's cost (specification, 2.5 and
    2.6). Raises `ValueError` and `TypeError` as `apply` does.

    >>> import timm, torch
    >>> from leanvit import uvc
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2,
    ...                           num_heads=2, num_classes=4).eval()
    >>> plan, images = uvc.magnitude_plan(model, 0.5), torch.randn(2, 3, 32, 32)
    >>> masked = uvc.mask(model, plan)
    >>> report = uvc.apply(model, plan)
    >>> torch.allclose(model(images), masked(images), atol=1e-5)
    True
    """
    check_fits(plan, read_shapes(model))
    model = copy.deepcopy(model)
    for i, block in enumerate(plan.blocks):
        if block is None:
            model.blocks[i] = nn.Identity()
            continue
        columns = torch.zeros(sum(plan.shapes.blocks[i].values), dtype=torch.bool)
        columns[value_columns(plan.shapes.blocks[i].values, block)] = True
        units = torch.zeros(plan.shapes.blocks[i].hidden, dtype=torch.bool)
        units[list(block.units)] = True
        mlp = model.blocks[i].mlp
        fc1 = mlp.fc1.second if isinstance(mlp.fc1, FactoredLinear) else mlp.fc1
        fc2 = mlp.fc2.first if isinstance(mlp.fc2, FactoredLinear) else mlp.fc2
        projection = model.blocks[i].attn.proj
        for weight, kept in ((projection.weight.T, columns), (fc1.weight, units), (fc2.weight.T, units)):
            weight[~kept.to(weight.device)] = 0
    keeper = _keeper(model, plan, plan.shapes)
    if keeper is not None:
        model.patch_drop = keeper
    return model


# --- save and load ---------------------------------------------------------------------------------------------------


def _plans(model: nn.Module, what: str) -> list[Plan]:
    plans = getattr(model, ATTACHED, None)
    if not plans:
        raise ValueError(f"{what}: no UVC plan was applied to this {type(model).__name__}")
    return plans


def save(model: nn.Module, path: str | Path, header: dict | None = None) -> Path:
    """Write all tensors of a cut model and its plans to `path`; `load` rebuilds it from a fresh stock model.

    Raises `ValueError` where no plan was applied, `OSError` when the file cannot be written.
    """
    _plans(model, "save")
    return cuts.save(model, path, header=header)


def load(model: nn.Module, path: str | Path) -> dict:
    """Cut the fresh stock `model` as the saved one was, load its weights and return the file's header.

    Raises `ValueError` for another model, a model that is cut already, or a file of another method, and
    `FileNotFoundError`; the model is then as it was.
    """
    methods = [method for method, _ in cuts.stored(path)]
    if "uvc" not in methods:
        raise ValueError(f"load: {path} holds no model cut by UVC ({', '.join(methods) or 'not cut at all'})")
    if getattr(model, ATTACHED, None):
        raise ValueError("load: this model is cut already; give the stock model that the plan was made for")
    return cuts.load(model, path)


def rebuild(model: nn.Module, text: str) -> None:
    """Give `model` the shapes of a plan (JSON), in place; values come from a file. Raises `ValueError` as `apply`."""
    apply(model, Plan.from_json(text))
