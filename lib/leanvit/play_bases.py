"""Walsh bases to play with: what a few functions leave of a real gradient of one layer. See `play.bases`."""

import copy
import io
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from leanvit import lbp_wht, plots
from leanvit.evaluate import device_of
from leanvit.kernels import walsh
from leanvit.sites import Site, find_sites, join_qkv_bias, separate_qkv_bias
from leanvit.surgery import Match

EVERY = lbp_wht.low_pass_linf(8)  # all 64, row-major
FAMILIES = {"LP_L1": 15, "LP_Linf": 8, "LHE": 64}  # and their largest sizes

# --- gradients -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A linear layer in one exact step: input `x (B, N, Ci)`, output gradient `g (B, N, Co)`, `weight (Co, Ci)`."""

    site: Site
    x: Tensor
    g: Tensor
    weight: Tensor

    def project(self, t: Tensor, kept: Sequence[lbp_wht.Basis]) -> Tensor:
        """`(B, N, C)` -> `(B, prefix + P R, C)`."""
        return walsh.project(t, *self.site.grid, self.site.prefix, [s for pair in kept for s in pair])

    def expand(self, z: Tensor, kept: Sequence[lbp_wht.Basis]) -> Tensor:
        """`(B, prefix + P R, C)` -> `(B, N, C)`, the adjoint of `project`."""
        return walsh.expand(z, *self.site.grid, self.site.prefix, [s for pair in kept for s in pair])

    def energy(self) -> Tensor:
        """Energy of the output gradient's coefficients, `(8, 8)`, over images, blocks and channels."""
        z = self.project(self.g, EVERY)[:, self.site.prefix :].double().square().sum((0, 2))
        return z.reshape(-1, 8, 8).sum(0)


@dataclass(frozen=True)
class Rebuilt:
    """What a few bases leave of a layer's gradient, over all images and channels."""

    kept: tuple[lbp_wht.Basis, ...]
    gradient: Tensor  # (B, N, Co), the output gradient projected and expanded again
    error: float  # |gradient - g| / |g|
    cosine_input: float  # with the exact input gradient
    cosine_weight: float  # with the exact weight gradient
    flops: float  # of the backward pass, exact = 1 (the paper's count)
    saved: float  # bytes kept for it, exact = 1


def capture(model: nn.Module, batch: tuple[Tensor, Tensor], match: Match | None = None) -> list[Layer]:
    """The linear layers of a copy of `model` in one exact step of cross-entropy on `batch` (images `(B, C, H, W)`,
    labels `(B,)`), without those whose gradient is zero. `ValueError` when none is left.
    """
    net, device, outputs = copy.deepcopy(model).eval(), device_of(model), {}
    found, _ = find_sites(net, match, narrow=match is not None)
    separate_qkv_bias(net, match)

    def watch(site: Site) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            seen = outputs[site.name] = [_tokens(inputs[0], site), torch.zeros(())]
            output.register_hook(lambda g: seen.__setitem__(1, _tokens(g, site)))

        return hook

    for site in found:
        net.get_submodule(site.name).register_forward_hook(watch(site))
    net.requires_grad_(True)
    F.cross_entropy(net(batch[0].to(device)), batch[1].to(device)).backward()
    join_qkv_bias(net)
    weights = {s.name: net.get_submodule(s.name).weight.detach().flatten(1).cpu() for s in found}
    layers = [Layer(s, *outputs[s.name], weights[s.name]) for s in found if outputs[s.name][1].any()]
    if not layers:
        raise ValueError("bases: no layer gets a gradient from these images; look at the head and at match=")
    return layers


def _tokens(t: Tensor, site: Site) -> Tensor:
    """A layer's input or output as `(B, N, C)`, on the CPU."""
    return site.as_tokens(t.detach().float().cpu())


def rebuild(layer: Layer, kept: Collection[lbp_wht.Basis]) -> Rebuilt:
    """Gradients of `layer` by LBP-WHT with the bases `kept`, beside the exact ones (specification 1.2)."""
    kept, (x, g, w) = tuple(kept), (layer.x, layer.g, layer.weight)
    g_hat, x_hat = layer.project(g, kept), layer.project(x, kept)
    g_x, g_w = layer.expand(g_hat @ w, kept), g_hat.flatten(0, 1).T @ x_hat.flatten(0, 1)
    again = layer.expand(g_hat, kept)
    return Rebuilt(
        kept, again, float((again - g).double().norm() / g.double().norm()),
        _cosine(g_x, g @ w), _cosine(g_w, g.flatten(0, 1).T @ x.flatten(0, 1)),
        layer.site.flops(len(kept)) / layer.site.exact_flops(),
        layer.site.saved_bytes(len(kept)) / layer.site.saved_bytes(None),
    )  # fmt: skip


def _cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


# --- pictures --------------------------------------------------------------------------------------------------------


def panels(columns: int, rows: int, *, width: float, height: float, gaps: tuple[float, float]) -> tuple[Figure, Any]:
    """A figure of panels in fixed places, `gaps` inches apart: the layout engine takes longer than all the drawing."""
    fig, axes = plots.figure(columns, rows, width=width, height=height, squeeze=False, layout="none")
    size, (beside, above) = fig.get_size_inches(), gaps
    place = {"left": beside / size[0], "right": 1 - 0.1 / size[0], "bottom": 0.4 / size[1]}
    place |= {"top": 1 - (above + 0.2) / size[1], "wspace": beside / (width - beside)}
    fig.subplots_adjust(**place, hspace=above / (height - above))
    return fig, axes


def png(figure: Figure) -> bytes:
    """The figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, pil_kwargs={"compress_level": 1})
    return buffer.getvalue()


def draw(layer: Layer, settings: dict[str, Rebuilt], pixels: Tensor, image: int = 0, across: bool = False) -> Figure:
    """The exact gradient of one image of `pixels (B, C, H, W)` (its strongest channel), and beside it each setting.

    Top down: coefficients, gradient, what is lost, and in numbers what one gets and pays; from left to right where
    `across`.
    """
    columns = 1 + len(settings)
    fig, axes = panels(*((4, columns) if across else (columns, 4)), width=2.1, height=2.1, gaps=(0.5, 0.35))
    axes = axes if across else axes.T
    site, energy = layer.site, layer.energy()
    channel = int(layer.g[image, site.prefix :].square().sum(0).argmax())
    share = (energy / energy.sum()).clamp_min(1e-6).log10().numpy()

    def grid(g: Tensor) -> np.ndarray:
        return g[image, site.prefix :, channel].reshape(site.grid).numpy()

    exact = grid(layer.g)
    scale = {"cmap": "PuOr", "vmin": -abs(exact).max(), "vmax": abs(exact).max()}
    of = dict(zip(("vmin", "vmax"), (share.min(), share.max()), strict=True))
    first = [(share, "all 64 coefficients", of), (exact, f"its gradient, channel {channel}", scale)]
    first.append((_picture(pixels[int(image // site.calls)]), f"image {image}", {"cmap": "gray"}))
    for ax, (values, title, how) in zip(axes[0][:3], first, strict=True):
        _show(ax, values, title, **how)
    _bars(axes[0][3], "exact layer", 1, 1, 1, 1)
    for column, (name, r) in zip(axes[1:], settings.items(), strict=True):
        mask = np.isin(np.arange(64), [8 * a + b for a, b in r.kept]).reshape(8, 8)
        _show(column[0], np.where(mask, share, np.nan), f"{name}: {len(r.kept)} of 64", **of)
        _show(column[1], grid(r.gradient), "rebuilt", **scale)
        _show(column[2], exact - grid(r.gradient), "lost", **scale)
        _bars(column[3], f"all images: error {r.error:.2f}", r.cosine_input, r.cosine_weight, r.flops, r.saved)
    fig.suptitle(f"{site.name}: what a few Walsh functions leave of its gradient", fontsize=10.5)
    return fig


def _show(ax: Axes, values: np.ndarray, title: str, **how: Any) -> None:
    ax.imshow(values, **how)
    ax.set(xticks=[], yticks=[], facecolor="#EEEEEE")
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.set_title(title, fontsize=8.5)


def _picture(pixels: Tensor) -> np.ndarray:
    """A preprocessed image `(C, H, W)` as one to look at."""
    low, high = pixels.amin((1, 2), keepdim=True), pixels.amax((1, 2), keepdim=True)
    shown = ((pixels - low) / (high - low).clamp_min(1e-12)).float().cpu()
    return (shown.permute(1, 2, 0) if len(shown) == 3 else shown[0]).numpy()


def _bars(ax: Axes, title: str, cosine_input: float, cosine_weight: float, flops: float, saved: float) -> None:
    """What one gets (cosines with the exact gradients) and what one pays (parts of the exact layer's)."""
    values, names = (cosine_input, cosine_weight, flops, saved), ("cos $g_x$", "cos $g_W$", "FLOPs", "saved")
    ax.barh(names, values, color=[plots.BLUE] * 2 + [plots.ORANGE] * 2, height=0.6)
    for i, (value, format) in enumerate(zip(values, ("{:.2f}", "{:.2f}", "{:.0%}", "{:.0%}"), strict=True)):
        ax.text(max(value, 0) + 0.03, i, format.format(value), va="center", fontsize=8)
    ax.set(xlim=(0, 1.4), ylim=(3.6, -0.6), xticks=[])
    ax.tick_params(axis="y", labelsize=8, length=0)
    ax.grid(False)
    ax.set_title(title, fontsize=8.5)


# --- the widget ------------------------------------------------------------------------------------------------------


def widget(layers: dict[str, Layer], name: str, pixels: Tensor, start: str) -> Any:
    """Layer, image of `pixels (B, C, H, W)`, family, size, and a button for each of the 64, beside the picture."""
    import ipywidgets as w

    layer = w.Dropdown(options=[*layers], value=name, description="layer")
    image = w.IntSlider(0, 0, len(layers[name].g) - 1, description="image")
    family = w.Dropdown(options=[*FAMILIES, "own choice"], description="bases")
    size = w.IntSlider(1, 1, FAMILIES["LP_L1"], description="size")
    small = {"width": "22px", "height": "22px", "margin": "1px", "padding": "0"}
    buttons = {b: w.ToggleButton(tooltip=f"{b[0]} changes of sign down, {b[1]} across", layout=small) for b in EVERY}
    shown = w.Image(
        format="png", layout={"flex": "1 1 560px", "min_width": "0", "max_width": "840px", "height": "auto"}
    )
    busy = [False]

    def show(_: Any = None) -> None:
        kept = [b for b, button in buttons.items() if button.value]
        title = "own choice" if family.value == "own choice" else f"{family.value}-{size.value}"
        current = layers[layer.value]
        shown.value = png(draw(current, {title: rebuild(current, kept)}, pixels, image.value, across=True))

    def choose(_: Any = None) -> None:
        """The buttons follow family and size."""
        if busy[0]:
            return
        busy[0] = True
        if family.value != "own choice":
            size.max = FAMILIES[family.value]
            kept = lbp_wht.parse_bases(f"{family.value}-{size.value}", 8, layers[layer.value].energy())
            for basis, button in buttons.items():
                button.value = basis in kept
        busy[0] = False
        image.max = len(layers[layer.value].g) - 1
        show()

    def press(change: dict) -> None:
        if busy[0]:
            return
        busy[0] = True
        family.value = "own choice"
        if not any(button.value for button in buttons.values()):
            change["owner"].value = True  # a gradient needs one
        busy[0] = False
        show()

    family.value, _, number = start.replace("DC", "LP_L1-1").partition("-")
    size.max = FAMILIES[family.value]
    size.value = int(number)
    for control in (layer, family, size):
        control.observe(choose, "value")
    image.observe(show, "value")
    for button in buttons.values():
        button.observe(press, "value")
    choose()
    grid = w.GridBox([*buttons.values()], layout={"grid_template_columns": "repeat(8, 24px)"})
    hint = w.HTML("Press single functions: the mean is at the top left.")
    controls = w.VBox([layer, image, family, size, grid, hint], layout={"flex": "0 0 auto"})
    return w.HBox([controls, shown], layout={"flex_flow": "row wrap", "align_items": "flex-start"})
