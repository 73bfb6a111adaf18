"""What UVC removes is really gone: heads, value dimensions, hidden units, whole blocks, patches (specification, 5.3).

Where whole heads alone go, timm's own `Attention` stays, with fewer heads. Where a head loses value dimensions,
`SlicedAttention` takes its place. The outputs are those of the model whose weights were masked (`mask`), up to the
rounding of shorter sums.
"""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanvit import state, surgery
from leanvit.surgery import Report
from leanvit.uvc_plan import BlockPlan, Plan, Shapes, dense_macs, read_shapes

ATTACHED = "uvc_plans"  # attribute of a cut model: the plans that were applied, in their order


class SlicedAttention(nn.Module):
    """Self-attention whose heads have `head_dim` query and key dimensions and `values[i]` value dimensions each.

    `(B, N, C) -> (B, N, C)`, with an optional additive or boolean `attn_mask`. Runs of neighbouring heads of equal
    width are computed together, so heads sorted by width are the fastest.
    """

    def __init__(self, attn: nn.Module, qkv: nn.Linear, proj: nn.Linear, values: Sequence[int]):
        super().__init__()
        self.num_heads, self.head_dim, self.scale = len(values), attn.head_dim, attn.scale
        self.values = tuple(values)
        self.qkv, self.proj = qkv, proj
        self.q_norm, self.k_norm = attn.q_norm, attn.k_norm
        self.attn_drop, self.proj_drop = attn.attn_drop, attn.proj_drop
        self.training = attn.training

    def runs(self) -> list[tuple[int, int, int]]:
        """`(first head, heads, width)` of each run of neighbouring heads of equal width."""
        runs: list[tuple[int, int, int]] = []
        for i, width in enumerate(self.values):
            if runs and runs[-1][2] == width:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1, width)
            else:
                runs.append((i, 1, width))
        return runs

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        images, tokens, _ = x.shape
        inner = self.num_heads * self.head_dim
        q, k, v = self.qkv(x).split([inner, inner, sum(self.values)], dim=-1)
        q, k = (t.reshape(images, tokens, self.num_heads, self.head_dim).transpose(1, 2) for t in (q, k))
        q, k = self.q_norm(q), self.k_norm(k)
        if attn_mask is not None and attn_mask.dim() == 4 and attn_mask.shape[1] > 1:
            raise ValueError("SlicedAttention takes one attention mask for all heads, its heads are not the model's")
        outputs, first_value = [], 0
        for first, heads, width in self.runs():
            heads_q, heads_k = q[:, first : first + heads], k[:, first : first + heads]
            heads_v = v[..., first_value : first_value + heads * width]
            heads_v = heads_v.reshape(images, tokens, heads, width).transpose(1, 2)
            out = self._attend(heads_q, heads_k, heads_v, attn_mask, is_causal)
            outputs.append(out.transpose(1, 2).reshape(images, tokens, heads * width))
            first_value += heads * width
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return self.proj_drop(self.proj(out))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        # torch's fused CPU kernel wants values as wide as queries and falls back to one that takes twice the time of
        # the plain products
        if q.is_cuda or v.shape[-1] == q.shape[-1] or attn_mask is not None or is_causal:
            drop = self.attn_drop.p if self.training else 0.0
            return F.scaled_dot_product_attention(q, k, v, attn_mask, drop, is_causal, scale=self.scale)
        weights = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1)
        return self.attn_drop(weights) @ v

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, values={self.values}"


class KeepPatches(nn.Module):
    """Takes the kept patch tokens (their position embeddings are added by then) out of `(B, prefix + n, C)`."""

    def __init__(self, keep: Sequence[int], prefix: int):
        super().__init__()
        self.uvc_keep = tuple(keep)
        index = torch.tensor([*range(prefix), *(prefix + k for k in keep)])
        self.register_buffer("index", index, persistent=False)  # the plan holds it

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(1, self.index)

    def extra_repr(self) -> str:
        return f"{len(self.uvc_keep)} patches"


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
        weight, bias = weight[index], None if bias is None else bias.detach()[index]
    if columns is not None:
        weight = weight[:, torch.tensor(columns, device=weight.device)]
    new = nn.Linear(1, 1, bias=bias is not None, device="meta", dtype=weight.dtype)
    new.out_features, new.in_features = weight.shape
    new.weight = nn.Parameter(weight.clone(), requires_grad=layer.weight.requires_grad)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().clone(), requires_grad=layer.bias.requires_grad)
    return new.train(layer.training)


def _by_width(block: BlockPlan) -> BlockPlan:
    """The same block with its heads sorted by width, so that equal ones are neighbours."""
    order = sorted(range(len(block.heads)), key=lambda i: (-len(block.values[i]), block.heads[i]))
    return BlockPlan(tuple(block.heads[i] for i in order), tuple(block.values[i] for i in order), block.units)


# --- the surgery -----------------------------------------------------------------------------------------------------


def check_fits(plan: Plan, shapes: Shapes) -> None:
    """Raise `ValueError` that names the first difference where `plan` is for another model than that of `shapes`."""
    theirs, ours = plan.shapes.to_dict(), shapes.to_dict()
    for name in ("model", "architecture", "width", "prefix", "patches", "embed_macs"):
        if theirs[name] != ours[name] and (name != "architecture" or None not in (theirs[name], ours[name])):
            raise ValueError(f"this plan is for a model of {name} {theirs[name]}; this one has {ours[name]}")
    if len(theirs["blocks"]) != len(ours["blocks"]):
        raise ValueError(f"this plan is for {len(theirs['blocks'])} blocks; this model has {len(ours['blocks'])}")
    for i, (a, b) in enumerate(zip(theirs["blocks"], ours["blocks"], strict=True)):
        name = next((n for n in a if a[n] != b[n]), None)
        if name is not None:
            raise ValueError(f"this plan is for a block {i} of {name} {a[name]}; this model's has {b[name]}")


def _sliced(block: nn.Module, plan: BlockPlan) -> dict[str, nn.Module]:
    """The new modules of a block, by their names in it; where heads alone go, `attn` stays the module that it is."""
    attn, mlp, new = block.attn, block.mlp, {}
    values = tuple(getattr(attn, "values", None) or [attn.head_dim] * attn.num_heads)
    kept = [len(v) for v in plan.values]
    stock = all(k == attn.head_dim for k in kept)
    if len(kept) < attn.num_heads or sum(kept) < sum(values):
        plan = plan if stock else _by_width(plan)
        qkv = _cut(attn.qkv, rows=_qkv_rows(attn.num_heads, attn.head_dim, values, plan))
        proj = _cut(attn.proj, columns=value_columns(values, plan))
        if stock and not isinstance(attn, SlicedAttention):
            new |= {"attn.qkv": qkv, "attn.proj": proj}
        else:
            new["attn"] = SlicedAttention(attn, qkv, proj, [len(v) for v in plan.values])
    if len(plan.units) < mlp.fc1.out_features:
        new["mlp.fc1"] = _cut(mlp.fc1, rows=list(plan.units))
        new["mlp.fc2"] = _cut(mlp.fc2, columns=list(plan.units))
    return new


def apply(model: nn.Module, plan: Plan) -> Report:
    """Cut `model` as `plan` says, in place and for good; all or nothing.

    Args:
        model: a timm vision transformer with the shapes of the plan.

    Returns:
        A `Report`: the layers that were made smaller, the blocks that went, MACs of before and after.

    Raises:
        ValueError: the plan is for another model, or the model cannot be cut; the model is then as it was.
    """
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
        if type(block.attn) is not SlicedAttention:
            block.attn.num_heads = len(plan.blocks[i].heads)
            block.attn.attn_dim = block.attn.num_heads * block.attn.head_dim
    _keep_blocks(model, kept)
    if keeper is not None:
        model.patch_drop = keeper
    setattr(model, ATTACHED, [*getattr(model, ATTACHED, []), plan])
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
    keep = plan.patches if isinstance(now, nn.Identity) else [now.uvc_keep[i] for i in plan.patches]
    return KeepPatches(keep, shapes.prefix).to(next(model.parameters()).device)


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
    """For each block of a cut model, its number in the original one: the index map for feature extraction."""
    plans = _plans(model, "kept_blocks")
    numbers = list(range(len(plans[0].blocks)))
    for plan in plans:
        numbers = [n for n, block in zip(numbers, plan.blocks, strict=True) if block is not None]
    return numbers


@torch.no_grad()
def mask(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of `model` as the authors leave it: zeros in the weights, skipped blocks, all shapes as they were.

    For comparison: it computes what the sliced model does at nearly the dense model's cost. Raises as `apply` does.
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
        for weight, kept in (
            (model.blocks[i].attn.proj.weight.T, columns),
            (mlp.fc1.weight, units),
            (mlp.fc2.weight.T, units),
        ):
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
    plans = [plan.to_json() for plan in _plans(model, "save")]
    names = [n for n, t in model.state_dict().items() if isinstance(t, Tensor)]
    more = {"method": "uvc", "plans": plans, "num_classes": getattr(model, "num_classes", None)}
    return state.save(model, path, names=names, header={**(header or {}), **more})


def load(model: nn.Module, path: str | Path) -> dict:
    """Cut the fresh stock `model` as the saved one was, load its weights and return the file's header.

    Raises `ValueError` for another model, a model that is cut already, or a file of another method, and
    `FileNotFoundError`; the model is then as it was.
    """
    header = state.read_header(path)
    if header.get("method") != "uvc":
        raise ValueError(f"load: {path} holds no model cut by UVC (method {header.get('method')!r})")
    if getattr(model, ATTACHED, None):
        raise ValueError("load: this model is cut already; give the stock model that the plan was made for")
    trial = copy.deepcopy(model)  # a plan cannot be taken back
    if header["num_classes"] is not None and header["num_classes"] != getattr(trial, "num_classes", None):
        trial.reset_classifier(header["num_classes"])
    for text in header["plans"]:
        apply(trial, Plan.from_json(text))
    header = state.load(trial, path)
    model.__dict__.update(trial.__dict__)
    return header
