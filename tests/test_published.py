"""The published form is the same method as ours with reflect padding; only then is its time a fair "before"."""

import pytest
import torch
from torch import nn

from leanvit import lbp_wht, models, published


def _any(name, module):
    return True


def _layer():
    """A linear layer as a model of its own: an image flattens to tokens, and tokens pass."""
    return nn.Sequential(nn.Flatten(2), nn.Linear(5, 3))


def _gradients(layer, x, g):
    x = x.clone().requires_grad_()
    y = layer(x)
    return y.detach(), torch.autograd.grad(y, (x, *layer.parameters()), g)


@pytest.mark.parametrize("bases", ["LP_L1-2", "LP_L1-4", "LP_Linf-8"])
@pytest.mark.parametrize("grid, prefix", [((8, 8), 0), ((7, 7), 0), ((14, 14), 1), ((9, 12), 2)])
def test_gradients_equal_ours_with_reflect_padding(grid, prefix, bases):
    torch.manual_seed(0)
    tokens = prefix + grid[0] * grid[1]
    x, g = torch.randn(2, tokens, 5, dtype=torch.float64), torch.randn(2, tokens, 3, dtype=torch.float64)
    before, after = _layer().double(), _layer().double()
    after.load_state_dict(before.state_dict())
    options = {"example": x[..., None], "grid": grid, "prefix_tokens": prefix, "match": _any}
    published.attach(before, bases, **options)
    lbp_wht.attach(after, bases, pad="reflect", exact_when="never", **options)
    y, wanted = _gradients(before, x, g)
    ours, found = _gradients(after, x, g)
    torch.testing.assert_close(y, ours, rtol=1e-12, atol=1e-12)
    for a, b in zip(wanted, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_low_rank_gradient_is_not_the_exact_one():
    """Otherwise the comparison above would also pass for two stock layers."""
    torch.manual_seed(0)
    x, g = torch.randn(2, 64, 5), torch.randn(2, 64, 3)
    layer = _layer()
    _, exact = _gradients(layer, x, g)
    published.attach(layer, "LP_L1-4", example=x[..., None], grid=(8, 8), match=_any)
    _, low = _gradients(layer, x, g)
    assert not torch.allclose(exact[0], low[0], atol=1e-2)
    assert not torch.allclose(exact[1], low[1], atol=1e-2)
    torch.testing.assert_close(exact[2], low[2], rtol=1e-5, atol=1e-5)  # the bias gradient is exact


def test_whole_model_keeps_its_output_and_trains():
    torch.manual_seed(0)
    model = models.create("embedded_vit", num_classes=10)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        stock = model.eval()(x)
    report = published.attach(model)
    assert len(report.matched) == 24
    out = model.train()(x)
    torch.testing.assert_close(out, stock, rtol=1e-4, atol=1e-5)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_nothing_to_treat_raises():
    model = nn.Sequential(nn.Linear(5, 3))
    with pytest.raises(ValueError, match="no linear layer of Sequential"):
        published.attach(model, example=torch.zeros(2, 1, 1, 5))
