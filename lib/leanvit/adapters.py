"""Adapter (arXiv 1902.00751) and Compacter (arXiv 2106.04647) inside the MLP branch of a vision transformer's blocks.

Placement, sizes and counts are those of KAdaptation's comparison (its specification, section 2): with the MLP's output
m = MLP(LN2(x)), the block adds m + Up(act(Down(LN_a(m)))), where LN_a is a new, trained LayerNorm. A LayerScale or
a norm behind the MLP stays behind the adapter.

    Adapter     Down, Up linear; ReLU              per block 2 d w + w + d + 2 d          (d = width, w = bottleneck)
    Compacter   Down, Up are PHM layers; tanh-GELU per block 2 r (d + w) + w + d + 2 d    (r = rank)

A PHM layer's weight is sum_i R_i (x) (l_i r_i) with n small matrices R_i in R^(n x n), shared by all layers and both
directions. Known divergences of the released code: it starts away from the identity (`mode="faithful"` does so too;
the default `mode="fixed"` starts Up at zero), evaluates the MLP twice (here once, the same numbers), and never trains
R, because its name misses a filter (`train_rule=False`, so that the published count comes out).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanvit.kernels import lowrank
from leanvit.surgery import Match, Report, check_whole, count, freeze, need_head, refuse_adapted, replace

MODES = ("fixed", "faithful")


class Adapter(nn.Module):
    """`m + Up(ReLU(Down(LayerNorm(m))))` with m = base(x); base is an MLP `(..., in) -> (..., features)`."""

    reason = "a ReLU stands between its two projections"

    def __init__(self, base: nn.Module, features: int, width: int, like: dict, zero: bool):
        super().__init__()
        self.base = base
        self.adapter_norm = nn.LayerNorm(features, **like)
        self.adapter_down = nn.Linear(features, width, **like)
        self.adapter_up = nn.Linear(width, features, **like)
        for linear in (self.adapter_down, self.adapter_up):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        if zero:
            nn.init.zeros_(self.adapter_up.weight)

    def forward(self, x: Tensor) -> Tensor:
        m = self.base(x)
        return m + self.adapter_up(F.relu(self.adapter_down(self.adapter_norm(m))))


class Rule(nn.Module):
    """The n matrices R_i `(n, n, n)` that all PHM layers of a model share, from U(-1, 1).

    A frozen rule is a buffer: it is random, so it has to be stored with what is trained.
    """

    def __init__(self, n: int, like: dict, train: bool):
        super().__init__()
        weight = torch.empty(n, n, n, **like).uniform_(-1, 1)
        if train:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)


class PHM(nn.Module):
    """`x H + bias` with H = sum_i R_i (x) (left_i right_i), `left (n, inputs/n, r)`, `right (n, r, outputs/n)`.

    Each slice of `left` and `right` starts Xavier-uniform with gain sqrt 2, the bias at zero.
    """

    def __init__(self, inputs: int, outputs: int, n: int, rank: int, like: dict):
        super().__init__()
        self.left = nn.Parameter(torch.empty(n, inputs // n, rank, **like))
        self.right = nn.Parameter(torch.empty(n, rank, outputs // n, **like))
        self.bias = nn.Parameter(torch.zeros(outputs, **like))
        for factor in (self.left, self.right):
            for slice_ in factor.data:
                nn.init.xavier_uniform_(slice_, gain=math.sqrt(2))

    def forward(self, x: Tensor, rule: Tensor) -> Tensor:
        # inputs x outputs is bottleneck-sized, so H is built (a small tensor) and applied as one product
        return x @ lowrank.kronecker_sum(rule, self.left, self.right.mT) + self.bias


class Compacter(nn.Module):
    """`m + Up(GELU(Down(LayerNorm(m))))` with m = base(x) `(..., features)`; Down and Up are PHM layers.

    GELU in its tanh form.
    """

    reason = "a GELU stands between its two projections"

    def __init__(
        self, base: nn.Module, features: int, width: int, like: dict, zero: bool, n: int, rank: int, rule: Rule
    ):
        super().__init__()
        self.base = base
        self.compacter_norm = nn.LayerNorm(features, **like)
        self.compacter_down = PHM(features, width, n, rank, like)
        self.compacter_up = PHM(width, features, n, rank, like)
        self.shared = (rule,)  # a tuple hides it from state_dict: its owner is the first layer, it is stored once
        if zero:
            nn.init.zeros_(self.compacter_up.right)

    def forward(self, x: Tensor) -> Tensor:
        m, rule = self.base(x), self.shared[0].weight
        z = F.gelu(self.compacter_down(self.compacter_norm(m), rule), approximate="tanh")
        return m + self.compacter_up(z, rule)


def block_mlps(name: str, module: nn.Module) -> bool:
    """True for the module `mlp` of a block: `blocks.0.mlp`, `layers.1.blocks.0.mlp`, …"""
    parts = name.split(".")
    return parts[-1] == "mlp" and "blocks" in parts


def _insert(
    model: nn.Module, method: str, width: int, mode: str, match: Match | None,
    make: Callable[[nn.Module, int, dict], nn.Module], check: Callable[[int], None] = lambda features: None,
) -> Report:  # fmt: skip
    """Wrap every MLP that matches into `make(mlp, features, like)`, in place, and train these and the head."""
    check_whole(method, width=width)
    if mode not in MODES:
        raise ValueError(f"{method}: mode={mode!r} is none of {', '.join(MODES)}")
    refuse_adapted(model, method)
    head, found, skipped = need_head(model, method), {}, {}
    for name, module in model.named_modules():
        if not (match or block_mlps)(name, module):
            continue
        last = getattr(module, "fc2", None)
        if isinstance(getattr(last, "out_features", None), int):  # a factored layer has it, too
            check(last.out_features)
            found[name] = module
        else:
            skipped[name] = "its last layer is no linear layer named fc2"
    if not found:
        why = "; ".join(f"{n}: {w}" for n, w in [*skipped.items()][:1]) or "its blocks have no module named mlp"
        raise ValueError(f"{method}: no MLP matches in {type(model).__name__} ({why})")
    made = {}
    for name, module in found.items():
        weight = next(module.fc2.parameters())
        like = {"dtype": weight.dtype, "device": weight.device}
        made[name] = make(module, module.fc2.out_features, like)
    freeze(model, keep=head.__contains__)
    for name, module in made.items():
        replace(model, name, module)
    return Report(method, [*found], skipped, *count(model))


def adapter(model: nn.Module, width: int = 64, *, mode: str = "fixed", match: Match | None = None) -> Report:
    """Put an `Adapter` with a bottleneck of `width` around the MLP of every block, in place; train these and the head.

    `mode="fixed"` starts Up at zero, so that the output does not change; "faithful" starts both projections as
    N(0, 0.02), as the released code. `match(name, module)` replaces `block_mlps`.

    Raises `ValueError` for a width below 1, an unknown mode, a model without a head or without such MLPs, or when an
    adapter is there already; the model is then unchanged.

    >>> from leanvit import baselines, models
    >>> report = baselines.adapter(models.create("embedded_vit"), width=16)
    >>> report.matched[:2], report.trainable  # 2 D w + w + D + 2 D numbers a block, and the head
    (['blocks.0.mlp', 'blocks.1.mlp'], 21226)
    """

    def make(mlp: nn.Module, features: int, like: dict) -> Adapter:
        return Adapter(mlp, features, width, like, zero=mode == "fixed")

    return _insert(model, "adapter", width, mode, match, make)


def compacter(
    model: nn.Module,
    width: int = 64,
    n: int = 4,
    rank: int = 1,
    train_rule: bool = False,
    *,
    mode: str = "fixed",
    match: Match | None = None,
) -> Report:
    """Put a `Compacter` with a bottleneck of `width` around the MLP of every block, in place; train these and the head.

    `n` matrices R_i of n x n are shared by all layers; `train_rule` trains them too (n^3 numbers more). `mode="fixed"`
    starts one factor of Up at zero, so that the output does not change; "faithful" is the released start.

    Raises `ValueError` as `adapter`, and when n does not divide the bottleneck or the width of the model.

    >>> from leanvit import baselines, models
    >>> report = baselines.compacter(models.create("embedded_vit"), width=16, n=4)
    >>> report.trainable  # 2 (D + w) + w + D + 2 D numbers a block, and the head
    4138
    """
    check_whole("compacter", n=n, rank=rank)

    def check(features: int) -> None:
        for what, size in (("width", width), ("the model's width", features)):
            if size % n:
                raise ValueError(f"compacter: n={n} does not divide {what} {size}")

    rules: list[Rule] = []

    def make(mlp: nn.Module, features: int, like: dict) -> Compacter:
        first = not rules
        if first:
            rules.append(Rule(n, like, train_rule))
        layer = Compacter(mlp, features, width, like, mode == "fixed", n, rank, rules[0])
        if first:
            layer.compacter_rule = rules[0]
        return layer

    return _insert(model, "compacter", width, mode, match, make, check)
