"""The products of a linear layer's backward pass: values, when oneDNN takes them, FLOPs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from leanvit.kernels import products

onednn = pytest.mark.skipif(products._ONEDNN is None, reason="torch without oneDNN's linear layer, or not x86")


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def taken(monkeypatch):
    """Shapes of the products that oneDNN was asked for."""
    seen, ask = [], products._product
    monkeypatch.setattr(products, "_product", lambda a, b: (seen.append((*a.shape, b.shape[1])), ask(a, b))[1])
    return seen


SIZES = [(164, 768, 3072), (333, 777, 555), (52, 2304, 768), (1, 5000, 4000), (256, 256, 384)]


@pytest.mark.parametrize("rows, out, wide", SIZES)
def test_large_products_are_exact_to_float32(rows, out, wide, taken):
    g, weight, x = numbers(rows, out), numbers(out, wide, seed=1), numbers(rows, wide, seed=2)
    for ours, plain, true in (
        (products.through(g, weight), g @ weight, g.double() @ weight.double()),
        (products.outer(g, x), g.T @ x, g.T.double() @ x.double()),
    ):
        assert ours.is_contiguous() and ours.dtype == torch.float32
        # the two libraries add in another order: each error grows with the root of the length of the sums
        error, usual = (ours - true).norm() / true.norm(), (plain - true).norm() / true.norm()
        assert error <= 4 * usual + 1e-6
    asked = [(rows, out, wide)] + [(out, rows, wide)] * (out < wide and rows * out * wide >= 1 << 25)
    assert taken == (asked if products._ONEDNN is not None else [])


@onednn
def test_a_gradient_is_contiguous_as_its_weight():
    layer = torch.nn.Linear(2048, 1024)
    g, x = numbers(64, 1024), numbers(64, 2048)
    assert products.outer(g, x).stride() == layer.weight.stride()


@pytest.mark.parametrize(
    "case",
    ["small", "double", "half", "meta", "strided rows", "strided weight", "turned off", "missing", "high outer"],
)
def test_what_onednn_would_do_worse_or_not_at_all_is_a_plain_product(case, taken, monkeypatch):
    rows = 16 if case == "small" else 256
    kind = {"double": torch.float64, "half": torch.bfloat16}.get(case, torch.float32)
    g, weight, x = numbers(rows, 512, dtype=kind), numbers(512, 1024, seed=1, dtype=kind), numbers(rows, 1024, seed=2)
    x = x.to(kind)
    if case == "meta":
        g, weight, x = (t.to("meta") for t in (g, weight, x))
        assert products.through(g, weight).shape == x.shape and products.outer(g, x).shape == weight.shape
        assert taken == []
        return
    if case == "strided rows":
        g, x = numbers(rows, 1536)[:, 512:1024], numbers(rows, 2048, seed=2)[:, ::2]
    if case == "strided weight":
        weight, x = numbers(1024, 512, seed=1).T, numbers(1024, rows, seed=2).T
    if case == "missing":
        monkeypatch.setattr(products, "_ONEDNN", None)
    with torch.backends.mkldnn.flags(enabled=case != "turned off", allow_tf32=None):  # which warns
        if case == "high outer":
            assert torch.equal(products.outer(x, g), x.T @ g)
        else:
            assert torch.equal(products.through(g, weight), g @ weight)
            assert torch.equal(products.outer(g, x), g.T @ x)
    assert taken == []


@onednn
def test_the_flop_counter_counts_them_like_plain_products(taken):
    g, weight, x = numbers(256, 512), numbers(512, 1024, seed=1), numbers(256, 1024, seed=2)
    with FlopCounterMode(display=False) as ours:
        products.through(g, weight), products.outer(g, x)
    with FlopCounterMode(display=False) as plain:
        g @ weight, g.T @ x
    assert len(taken) == 2
    assert ours.get_total_flops() == plain.get_total_flops() == 4 * 256 * 512 * 1024


@onednn
def test_compiled_code_keeps_plain_products(taken):
    step = torch.compile(lambda g, weight: products.through(g, weight), fullgraph=True, backend="aot_eager")
    g, weight = numbers(256, 512), numbers(512, 1024, seed=1)
    torch.testing.assert_close(step(g, weight), g @ weight)
    assert taken == []


def test_shapes_that_do_not_fit_raise_as_in_torch():
    for shapes in ((3, 4, 5, 6), (256, 512, 1024, 512)):
        rows, out, other, wide = shapes
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            products.through(numbers(rows, out), numbers(other, wide))
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            products.outer(numbers(rows, out), numbers(other, wide))


def test_with_autograd_on_they_are_differentiable_whatever_their_size(taken):
    g, weight, x = (t.requires_grad_() for t in (numbers(256, 512), numbers(512, 1024, seed=1), numbers(256, 1024)))
    for y, wanted in ((products.through(g, weight), (g, weight)), (products.outer(g, x), (g, x))):
        assert all(gradient.abs().sum() > 0 for gradient in torch.autograd.grad(y.sum(), wanted))
    assert taken == []


def test_products_keep_their_dtype_under_autocast_and_on_devices_without_one():
    x = numbers(3, 3)
    for device in ("cpu", "meta"):
        with torch.autocast("cpu", torch.bfloat16), products.plain_dtypes(x.to(device)):
            assert (x.to(device) @ x.to(device)).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert products.autocasts(x) and not products.autocasts(x.to("meta"))
    assert not products.autocasts(x)
