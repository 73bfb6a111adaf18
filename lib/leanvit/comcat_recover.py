"""Recovering what a truncation lost: closed-form re-fit first, then distillation from the uncompressed model.

`refit` goes through the blocks and solves every second factor and bias again by ridge regression, so that a layer
fed by the *compressed* model gives the output that the *original* layer gave (ComCAT's specification, 6.5).
"""

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor, nn

from leanvit import surgery
from leanvit.comcat_calibrate import check_ridge, images_of
from leanvit.comcat_modules import FactoredAttention, FactoredLinear
from leanvit.comcat_plan import plan_of
from leanvit.distill import Distill, aligned_blocks
from leanvit.evaluate import device_of, modes_restored
from leanvit.surgery import Report


def authors_loss(teacher: nn.Module, alignment: float = 0.5) -> Distill:
    """The released code's loss for a factored model, with the uncompressed one as the teacher (2.3).

    Half of it on the teacher's classes, the first two and the last two blocks aligned by `alignment`: lambda, to be
    set for each epoch (`loss.alignment = alignment_weights(epochs)[t]`).
    """
    blocks = aligned_blocks(len(getattr(teacher, "blocks", [])))
    return Distill(teacher, 0.5, hard=True, blocks=blocks, alignment=alignment)


class Regression:
    """Sums for `min |x W + b - y|^2 + ridge`, in float64: rows `x (n, k)` and targets `y (n, out)`."""

    def __init__(self):
        self.n, self.x, self.y, self.xx, self.xy = 0, 0.0, 0.0, 0.0, 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take rows `x (n, k)` and their targets `y (n, out)` in."""
        x, y = x.double(), y.double()
        self.n += x.shape[0]
        self.x, self.y = self.x + x.sum(0), self.y + y.sum(0)
        self.xx, self.xy = self.xx + x.T @ x, self.xy + x.T @ y

    def solve(self, ridge: float, towards: Tensor, biased: bool) -> tuple[Tensor, Tensor | None]:
        """`W (k, out)` and `b (out,)`; the ridge, in parts of the mean variance of x, pulls W to `towards (k, out)`.

        The normal equations of specification 6.5; without `biased`, b is None and the rows are not centred.
        """
        mean_x, mean_y = self.x / self.n, self.y / self.n
        xx, xy = self.xx / self.n, self.xy / self.n
        if biased:
            xx, xy = xx - mean_x[:, None] * mean_x, xy - mean_x[:, None] * mean_y
        strength = ridge * xx.diagonal().mean()
        eye = torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
        weight = torch.linalg.solve(xx + strength * eye, xy + strength * towards.double())
        return weight, mean_y - mean_x @ weight if biased else None


def second_layers(model: nn.Module) -> dict[str, tuple[str, nn.Linear]]:
    """The layers that `refit` solves: `{module: (second linear layer, itself)}`, in the order of the forward pass."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, FactoredAttention) and isinstance(module.norm, nn.Identity):
            found[name] = (f"{name}.proj", module.proj)
        elif isinstance(module, FactoredLinear):
            found[name] = (f"{name}.second", module.second)
    return found


@torch.no_grad()
def refit(model: nn.Module, original: nn.Module, batches: Iterable, *, ridge: float = 1e-3) -> Report:
    """Solve the second factor and the bias of every factored module of `model` again, in place, block by block.

    The module at hand is fed by the compressed model as solved so far; the target is what the original module gives
    in the original model, so that errors of earlier blocks are mended, too. Modules without a bias keep none.

    Args:
        original: the dense model that `model` was cut from.
        batches: images or (images, labels), gone through once for each block (a list, or a set that can be read again).
        ridge: pull towards the present factors, in parts of the mean variance of the inputs.

    Raises `ValueError` where nothing is factored or an adapter is attached, for no images, a negative ridge, or when
    the two models differ (also in their number of blocks); `model` is then as it was.
    """
    plan_of(model, "refit")
    surgery.refuse_adapted(model, "refit")
    check_ridge("refit", ridge)
    layers = second_layers(model)
    batches = [images_of(b) for b in batches]
    if not batches or sum(len(b) for b in batches) == 0:
        raise ValueError("refit: there are no images; give batches of one or two thousand, unlabelled")
    missing = next((n for n in layers if n not in dict(original.named_modules())), None)
    if missing:
        raise ValueError(f"refit: the original model has no {missing}; give the dense model that this one was cut from")
    depth, here = len(getattr(original, "blocks", [])), len(model.blocks)
    if depth != here:
        raise ValueError(
            f"refit: the original model has {depth} blocks, this one {here}, so that their numbers name others; refit "
            "against the pruned, unfactored model"
        )
    before = {n: [p.clone() for p in layer.parameters()] for n, (_, layer) in layers.items()}
    report = Report("ComCAT re-fit", [second for second, _ in layers.values()], {}, *surgery.count(model))
    try:
        with modes_restored(model), modes_restored(original):
            model.eval(), original.eval()
            for place, names in _places(layers).items():
                runs = _runs(model, place, batches), _runs(original, place, batches)
                for name in names:  # one by one: the input of each depends on those before
                    _solve(name, layers[name][1], original.get_submodule(name), *runs, ridge)
    except Exception:
        for name, (_, layer) in layers.items():
            for parameter, value in zip(layer.parameters(), before[name], strict=True):
                parameter.copy_(value)
        raise
    report.notes.append(f"second factors solved on {sum(len(b) for b in batches)} images, ridge {ridge:g}")
    return report


def _places(layers: Iterable[str]) -> dict[str, list[str]]:
    """The layers by the block they stand in ("blocks.3"); what stands in none by itself."""
    places: dict[str, list[str]] = {}
    for name in layers:
        parts = name.split(".")
        places.setdefault(".".join(parts[:2]) if parts[0] == "blocks" else name, []).append(name)
    return places


class _Reached(Exception):
    """The forward pass came to the module that was asked for."""


def _runs(model: nn.Module, name: str, batches: list[Tensor]) -> list[Callable[[], Tensor]]:
    """Calls of the module `name`, with what it is given for each batch: the model runs up to it, once."""
    module, device, calls = model.get_submodule(name), device_of(model), []

    def stop(m, args, kwargs):
        calls.append(partial(m, *args, **kwargs))
        raise _Reached

    hook = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for images in batches:
            with suppress(_Reached):
                model(images.to(device))
    finally:
        hook.remove()
    return calls


def _solve(name: str, layer: nn.Linear, target: nn.Module, own: list, theirs: list, ridge: float) -> None:
    sums, seen = Regression(), {}
    hooks = [
        layer.register_forward_pre_hook(lambda m, x: seen.__setitem__("x", x[0])),
        target.register_forward_hook(lambda m, x, y: seen.__setitem__("y", y)),
    ]
    try:
        for run, original in zip(own, theirs, strict=True):
            run(), original()
            x, y = seen["x"].flatten(0, -2), seen["y"].flatten(0, -2)
            if x.shape[0] != y.shape[0] or y.shape[1] != layer.out_features:
                raise ValueError(f"refit: {name} gives {tuple(y.shape)} in the original model; it is another one")
            sums.add(x, y)
    finally:
        for hook in hooks:
            hook.remove()
    try:
        weight, bias = sums.solve(ridge, layer.weight.T, layer.bias is not None)
    except torch.linalg.LinAlgError:
        raise ValueError(
            f"refit: {name} cannot be solved from {sums.n} rows of dependent inputs; raise ridge={ridge:g}, or give "
            "more images"
        ) from None
    if not torch.isfinite(weight).all():
        raise ValueError(f"refit: {name} cannot be solved (NaN among the activations?); raise ridge={ridge:g}")
    layer.weight.copy_(weight.T)
    if bias is not None:
        layer.bias.copy_(bias)
