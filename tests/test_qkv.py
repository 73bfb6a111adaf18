"""Where queries and values are, and layers with deltas on their rows."""

import copy

import pytest
import timm
import torch
from torch import nn

from leanvit import baselines, comcat, kadaptation, qkv, uvc
from leanvit.kernels import lowrank
from leanvit.qkv import Shifted


class Dense(nn.Module):
    """A delta without factors: any matrix and a bias."""

    def __init__(self, inputs, width, bias=True, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.matrix = nn.Parameter(torch.randn(width, inputs) * 0.1)
        self.shift = nn.Parameter(torch.randn(width)) if bias else None

    def weight(self):
        return self.matrix

    def bias(self):
        return self.shift

    def forward(self, x):
        return nn.functional.linear(x, self.matrix, self.shift)


class Thin(Dense):
    """The same, of rank 2, with factors."""

    def __init__(self, inputs, width, bias=True, seed=0):
        super().__init__(inputs, width, bias, seed)
        self.p, self.q = nn.Parameter(torch.randn(inputs, 2)), nn.Parameter(torch.randn(width, 2))

    def weight(self):
        return self.q @ self.p.T

    def factors(self):
        return self.p, self.q

    def forward(self, x):
        raise AssertionError("the op does this")


def make(name, **settings):
    torch.manual_seed(0)
    return timm.create_model(name, **{"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3, **settings})


def test_find_in_fused_and_split_attentions():
    vit = make("vit_tiny_patch16_224", img_size=32)
    rows = qkv.find(vit)
    assert [(r.layer, r.role, r.first, r.width, r.inputs, r.heads) for r in rows[:2]] == [
        ("blocks.0.attn.qkv", "q", 0, 32, 32, 2),
        ("blocks.0.attn.qkv", "v", 64, 32, 32, 2),
    ]
    assert len(rows) == 4 and qkv.find(vit, roles=("k",))[0].first == 32
    eva = make("eva02_base_patch14_224", img_size=28)  # q, k and v apart
    assert [(r.layer, r.first) for r in qkv.find(eva)[:2]] == [("blocks.0.attn.q_proj", 0), ("blocks.0.attn.v_proj", 0)]
    assert qkv.find(nn.Sequential(nn.Linear(2, 2))) == []
    swin = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=32, depths=(1, 1), num_heads=(1, 2))
    assert [r.width for r in qkv.find(swin)] == [32, 32, 64, 64]


@pytest.mark.parametrize(
    ("name", "settings"),
    [("tiny_vit_5m_224", {}), ("maxvit_tiny_rw_224", {}), ("gcvit_xxtiny", {}), ("efficientformer_l1", {})],
)
def test_layouts_that_are_not_three_blocks_of_rows_are_left_alone(name, settings):
    with torch.device("meta"):
        model = timm.create_model(name, **settings)
    for r in qkv.find(model):  # GCViT's local attentions are ordinary
        assert name == "gcvit_xxtiny" and not model.get_submodule(r.attention).use_global


@pytest.mark.parametrize("kind", [Dense, Thin])
@pytest.mark.parametrize("bias", [True, False])
def test_shifted_adds_to_its_rows_and_leaves_the_keys(kind, bias):
    base = nn.Linear(6, 15)
    layer = Shifted(base, {"q": (0, kind(6, 5, bias, 1)), "v": (10, kind(6, 5, bias, 2))})
    x = torch.randn(2, 4, 6, requires_grad=True)
    y, stock = layer(x), base(x)
    assert torch.equal(y[..., 5:10].view(torch.int32), stock[..., 5:10].view(torch.int32))  # T13, every bit
    for rows, delta in ((slice(0, 5), layer.q), (slice(10, 15), layer.v)):
        wanted = stock[..., rows] + x @ delta.weight().T + (delta.shift if bias else 0)
        torch.testing.assert_close(y[..., rows], wanted)
    y.square().sum().backward()
    merged = layer.merged()
    assert merged is base
    torch.testing.assert_close(merged(x), y)


def test_factors_run_as_one_op(monkeypatch):
    calls = []
    monkeypatch.setattr(lowrank, "add", lambda *a, add=lowrank.add, **k: calls.append(a) or add(*a, **k))
    base = nn.Linear(6, 15)
    Shifted(base, {"q": (0, Thin(6, 5)), "v": (10, Thin(6, 5))})(torch.randn(2, 6))
    assert len(calls) == 1
    Shifted(base, {"q": (0, Dense(6, 5)), "v": (10, Dense(6, 5))})(torch.randn(2, 6))
    assert len(calls) == 1


@pytest.mark.parametrize("kind", [Dense, Thin])
def test_autocast_computes_in_the_dtype_of_the_base(kind):
    layer = Shifted(nn.Linear(6, 15), {"q": (0, kind(6, 5)), "v": (10, kind(6, 5))})
    x = torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
        low.float().sum().backward()
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), layer(x), rtol=0.05, atol=0.1)


def test_merged_uses_the_attentions_biases_or_makes_one():
    x = torch.randn(2, 6)
    base = nn.Linear(6, 15, bias=False).requires_grad_(False)
    layer = Shifted(base, {"q": (0, Dense(6, 5, True, 1)), "v": (10, Dense(6, 5, False, 2))})
    own = nn.Parameter(torch.zeros(5))
    wanted = layer(x)
    layer.merged({"q": own})
    assert base.bias is None and torch.equal(own, layer.q.shift)
    torch.testing.assert_close(base(x)[:, :5] + own, wanted[:, :5])
    base = nn.Linear(6, 15, bias=False).requires_grad_(False)
    layer = Shifted(base, {"q": (0, Dense(6, 5, True, 1)), "v": (10, Dense(6, 5, False, 2))})
    wanted = layer(x)
    assert layer.merged().bias is not None and not base.bias.requires_grad
    torch.testing.assert_close(base(x), wanted)


def test_merge_in_half_precision_adds_in_float32():
    base = nn.Linear(8, 12).to(torch.bfloat16)
    layer = Shifted(base, {"q": (0, Dense(8, 4))})
    exact = (base.weight[:4].double() + layer.q.weight().double()).to(torch.bfloat16)
    assert torch.equal(layer.merged().weight[:4], exact)


def test_scrambled_is_what_the_specification_says():
    """T11 of the released code: head h, token t gets segment ((N mod heads) h + t) mod heads of a constant b."""
    for tokens, images in ((50, 1), (197, 4)):
        heads, size = 12, 2
        b = torch.arange(heads).repeat_interleave(size).float().expand(images, tokens, -1)
        got = qkv.scrambled(b, heads).view(images, tokens, heads, size)
        h, t = torch.arange(heads), torch.arange(tokens)[:, None]
        wanted = (((tokens % heads) * h + t) % heads).float()
        assert torch.equal(got, wanted[None, :, :, None].expand_as(got))
    one_head = torch.randn(1, 3, 4)
    assert torch.equal(qkv.scrambled(one_head, 1), one_head)  # one image, one head: nothing to mix


def cut(kind):
    """A small ViT whose heads were factored (ComCAT) or sliced (UVC), and its images."""
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=3
    ).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    if kind == "factored":
        comcat.apply(model, comcat.make_plan(model, {"qk": 4, "vo": 6, "fc2": 8}))
    else:
        shapes = uvc.read_shapes(model)
        blocks = [uvc.BlockPlan((0, 1, 3), ((0, 1, 2), (0, 1, 2, 3, 4, 5, 6, 7), (2,)), tuple(range(64)))] * 2
        uvc.apply(model, uvc.Plan(shapes, tuple(blocks)))
    return model, torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("kind", "widths"), [("factored", [16, 16, 24]), ("sliced", [24, 24, 12])])
def test_queries_and_values_of_cut_heads(kind, widths):
    model, x = cut(kind)
    stock, adapted = copy.deepcopy(model), copy.deepcopy(model)
    places = [(r.role, r.first, r.width) for r in qkv.find(model)][:2]
    assert places == [("q", 0, widths[0]), ("v", widths[0] + widths[1], widths[2])]
    baselines.lora_qv(adapted, rank=2)
    assert torch.equal(adapted(x), stock(x))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    kept = slice(widths[0], widths[0] + widths[1])
    tokens = torch.randn(1, 5, 32)
    one, other = adapted.blocks[0].attn.qkv(tokens), stock.blocks[0].attn.qkv(tokens)
    assert torch.equal(one[..., kept], other[..., kept]) and not torch.allclose(one, other)
    wanted = adapted(x)
    assert (wanted - stock(x)).abs().max() > 1e-3
    baselines.merge(adapted)
    assert [type(m) for m in adapted.modules()] == [type(m) for m in stock.modules()]
    torch.testing.assert_close(adapted(x), wanted, rtol=1e-5, atol=1e-5)


def test_kadaptation_on_factored_heads_gives_the_values_a_bias():
    model, x = cut("factored")
    before = copy.deepcopy(model.state_dict())
    kadaptation.attach(model, n=4, seed=0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "kad_" in name:
                p.normal_(std=0.2)
    wanted = model(x)
    merged = kadaptation.merge(model)
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
    merged.unmerge()
    assert torch.equal(model(x), wanted)
    kadaptation.detach(model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_adapters_around_a_factored_mlp():
    model, x = cut("factored")
    wanted = model(x)
    report = baselines.adapter(model, 4)
    assert report.matched == ["blocks.0.mlp", "blocks.1.mlp"] and torch.equal(model(x), wanted)
