"""ComCAT: data-aware factors, recovery, the diffusion adapter and export; T6, T25, T31 of the specification."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from test_comcat import cut, images, rel, vit
from torch import nn

from leanvit import baselines, comcat, comcat_diffusion, export, kadaptation, lbp_wht, lora, surgery, train, uvc
from leanvit.comcat import apply, make_plan
from leanvit.comcat_calibrate import Moments, calibrate, mix
from leanvit.comcat_diffusion import ProductAdapter, WideAttention, parameters_formula
from leanvit.comcat_modules import read_heads
from leanvit.comcat_recover import Regression, authors_loss, refit
from leanvit.distill import Distill, aligned_blocks, alignment_weights
from leanvit.uvc_plan import whole_plan


def structured(n=64, seed=0, dtype=torch.float64):
    """Images that span little of what there could be: what data-aware factors live on."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.randn(6, 3 * 16 * 16, generator=torch.Generator().manual_seed(9))
    x = torch.randn(n, 6, generator=g) @ basis + 0.05 * torch.randn(n, 3 * 16 * 16, generator=g)
    return x.view(n, 3, 16, 16).to(dtype)


# --- calibration -----------------------------------------------------------------------------------------------------


def test_moments():
    x = torch.randn(3, 50, 4, dtype=torch.float64) + 2
    moments = Moments()
    for piece in x.split(20, dim=1):
        moments.add(piece)
    assert moments.count == 50 and torch.allclose(moments.mean, x.mean(1))
    assert torch.allclose(moments.covariance(True), torch.stack([torch.cov(t.T, correction=0) for t in x]))
    assert torch.allclose(moments.covariance(False), x.mT @ x / 50)


@pytest.mark.parametrize("rank", [2, 6])
def test_layer_error_is_the_sum_of_dropped_values(rank):  # T6, centred, with the bias that takes over the mean
    model, x = vit(torch.float64), structured()
    statistics = calibrate(model, x.split(16), ridge=0)
    seen = {}
    layer = model.blocks[0].mlp.fc1
    layer.register_forward_pre_hook(lambda m, i: seen.__setitem__("x", i[0]))
    model(x)
    small = cut(model, {"blocks.0.mlp.fc1": rank}, statistics).blocks[0].mlp.fc1
    error = (small(seen["x"]) - layer(seen["x"])).square().sum(-1).mean()
    values = torch.linalg.svdvals(statistics.weighting("blocks.0.mlp.fc1")[0][0] @ layer.weight.T)
    assert float(error.detach()) == pytest.approx(float(values[rank:].square().sum().detach()), rel=1e-6)
    plain = cut(model, {"blocks.0.mlp.fc1": rank}).blocks[0].mlp.fc1
    assert error <= (plain(seen["x"]) - layer(seen["x"])).square().sum(-1).mean()


def first_attention():
    """A model with its statistics, what its first attention saw, and the heads of that."""
    model, x, seen = vit(torch.float64), structured(), {}
    statistics = calibrate(model, [x], ridge=0)
    model.blocks[0].attn.register_forward_pre_hook(lambda m, i: seen.__setitem__("x", i[0]))
    model(x)
    return model, statistics, seen, read_heads(model.blocks[0].attn)


def test_scores_error_is_the_sum_of_dropped_values():  # T6, for W_QK: pooled pairs of queries and centred keys
    model, statistics, seen, h = first_attention()
    s = read_heads(cut(model, {"blocks.0.attn.qk": 5, "blocks.0.attn.vo": 16}, statistics).blocks[0].attn)
    q = torch.cat([seen["x"], torch.ones_like(seen["x"][..., :1])], -1).flatten(0, 1)
    k = (seen["x"] - seen["x"].mean(1, keepdim=True)).flatten(0, 1)
    dense = torch.cat([h.q, h.bq[:, None]], 1) @ h.k.mT
    small = torch.cat([s.q, s.bq[:, None]], 1) @ s.k.mT
    error = ((q @ (dense - small)) @ k.T).square().mean((1, 2))
    left, right = statistics.weighting("blocks.0.attn.qk")
    values = torch.linalg.svdvals(left[0] @ dense @ right[0])
    assert torch.allclose(error, values[:, 5:].square().sum(1), rtol=1e-6)
    plain = read_heads(cut(model, {"blocks.0.attn.qk": 5, "blocks.0.attn.vo": 16}).blocks[0].attn)
    worse = ((q @ (dense - torch.cat([plain.q, plain.bq[:, None]], 1) @ plain.k.mT)) @ k.T).square().mean((1, 2))
    assert (error <= worse).all()


def test_outputs_error_is_the_sum_of_dropped_values():  # T6, for W_VO: what each head mixes, centred, bias and all
    model, statistics, seen, h = first_attention()
    mixed = mix(model.blocks[0].attn, seen["x"]).transpose(0, 1).flatten(1, 2)  # (heads, rows, width)
    errors = []
    for used in (statistics, None):
        s = read_heads(cut(model, {"blocks.0.attn.qk": 16, "blocks.0.attn.vo": 5}, used).blocks[0].attn)
        lost = mixed @ (h.v @ h.o - s.v @ s.o)
        errors.append((lost - lost.mean(1, keepdim=True)).square().sum(-1).mean(1))
        if used is not None:  # the mean of what is lost is in the output's bias
            shift = s.bo - h.bo - torch.einsum("hk,hko->o", h.bv, h.o)
            assert rel(shift, lost.mean(1).sum(0)) < 1e-9
    values = torch.linalg.svdvals(statistics.weighting("blocks.0.attn.vo")[0][0] @ h.v @ h.o)
    assert torch.allclose(errors[0], values[:, 5:].square().sum(1), rtol=1e-6)
    assert (errors[0] <= errors[1]).all() and errors[0].sum() < 0.9 * errors[1].sum()


def test_mixed_inputs_are_those_of_the_attention():
    model = vit(torch.float64, qk_norm=True)
    x, a = torch.randn(2, 17, 48, dtype=torch.float64), model.blocks[0].attn
    h = read_heads(a)
    y = torch.einsum("bhnd,hdk,hko->bno", mix(a, x), h.v, h.o) + torch.einsum("hk,hko->o", h.bv, h.o) + h.bo
    assert rel(y, a(x)) < 1e-12


@pytest.mark.parametrize(
    "ranks", [{"qk": 5, "vo": 5}, {"vo": 4}, {"fc1": 24, "fc2": 24}, {"qk": 6, "vo": 6, "fc1": 20}]
)
def test_data_aware_factors_are_better(ranks):
    """On other images of the same kind, and exact where nothing is cut."""
    model = vit(torch.float64)
    statistics, x = calibrate(model, structured(256).split(64)), structured(64, seed=5)
    assert statistics.images == 256 and statistics.notes == []
    errors = [rel(cut(model, ranks, s)(x), model(x)) for s in (statistics, None)]
    assert errors[0] < 0.8 * errors[1]
    full = {"qk": 16, "vo": 16, "fc1": 48, "fc2": 48, "head": 7}
    assert rel(cut(model, full, calibrate(model, [structured(64)]))(x), model(x)) < 1e-6


def test_calibration_leaves_no_trace_and_refuses_nonsense():
    model = vit().train()
    before = copy.deepcopy(model.state_dict())
    statistics = calibrate(model, [(images(8), torch.zeros(8)), (images(4), None)])
    assert model.training and all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert statistics.images == 12 and "12 images are fewer than the width 48" in statistics.notes[0]
    small = copy.deepcopy(model)
    report = apply(small, make_plan(model, {"qk": 5, "vo": 5}), statistics)
    assert "data-aware factors from 12 images" in str(report) and "a ridge of 0.0001 regularises" in str(report)
    assert all(torch.isfinite(p).all() for p in small.parameters())
    with pytest.raises(ValueError, match="no images"):
        calibrate(model, [])
    with pytest.raises(ValueError, match="NaN or infinity"):
        calibrate(model, [images(8) * float("nan")])
    other = vit(depth=3)
    with pytest.raises(ValueError, match="statistics are of VisionTransformer"):
        apply(other, make_plan(other, {"qk": 5}), statistics)


# --- recovery --------------------------------------------------------------------------------------------------------


def test_alignment_weights():  # T25
    weights = alignment_weights(30)
    assert weights[:6] == pytest.approx([0.5, 0.4993, 0.4966, 0.4905, 0.4797, 0.4634], abs=6e-5)
    assert weights[19] == pytest.approx(0.0108, abs=6e-5) and weights[20:] == [0.01] * 10
    assert aligned_blocks(12) == [0, 1, 10, 11] and aligned_blocks(3) == [0, 1, 2] and aligned_blocks(1) == [0]


def test_learning_rates_of_the_log():  # T25
    recipe = train.Recipe(batch_size=256, lr=2.5e-4, steps=30, min_lr_ratio=0.04)
    got = [train.learning_rate(recipe, t, 30) for t in (1, 2, 3, 4, 5, 15, 29)]
    assert got == pytest.approx([2.49e-4, 2.47e-4, 2.44e-4, 2.40e-4, 2.34e-4, 1.30e-4, 1.1e-5], abs=6e-7)


def test_distillation_is_the_authors_loss():
    teacher = vit(torch.float64).train()
    student, x, y = cut(teacher, {"qk": 5, "fc1": 9}).train(), images(6, dtype=torch.float64), torch.arange(6)
    loss = authors_loss(teacher, alignment=0.3)
    value = loss(student, x, y)
    outputs = {}
    for model in (teacher.eval(), student):
        tokens = model.patch_embed(x)
        tokens = model.norm_pre(model.patch_drop(model._pos_embed(tokens)))
        seen = []
        for block in model.blocks:
            tokens = block(tokens)
            seen.append(tokens)
        outputs[model] = model.forward_head(model.norm(tokens)), seen
    (t, deep), (s, shallow) = outputs[teacher], outputs[student]
    expected = 0.5 * F.cross_entropy(s, y) + 0.5 * F.cross_entropy(s, t.argmax(1))
    expected = expected + 0.3 * sum(F.mse_loss(a, b) for a, b in zip(shallow, deep, strict=True))
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    value.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert student.blocks[0].attn.qkv.weight.grad.norm() > 0
    assert not any(m._forward_hooks for m in (*teacher.modules(), *student.modules()))
    soft = Distill(teacher, 1.0, 2.0)
    kl = (4 * (t / 2).softmax(-1) * ((t / 2).log_softmax(-1) - (s / 2).log_softmax(-1))).sum(1).mean()
    assert float(soft(student, x, y).detach()) == pytest.approx(float(kl.detach()), rel=1e-5)


def test_distillation_keeps_the_teachers_modes():
    teacher = vit(drop_path_rate=0.5).train()
    teacher.blocks[0].eval()
    modes = [m.training for m in teacher.modules()]
    loss, student = authors_loss(teacher), vit().eval()
    with torch.no_grad():
        assert torch.equal(*(loss(student, images(), torch.arange(4)) for _ in range(2)))
    assert modes == [m.training for m in teacher.modules()]


def test_distillation_refuses_other_teachers():
    student, x, y = vit(), images(), torch.arange(4)
    with pytest.raises(ValueError, match="teacher has 5 classes, the model 7"):
        authors_loss(vit(num_classes=5))(student, x, y)
    with pytest.raises(ValueError, match="align models of one width"):
        authors_loss(vit(embed_dim=96))(student, x, y)
    with pytest.raises(ValueError, match="differ in their blocks"):
        authors_loss(vit(depth=3))(student, x, y)
    assert Distill(vit(depth=3))(student, x, y) > 0
    alone = Distill(vit(), 0.0, blocks=[1], alignment=1.0)  # no classes of the teacher, but its blocks
    assert torch.equal(alone(student, x, y), F.cross_entropy(student(x), y))
    with pytest.raises(ValueError, match="alpha=1.5"):
        Distill(student, 1.5)
    with pytest.raises(ValueError, match="name 0..1"):
        Distill(student, blocks=[0, 5])


def test_regression():
    torch.manual_seed(0)
    x, w, b = torch.randn(400, 6), torch.randn(6, 4), torch.randn(4)
    sums = Regression()
    for rows in x.split(100):
        sums.add(rows + 1, rows @ w + b)
    weight, bias = sums.solve(1e-9, torch.zeros(6, 4), True)
    assert rel(weight, w.double()) < 1e-6 and rel(bias, b - w.sum(0)) < 1e-5
    towards = torch.randn(6, 4)
    assert rel(sums.solve(1e9, towards, True)[0], towards.double()) < 1e-6  # the ridge wins
    assert sums.solve(0.0, towards, False)[1] is None


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("bias", ["absorb", "none"])
def test_refit_brings_the_outputs_back(statistics, bias):
    model = vit(torch.float64)
    fit, x = structured(256).split(64), structured(64, seed=5)
    ranks = {"qk": 10, "vo": 10, "fc1": 24, "fc2": 24}
    small = cut(model, ranks, calibrate(model, fit) if statistics else None, bias=bias)
    before, names = rel(small(x), model(x)), list(small.state_dict())
    qk = small.blocks[0].attn.qkv.weight.clone()
    report = refit(small, model, fit)
    after = rel(small(x), model(x))
    assert after < (0.96 if statistics else 0.6) * before
    assert list(small.state_dict()) == names and torch.equal(qk, small.blocks[0].attn.qkv.weight)
    assert report.matched[:3] == ["blocks.0.attn.proj", "blocks.0.mlp.fc1.second", "blocks.0.mlp.fc2.second"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for n in (small, model) for m in n.modules())


def test_refit_of_a_full_rank_changes_nothing():
    model = vit(torch.float64)
    small = cut(model, {"qk": 16, "vo": 16, "fc1": 48, "fc2": 48, "head": 7})
    refit(small, model, [images(64, dtype=torch.float64)], ridge=1e-6)
    assert rel(small(images(dtype=torch.float64)), model(images(dtype=torch.float64))) < 1e-9


def test_refit_refuses_nonsense():
    model = vit()
    small = cut(model, {"qk": 5, "fc1": 9})
    before = copy.deepcopy(small.state_dict())
    with pytest.raises(ValueError, match="not factored"):
        refit(model, model, [images()])
    with pytest.raises(ValueError, match="no images"):
        refit(small, model, [])
    with pytest.raises(ValueError, match="original model has no blocks.1.attn"):
        refit(small, vit(depth=1), [images()])
    with pytest.raises(ValueError, match="in the original model; it is another one"):
        refit(small, vit(mlp_ratio=2), [images()])
    with pytest.raises(ValueError, match="cannot be solved"):
        refit(small, model, [images() * float("nan")])
    for ridge in (-1.0, float("nan"), float("inf"), "1"):
        with pytest.raises(ValueError, match="refit: ridge=.* must be a finite number of at least 0"):
            refit(small, model, [images()], ridge=ridge)
        with pytest.raises(ValueError, match="calibrate: ridge=.* must be a finite number of at least 0"):
            calibrate(model, [images()], ridge=ridge)
    with torch.no_grad():
        small.blocks[1].mlp.fc1.first.weight.zero_()
    before = copy.deepcopy(small.state_dict())
    with pytest.raises(ValueError, match="blocks.1.mlp.fc1 cannot be solved from .* raise ridge=0, or give"):
        refit(small, model, [images()], ridge=0)
    assert all(torch.equal(before[n], t) for n, t in small.state_dict().items())
    assert all(torch.equal(before[n], t) for n, t in small.state_dict().items())


@pytest.mark.parametrize("order", [(uvc, comcat), (comcat, uvc)])
def test_refit_refuses_other_blocks(order):
    """A block that UVC took away moves the others up: their names mean other blocks of the original."""
    model = vit(depth=3)
    small, x = copy.deepcopy(model), images()
    for method in order:
        whole = whole_plan(uvc.read_shapes(small))
        pruned = uvc.Plan(whole.shapes, (None, *whole.blocks[1:]))
        method.apply(small, make_plan(small, {"qk": 5, "fc1": 9}) if method is comcat else pruned)
    before = copy.deepcopy(small.state_dict())
    with pytest.raises(ValueError, match="has 3 blocks, this one 2, .* against the pruned, unfactored model"):
        refit(small, model, [x])
    assert all(torch.equal(before[n], t) for n, t in small.state_dict().items())
    uvc.apply(model, uvc.Plan(uvc.read_shapes(model), (None, *whole_plan(uvc.read_shapes(model)).blocks[1:])))
    assert refit(small, model, [x]).matched[0] == "blocks.0.attn.proj"


def test_refit_refuses_adapters():
    model = vit()
    small = cut(model, {"qk": 5, "fc1": 9})
    lora.lora(small)
    with pytest.raises(ValueError, match="refit: this model has LoRA already"):
        refit(small, model, [images()])


def test_recovery_by_training():
    """Distillation trains a factored model through the one training loop."""
    torch.manual_seed(0)
    model = vit()
    x = structured(96, dtype=torch.float32)
    y = model(x).argmax(1)
    small = cut(model, {"qk": 10, "vo": 10, "fc1": 24, "fc2": 24})

    @torch.no_grad()
    def divergence():
        return float(F.kl_div(small(x).log_softmax(1), model(x).softmax(1), reduction="batchmean"))

    before, agreed = divergence(), float((small(x).argmax(1) == y).float().mean())
    recipe = train.Recipe(batch_size=32, lr=2e-3, steps=60)
    data = torch.utils.data.TensorDataset(x, y)
    train.fit(small, data, recipe, loss=Distill(model, 0.9, 1.0, blocks=[0, 1], alignment=0.1), progress=False)
    assert divergence() < 0.5 * before
    assert float((small(x).argmax(1) == y).float().mean()) > agreed


# --- the diffusion adapter -------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """An attention as Stable Diffusion's U-Net has them."""

    def __init__(self, width=32, context=None, heads=4, bias=False, sequence=nn.ModuleList):
        super().__init__()
        context = width if context is None else context
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(context, width, bias=bias)
        self.to_v = nn.Linear(context, width, bias=bias)
        out = nn.Linear(width, width)
        self.to_out = sequence([out, nn.Dropout(0.1)]) if sequence is nn.ModuleList else sequence(out, nn.Dropout(0.1))

    def forward(self, hidden_states, encoder_hidden_states=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = self.to_q(hidden_states), self.to_k(context), self.to_v(context)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        y = ((q @ k.mT) * self.scale).softmax(-1) @ v
        y = y.transpose(1, 2).flatten(2)
        for layer in self.to_out:
            y = layer(y)
        return y


class Net(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.self_attention, self.cross_attention = Attention(**settings), Attention(context=20, **settings)

    def forward(self, x, context):
        x = x + self.self_attention(x)
        return x + self.cross_attention(x, context)


def net(dtype=torch.float64, **settings):
    torch.manual_seed(0)
    return Net(**settings).to(dtype).eval(), torch.randn(2, 9, 32, dtype=dtype), torch.randn(2, 5, 20, dtype=dtype)


def test_adapter_at_rest_is_the_frozen_layer():  # T31
    model, x, context = net()
    before = model(x, context)
    report = comcat_diffusion.attach(model, rank=2, seed=0)
    assert report.matched == ["self_attention", "cross_attention"]
    assert rel(model(x, context), before) < 1e-14  # k' and S_O start at zero
    for adapter in (model.self_attention, model.cross_attention):
        nn.init.normal_(adapter.comcat_k)
        nn.init.normal_(adapter.comcat_o)
        adapter.s = 0
    assert torch.equal(model(x, context), before)
    comcat_diffusion.detach(model)
    assert torch.equal(model(x, context), before) and type(model.self_attention) is Attention
    faithful, x, context = net()
    comcat_diffusion.attach(faithful, mode="faithful", seed=0)
    assert rel(faithful(x, context), before) > 1e-3  # disturbed before the first step


def test_adapter_is_the_sum_of_products():  # T31
    for s in (0.5, 1.0, 2.0):
        model, x, context = net(bias=True)
        comcat_diffusion.attach(model, rank=3, s=s, mode="faithful", seed=1)
        a, base = model.cross_attention, model.cross_attention.base

        def heads(w, of, layer_bias=None):
            y = F.linear(of, w, layer_bias)
            return y.unflatten(-1, (4, -1)).transpose(1, 2)

        scores = heads(base.to_q.weight, x, base.to_q.bias) @ heads(base.to_k.weight, context, base.to_k.bias).mT
        scores = scores + s**2 * heads(a.comcat_q, x) @ heads(a.comcat_k, context).mT
        attention = (scores * 8**-0.5).softmax(-1)
        dense = (attention @ heads(base.to_v.weight, context, base.to_v.bias)).transpose(1, 2).flatten(2)
        low = (attention @ heads(a.comcat_v, context)).transpose(1, 2).flatten(2)
        expected = base.to_out[0](dense) + s**2 * low @ a.comcat_o.T
        assert rel(a(x, context), expected) < 1e-12


@pytest.mark.parametrize("sequence", [nn.ModuleList, nn.Sequential])
def test_adapter_merges_at_a_greater_width(sequence):  # T31
    model, x, context = net(torch.float32, bias=True, sequence=sequence)
    comcat_diffusion.attach(model, rank=2, s=0.8, mode="faithful", seed=1)
    before = model(x, context)
    comcat_diffusion.merge(model)
    merged = model.cross_attention
    assert type(merged) is WideAttention and merged.to_q.weight.shape == (4 * (8 + 2), 32)
    assert rel(model(x, context), before) <= 1e-5
    assert merged.scale == 8**-0.5 and not any("comcat_" in n for n, _ in model.named_parameters())


def test_adapter_counts():  # T31
    assert parameters_formula() == 1_591_296
    assert round(4 * parameters_formula() / 2**20, 2) == 6.07
    with torch.device("meta"):
        blocks = nn.ModuleList()
        for width, n in comcat_diffusion.STABLE_DIFFUSION_1.items():
            blocks.extend(
                nn.ModuleList([Attention(width, heads=8), Attention(width, context=768, heads=8)]) for _ in range(n)
            )
    report = comcat_diffusion.attach(blocks, rank=2)
    assert report.trainable == 1_591_296 and len(report.matched) == 32 and len(blocks) == 16


def test_adapter_learns_and_refuses_nonsense():
    model, x, context = net()
    comcat_diffusion.attach(model, rank=2, seed=0)
    before = [p.detach().clone() for p in model.self_attention.base.parameters()]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 8
    optimizer, target = torch.optim.Adam(trained, lr=1e-2), torch.randn_like(x)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(model(x, context), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(a, b) for a, b in zip(before, model.self_attention.base.parameters(), strict=True))
    with pytest.raises(ValueError, match="ComCAT's adapter already"):
        comcat_diffusion.attach(model)
    with pytest.raises(ValueError, match="has no attention with to_q"):
        comcat_diffusion.attach(vit())
    with pytest.raises(ValueError, match="rank=0"):
        comcat_diffusion.attach(net()[0], rank=0)
    with pytest.raises(ValueError, match="not attached"):
        comcat_diffusion.merge(net()[0])
    assert isinstance(model.self_attention, ProductAdapter)


# --- export ----------------------------------------------------------------------------------------------------------


def test_export_keeps_the_outputs(tmp_path):
    model = vit()
    small = cut(model, {"qk": 5, "vo": 11, "fc1": 13, "head": 3}).train()
    path = export.export(small, tmp_path / "small.pt2", images(2))
    assert small.training
    program = torch.export.load(path)
    small.eval()
    for n in (1, 2, 5):
        assert rel(program.module()(images(n)), small(images(n))) < 1e-6
    assert path.stat().st_size < 4 * surgery.count(small)[1] + 300_000
    stored = sum(math.prod(t.shape) for t in program.state_dict.values())
    assert stored == surgery.count(small)[1] < surgery.count(model)[1]


@pytest.mark.parametrize("ranks", [{"qk": 5, "vo": 11, "fc1": 13, "head": 3}, {"qk": 11, "vo": 5}])
def test_export_to_onnx(tmp_path, ranks):
    """The file gives the same outputs, holds ONNX's own operations only, and is smaller by what was cut."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    small = cut(vit(), ranks)
    path = export.export(small, tmp_path / "small.onnx", images(2))
    graph = onnx.load(path).graph
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}
    assert "Pad" not in {node.op_type for node in graph.node}  # no work for widths that are not there
    numbers = sum(math.prod(t.dims) for t in graph.initializer)
    assert surgery.count(small)[1] <= numbers < surgery.count(small)[1] + 1_000 < surgery.count(vit())[1]
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for n in (1, 3):
        got = session.run(None, {session.get_inputs()[0].name: images(n).numpy()})[0]
        assert rel(torch.from_numpy(got), small(images(n))) < 1e-4


def test_export_refuses_what_is_attached(tmp_path, monkeypatch):
    model = vit()
    with pytest.raises(ValueError, match="must end in"):
        export.export(model, tmp_path / "a.pth", images(2))
    with pytest.raises(ValueError, match="holds one image"):
        export.export(model, tmp_path / "a.pt2", images(1))
    adapted = vit()
    kadaptation.attach(adapted, n=4)
    with pytest.raises(ValueError, match=r"attn.qkv.q is a Kronecker, which is for training; call kadaptation.merge"):
        export.export(adapted, tmp_path / "a.pt2", images(2))
    for attach in (lora.lora, lora.lora_qv, baselines.vera):
        adapted = vit()
        attach(adapted, rank=2)
        with pytest.raises(ValueError, match=r"which is for training; call baselines.merge\(model\) first"):
            export.export(adapted, tmp_path / "a.pt2", images(2))
        baselines.merge(adapted)
        assert export.left_behind(adapted) == {}
    projected = vit()
    lbp_wht.attach(projected, bases="LP_L1-2", exact_when="never")
    with pytest.raises(ValueError, match=r"call lbp_wht.detach\(model\) first"):
        export.export(projected, tmp_path / "a.pt2", images(2))
    diffusion, _, _ = net()
    comcat_diffusion.attach(diffusion)
    assert export.left_behind(diffusion) == dict.fromkeys(
        ["self_attention", "cross_attention"], "comcat_diffusion.merge(model)"
    )
    comcat_diffusion.merge(diffusion)
    assert export.left_behind(diffusion) == {}
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install onnx onnxscript"):
        export.export(model, tmp_path / "a.onnx", images(2))
    assert not list(tmp_path.iterdir()) and comcat.parts(model)
