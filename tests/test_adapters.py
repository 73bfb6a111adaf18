"""Adapter and Compacter; what holds for every adapter (start, gradients, saving, merging) is in test_baselines.py."""

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from leanvit.adapters import PHM, Compacter, adapter, block_mlps, compacter
from leanvit.surgery import count


def vit(width=16, num_classes=3, depth=2):
    torch.manual_seed(0)
    return timm.models.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=width, depth=depth, num_heads=2, num_classes=num_classes
    ).eval()


def images(size=8):
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))


def randomised(model):
    torch.manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return model


def kronecker(phm: PHM, rule):
    """The PHM weight from its definition."""
    return sum(torch.kron(rule[i], phm.left[i] @ phm.right[i]) for i in range(len(rule)))


def test_adapter_is_the_specified_formula():
    model = vit()
    report = adapter(model, width=4)
    assert report.matched == ["blocks.0.mlp", "blocks.1.mlp"]
    assert report.trainable == 2 * (2 * 16 * 4 + 4 + 16 + 2 * 16) + 16 * 3 + 3
    randomised(model)
    wrapped, x = model.blocks[0].mlp, torch.randn(2, 5, 16)
    calls = []
    wrapped.base.register_forward_hook(lambda *a: calls.append(1))
    m = wrapped.base.fc2(F.gelu(wrapped.base.fc1(x)))
    norm = F.layer_norm(m, (16,), wrapped.adapter_norm.weight, wrapped.adapter_norm.bias, eps=1e-5)
    hidden = (norm @ wrapped.adapter_down.weight.T + wrapped.adapter_down.bias).clamp(min=0)
    expected = m + hidden @ wrapped.adapter_up.weight.T + wrapped.adapter_up.bias
    torch.testing.assert_close(wrapped(x), expected)
    assert len(calls) == 1  # the MLP runs once
    y = x + model.blocks[0].attn(model.blocks[0].norm1(x))
    torch.testing.assert_close(model.blocks[0](x), y + wrapped(model.blocks[0].norm2(y)))


def test_compacter_is_the_specified_formula():
    model = vit()
    report = compacter(model, width=8, n=4, rank=2)
    assert report.trainable == 2 * (2 * 16 + 2 * 2 * (16 + 8) + 8 + 16) + 16 * 3 + 3
    randomised(model)
    wrapped, x = model.blocks[1].mlp, torch.randn(2, 5, 16)
    rule = model.blocks[0].mlp.compacter_rule.weight
    m = wrapped.base(x)
    norm = F.layer_norm(m, (16,), wrapped.compacter_norm.weight, wrapped.compacter_norm.bias, eps=1e-5)
    z = norm @ kronecker(wrapped.compacter_down, rule) + wrapped.compacter_down.bias
    z = 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    expected = m + z @ kronecker(wrapped.compacter_up, rule) + wrapped.compacter_up.bias
    torch.testing.assert_close(wrapped(x), expected, rtol=1e-4, atol=1e-5)


def test_starts_of_the_two_modes():  # T17
    model = vit(width=256)
    adapter(model, width=64, mode="faithful")
    layer = model.blocks[0].mlp
    for linear in (layer.adapter_down, layer.adapter_up):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05) and not linear.bias.any()
    assert not torch.equal(model(images()), vit(width=256)(images()))

    model = vit(width=256)
    compacter(model, width=64, mode="faithful")
    layer = model.blocks[0].mlp
    rule = layer.compacter_rule.weight
    assert rule.shape == (4, 4, 4) and 0.8 < rule.abs().max() <= 1 and rule.min() < 0 < rule.max()
    for factor, fans in (
        (layer.compacter_down.left, 64 + 1), (layer.compacter_down.right, 1 + 16),
        (layer.compacter_up.left, 16 + 1), (layer.compacter_up.right, 1 + 64),
    ):  # fmt: skip
        bound = math.sqrt(2) * math.sqrt(6 / fans)
        assert 0.8 * bound < factor.abs().max() <= bound
    assert layer.compacter_down.left.shape == (4, 64, 1) and layer.compacter_up.right.shape == (4, 1, 64)
    assert not layer.compacter_down.bias.any() and not layer.compacter_up.bias.any()
    change = (model(images()) - vit(width=256)(images())).norm() / vit(width=256)(images()).norm()
    assert change > 0.1  # far from the identity, as the specification says

    model = vit(width=256)
    compacter(model, width=64)
    assert not model.blocks[0].mlp.compacter_up.right.any() and model.blocks[0].mlp.compacter_up.left.any()


def test_the_rule_is_shared_and_counted_by_train_rule():  # T17, T4
    frozen, trained = vit(), vit()
    counts = compacter(frozen, width=8).trainable, compacter(trained, width=8, train_rule=True).trainable
    assert counts[1] - counts[0] == 4**3
    for model in (frozen, trained):
        rules = {id(m.shared[0]) for m in model.modules() if isinstance(m, Compacter)}
        assert len(rules) == 1
        assert [n for n in model.state_dict() if "rule" in n] == ["blocks.0.mlp.compacter_rule.weight"]
    assert not any("rule" in n for n, _ in frozen.named_parameters())

    # its gradient is the sum over the layers that share it
    randomised(trained)
    twins = [copy.deepcopy(trained) for _ in range(2)]
    for k, twin in enumerate(twins):  # only layer k keeps the gradient path
        other = twin.blocks[1 - k].mlp
        rule = twin.blocks[0].mlp.compacter_rule.weight
        frozen_rule = nn.Module()
        frozen_rule.weight = rule.detach()
        other.shared = (frozen_rule,)
    grads = []
    for model in (trained, *twins):
        model(images()).square().sum().backward()
        grads.append(model.blocks[0].mlp.compacter_rule.weight.grad)
    torch.testing.assert_close(grads[0], grads[1] + grads[2], rtol=1e-4, atol=1e-5)


def test_other_families_and_skipped_mlps():
    torch.manual_seed(0)
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", depths=(1, 1), embed_dim=24, num_heads=(1, 2), img_size=56, num_classes=3
    ).eval()  # fmt: skip
    stock = copy.deepcopy(swin)
    report = adapter(swin, width=4)
    assert report.matched == ["layers.0.blocks.0.mlp", "layers.1.blocks.0.mlp"]
    assert swin.layers[1].blocks[0].mlp.adapter_up.weight.shape == (48, 4)
    assert torch.equal(swin(images(56)), stock(images(56)))
    eva = timm.create_model("eva02_tiny_patch14_224", depth=1, embed_dim=48, num_heads=2, img_size=28, num_classes=3)
    assert compacter(eva, width=8).matched == ["blocks.0.mlp"]
    eva(images(28))
    assert not block_mlps("attn_pool.mlp", nn.Identity()) and not block_mlps("blocks.0.mlp.fc1", nn.Identity())
    with pytest.raises(ValueError, match="no MLP matches in ResNet .its blocks have no module named mlp"):
        adapter(timm.create_model("resnet18", num_classes=3))
    with pytest.raises(ValueError, match=r"blocks.0.attn: its last layer is no linear layer named fc2"):
        adapter(vit(), match=lambda n, m: n == "blocks.0.attn")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda m: adapter(m, width=0), "width=0 must be a whole number of at least 1"),
        (lambda m: adapter(m, mode="paper"), "mode='paper' is none of fixed, faithful"),
        (lambda m: compacter(m, width=10), "n=4 does not divide width 10"),
        (lambda m: compacter(m, width=12, n=3), "n=3 does not divide the model's width 16"),
        (lambda m: compacter(m, n=0), "n=0 must be"),
        (lambda m: compacter(m, rank=True), "rank=True must be"),
        (lambda m: compacter(m, match=lambda n, m: False), "no MLP matches in VisionTransformer"),
    ],
)
def test_bad_input_leaves_the_model_as_it_was(method, message):
    model = vit()
    model.head.weight.requires_grad_(False)
    modules, trainable = [*model.named_modules()], count(model)
    with pytest.raises(ValueError, match=message):
        method(model)
    assert [*model.named_modules()] == modules and count(model) == trainable
