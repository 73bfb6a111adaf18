"""Where queries and values are, and layers with deltas on their rows."""

import pytest
import timm
import torch
from torch import nn

from leanvit import qkv
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
