"""`y[..., rows] += (x P) Q^T + b` on some rows of a layer's output, and sums of Kronecker products in that form.

    add(y, x, [(P_q, Q_q), (P_v, Q_v)], [b, b], [0, 2 * d])

is one torch op (`torch.ops.leanvit.lowrank_add`, with autograd, a fake kernel and a FLOP formula) for all rows of a
layer: one product `z = x [P_q | P_v]`, one product for each range of rows that is added where it belongs, and a copy of
`y` for the rest, which stays what it is, bit for bit. It saves `x`, which other layers share, and the narrow `z`.
`linear(layer, x, ...)` adds to the output of a layer; a frozen one runs as one with what is added.

A sum of n Kronecker products `H = sum_i A_i (x) B_i` (KAdaptation, arXiv 2203.16329), with `A_i = s_i t_i^T` of rank rA
and `B_i = u_i v_i^T` of rank r, is such a pair, `H = P Q^T` with inner size `n rA r` (`factors`). For A_i of full rank
that inner size would be n^2 r; `kronecker_apply` takes three products instead, and neither builds the matrix H.

There is no CUDA source of our own: on the GPU the op is cuBLAS products, the second one accumulating in place, until a
kernel has been measured that beats them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.flop_counter import flop_registry, register_flop_formula

from leanvit.kernels import products

# torch's counter knows only the form that is not in place
flop_registry.setdefault(torch.ops.aten.addmm_, flop_registry[torch.ops.aten.addmm])

# --- the op ----------------------------------------------------------------------------------------------------------

torch.library.define(
    "leanvit::lowrank_add", "(Tensor y, Tensor x, Tensor p, Tensor[] q, Tensor[] bias, int[] first) -> (Tensor, Tensor)"
)


def _check(y: Tensor, x: Tensor, p: Tensor, q: list[Tensor], bias: list[Tensor], first: list[int]) -> None:
    if not y.is_floating_point() or any(t.dtype != y.dtype for t in (x, p, *q, *bias)):
        kinds = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in (y, x, p, *q, *bias)}))
        raise TypeError(f"lowrank_add: one floating-point dtype is needed, got {kinds}")
    if y.dim() < 1 or x.shape[:-1] != y.shape[:-1] or p.dim() != 2 or x.shape[-1] != p.shape[0]:
        raise ValueError(
            f"lowrank_add: y (..., out), x (..., in) and p (in, rank) do not fit: "
            f"{tuple(y.shape)}, {tuple(x.shape)}, {tuple(p.shape)}"
        )
    if len(first) != len(q) or len(bias) not in (0, len(q)) or sum(t.shape[1] for t in q) != p.shape[1]:
        raise ValueError(
            f"lowrank_add: {len(q)} q with {[t.shape[1] for t in q]} columns, {len(bias)} biases and {len(first)} "
            f"first rows do not fit p with {p.shape[1]} columns"
        )
    end = 0
    for start, width in sorted((f, t.shape[0]) for f, t in zip(first, q, strict=True)):
        if start < end or start + width > y.shape[-1]:
            raise ValueError(
                f"lowrank_add: rows {start}..{start + width - 1} overlap others or leave the {y.shape[-1]} rows of y"
            )
        end = start + width
    if any(b.shape != t.shape[:1] for b, t in zip(bias, q, strict=False)):
        raise ValueError(f"lowrank_add: biases of {[tuple(b.shape) for b in bias]} do not fit the rows of q")


def _accumulate(y: Tensor, x: Tensor, p: Tensor, q: list[Tensor], bias: list[Tensor], first: list[int]) -> Tensor:
    """Add to the rows of a contiguous `y` in place, and return `z = x P`."""
    flat, column = y.view(-1, y.shape[-1]), 0
    with products.plain_dtypes(y):
        z = products.through(x.reshape(-1, x.shape[-1]), p)
        for i, (start, weight) in enumerate(zip(first, q, strict=True)):
            rows = flat[:, start : start + weight.shape[0]]
            rows.addmm_(z[:, column : column + weight.shape[1]], weight.T)
            if bias:
                rows.add_(bias[i])
            column += weight.shape[1]
    return z


@torch.library.impl("leanvit::lowrank_add", "default")
def _add(y: Tensor, x: Tensor, p: Tensor, q: list[Tensor], bias: list[Tensor], first: list[int]):
    _check(y, x, p, q, bias, first)
    out = y.clone(memory_format=torch.contiguous_format)
    return out, _accumulate(out, x, p, q, bias, first)


@torch.library.register_fake("leanvit::lowrank_add")
def _add_fake(y: Tensor, x: Tensor, p: Tensor, q: list[Tensor], bias: list[Tensor], first: list[int]):
    _check(y, x, p, q, bias, first)
    return y.new_empty(y.shape), x.new_empty(x.shape[:-1].numel(), p.shape[1])


def _setup(ctx, inputs, output) -> None:
    _, x, p, q, bias, ctx.first = inputs
    ctx.save_for_backward(x, p, output[1], *q)
    ctx.biases = len(bias)
    ctx.set_materialize_grads(False)


def _gradients(
    ctx,
    g: Tensor | None,
    g_z: Tensor | None,
    x: Tensor,
    p: Tensor,
    z: Tensor,
    q: list[Tensor],
    needed: tuple[bool, bool, bool, bool],
    weight: Tensor | None = None,
):
    """`(g_x, g_p, [g_q], [g_bias])`; `needed`: which of x, p, any q, any bias ask for one.

    With the base layer's `weight`, `g_x` comes through that layer, too.
    """
    flat_x = x.reshape(-1, x.shape[-1])
    with products.plain_dtypes(x):  # a backward pass may be called under autocast
        g_q, g_bias = [None] * len(q), [None] * ctx.biases
        if g is not None:
            flat = g.reshape(-1, g.shape[-1])
            parts = [flat[:, start : start + q_i.shape[0]] for start, q_i in zip(ctx.first, q, strict=True)]
            own = torch.cat([part @ q_i for part, q_i in zip(parts, q, strict=True)], dim=1)
            g_z = own if g_z is None else g_z + own
            if needed[2]:
                pieces = z.split([q_i.shape[1] for q_i in q], dim=1)
                g_q = [part.T @ piece for part, piece in zip(parts, pieces, strict=True)]
            if needed[3]:
                g_bias = [part.sum(0) for part in parts][: ctx.biases]
        g_x = None
        if needed[0] and weight is not None:
            g_x = products.through(flat, weight).addmm_(g_z, p.T).view(x.shape)
        elif needed[0] and g_z is not None:
            g_x = (g_z @ p.T).view(x.shape)
        g_p = flat_x.T @ g_z if needed[1] and g_z is not None else None
    return g_x, g_p, g_q, g_bias


def _backward(ctx, g: Tensor | None, g_z: Tensor | None):
    x, p, z, *q = ctx.saved_tensors
    need_y, need_x, need_p, need_q, need_bias = ctx.needs_input_grad[:5]
    needed = (need_x, need_p, any(need_q), any(need_bias))
    return g if need_y else None, *_gradients(ctx, g, g_z, x, p, z, q, needed), None


torch.library.register_autograd("leanvit::lowrank_add", _backward, setup_context=_setup)


class _AddInto(torch.autograd.Function):
    """The op on a `y` that no one else holds: without its copy, differentiable once."""

    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, p: Tensor, first: list[int], count: int, *rest: Tensor) -> Tensor:
        q, bias = list(rest[:count]), list(rest[count:])
        _check(y, x, p, q, bias, first)
        ctx.save_for_backward(x, p, _accumulate(y, x, p, q, bias, first), *q)
        ctx.first, ctx.biases = first, len(bias)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        x, p, z, *q = ctx.saved_tensors
        need_y, need_x, need_p, _, _, *need = ctx.needs_input_grad
        needed = (need_x, need_p, any(need[: len(q)]), any(need[len(q) :]))
        g_x, g_p, g_q, g_bias = _gradients(ctx, g, None, x, p, z, q, needed)
        return g if need_y else None, g_x, g_p, None, None, *g_q, *g_bias


class _FrozenLinear(torch.autograd.Function):
    """A frozen linear layer and the op on its output as one: its input gradient is one product and one in place."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, own: Tensor | None, p: Tensor, first: list[int], count: int, *rest):
        q, bias = list(rest[:count]), list(rest[count:])
        y = F.linear(x, weight, own)
        if y._is_view():  # up to torch 2.13; a view made here could not be changed in place by others
            y = torch.ops.aten._unsafe_view(y, y.shape)
        _check(y, x, p, q, bias, first)
        z = _accumulate(y, x, p, q, bias, first)
        ctx.save_for_backward(x, weight if ctx.needs_input_grad[0] else None, p, z, *q)
        ctx.first, ctx.biases = first, len(bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        x, weight, p, z, *q = ctx.saved_tensors
        need_x, _, _, need_p, _, _, *need = ctx.needs_input_grad
        needed = (need_x, need_p, any(need[: len(q)]), any(need[len(q) :]))
        g_x, g_p, g_q, g_bias = _gradients(ctx, g, None, x, p, z, q, needed, weight)
        return g_x, None, None, g_p, None, None, *g_q, *g_bias


@register_flop_formula(torch.ops.leanvit.lowrank_add)
def _flops(y_shape, x_shape, p_shape, q_shapes, bias_shapes, first, *, out_shape=None, **kwargs) -> int:
    tokens = 1
    for size in x_shape[:-1]:
        tokens *= size
    return 2 * tokens * (p_shape[0] * p_shape[1] + sum(rows * rank for rows, rank in q_shapes))


def add(
    y: Tensor,
    x: Tensor,
    factors: list[tuple[Tensor, Tensor]],
    bias: list[Tensor] | None,
    first: list[int],
    *,
    into: bool = False,
) -> Tensor:
    """`y` with `(x P_i) Q_i^T + b_i` added to its rows `first_i .. first_i + width_i - 1`; a new tensor.

    `into=True` adds to `y` itself where it can (eager mode; contiguous, no view, no leaf that learns), and is then
    differentiable once: for an output that no one else holds.

    Args:
        y: `(..., out)`; its dtype is the one that is computed in, so under autocast it is the base layer's.
        x: `(..., in)`. factors: for each range `P_i (in, rank_i)` and `Q_i (width_i, rank_i)`.
        bias: for each range `(width_i,)`, or None. first: where each range begins; ranges do not overlap.

    Raises:
        ValueError: shapes or ranges that do not fit. TypeError: not a floating-point `y`.
    """
    kind = y.dtype
    p, q, b = _operands(factors, bias, kind)
    into = into and not torch.compiler.is_compiling()
    if into and y.is_contiguous() and not y._is_view() and not (y.is_leaf and y.requires_grad):
        return _AddInto.apply(y, x.to(kind), p, first, len(q), *q, *b)
    return torch.ops.leanvit.lowrank_add(y, x.to(kind), p, q, b, first)[0]


def _operands(factors: list[tuple[Tensor, Tensor]], bias: list[Tensor] | None, kind: torch.dtype):
    p = factors[0][0] if len(factors) == 1 else torch.cat([p for p, _ in factors], dim=1)
    return p.to(kind), [q.to(kind) for _, q in factors], [b.to(kind) for b in bias or []]


def linear(
    layer: nn.Module, x: Tensor, factors: list[tuple[Tensor, Tensor]], bias: list[Tensor] | None, first: list[int]
) -> Tensor:
    """`add(layer(x), x, factors, bias, first)`, with the other rows those of `layer(x)`, bit for bit.

    A stock frozen `nn.Linear` runs as one with what is added, in `eager` mode and outside autocast; one that learns, is
    of another class or has hooks is called as a module. Differentiable once where the layer is a stock one without
    hooks, which is added to in place; what any other returns is left as it is.

    Args:
        layer: `(..., in) -> (..., out)`. x: `(..., in)`. factors, bias, first: as in `add`.

    Raises:
        ValueError: shapes or ranges that do not fit. TypeError: a layer whose output is not floating-point.
    """
    if not _fuses(layer, x):
        return add(layer(x), x, factors, bias, first, into=eager(x) and _is_stock(layer))
    p, q, b = _operands(factors, bias, x.dtype)
    return _FrozenLinear.apply(x, layer.weight, layer.bias, p, first, len(q), *q, *b)


def eager(x: Tensor) -> bool:
    """Whether an op of our own may replace torch's on `x` (any shape): not where one compiles, traces or transforms."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    return isinstance(x, Tensor)  # torch.fx passes proxies


def _fuses(layer: nn.Module, x: Tensor) -> bool:
    if not eager(x) or not _is_stock(layer) or products.autocasts(x):
        return False
    own = [t for t in (layer.weight, layer.bias) if t is not None]  # not parameters(): a weight may be computed
    return all(type(t) in (Tensor, nn.Parameter) and not t.requires_grad for t in own)


def _is_stock(layer: nn.Module) -> bool:
    """Whether calling the layer is multiplying by its weight and no more, so that no one else holds what it returns."""
    if type(layer) is not nn.Linear or "forward" in vars(layer) or layer._compiled_call_impl is not None:
        return False  # accelerate sets a forward; `layer.compile()` the other
    hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return not hooked and not _has_any_global_hook()


def add_ref(y: Tensor, x: Tensor, factors: list[tuple[Tensor, Tensor]], bias: list[Tensor] | None, first: list[int]):
    """Reference of `add`, with its y, x, factors, bias: the matrices `P_i Q_i^T (in, width_i)` built and multiplied."""
    out = y.clone()
    for i, ((p, q), start) in enumerate(zip(factors, first, strict=True)):
        rows = slice(start, start + q.shape[0])
        out[..., rows] = out[..., rows] + x @ (p @ q.T) + (bias[i] if bias else 0)
    return out


# --- sums of Kronecker products --------------------------------------------------------------------------------------


def kronecker_sum_ref(rules: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`H = sum_i kron(A_i, u_i v_i^T)`, `(n b, n e)`, from `rules (n, a, c)`, `left (n, b, r)`, `right (n, e, r)`."""
    return sum(torch.kron(a, u @ v.T) for a, u, v in zip(rules, left, right, strict=True))


def kronecker_sum(rules: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`H (n b, n e)` of `kronecker_sum_ref` by one product over i: `H[a b' + b, c e' + e] = sum_i A_i[a, c] B_i[b, e]`.

    KAdaptation's update (its specification, 1.3), from rules, left, right as there; `b'`, `e'` are the sizes of B_i.
    """
    n, a, c = rules.shape
    inner = left @ right.mT
    h = (rules.reshape(n, -1).T @ inner.reshape(n, -1)).view(a, c, *inner.shape[1:])
    return h.transpose(1, 2).reshape(a * left.shape[1], c * right.shape[1])


class _Outer(torch.autograd.Function):
    """`P[(a, b), (i, q, p)] = one[i, a, q] other[i, b, p]`; one node where autograd would build a dozen small ones."""

    @staticmethod
    def forward(ctx, one: Tensor, other: Tensor) -> Tensor:
        ctx.save_for_backward(one, other)
        product = one.permute(1, 0, 2)[:, None, :, :, None] * other.permute(1, 0, 2)[None, :, :, None, :]
        return product.reshape(one.shape[1] * other.shape[1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor]:
        one, other = ctx.saved_tensors
        (n, a, q), (b, p) = one.shape, other.shape[1:]
        g = g.reshape(a, b, n, q, p)
        g_one = (g * other.permute(1, 0, 2)[None, :, :, None, :]).sum((1, 4)).transpose(0, 1)
        g_other = (g * one.permute(1, 0, 2)[:, None, :, :, None]).sum((0, 3)).transpose(0, 1)
        return g_one, g_other


def factors(s: Tensor, t: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`P (n b, n rA r)` and `Q (n e, n rA r)` with `P Q^T = sum_i (s_i t_i^T) (x) (u_i v_i^T)`.

    `s, t (n, n, rA)`, `u (n, b, r)`, `v (n, e, r)`; `P[(a, b), (i, q, p)] = s_i[a, q] u_i[b, p]`, Q likewise.
    Differentiable once.
    """
    return _Outer.apply(s, u), _Outer.apply(t, v)


def kronecker_apply(x: Tensor, rules: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`x H = sum_i A_i^T (X u_i) v_i^T` for `x (..., n b)` without H: three products, any A_i; `(..., n e)`.

    `X` is `x` as `(n, b)`; rules, left, right as in `kronecker_sum_ref`. The sum over i stays in front, so that no
    product has to copy its operands.
    """
    n, a, c = rules.shape
    rank = left.shape[2]
    t = left.mT.reshape(n * rank, -1) @ x.reshape(-1, left.shape[1]).T  # (i p, tokens a)
    t = t.view(n, -1, a) @ rules  # (i, p tokens, c)
    y = t.view(n * rank, -1).T @ right.mT.reshape(n * rank, -1)  # (tokens c, e)
    return y.view(*x.shape[:-1], c * right.shape[1])
