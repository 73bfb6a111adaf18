"""Data-aware factors in closed form: second moments of what each layer sees, from 1,000 to 2,000 unlabelled images.

A truncated SVD of W is best for white inputs; a network's are far from white. With C the covariance of the inputs, the
truncated SVD of `C^(1/2) W` brought back by `C^(-1/2)` minimises E|x (W - W_r)|^2, and that error is the sum of the
dropped squared singular values (ComCAT's specification, 6.2). Each part has covariances of its own:

* linear layer: centred inputs; the mean error goes into the bias, which makes the best affine map;
* W_QK: on the queries' side uncentred, with a constant 1 for the absorbed bias; on the keys' side centred within each
  image, since softmax does not see what is added to all keys of a query alike;
* W_VO: for each head, what its attention mixes (A_i X), centred; the mean error goes into the output bias.

DRONE (NeurIPS 2021), SVD-LLM (arXiv 2403.07378) and A^3 (arXiv 2505.12942) whiten so; centred keys and bias are ours.
"""

import math
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from leanvit.comcat_cut import product
from leanvit.comcat_factors import Spectrum, roots
from leanvit.comcat_modules import read_heads
from leanvit.comcat_plan import ROTARY, Part, Plan, make_plan, model_name, parts
from leanvit.evaluate import device_of, modes_restored

RIDGE = 1e-4  # of trace / d


class Moments:
    """Running sums of rows `(..., rows, d)` in float64: how many, their sum, and their second moment."""

    def __init__(self):
        self.count, self.total, self.square = 0, 0.0, 0.0

    def add(self, rows: Tensor) -> None:
        """Take rows `(..., rows, d)` in; the leading sizes (heads) are the same each time."""
        rows = rows.double()
        self.count += rows.shape[-2]
        self.total = self.total + rows.sum(-2)
        self.square = self.square + rows.mT @ rows

    @property
    def mean(self) -> Tensor:
        """`(..., d)`: of all rows so far."""
        return self.total / self.count

    def covariance(self, centred: bool) -> Tensor:
        """`(..., d, d)` about the mean, or about zero."""
        second = self.square / self.count
        return second - self.mean[..., :, None] * self.mean[..., None, :] if centred else second


@dataclass
class Statistics:
    """What `calibrate` measured on `images`, by part; `notes` go into the report of `apply`."""

    model: str
    shapes: dict[str, list[int]]
    images: int = 0
    ridge: float = RIDGE
    moments: dict[str, Moments] = field(default_factory=dict, repr=False)
    keys: dict[str, Moments] = field(default_factory=dict, repr=False)
    kinds: dict[str, str] = field(default_factory=dict, repr=False)
    notes: list[str] = field(default_factory=list)

    def check(self, plan: Plan) -> None:
        """Raise `ValueError` when these statistics are of another model than the plan."""
        other = [n for n in (*plan.shapes, *self.shapes) if plan.shapes.get(n) != self.shapes.get(n)]
        if other:
            raise ValueError(
                f"ComCAT: the statistics are of {self.model}, the plan is for {plan.model}; they differ in {other[0]}, "
                "calibrate the model itself"
            )

    def weighting(
        self, name: str, rows: int | None = None
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
        """`(C^(1/2), C^(-1/2))` of the inputs' side of a part, and of its keys' side for W_QK (else None).

        `rows`: only so many inputs, for queries without the row of their bias.
        """
        kind = self.kinds[name]
        left = roots(self.moments[name].covariance(centred=kind != "qk")[..., :rows, :rows], self.ridge)
        return left, roots(self.keys[name].covariance(centred=False), self.ridge) if kind == "qk" else None

    def shift(self, name: str, a: Tensor, b: Tensor | None, new_a: Tensor, new_b: Tensor) -> Tensor:
        """`(out,)`: the mean output that is lost when the products `a b ([H,] in, out)` give way to `new_a new_b`."""
        mean = self.moments[name].mean[..., None, :]

        def output(left: Tensor, right: Tensor | None) -> Tensor:
            y = mean @ left.double()
            return (y if right is None else y @ right.double()).flatten(0, -2).sum(0)

        return (output(a, b) - output(new_a, new_b)).to(a.dtype)


def spectra(model: nn.Module, statistics: Statistics | None = None) -> dict[str, Spectrum]:
    """The SVD of every part of a dense model, weighted by `statistics` where given (see `Spectrum.energy`).

    Raises `ValueError` that names the part whose weights are not finite, and for statistics of another model.
    """
    if statistics is not None:
        statistics.check(make_plan(model, {}))
    return {part.name: spectrum(part.name, *product(model, part), statistics) for part in parts(model)[0]}


def spectrum(name: str, a: Tensor, b: Tensor | None, statistics: Statistics | None) -> Spectrum:
    """The SVD of the part `name`, whose product is `a b`, `a ([H,] in, k)`, `b ([H,] k, out)`; b is None for a layer.

    Raises `ValueError` that names the part whose weights are not finite.
    """
    weighting = (None, None) if statistics is None else statistics.weighting(name)
    try:
        return Spectrum(a, b, *weighting)
    except ValueError as error:
        raise ValueError(f"ComCAT: {name} has no singular values: {error}") from None


def check_ridge(method: str, ridge: float) -> None:
    """Raise `ValueError` for a ridge that is no finite number of at least 0."""
    if isinstance(ridge, bool) or not isinstance(ridge, (int, float)) or not 0 <= ridge < math.inf:
        raise ValueError(f"{method}: ridge={ridge!r} must be a finite number of at least 0")


def images_of(batch) -> Tensor:
    """The images `(B, 3, H, W)` of a batch that is images alone or (images, labels)."""
    return batch if isinstance(batch, Tensor) else batch[0]


@contextmanager
def watching(model: nn.Module, see: dict[str, object]):
    """Call `see[name](module, input)` whenever the module of that name is called, and never afterwards."""
    hooks = []
    for name, function in see.items():
        module = model.get_submodule(name)
        hooks.append(module.register_forward_pre_hook(lambda m, inputs, f=function: f(m, inputs[0])))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable, *, ridge: float = RIDGE) -> Statistics:
    """Run `batches` through a dense model, in eval mode, and keep the second moments that its parts need.

    Args:
        batches: images `(B, 3, H, W)` or (images, labels) pairs; labels are not looked at.
        ridge: added to each covariance, times its mean eigenvalue; 0 takes pseudo-inverses instead.

    The model and its modes are as before. Fewer images than the width are regularised by the ridge, and `notes` says
    so. Raises `ValueError` for no images, NaN among the activations, a negative ridge, or a model that cannot be
    factored.
    """
    check_ridge("calibrate", ridge)
    found, _ = parts(model)
    shapes = {p.name: [p.heads, p.inputs, p.outputs, p.full] for p in found}
    result = Statistics(model_name(model), shapes, ridge=ridge, kinds={p.name: p.kind for p in found})
    see = {}
    for part in found:
        see.setdefault(part.module, []).append(part)
    functions = {name: _watch(result, mine) for name, mine in see.items()}
    device = device_of(model)
    with modes_restored(model), watching(model, functions):
        model.eval()
        for batch in batches:
            images = images_of(batch).to(device)
            model(images)
            result.images += images.shape[0]
    if result.images == 0:
        raise ValueError("calibrate: there are no images; give batches of one or two thousand, unlabelled")
    bad = next((n for n, m in result.moments.items() if not torch.isfinite(m.square).all()), None)
    if bad:
        raise ValueError(f"calibrate: {bad} saw NaN or infinity; mend the weights or the images")
    width = max(p.inputs for p in found if p.kind != "fc") if any(p.kind != "fc" for p in found) else 0
    if result.images < width:
        how = f"a ridge of {ridge:g} regularises them" if ridge else "pseudo-inverses leave unseen directions out"
        result.notes.append(f"{result.images} images are fewer than the width {width}: {how}, more would be better")
    return result


def _watch(result: Statistics, mine: list[Part]):
    def linear(module: nn.Module, x: Tensor) -> None:
        result.moments.setdefault(mine[0].name, Moments()).add(x.flatten(0, -2) if x.dim() > 2 else x)

    def attention(module: nn.Module, x: Tensor) -> None:
        kinds = {p.kind: p.name for p in mine}
        if "qk" in kinds:
            flat = x.flatten(0, 1)
            result.moments.setdefault(kinds["qk"], Moments()).add(torch.cat([flat, torch.ones_like(flat[:, :1])], 1))
            result.keys.setdefault(kinds["qk"], Moments()).add((x - x.mean(1, keepdim=True)).flatten(0, 1))
        if "vo" in kinds:
            # rotary positions come from the model and are not seen here: then the tokens themselves, for every head
            rotary = isinstance(module, ROTARY) and "qk" not in kinds
            mixed = x[:, None].expand(-1, module.num_heads, -1, -1) if rotary else mix(module, x)
            result.moments.setdefault(kinds["vo"], Moments()).add(mixed.transpose(0, 1).flatten(1, 2))

    return linear if mine[0].kind == "fc" else attention


def mix(module: nn.Module, x: Tensor) -> Tensor:
    """`A_i X (B, H, N, d)`: what each head's attention makes of the tokens `x (B, N, d)` (specification 6.2)."""
    h = read_heads(module)
    q = torch.einsum("bnd,hdk->bhnk", x, h.q) + h.bq[:, None]
    k = torch.einsum("bnd,hdk->bhnk", x, h.k) + h.bk[:, None]
    q, k = module.q_norm(q), module.k_norm(k)
    return (q @ k.mT * module.scale).softmax(-1) @ x[:, None]
