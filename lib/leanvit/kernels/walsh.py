"""`project` and `expand`: a block-wise 2-D Walsh-Hadamard transform over the token grid, kept to a few bases.

The two maps of LBP-WHT (arXiv 2309.15275).

The grid of `h x w` tokens (row-major, behind `prefix` class or register tokens) is padded to whole `n x n` blocks, and
each block is projected on `R` two-dimensional Walsh functions. With `W` the sequency-ordered Walsh matrix of order `n`,

    project(x)[b, prefix + p*R + i, c] = 1/n * sum_{u,v} W[r_i, u] W[c_i, v] * x_padded[b, block p, u, v, c]

so the basis is orthonormal, `expand` is the exact adjoint, and the prefix tokens are carried along as rows of their
own: the products of a linear layer see one matrix of `prefix + P*R` rows an image instead of `prefix + h*w`.

The dense one-liner it equals: `torch.cat([x[:, :prefix], dense_matrix(...) @ x[:, prefix:]], dim=1)`.

Both are torch ops (`torch.ops.leanvit.walsh_project`, `walsh_expand`) with autograd, fake tensors and a FLOP formula.
In torch both are weighted sums of rows (`embedding_bag`), all images and their prefix tokens in one call. Where all
chosen bases treat some tokens alike (four by four of them for LP_L1-2, two by two for LP_L1-4), two calls read less:
those tokens are added up first. Tokens that lie apart, a convolution's, are projected by one batched product for each
row of blocks.
On CUDA tensors the source `walsh.cu` is compiled for the given set of bases (`kernels/cuda.py`).
"""

import functools
import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from leanvit.kernels import products

ORDERS = (2, 4, 8, 16)


@functools.cache
def _walsh_rows(order: int) -> tuple[tuple[int, ...], ...]:
    if order not in ORDERS:
        raise ValueError(f"order {order} is not one of {ORDERS}: the order of a Walsh matrix is a power of two")
    bits = int(math.log2(order))

    def entry(s: int, t: int) -> int:
        gray = s ^ (s >> 1)
        reversed_gray = int(format(gray, f"0{bits}b")[::-1], 2)
        return -1 if (reversed_gray & t).bit_count() % 2 else 1

    return tuple(tuple(entry(s, t) for t in range(order)) for s in range(order))


def walsh_matrix(order: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Sequency-ordered Walsh matrix `(n, n)` of +-1: row `s` changes its sign `s` times, `W = W^T`, `W W^T = n I`.

    Raises `ValueError` for an order other than 2, 4, 8 or 16.
    """
    return torch.tensor(_walsh_rows(order), dtype=dtype)


def padding(size: int, order: int) -> tuple[int, int]:
    """`(blocks, before)`: how many blocks of `order` cover `size` tokens, and the padding in front of the first one."""
    count = -(-size // order)
    return count, (order * count - size + 1) // 2


def blocks(h: int, w: int, order: int) -> int:
    """Blocks that cover the grid (`P`)."""
    return padding(h, order)[0] * padding(w, order)[0]


def rows(h: int, w: int, prefix: int, rank: int, order: int) -> int:
    """Rows an image has after `project`: `prefix + P * R`."""
    return prefix + blocks(h, w, order) * rank


@functools.cache
def _sources(size: int, order: int, reflect: bool) -> tuple[int | None, ...]:
    """For every position of the padded axis, the token it shows (`None`: a zero)."""
    count, before = padding(size, order)
    sources: list[int | None] = []
    for position in range(-before, order * count - before):
        inside = 0 <= position < size
        if not inside and reflect:
            position = -position if position < 0 else 2 * (size - 1) - position
            if not 0 <= position < size:
                raise ValueError(
                    f"reflect padding of a {size}-token axis to {order * count} needs at least "
                    f"{before + 1} tokens; use pad='zero', which has no such limit"
                )
            inside = True
        sources.append(position if inside else None)
    return tuple(sources)


def _check(x: Tensor, tokens: int, h: int, w: int, prefix: int, bases: list[int], order: int, reflect: bool) -> None:
    if not x.is_floating_point():
        raise TypeError(f"a floating-point tensor is needed, got {x.dtype}")
    if x.dim() != 3 or x.shape[1] != tokens:
        raise ValueError(
            f"expected (B, {tokens}, C) for a {h}x{w} grid with {prefix} prefix token(s) at order {order}, "
            f"got {tuple(x.shape)}"
        )
    if not bases or len(bases) % 2 or min(bases) < 0 or max(bases) >= order:
        raise ValueError(f"bases must be pairs of sequencies in 0..{order - 1}, got {bases}")
    for size in (h, w):
        _sources(size, order, reflect)  # raises where an axis is too short to be mirrored


@functools.lru_cache(maxsize=256)
def _axis_matrix(size: int, order: int, reflect: bool) -> Tensor:
    """`(blocks, n, size)` float64: Walsh row `s` of block `p` as weights over the tokens of one axis."""
    walsh = walsh_matrix(order)
    sources = _sources(size, order, reflect)
    matrix = torch.zeros(len(sources) // order, order, size, dtype=torch.float64)
    for position, token in enumerate(sources):
        if token is not None:
            matrix[position // order, :, token] += walsh[:, position % order]
    return matrix


def dense_matrix(h: int, w: int, bases: list[int], order: int = 8, reflect: bool = False) -> Tensor:
    """The projection as one dense float64 matrix `(P*R, h*w)`; `expand` multiplies by its transpose."""
    vertical, horizontal = _axis_matrix(h, order, reflect), _axis_matrix(w, order, reflect)
    r, c = torch.tensor(bases[0::2]), torch.tensor(bases[1::2])
    matrix = torch.einsum("piy,qix->pqiyx", vertical[:, r], horizontal[:, c]) / order
    return matrix.reshape(-1, h * w)


def project_ref(
    x: Tensor, h: int, w: int, prefix: int, bases: list[int], order: int = 8, reflect: bool = False
) -> Tensor:
    """Reference of `project` by the dense matrix: `(B, prefix + h*w, C)` -> `(B, prefix + P*R, C)`."""
    matrix = dense_matrix(h, w, bases, order, reflect).to(x)
    return torch.cat([x[:, :prefix], matrix @ x[:, prefix:]], dim=1)


def expand_ref(
    z: Tensor, h: int, w: int, prefix: int, bases: list[int], order: int = 8, reflect: bool = False
) -> Tensor:
    """Reference of `expand`, the adjoint of `project_ref`: `(B, prefix + P*R, C)` -> `(B, prefix + h*w, C)`."""
    matrix = dense_matrix(h, w, bases, order, reflect).to(z)
    return torch.cat([z[:, :prefix], matrix.mT @ z[:, prefix:]], dim=1)


# --- in torch: weighted sums of rows, all images and prefix tokens in one call, or in two by way of cells -------------


@functools.lru_cache(maxsize=256)
def _cells(bases: tuple[int, ...], order: int) -> tuple[tuple[int, ...], Tensor]:
    """The cell of each of the `n^2` places of a block, and the bases over the cells, `(R, cells)` float64.

    A cell holds the places at which all bases have the same values. Walsh functions of low sequency are constant on
    runs of tokens, so LP_L1-4 has cells of 2x2 tokens, LP_L1-2 of 4x4, DC one.
    """
    walsh = walsh_matrix(order)
    values = torch.einsum("iu,iv->iuv", walsh[list(bases[0::2])], walsh[list(bases[1::2])]).flatten(1) / order
    seen: dict[tuple[float, ...], int] = {}
    cells = tuple(seen.setdefault(tuple(column), len(seen)) for column in values.T.tolist())
    return cells, torch.tensor(list(seen), dtype=torch.float64).T


def _places(h: int, w: int, prefix: int, order: int, reflect: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of each place of the padded grid that shows a token: that token, its block, and its place in the block."""
    across = padding(w, order)[0]
    places = [
        (prefix + y * w + x, u // order * across + v // order, u % order * order + v % order)
        for u, y in enumerate(_sources(h, order, reflect))
        for v, x in enumerate(_sources(w, order, reflect))
        if y is not None and x is not None
    ]
    token, block, place = torch.tensor(places).T
    return token, block, place


_Stage = tuple[int, int, Tensor, Tensor, Tensor]  # a sparse matrix: its height and width, then row, column, value
_Bags = tuple[Tensor, Tensor | None, Tensor | None]


def _stages(
    h: int, w: int, prefix: int, bases: tuple[int, ...], order: int, reflect: bool, by_cells: bool
) -> list[_Stage]:
    """The projection with its prefix tokens as one sparse matrix, or as two: tokens to cells, cells to coefficients."""
    token, block, place = _places(h, w, prefix, order, reflect)
    cells, small = _cells(bases, order)
    rank, per_block = small.shape
    count, own, cell = blocks(h, w, order), torch.arange(prefix), torch.tensor(cells)[place]

    def stage(height: int, width: int, row: Tensor, column: Tensor, value: Tensor) -> _Stage:
        row, column, value = (t.flatten() for t in torch.broadcast_tensors(row, column, value))
        value = torch.cat([torch.ones(prefix), value])
        return prefix + height, prefix + width, torch.cat([own, row]), torch.cat([own, column]), value

    base = torch.arange(rank)[:, None]
    if not by_cells:
        return [stage(count * rank, h * w, prefix + block * rank + base, token, small[:, cell])]
    every = torch.arange(count)[:, None, None]
    to_cells = prefix + block * per_block + cell, token, torch.tensor(1.0)
    to_bases = prefix + every * rank + base, prefix + every * per_block + torch.arange(per_block), small
    return [stage(count * per_block, h * w, *to_cells), stage(count * rank, count * per_block, *to_bases)]


@functools.lru_cache(maxsize=64)
def _kept(*key) -> list[tuple[int, list[_Bags]]]:
    """What `_bags` built for the largest batch so far, and the number of its images."""
    return [(0, [])]


def _bags(
    images: int,
    h: int,
    w: int,
    prefix: int,
    bases: tuple[int, ...],
    order: int,
    reflect: bool,
    by_cells: bool,
    turned: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> list[_Bags]:
    """For each stage, over images that lie one below the other: rows to add up, where each sum begins, their weights.

    Without weights all are one, without beginnings each sum is a single row. `turned` gives the transpose. Those of few
    images are the first of those of many.
    """
    kept = _kept(h, w, prefix, bases, order, reflect, by_cells, turned, dtype, device)
    most, found = kept[0]
    if most >= images:
        return [tuple(None if t is None else t[: len(t) // most * images] for t in bags) for bags in found]
    image = torch.arange(images)[:, None]
    found = []
    for height, width, row, column, value in _stages(h, w, prefix, bases, order, reflect, by_cells):
        if turned:
            height, width, row, column = width, height, column, row
        sort, sizes = row.argsort(stable=True), row.bincount(minlength=height)
        rows_ = (column[sort] + width * image).flatten().int().to(device)
        begins = (sizes.cumsum(0) - sizes + len(row) * image).flatten().int().to(device)
        plain = bool((value == 1).all())
        weights = None if plain else value[sort].repeat(images).to(device, dtype)
        found.append((rows_, None if plain and bool((sizes == 1).all()) else begins, weights))
    found = found[::-1] if turned else found
    kept[0] = images, found
    return found


def _by_cells(x: Tensor, bases: tuple[int, ...], order: int) -> bool:
    # sums between would round half precision a second time, or overflow it; one alone is rounded once
    whole = x.dtype in (torch.float32, torch.float64)
    return whole and len(bases) > 2 and 4 * _cells(bases, order)[1].shape[1] <= order**2


def _sums(x: Tensor, *grid, by_cells: bool, turned: bool) -> Tensor:
    y = x.flatten(0, 1)
    for rows_, begins, weights in _bags(len(x), *grid, by_cells, turned, x.dtype, x.device):
        if begins is None:
            y = F.embedding(rows_, y)
        else:
            y = F.embedding_bag(rows_, y, begins, mode="sum", per_sample_weights=weights)
    return y.unflatten(0, (len(x), -1))


# --- in torch, where tokens lie apart (a convolution's): one batched product for each row of blocks -------------------


@functools.lru_cache(maxsize=256)
def _bands(
    h: int, w: int, bases: tuple[int, ...], order: int, reflect: bool, dtype: torch.dtype, device: torch.device
) -> list[tuple[int, int, Tensor]]:
    """`(first token, end token, matrix (p_w*R, tokens))` of each row of blocks; tokens of a band lie side by side."""
    matrix = dense_matrix(h, w, list(bases), order, reflect)
    per_band = padding(w, order)[0] * len(bases) // 2
    bands = []
    for band in matrix.split(per_band):
        used = band.reshape(per_band, h, w).abs().amax(dim=(0, 2)).nonzero().flatten()
        # a set of bases may leave rows of a mirrored band untouched: the range between the outermost used rows counts
        first, end = (int(used[0]) * w, (int(used[-1]) + 1) * w) if len(used) else (0, w)
        bands.append((first, end, band[:, first:end].to(device, dtype).contiguous()))
    return bands


# Products with a fresh output run as one batched call, parallel over the images. `out=` on a slice would not: there
# each image becomes a call of its own, with all threads meeting at its end.


def _project_bands(
    x: Tensor, h: int, w: int, prefix: int, bases: tuple[int, ...], order: int, reflect: bool
) -> Tensor:
    bands = _bands(h, w, bases, order, reflect, x.dtype, x.device)
    with products.plain_dtypes(x):
        parts = [torch.matmul(matrix, x[:, prefix + first : prefix + end]) for first, end, matrix in bands]
    return torch.cat([x[:, :prefix], *parts], dim=1) if prefix or len(parts) > 1 else parts[0]


# --- in torch: which of them ------------------------------------------------------------------------------------------
# One stage reads a row of `x` R times, two read it once and `R * cells / n^2` times. Measured on two cores for 7x7 to
# 37x37 tokens and widths of 96 to 3,072.


def _project_torch(x: Tensor, h: int, w: int, prefix: int, bases: list[int], order: int, reflect: bool) -> Tensor:
    grid = h, w, prefix, tuple(bases), order, reflect
    if not x.is_contiguous() or not x.numel():
        return _project_bands(x, *grid)
    return _sums(x, *grid, by_cells=_by_cells(x, tuple(bases), order), turned=False)


def _expand_torch(z: Tensor, h: int, w: int, prefix: int, bases: list[int], order: int, reflect: bool) -> Tensor:
    if not z.numel():
        return _expand_fake(z, h, w, prefix, bases, order, reflect)
    # the R rows of a block stay in the cache while its tokens are summed, unless they are wide
    by_cells = z.shape[2] > 1024 and _by_cells(z, tuple(bases), order)
    return _sums(z, h, w, prefix, tuple(bases), order, reflect, by_cells=by_cells, turned=True)


# --- the ops ---------------------------------------------------------------------------------------------------------

_ARGUMENTS = "int h, int w, int prefix, int[] bases, int order, bool reflect"
torch.library.define("leanvit::walsh_project", f"(Tensor x, {_ARGUMENTS}) -> Tensor")
torch.library.define("leanvit::walsh_expand", f"(Tensor z, {_ARGUMENTS}) -> Tensor")


@functools.cache
def _cuda_kernels():
    """The CuPy launcher, or None (said once): without it CUDA tensors take the torch path."""
    from leanvit.kernels import cuda

    if cuda.available():
        return cuda
    warnings.warn(
        f"{cuda.unavailable()}: the Walsh kernels run as torch ops on the GPU (slower, same results); "
        "pip install 'leanvit[cuda]' brings CuPy",
        stacklevel=2,
    )
    return None


def _launcher(x: Tensor):
    kernel_dtypes = (torch.float32, torch.float16, torch.bfloat16)
    return _cuda_kernels() if x.is_cuda and x.dtype in kernel_dtypes else None


@torch.library.impl("leanvit::walsh_project", ("CPU", "CUDA"))
def _project(x: Tensor, h: int, w: int, prefix: int, bases: list[int], order: int, reflect: bool) -> Tensor:
    _check(x, prefix + h * w, h, w, prefix, bases, order, reflect)
    launcher = _launcher(x)
    return (launcher.project if launcher else _project_torch)(x, h, w, prefix, bases, order, reflect)


@torch.library.impl("leanvit::walsh_expand", ("CPU", "CUDA"))
def _expand(z: Tensor, h: int, w: int, prefix: int, bases: list[int], order: int, reflect: bool) -> Tensor:
    _check(z, rows(h, w, prefix, len(bases) // 2, order), h, w, prefix, bases, order, reflect)
    launcher = _launcher(z)
    return (launcher.expand if launcher else _expand_torch)(z, h, w, prefix, bases, order, reflect)


@torch.library.register_fake("leanvit::walsh_project")
def _project_fake(x: Tensor, h: int, w: int, prefix: int, bases: list[int], order: int, reflect: bool) -> Tensor:
    return x.new_empty(x.shape[0], rows(h, w, prefix, len(bases) // 2, order), x.shape[2])


@torch.library.register_fake("leanvit::walsh_expand")
def _expand_fake(z: Tensor, h: int, w: int, prefix: int, bases: list[int], order: int, reflect: bool) -> Tensor:
    return z.new_empty(z.shape[0], prefix + h * w, z.shape[2])


def _remember(ctx, inputs, output) -> None:
    ctx.arguments = inputs[1:]


torch.library.register_autograd(
    "leanvit::walsh_project",
    lambda ctx, g: (torch.ops.leanvit.walsh_expand(g, *ctx.arguments), *[None] * 6),
    setup_context=_remember,
)
torch.library.register_autograd(
    "leanvit::walsh_expand",
    lambda ctx, g: (torch.ops.leanvit.walsh_project(g, *ctx.arguments), *[None] * 6),
    setup_context=_remember,
)


def _additions(batch: int, channels: int, h: int, w: int, bases: list[int], order: int) -> int:
    """+-1 work counts as additions only: `n^2 P R` a channel (specification of LBP-WHT, section 3.1)."""
    return batch * channels * order**2 * rows(h, w, 0, len(bases) // 2, order)


@register_flop_formula([torch.ops.leanvit.walsh_project, torch.ops.leanvit.walsh_expand])
def _walsh_flops(x_shape, h, w, prefix, bases, order, reflect, *, out_shape=None, **kwargs) -> int:
    return _additions(x_shape[0], x_shape[2], h, w, bases, order)


def project(x: Tensor, h: int, w: int, prefix: int, bases: list[int], order: int = 8, reflect: bool = False) -> Tensor:
    """`(B, prefix + h*w, C)` -> `(B, prefix + P*R, C)`: the coefficients of each block in the given bases.

    Args:
        x: any floating dtype, any strides.
        h, w: token grid. prefix: class or register tokens in front of it, copied.
        bases: `[r0, c0, r1, c1, ...]`, vertical and horizontal sequencies in `0..order-1`.
        order: 2, 4, 8 or 16. reflect: mirror the border tokens instead of padding with zeros.

    Raises:
        ValueError: a token count, basis or order that does not fit. TypeError: not a floating-point tensor.

    >>> import torch
    >>> from leanvit.kernels import walsh
    >>> x = torch.ones(1, 1 + 8 * 8, 3)  # a class token and a grid of 8 x 8
    >>> z = walsh.project(x, 8, 8, 1, bases=[0, 0, 0, 1])
    >>> z.shape, z[0, 1, 0].item()  # the mean times 8, nothing in the second basis
    (torch.Size([1, 3, 3]), 8.0)
    """
    return torch.ops.leanvit.walsh_project(x, h, w, prefix, bases, order, reflect)


def expand(z: Tensor, h: int, w: int, prefix: int, bases: list[int], order: int = 8, reflect: bool = False) -> Tensor:
    """`(B, prefix + P*R, C)` -> `(B, prefix + h*w, C)`: the adjoint of `project` with the same arguments.

    With `reflect=False` that is the inverse transform, cropped to the grid; with `reflect=True` mirrored positions are
    folded back on the tokens they came from.

    >>> import torch
    >>> from leanvit.kernels import walsh
    >>> x, bases = torch.ones(1, 1 + 8 * 8, 3), [0, 0, 0, 1]
    >>> walsh.expand(walsh.project(x, 8, 8, 1, bases), 8, 8, 1, bases).allclose(x)
    True
    """
    return torch.ops.leanvit.walsh_expand(z, h, w, prefix, bases, order, reflect)
