"""LBP-WHT: low-rank back-propagation through linear layers, in Walsh-Hadamard bases of the token grid.

Yang, Chiang, Li, Marculescu, Marculescu: "Efficient Low-rank Backpropagation for Vision Transformer Adaptation",
NeurIPS 2023, arXiv 2309.15275. Written from the paper's mathematics; covers the method, its bases (LP_L1, LP_Linf, LHE,
and the DC-only gradient filter), its cost model and the partial and full training scopes.

A linear layer `y = x W^T + b` keeps its forward pass. With `T` the orthonormal projection of the token grid on `R`
bases of each 8x8 block (`kernels/walsh.py`), it saves `T x` instead of `x`, and its backward pass is

    g_x = T^T ((T g_y) W)        g_W = (T g_y)^T (T x)        g_b = sum of g_y, exact

Class and register tokens ride along as rows of their own, so their part of all gradients is exact.

Known divergences from the authors' released code, each with a way back where it changes a result:
* grids that are not multiples of the order are padded with zeros, which is exact at full rank; `pad="reflect"` is the
  released behaviour, where a mirrored border token counts twice or four times in the weight gradient;
* SwinV2's fused qkv is really treated (the released wrapper is bypassed by the attention block);
* nothing is projected, saved or computed that no gradient needs, so frozen stages cost nothing;
* the narrow talking-head layers of EfficientFormerV2 stay exact unless `match` asks for them;
* a layer runs exact where the low-rank form would be slower (`exact_when="never"` turns that off).
"""

import functools
import json
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from leanvit import surgery
from leanvit.kernels import products, walsh
from leanvit.sites import Site, find_sites, join_qkv_bias, last_stage, separate_qkv_bias
from leanvit.surgery import Match, Report

Basis = tuple[int, int]  # vertical and horizontal sequency


# --- bases -----------------------------------------------------------------------------------------------------------


def low_pass_l1(k: int, order: int = 8) -> list[Basis]:
    """LP_L1-k: `r + c <= k - 1`, row-major. `R = k(k+1)/2` for `k <= order` (specification 2.1).

    >>> from leanvit import lbp_wht
    >>> lbp_wht.low_pass_l1(2)
    [(0, 0), (0, 1), (1, 0)]
    """
    return [(r, c) for r in range(order) for c in range(order) if r + c < k]


def low_pass_linf(k: int, order: int = 8) -> list[Basis]:
    """LP_Linf-k: `max(r, c) <= k - 1`, row-major; `R = k^2` (specification 2.2)."""
    return [(r, c) for r in range(min(k, order)) for c in range(min(k, order))]


def low_error(energy: Tensor, rank: int) -> list[Basis]:
    """LHE: the `rank` bases with most gradient energy `(n, n)`, strongest first (specification 2.3).

    Raises `ValueError` for a rank that a block of this order does not have, or an energy that is not finite.
    """
    order = energy.shape[0]
    if not 1 <= rank <= order**2:
        raise ValueError(f"LHE-{rank}: an order-{order} block has 1 to {order**2} bases")
    if not torch.isfinite(energy).all():
        raise ValueError(f"LHE-{rank}: the gradient energy is not finite: {energy.sum().item()}")
    best = energy.flatten().argsort(descending=True, stable=True)[:rank].tolist()
    return [divmod(i, order) for i in best]


def parse_bases(bases: str | Iterable[Basis], order: int = 8, energy: Tensor | None = None) -> list[Basis]:
    """Bases by name (`"LP_L1-4"`, `"LP_Linf-3"`, `"DC"`, `"LHE-10"`) or an explicit list of `(r, c)`.

    LHE needs the layer's gradient `energy (order, order)` (specification, section 2).

    >>> from leanvit import lbp_wht
    >>> lbp_wht.parse_bases("LP_Linf-2")
    [(0, 0), (0, 1), (1, 0), (1, 1)]

    Raises:
        ValueError: unknown name or order, a size that no block of this order has, no energy or one of another order,
            malformed, repeated or no pairs (a `TypeError` of theirs becomes one).
    """
    _check_order(order)
    if isinstance(bases, str):
        family, _, size = bases.partition("-")
        if bases == "DC":
            return [(0, 0)]
        largest = {"LP_L1": 2 * order - 1, "LP_Linf": order, "LHE": order**2}.get(family)
        if largest is None:
            hint = get_close_matches(family, ["LP_L1", "LP_Linf", "LHE", "DC"], n=1, cutoff=0.3)
            raise ValueError(
                f"bases {bases!r}: unknown family {family!r}{f', did you mean {hint[0]!r}?' if hint else ''} "
                "(LP_L1-k, LP_Linf-k, LHE-R, DC, or a list of (r, c))"
            )
        if not (size.isascii() and size.isdecimal()) or not 1 <= int(size) <= largest:
            raise ValueError(f"bases {bases!r}: {family} of order {order} takes a size from 1 to {largest}")
        if family == "LHE":
            if energy is None:
                raise ValueError(f"bases {bases!r} need energy=gradient_energy(model, loss), measured on a batch")
            if tuple(energy.shape) != (order, order):
                raise ValueError(f"bases {bases!r}: energy of shape {tuple(energy.shape)} is not of order {order}")
            return low_error(energy, int(size))
        return (low_pass_l1 if family == "LP_L1" else low_pass_linf)(int(size), order)
    try:
        pairs = [(operator.index(r), operator.index(c)) for r, c in bases]
        if any(isinstance(sequency, bool) for pair in bases for sequency in pair):
            raise TypeError("a bool is no sequency")
    except (TypeError, ValueError) as error:
        raise ValueError(f"bases must be a name or a list of (r, c) pairs of whole numbers, got {bases!r}") from error
    wrong = [p for p in pairs if not (0 <= p[0] < order and 0 <= p[1] < order)]
    if not pairs or wrong or len(set(pairs)) != len(pairs):
        what = f"{wrong[0]} is outside 0..{order - 1}" if wrong else "no pair" if not pairs else "a pair is repeated"
        raise ValueError(f"bases {pairs}: {what} (at most {order**2} distinct pairs for order {order})")
    return pairs


# --- the layer -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """How one layer back-propagates. `None` bases mean that this gradient is exact."""

    name: str
    layout: str
    grid: tuple[int, int] | None
    prefix: int
    bases: tuple[Basis, ...] | None
    weight_bases: tuple[Basis, ...] | None
    order: int = 8
    reflect: bool = False


def _flat(bases: tuple[Basis, ...]) -> list[int]:
    return [sequency for pair in bases for sequency in pair]


def _project(x: Tensor, bases: tuple[Basis, ...] | None, s: Setting, grid: tuple[int, int]) -> Tensor:
    return x if bases is None else walsh.project(x, *grid, s.prefix, _flat(bases), s.order, s.reflect)


def _bias_gradient(
    g: Tensor, g_hat: Tensor | None, bases: tuple[Basis, ...] | None, s: Setting, grid: tuple[int, int]
) -> Tensor:
    """Sum of `g` over images and tokens. With zero padding the DC coefficients already hold it: one read less."""
    exact_enough = g.dtype in (torch.float32, torch.float64)
    if g_hat is None or bases is None or (0, 0) not in bases or s.reflect or not exact_enough:
        return g.sum(dim=(0, 1))
    blocks = g_hat[:, s.prefix + bases.index((0, 0)) :: len(bases)].sum(dim=(0, 1))
    return torch.add(g_hat[:, : s.prefix].sum(dim=(0, 1)), blocks, alpha=s.order)


def _save(ctx, x: Tensor, weight: Tensor, y_dtype: torch.dtype, setting: Setting, grid: tuple[int, int]) -> None:
    """Keep what the backward pass needs of tokens `x: (B, N, C)`, and nothing else."""
    need_x, need_w = ctx.needs_input_grad[:2]
    # under autocast the product ran in y's dtype: project that copy, as the stock layer would save it
    x_hat = _project(x.to(y_dtype), setting.weight_bases, setting, grid) if need_w else None
    ctx.save_for_backward(x_hat, weight if need_x else None)
    ctx.setting, ctx.grid, ctx.dtypes = setting, grid, (x.dtype, weight.dtype)


def _gradients(ctx, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`(g_x, g_W, g_b)` for the output gradient `g: (B, N, Co)`; `None` where no one asked."""
    s, grid = ctx.setting, ctx.grid
    x_hat, weight = ctx.saved_tensors
    need_x, need_w, need_b = ctx.needs_input_grad[:3]
    g_x = g_w = g_b = g_hat = None
    if need_x:
        g_hat = _project(g, s.bases, s, grid)
        g_x = products.through(g_hat.flatten(0, 1), weight.to(g.dtype)).unflatten(0, g_hat.shape[:2])
        if s.bases is not None:
            g_x = walsh.expand(g_x, *grid, s.prefix, _flat(s.bases), s.order)
        g_x = g_x.to(ctx.dtypes[0])
    if need_w:
        if g_hat is None or s.bases != s.weight_bases:
            g_hat = _project(g, s.weight_bases, s, grid)
        g_w = products.outer(g_hat.flatten(0, 1), x_hat.flatten(0, 1)).to(ctx.dtypes[1])
    if need_b:
        g_b = _bias_gradient(g, g_hat, s.weight_bases if need_w else s.bases, s, grid).to(ctx.dtypes[1])
    return g_x, g_w, g_b


class _LowRankLinear(torch.autograd.Function):
    """Linear layer on tokens `(B, N, Ci)`: the exact forward, the low-rank backward."""

    @staticmethod
    def forward(ctx, x, weight, bias, setting, grid):
        y = F.linear(x, weight, bias)
        _save(ctx, x, weight, y.dtype, setting, grid)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return *_gradients(ctx, g), None, None


class _LowRankConv(torch.autograd.Function):
    """1x1 convolution on `(B, Ci, H, W)`: its own forward, bit for bit, and the same backward on its tokens."""

    @staticmethod
    def forward(ctx, x, weight, bias, setting):
        y = F.conv2d(x, weight, bias)
        _save(ctx, x.flatten(2).transpose(1, 2), weight.flatten(1), y.dtype, setting, tuple(x.shape[2:]))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        g_x, g_w, g_b = _gradients(ctx, g.flatten(2).transpose(1, 2))
        if g_x is not None:
            g_x = g_x.transpose(1, 2).unflatten(2, ctx.grid)
        return g_x, None if g_w is None else g_w[:, :, None, None], g_b, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, setting: Setting, grid: tuple[int, int]) -> Tensor:
    """`F.linear(x, weight, bias)` for `x: (B, prefix + h*w, Ci)` with low-rank gradients; differentiable once.

    `weight: (Co, Ci)`, `bias: (Co,)`; gives `(B, prefix + h*w, Co)` (specification 1.4 and 1.5).
    """
    if not torch.is_grad_enabled() or not (x.requires_grad or weight.requires_grad):
        return F.linear(x, weight, bias)  # at most the bias learns, which is exact and saves nothing
    return _LowRankLinear.apply(x, weight, bias, setting, grid)


def conv1x1(x: Tensor, weight: Tensor, bias: Tensor | None, setting: Setting) -> Tensor:
    """`F.conv2d(x, weight, bias)` for `x: (B, Ci, H, W)`, `weight: (Co, Ci, 1, 1)`, with low-rank gradients.

    Gives `(B, Co, H, W)` (specification 1.6).
    """
    if not torch.is_grad_enabled() or not (x.requires_grad or weight.requires_grad):
        return F.conv2d(x, weight, bias)
    return _LowRankConv.apply(x, weight, bias, setting)


def _grid(x: Tensor, setting: Setting) -> tuple[int, int]:
    """The token grid of a layer's input; raises where the two do not belong together."""
    if not x.is_floating_point():
        raise TypeError(f"{setting.name}: LBP-WHT needs a floating-point input, got {x.dtype}")
    dims = 3 if setting.layout == "tokens" else 4
    if x.dim() != dims:
        raise ValueError(
            f"{setting.name}: attached for {setting.layout} input ({dims} dimensions), got {tuple(x.shape)}"
        )
    if setting.layout == "chw":
        return x.shape[2], x.shape[3]
    if setting.layout == "hwc":
        return x.shape[1], x.shape[2]
    h, w = setting.grid
    if x.shape[1] != setting.prefix + h * w:
        raise ValueError(
            f"{setting.name}: got {x.shape[1]} tokens, but a {h}x{w} grid with {setting.prefix} prefix token(s) has "
            f"{setting.prefix + h * w}; attach again with example=<a batch of this size> or grid=(h, w)"
        )
    return setting.grid


class LBPLinear(nn.Linear):
    """`nn.Linear` with low-rank gradients in training mode; the same parameters under the same names."""

    stock = nn.Linear
    setting: Setting

    def forward(self, x: Tensor) -> Tensor:
        """`(B, prefix + h*w, Ci) -> (B, prefix + h*w, Co)`, or `(B, H, W, Ci) -> (B, H, W, Co)`.

        In training mode `ValueError` for another layout or number of tokens than attached for, `TypeError` for an
        input that is not floating-point.
        """
        if not self.training:
            return super().forward(x)
        grid = _grid(x, self.setting)
        if self.setting.layout == "tokens":
            return linear(x, self.weight, self.bias, self.setting, grid)
        return linear(x.flatten(1, 2), self.weight, self.bias, self.setting, grid).unflatten(1, grid)


class LBPConv2d(nn.Conv2d):
    """1x1 `nn.Conv2d` with low-rank gradients in training mode; the same parameters under the same names."""

    stock = nn.Conv2d
    setting: Setting

    def forward(self, x: Tensor) -> Tensor:
        """`(B, Ci, H, W) -> (B, Co, H, W)`; in training mode `ValueError` or `TypeError` as `LBPLinear.forward`."""
        if not self.training:
            return super().forward(x)
        _grid(x, self.setting)
        return conv1x1(x, self.weight, self.bias, self.setting)


class _LowPrecisionGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, approximate, dtype):
        ctx.save_for_backward(x.to(dtype))
        ctx.approximate = approximate
        return F.gelu(x, approximate=approximate)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.ops.aten.gelu_backward(g, x.to(g.dtype), approximate=ctx.approximate), None, None


class LowPrecisionGELU(nn.GELU):
    """`nn.GELU` with the same output that saves its input at `dtype` (bfloat16) for the backward pass."""

    stock = nn.GELU
    dtype: torch.dtype

    def forward(self, x: Tensor) -> Tensor:
        """GELU of `x (...)` of any shape, `(...)`, differentiable once."""
        if (
            not (self.training and x.requires_grad and torch.is_grad_enabled())
            or x.element_size() <= self.dtype.itemsize
        ):
            return super().forward(x)
        return _LowPrecisionGELU.apply(x, self.approximate, self.dtype)


# --- calibration -----------------------------------------------------------------------------------------------------


def gradient_energy(
    model: nn.Module,
    loss: Callable[[], Tensor],
    *,
    order: int = 8,
    pad: str = "zero",
    match: Match | None = None,
    example: Tensor | None = None,
) -> dict[str, Tensor]:
    """Energy of each Walsh coefficient of each layer's output gradient: `{layer: (order, order) float64}`.

    Runs `loss()` (a closure that computes the loss of a calibration batch on `model`) once, forward and backward, with
    exact gradients; the parameters' `.grad` are left as they were. `E[r, c]` sums the squares over images, blocks and
    channels; by Parseval the energy of the dropped bases is the squared error of the projected gradient
    (specification 2.3). `match` and `example (B, 3, H, W)` as in `find_sites`, which raises `ValueError` for a model or
    an example that it cannot use.
    """
    _check(order, pad)
    sites, _ = find_sites(model, match, example)
    everything = _flat(tuple(low_pass_linf(order, order)))
    energy = {site.name: torch.zeros(order, order, dtype=torch.float64) for site in sites}

    def watch(site: Site):
        def measure(g: Tensor) -> None:
            z = walsh.project(site.as_tokens(g).detach(), *site.grid, site.prefix, everything, order, pad == "reflect")
            z = z[:, site.prefix :].double().square().sum(dim=(0, 2))
            energy[site.name] += z.reshape(-1, order, order).sum(0).cpu()

        def hook(module, inputs, output):
            if output.requires_grad:
                # a hook on the tensor: module backward hooks forbid the in-place `qkv += bias` that SwinV2 does
                output.register_hook(measure)

        return hook

    hooks = [model.get_submodule(site.name).register_forward_hook(watch(site)) for site in sites]
    modes = [(m, m.training) for m in model.modules() if isinstance(m, (LBPLinear, LBPConv2d))]
    separate_qkv_bias(model, match)
    try:
        for module, _ in modes:
            module.training = False  # exact gradients
        with surgery.undisturbed(model):
            loss().backward()
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
        join_qkv_bias(model)
    return energy


def _check_order(order: int) -> None:
    if order not in walsh.ORDERS:
        raise ValueError(f"order {order} is not one of {walsh.ORDERS}")


def _check(order: int, pad: str) -> None:
    _check_order(order)
    if pad not in ("zero", "reflect"):
        raise ValueError(f"pad {pad!r} is neither 'zero' nor 'reflect'")


# --- attach and detach -----------------------------------------------------------------------------------------------


@functools.cache
def _slower_table() -> list[dict]:
    """Rows measured by `7_speed.ipynb`: above `max_rows_ratio` LBP-WHT was slower than the exact layer."""
    return json.loads(resources.files("leanvit").joinpath("assets/lbp_exact_is_faster.json").read_text())["rows"]


def _exact_reason(site: Site, rank: int, order: int, device: str) -> str | None:
    """Why this layer had better run exact, or None."""
    rows = site.rows(rank, order)
    if rows >= site.tokens:
        return f"exact: {rank} bases make {rows} rows of {site.tokens} tokens, so nothing is saved"
    width = min(site.in_features, site.out_features)
    fitting = [row for row in _slower_table() if row["device"] == device and width >= row["min_width"]]
    limit = max((row["max_rows_ratio"] for row in fitting), default=1.0)
    if rows / site.tokens > limit:
        return f"exact: measured slower at {rows}/{site.tokens} rows and width {width} on {device}"
    return None


ATTACHED = "lbp_wht_attached"  # attribute of a model between attach and detach, also when every layer stays exact


def _train_scope(model: nn.Module, scope: str | None) -> None:
    if scope is None:
        return
    if scope not in ("full", "last"):
        raise ValueError(f"scope {scope!r} is not one of 'full', 'last' (the last stage and the head) or None")
    adapter = surgery.adapter(model)
    if adapter is not None:
        raise ValueError(
            f"scope {scope!r} would unfreeze the weights under {adapter[0]}; use scope=None beside adapters, which "
            "leaves what is trained alone"
        )
    stage = last_stage(model) if scope == "last" else ("",)
    head = surgery.head_parameters(model)
    surgery.freeze(model, keep=lambda name: name.startswith(stage) or name in head)


def attach(
    model: nn.Module,
    bases: str | Iterable[Basis] = "LP_L1-4",
    *,
    weight_bases: str | Iterable[Basis] | None = None,
    pad: str = "zero",
    order: int = 8,
    scope: str | None = None,
    match: Match | None = None,
    energy: Mapping[str, Tensor] | None = None,
    shared: bool = False,
    exact_when: str = "slower",
    gelu_input: torch.dtype | None = None,
    example: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    prefix_tokens: int | None = None,
) -> Report:
    """Let the linear layers of a timm ViT back-propagate in a few Walsh-Hadamard bases. In place; same forward.

    >>> import timm
    >>> from leanvit import lbp_wht
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=2, depth=2, num_classes=4)
    >>> print(lbp_wht.attach(model, "LP_L1-2"))
    LBP-WHT: 8 layers, 942,916 of 942,916 parameters trained
      skipped head: the classifier stays exact

    Args:
        model: any timm model whose linear layers see `(B, N, C)`, `(B, H, W, C)` or `(B, C, H, W)` (1x1 convolutions).
        bases: of the input gradient, and of the weight gradient unless `weight_bases` says otherwise: `"LP_L1-k"`,
            `"LP_Linf-k"`, `"LHE-R"` (needs `energy`), `"DC"` (the gradient filter), `"exact"`, or pairs `(r, c)`.
        pad: "zero" (exact at full rank) or "reflect" (the released code, with its biased weight gradient).
        order: 2, 4, 8 or 16, the side of a block.
        scope: "full" trains everything, "last" the last stage and the head, `None` leaves `requires_grad` alone (the
            one to use beside LoRA). With "last" only the layers of that stage are treated.
        match: `match(name, module) -> bool` chooses the layers; without it all but heads and very narrow ones.
        energy: what `gradient_energy` returned, `{layer: (order, order)}`.
        shared: LHE keeps one set for all layers instead of one for each.
        exact_when: "slower" leaves a layer exact where nothing is saved or a measured table says so; "never" does not.
        gelu_input: `torch.bfloat16` saves the input of GELUs beside treated layers at that precision.
        example, grid, prefix_tokens: as in `find_sites`; `example` is `(B, 3, H, W)`.

    Returns:
        A `Report` of the layers matched, those that stay exact and why, and the parameter counts.

    Raises:
        ValueError: nothing matched, or an argument that does not fit; the model is then as it was.
    """
    _check(order, pad)
    if exact_when not in ("slower", "never"):
        raise ValueError(f"exact_when {exact_when!r} is neither 'slower' nor 'never'")
    if gelu_input is not None and not (isinstance(gelu_input, torch.dtype) and gelu_input.is_floating_point):
        raise ValueError(f"gelu_input={gelu_input!r} is no floating-point dtype; torch.bfloat16 is the usual one")
    if energy is not None and not isinstance(energy, Mapping):
        raise ValueError(f"energy must be what gradient_energy returned, got a {type(energy).__name__}")
    if energy and not any(e.isnan().any() or e.sum() > 0 for e in energy.values()):
        # single layers may have none: behind the last attention only the class token reaches the head
        raise ValueError(
            "the gradient energy of every layer is zero; measure it on a batch whose gradient reaches the layers "
            "(not with a head that is still zero, nor with everything behind them frozen)"
        )
    if getattr(model, ATTACHED, False):
        raise ValueError("LBP-WHT is attached already; detach(model) first")
    if scope == "last":
        stage, asked = last_stage(model), match
        chosen = lambda name, module: name.startswith(stage) and (asked is None or asked(name, module))  # noqa: E731
    else:
        chosen = match

    def parsed(spec: str | Iterable[Basis], name: str | None) -> tuple[Basis, ...] | None:
        if spec == "exact":
            return None
        measured = None
        if energy and name is not None:
            if not shared and name not in energy:
                raise ValueError(f"energy has no entry for {name}; measure it with the same match=")
            measured = sum(energy.values()) if shared else energy[name]
        elif name is None and isinstance(spec, str) and spec.startswith("LHE-") and energy:
            measured = torch.ones(order, order)  # each layer's own is looked at below
        try:
            return tuple(parse_bases(spec, order, measured))
        except ValueError as error:
            if name is None:
                raise
            raise ValueError(f"{name}: {error}") from error

    def listed(spec: str | Iterable[Basis]) -> str | list[Basis]:
        """An iterator can be read but once."""
        return spec if isinstance(spec, str) or not isinstance(spec, Iterable) else list(spec)

    input_spec = listed(bases)
    weight_spec = input_spec if weight_bases is None else listed(weight_bases)
    for spec in (input_spec, weight_spec):
        parsed(spec, None)  # malformed bases raise before anything is touched
    sites, skipped = find_sites(model, chosen, example, grid, prefix_tokens, narrow=match is not None)
    settings: list[tuple[Site, Setting]] = []
    device = next(model.parameters()).device.type
    for site in sites:
        own = parsed(input_spec, site.name), parsed(weight_spec, site.name)
        rank = max(len(b) if b is not None else 0 for b in own)
        reason = _exact_reason(site, rank, order, device) if exact_when == "slower" and rank else None
        if reason:
            skipped[site.name] = reason
        else:
            fixed = site.grid if site.layout == "tokens" else None
            setting = Setting(site.name, site.layout, fixed, site.prefix, *own, order, pad == "reflect")
            if pad == "reflect":
                walsh.dense_matrix(*site.grid, [0, 0], order, True)  # grids too small to mirror raise here
            settings.append((site, setting))
    if not settings and not any(reason.startswith("exact:") for reason in skipped.values()):
        first = {reason: name for name, reason in reversed(skipped.items())}
        why = "; ".join(f"{n}: {r}" for r, n in list(first.items())[:4]) or "no linear layer was found"
        raise ValueError(f"LBP-WHT found nothing to treat in {type(model).__name__}: {why}")
    _train_scope(model, scope)
    names = [site.name for site, _ in settings]
    separate_qkv_bias(model, lambda name, module: name in names)
    for site, setting in settings:
        surgery.replace(model, site.name, _wrap(model.get_submodule(site.name), setting))
    notes = []
    if gelu_input is not None:
        parents = {name.rpartition(".")[0] for name in names}
        gelus = [n for n, m in model.named_modules() if type(m) is nn.GELU and n.rpartition(".")[0] in parents]
        for name in gelus:
            surgery.replace(model, name, _low_precision(model.get_submodule(name), gelu_input))
        notes.append(f"{len(gelus)} GELU inputs are saved as {str(gelu_input).removeprefix('torch.')}")
        if not gelus:
            notes[-1] = f"gelu_input={gelu_input} does nothing here: no nn.GELU stands beside a treated layer"
    setattr(model, ATTACHED, True)
    return Report("LBP-WHT", names, skipped, *surgery.count(model), notes)


def detach(model: nn.Module) -> None:
    """Put the stock layers back, with the trained weights in them. Raises `ValueError` where nothing is attached.

    >>> import timm
    >>> from leanvit import lbp_wht
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=2, depth=1, num_classes=4)
    >>> report = lbp_wht.attach(model, "LP_L1-2", scope="full")
    >>> type(model.blocks[0].mlp.fc1).__name__
    'LBPLinear'
    >>> lbp_wht.detach(model)
    >>> type(model.blocks[0].mlp.fc1).__name__
    'Linear'
    """
    if not model.__dict__.pop(ATTACHED, False):
        raise ValueError(f"LBP-WHT is not attached to this {type(model).__name__}")
    wrapped = [(n, m) for n, m in model.named_modules() if isinstance(m, (LBPLinear, LBPConv2d, LowPrecisionGELU))]
    for name, module in wrapped:
        surgery.replace(model, name, _recast(module, module.stock))
    join_qkv_bias(model)


def setting_of(model: nn.Module) -> dict[str, Setting]:
    """`{layer: Setting}` of the treated layers."""
    return {n: m.setting for n, m in model.named_modules() if isinstance(m, (LBPLinear, LBPConv2d))}


def _recast(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """A new module of class `cls` with the same parameters, buffers, hooks and settings."""
    new = cls.__new__(cls)
    new.__dict__ = {k: v for k, v in module.__dict__.items() if k not in ("setting", "dtype")}
    return new


def _wrap(module: nn.Module, setting: Setting) -> nn.Module:
    new = _recast(module, LBPLinear if isinstance(module, nn.Linear) else LBPConv2d)
    new.setting = setting
    return new


def _low_precision(module: nn.GELU, dtype: torch.dtype) -> nn.Module:
    new = _recast(module, LowPrecisionGELU)
    new.dtype = dtype
    return new
