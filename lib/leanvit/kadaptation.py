"""KAdaptation: updates of queries and values as sums of Kronecker products with factors shared by all layers.

He, Li, Zhang, Yang, Wang: "Parameter-efficient Model Adaptation for Vision Transformers", AAAI 2023, arXiv 2203.16329.
Written from the paper's mathematics; the study of local intrinsic dimensions that leads to it is `intrinsic.py`.

The frozen weights of queries and values, and no others, get an update (specification, sections 1.3 and 1.8)

    x -> x W^T + scale * x H + b        H = sum_{i=1..n} A_i (x) B_i        B_i = u_i v_i^T of rank r

with `A_i (n, n)` one set for all layers, full or `s_i t_i^T` of rank rA, `B_i (k/n, m/n)` and `b` of each layer. H is
never built in training: with factored A_i it is `P Q^T` of inner size `n rA r`, else three small products
(kernels/lowrank.py).

Three modes:
* "fixed" (default): u, s and t start so that each map from v to H has norm one, v and b start at zero.
* "paper": the same form with the released magnitudes (s, t uniform in +-0.01, u of deviation 0.02, scale 160), under
  which the first steps of SGD are about a million times shorter than LoRA's (specification 1.7); Adam's are not.
* "released": what the authors' code computes, to show what its published number rests on. (a) u and v both start at
  zero, so that u, v, s and t never get a gradient: b and the head alone learn. (b) The values use the queries' u and v;
  their own are counted and dead. (c) The update is reshaped without a transpose: `qkv.scrambled`. (d) The queries'
  update is added after the division by sqrt(head width), so it counts that much more. It cannot be merged.

Known divergences: the released code applies dropout 0.5 to H, but never leaves eval mode, so that it never fires; here
`dropout` is 0 unless asked for. Its count of 50,176 needs the factored A_i of its code, not the paper's full ones.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanvit import qkv
from leanvit.kernels import lowrank
from leanvit.qkv import Rows, Shifted
from leanvit.surgery import Match, Merged, Report, check_whole, count, freeze, head_parameters, refuse_adapted

MODES = ("fixed", "paper", "released")
SHARED = (False, "rules", "factors", True)
SCALES = {"fixed": 4.0, "paper": 160.0, "released": 160.0}  # 160 = (128 / 4) * 5: LoRA's scale of the authors, times 5


def parameters_formula(
    width: int,
    depth: int,
    n: int = 32,
    rank: int = 1,
    rule_rank: int | None = 1,
    share_qv: bool | str = False,
    bias: bool = True,
) -> int:
    """Trained numbers without the head, of `depth` layers `width -> width` (specification 1.5).

    `2 (2 n^2 rA) + L (4 d r + d)`, or `2 n^3 + L (4 d r + d)` with full A_i: 50,176 for ViT-B with the defaults.
    """
    rules = n**3 if rule_rank is None else 2 * n**2 * rule_rank
    pairs = 2 * width * rank
    return rules * (2 - (share_qv in (True, "rules"))) + depth * (
        pairs * (2 - (share_qv in (True, "factors"))) + width * bias
    )


# --- modules ---------------------------------------------------------------------------------------------------------


class Start:
    """How parameters begin: drawn on the CPU in float32, so that a seed means the same on every device.

    They get dtype and device of `like`, a tensor of any shape. Magnitudes by mode: specification 1.7.
    """

    def __init__(self, mode: str, seed: int | None, like: Tensor):
        self.mode, self.like = mode, like
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def _parameter(self, value: Tensor) -> nn.Parameter:
        return nn.Parameter(value.to(self.like.device, self.like.dtype))

    def zeros(self, *shape: int) -> nn.Parameter:
        """What starts at zero in every mode: v and b."""
        return self._parameter(torch.zeros(shape))

    def rule(self, *shape: int, std: float) -> nn.Parameter:
        """A factor of A_i, or A_i itself: normal of deviation `std` ("fixed"), else uniform in +-0.01."""
        value = torch.empty(shape)
        if self.mode == "fixed":
            return self._parameter(value.normal_(std=std, generator=self.generator))
        return self._parameter(value.uniform_(-0.01, 0.01, generator=self.generator))

    def left(self, n: int, rows: int, rank: int) -> nn.Parameter:
        """u `(n, rows, rank)`: normal, or zeros as released."""
        if self.mode == "released":
            return self.zeros(n, rows, rank)
        std = rows**-0.5 if self.mode == "fixed" else 0.02
        return self._parameter(torch.empty(n, rows, rank).normal_(std=std, generator=self.generator))


class Rules(nn.Module):
    """`A_i` of all layers: `kad_s, kad_t (n, n, rA)` with `A_i = s_i t_i^T`, or full ones, `kad_a (n, n, n)`."""

    def __init__(self, n: int, rank: int | None, start: Start):
        super().__init__()
        self.n, self.rank = n, rank
        if rank is None:
            self.kad_a = start.rule(n, n, n, std=1 / n)
        else:
            self.kad_s = start.rule(n, n, rank, std=n**-0.5)
            self.kad_t = start.rule(n, n, rank, std=n**-0.5)

    def matrices(self, dtype: torch.dtype | None = None) -> Tensor:
        """`(n, n, n)`: A_i[a, c]; `dtype` converts the factors before they are multiplied."""
        if self.rank is None:
            return self.kad_a.to(dtype=dtype)
        return self.kad_s.to(dtype=dtype) @ self.kad_t.to(dtype=dtype).mT

    def extra_repr(self) -> str:
        return f"n={self.n}, rank={'full' if self.rank is None else self.rank}"


class Kronecker(nn.Module):
    """One layer's update `x (..., k) -> (..., m)` of its queries or values (specification 1.3); see `qkv.Shifted`.

    `kad_u (n, k/n, r)`, `kad_v (n, m/n, r)` and `kad_bias (m,)` are its own, or None where it uses those of `partner`
    (the queries' delta of the same attention). Rules and partner belong to others and are not its submodules, so that
    a state dict holds them once; a deep copy of the whole model keeps them shared.

    With `dropout` on H, a training step draws a mask of H's entries. No thin product equals a masked H: then, and only
    then, H is built, which costs more than full fine-tuning of the layer.
    """

    def __init__(
        self,
        rows: Rows,
        rules: Rules,
        rank: int,
        scale: float,
        dropout: float,
        start: Start,
        *,
        bias: bool,
        partner: "Kronecker | None" = None,
        share_factors: bool = False,
    ):
        super().__init__()
        self.rank, self.scale, self.dropout = rank, scale, dropout
        self.role, self.heads, self.width = rows.role, rows.heads, rows.width
        own_factors = partner is None or not share_factors
        self.kad_u = start.left(rules.n, rows.inputs // rules.n, rank) if own_factors else None
        self.kad_v = start.zeros(rules.n, rows.width // rules.n, rank) if own_factors else None
        # "one vector b in R^d per layer, the same added to both" (specification 1.3)
        self.kad_bias = start.zeros(rows.width) if bias and partner is None else None
        self.has_bias = bias
        self.elsewhere = (rules, partner)  # a tuple: not registered
        self.settings = {"class": type(self).__name__, "scale": scale}  # `state.load` compares them

    @property
    def rules(self) -> Rules:
        """The A_i, which other layers share."""
        return self.elsewhere[0]

    def pair(self) -> tuple[Tensor, Tensor]:
        """`u (n, k/n, r)` and `v (n, m/n, r)` in use."""
        owner = self if self.kad_u is not None else self.elsewhere[1]
        return owner.kad_u, owner.kad_v

    def bias(self) -> Tensor | None:
        """b `(m,)`."""
        owner = self if self.kad_bias is not None or self.elsewhere[1] is None else self.elsewhere[1]
        return owner.kad_bias if self.has_bias else None

    def matrix(self, dtype: torch.dtype | None = None) -> Tensor:
        """H `(k, m)` without the scale; `dtype` converts the factors before they are multiplied."""
        u, v = (factor.to(dtype=dtype) for factor in self.pair())
        return lowrank.kronecker_sum(self.rules.matrices(dtype), u, v)

    def masked(self) -> Tensor:
        """`scale * H (k, m)`, under its dropout in a training step."""
        return self.scale * F.dropout(self.matrix(), self.dropout, self.training)

    def weight(self) -> Tensor:
        """`scale * H^T (m, k)`, from the factors in float64: in float32 its rank would drown in rounding."""
        return self.scale * self.matrix(torch.float64).T

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """`P (k, n rA r)` and `Q (m, n rA r)`, `scale * H = P Q^T`; None where A_i are full or dropout masks H."""
        rules = self.rules
        if rules.rank is None or (self.training and self.dropout):
            return None
        u, v = self.pair()
        return lowrank.factors(rules.kad_s, rules.kad_t, u, self.scale * v)

    def forward(self, x: Tensor) -> Tensor:
        factors = self.factors()
        if factors is not None:
            y = (x @ factors[0]) @ factors[1].T
        elif self.training and self.dropout:
            y = x @ self.masked()
        else:
            u, v = self.pair()
            y = lowrank.kronecker_apply(x, self.rules.kad_a, u, self.scale * v)
        bias = self.bias()
        return y if bias is None else y + bias

    def extra_repr(self) -> str:
        return f"n={self.rules.n}, rank={self.rank}, scale={self.scale:.4g}, dropout={self.dropout}"


class Released(Kronecker):
    """The released update `(B, N, k) -> (B, N, m)` of one layer: the docstring of this file, (b) to (d).

    Its values have u, v of their own that no one reads.
    """

    def pair(self) -> tuple[Tensor, Tensor]:
        owner = self.elsewhere[1] or self
        return owner.kad_u, owner.kad_v

    def factors(self) -> None:
        """It is no matrix on the channels: it mixes tokens and images."""

    def forward(self, x: Tensor) -> Tensor:
        y, bias = x @ self.masked(), self.bias()
        y = qkv.scrambled(y if bias is None else y + bias, self.heads)
        return y * math.sqrt(self.width // self.heads) if self.role == "q" else y


# --- attach, merge, detach -------------------------------------------------------------------------------------------


def _check_settings(
    mode: str, n: int, rank: int, rule_rank: int | None, share_qv: bool | str, dropout: float, scale: float
):
    check_whole("kadaptation", n=n, rank=rank, rule_rank=1 if rule_rank is None else rule_rank)
    if share_qv not in SHARED:
        raise ValueError(f"kadaptation: share_qv={share_qv!r} is not one of False, 'rules', 'factors', True (both)")
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"kadaptation: dropout={dropout!r} must be at least 0 and below 1")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale) or scale == 0:
        raise ValueError(f"kadaptation: scale={scale!r} must be a finite number other than 0")
    if mode == "released" and (rule_rank is None or share_qv):
        raise ValueError(
            "kadaptation: mode 'released' factors A_i and has one way to share; leave rule_rank and share_qv"
        )


def _check_widths(rows: list[Rows], n: int) -> None:
    widths = sorted({w for r in rows for w in (r.inputs, r.width)})
    if any(w % n for w in widths):
        common = math.gcd(*widths)
        fitting = [i for i in range(2, min(common, 64) + 1) if common % i == 0]
        raise ValueError(
            f"kadaptation: n={n} does not divide the widths {', '.join(map(str, widths))} of {rows[0].layer}"
            f"{' and others' if len(widths) > 1 else ''}; n that do: {', '.join(map(str, fitting)) or 'none but 1'}"
        )


def attach(
    model: nn.Module,
    n: int | None = None,
    rank: int = 1,
    rule_rank: int | None = 1,
    *,
    mode: str = "fixed",
    share_qv: bool | str = False,
    bias: bool = True,
    dropout: float = 0.0,
    scale: float | None = None,
    match: Match | None = None,
    seed: int | None = None,
) -> Report:
    """Adapt the queries and values of a timm ViT, in place; the adapters and the head are trained, nothing else.

    Args:
        model: any timm model whose attentions have a fused `qkv`, or `q_proj` and `v_proj`; `(B, N, C)` or any
            other `(..., C)`.
        n: terms of the sum and side of A_i; it divides every width (default 32). rank: r of B_i = u_i v_i^T.
        rule_rank: rA of A_i = s_i t_i^T, or None for full A_i.
        mode: "fixed", "paper" or "released" (see above).
        share_qv: queries and values have one set of "rules" (A_i), of "factors" (u, v of a layer), of both (True), or
            each their own (False).
        bias: one vector b a layer, added to queries and values alike (two where their widths differ).
        dropout: on the entries of H, in train() only. Above 0 a training step builds H.
        scale: of H; default 4, in the other modes the released 160.
        match: `match(name, module) -> bool` among the linear layers that hold queries or values.
        seed: of the start; None takes torch's global generator.

    Returns:
        A `Report` of the layers; the trained names hold a component that begins with `kad_`.

    Raises:
        ValueError: no attention or none chosen, n that does not divide a width, an argument out of range, an adapter
            that is there already or was merged into the weights; the model is then as it was.

    >>> from leanvit import kadaptation, models
    >>> report = kadaptation.attach(models.create("embedded_vit"), n=16)
    >>> report.matched[:2]
    ['blocks.0.attn.qkv', 'blocks.1.attn.qkv']
    >>> report.trainable - kadaptation.parameters_formula(width=96, depth=6, n=16)  # the head
    970
    """
    if mode not in MODES:
        raise ValueError(f"kadaptation: mode={mode!r} is not one of {', '.join(MODES)}")
    terms, factor = 32 if n is None else n, SCALES[mode] if scale is None else scale
    _check_settings(mode, terms, rank, rule_rank, share_qv, dropout, factor)
    check_whole("kadaptation", 0, seed=0 if seed is None else seed)
    if isinstance(model, nn.Sequential):
        raise ValueError(
            "kadaptation: the shared A_i would become a step of this nn.Sequential; attach to the ViT in it"
        )
    refuse_adapted(model, "kadaptation")
    rows, skipped = qkv.choose(model, "kadaptation", match)
    _check_widths(rows, terms)
    if mode == "released":
        qkv.check_scrambled(model, rows, "kadaptation: mode 'released'")

    start = Start(mode, seed, model.get_submodule(rows[0].layer).weight)
    one_set = share_qv in (True, "rules")
    roles = dict.fromkeys(r.role for r in rows)
    rules = nn.ModuleDict(
        {key: Rules(terms, rule_rank, start) for key in (["qv"] if one_set else roles)}  # in the order q, v
    )
    kind = Released if mode == "released" else Kronecker
    deltas: dict[str, dict[str, tuple[int, nn.Module]]] = {}
    queries: dict[str, Kronecker] = {}
    for r in rows:
        partner = queries.get(r.attention)
        if partner is not None and partner.width != r.width:
            partner = None  # fewer heads for the values than for the queries: nothing to share
        start.like = model.get_submodule(r.layer).weight
        own = rules["qv" if one_set else r.role]
        share = share_qv in (True, "factors")
        delta = kind(r, own, rank, factor, dropout, start, bias=bias, partner=partner, share_factors=share)
        if r.role == "q":
            queries[r.attention] = delta
        deltas.setdefault(r.layer, {})[r.role] = (r.first, delta)

    head = head_parameters(model)
    freeze(model, keep=head.__contains__)
    notes = [
        f"mode {mode}: {terms} terms, scale {factor:g}, {sum(p.numel() for p in rules.parameters()):,} numbers shared"
    ]
    notes += qkv.install(model, deltas)
    model.kad_rules = rules
    return Report(f"KAdaptation ({mode})", list(deltas), skipped, *count(model), notes)


def _attached(model: nn.Module, what: str) -> tuple[list[tuple[str, Shifted]], nn.Module]:
    """The adapted layers and the module that owns the A_i: `model`, or a part of it where it was wrapped since."""
    layers = qkv.shifted(model, Kronecker)
    if not layers:
        raise ValueError(f"{what}: KAdaptation is not attached to this {type(model).__name__}")
    owner = next((m for m in model.modules() if "kad_rules" in m._modules), None)
    if owner is None:
        raise ValueError(
            f"{what}: the A_i that {layers[0][0]} shares with other layers are not in this {type(model).__name__}; "
            "give the whole model that was attached to"
        )
    return layers, owner


def merge(model: nn.Module) -> Merged:
    """Add the updates to weights and biases; only the layers that KAdaptation found are left, with the same outputs.

    What it returns undoes it: `merged = merge(model)`, later `merged.unmerge()`. Where the stock layer and its
    attention have no bias, the layer gets one (timm then needs `qkv_bias=True`). Raises `ValueError` where nothing is
    attached, and for mode "released", which is no weight.

    >>> from leanvit import kadaptation, models
    >>> model = models.create("embedded_vit")
    >>> report = kadaptation.attach(model)  # and a training
    >>> merged = kadaptation.merge(model)
    >>> type(model.blocks[0].attn.qkv).__name__
    'Linear'
    >>> merged.unmerge()
    """
    layers, owner = _attached(model, "merge")
    for name, layer in layers:
        if any(isinstance(getattr(layer, role), Released) for role in layer.first):
            raise ValueError(f"merge: mode 'released' ({name}) mixes tokens and images, which no weight of it does")
    return qkv.merge(model, Kronecker, "KAdaptation", [(owner, "kad_rules")])


def detach(model: nn.Module) -> None:
    """Drop the updates: the layers that KAdaptation found, bit for bit. What may be trained stays as it is.

    Raises `ValueError` where nothing is attached.
    """
    _, owner = _attached(model, "detach")
    qkv.detach(model, Kronecker)
    del owner.kad_rules
