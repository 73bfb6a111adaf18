"""Plans that meet a budget exactly, in FLOPs or in measured latency, and the controls at equal cost.

`meet` is the finish of a search (UVC's specification, 2.8 f and g): from any starting counts it removes the group of
the least relative norm per cost while the budget is exceeded, and gives back the most valuable that fits while
something does. `magnitude_plan` and `random_plan` are the same from the dense model, with the weights' norms and with
random ones: what a search must beat.
"""

import random
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from leanvit.uvc_cost import FlopsCost, LatencyCost, LatencyTable
from leanvit.uvc_math import Norms, group_norms
from leanvit.uvc_plan import BlockPlan, BlockShape, Plan, Shapes, read_shapes

# --- counts that meet a budget ---------------------------------------------------------------------------------------


@dataclass
class Counts:
    """What stays of a running block: heads, value dimensions of each of them, hidden units."""

    heads: int
    width: int
    units: int


class _Block:
    """One block's groups in the order in which they go: norms as a part of the block's, and what sizes are allowed."""

    def __init__(
        self,
        shape: BlockShape,
        norms: Norms,
        round_units: int,
        round_dims: int | None,
        fixed: Collection[str],
        absolute: bool = False,
    ):
        if len(set(shape.values)) > 1:
            raise ValueError(
                f"a block has heads of {min(shape.values)} to {max(shape.values)} value dimensions (a plan cut them "
                "unevenly); counts of it cannot meet a budget, give a plan of your own"
            )
        self.shape, self.fixed = shape, fixed
        self.width = max(shape.values)
        self.heads = _sorted_sums(norms.heads)
        self.units = _sorted_sums(norms.units)
        self.round_units = min(round_units, shape.hidden)
        self.round_dims = min(round_dims, self.width) if round_dims else None
        ordered = [d.sort().values.double() for d in norms.dims]
        self.head_order = norms.heads.argsort().tolist()
        # where norms are of one unit over all blocks, relative ones are made absolute again
        self.worth = [float(a.double().sum()) if absolute else 1.0 for a in (norms.heads, norms.units)]
        self.dims = [(d.cumsum(0) / norms.heads.sum().double().clamp_min(1e-300)).tolist() for d in ordered]

    def least(self) -> Counts:
        """The smallest sizes that are allowed."""
        heads = self.shape.heads if "heads" in self.fixed else 1
        units = self.shape.hidden if "units" in self.fixed else self.round_units
        return Counts(heads, self.round_dims or self.width, units)

    def smaller(self, n: int, whole: int, step: int) -> int | None:
        """The next allowed size below `n`: a multiple of `step`, at least one of them."""
        below = (n - 1) // step * step
        return below if below >= step else None

    def larger(self, n: int, whole: int, step: int) -> int | None:
        return None if n >= whole else min(n // step * step + step, whole)

    def value(self, c: Counts) -> float:
        """Norm of what stays, heads and units each out of 1, or out of their own sums."""
        heads = 1 - self.heads[self.shape.heads - c.heads]
        if c.width < self.width:
            gone = self.width - c.width
            heads -= sum(self.dims[i][gone - 1] for i in self.head_order[self.shape.heads - c.heads :])
        return self.worth[0] * heads + self.worth[1] * (1 - self.units[self.shape.hidden - c.units])

    def neighbours(self, c: Counts, direction: str) -> list[Counts]:
        """Counts one group away, "smaller" or "larger"."""
        move, shape, found = getattr(self, direction), self.shape, []
        if "heads" not in self.fixed:
            found.append((move(c.heads, shape.heads, 1), c.width, c.units))
        if "units" not in self.fixed:
            found.append((c.heads, c.width, move(c.units, shape.hidden, self.round_units)))
        if self.round_dims:
            found.append((c.heads, move(c.width, self.width, self.round_dims), c.units))
        return [Counts(*f) for f in found if None not in f]


def _sorted_sums(a: Tensor) -> list[float]:
    """`sums[k]`: the k smallest as a part of all."""
    sums = a.double().sort().values.cumsum(0) / a.double().sum().clamp_min(1e-300)
    return [0.0, *sums.tolist()]


def floor(
    cost: FlopsCost | LatencyCost, *, round_units: int, round_dims: int | None, skip: bool, fixed: Collection[str] = ()
) -> float:
    """The smallest ratio of the dense cost that a plan can have: every block at its smallest, with `skip` only the
    cheapest of them.
    """
    blocks = []
    for i, shape in enumerate(cost.shapes.blocks):
        width = min(round_dims, max(shape.values)) if round_dims else max(shape.values)
        units = shape.hidden if "units" in fixed else min(round_units, shape.hidden)
        blocks.append(cost.attention(i, shape.heads if "heads" in fixed else 1, width) + cost.mlp(i, units))
    return (cost.fixed + (min(blocks, default=0) if skip else sum(blocks))) / cost.dense


def check_budget(budget: float, cost: FlopsCost | LatencyCost, lowest: float) -> None:
    """Raise `ValueError` for a budget outside [lowest, 1] of the dense cost."""
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget <= 1:
        raise ValueError(f"budget={budget!r} must be a part of the dense model's {cost.name}, in (0, 1]")
    if budget < lowest:
        raise ValueError(
            f"budget={budget:g} of the {cost.name} cannot be met: the smallest plan of these settings has {lowest:.4f}"
        )


def meet(
    cost: FlopsCost | LatencyCost,
    norms: list[Norms],
    budget: float,
    *,
    start: Sequence[Counts | None] | None = None,
    gates: Sequence[float] | None = None,
    round_units: int = 16,
    round_dims: int | None = None,
    patches: tuple[int, ...] | None = None,
    origin: dict | None = None,
    fixed: Collection[str] = (),
    absolute: bool = False,
) -> Plan:
    """The plan near `start` whose cost, in MACs or ms, is at most the budget, and less than one group below it.

    Args:
        norms: of all groups, by block.
        budget: part of the dense cost.
        start: counts of each block, None for a skipped one; by default everything.
        gates: of each block how much it should run; blocks are skipped or restored in that order where widths alone
            cannot meet the budget. None: skipped blocks stay skipped, and no other is.
        round_units, round_dims: sizes are multiples of these (or the whole); `round_dims=None` leaves value dimensions
            alone, else all heads of a block get the same number, so that they fit one product.
        fixed: "heads" or "units", of which none may go.
        absolute: the norms are of one unit over all blocks and kinds (`uvc_importance`); else they count as parts of
            the sum of their block and kind.

    Raises `ValueError` for a budget below the floor, one that the running blocks cannot meet, value dimensions under a
    latency table, and sizes below 1.
    """
    if round_units < 1 or (round_dims is not None and round_dims < 1):
        raise ValueError(f"round_units={round_units} and round_dims={round_dims} must be at least 1")
    if round_dims is not None and isinstance(cost, LatencyCost):
        raise ValueError("a latency table knows no value dimensions; use round_dims=None")
    check_budget(budget, cost, floor(cost, round_units=round_units, round_dims=round_dims, skip=True, fixed=fixed))
    shapes = cost.shapes
    tables = [_Block(s, n, round_units, round_dims, fixed, absolute) for s, n in zip(shapes.blocks, norms, strict=True)]
    whole = [Counts(s.heads, max(s.values), s.hidden) for s in shapes.blocks]
    now: list[Counts | None] = [_rounded(t, c) for t, c in zip(tables, start or whole, strict=True)]
    limit = budget * cost.dense * (1 + 1e-12)

    def price(i: int, c: Counts | None) -> float:
        return 0.0 if c is None else cost.attention(i, c.heads, c.width) + cost.mlp(i, c.units)

    def lowest() -> float:
        return cost.fixed + sum(price(i, tables[i].least()) for i, c in enumerate(now) if c is not None)

    while lowest() > limit:
        running = [i for i, c in enumerate(now) if c is not None]
        if gates is None or len(running) < 2:
            raise ValueError(
                f"budget={budget:g} of the {cost.name} cannot be met with blocks {running} running: their smallest "
                f"sizes come to {lowest() / cost.dense:.4f}; let blocks be skipped, or name more of them"
            )
        now[min(running, key=lambda i: gates[i])] = None
    if gates is not None:
        _restore_blocks(now, whole, [t.least() for t in tables], gates, price, cost.fixed, limit)
    total = cost.fixed + sum(price(i, c) for i, c in enumerate(now))

    def options(direction: str) -> Iterable[tuple[float, float, int, Counts]]:
        """`(relative norm per cost, cost difference, block, counts)` of every group that can go or come."""
        for i, c in enumerate(now):
            for other in [] if c is None else tables[i].neighbours(c, direction):
                difference = price(i, other) - price(i, c)
                gain = tables[i].value(other) - tables[i].value(c)
                yield gain / difference if difference else float("inf"), difference, i, other

    while total > limit:
        # latency can be flat: then any smaller size will do, the least norm first
        _, difference, i, other = min(options("smaller"), key=lambda o: o[0])
        now[i], total = other, total + difference
    while fitting := [o for o in options("larger") if total + o[1] <= limit]:
        _, difference, i, other = max(fitting, key=lambda o: o[0])
        now[i], total = other, total + difference
    about = {"budget": budget, "in": cost.name, "predicted_ratio": total / cost.dense, **(origin or {})}
    return plan_of(shapes, norms, now, patches=patches, origin=about)


def _rounded(table: _Block, counts: Counts | None) -> Counts | None:
    """The nearest sizes that are allowed."""
    if counts is None:
        return None
    shape = table.shape
    units = counts.units
    if units < shape.hidden:
        units = min(max(round(units / table.round_units), 1) * table.round_units, shape.hidden)
    width = counts.width
    if table.round_dims and width < table.width:
        width = min(max(round(width / table.round_dims), 1) * table.round_dims, table.width)
    return Counts(min(max(counts.heads, 1), shape.heads), width if table.round_dims else table.width, units)


def _restore_blocks(
    now: list, whole: list, least: list, gates: Sequence[float], price: Callable, fixed: float, limit: float
) -> None:
    """Where all running blocks may stay whole and a block's least size is left over, the best skipped one comes."""
    while any(c is None for c in now):
        total = fixed + sum(price(i, whole[i]) for i, c in enumerate(now) if c is not None)
        chunk = min(price(i, w) for i, w in enumerate(whole)) * 1e-3  # rounding of a budget that is met exactly
        if total > limit - chunk:
            return
        best = max((i for i, c in enumerate(now) if c is None), key=lambda i: gates[i])
        running = [best, *(i for i, c in enumerate(now) if c is not None)]
        if fixed + sum(price(i, least[i]) for i in running) > limit:
            return
        now[best] = whole[best]


def plan_of(
    shapes: Shapes,
    norms: list[Norms],
    counts: Sequence[Counts | None],
    *,
    patches: tuple[int, ...] | None = None,
    origin: dict | None = None,
) -> Plan:
    """The plan that keeps the groups of largest norm, so many of each kind as `counts` says."""
    blocks: list[BlockPlan | None] = []
    for shape, norm, c in zip(shapes.blocks, norms, counts, strict=True):
        if c is None:
            blocks.append(None)
            continue
        heads = _largest(norm.heads, c.heads)
        values = tuple(_largest(norm.dims[h], min(c.width, shape.values[h])) for h in heads)
        blocks.append(BlockPlan(heads, values, _largest(norm.units, c.units)))
    return Plan(shapes, tuple(blocks), patches, origin or {})


def _largest(a: Tensor, count: int) -> tuple[int, ...]:
    return tuple(sorted(a.argsort()[len(a) - count :].tolist()))


# --- controls --------------------------------------------------------------------------------------------------------


def _cost(model: nn.Module, latency: LatencyTable | None) -> FlopsCost | LatencyCost:
    shapes = read_shapes(model)
    return FlopsCost(shapes) if latency is None else LatencyCost(shapes, latency)


def _start(shapes: Shapes, skip: Iterable[int]) -> list[Counts | None]:
    skip = set(skip)
    wrong = sorted(skip - set(range(len(shapes.blocks))))
    if wrong:
        raise ValueError(f"skip: block {wrong[0]} is outside 0..{len(shapes.blocks) - 1}")
    whole = [Counts(s.heads, max(s.values), s.hidden) for s in shapes.blocks]
    return [None if i in skip else c for i, c in enumerate(whole)]


def magnitude_plan(
    model: nn.Module,
    budget: float,
    *,
    skip: Iterable[int] = (),
    round_units: int = 16,
    round_dims: int | None = None,
    latency: LatencyTable | None = None,
) -> Plan:
    """The groups of the least relative norm per cost go until the budget is met; blocks `skip` go first.

    >>> import timm, torch
    >>> from leanvit import uvc
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2,
    ...                           num_heads=2, num_classes=4)
    >>> uvc.magnitude_plan(model, 0.5).ratio() <= 0.5
    True

    Raises `ValueError` for a budget below the floor, a block that is not there and a model that cannot be cut.
    """
    cost = _cost(model, latency)
    start = _start(cost.shapes, skip)
    return meet(
        cost, group_norms(model, cost.shapes), budget, start=start, round_units=round_units, round_dims=round_dims,
        origin={"mode": "magnitude"},
    )  # fmt: skip


def random_plan(
    model: nn.Module,
    budget: float,
    seed: int,
    *,
    skip: Iterable[int] = (),
    round_units: int = 16,
    round_dims: int | None = None,
    latency: LatencyTable | None = None,
) -> Plan:
    """As `magnitude_plan`, with random numbers for norms: which groups go, and how many of each kind, is chance.

    Raises `ValueError` as `magnitude_plan`.
    """
    cost = _cost(model, latency)
    generator = torch.Generator().manual_seed(seed)
    drawn = random.Random(seed)
    norms = []
    for shape in cost.shapes.blocks:
        # a factor for each kind of each block, so that not all blocks lose the same part
        heads, units = drawn.uniform(0.5, 2), drawn.uniform(0.5, 2)
        dims = tuple(torch.rand(v, generator=generator).pow(heads) for v in shape.values)
        whole_heads = torch.rand(shape.heads, generator=generator).pow(heads)
        dims = tuple(d * h / d.sum() for d, h in zip(dims, whole_heads, strict=True))
        norms.append(Norms(dims, whole_heads, torch.rand(shape.hidden, generator=generator).pow(units)))
    start = _start(cost.shapes, skip)
    return meet(
        cost, norms, budget, start=start, round_units=round_units, round_dims=round_dims,
        origin={"mode": "random", "seed": seed},
    )  # fmt: skip
