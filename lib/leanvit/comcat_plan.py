"""What of a model ComCAT can factor, and the plan that says at which ranks.

A plan is plain data, made by hand or by a search. ComCAT is arXiv 2305.17235.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from timm.layers import Attention
from timm.layers import attention as timm_attention
from timm.models import eva
from torch import nn

from leanvit import surgery
from leanvit.comcat_factors import break_even

MODES = ("corrected", "faithful")
BIASES = ("absorb", "none", "zero")
ROTARY = tuple(c for c in (getattr(timm_attention, "AttentionRope", None), eva.EvaAttention) if c is not None)
PLAN = "comcat_plan"  # attribute of a factored model

# --- the parts of a model that have a rank ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One decision: the products W_QK or W_VO of all heads of an attention, or a linear layer.

    `name` is the full name of the layer, or that of the attention with ".qk" or ".vo". Products are
    `(inputs, outputs)` for each of `heads`, of rank `full` at most; a linear layer counts as one head.
    """

    name: str
    kind: str  # "qk", "vo" or "fc"
    module: str
    heads: int
    inputs: int
    outputs: int
    full: int

    @property
    def unit(self) -> int:
        """Weights of one more rank (in every head)."""
        return self.heads * (self.inputs + self.outputs)

    @property
    def dense(self) -> int:
        """Weights of the dense part."""
        return self.inputs * self.outputs if self.kind == "fc" else self.full * self.unit

    def weights(self, rank: int | None) -> int:
        """Weights at a rank per head; None is dense."""
        return self.dense if rank is None else rank * self.unit

    @property
    def break_even(self) -> float:
        """The rank at which the factored part is as large as the dense one (the full rank, for attention)."""
        return break_even(self.inputs, self.outputs) if self.kind == "fc" else float(self.full)


def _blocks(model: nn.Module) -> nn.Module:
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or len(blocks) == 0:
        raise ValueError(
            f"ComCAT: {type(model).__name__} has no flat list of blocks (model.blocks); hierarchical networks are not "
            "supported, use a plain ViT or DeiT"
        )
    return blocks


def _attention_parts(model: nn.Module, name: str, m: nn.Module) -> tuple[list[Part], dict[str, str]]:
    """The two parts of one attention, and the reasons for those that it cannot have."""
    both = {f"{name}.qk", f"{name}.vo"}
    values = getattr(m, "values", None)  # of heads that UVC has cut
    if type(m) is not Attention and type(m) not in ROTARY and values is None:
        return [], dict.fromkeys(both, f"{type(m).__name__} is not timm's plain attention, its scores may hold more")
    if type(getattr(m, "qkv", None)) is not nn.Linear or type(m.proj) is not nn.Linear:
        return [], dict.fromkeys(both, "its queries, keys and values are not one plain linear layer")
    if getattr(m, "gate", None) is not None:
        return [], dict.fromkeys(both, "a gate stands between the attention and its output layer")
    if values is not None and len(set(values)) > 1:
        return [], dict.fromkeys(both, "each head is of its own value width, one rank does not fit them all")
    heads, inputs, outputs = m.num_heads, m.qkv.in_features, m.proj.out_features
    value_dim = m.proj.in_features // heads
    key_dim = (m.qkv.out_features // heads - value_dim) // 2
    found, skipped = [], {}
    if isinstance(m, ROTARY) and getattr(model, "rope", None) is not None:
        skipped[f"{name}.qk"] = "rotary positions stand between queries and keys, W_QK is no product"
    elif not isinstance(m.q_norm, nn.Identity) or not isinstance(m.k_norm, nn.Identity):
        skipped[f"{name}.qk"] = "QK-norm stands between queries and keys, W_QK is no product"
    else:
        found.append(Part(f"{name}.qk", "qk", name, heads, inputs, inputs, key_dim))
    if isinstance(getattr(m, "norm", nn.Identity()), nn.Identity):
        found.append(Part(f"{name}.vo", "vo", name, heads, inputs, outputs, value_dim))
    else:
        skipped[f"{name}.vo"] = "a norm stands behind the values, W_VO is no product"
    return found, skipped


def parts(model: nn.Module) -> tuple[list[Part], dict[str, str]]:
    """Everything that can be factored, in the order of the authors' rank lists (qk, vo, fc1, fc2 of each block, then
    the classifier), and `{name: reason}` for what cannot.

    Raises `ValueError` for a model without flat blocks of one width, with adapters, or factored already.
    """
    if getattr(model, PLAN, None) is not None:
        raise ValueError(
            "ComCAT: this model is factored already; start from the dense one, or go on with comcat_search.RankSearch"
        )
    blocks = _blocks(model)
    surgery.refuse_adapted(model, "ComCAT")
    found: list[Part] = []
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        if not name.startswith("blocks."):
            continue
        if isinstance(getattr(module, "num_heads", None), int) and hasattr(module, "proj"):
            mine, reasons = _attention_parts(model, name, module)
            found, skipped = found + mine, skipped | reasons
        elif "mlp" in name.split(".") and isinstance(module, nn.Linear):
            if type(module) is nn.Linear:
                found.append(_linear_part(name, module))
            else:
                skipped[name] = f"{type(module).__name__} has a forward of its own"
    widths = {p.inputs for p in found if p.kind != "fc" or p.name.endswith(".fc1")}
    if len(widths) > 1:
        raise ValueError(
            f"ComCAT: the blocks of {type(model).__name__} have widths {min(widths)} to {max(widths)}; hierarchical "
            "networks are not supported, use a plain ViT or DeiT"
        )
    for name in surgery.head_modules(model):
        if type(head := model.get_submodule(name)) is nn.Linear:
            found.append(_linear_part(name, head))
    if not found:
        raise ValueError(
            f"ComCAT: none of the {len(blocks)} blocks of {type(model).__name__} can be factored: {skipped}"
        )
    return found, skipped


def _linear_part(name: str, m: nn.Linear) -> Part:
    return Part(name, "fc", name, 1, m.in_features, m.out_features, min(m.in_features, m.out_features))


def part_of(name: str, shape: Sequence[int]) -> Part:
    """The part that a plan's entry (name, [heads, inputs, outputs, full]) is about."""
    module, _, kind = name.rpartition(".")
    return Part(name, kind, module, *shape) if kind in ("qk", "vo") else Part(name, "fc", name, *shape)


# --- the plan --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Which ranks: plain data that goes through JSON and belongs to one architecture.

    `ranks` are per head; a part of `shapes` that is not named stays dense. `shapes` are (heads, inputs, outputs, full)
    of every part of the model that the plan was made for. `bias`: "absorb" all biases of attention exactly, throw them
    away ("none"), or start zero ones ("zero", the authors' `--attn2-with-bias`). `about` is for notes.

    Raises `ValueError` for another mode or bias, a rank that is no whole number from 1 on, and other shapes.
    """

    model: str
    ranks: dict[str, int]
    shapes: dict[str, list[int]] = field(repr=False)
    mode: str = "corrected"
    bias: str = "absorb"
    about: dict = field(default_factory=dict)

    def __post_init__(self):
        _one_of("mode", self.mode, MODES)
        _one_of("bias", self.bias, BIASES)
        for what in ("ranks", "shapes", "about"):
            if not isinstance(getattr(self, what), Mapping):
                raise ValueError(f"ComCAT: {what}={getattr(self, what)!r} must be a dict")
        surgery.check_whole("ComCAT", **{f"rank of {n}": r for n, r in self.ranks.items()})
        for name, shape in self.shapes.items():
            if not isinstance(shape, (list, tuple)) or len(shape) != 4:
                raise ValueError(f"ComCAT: shape of {name}={shape!r} must be [heads, inputs, outputs, full rank]")
            surgery.check_whole("ComCAT", **{f"shape of {name}, {i + 1} of 4": n for i, n in enumerate(shape)})

    def to_json(self) -> str:
        """All of it as one line of JSON, which `from_json` reads."""
        return json.dumps({"method": "comcat", **asdict(self)}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The plan that `to_json` wrote. Raises `ValueError` for anything else."""
        try:
            content = dict(json.loads(text))
            if content.pop("method", None) != "comcat":
                raise ValueError("its method is not comcat")
            return cls(**content)
        except (TypeError, ValueError) as error:
            raise ValueError(f"Plan.from_json: this is no plan of ComCAT: {error}") from None


def model_name(model: nn.Module) -> str:
    """timm's name of the architecture, or the class."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return str(cfg.get("architecture") or type(model).__name__)


def make_plan(
    model: nn.Module,
    ranks: Mapping[str, int | None],
    *,
    mode: str = "corrected",
    bias: str | None = None,
    about: dict | None = None,
) -> Plan:
    """A plan with ranks chosen by hand (per head, for attention; None or absent is dense).

    Keys are names of parts ("blocks.0.attn.qk", "blocks.0.mlp.fc1", "head") or of kinds for all blocks ("qk", "vo",
    "fc1", "fc2"); names win over kinds. Attention with both ranks full stays dense, and so, in corrected mode, does a
    linear layer at or above its break-even rank.

    Raises `ValueError` for an unknown name, a rank below 1 or above the full one, or a part that cannot be factored.

    >>> from leanvit import comcat, models
    >>> plan = comcat.make_plan(models.create("embedded_vit"), {"fc1": 32, "blocks.0.mlp.fc1": None, "head": 4})
    >>> plan.ranks["blocks.1.mlp.fc1"], "blocks.0.mlp.fc1" in plan.ranks
    (32, False)
    """
    _one_of("mode", mode, MODES)
    bias = bias or ("none" if mode == "faithful" else "absorb")
    _one_of("bias", bias, BIASES)
    found, skipped = parts(model)
    names = {p.name for p in found}
    kinds = {p.name.rpartition(".")[2] for p in found if "." in p.name}
    unable = {n.rpartition(".")[2]: why for n, why in skipped.items() if n.rpartition(".")[2] not in kinds}
    for key in ranks:
        if key in skipped and ranks[key] is not None:
            raise ValueError(f"make_plan: {key} cannot be factored: {skipped[key]}")
        if key in unable and ranks[key] is not None:
            raise ValueError(f"make_plan: no block's {key} can be factored: {unable[key]}")
        if key not in names | kinds | set(skipped) | set(unable):
            raise ValueError(f"make_plan: the model has no part {key!r}; there are {', '.join(sorted(names)[:6])}, ...")
    chosen = {}
    for part in found:
        rank = ranks.get(part.name, ranks.get(part.name.rpartition(".")[2]))
        if rank is None:
            continue
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= part.full:
            size = "the head size" if part.kind != "fc" else "its smaller width"
            raise ValueError(f"make_plan: rank {rank!r} of {part.name} must lie in 1..{part.full}, {size}")
        chosen[part.name] = rank
    if mode == "corrected":
        chosen = _without_loss(found, chosen)
    shapes = {p.name: [p.heads, p.inputs, p.outputs, p.full] for p in found}
    return Plan(model_name(model), chosen, shapes, mode, bias, about or {})


def _without_loss(found: list[Part], ranks: dict[str, int]) -> dict[str, int]:
    """Ranks without those that save nothing: linear layers from break-even on, attentions at full rank."""
    kept = {p.name: ranks[p.name] for p in found if p.name in ranks and ranks[p.name] < p.break_even}
    touched = {p.module for p in found if p.kind != "fc" and p.name in kept}
    full = {p.name: ranks[p.name] for p in found if p.kind != "fc" and p.module in touched and p.name in ranks}
    return kept | full


def _one_of(what: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"ComCAT: {what}={value!r} is none of {', '.join(known)}")


def check_plan(model: nn.Module, plan: Plan) -> list[Part]:
    """The parts of `model`, after making sure that `plan` was made for a model of these shapes.

    Raises `ValueError` where it was not, `TypeError` for something that is no `Plan`.
    """
    if not isinstance(plan, Plan):
        kind = f"{type(plan).__module__}.{type(plan).__name__}"
        raise TypeError(f"ComCAT: a leanvit.comcat_plan.Plan is needed, got {kind}; see make_plan and Plan.from_json")
    found, _ = parts(model)
    mine = {p.name: [p.heads, p.inputs, p.outputs, p.full] for p in found}
    if mine != plan.shapes:
        names = [n for n in (*mine, *plan.shapes) if mine.get(n) != plan.shapes.get(n)]
        there, here = plan.shapes.get(names[0], "none"), mine.get(names[0], "none")
        raise ValueError(
            f"ComCAT: the plan is for {plan.model}, this model is {model_name(model)} and differs in {names[0]} "
            f"(heads, in, out, full rank: {there} in the plan, {here} here); make a plan for this model"
        )
    for part in found:
        rank = plan.ranks.get(part.name, part.full)
        if not 1 <= rank <= part.full:
            raise ValueError(f"ComCAT: rank {rank} of {part.name} must lie in 1..{part.full}; mend the plan")
    unknown = [n for n in plan.ranks if n not in plan.shapes]
    if unknown:
        raise ValueError(f"ComCAT: the plan ranks {unknown[0]}, which is no part of the model; mend the plan")
    return found


def plan_of(model: nn.Module, what: str = "ComCAT") -> Plan:
    """The plan of a factored model, or a `ValueError`."""
    plan = getattr(model, PLAN, None)
    if plan is None:
        raise ValueError(f"{what}: this {type(model).__name__} is not factored by ComCAT; apply(model, plan) first")
    return plan
