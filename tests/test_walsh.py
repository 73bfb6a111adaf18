"""The ops `project` and `expand`: bases, padding, adjoint, dtypes, strides, opcheck, gradcheck, compile, FLOPs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from leanvit import lbp_wht
from leanvit.kernels import walsh

GRIDS = [(7, 7, 0), (8, 8, 1), (14, 14, 1), (12, 20, 5), (5, 9, 0), (49, 49, 0)]


def flat(pairs):
    return [s for pair in pairs for s in pair]


def slow_projection(x, h, w, prefix, pairs, order, reflect):
    """Straight from the definition: build the padded image token by token, then sum over every position."""
    (ph, top), (pw, left) = walsh.padding(h, order), walsh.padding(w, order)
    walsh_rows = walsh.walsh_matrix(order)
    out = [x[:, i] for i in range(prefix)]

    def token(u, v):
        if reflect:
            u = -u if u < 0 else 2 * (h - 1) - u if u >= h else u
            v = -v if v < 0 else 2 * (w - 1) - v if v >= w else v
        return x[:, prefix + u * w + v] if 0 <= u < h and 0 <= v < w else torch.zeros_like(x[:, 0])

    for p in range(ph):
        for q in range(pw):
            for r, c in pairs:
                total = torch.zeros_like(x[:, 0])
                for i in range(order):
                    for j in range(order):
                        sign = walsh_rows[r, i] * walsh_rows[c, j]
                        total = total + sign * token(p * order + i - top, q * order + j - left)
                out.append(total / order)
    return torch.stack(out, dim=1)


@pytest.mark.parametrize("n", [2, 4, 8, 16])
def test_walsh_matrix_is_orthogonal_symmetric_and_sequency_ordered(n):
    w = walsh.walsh_matrix(n)
    assert torch.equal(w @ w.T, n * torch.eye(n, dtype=w.dtype)) and torch.equal(w, w.T)
    assert [(row[1:] != row[:-1]).sum().item() for row in w] == list(range(n))


@pytest.mark.parametrize(
    "n, natural",
    [
        (4, [0, 2, 3, 1]),
        (8, [0, 4, 6, 2, 3, 7, 5, 1]),
        (16, [0, 8, 12, 4, 6, 14, 10, 2, 3, 11, 15, 7, 5, 13, 9, 1]),
    ],
)
def test_natural_index_of_each_sequency(n, natural):
    hadamard = torch.tensor([[(-1.0) ** (s & t).bit_count() for t in range(n)] for s in range(n)], dtype=torch.float64)
    assert torch.equal(walsh.walsh_matrix(n), hadamard[natural])


def test_an_order_that_is_no_power_of_two_is_refused():
    with pytest.raises(ValueError, match="order 6 is not one of"):
        walsh.walsh_matrix(6)


@pytest.mark.parametrize(
    "size, expected", [(7, (1, 1)), (14, (2, 1)), (49, (7, 4)), (4, (1, 2)), (8, (1, 0)), (1, (1, 4))]
)
def test_padding_goes_first_to_the_top(size, expected):
    assert walsh.padding(size, 8) == expected


@pytest.mark.parametrize("reflect", [False, True])
@pytest.mark.parametrize("h, w, prefix, order", [(7, 7, 0, 8), (5, 9, 2, 4), (6, 11, 1, 8)])
def test_project_equals_the_definition(h, w, prefix, order, reflect):
    pairs = [(0, 0), (0, 3), (2, 1), (3, 3)]
    x = torch.randn(2, prefix + h * w, 3, dtype=torch.float64)
    expected = slow_projection(x, h, w, prefix, pairs, order, reflect)
    torch.testing.assert_close(walsh.project(x, h, w, prefix, flat(pairs), order, reflect), expected)
    torch.testing.assert_close(walsh.project_ref(x, h, w, prefix, flat(pairs), order, reflect), expected)


@pytest.mark.parametrize("reflect", [False, True])
@pytest.mark.parametrize("h, w, prefix", GRIDS)
def test_expand_is_the_adjoint(h, w, prefix, reflect):
    bases = flat(lbp_wht.low_pass_l1(4) + [(7, 5)])
    x = torch.randn(2, prefix + h * w, 3, dtype=torch.float64)
    y = walsh.project(x, h, w, prefix, bases, 8, reflect)
    z = torch.randn_like(y)
    back = walsh.expand(z, h, w, prefix, bases, 8, reflect)
    torch.testing.assert_close((y * z).sum(), (x * back).sum())
    torch.testing.assert_close(back, walsh.expand_ref(z, h, w, prefix, bases, 8, reflect))


@pytest.mark.parametrize("order", [4, 8, 16])
@pytest.mark.parametrize("h, w", [(16, 32), (7, 7), (3, 2)])
def test_all_bases_and_zero_padding_lose_nothing(h, w, order):
    bases = flat(lbp_wht.low_pass_linf(order, order))
    x = torch.randn(2, 1 + h * w, 3, dtype=torch.float64)
    torch.testing.assert_close(walsh.expand(walsh.project(x, h, w, 1, bases, order), h, w, 1, bases, order), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_error_is_at_most_twice_that_of_plain_torch(dtype):
    h, w, bases = 14, 14, flat(lbp_wht.low_pass_l1(6))
    for channels in (1, 33, 192):
        x = torch.randn(3, 1 + h * w, channels, dtype=torch.float64)
        true = walsh.project_ref(x.to(dtype).double(), h, w, 1, bases)
        ours = (walsh.project(x.to(dtype), h, w, 1, bases).double() - true).norm()
        plain = (walsh.project_ref(x.to(dtype), h, w, 1, bases).double() - true).norm()
        assert ours <= 2 * plain + 1e-12


def test_strided_input_gives_the_same():
    bases = flat(lbp_wht.low_pass_l1(3))
    maps = torch.randn(2, 5, 7, 7)  # (B, C, H, W): tokens are the last axes
    view = maps.flatten(2).transpose(1, 2)
    assert not view.is_contiguous()
    torch.testing.assert_close(walsh.project(view, 7, 7, 0, bases), walsh.project(view.contiguous(), 7, 7, 0, bases))
    constant = torch.ones(1, 1, 1).expand(2, 49, 5)  # the gradient of a sum has no strides at all
    torch.testing.assert_close(
        walsh.project(constant, 7, 7, 0, bases), walsh.project(constant.contiguous(), 7, 7, 0, bases)
    )


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # from inside opcheck
@pytest.mark.parametrize("reflect", [False, True])
def test_opcheck_and_gradcheck(reflect):
    arguments = (7, 5, 1, flat(lbp_wht.low_pass_l1(3)), 4, reflect)
    x = torch.randn(2, 36, 3, dtype=torch.float64, requires_grad=True)
    z = walsh.project(x, *arguments).detach().requires_grad_()
    for op, value in ((torch.ops.leanvit.walsh_project, x), (torch.ops.leanvit.walsh_expand, z)):
        torch.library.opcheck(op.default, (value, *arguments))
        assert torch.autograd.gradcheck(lambda t, op=op: op(t, *arguments), value)
        assert torch.autograd.gradgradcheck(lambda t, op=op: op(t, *arguments), value)


def test_compiles_without_a_graph_break():
    bases = flat(lbp_wht.low_pass_l1(4))

    def round_trip(x):
        return walsh.expand(walsh.project(2 * x, 7, 7, 0, bases), 7, 7, 0, bases).relu()

    x = torch.randn(2, 49, 8)
    compiled = torch.compile(round_trip, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), round_trip(x))


def test_flop_formula_counts_the_additions_of_the_specification():
    with FlopCounterMode(display=False) as counter:
        walsh.project(torch.randn(2, 197, 6), 14, 14, 1, flat(lbp_wht.low_pass_l1(4)))
    assert counter.get_total_flops() == 64 * 4 * 10 * 6 * 2


def test_wrong_input_is_named():
    good = torch.randn(2, 49, 4)
    with pytest.raises(ValueError, match=r"expected \(B, 49, C\) for a 7x7 grid.*got \(2, 48, 4\)"):
        walsh.project(good[:, :48], 7, 7, 0, [0, 0])
    with pytest.raises(ValueError, match="pairs of sequencies in 0..7"):
        walsh.project(good, 7, 7, 0, [0, 8])
    with pytest.raises(TypeError, match="floating-point.*int64"):
        walsh.project(good.long(), 7, 7, 0, [0, 0])
    with pytest.raises(TypeError, match="floating-point.*complex64"):
        walsh.project(good.to(torch.complex64), 7, 7, 0, [0, 0])
    with pytest.raises(ValueError, match="reflect padding of a 3-token axis to 8.*zero"):
        walsh.project(torch.randn(1, 9, 2), 3, 3, 0, [0, 0], 8, True)


def test_without_cupy_the_torch_path_runs_and_says_so_once(monkeypatch, recwarn):
    from leanvit.kernels import cuda

    monkeypatch.setattr(cuda, "available", lambda: False)
    monkeypatch.setattr(cuda, "unavailable", lambda: "ModuleNotFoundError: No module named 'cupy'")
    walsh._cuda_kernels.cache_clear()
    with pytest.warns(UserWarning, match="No module named 'cupy': the Walsh kernels run as torch ops"):
        assert walsh._cuda_kernels() is None
    assert walsh._cuda_kernels() is None and not recwarn
    walsh._cuda_kernels.cache_clear()


@pytest.mark.parametrize(
    "bases, order, cells",
    [
        (lbp_wht.low_pass_l1(4), 8, 16),  # 2x2 tokens each
        (lbp_wht.low_pass_l1(2), 8, 4),  # 4x4
        ([(0, 0)], 8, 1),  # the gradient filter: the whole block
        ([(0, 0), (0, 7)], 8, 2),  # every other column
        ([(0, 0), (1, 1)], 4, 2),  # opposite quarters
        (lbp_wht.low_pass_l1(8), 8, 64),  # every place of its own
        (lbp_wht.low_pass_l1(8, 16), 16, 64),
    ],
)
def test_a_cell_holds_the_places_where_all_bases_agree(bases, order, cells):
    cell_of_place, small = walsh._cells(tuple(flat(bases)), order)
    assert sorted(set(cell_of_place)) == list(range(cells))
    matrix = walsh.dense_matrix(order, order, flat(bases), order)  # one block, so its columns are the places
    assert torch.equal(small[:, list(cell_of_place)], matrix)
    assert len(set(map(tuple, small.T.tolist()))) == cells  # and no two cells are alike


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reflect", [False, True])
@pytest.mark.parametrize("bases", [[(0, 0)], lbp_wht.low_pass_l1(2), [(3, 0), (1, 2)], lbp_wht.low_pass_l1(6)])
@pytest.mark.parametrize("h, w, prefix", [*GRIDS, (37, 37, 5), (8, 30, 0)])
def test_the_torch_path_equals_the_dense_matrix(h, w, prefix, bases, reflect, dtype):
    torch.manual_seed(h)
    arguments = h, w, prefix, flat(bases), 8, reflect
    x = torch.randn(3, prefix + h * w, 5, dtype=dtype)
    z = walsh.project(x, *arguments)  # both ways in torch are among these shapes
    close = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 4e-3, "atol": 4e-3}
    if dtype == torch.float32:
        close = {"rtol": 1e-5, "atol": 1e-5}
    if dtype == torch.bfloat16:
        close = {"rtol": 3e-2, "atol": 3e-2}
    torch.testing.assert_close(z.double(), walsh.project_ref(x.double(), *arguments), **close)
    torch.testing.assert_close(walsh.expand(z, *arguments).double(), walsh.expand_ref(z.double(), *arguments), **close)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bases", [[(0, 0)], lbp_wht.low_pass_l1(2), lbp_wht.low_pass_l1(4)])
def test_half_precision_neither_overflows_nor_is_rounded_twice(dtype, bases):
    grid = 14, 14, 1, flat(bases), 8, False
    full = torch.full((1, 197, 4), 3000.0, dtype=dtype)  # the sum of a block is more than float16 can hold
    assert walsh.project(full, *grid).isfinite().all()
    torch.manual_seed(0)
    x = (torch.randn(8, 197, 32) + 30).to(dtype)  # channels with a mean, which all bases but the first cancel
    exact = walsh.project_ref(x.double(), *grid)
    error = (walsh.project(x, *grid).double() - exact)[:, 1:].abs()
    assert (error <= 0.51 * torch.finfo(dtype).eps * exact[:, 1:].abs() + 1e-3).all()  # the result is rounded once


@pytest.mark.parametrize("k", [2, 4, 8])
def test_autocast_leaves_the_ops_their_dtype(k):
    grid = 14, 14, 1, flat(lbp_wht.low_pass_l1(k))
    x = torch.randn(2, 197, 8)
    with torch.autocast("cpu", torch.bfloat16):
        z = walsh.project(x, *grid)
        back = walsh.expand(z, *grid)
    assert torch.equal(z, walsh.project(x, *grid)) and torch.equal(back, walsh.expand(z, *grid))


@pytest.mark.parametrize("reflect", [False, True])
@pytest.mark.parametrize("bases", [[(0, 0)], lbp_wht.low_pass_l1(2), lbp_wht.low_pass_l1(4), [(0, 7), (3, 4)]])
@pytest.mark.parametrize("h, w, prefix", [(14, 14, 1), (7, 5, 0), (9, 17, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_ways_in_torch_agree(h, w, prefix, bases, reflect, dtype):
    torch.manual_seed(w)
    grid = h, w, prefix, tuple(flat(bases)), 8, reflect
    x = torch.randn(2, prefix + h * w, 6, dtype=dtype)
    z = torch.randn(2, walsh.rows(h, w, prefix, len(bases), 8), 6, dtype=dtype)
    projected, expanded = walsh.project_ref(x, *grid), walsh.expand_ref(z, *grid)
    torch.testing.assert_close(walsh._project_bands(x, *grid), projected)
    for by_cells in (False, True):
        torch.testing.assert_close(walsh._sums(x, *grid, by_cells=by_cells, turned=False), projected)
        torch.testing.assert_close(walsh._sums(z, *grid, by_cells=by_cells, turned=True), expanded)


@pytest.mark.parametrize(
    "k, channels, stages, turned_stages", [(2, 192, 2, 1), (4, 192, 2, 1), (4, 1536, 2, 2), (5, 1536, 1, 1)]
)
def test_each_shape_goes_the_way_that_was_measured_fastest(monkeypatch, k, channels, stages, turned_stages):
    grid = 14, 14, 1, flat(lbp_wht.low_pass_l1(k))
    taken, bags = [], walsh._bags
    monkeypatch.setattr(walsh, "_bags", lambda *args: taken.append(len(bags(*args))) or bags(*args))
    walsh.expand(walsh.project(torch.randn(1, 197, channels), *grid), *grid)
    assert taken == [stages, turned_stages]
    walsh.project(torch.randn(1, channels, 197).transpose(1, 2), *grid)  # a convolution's tokens: by rows of blocks
    assert taken == [stages, turned_stages]


@pytest.mark.parametrize("k", [2, 6])
def test_a_batch_gives_what_its_images_give_whatever_batch_came_before(k):
    grid = 9, 14, 1, flat(lbp_wht.low_pass_l1(k)), 8, True
    x = torch.randn(5, 1 + 9 * 14, 1030)
    z = walsh.project(x, *grid)
    back = walsh.expand(z, *grid)
    walsh._kept.cache_clear()
    for images in (1, 3, 5, 2, 4):  # index tensors grow, and those of the largest batch serve the smaller ones
        assert torch.equal(walsh.project(x[:images], *grid), z[:images])
        assert torch.equal(walsh.expand(z[:images], *grid), back[:images])


@pytest.mark.parametrize("shape", [(0, 65, 4), (2, 65, 0)])
def test_no_image_and_no_channel_are_no_error(shape):
    grid = 8, 8, 1, flat(lbp_wht.low_pass_l1(2))
    z = walsh.project(torch.zeros(shape), *grid)
    assert z.shape == (shape[0], 4, shape[2]) and walsh.expand(z, *grid).shape == shape
