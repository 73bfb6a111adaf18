"""The 24 property tests of LBP-WHT's specification (section 9), the layers, attach/detach, and bad input.

The oracle is a dense matrix built here from the definition of the bases and of the padding; no kernel is used for it.
"""

import copy
import json
import math
import warnings
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from leanvit import baselines, cost, lbp_wht, sites
from leanvit.kernels import walsh
from leanvit.lbp_wht import LBPConv2d, LBPLinear, Setting

ALIGNED = [(8, 8), (16, 8), (24, 16)]
PADDED = [(7, 7), (14, 14), (12, 20), (49, 49)]


@pytest.fixture(autouse=True)
def no_measured_table(monkeypatch):
    """Which layers stay exact must not depend on the machine that measured the table in the package."""
    monkeypatch.setattr(lbp_wht, "_slower_table", list)


def double(*shape, requires_grad=False):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=requires_grad)


def basis_matrix(pairs, n=8):
    """`M (R, n^2)` of +-1, rows flattened row-major: `B_rc[u, v] = W[r, u] W[c, v]`."""
    w = walsh.walsh_matrix(n)
    return torch.stack([torch.outer(w[r], w[c]).flatten() for r, c in pairs])


def padding_matrix(h, w, n=8, reflect=False):
    """`E (n^2 P, L)`: pad, then reorder block by block; with its crop `K (L, n^2 P)`."""
    ph, pw = -(-h // n), -(-w // n)
    top, left = math.ceil((n * ph - h) / 2), math.ceil((n * pw - w) / 2)
    e, k = (torch.zeros(n * n * ph * pw, h * w, dtype=torch.float64) for _ in range(2))
    for row in range(n * ph):
        for column in range(n * pw):
            i, j = row - top, column - left
            inside = 0 <= i < h and 0 <= j < w
            if reflect:
                i = -i if i < 0 else 2 * (h - 1) - i if i >= h else i
                j = -j if j < 0 else 2 * (w - 1) - j if j >= w else j
            block = (row // n) * pw + column // n
            place = block * n * n + (row % n) * n + column % n
            if inside or reflect:
                e[place, i * w + j] = 1
            if inside:
                k[place, i * w + j] = 1
    return e, k.T


def oracle(x, g, weight, pairs, h, w, n=8, reflect=False):
    """`g_x = K (I x Pi) E g W` and `g_W = g^T E^T (I x Pi) E x` with dense matrices (specification 1.4)."""
    e, k = padding_matrix(h, w, n, reflect)
    m = basis_matrix(pairs, n)
    projector = torch.kron(torch.eye(e.shape[0] // (n * n), dtype=torch.float64), m.T @ m / n**2)
    g_x = k @ projector @ e @ g @ weight
    g_w = torch.einsum("blo,lm,bmi->oi", g, e.T @ projector @ e, x)
    return g_x, g_w


def run(x, weight, bias, g, pairs, h, w, *, prefix=0, n=8, reflect=False, weight_pairs="same"):
    """Gradients of our layer: `(y, g_x, g_W, g_b)`."""
    x, weight, bias = (t.detach().clone().requires_grad_() for t in (x, weight, bias))
    as_tuple = lambda p: None if p is None else tuple(p)  # noqa: E731
    second = pairs if weight_pairs == "same" else weight_pairs
    setting = Setting("layer", "tokens", (h, w), prefix, as_tuple(pairs), as_tuple(second), n, reflect)
    y = lbp_wht.linear(x, weight, bias, setting, (h, w))
    y.backward(g)
    return y, x.grad, weight.grad, bias.grad


def case(h, w, ci=5, co=6, batch=3, prefix=0):
    return double(batch, prefix + h * w, ci), double(co, ci), double(co), double(batch, prefix + h * w, co)


def close(a, b, tol=1e-10):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol * max(1.0, b.abs().max().item() if b.numel() else 0))


# 2. bases


@pytest.mark.parametrize(
    "n, sizes",
    [
        (4, [1, 3, 6, 10, 13, 15, 16]),
        (8, [1, 3, 6, 10, 15, 21, 28, 36, 43, 49, 54, 58, 61, 63, 64]),
        (16, [1, 3, 6, 10, 15, 21, 28, 36, 45, 55, 66, 78, 91, 105, 120, 136, 151, 165, 178, 190, 201, 211, 220, 228]
             + [235, 241, 246, 250, 253, 255, 256]),
    ],
)  # fmt: skip
def test_02_sizes_of_lp_l1(n, sizes):
    assert [len(lbp_wht.low_pass_l1(k, n)) for k in range(1, 2 * n)] == sizes
    for k in range(1, 2 * n - 1):
        assert set(lbp_wht.low_pass_l1(k, n)) < set(lbp_wht.low_pass_l1(k + 1, n))
    for k in range(1, n + 1):
        assert set(lbp_wht.low_pass_l1(k, n)) <= set(lbp_wht.low_pass_linf(k, n))
        assert len(lbp_wht.low_pass_linf(k, n)) == k * k


def test_02_index_sets_are_listed_row_major_in_sequency_order():
    assert lbp_wht.parse_bases("LP_L1-3") == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0)]
    assert lbp_wht.parse_bases("DC") == [(0, 0)]
    assert lbp_wht.parse_bases([(3, 1), (0, 2)]) == [(3, 1), (0, 2)]


@pytest.mark.parametrize("pairs", [lbp_wht.low_pass_l1(4), lbp_wht.low_pass_linf(3), [(7, 7), (0, 0), (3, 5)]])
def test_02_projector(pairs):
    m = basis_matrix(pairs)
    assert torch.equal(m @ m.T, 64 * torch.eye(len(pairs), dtype=m.dtype))
    projector = m.T @ m / 64
    close(projector @ projector, projector)
    assert torch.equal(projector, projector.T) and projector.trace().item() == pytest.approx(len(pairs))


# 3. the forward pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_03_forward_is_bitwise_the_stock_layer(dtype):
    stock = nn.Sequential(nn.Linear(24, 40)).to(dtype)
    model = copy.deepcopy(stock)
    model[0] = lbp_wht._wrap(model[0], Setting("0", "tokens", (7, 7), 1, ((0, 0),), ((0, 0),)))
    x = torch.randn(2, 50, 24, dtype=dtype, requires_grad=True)
    for training in (True, False):
        assert torch.equal(model.train(training)(x), stock.train(training)(x))


# 4. - 6. against autograd and against the dense oracle


@pytest.mark.parametrize("h, w", ALIGNED)
@pytest.mark.parametrize("reflect", [False, True])
def test_04_full_rank_on_aligned_grids_is_exact(h, w, reflect):
    x, weight, bias, g = case(h, w)
    _, g_x, g_w, g_b = run(x, weight, bias, g, lbp_wht.low_pass_linf(8), h, w, reflect=reflect)
    close(g_x, g @ weight)
    close(g_w, torch.einsum("blo,bli->oi", g, x))
    close(g_b, g.sum((0, 1)))


@pytest.mark.parametrize("h, w", PADDED)
def test_05_full_rank_on_padded_grids(h, w):
    x, weight, bias, g = case(h, w, batch=2, ci=3, co=2)
    exact_w = torch.einsum("blo,bli->oi", g, x)
    everything = lbp_wht.low_pass_linf(8)
    _, g_x, g_w, _ = run(x, weight, bias, g, everything, h, w)
    close(g_x, g @ weight)
    close(g_w, exact_w)
    _, g_x, g_w, _ = run(x, weight, bias, g, everything, h, w, reflect=True)
    multiplicity = padding_matrix(h, w, reflect=True)[0].sum(0)
    close(g_x, g @ weight)
    close(g_w, torch.einsum("blo,l,bli->oi", g, multiplicity, x))
    assert (g_w - exact_w).norm() > 0.1 * exact_w.norm()  # the bias of the released code is real


def test_05_a_mirrored_corner_counts_four_times():
    multiplicity = padding_matrix(7, 7, reflect=True)[0].sum(0).reshape(7, 7)
    assert multiplicity.sum() == 64 and multiplicity[1, 1] == 4 and multiplicity[1, 0] == 2 and multiplicity[0, 0] == 1


@pytest.mark.parametrize("reflect", [False, True])
@pytest.mark.parametrize("h, w", [*ALIGNED, *PADDED[:3]])
@pytest.mark.parametrize("pairs", [lbp_wht.low_pass_l1(4), [(5, 2), (0, 0), (7, 7)]], ids=["LP_L1-4", "scattered"])
def test_06_projection_form(h, w, pairs, reflect):
    x, weight, bias, g = case(h, w)
    _, g_x, g_w, g_b = run(x, weight, bias, g, pairs, h, w, reflect=reflect)
    expected_x, expected_w = oracle(x, g, weight, pairs, h, w, reflect=reflect)
    close(g_x, expected_x)
    close(g_w, expected_w)
    close(g_b, g.sum((0, 1)))


def test_06_on_aligned_grids_projecting_both_loses_nothing_over_projecting_one():
    x, weight, bias, g = case(16, 16)
    pairs = lbp_wht.low_pass_l1(3)
    bases = [s for p in pairs for s in p]
    project = lambda t: walsh.expand(walsh.project(t, 16, 16, 0, bases), 16, 16, 0, bases)  # noqa: E731
    _, g_x, g_w, _ = run(x, weight, bias, g, pairs, 16, 16)
    close(g_x, project(g) @ weight)
    close(g_w, torch.einsum("blo,bli->oi", g, project(x)))
    close(g_w, torch.einsum("blo,bli->oi", project(g), x))
    # 7. idempotence
    for x2, g2 in ((x, project(g)), (project(x), g), (project(x), project(g))):
        _, again_x, again_w, _ = run(x2, weight, bias, g2, pairs, 16, 16)
        close(again_x, g_x)
        close(again_w, g_w)


def test_08_nulls():
    h = w = 16
    x, weight, bias, _ = case(h, w)
    kept, dropped = lbp_wht.low_pass_l1(3), (5, 2)

    def image(r, c):
        m = basis_matrix([(r, c)]).reshape(8, 8).repeat(2, 2).reshape(1, h * w, 1)
        return m * double(3, 1, 6)

    g = image(*dropped)
    _, g_x, g_w, g_b = run(x, weight, bias, g, kept, h, w)
    assert g_x.abs().max() < 1e-12 and g_w.abs().max() < 1e-10 and g_b.abs().max() < 1e-10
    g = image(1, 1)
    _, g_x, g_w, _ = run(x, weight, bias, g, kept, h, w)
    close(g_x, g @ weight)
    close(g_w, torch.einsum("blo,bli->oi", g, x))
    for flat_x, flat_g in ((True, False), (False, True)):
        constant = double(3, 2, 2, 1).expand(3, 2, 2, 64).reshape(3, 2, 2, 8, 8).transpose(2, 3).reshape(3, h * w, 1)
        x2 = constant * double(1, 1, 5) if flat_x else x
        g2 = constant * double(1, 1, 6) if flat_g else double(3, h * w, 6)
        _, _, g_w, _ = run(x2, weight, bias, g2, [(0, 0), (3, 4)], h, w)
        close(g_w, torch.einsum("blo,bli->oi", g2, x2))


def test_09_parseval_and_error():
    h = w = 16
    x, weight, bias, g = case(h, w)
    everything = [s for p in lbp_wht.low_pass_linf(8) for s in p]
    g_hat = walsh.project(g, h, w, 0, everything)
    close(g_hat.square().sum(), g.square().sum())  # orthonormal: the 64 of the specification is in the basis
    products = (g_hat @ weight).unflatten(1, (4, 64)).square().sum(dim=(0, 1, 3))
    errors = []
    for k in range(1, 16):
        pairs = lbp_wht.low_pass_l1(k)
        _, g_x, _, _ = run(x, weight, bias, g, pairs, h, w)
        errors.append((g @ weight - g_x).square().sum())
        dropped = [i for i, p in enumerate(lbp_wht.low_pass_linf(8)) if p not in pairs]
        close(errors[-1], products[dropped].sum(), 1e-9)
    assert all(a >= b - 1e-9 for a, b in zip(errors, errors[1:], strict=False))


def test_10_input_gradient_descends_and_the_weight_gradient_need_not():
    h = w = 8
    x, weight, bias, g = case(h, w)
    _, g_x, _, _ = run(x, weight, bias, g, lbp_wht.low_pass_l1(3), h, w)
    exact = g @ weight
    close((g_x * exact).sum(), g_x.square().sum())
    close(F.cosine_similarity(g_x.flatten(), exact.flatten(), 0), g_x.norm() / exact.norm())
    # a counter-example, so that nobody "fixes" it: the kept part of x and g correlates against the dropped part
    low, high = (basis_matrix([p]).reshape(1, 64, 1) for p in ((0, 0), (7, 7)))
    x, g = low + 2 * high, low - 2 * high
    _, _, g_w, _ = run(x, double(1, 1), double(1), g, [(0, 0)], 8, 8)
    exact_w = torch.einsum("blo,bli->oi", g, x)
    assert (g_w * exact_w).sum() < 0


@pytest.mark.parametrize("reflect", [False, True])
@pytest.mark.parametrize("pairs", [[(0, 0)], [(2, 3)], lbp_wht.low_pass_l1(5)], ids=["DC", "no DC", "LP_L1-5"])
@pytest.mark.parametrize("h, w, prefix", [(8, 8, 0), (7, 7, 2), (14, 14, 1)])
def test_11_bias_gradient_is_exact(h, w, prefix, pairs, reflect):
    x, weight, bias, g = case(h, w, prefix=prefix)
    *_, g_b = run(x, weight, bias, g, pairs, h, w, prefix=prefix, reflect=reflect)
    close(g_b, g.sum((0, 1)))
    *_, g_b = run(*(t.float() for t in (x, weight, bias, g)), pairs, h, w, prefix=prefix, reflect=reflect)
    torch.testing.assert_close(g_b, g.sum((0, 1)).float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("h, w, prefix, pairs", [(7, 7, 0, 3), (8, 8, 0, 10), (14, 14, 1, 10)])
def test_12_saved_bytes(h, w, prefix, pairs):
    ci, co, batch = 24, 16, 3
    bases = lbp_wht.low_pass_l1({3: 2, 10: 4}[pairs])
    model = nn.Linear(ci, co)
    layer = lbp_wht._wrap(model, Setting("l", "tokens", (h, w), prefix, tuple(bases), tuple(bases)))
    x = torch.randn(batch, prefix + h * w, ci, requires_grad=True)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        layer(x)
    rows = prefix + pairs * (-(-h // 8)) * (-(-w // 8))
    activations = [t for t in packed if t.untyped_storage().data_ptr() != layer.weight.untyped_storage().data_ptr()]
    assert [tuple(t.shape) for t in activations] == [(batch, rows, ci)]
    assert all(t.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() for t in packed)
    assert len(packed) == 2  # the weight itself, by reference, and the projection
    site = lbp_wht.Site("l", "tokens", (h, w), prefix, ci, co)
    with cost.saved(layer) as measured:
        y = layer(x)
    assert measured.bytes == batch * site.saved_bytes(pairs) and y.requires_grad
    if not prefix:
        assert site.saved_bytes(None) / site.saved_bytes(pairs) == pytest.approx(h * w / rows)


@pytest.mark.parametrize("reflect", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_13_convolution_equals_linear(channels_last, reflect):
    h, w, pairs = 7, 14, tuple(lbp_wht.low_pass_l1(4))
    x, weight, bias, g = case(h, w)
    _, g_x, g_w, g_b = run(x, weight, bias, g, pairs, h, w, reflect=reflect)
    maps = x.transpose(1, 2).unflatten(2, (h, w))
    maps = maps.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    conv = nn.Conv2d(5, 6, 1).double()
    with torch.no_grad():
        conv.weight.copy_(weight[:, :, None, None])
        conv.bias.copy_(bias)
    stock = conv(maps)
    layer = lbp_wht._wrap(conv, Setting("c", "chw", None, 0, pairs, pairs, 8, reflect))
    maps.requires_grad_()
    y = layer(maps)
    assert torch.equal(y, stock)
    y.backward(g.transpose(1, 2).unflatten(2, (h, w)))
    close(maps.grad.flatten(2).transpose(1, 2), g_x)
    close(layer.weight.grad[:, :, 0, 0], g_w)
    close(layer.bias.grad, g_b)


def test_14_windows_equal_the_whole_grid():
    x, weight, bias, g = case(16, 24)
    pairs = lbp_wht.low_pass_l1(4)
    _, g_x, g_w, _ = run(x, weight, bias, g, pairs, 16, 24)

    def windows(t):
        t = t.unflatten(1, (2, 8, 3, 8)).permute(0, 1, 3, 2, 4, 5)
        return t.reshape(-1, 64, t.shape[-1])

    _, w_x, w_w, _ = run(windows(x), weight, bias, windows(g), pairs, 8, 8)
    close(w_x, windows(g_x))
    close(w_w, g_w)


def test_15_equivariance():
    h, w, pairs = 16, 24, lbp_wht.low_pass_l1(3)
    x, weight, bias, g = case(h, w)
    _, g_x, g_w, _ = run(x, weight, bias, g, pairs, h, w)
    as_grid = lambda t: t.unflatten(1, (h, w))  # noqa: E731
    shifted = lambda t, by: as_grid(t).roll(by, dims=(1, 2)).flatten(1, 2)  # noqa: E731
    _, s_x, s_w, _ = run(shifted(x, (8, 16)), weight, bias, shifted(g, (8, 16)), pairs, h, w)
    close(s_x, shifted(g_x, (8, 16)))
    close(s_w, g_w)
    _, _, o_w, _ = run(shifted(x, (3, 0)), weight, bias, shifted(g, (3, 0)), pairs, h, w)
    assert (o_w - g_w).norm() > 1e-3 * g_w.norm()  # a shift that cuts through the blocks is no symmetry
    turned = lambda t: as_grid(t).transpose(1, 2).flatten(1, 2)  # noqa: E731
    _, t_x, t_w, _ = run(turned(x), weight, bias, turned(g), pairs, w, h)
    close(t_x, g_x.unflatten(1, (h, w)).transpose(1, 2).flatten(1, 2))
    close(t_w, g_w)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_16_extra_tokens_are_exact(prefix):
    h = w = 14
    x, weight, bias, g = case(h, w, prefix=prefix)
    pairs = lbp_wht.low_pass_l1(3)
    _, g_x, g_w, _ = run(x, weight, bias, g, pairs, h, w, prefix=prefix)
    expected_x, expected_w = oracle(x[:, prefix:], g[:, prefix:], weight, pairs, h, w)
    close(g_x[:, prefix:], expected_x)
    close(g_x[:, :prefix], g[:, :prefix] @ weight)
    close(g_w, expected_w + torch.einsum("blo,bli->oi", g[:, :prefix], x[:, :prefix]))


def test_17_batches_add_up():
    x, weight, bias, g = case(7, 7, batch=4)
    pairs = lbp_wht.low_pass_l1(4)
    whole = run(x, weight, bias, g, pairs, 7, 7)
    parts = [run(x[i : i + 1], weight, bias, g[i : i + 1], pairs, 7, 7) for i in range(4)]
    close(whole[1], torch.cat([p[1] for p in parts]))
    for i in (2, 3):
        close(whole[i], sum(p[i] for p in parts))


class Counted(torch.utils._python_dispatch.TorchDispatchMode):
    """Names of the ops that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "needs, forward_projections, backward_projections, products, saved",
    [
        ("xwb", 1, 1, 2, 2),
        ("x", 0, 1, 1, 1),  # frozen layer: no x-hat, no weight product
        ("w", 1, 1, 1, 1),  # first trained layer: no input product, no weight kept
        ("xb", 0, 1, 1, 1),
        ("b", 0, 0, 0, 0),
        ("", 0, 0, 0, 0),
    ],
)
def test_18_only_what_is_needed(needs, forward_projections, backward_projections, products, saved):
    x, weight, bias, g = case(7, 7)
    for name, tensor in (("x", x), ("w", weight), ("b", bias)):
        tensor.requires_grad_(name in needs)
    bases = tuple(lbp_wht.low_pass_l1(2))
    packed = []
    setting = Setting("l", "tokens", (7, 7), 0, bases, bases)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t), Counted() as counted:
        y = lbp_wht.linear(x, weight, bias, setting, (7, 7))
    assert counted.names.count("walsh_project") == forward_projections and len(packed) == saved
    if needs:
        with Counted() as counted:
            y.backward(g)
        assert counted.names.count("walsh_project") == backward_projections
        assert sum(counted.names.count(name) for name in ("mm", "bmm", "addmm")) == products
    assert [t.grad is not None for t in (x, weight, bias)] == [name in needs for name in "xwb"]


def test_18_frozen_or_evaluating_layers_cost_nothing():
    stock = nn.Linear(24, 32)
    x, bases = torch.randn(2, 49, 24), ((0, 0),)
    layer = lbp_wht._wrap(copy.deepcopy(stock), Setting("l", "tokens", (7, 7), 0, bases, bases)).requires_grad_(False)
    ops = {}
    for name, module in (("stock", stock.requires_grad_(False)), ("ours", layer)):
        with Counted() as counted:
            module(x)
        ops[name] = counted.names
    assert ops["ours"] == ops["stock"]
    layer.requires_grad_(True).eval()
    x.requires_grad_()
    layer(x).square().sum().backward()
    stock.requires_grad_(True)
    reference = stock(x2 := x.detach().clone().requires_grad_())
    reference.square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, stock.weight.grad)
    torch.testing.assert_close(x.grad, x2.grad)


def test_19_gradcheck_passes_at_full_rank_only_and_there_is_no_second_derivative():
    x, weight, bias, _ = case(4, 4, ci=2, co=2, batch=1)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]

    def layer(pairs):
        setting = Setting("l", "tokens", (4, 4), 0, tuple(pairs), tuple(pairs), 4)
        return lambda *a: lbp_wht.linear(*a, setting, (4, 4))

    assert torch.autograd.gradcheck(layer(lbp_wht.low_pass_linf(4, 4)), inputs)
    assert not torch.autograd.gradcheck(layer(lbp_wht.low_pass_l1(2, 4)), inputs, raise_exception=False)
    (g_x,) = torch.autograd.grad(layer(lbp_wht.low_pass_l1(2, 4))(*inputs).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g_x.sum().backward()


@pytest.mark.parametrize("n", [4, 16])
@pytest.mark.parametrize("h, w", [(8, 12), (3, 2), (1, 5), (17, 16)])
def test_20_other_orders_and_tiny_grids(n, h, w):
    x, weight, bias, g = case(h, w)
    for pairs in (lbp_wht.low_pass_l1(3, n), lbp_wht.low_pass_linf(n, n)):
        _, g_x, g_w, g_b = run(x, weight, bias, g, pairs, h, w, n=n)
        expected_x, expected_w = oracle(x, g, weight, pairs, h, w, n)
        close(g_x, expected_x)
        close(g_w, expected_w)
        close(g_b, g.sum((0, 1)))
    close(g_w, torch.einsum("blo,bli->oi", g, x))  # all bases, zero padding: exact


# 22. cost


def test_22_flops_of_the_specification():
    with torch.device("meta"):
        model = timm.create_model("efficientformer_l1")
    stage = lbp_wht.last_stage(model)
    layers, _ = lbp_wht.find_sites(model, lambda n, m: n.startswith(stage))
    mega = lambda values: round(sum(values) / 1e6, 2)  # noqa: E731
    assert len(layers) == 10
    assert mega(s.exact_flops() for s in layers) == 1483.60
    assert mega(s.flops(3) for s in layers) == 96.94 and mega(s.flops(36) for s in layers) == 1163.28
    assert mega(s.flops(3, rule="instant") for s in layers) == 94.71
    assert mega(s.flops(36, rule="instant") for s in layers) == 1227.18
    with pytest.raises(ValueError, match="rule 'mine' is neither"):
        sites.flops(1, 1, 1, 1, rule="mine")


def test_22_the_dispatcher_picks_exact_where_nothing_is_saved():
    model = timm.create_model("vit_tiny_patch16_224", img_size=112, depth=1)  # 7x7 tokens
    report = lbp_wht.attach(model, "LP_L1-10")  # 49 bases of 49 tokens
    assert not report.matched and "blocks.0.mlp.fc1" in report.skipped
    assert "exact: 49 bases make 50 rows of 50 tokens" in report.skipped["blocks.0.mlp.fc1"]
    lbp_wht.detach(model)  # pairs of attach and detach work even where every layer stayed exact
    assert len(lbp_wht.attach(model, "LP_L1-10", exact_when="never").matched) == 4


def test_22_the_dispatcher_obeys_the_measured_table(monkeypatch):
    table = [
        {"device": "cpu", "min_width": 0, "max_rows_ratio": 0.1},
        {"device": "cpu", "min_width": 200, "max_rows_ratio": 0.9},
        {"device": "cuda", "min_width": 0, "max_rows_ratio": 1.0},
    ]
    monkeypatch.setattr(lbp_wht, "_slower_table", lambda: table)
    narrow, wide = (
        timm.create_model("vit_tiny_patch16_224", img_size=112, depth=1, embed_dim=e, num_heads=3) for e in (96, 240)
    )
    report = lbp_wht.attach(narrow, "LP_L1-4")
    assert not report.matched
    assert report.skipped["blocks.0.mlp.fc1"] == "exact: measured slower at 11/50 rows and width 96 on cpu"
    assert len(lbp_wht.attach(wide, "LP_L1-4").matched) == 4


def test_22_the_table_in_the_package_is_one():
    rows = json.loads((Path(lbp_wht.__file__).parent / "assets" / "lbp_exact_is_faster.json").read_text())["rows"]
    assert {"cpu"} <= {row["device"] for row in rows}
    for device in {row["device"] for row in rows}:
        ours = sorted((row["min_width"], row["max_rows_ratio"]) for row in rows if row["device"] == device)
        assert ours[0][0] == 0 and all(0 <= ratio <= 1 for _, ratio in ours)


# 23. checkpoints, attach and detach


def small_vit(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=112, depth=3, num_classes=5, **kwargs)


def test_23_state_dict_and_round_trip():
    stock = small_vit()
    model = copy.deepcopy(stock)
    modules = dict(model.named_modules())
    lbp_wht.attach(model, "LP_L1-2", gelu_input=torch.bfloat16)
    assert list(model.state_dict()) == list(stock.state_dict())
    model.load_state_dict(stock.state_dict(), strict=True)
    stock.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(2, 3, 112, 112)
    assert torch.equal(model(x), stock(x)) and torch.equal(model.eval()(x), stock.eval()(x))
    model.train()
    model(x).square().sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.01 * p.grad
    trained = {k: v.clone() for k, v in model.state_dict().items()}
    lbp_wht.detach(model)
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in modules.items()}
    assert all(torch.equal(v, trained[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match="not attached"):
        lbp_wht.detach(model)


FAMILIES = {
    # name: (kwargs, layers treated, one site: (name, layout, grid, prefix, calls))
    "deit_tiny_patch16_224": ({}, 48, ("blocks.3.attn.qkv", "tokens", (14, 14), 1, 1)),
    "vit_small_patch14_reg4_dinov2": ({"img_size": 98}, 48, ("blocks.0.mlp.fc1", "tokens", (7, 7), 5, 1)),
    "vit_base_patch32_clip_quickgelu_224": ({}, 48, ("blocks.11.mlp.fc2", "tokens", (7, 7), 1, 1)),
    "efficientformer_l1": ({}, 32, ("stages.0.blocks.0.mlp.fc1", "chw", (56, 56), 0, 1)),
    "efficientformerv2_s0": ({}, 48, ("stages.3.blocks.3.token_mixer.q.conv", "chw", (7, 7), 0, 1)),
    "swinv2_small_window8_256": ({}, 99, ("layers.2.blocks.5.attn.qkv", "tokens", (8, 8), 0, 4)),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_golden_shapes(name):
    kwargs, count, expected = FAMILIES[name]
    with torch.device("meta"):
        model = timm.create_model(name, **kwargs)
    layers, skipped = lbp_wht.find_sites(model)
    assert len(layers) == count
    site = next(s for s in layers if s.name == expected[0])
    assert (site.name, site.layout, site.grid, site.prefix, site.calls) == expected
    assert all("head" in n or "cpb_mlp" in n or "talking_head" in n for n in skipped)


@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("swinv2_cr_tiny_ns_224", {"img_size": 64, "window_size": 2}),
        ("swinv2_tiny_window8_256", {"img_size": 64, "depths": (1, 1, 1, 1)}),
        ("beit_base_patch16_224", {"depth": 2}),
        ("efficientformerv2_s0", {}),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 56, "depth": 2}),
    ],
)
def test_24_every_wrapped_layer_is_used_and_the_forward_is_unchanged(name, kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, drop_path_rate=0.0, **kwargs).train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    stock = copy.deepcopy(model)
    report = lbp_wht.attach(model, "LP_L1-2", exact_when="never")
    calls = dict.fromkeys(report.matched, 0)

    def count(layer):
        return lambda *_: calls.update({layer: calls[layer] + 1})

    for layer in report.matched:
        model.get_submodule(layer).register_forward_hook(count(layer))
    x = torch.randn(
        2, 3, *(model.pretrained_cfg["input_size"][1:] if not kwargs.get("img_size") else [kwargs["img_size"]] * 2)
    )
    y, y_stock = model(x), stock(x)
    assert torch.equal(y, y_stock)
    y.square().sum().backward()
    assert min(calls.values()) >= 1
    assert all(model.get_submodule(n).weight.grad is not None for n in report.matched)


def test_swinv2_qkv_really_gets_low_rank_gradients():
    torch.manual_seed(0)
    model = timm.create_model("swinv2_tiny_window8_256", img_size=64, depths=(1, 1, 1, 1), num_classes=3).train()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)  # SwinV2 starts its residual branches at zero
    reference = copy.deepcopy(model)
    chosen = "layers.0.blocks.0.attn.qkv"
    report = lbp_wht.attach(model, "DC", match=lambda n, m: n == chosen)
    assert report.matched == [chosen]
    assert [n for n, m in model.named_modules() if getattr(m, "qkv_bias_separate", False)] == [chosen[:-4]]
    x = torch.randn(2, 3, 64, 64)
    for m in (model, reference):
        m(x).square().sum().backward()
    exact, ours = (m.get_submodule(chosen).weight.grad for m in (reference, model))
    assert (exact - ours).norm() > 1e-3 * exact.norm()
    lbp_wht.detach(model)
    assert not any(getattr(m, "qkv_bias_separate", False) for m in model.modules())


# scopes, paths, composition


def test_scopes():
    model = small_vit()
    report = lbp_wht.attach(model, "LP_L1-2", scope="last")
    assert {n.split(".")[1] for n in report.matched} == {"2"}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if n.startswith(("blocks.2.", "head."))}
    lbp_wht.detach(model)
    report = lbp_wht.attach(model, "LP_L1-2", scope="full")
    assert len(report.matched) == 12 and report.trainable == report.total
    assert "12 layers" in str(report)
    with torch.device("meta"):
        stages = {
            n: lbp_wht.last_stage(timm.create_model(n)) for n in ("efficientformerv2_s0", "swinv2_tiny_window8_256")
        }
    assert stages == {"efficientformerv2_s0": ("stages.3.blocks.",), "swinv2_tiny_window8_256": ("layers.3.",)}


def test_talking_heads_stay_exact_unless_asked_for():
    with torch.device("meta"):
        model = timm.create_model("efficientformerv2_s0")
    report = lbp_wht.attach(model, "LP_L1-2", scope="last")
    assert len(report.matched) == 16
    assert "narrower than 16" in report.skipped["stages.3.blocks.2.token_mixer.talking_head1"]
    lbp_wht.detach(model)
    assert len(lbp_wht.attach(model, "LP_L1-2", scope="last", match=lambda n, m: True).matched) == 20


def test_separate_ranks_of_the_two_gradients():
    x, weight, bias, g = case(14, 14)
    low, high = lbp_wht.low_pass_l1(2), lbp_wht.low_pass_l1(5)
    exact_x, exact_w = g @ weight, torch.einsum("blo,bli->oi", g, x)
    for first, second in ((low, high), (None, low), (low, None)):
        _, g_x, g_w, g_b = run(x, weight, bias, g, first, 14, 14, weight_pairs=second)
        close(g_x, exact_x if first is None else oracle(x, g, weight, first, 14, 14)[0])
        close(g_w, exact_w if second is None else oracle(x, g, weight, second, 14, 14)[1])
        close(g_b, g.sum((0, 1)))
    model = small_vit()
    lbp_wht.attach(model, "exact", weight_bases="LP_L1-2")
    setting = next(iter(lbp_wht.setting_of(model).values()))
    assert setting.bases is None and len(setting.weight_bases) == 3


def test_lhe_keeps_the_bases_with_most_energy():
    model = small_vit()
    x, labels = torch.randn(4, 3, 112, 112), torch.tensor([0, 1, 2, 3])
    marker = torch.ones_like(model.head.weight)
    model.head.weight.grad = marker

    def loss():
        return F.cross_entropy(model(x), labels)

    energy = lbp_wht.gradient_energy(model, loss)
    assert model.head.weight.grad is marker and torch.equal(marker, torch.ones_like(marker))
    assert len(energy) == 12 and all(e.shape == (8, 8) for e in energy.values())
    # Parseval: all coefficients together hold the energy of the layer's spatial gradient
    grads = {}
    layer = model.blocks[1].mlp.fc1

    def keep(module, inputs, output):
        output.register_hook(lambda g: grads.update(g=g))

    handle = layer.register_forward_hook(keep)
    loss().backward()
    handle.remove()
    close(energy["blocks.1.mlp.fc1"].sum(), grads["g"][:, 1:].double().square().sum(), 1e-5)
    lbp_wht.attach(model, "LHE-5", energy=energy)
    for name, setting in lbp_wht.setting_of(model).items():
        kept = sum(energy[name][r, c] for r, c in setting.bases)
        assert kept == pytest.approx(energy[name].flatten().topk(5).values.sum().item())
    attached = lbp_wht.gradient_energy(model, loss)  # measured with exact gradients even while attached
    for name in energy:
        close(attached[name], energy[name], 1e-4)
    lbp_wht.detach(model)
    lbp_wht.attach(model, "LHE-5", energy=energy, shared=True)
    assert len({s.bases for s in lbp_wht.setting_of(model).values()}) == 1


def test_lhe_on_swinv2_sees_its_qkv():
    torch.manual_seed(0)
    model = timm.create_model("swinv2_tiny_window8_256", img_size=64, depths=(1, 1, 1, 1), num_classes=3)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)  # SwinV2 starts its residual branches at zero
    energy = lbp_wht.gradient_energy(model, lambda: model(torch.randn(2, 3, 64, 64)).square().sum())
    assert not any(getattr(m, "qkv_bias_separate", False) for m in model.modules())
    report = lbp_wht.attach(model, "LHE-3", energy=energy, exact_when="never")
    assert set(report.matched) == set(energy) and any(n.endswith("qkv") for n in energy)


@pytest.mark.parametrize(
    "energy, message",
    [
        (torch.full((8, 8), float("nan")), "blocks.0.attn.qkv: LHE-5: the gradient energy is not finite: nan"),
        (torch.ones(4, 4), r"energy of shape \(4, 4\) is not of order 8"),
    ],
)
def test_lhe_refuses_energies_that_say_nothing(energy, message):
    model = small_vit()
    everywhere = {n: torch.ones(8, 8) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    with pytest.raises(ValueError, match=message):
        lbp_wht.attach(model, "LHE-5", energy=everywhere | {"blocks.0.attn.qkv": energy})
    nn.init.zeros_(model.head.weight)
    silent = lbp_wht.gradient_energy(model, lambda: model(torch.randn(2, 3, 112, 112)).sum())
    with pytest.raises(ValueError, match="energy of every layer is zero.*a head that is still zero"):
        lbp_wht.attach(model, "LHE-5", energy=silent)
    assert not lbp_wht.setting_of(model)


def test_what_does_not_fit_is_refused_by_every_entry():
    model = small_vit()
    for how, message in (({"pad": "mirror"}, "pad 'mirror' is neither"), ({"order": 7}, "order 7 is not one of")):
        with pytest.raises(ValueError, match=message):
            lbp_wht.gradient_energy(model, lambda: model(torch.randn(2, 3, 112, 112)).sum(), **how)
        with pytest.raises(ValueError, match=message):
            lbp_wht.attach(model, "exact", **how)
    with pytest.raises(ValueError, match="prefix_tokens=1 belongs to a grid"):
        lbp_wht.attach(model, "LP_L1-2", prefix_tokens=1)
    assert not lbp_wht.setting_of(model)


def test_gradient_energy_and_flop_counts_leave_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)).train()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(2, 16, 8, 8)
    lbp_wht.gradient_energy(model, lambda: model(x).square().sum(), example=x)
    cost.training_flops(model, x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))


def test_models_whose_tokens_are_no_grid():
    with torch.device("meta"):
        mixer = timm.create_model("mixer_l16_224", num_classes=3)
        nest, hiera = timm.create_model("nest_tiny"), timm.create_model("hiera_tiny_224")
        xcit = timm.create_model("xcit_nano_12_p16_224")
        volo = timm.create_model("volo_d1_224")
    layers, skipped = lbp_wht.find_sites(mixer)
    assert layers and all("mlp_channels" in s.name and s.grid == (14, 14) for s in layers)
    assert "form no known grid" in skipped["blocks.0.mlp_tokens.fc1"]
    for model in (nest, hiera):
        with pytest.raises(ValueError, match="keeps its tokens .*, not row by row"):
            lbp_wht.find_sites(model)
    assert all(s.grid == (14, 14) for s in lbp_wht.find_sites(xcit)[0])
    assert "aux_head" in lbp_wht.find_sites(volo)[1]


def test_a_shared_layer_is_replaced_under_all_its_names():
    model = small_vit()
    model.blocks[1].mlp.fc1 = model.blocks[0].mlp.fc1
    lbp_wht.attach(model, "DC")
    assert isinstance(model.blocks[1].mlp.fc1, LBPLinear) and model.blocks[1].mlp.fc1 is model.blocks[0].mlp.fc1


def test_scope_beside_adapters_is_refused():
    model = small_vit()
    baselines.lora(model, rank=4)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(ValueError, match="scope 'last' would unfreeze the weights under blocks.0.attn.qkv.lora_A"):
        lbp_wht.attach(model, "DC", scope="last")
    report = lbp_wht.attach(model, "DC")
    assert "blocks.0.attn.qkv.base" in report.matched
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained


def grads_of(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_composes_with_gradient_checkpointing():
    model, x = small_vit().double(), double(2, 3, 112, 112)
    lbp_wht.attach(model, "LP_L1-3")
    plain = grads_of(model, x)
    model.set_grad_checkpointing(True)
    close(grads_of(model, x), plain)


def test_composes_with_mixed_precision():
    model, x = small_vit(), torch.randn(2, 3, 112, 112)
    lbp_wht.attach(model, "LP_L1-3")
    full = grads_of(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
        assert y.dtype == torch.bfloat16
        model.zero_grad()
        loss = y.float().square().sum()
    loss.backward()
    mixed = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert mixed.dtype == torch.float32 and F.cosine_similarity(mixed, full, 0) > 0.99
    layer, tokens = model.blocks[0].mlp.fc1, torch.randn(2, 50, 192, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16), cost.saved(layer) as measured:
        layer(tokens)
    assert measured.bytes == 2 * (1 + 6) * 192 * 2  # what is kept is the low-precision copy


@pytest.mark.filterwarnings("ignore")  # the compiler's own warnings
def test_compiles_as_one_graph():
    model, x = small_vit().double(), double(2, 3, 112, 112)
    lbp_wht.attach(model, "LP_L1-3")
    expected = grads_of(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    compiled(x).square().sum().backward()
    close(torch.cat([p.grad.flatten() for p in model.parameters()]), expected, 1e-8)


def _averaged_gradients(rank, path):
    """Gradients of one of two processes, each with its half of the batch."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    model = small_vit().double()
    lbp_wht.attach(model, "LP_L1-3")
    half = whole_batch()[2 * rank : 2 * rank + 2]
    parallel = nn.parallel.DistributedDataParallel(model)  # kept alive: it averages during the backward pass
    parallel(half).square().mean().backward()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def whole_batch():
    return torch.linspace(-1, 1, 4 * 3 * 112 * 112, dtype=torch.float64).reshape(4, 3, 112, 112).mul(1e4).sin()


def test_several_processes_average_their_gradients(tmp_path):
    other = torch.multiprocessing.get_context("spawn").Process(target=_averaged_gradients, args=(1, tmp_path / "store"))
    other.start()
    got = _averaged_gradients(0, tmp_path / "store")
    other.join()
    model = small_vit().double()
    lbp_wht.attach(model, "LP_L1-3")
    model(whole_batch()).square().mean().backward()
    close(got, torch.cat([p.grad.flatten() for p in model.parameters()]), 1e-9)


def test_low_precision_gelu():
    model, x = small_vit(), torch.randn(2, 3, 112, 112)
    reference = copy.deepcopy(model)
    before = cost.saved_bytes(model, x)
    report = lbp_wht.attach(model, "exact", weight_bases="LP_L1-4", gelu_input=torch.bfloat16)
    assert "3 GELU inputs are saved as bfloat16" in report.notes
    assert torch.equal(model(x), reference(x))
    after = cost.saved_bytes(model, x)
    lbp_wht.detach(model)
    lbp_wht.attach(model, "exact", weight_bases="LP_L1-4")
    without = cost.saved_bytes(model, x)
    assert before > without > after and without - after == 3 * 2 * 50 * 4 * 192 * 2
    lbp_wht.detach(model)
    clip = timm.create_model("vit_base_patch32_clip_quickgelu_224", depth=1)
    assert "does nothing here" in lbp_wht.attach(clip, "DC", gelu_input=torch.bfloat16).notes[0]
    lbp_wht.attach(model, lbp_wht.low_pass_linf(8), exact_when="never", gelu_input=torch.bfloat16)
    exact, ours = grads_of(reference, x), grads_of(model, x)
    assert 0 < (exact - ours).norm() < 0.01 * exact.norm()


def test_channels_last_input_and_grids_that_change():
    layer = lbp_wht._wrap(nn.Linear(4, 3).double(), Setting("l", "hwc", None, 0, ((0, 0), (0, 1)), ((0, 0), (0, 1))))
    for h, w in ((7, 7), (14, 10)):
        x = double(2, h, w, 4, requires_grad=True)
        g = double(2, h, w, 3)
        layer.weight.grad = None
        layer(x).backward(g)
        flat_x, flat_g = x.detach().flatten(1, 2), g.flatten(1, 2)
        expected_x, expected_w = oracle(flat_x, flat_g, layer.weight.detach(), [(0, 0), (0, 1)], h, w)
        close(x.grad.flatten(1, 2), expected_x)
        close(layer.weight.grad, expected_w)


# bad input


@pytest.mark.parametrize(
    "bases, order, message",
    [
        ("LP_L2-3", 8, "unknown family 'LP_L2', did you mean 'LP_L1'"),
        ("LP_L1-16", 8, "LP_L1 of order 8 takes a size from 1 to 15"),
        ("LP_L1-x", 8, "takes a size from 1 to 15"),
        ("LP_Linf-5", 4, "takes a size from 1 to 4"),
        ("LHE-65", 8, "LHE of order 8 takes a size from 1 to 64"),
        ("LHE-10", 8, "need energy=gradient_energy"),
        ([], 8, "no pair"),
        ([(0, 0), (0, 0)], 8, "a pair is repeated"),
        ([(0, 8)], 8, r"\(0, 8\) is outside 0..7"),
        ([1, 2], 8, r"a list of \(r, c\) pairs"),
        ([(0.5, 1)], 8, r"pairs of whole numbers, got \[\(0.5, 1\)\]"),
        ([(True, False)], 8, "pairs of whole numbers"),
        (["01", "10"], 8, "pairs of whole numbers"),
        ("LP_L1-\uff11", 8, "takes a size from 1 to 15"),
        (4, 8, "a name or a list"),
        (None, 8, "a name or a list"),
        ("LP_L1-2", 5, "order 5 is not one of"),
    ],
)
def test_bad_bases_leave_the_model_alone(bases, order, message):
    model = small_vit()
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message) as error:
        lbp_wht.attach(model, bases, order=order, scope="last")
    assert not str(error.value).startswith("None")  # no layer is to blame
    assert not lbp_wht.setting_of(model) and [p.requires_grad for p in model.parameters()] == flags


def test_bad_arguments_of_attach():
    model = small_vit()
    for kwargs, message in [
        ({"pad": "mirror"}, "pad 'mirror'"),
        ({"scope": "half"}, "scope 'half'"),
        ({"exact_when": "maybe"}, "exact_when 'maybe'"),
        ({"match": lambda n, m: False}, "found nothing to treat in VisionTransformer: no linear layer"),
        ({"grid": (5, 5)}, r"50 tokens do not match grid=\(5, 5\)"),
        ({"grid": 7}, r"grid=7 must be a pair"),
        ({"example": torch.zeros(1, 3, 112, 112)}, "two images are needed"),
        ({"example": 32}, "example must be a batch of images .* got 32"),
        ({"gelu_input": "bfloat16"}, "gelu_input='bfloat16' is no floating-point dtype"),
        ({"gelu_input": torch.int8}, "gelu_input=torch.int8 is no floating-point dtype"),
        ({"energy": [1]}, "energy must be what gradient_energy returned, got a list"),
    ]:
        with pytest.raises(ValueError, match=message):
            lbp_wht.attach(model, **kwargs)
        assert not lbp_wht.setting_of(model)
    with pytest.raises(ValueError, match="Module has no parameters"):
        lbp_wht.attach(nn.Module())
    with pytest.raises(TypeError, match="VisionTransformer has torch.complex64 parameters"):
        with warnings.catch_warnings(action="ignore"):
            imaginary = small_vit().to(torch.complex64)
        lbp_wht.attach(imaginary)
    with pytest.raises(ValueError, match="found nothing to treat in Sequential"):
        lbp_wht.attach(nn.Sequential(nn.Conv2d(3, 8, 3)))
    tiny = timm.create_model("vit_tiny_patch16_224", img_size=48, depth=1)  # 3x3 tokens cannot be mirrored to 8x8
    with pytest.raises(ValueError, match="reflect padding of a 3-token axis"):
        lbp_wht.attach(tiny, "DC", pad="reflect")
    lbp_wht.attach(model)
    with pytest.raises(ValueError, match="attached already"):
        lbp_wht.attach(model)


def test_wrong_inputs_of_a_layer_are_named():
    model = small_vit(dynamic_img_size=True)
    lbp_wht.attach(model)
    with pytest.raises(
        ValueError, match=r"blocks.0.attn.qkv: got 65 tokens, but a 7x7 grid with 1 prefix.*attach again"
    ):
        model(torch.randn(2, 3, 128, 128))
    layer = model.blocks[0].mlp.fc1
    for dtype in (torch.int64, torch.complex64):
        with pytest.raises(TypeError, match="blocks.0.mlp.fc1: LBP-WHT needs a floating-point input"):
            layer(torch.ones(2, 50, 192).to(dtype))
    with pytest.raises(ValueError, match="3 dimensions"):
        layer(torch.ones(2, 192))
    assert isinstance(layer, LBPLinear) and not isinstance(layer, LBPConv2d)
