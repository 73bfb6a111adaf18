"""What holds for every shape, grid, rank and budget, looked for with drawn examples (the same ones each time)."""

import copy
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard
from timm.models.vision_transformer import VisionTransformer

from leanvit import block_expansion, comcat_ranks, evaluate, kadaptation, lbp_wht
from leanvit.comcat_plan import parts
from leanvit.kernels import walsh
from leanvit.uvc_budget import Counts, floor, meet
from leanvit.uvc_cost import FlopsCost, LatencyCost, LatencyTable
from leanvit.uvc_math import Norms
from leanvit.uvc_plan import BlockShape, Shapes

# ---- the transform over the token grid


@st.composite
def grids(draw):
    """Grid, prefix tokens, bases, order."""
    order = draw(st.sampled_from([2, 4, 8, 16]))
    pair = st.tuples(st.integers(0, order - 1), st.integers(0, order - 1))
    bases = draw(st.lists(pair, min_size=1, max_size=6, unique=True))
    return draw(st.integers(1, 19)), draw(st.integers(1, 19)), draw(st.integers(0, 3)), bases, order


def flat(bases):
    return [s for pair in bases for s in pair]


def dense(h, w, prefix, bases, order):
    """The projection `(prefix + P R, prefix + h w)` from scipy's Hadamard matrix, rows sorted by changes of sign."""
    rows = sorted(hadamard(order).tolist(), key=lambda row: sum(a != b for a, b in zip(row, row[1:], strict=False)))
    wal = torch.tensor(rows, dtype=torch.float64)
    (p, up), (q, left) = walsh.padding(h, order), walsh.padding(w, order)
    matrix = torch.zeros(p, q, len(bases), p * order, q * order, dtype=torch.float64)
    for i in range(p):
        for j in range(q):
            for k, (r, c) in enumerate(bases):
                block = wal[r][:, None] * wal[c][None] / order
                matrix[i, j, k, i * order : (i + 1) * order, j * order : (j + 1) * order] = block
    inside = matrix[..., up : up + h, left : left + w].reshape(p * q * len(bases), h * w)
    return torch.block_diag(torch.eye(prefix, dtype=torch.float64), inside)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(grids(), st.integers(1, 3), st.integers(1, 5), st.integers(0, 99))
def test_project_and_expand(grid, batch, channels, seed):
    """The dense products they stand for, each other's adjoint, and never more energy than before."""
    h, w, prefix, bases, order = grid
    x, matrix = normal(seed, batch, prefix + h * w, channels), dense(*grid)
    z = normal(seed + 1, batch, len(matrix), channels)
    projected = walsh.project(x, h, w, prefix, flat(bases), order)
    expanded = walsh.expand(z, h, w, prefix, flat(bases), order)
    torch.testing.assert_close(projected, matrix @ x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(expanded, matrix.T @ z, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((projected * z).sum(), (x * expanded).sum(), rtol=1e-10, atol=1e-10)
    assert projected.square().sum() <= x.square().sum() * (1 + 1e-12)


@settings(max_examples=40)
@given(st.integers(1, 19), st.integers(1, 19), st.integers(0, 2), st.sampled_from([2, 4, 8]), st.integers(0, 99))
def test_all_bases_are_exact(h, w, prefix, order, seed):
    x, every = normal(seed, 2, prefix + h * w, 3), flat([(r, c) for r in range(order) for c in range(order)])
    projected = walsh.project(x, h, w, prefix, every, order)
    torch.testing.assert_close(walsh.expand(projected, h, w, prefix, every, order), x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(projected.square().sum(), x.square().sum())


@given(grids(), st.data(), st.booleans(), st.integers(0, 99))
def test_low_rank_layers(grid, data, biased, seed):
    """The stock forward bit for bit; the gradients are those of the dense projections, for each choice of bases."""
    h, w, prefix, bases, order = grid
    pair = st.tuples(st.integers(0, order - 1), st.integers(0, order - 1))
    other = data.draw(st.none() | st.just(bases) | st.lists(pair, min_size=1, max_size=4, unique=True))
    setting = lbp_wht.Setting("x", "tokens", (h, w), prefix, tuple(bases), other and tuple(other), order)
    x, weight = normal(seed, 2, prefix + h * w, 5).requires_grad_(), normal(seed + 1, 4, 5).requires_grad_()
    bias = normal(seed + 2, 4).requires_grad_() if biased else None
    y, g = lbp_wht.linear(x, weight, bias, setting, (h, w)), normal(seed + 3, 2, prefix + h * w, 4)
    assert torch.equal(y, torch.nn.functional.linear(x, weight, bias))
    y.backward(g)
    here = dense(*grid)
    there = torch.eye(prefix + h * w, dtype=torch.float64) if other is None else dense(h, w, prefix, other, order)
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(x.grad, here.T @ here @ g @ weight.detach(), **close)
    torch.testing.assert_close(weight.grad, ((there @ g).mT @ (there @ x.detach())).sum(0), **close)
    if biased:
        torch.testing.assert_close(bias.grad, g.sum((0, 1)), **close)


# ---- budgets


def vit(**more):
    torch.manual_seed(0)
    shape = dict(img_size=8, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=3) | more
    return VisionTransformer(**shape).eval()


NET = vit()
PARTS, _ = parts(NET)
TOTAL = sum(p.dense for p in PARTS)


@settings(max_examples=40)
@given(st.floats(0, 1), st.integers(1, 4))
def test_ranks_meet_their_budget(part, multiple):
    """At most the budget, and no part's next rank (or dense) fits any more."""
    curves = {p.name: {*range(multiple, comcat_ranks.paying(p) + 1, multiple)} or {1} for p in PARTS}
    least = sum(p.weights(min(curves[p.name])) for p in PARTS)
    budget = round(least + part * (TOTAL - least))
    plan = comcat_ranks.greedy(NET, budget, multiple=multiple)
    used = comcat_ranks.total_weights(PARTS, plan.ranks)
    assert least <= used <= budget
    for p in PARTS:
        rank = plan.ranks.get(p.name)
        larger = [r for r in curves[p.name] if rank is not None and r > rank]
        step = min(p.weights(r) for r in [*larger, None]) - p.weights(rank)
        assert rank is None or step <= 0 or used + step > budget, p.name
        assert rank is None or rank % multiple == 0 or rank in (1, p.full)
    with pytest.raises(ValueError, match="cannot be met"):
        comcat_ranks.greedy(NET, least - 1, multiple=multiple)


@st.composite
def cuttings(draw):
    """A cost, norms and what `meet` is told, at a budget from the floor on."""
    depth, tokens, width = draw(st.integers(1, 4)), draw(st.integers(2, 20)), draw(st.sampled_from([8, 12, 32]))
    block = st.builds(
        lambda h, d, v, units, ranks, padded: BlockShape(h, d, (v,) * h, units, ranks, padded),
        st.integers(1, 4), st.sampled_from([4, 8]), st.sampled_from([2, 4, 7, 8]), st.sampled_from([8, 20, 33, 64]),
        st.sampled_from([(None, None), (3, None)]), st.booleans(),
    )  # fmt: skip
    blocks = [draw(block)] * depth if draw(st.booleans()) else [draw(block) for _ in range(depth)]
    shapes = Shapes("M", None, width, 1, tokens - 1, draw(st.sampled_from([0, 5000])), tuple(blocks))
    cost, dims = FlopsCost(shapes, draw(st.sampled_from([None, 2]))), draw(st.sampled_from([None, 2, 4]))
    if len(set(blocks)) == 1 and draw(st.booleans()):
        heads, units = sorted({1, blocks[0].heads}), [1, blocks[0].hidden]
        ms = st.floats(0.01, 9)
        times = [draw(st.lists(ms, min_size=len(k), max_size=len(k)).map(sorted)) for k in (heads, units)]
        cost, dims = LatencyCost(shapes, LatencyTable(heads, times[0], units, times[1], 0.3, {})), None
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    norms = [
        Norms(*[tuple(torch.rand(v, generator=generator) for v in b.values)], torch.rand(b.heads, generator=generator),
              torch.rand(b.hidden, generator=generator))
        for b in blocks
    ]  # fmt: skip
    told = {
        "fixed": draw(st.sampled_from([(), ("heads",), ("units",), ("heads", "units"), ("heads", "units")])),
        "round_units": draw(st.sampled_from([1, 4, 16])), "round_dims": dims,
    }  # fmt: skip
    counts = [
        draw(st.none() | st.just(Counts(b.heads, max(b.values), b.hidden)) | st.builds(
            Counts, st.integers(1, b.heads), st.integers(1, max(b.values)), st.integers(1, b.hidden)))
        for b in blocks
    ]  # fmt: skip
    lowest = floor(cost, skip=True, **told)
    assume(lowest <= 1)
    parts_of_depth = st.integers(1, depth).map(lambda k: k / depth)
    budget = draw(st.floats(lowest, 1) | st.sampled_from([lowest, 1.0]) | parts_of_depth)
    gates = draw(st.none() | st.lists(st.floats(-3, 3), min_size=depth, max_size=depth))
    return cost, norms, max(budget, lowest), {"start": draw(st.none() | st.just(counts)), "gates": gates, **told}


@settings(max_examples=120)
@given(cuttings())
def test_plans_meet_their_budget(case):
    """At most the budget at allowed sizes, and no group fits any more; or it says that these blocks cannot meet it."""
    cost, norms, budget, told = case
    try:
        plan = meet(cost, norms, budget, **told)
    except ValueError as error:
        assert "cannot be met with blocks" in str(error)
        running = [c is not None for c in told["start"] or norms]
        assert told["gates"] is None or sum(running) < 2 or len(set(cost.shapes.blocks)) > 1
        return

    def price(i, heads, width, units):
        return cost.attention(i, heads, width) + cost.mlp(i, units)

    sizes = [b and (len(b.heads), len(b.values[0]), len(b.units)) for b in plan.blocks]
    total, limit = cost.fixed + sum(price(i, *s) for i, s in enumerate(sizes) if s), budget * cost.dense
    assert total <= limit * (1 + 1e-9)
    units, dims, fixed = told["round_units"], told["round_dims"], told["fixed"]
    for i, (shape, size) in enumerate(zip(cost.shapes.blocks, sizes, strict=True)):
        if size is None:
            continue
        assert size[2] % units == 0 or size[2] == shape.hidden
        assert size[1] == shape.values[0] or (dims and size[1] % dims == 0)
        more = [(size[0] + 1, *size[1:])] if "heads" not in fixed and size[0] < shape.heads else []
        if "units" not in fixed and size[2] < shape.hidden:
            more.append((*size[:2], min(shape.hidden, (size[2] // units + 1) * units)))
        if dims and size[1] < shape.values[0]:
            more.append((size[0], min(shape.values[0], (size[1] // dims + 1) * dims), size[2]))
        assert all(total + price(i, *m) - price(i, *size) > limit * (1 - 1e-9) for m in more)


# ---- shapes that methods take or refuse


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(1, 12), st.integers(1, 24), st.integers(1, 3))
def test_kadaptation_divides_or_refuses(heads, head_dim, n, rank):
    width = heads * head_dim
    net = vit(embed_dim=width, num_heads=heads, depth=1)
    before, images = copy.deepcopy(net.state_dict()), torch.randn(2, 3, 8, 8)
    expected = net(images)
    if width % n:
        with pytest.raises(ValueError, match=f"n={n} does not divide the widths {width} of blocks.0.attn.qkv"):
            kadaptation.attach(net, n=n, rank=rank, seed=0)
        assert net.state_dict().keys() == before.keys()
        return
    kadaptation.attach(net, n=n, rank=rank, seed=0)
    torch.testing.assert_close(net(images), expected)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "kad_" in name:
                p.add_(0.01)
    adapted = net(images)
    kadaptation.merge(net)
    torch.testing.assert_close(net(images), adapted, rtol=1e-3, atol=1e-4)
    assert net.state_dict().keys() == before.keys()


@settings(max_examples=20)
@given(st.integers(1, 6), st.data())
def test_expanded_positions(depth, data):
    """Old and new numbers are each other's inverse, the outputs are the same, and detaching brings the blocks back."""
    net, images = vit(depth=depth), torch.randn(1, 3, 8, 8)
    expected, blocks = net(images), list(net.blocks)
    positions = data.draw(st.lists(st.integers(0, depth - 1), unique=True, min_size=1, max_size=depth))
    p = data.draw(st.none() | st.integers(1, 7))
    if p is not None and depth % p:
        with pytest.raises(ValueError, match=f"p={p} does not divide the depth {depth}"):
            block_expansion.attach(net, p=p)
        return
    block_expansion.attach(net, **({"positions": positions} if p is None else {"p": p}))
    new = [block_expansion.new_index(net, i) for i in range(depth)]
    old = [block_expansion.old_index(net, i) for i in range(len(net.blocks))]
    assert [old[i] for i in new] == list(range(depth)) and [net.blocks[i] for i in new] == blocks
    added = [i for i, o in enumerate(old) if o is None]
    assert len(added) == (len(positions) if p is None else p) and 0 not in added
    sources = sorted(positions) if p is None else [depth // p * (j + 1) - 1 for j in range(p)]
    assert [old[i - 1] for i in added] == sources  # each behind the block it copies
    assert torch.equal(net(images), expected)
    for wrong in (-1, len(net.blocks)):
        with pytest.raises(ValueError, match="is outside"):
            block_expansion.old_index(net, wrong)
    block_expansion.detach(net)
    assert list(net.blocks) == blocks and torch.equal(net(images), expected)


@given(st.floats(0, 1), st.floats(0, 1e12), st.floats(0, 1e12), st.floats(1, 1e9), st.floats(1e-3, 1e3))
def test_parameter_efficiency(score, few, many, m0, scale):
    few, many = sorted((few, many))
    assert 0 <= evaluate.pe(score, many, m0) <= evaluate.pe(score, few, m0) <= evaluate.pe(score, 0, m0) == score
    assert evaluate.pe(score, few * scale, m0 * scale) == pytest.approx(evaluate.pe(score, few, m0))
    assert evaluate.pe(score, 9 * m0, m0) == pytest.approx(score / math.e)


@given(st.floats() | st.integers(), st.floats() | st.integers(), st.floats() | st.integers())
def test_parameter_efficiency_of_anything(score, parameters, m0):
    try:
        found = evaluate.pe(score, parameters, m0)
    except ValueError as error:
        assert str(error).startswith("pe: ") and not (0 <= score <= 1 and parameters >= 0 and m0 > 0)
        return
    assert 0 <= found <= 1
