"""The published form of LBP-WHT's layer, as the honest "before" of our own: same mathematics, no fast transform.

Written anew from the formulas of arXiv 2309.15275 (specification of LBP-WHT, sections 1.3-1.5, and 7.2/7.3 for what
makes it slow):

* the padded tensor is broadcast against all R masks of +-1 and summed, so a temporary R times as large as the
  activation is written and read in the forward pass, for the output gradient and for the reconstruction;
* `g_x` is a product batched over R and B with only P columns; `g_W` is R products and a sum;
* grids that are not multiples of the order are mirrored (reflect padding), which biases `g_W`;
* class tokens pass through an ordinary linear layer, and the outputs are concatenated.

Its gradients equal those of `lbp_wht` with `pad="reflect"`. It is here to be measured, not to be used.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from leanvit import lbp_wht, sites, surgery
from leanvit.kernels import walsh
from leanvit.lbp_wht import Basis
from leanvit.surgery import Match, Report


def masks(bases: list[Basis], order: int = 8) -> Tensor:
    """The bases as images of +-1, `(R, n, n)` (specification 1.2).

    >>> from leanvit import published
    >>> published.masks([(1, 0)], order=2)
    tensor([[[ 1.,  1.],
             [-1., -1.]]])
    """
    w = walsh.walsh_matrix(order, torch.float32)
    return torch.stack([torch.outer(w[r], w[c]) for r, c in bases])


def _blocks(tokens: Tensor, grid: tuple[int, int], order: int) -> Tensor:
    """Tokens `(B, h*w, C)` -> mirrored and cut into blocks, `(B, C, p_h, n, p_w, n)`."""
    (rows, top), (columns, left) = (walsh.padding(size, order) for size in grid)
    image = tokens.transpose(1, 2).unflatten(2, grid)
    right, bottom = order * columns - grid[1] - left, order * rows - grid[0] - top
    image = F.pad(image, (left, right, top, bottom), mode="reflect")
    return image.unflatten(3, (columns, order)).unflatten(2, (rows, order))


def _sums(blocks: Tensor, mask: Tensor) -> Tensor:
    """Sum of every block under every mask: `(R, B, C, p_h, p_w)`, through a product R times as large as `blocks`."""
    return (blocks * mask[:, None, None, None, :, None, :]).sum(dim=(4, 6))


def _image(coefficients: Tensor, mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Each mask times its coefficient, summed and cropped: `(R, B, C, p_h, p_w)` -> `(B, h*w, C)`."""
    order = mask.shape[-1]
    blocks = (coefficients[:, :, :, :, None, :, None] * mask[:, None, None, None, :, None, :]).sum(dim=0)
    image = blocks.flatten(4, 5).flatten(2, 3)
    top, left = (walsh.padding(size, order)[1] for size in grid)
    image = image[:, :, top : top + grid[0], left : left + grid[1]]
    return image.flatten(2).transpose(1, 2)


class _Published(torch.autograd.Function):
    """Linear layer on the tokens of a grid: `x̂ = T x` is saved, the mean is on `ĝ_y` (section 1.4)."""

    @staticmethod
    def forward(ctx, x, weight, bias, mask, grid):
        ctx.save_for_backward(_sums(_blocks(x, grid, mask.shape[-1]), mask), weight)
        ctx.mask, ctx.grid, ctx.has_bias = mask, grid, bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x_hat, weight = ctx.saved_tensors
        mask = ctx.mask
        g_hat = _sums(_blocks(g, ctx.grid, mask.shape[-1]), mask) / mask[0].numel()
        grid_of_blocks = g_hat.shape[3:]
        # batched over R and B, with only P columns
        low = torch.matmul(weight.T, g_hat.flatten(3).flatten(0, 1)).unflatten(0, g_hat.shape[:2])
        g_x = _image(low.unflatten(3, grid_of_blocks), mask, ctx.grid)
        # R products, then a sum
        left, right = (t.flatten(3).transpose(1, 2).flatten(2) for t in (g_hat, x_hat))
        g_w = torch.bmm(left, right.transpose(1, 2)).sum(dim=0)
        return g_x, g_w, g.sum(dim=(0, 1)) if ctx.has_bias else None, None, None


class PublishedLinear(nn.Linear):
    """`nn.Linear` with the published backward in training mode, for `(B, prefix + h*w, C)` inputs."""

    grid: tuple[int, int]
    prefix: int
    mask: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """`(B, prefix + h*w, Ci) -> (B, prefix + h*w, Co)`."""
        if not self.training:
            return super().forward(x)
        mask = self.mask.to(x)
        y = _Published.apply(x[:, self.prefix :], self.weight, self.bias, mask, self.grid)
        return torch.cat([super().forward(x[:, : self.prefix]), y], dim=1) if self.prefix else y


def attach(
    model: nn.Module,
    bases: str = "LP_L1-4",
    *,
    match: Match | None = None,
    example: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    prefix_tokens: int | None = None,
) -> Report:
    """Give the linear layers of a ViT the published form, in place; arguments as in `lbp_wht.attach`.

    `example` is a batch of images `(B, 3, H, W)`.

    Raises:
        ValueError: no `nn.Linear` sees `(B, N, C)` tokens, or unknown bases.
    """
    mask = masks(lbp_wht.parse_bases(bases))
    found, skipped = sites.find_sites(model, match, example, grid, prefix_tokens)
    found = [s for s in found if s.layout == "tokens"]
    if not found:
        raise ValueError(f"published: no linear layer of {type(model).__name__} sees tokens (B, N, C)")
    for site in found:
        stock = model.get_submodule(site.name)
        layer = PublishedLinear.__new__(PublishedLinear)
        layer.__dict__ = dict(stock.__dict__)  # the same parameters and hooks
        layer.grid, layer.prefix, layer.mask = site.grid, site.prefix, mask
        surgery.replace(model, site.name, layer)
    return Report("LBP-WHT, published form", [s.name for s in found], skipped, *surgery.count(model))
