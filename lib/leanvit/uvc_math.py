"""The pieces of UVC's problem: group norms, least-k sums, proximal step, gates, distance to the budget, control of z.

Equations in words and their provenance: UVC (arXiv 2203.08243), specification, sections 1 and 2. All of it is plain
torch; the two solvers (`uvc_search.py`, `uvc_faithful.py`) put the pieces together.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from leanvit.comcat_modules import FactoredLinear
from leanvit.uvc_plan import Shapes, dense_macs, fixed_macs

TAU = 0.5  # temperature of the block gates


# --- groups and their norms ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Norms:
    """Squared norms of one block's groups: `dims[i] (values of head i,)`, `heads (heads,)`, `units (hidden,)`.

    c, hd and m of the specification, 1.1.
    """

    dims: tuple[Tensor, ...]
    heads: Tensor
    units: Tensor


def group_norms(model: nn.Module, shapes: Shapes) -> list[Norms]:
    """Squared norms of the columns of `attn.proj` (value dimensions, heads) and `mlp.fc2` (hidden units), by block.

    A layer that ComCAT has factored counts as the product of its factors (specification, 1.1).

    Raises `ValueError` that names a layer with a norm that is not finite.
    """
    found = []
    with torch.no_grad():
        for i, (block, shape) in enumerate(zip(model.blocks, shapes.blocks, strict=True)):
            columns = {}
            for name, weight in (("attn.proj", block.attn.proj.weight), ("mlp.fc2", product(block.mlp.fc2))):
                columns[name] = weight.float().square().sum(0)
                if not columns[name].isfinite().all():
                    raise ValueError(
                        f"blocks.{i}.{name} has weights that are not finite; nothing can be ranked by them"
                    )
            dims = columns["attn.proj"].split(shape.values)
            found.append(Norms(dims, torch.stack([d.sum() for d in dims]), columns["mlp.fc2"]))
    return found


def product(layer: nn.Module) -> Tensor:
    """`(out, in)`: the weight of a layer, or of one that ComCAT has factored the product."""
    return layer.second.weight @ layer.first.weight if isinstance(layer, FactoredLinear) else layer.weight


def unit_columns(mlp: nn.Module) -> Tensor:
    """The weight whose columns are the hidden units' way out: that of fc2 `(width, hidden)`, or of the first of its
    factors `(rank, hidden)`.
    """
    return mlp.fc2.first.weight if isinstance(mlp.fc2, FactoredLinear) else mlp.fc2.weight


class _LeastK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a: Tensor, k: Tensor) -> Tensor:
        order = a.argsort()
        count = int(k.ceil())
        ctx.save_for_backward(a, order)
        ctx.count = count
        return a[order[:count]].sum()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, order = ctx.saved_tensors
        members = torch.zeros_like(a)
        members[order[: ctx.count]] = 1
        return grad * members, grad * a[order[min(ctx.count, len(a) - 1)]]


def least_k(a: Tensor, k: Tensor) -> Tensor:
    """T_k(a): the sum of the ceil(k) smallest of `a (n,)`, zero exactly when that many of them are (section 1.3).

    The derivative in the real number `k ()` is the next smallest entry, at k = n the largest; in `a` it is 1 for the
    members of the sum. Raises `ValueError` for a k outside of 0..n.

    >>> import torch
    >>> from leanvit.uvc_math import least_k
    >>> k = torch.tensor(1.5, requires_grad=True)
    >>> total = least_k(torch.tensor([3.0, 1.0, 2.0]), k)
    >>> total.backward()
    >>> total.item(), k.grad.item()
    (3.0, 3.0)
    """
    count = float(k.detach())
    if not 0 <= count <= len(a):
        raise ValueError(f"least_k: k={count:g} is outside 0..{len(a)}")
    return _LeastK.apply(a, k)


def next_smallest(a: Tensor, k: Tensor) -> Tensor:
    """d T_k / d k: the (ceil(k) + 1)-th smallest of `a (n,)` as `()`, the largest when none is left (2.2, step 4)."""
    return a.sort().values[min(int(k.ceil()), len(a) - 1)]


def smallest(a: Tensor, k: Tensor | float) -> Tensor:
    """Indices of the ceil(k) smallest of `a (n,)`, `(ceil(k),)`."""
    return a.argsort()[: math.ceil(float(k))]


@torch.no_grad()
def shrink_(weight: Tensor, columns: Tensor, strength: Tensor | float) -> None:
    """Proximal step of y T_k on `columns (k,)` of `weight (out, in)`, in place: `w <- w / (1 + 2 eta y)`, `strength` =
    eta y (specification, 2.2, step 2).
    """
    if len(columns):
        weight[:, columns] /= 1 + 2 * strength


# --- the resource ----------------------------------------------------------------------------------------------------


def ceil_through(x: Tensor) -> Tensor:
    """ceil(x), with the derivative of x, for `x` of any shape."""
    return x + (x.ceil() - x).detach()


def dead_heads(norms: list[Norms], removed: Tensor) -> Tensor:
    """`(L, most heads)` bool: the ceil(removed[l]) heads of smallest norm of each block, for `removed (L,)`."""
    dead = torch.zeros(len(norms), max(len(n.heads) for n in norms), dtype=torch.bool)
    for i, n in enumerate(norms):
        dead[i, smallest(n.heads, removed[i]).cpu()] = True
    return dead


def flops_ratio(shapes: Shapes, s: Tensor, r: Tensor, dead: Tensor, run: Tensor, *, paper: bool, tokens: int) -> Tensor:
    """R (specification, 1.6) as `()`, differentiable: counts are rounded up, their derivatives pass straight through.

    Args:
        s: `(L, 2)` heads and hidden units to remove, real numbers.
        r: `(L, most heads)` value dimensions to remove in each head; those of `dead` heads, `(L, most heads)` bool, do
            not count.
        run: `(L,)` weights of the blocks in [0, 1].
        paper: the authors' R, which leaves the V rows of removed dimensions in; else exactly what slicing leaves (of
            a padded block, where its heads are left equally wide, which the corrected solver's finish sees to).
        tokens: in the blocks.
    """
    total = torch.as_tensor(float(fixed_macs(shapes, tokens)), dtype=s.dtype)
    squared = tokens * shapes.width
    for i, b in enumerate(shapes.blocks):
        heads, units = ceil_through(s[i, 0]), ceil_through(s[i, 1])
        here = ~dead[i, : b.heads]
        values = torch.tensor(b.values, dtype=s.dtype)
        # which heads are dead is no matter of degree: a head counts as an average one in the derivative
        mean = sum(b.values) / b.heads
        gone = mean * heads + (values[~here].sum() - mean * heads).detach()
        cut = ceil_through(r[i, : b.heads])[here].sum()
        left = sum(b.values) - gone - cut  # value dimensions
        rows = left + cut if paper else left  # of V
        keys = (b.heads - heads) * b.head_dim
        if b.padded:
            wide = torch.maximum(keys, left)
            attention = (2 * keys + rows + left) * squared + 2 * wide * tokens**2
        else:
            attention = keys * (2 * squared + tokens**2) + rows * squared + left * (tokens**2 + squared)
        kept = b.hidden - units
        mlp = sum(squared * kept if rank is None else tokens * rank * (shapes.width + kept) for rank in b.mlp_ranks)
        total = total + run[i] * (attention + mlp)
    return total / dense_macs(shapes)


# --- gates -----------------------------------------------------------------------------------------------------------


def logistic_noise(size: int, seed: int) -> Tensor:
    """Differences of two Gumbel variables, `(size,)`: the same for the same seed, on every process."""
    u = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
    return u.log() - (-u).log1p()


def soft_gate(logit: Tensor, noise: Tensor, tau: float = TAU) -> Tensor:
    """Run weights in (0, 1), `(L,)`, of two-way Gumbel softmaxes: `logit (L,)` is g1 - g0, noise logistic (1.2)."""
    return torch.sigmoid((logit + noise.to(logit.dtype)) / tau)


def hard_gate(logit: Tensor, noise: Tensor, tau: float = TAU) -> Tensor:
    """0 or 1 for each `logit (L,)`, 1 with probability sigmoid(logit) over noise; the soft gate's derivative (2.8b)."""
    soft = soft_gate(logit, noise, tau)
    return soft + ((soft > 0.5).to(soft.dtype) - soft).detach()


def likely_gate(logit: Tensor) -> Tensor:
    """1[logit > 0] for `logit (L,)`, the gate of the exported model, with the derivative of sigmoid(logit) (2.8b)."""
    soft = torch.sigmoid(logit)
    return soft + ((logit > 0).to(soft.dtype) - soft).detach()


def soft_l0_gate(g: Tensor, eps: float) -> Tensor:
    """The authors' gate without Gumbel noise: run weight `(L,)` g1^2 / (g1^2 + eps) of `g (L, 2)` (2.3)."""
    squared = g[:, 1].square()
    return squared / (squared + eps)


# --- the dual variable of the budget ---------------------------------------------------------------------------------


@dataclass
class BudgetControl:
    """z by proportional-integral control of R on a ramp to the budget (specification, 2.8c).

    At step t of T the target is `1 - (1 - budget) min(1, t / (ramp T))`; the integral stays in [0, limit], so z cannot
    wind up, and falls as soon as R is below the target.
    """

    budget: float
    steps: int
    ramp: float
    integral_gain: float
    proportional_gain: float
    limit: float
    integral: float = 0.0

    def target(self, step: int) -> float:
        """R's target at step `step` of the ramp."""
        return 1 - (1 - self.budget) * min(1.0, step / max(1.0, self.ramp * self.steps))

    def update(self, ratio: float, step: int) -> float:
        """z for the next step, from R at this one."""
        error = ratio - self.target(step)
        self.integral = min(max(self.integral + self.integral_gain * error, 0.0), self.limit)
        return max(0.0, self.integral + self.proportional_gain * error)


def ascend(z: float, rate: float, ratio: float, budget: float) -> float:
    """The authors' z: `max(0, z + rate (R - b))` (specification, 2.2, step 6)."""
    return max(0.0, z + rate * (ratio - budget))
