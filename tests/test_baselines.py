import copy
import math

import peft
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import leanvit
from leanvit import baselines, lbp_wht, surgery, train
from leanvit.baselines import (
    LoRA,
    adapter,
    bitfit,
    compacter,
    detach,
    full,
    l2_sp,
    linear_probe,
    lora,
    lora_qv,
    lora_scrambled,
    merge,
    top_blocks,
    vera,
    wise,
)
from leanvit.lora import Scrambled


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


def lora_on_a_linear_layer():
    torch.manual_seed(0)
    layer = LoRA(nn.Linear(6, 4).requires_grad_(False), rank=2, alpha=3)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 6, requires_grad=True)
    return layer, x, layer.base(x) + 1.5 * x @ layer.lora_A.T @ layer.lora_B.T


@pytest.mark.parametrize("hooked", [False, True])
def test_a_frozen_linear_layer_runs_as_one_with_its_lora(hooked):
    layer, x, plain = lora_on_a_linear_layer()
    seen = []
    if hooked:
        layer.base.register_forward_hook(lambda module, inputs, y: seen.append(y))
    y = layer(x)
    assert (type(y.grad_fn).__name__ == "_FrozenLinearBackward") is not hooked
    assert not hooked or torch.equal(seen[0], F.linear(x, layer.base.weight, layer.base.bias))  # left as it was
    wanted, g = (x, layer.lora_A, layer.lora_B), torch.randn_like(y)
    torch.testing.assert_close(y, plain)
    for ours, theirs in zip(torch.autograd.grad(y, wanted, g), torch.autograd.grad(plain, wanted, g), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:.torch.jit.")  # is deprecated; torch.func.jvp calls it, too
def test_lora_under_transforms_and_tracing():
    layer, x, plain = lora_on_a_linear_layer()
    torch.testing.assert_close(torch.func.vmap(layer)(x), plain)
    _, tangent = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, layer(torch.ones_like(x)) - layer.base.bias)
    own = {n: p.detach() for n, p in layer.named_parameters() if "lora_" in n}
    loss = lambda p, row: torch.func.functional_call(layer, p, (row,)).square().sum()  # noqa: E731
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(own, x.detach())  # a gradient an image
    plain.square().sum().backward()
    torch.testing.assert_close(each["lora_A"].sum(0), layer.lora_A.grad)
    torch.testing.assert_close(torch.fx.symbolic_trace(layer)(x), plain)
    traced = torch.jit.trace(layer, (x.detach(),))
    assert "PythonOp" not in str(traced.graph)  # can be saved
    exported = torch.export.export(layer, (x.detach(),))
    assert not any("leanvit" in str(node.target) for node in exported.graph.nodes)  # loads without this package


def test_lora_on_a_base_that_leaves_autocast():
    class Whole(nn.Linear):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float())

    layer, x = LoRA(Whole(6, 4).requires_grad_(False), rank=2, alpha=2), torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.float32


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


# ---- what holds for every adapter ----------------------------------------------------------------------------------

ADAPTERS = {
    "lora": (lambda m: lora(m, rank=2), "lora_"),
    "lora_qv": (lambda m: lora_qv(m, rank=2, alpha=3), "lora_"),
    "adapter": (lambda m: adapter(m, width=4), "adapter_"),
    "compacter": (lambda m: compacter(m, width=8), "compacter_"),
    "compacter with its rule": (lambda m: compacter(m, width=8, rank=2, train_rule=True), "compacter_"),
    "vera": (lambda m: vera(m, rank=6), "vera_"),
}
MERGEABLE = {"lora", "lora_qv", "vera"}
every_adapter = pytest.mark.parametrize("method", ADAPTERS)


def noisy(model, std=0.1):
    """Weights away from every special value."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(std * torch.randn(p.shape, generator=generator))
    return model.eval()


def attached(method, **settings):
    """A disturbed model, what it was, and the report."""
    model = noisy(vit(**settings))
    stock = copy.deepcopy(model)
    torch.manual_seed(3)
    return model, stock, ADAPTERS[method][0](model)


def trained_once(model):
    """Values for everything that is trained, away from the start."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


@every_adapter
def test_the_stock_model_at_the_start_and_the_trained_names(method):  # T1, T17
    model, stock, report = attached(method)
    assert torch.equal(model(images()), stock(images()))
    head = {"head.weight", "head.bias"}
    prefix = ADAPTERS[method][1]
    assert head < trainable(model)
    assert all(any(c.startswith(prefix) for c in n.split(".")) for n in trainable(model) - head)
    assert (report.trainable, report.total) == surgery.count(model) and len(report.matched) in (2, 4)


@every_adapter
def test_every_trained_parameter_is_used(method):  # T16
    model, _, _ = attached(method)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(images()), torch.tensor([0, 1, 2, 0])).backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert all(g is not None for g in grads.values())
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        if step:
            assert all(g.abs().max() > 0 for g in grads.values()), [n for n, g in grads.items() if not g.any()]
        optimizer.step()


@every_adapter
def test_frozen_is_frozen_and_detach_gives_it_back(method):  # T9
    model, stock, _ = attached(method)
    kept = {n: t.clone() for n, t in model.state_dict().items() if n not in trainable(model)}
    data = TensorDataset(images(), torch.tensor([0, 1, 2, 0]))
    recipe = train.Recipe(batch_size=4, lr=0.01, steps=3, weight_decay=0.1)
    train.fit(model, data, recipe, progress=False)
    after = model.state_dict()
    assert all(torch.equal(after[n], t) for n, t in kept.items())
    assert (model(images()) - stock(images())).abs().max() > 1e-3
    detach(model)
    head = ("head.weight", "head.bias")
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]
    assert model.state_dict().keys() == stock.state_dict().keys() and not hasattr(model, "peft_config")
    assert all(torch.equal(t, stock.state_dict()[n]) for n, t in model.state_dict().items() if n not in head)


@every_adapter
def test_images_of_a_batch_do_not_meet(method):  # T10
    model = trained_once(attached(method)[0])
    x = images()
    together = model(x)
    for j in range(len(x)):
        torch.testing.assert_close(together[j : j + 1], model(x[j : j + 1]), rtol=1e-5, atol=1e-5)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(model(x[order]), together[order], rtol=1e-5, atol=1e-5)


@every_adapter
def test_merge_or_a_reason(method):  # T8
    model, stock, _ = attached(method)
    adapted = trained_once(model)(images())
    if method not in MERGEABLE:
        state = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=r"cannot be folded into a weight: a (ReLU|GELU) stands between"):
            merge(model)
        assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
        return
    assert (adapted - stock(images())).abs().max() > 1e-2
    exact = copy.deepcopy(model).double()(images().double())
    merge(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]
    torch.testing.assert_close(model(images()), adapted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(images()).double(), exact, rtol=1e-5, atol=1e-5)
    timm.models.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3
    ).load_state_dict(model.state_dict())


@pytest.mark.parametrize("method", [m for m in ADAPTERS if m in MERGEABLE])
def test_unmerge_restores_weights_and_adapters(method):  # T8
    model, _, _ = attached(method)
    adapted = trained_once(model)(images())
    before, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    merged = merge(model)
    base = "base_layer" if method == "vera" else "base"
    assert not torch.equal(model.blocks[0].attn.qkv.weight, before[f"blocks.0.attn.qkv.{base}.weight"])
    merged.unmerge()
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(t, before[n]) for n, t in after.items())
    assert all(m is modules[n] for n, m in model.named_modules()) and torch.equal(model(images()), adapted)
    with pytest.raises(ValueError, match="unmerge: .* is not the layer that this merge left"):
        merged.unmerge()


@every_adapter
def test_save_and_load(method, tmp_path):  # T15
    model, stock, report = attached(method)
    trained_once(model)
    path = leanvit.save(model, tmp_path / "adapter.safetensors")
    rule = 64 if method == "compacter" else 0  # frozen, but random: it travels with the adapter, once
    header = int.from_bytes(path.read_bytes()[:8], "little") + 8
    assert path.stat().st_size - header == 4 * (report.trainable + rule)
    torch.manual_seed(99)
    fresh = copy.deepcopy(stock)
    ADAPTERS[method][0](fresh)
    leanvit.load(fresh, path)
    assert torch.equal(fresh(images()), model(images()))
    deeper = timm.models.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=3
    )  # fmt: skip
    ADAPTERS[method][0](deeper)
    with pytest.raises(ValueError, match="does not fit this model"):
        leanvit.load(deeper, path)


@every_adapter
def test_attached_twice_or_without_a_head(method):
    model, _, _ = attached(method)
    before = [(n, p.requires_grad) for n, p in model.named_parameters()]
    for other in ADAPTERS.values():
        with pytest.raises(ValueError, match=r"this model has \w+ already \(blocks\.0\..*\); merge or detach it first"):
            other[0](model)
    assert before == [(n, p.requires_grad) for n, p in model.named_parameters()]
    if method == "lora":
        return
    model = vit(num_classes=0)
    with pytest.raises(ValueError, match="VisionTransformer has no classifier head"):
        ADAPTERS[method][0](model)
    assert all(p.requires_grad for p in model.parameters())


@every_adapter
def test_copies_and_half_precision(method):
    model, _, _ = attached(method)
    trained_once(model)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images()), model(images()))
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert model(images()).any()
    model.double()
    assert model(images().double()).dtype == torch.float64  # what layers share is converted once, for all
    half = vit().to(torch.bfloat16)
    ADAPTERS[method][0](half)
    assert half(images().bfloat16()).dtype == torch.bfloat16


# ---- LoRA on queries and values ------------------------------------------------------------------------------------


class Split(nn.Module):
    """A fused qkv as three linear layers."""

    def __init__(self, qkv):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        for part, weight, bias in zip((self.q, self.k, self.v), qkv.weight.chunk(3), qkv.bias.chunk(3), strict=True):
            part.weight, part.bias = nn.Parameter(weight.detach().clone()), nn.Parameter(bias.detach().clone())

    def forward(self, x):
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


def test_lora_qv_equals_pefts_lora_on_separate_queries_and_values():  # T11
    ours = noisy(vit())
    theirs = copy.deepcopy(ours)
    for block in theirs.blocks:
        block.attn.qkv = Split(block.attn.qkv)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q", "v"])).eval()
    lora_qv(ours, rank=2, alpha=3)
    disturb(ours)
    pairs = []
    for i, block in enumerate(theirs.base_model.model.blocks):
        for role in ("q", "v"):
            a, b = getattr(ours.blocks[i].attn.qkv, role), getattr(block.attn.qkv, role)
            pairs += [(a.lora_A, b.lora_A.default.weight), (a.lora_B, b.lora_B.default.weight)]
    with torch.no_grad():
        for a, b in pairs:
            b.copy_(a)
    one, other = ours(images()), theirs(images())
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    one.square().sum().backward()
    other.square().sum().backward()
    for a, b in pairs:
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_lora_qv_leaves_keys_alone():  # T11, T13
    model, stock = noisy(vit()), noisy(vit())
    report = lora_qv(model, rank=4)
    assert report.matched == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    assert report.trainable == 4 * 2 * 16 * 4 + 16 * 3 + 3
    disturb(model)
    x = torch.randn(2, 5, 16)
    ours, base = model.blocks[0].attn.qkv(x), stock.blocks[0].attn.qkv(x)
    assert torch.equal(ours[..., 16:32], base[..., 16:32])
    for rows in (slice(0, 16), slice(32, 48)):
        assert (ours[..., rows] - base[..., rows]).abs().amin() > 0
    merge(model)
    for a, b in zip(model.blocks, stock.blocks, strict=True):
        assert torch.equal(a.attn.qkv.weight[16:32], b.attn.qkv.weight[16:32])
        assert torch.equal(a.attn.qkv.bias, b.attn.qkv.bias)
        delta = (a.attn.qkv.weight - b.attn.qkv.weight).double()
        assert all(torch.linalg.matrix_rank(d, rtol=1e-4) == 4 for d in (delta[:16], delta[32:]))


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "beit_base_patch16_224", "deit3_small_patch16_224"])
def test_lora_qv_on_other_families(name):
    torch.manual_seed(0)
    model = noisy(timm.create_model(name, depth=1, embed_dim=48, num_heads=2, img_size=28, num_classes=3))
    stock, x = copy.deepcopy(model), images(28)
    report = lora_qv(model, rank=2, match=lambda n, m: n.startswith("blocks.0"))
    assert all(n.startswith("blocks.0.attn.") for n in report.matched)
    torch.testing.assert_close(model(x), stock(x), rtol=1e-5, atol=1e-5)  # a qkv bias may be added apart
    adapted = disturb(model)(x)
    assert (adapted - stock(x)).abs().max() > 1e-3
    merged = copy.deepcopy(model)
    merge(merged)
    torch.testing.assert_close(merged(x), adapted, rtol=1e-5, atol=1e-5)
    detach(model)
    with torch.no_grad():  # torch's fused attention is another kernel where BEiT's position bias needs a gradient
        assert torch.equal(model(x), stock(x)) and model.state_dict().keys() == stock.state_dict().keys()


def test_a_file_of_another_alpha_does_not_load(tmp_path):
    one, other, scrambled = vit(), vit(), vit()
    lora_qv(one, rank=2, alpha=2)
    path = leanvit.save(disturb(one), tmp_path / "lora.safetensors")
    lora_qv(other, rank=2, alpha=16)
    lora_scrambled(scrambled, rank=2, alpha=2)
    for model, message in ((other, "'scale': 8.0} in the model"), (scrambled, "'Scrambled'")):
        with pytest.raises(ValueError, match=f"settings of blocks.0.attn.qkv.q: .*{message}"):
            leanvit.load(model, path)


@pytest.mark.parametrize("method", ["compacter", "vera"])
def test_lbp_wht_does_not_unfreeze_what_is_under_an_adapter(method):
    model, _, _ = attached(method)
    trained = trainable(model)
    with pytest.raises(ValueError, match="scope 'last' would unfreeze the weights under blocks.0"):
        lbp_wht.attach(model, bases="LP_L1-2", scope="last", example=images())
    assert trainable(model) == trained


def test_lora_qv_around_lbp_wht():
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(img_size=64, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=3)
    stock, x = copy.deepcopy(model), images(64)
    lbp_wht.attach(model, bases="LP_L1-2", exact_when="never")
    lora_qv(model, rank=2)
    torch.testing.assert_close(model(x), stock(x))
    model(x).square().sum().backward()
    assert model.blocks[0].attn.qkv.v.lora_B.grad.abs().sum() > 0


# ---- the released LoRA ---------------------------------------------------------------------------------------------


def released_attention(attn, x, scale):
    """The released computation in its own layout, (tokens, batch, width): specification 1.6 c and d, section 2."""
    layer, (batch, tokens, width), heads = attn.qkv, x.shape, attn.num_heads
    size = width // heads
    x = x.transpose(0, 1)
    q, k, v = F.linear(x, layer.base.weight, layer.base.bias).chunk(3, dim=-1)
    q = q / math.sqrt(size)
    q, k, v = (t.contiguous().view(tokens, batch * heads, size).transpose(0, 1) for t in (q, k, v))
    dq, dv = (scale * (x @ d.lora_A.T @ d.lora_B.T) for d in (layer.q, layer.v))
    q = q + dq.contiguous().reshape(batch * heads, tokens, size)  # no transpose
    v = v + dv.contiguous().reshape(batch * heads, tokens, size)
    out = (q @ k.transpose(1, 2)).softmax(-1) @ v
    return attn.proj(out.transpose(0, 1).reshape(tokens, batch, width)).transpose(0, 1)


def test_lora_scrambled_is_the_released_computation_and_mixes_images():
    model, stock = noisy(vit()), noisy(vit())
    report = lora_scrambled(model)
    assert report.trainable == 4 * 2 * 16 * 4 + 16 * 3 + 3 and "demonstration" in str(report)
    layer = model.blocks[0].attn.qkv
    assert torch.equal(model(images()), stock(images())) and layer.q.scale == 32
    assert layer.q.lora_A.std().item() == pytest.approx(0.02, rel=0.4)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.q.lora_B.normal_(std=0.1)
            block.attn.qkv.v.lora_B.normal_(std=0.1)
    x = torch.randn(4, 5, 16)
    expected = released_attention(model.blocks[0].attn, x, scale=32)
    torch.testing.assert_close(model.blocks[0].attn(x), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(layer(x)[..., 16:32], stock.blocks[0].attn.qkv(x)[..., 16:32])
    # T10 fails: the same image among others gives other logits
    together, alone = model(images()), torch.cat([model(i[None]) for i in images()])
    assert (together - alone).abs().max() > 0.01 * together.abs().max()
    # the same adapters without the scrambling are independent of the batch
    for block in model.blocks:
        for delta in (block.attn.qkv.q, block.attn.qkv.v):
            delta.__class__ = Scrambled.__base__
    torch.testing.assert_close(model(images()), torch.cat([model(i[None]) for i in images()]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [50, 197])
@pytest.mark.parametrize("batch", [1, 4])
def test_scrambled_segments(tokens, batch):  # T11 of KAdaptation: which head and token gets which segment
    model = timm.models.VisionTransformer(img_size=8, patch_size=4, embed_dim=24, depth=1, num_heads=12, num_classes=2)
    lora_scrambled(model, rank=1, alpha=1)
    delta = model.blocks[0].attn.qkv.v
    with torch.no_grad():
        delta.lora_A.fill_(1 / 24)
        delta.lora_B.copy_(torch.arange(24.0)[:, None] // 2)  # the number of the segment
    y = delta(torch.ones(batch, tokens, 24))
    head, token = torch.meshgrid(torch.arange(12), torch.arange(tokens), indexing="ij")
    expected = ((tokens % 12) * head + token) % 12
    got = y.reshape(batch, tokens, 12, 2).permute(0, 2, 1, 3)
    torch.testing.assert_close(got, expected[None, :, :, None].float().expand_as(got))


def test_lora_scrambled_cannot_be_merged():
    model, stock = noisy(vit()), noisy(vit())
    lora_scrambled(model)
    with pytest.raises(ValueError, match="scrambled LoRA .* mixes tokens and images"):
        merge(model)
    detach(model)
    assert torch.equal(model(images()), stock(images()))


# ---- VeRA, top blocks, and staying near the start ------------------------------------------------------------------


def test_vera():
    model, stock = noisy(vit()), noisy(vit())
    report = vera(model, rank=6)
    assert report.trainable == 2 * (6 + 48) + 16 * 3 + 3 and any("keys are adapted too" in n for n in report.notes)
    layer = model.blocks[0].attn.qkv
    assert layer.vera_A is model.blocks[1].attn.qkv.vera_A  # shared
    trained_once(model)
    x = torch.randn(2, 5, 16)
    a, b = layer.vera_A["seed0"], layer.vera_B["seed0"]
    inner = layer.vera_lambda_d["seed0"] * (x @ a.T)
    expected = stock.blocks[0].attn.qkv(x) + layer.vera_lambda_b["seed0"] * (inner @ b.T)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_vera_of_another_seed_does_not_load(tmp_path):
    one, other = vit(), vit()
    vera(one, rank=6)
    path = leanvit.save(one, tmp_path / "vera.safetensors")
    vera(other, rank=6, seed=1)
    assert not torch.equal(one.blocks[0].attn.qkv.vera_A["seed0"], other.blocks[0].attn.qkv.vera_A["seed1"])
    with pytest.raises(ValueError, match="does not fit this model"):
        leanvit.load(other, path)


def test_vera_that_fails_leaves_the_model_as_it_was(monkeypatch):
    model = vit()
    linear_probe(model)
    names = [n for n, _ in model.named_modules()]
    monkeypatch.setattr(peft.VeraModel, "_mark_only_adapters_as_trainable", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        vera(model)
    assert [n for n, _ in model.named_modules()] == names and trainable(model) == {"head.weight", "head.bias"}
    assert not hasattr(model, "peft_config")


def test_top_blocks():
    model = vit()
    report = top_blocks(model, 1)
    block = {n for n, _ in model.named_parameters() if n.startswith("blocks.1.")}
    assert trainable(model) == block | {"head.weight", "head.bias"}
    assert report.trainable == 12 * 16**2 + 13 * 16 + 16 * 3 + 3
    assert top_blocks(model, 2, norm=True).trainable == 2 * (12 * 16**2 + 13 * 16) + 2 * 16 + 16 * 3 + 3
    model.fc_norm = nn.Linear(16, 16)  # a projection, no norm
    assert top_blocks(model, 2, norm=True).trainable == 2 * (12 * 16**2 + 13 * 16) + 2 * 16 + 16 * 3 + 3
    deep = timm.models.VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=12, num_heads=1, num_classes=2)
    top_blocks(deep, 2)
    assert {n.split(".")[1] for n in trainable(deep) if n.startswith("blocks")} == {"10", "11"}


def test_wise():
    before, after = noisy(vit()), noisy(vit(), 0.2)
    reference = before.state_dict()
    for alpha in (0.0, 0.25, 1.0):
        model = copy.deepcopy(after)
        wise(model, reference, alpha)
        for name, value in model.state_dict().items():
            old, new = before.state_dict()[name], after.state_dict()[name]
            if name.startswith("head.") or alpha == 1:
                assert torch.equal(value, new)
            elif alpha == 0:
                assert torch.equal(value, old)
            else:
                torch.testing.assert_close(value, 0.75 * old + 0.25 * new)
    # a new head after the pretraining is no obstacle
    other_head = vit(num_classes=7).state_dict()
    wise(copy.deepcopy(after), other_head, 0.5)
    wise(copy.deepcopy(after), {n: t for n, t in other_head.items() if not n.startswith("head.")}, 0.5)


def test_wise_refuses():
    model = noisy(vit())
    state = copy.deepcopy(model.state_dict())
    for alpha in (-0.1, 1.1, "half", float("nan")):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            wise(model, state, alpha)
    with pytest.raises(ValueError, match="has no tensor blocks.1.mlp.fc2.bias"):
        wise(model, {n: t * 2 for n, t in state.items() if n != "blocks.1.mlp.fc2.bias"}, 0.5)
    with pytest.raises(ValueError, match=r"norm.bias has shape \(3,\) before the training and \(16,\) now"):
        wise(model, {n: t * 2 for n, t in state.items()} | {"norm.bias": torch.zeros(3)}, 0.5)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_l2_sp():
    model = noisy(vit())
    top_blocks(model, 1)
    loss = l2_sp(model, alpha=0.5)
    labels = torch.tensor([0, 1, 2, 0])
    assert torch.equal(loss(model, images(), labels), F.cross_entropy(model(images()), labels))  # at the start
    moved = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.add_(moved[n])
    expected = 0.25 * sum(d.square().sum() for n, d in moved.items() if n.startswith("blocks.1."))
    value = loss(model, images(), labels)
    torch.testing.assert_close(value - F.cross_entropy(model(images()), labels), expected)
    (value - F.cross_entropy(model(images()), labels)).backward()
    weight = model.blocks[1].attn.qkv.weight
    torch.testing.assert_close(weight.grad, 0.5 * moved["blocks.1.attn.qkv.weight"], rtol=1e-4, atol=1e-5)
    assert not model.head.weight.grad.abs().max() > 1e-5


def test_l2_sp_keeps_a_training_near_its_start():
    labels, far = torch.tensor([0, 1, 2, 0]), []
    for alpha in (0.0, 10.0):
        model = noisy(vit())
        full(model)
        start = copy.deepcopy(model.state_dict())
        recipe = train.Recipe(batch_size=4, lr=0.01, steps=20)
        train.fit(model, TensorDataset(images(), labels), recipe, loss=l2_sp(model, alpha), progress=False)
        moved = [(t - start[n]).norm() for n, t in model.state_dict().items() if not n.startswith("head.")]
        far.append(torch.stack(moved).norm().item())
    assert far[1] < 0.3 * far[0]


def test_l2_sp_refuses():
    with pytest.raises(ValueError, match="alpha=-1"):
        l2_sp(vit(), -1)
    model = vit()
    linear_probe(model)
    with pytest.raises(ValueError, match="no parameter outside of the head is trained"):
        l2_sp(model, 0.1)


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
        with pytest.raises(ValueError, match=f"{undo.__name__}: none of LoRA, Adapter, Compacter, VeRA is attached"):
            undo(vit())
    conv = timm.create_model("resnet18", num_classes=3)
    for method, message in (
        (lambda m: top_blocks(m, 3), "n=3 is more than the 2 blocks"),
        (lambda m: top_blocks(m, 0), "n=0 must be a whole number"),
        (lambda m: lora_qv(m, rank=0), "rank=0 must be"),
        (lambda m: lora_qv(m, alpha=0), "alpha=0 must be a number above 0"),
        (lambda m: lora_qv(m, match=lambda n, m: "atn" in n), "none of the query and value layers blocks.0.attn.qkv"),
        (lambda m: lora(m, alpha=float("nan")), "alpha=nan must be"),
        (lambda m: lora_scrambled(m, rank=1.5), "rank=1.5 must be"),
        (lambda m: vera(m, rank=0), "rank=0 must be"),
        (lambda m: vera(m, seed=-1), "seed=-1 must be"),
        (lambda m: vera(m, match=lambda n, m: False), "match chose none of the query and value layers blocks.0"),
        (lambda m: vera(m, d_initial=0), "d_initial=0 must be a finite number other than 0"),
        (lambda m: vera(m, d_initial=float("nan")), "d_initial=nan must be"),
        (lambda m: vera(m, d_initial="x"), "d_initial='x' must be"),
    ):
        model = vit()
        linear_probe(model)
        with pytest.raises(ValueError, match=message):
            method(model)
        assert trainable(model) == {"head.weight", "head.bias"}
    for method in (lora_qv, vera, lora_scrambled, lambda m: top_blocks(m, 1)):
        with pytest.raises(ValueError, match="ResNet"):
            method(conv)
    assert not baselines.attention_projections("head", nn.Linear(1, 1))
    assert not baselines.attention_projections("attn_pool.qkv", nn.Linear(1, 1))
