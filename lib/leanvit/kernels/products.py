"""The two products of a linear layer's backward pass, by the faster of torch's two CPU libraries.

    through(g, weight) = g W        outer(g, x) = g^T x

For float32 on x86 `@` goes to MKL by default. oneDNN, which torch ships beside it, multiplies by the untransposed
weight 1.1 to 1.4 times as fast (two AMD cores, 52 to 6,304 rows, widths 64 to 3,072, one thread or two), and forms the
outer product faster where it is wider than high. Elsewhere (small products, other dtypes, strides and processors, GPUs,
code that torch.compile traces, with `torch.backends.mkldnn.flags(enabled=False)`, and where autograd would have to
differentiate them) both are the plain products.
"""

import platform
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

_X86 = platform.machine().lower() in ("x86_64", "amd64")
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if _X86 else None  # x w^T for any strides

# multiply-adds below which a call costs more than oneDNN gains, measured
_LEAST_THROUGH = 1 << 24
_LEAST_OUTER = 1 << 25

if _ONEDNN is not None and _ONEDNN not in flop_registry:

    @register_flop_formula(_ONEDNN)
    def _flops(x_shape, w_shape, *args, out_shape=None, **kwargs) -> int:
        *rows, inner = x_shape
        return 2 * torch.Size(rows).numel() * inner * w_shape[0]


def _onednn(a: Tensor, b: Tensor, least: int) -> bool:
    return (
        a.shape[0] * a.shape[1] * b.shape[1] >= least
        and a.device.type == "cpu"
        and a.dtype == b.dtype == torch.float32
        and (a.is_contiguous() or a.T.is_contiguous())  # oneDNN takes any strides, some of them a hundred times slower
        and b.is_contiguous()
        and a.shape[1] == b.shape[0]  # else `@` tells better what is wrong
        and _ONEDNN is not None
        and torch.backends.mkldnn.enabled
        and not (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad))  # it has no derivative
    )


def _product(a: Tensor, b: Tensor) -> Tensor:
    return _ONEDNN(a, b.T, None, "none", [], "")


def through(g: Tensor, weight: Tensor) -> Tensor:
    """`g (rows, Co)` times `weight (Co, Ci)`, `(rows, Ci)`: a gradient taken back through a linear layer.

    Raises what torch raises for shapes or dtypes that do not fit.

    >>> import torch
    >>> from leanvit.kernels import products
    >>> products.through(torch.ones(1, 2), torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    tensor([[5., 7., 9.]])
    """
    if not torch.compiler.is_compiling() and _onednn(g, weight, _LEAST_THROUGH):
        return _product(g, weight)
    return g @ weight


def outer(g: Tensor, x: Tensor) -> Tensor:
    """`g (rows, Co)` and `x (rows, Ci)` to `g^T x (Co, Ci)`, contiguous: the gradient of a linear layer's weight.

    Raises what torch raises for shapes or dtypes that do not fit.

    >>> import torch
    >>> from leanvit.kernels import products
    >>> products.outer(torch.ones(2, 1), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([[4., 6.]])
    """
    if not torch.compiler.is_compiling() and g.shape[1] < x.shape[1] and _onednn(g.T, x, _LEAST_OUTER):
        return _product(g.T, x)
    return g.T @ x


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for the device of `x` (any shape)."""
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def plain_dtypes(x: Tensor) -> AbstractContextManager:
    """Products within it keep the dtype of `x` (any shape) under autocast; entering autocast for nothing would cost.

    >>> import torch
    >>> from leanvit.kernels import products
    >>> x = torch.ones(2, 2)
    >>> with torch.autocast("cpu", torch.bfloat16), products.plain_dtypes(x):
    ...     (x @ x).dtype
    torch.float32
    """
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else nullcontext()
