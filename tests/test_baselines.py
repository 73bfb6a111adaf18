import copy

import peft
import pytest
import timm
import torch
from torch import nn

from leanvit import baselines, lbp_wht, surgery
from leanvit.baselines import LoRA, bitfit, detach, full, linear_probe, lora, merge


def vit(num_classes: int = 3):
    torch.manual_seed(0)
    return timm.models.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=num_classes
    )


def images(size: int = 8, seed: int = 1):
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(seed))


def trainable(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


def disturb(model):
    """Values for the adapters, as after a training."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.2)
    return model


def test_full_and_linear_probe():
    model = vit()
    report = linear_probe(model)
    assert trainable(model) == {"head.weight", "head.bias"} and report.matched == ["head"]
    assert (report.trainable, report.total) == (16 * 3 + 3, sum(p.numel() for p in model.parameters()))
    report = full(model)
    assert trainable(model) == set(dict(model.named_parameters())) and report.trainable == report.total
    with pytest.raises(ValueError, match="no classifier head"):
        linear_probe(vit(num_classes=0))


def test_bitfit_trains_every_bias_and_the_head():
    model = vit()
    report = bitfit(model)
    assert trainable(model) == {n for n, _ in model.named_parameters() if n.endswith(".bias")} | {"head.weight"}
    per_block = 3 * 16 + 16 + 64 + 16 + 2 * 16  # qkv, proj, fc1, fc2, two norms
    assert report.trainable == 2 * per_block + 16 + 16 + 16 * 3 + 3  # patch embedding, last norm, head
    swin = timm.create_model("swinv2_cr_tiny_ns_224", depths=(1, 1), embed_dim=24, num_heads=(1, 2), num_classes=3)
    assert not any("attn.qkv.weight" in n for n in bitfit(swin).matched)
    beit = timm.models.beit.Beit(img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=3)
    bitfit(beit)
    assert {"blocks.0.attn.q_bias", "blocks.0.attn.v_bias"} <= trainable(beit)
    with pytest.raises(ValueError, match="no bias outside"):
        bitfit(nn.Sequential(nn.Linear(2, 2, bias=False)))


def test_lora_equals_peft():
    ours, theirs = vit(), vit()
    report = lora(ours, rank=4, alpha=6)
    assert report.matched == [f"blocks.{i}.attn.{n}" for i in (0, 1) for n in ("qkv", "proj")]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["qkv", "proj"], exclude_modules="patch_embed.*")
    theirs = peft.get_peft_model(theirs, config)
    disturb(ours)
    for name in report.matched:
        a, b = ours.get_submodule(name), theirs.base_model.model.get_submodule(name)
        with torch.no_grad():
            b.lora_A.default.weight.copy_(a.lora_A)
            b.lora_B.default.weight.copy_(a.lora_B)
    x = images()
    one, other = ours(x), theirs(x)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    one.square().sum().backward()
    other.square().sum().backward()
    for name in report.matched:
        a, b = ours.get_submodule(name), theirs.base_model.model.get_submodule(name)
        torch.testing.assert_close(a.lora_A.grad, b.lora_A.default.weight.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.lora_B.grad, b.lora_B.default.weight.grad, rtol=1e-4, atol=1e-5)
        assert a.base.weight.grad is None


def test_lora_starts_as_the_stock_model_with_the_papers_initialisation():
    model, stock = vit(), vit()
    report = lora(model, rank=8)
    assert torch.equal(model(images()), stock(images()))
    qkv = model.blocks[0].attn.qkv
    assert not qkv.lora_B.any() and qkv.scale == 1
    bound = 1 / 16**0.5  # kaiming_uniform(a=sqrt 5): sqrt(6 / (6 * fan_in))
    assert 0.9 * bound < qkv.lora_A.abs().max() <= bound
    per_block = 8 * (16 + 48) + 8 * (16 + 16)
    assert report.trainable == 2 * per_block + 16 * 3 + 3
    assert trainable(model) == {n for n, _ in model.named_parameters() if "lora_" in n or n.startswith("head.")}


def test_the_papers_two_settings():
    model = vit()
    lora(model, rank=8, alpha=8, qkv_rank=24)
    assert model.blocks[0].attn.qkv.lora_A.shape == (24, 16) and model.blocks[0].attn.qkv.scale == pytest.approx(1 / 3)
    assert model.blocks[0].attn.proj.lora_A.shape == (8, 16) and model.blocks[0].attn.proj.scale == 1
    model = vit()  # "LoRA-all" of the last block
    scope = "blocks.1."
    report = lora(
        model, rank=8, alpha=8, qkv_rank=24,
        match=lambda n, m: n.startswith(scope), keep=lambda n: n.startswith(scope),
    )  # fmt: skip
    layers = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    assert report.matched == [scope + n for n in layers]
    expected = {f"{scope}{n}.{p}" for n in layers for p in ("lora_A", "lora_B", "base.bias")}
    expected |= {f"{scope}norm{i}.{p}" for i in (1, 2) for p in ("weight", "bias")} | {"head.weight", "head.bias"}
    assert trainable(model) == expected


@pytest.mark.parametrize(
    ("name", "size", "settings", "layers"),
    [
        ("efficientformer_l1", 224, {"depths": (1, 1, 1, 2)}, 2),
        ("efficientformerv2_s0", 224, {"depths": (1, 1, 1, 2), "num_vit": 1}, 6),
        ("swinv2_tiny_window8_256", 32, {"depths": (1, 1), "embed_dim": 24, "num_heads": (1, 2), "img_size": 32}, 4),
    ],
)
def test_merge_and_detach_on_other_families(name, size, settings, layers):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **settings).eval()
    with torch.no_grad():
        for p in model.parameters():  # SwinV2 starts with norms of zero, so that no block counts
            p.add_(torch.randn_like(p), alpha=0.02)
    stock, x = copy.deepcopy(model), images(size)
    types = [type(m) for m in stock.modules()]
    report = lora(model, rank=2, alpha=3)
    attention = [n for n in report.matched if "attn" in n or "token_mixer" in n]
    assert len(attention) == len(report.matched) >= layers and not any("cpb_mlp" in n for n in report.matched)
    called = set()
    for n, m in model.named_modules():
        if isinstance(m, LoRA):
            m.register_forward_hook(lambda *a, n=n: called.add(n))
    torch.testing.assert_close(model(x), stock(x), rtol=1e-5, atol=1e-5)  # the qkv bias may be added apart
    assert called == set(report.matched)
    disturb(model)
    adapted = model(x)
    assert (adapted - stock(x)).abs().max() > 1e-3
    merged = copy.deepcopy(model)
    merge(merged)
    assert [type(m) for m in merged.modules()] == types
    torch.testing.assert_close(merged(x), adapted, rtol=1e-5, atol=1e-5)
    detach(model)
    assert [type(m) for m in model.modules()] == types and torch.equal(model(x), stock(x))
    assert model.state_dict().keys() == stock.state_dict().keys()


def test_works_around_a_linear_with_a_backward_of_its_own():
    class Counted(nn.Linear):
        """What LBP-WHT does: a subclass of nn.Linear with its own forward."""

        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    model = vit()
    old = model.blocks[0].attn.qkv
    surgery.replace(model, "blocks.0.attn.qkv", new := Counted(16, 48))
    new.load_state_dict(old.state_dict())
    lora(model, rank=2)
    wrapped = model.blocks[0].attn.qkv
    assert isinstance(wrapped, LoRA) and wrapped.base is new
    model(images()).sum().backward()
    assert new.calls == 1 and wrapped.lora_B.grad.abs().sum() > 0
    merge(disturb(model))
    assert model.blocks[0].attn.qkv is new


@pytest.mark.parametrize("first", ["lbp_wht", "lora"])
def test_composes_with_lbp_wht(first):
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(img_size=64, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=3)
    stock, x = copy.deepcopy(model), images(64)
    steps = [lambda: lbp_wht.attach(model, bases="LP_L1-2", exact_when="never"), lambda: lora(model, rank=2)]
    for step in steps if first == "lbp_wht" else steps[::-1]:
        step()
    treated = [n for n, m in model.named_modules() if isinstance(m, lbp_wht.LBPLinear)]
    assert "blocks.0.attn.qkv.base" in treated and "blocks.0.mlp.fc1" in treated
    torch.testing.assert_close(model(x), stock(x))
    model(x).square().sum().backward()
    assert model.blocks[0].attn.qkv.lora_B.grad.abs().sum() > 0
    detach(model)
    lbp_wht.detach(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]


def test_merge_in_half_precision_adds_in_float32():
    layer = LoRA(nn.Linear(8, 4).to(torch.bfloat16), rank=2, alpha=1)
    assert layer.lora_A.dtype == torch.bfloat16
    disturb(nn.ModuleDict({"lora_layer": layer}))
    exact = layer.base.weight.double() + 0.5 * layer.lora_B.double() @ layer.lora_A.double()
    assert torch.equal(layer.merged().weight, exact.to(torch.bfloat16))


def test_bad_input():
    with pytest.raises(ValueError, match=r"no layer matches in VisionTransformer; its linear layers are blocks.0.attn"):
        lora(vit(), match=lambda n, m: "atn" in n)
    with pytest.raises(ValueError, match="rank=0"):
        lora(vit(), rank=0)
    with pytest.raises(ValueError, match="qkv_rank=2.5"):
        lora(vit(), qkv_rank=2.5)
    model = vit()
    lora(model)
    with pytest.raises(ValueError, match="has LoRA already"):
        lora(model)
    for undo in (merge, detach):
        with pytest.raises(ValueError, match=f"{undo.__name__}: LoRA is not attached"):
            undo(vit())
    assert not baselines.attention_projections("head", nn.Linear(1, 1))
    assert not baselines.attention_projections("attn_pool.qkv", nn.Linear(1, 1))
