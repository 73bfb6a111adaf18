"""ComCAT: factors, counts, plans and surgery; property tests T1 to T17 of its specification."""

import copy
import math

import pytest
import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from leanvit import block_expansion, comcat, comcat_calibrate, comcat_ranks, lbp_wht, lora, qkv, surgery
from leanvit.comcat import Plan, apply, make_plan, parts
from leanvit.comcat_factors import Spectrum, break_even, product_svd, roots, worthwhile
from leanvit.comcat_modules import FactoredAttention, FactoredLinear, read_heads
from leanvit.uvc_slicing import SlicedAttention

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}


def vit(dtype=torch.float32, cls=VisionTransformer, **settings):
    """A small DeiT-like model with noise on every tensor, biases and norms too."""
    torch.manual_seed(0)
    model = cls(**{**SMALL, **settings}).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def images(n=4, size=16, dtype=torch.float32, seed=1):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rel(a, b):
    return float(((a - b).norm() / b.norm()).detach())


def cut(model, ranks, statistics=None, **settings):
    """A copy of the model with these ranks, none of them dropped for saving nothing."""
    model = copy.deepcopy(model)
    plan = make_plan(model, ranks, mode="faithful", **{"bias": "absorb", **settings})
    apply(model, plan, statistics)
    return model


def on_meta(name, **settings):
    with torch.device("meta"):
        return timm.create_model(name, **settings)


def head_products(model, name="blocks.0.attn"):
    h = read_heads(model.get_submodule(name))
    return h.q @ h.k.mT, h.v @ h.o


# --- factorisation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("biases", [False, True])
def test_full_rank_is_exact(dtype, tolerance, biases):  # T1, T2
    model = vit(dtype, qkv_bias=biases, proj_bias=biases)
    small = cut(model, {"qk": 16, "vo": 16})
    x = torch.randn(3, 17, 48, dtype=dtype)
    for dense, factored in zip(model.blocks, small.blocks, strict=True):
        assert isinstance(factored.attn, FactoredAttention)
        assert rel(factored.attn(x), dense.attn(x)) <= tolerance
    assert rel(small(images(dtype=dtype)), model(images(dtype=dtype))) <= 10 * tolerance


def test_the_keys_bias_does_not_matter():  # T2
    model, x = vit(torch.float64), images(dtype=torch.float64)
    before = model(x)
    with torch.no_grad():
        model.blocks[0].attn.qkv.bias[48:96] += torch.randn(48, dtype=torch.float64)
    assert rel(model(x), before) <= 1e-10
    with torch.no_grad():
        model.blocks[0].attn.qkv.bias[:48] += torch.randn(48, dtype=torch.float64)
    assert rel(model(x), before) > 1e-4


@pytest.mark.parametrize("bias", ["none", "zero"])
def test_biases_thrown_away_are_missed(bias):  # T3, a negative control
    model, x = vit(torch.float64), images(dtype=torch.float64)
    assert rel(cut(model, {"qk": 16, "vo": 16}, bias=bias)(x), model(x)) > 1e-2
    assert rel(cut(model, {"qk": 16, "vo": 16})(x), model(x)) < 1e-10


def test_full_rank_layers(dtype=torch.float32):  # T4
    model, x = vit(dtype), images(dtype=dtype)
    small = cut(model, {"fc1": 48, "fc2": 48, "head": 7})
    for layer in (small.blocks[0].mlp.fc1, small.blocks[1].mlp.fc2, small.head):
        assert isinstance(layer, FactoredLinear)
        assert layer.first.bias is None and layer.second.bias is not None
    assert torch.equal(small.head.second.bias, model.head.bias)
    assert rel(small(x), model(x)) <= 1e-5


@pytest.mark.parametrize("rank", [1, 5, 15])
def test_eckart_young(rank):  # T5
    model = vit(torch.float64)
    h = read_heads(model.blocks[0].attn)
    linear = [fc for b in model.blocks for fc in (b.mlp.fc1, b.mlp.fc2)] + [model.head]
    layers = [(fc.weight.T, None) for fc in linear]
    for a, b in [(h.q, h.k.mT), (h.v, h.o), *layers]:
        rank = min(rank, min(a.shape[-2:]) - 1, (a if b is None else b).shape[-1] - 1)
        dense = a.detach() if b is None else a @ b
        left, right = Spectrum(a.detach(), b).factors(rank)
        values = torch.linalg.svdvals(dense)
        error = dense - left @ right
        expected = values[..., rank:].square().sum(-1)
        assert torch.allclose(error.square().sum((-2, -1)), expected, rtol=1e-6, atol=1e-18)
        assert torch.allclose(torch.linalg.matrix_norm(error, 2), values[..., rank], rtol=1e-6)
        if b is not None:
            assert values[..., 16:].max() < 1e-12  # d_h directions at most


def test_whitened_error_is_the_sum_of_dropped_values():  # T6
    torch.manual_seed(0)
    x = torch.randn(500, 20, dtype=torch.float64) @ torch.randn(20, 20, dtype=torch.float64)
    w = torch.randn(20, 12, dtype=torch.float64)
    covariance = x.T @ x / len(x)
    spectrum = Spectrum(w, None, roots(covariance))
    values = torch.linalg.svdvals(roots(covariance)[0] @ w)
    for rank in range(1, 12):
        left, right = spectrum.factors(rank)
        error = (x @ (w - left @ right)).square().sum(1).mean()
        assert float(error) == pytest.approx(float(values[rank:].square().sum()), rel=1e-6)
        assert float(spectrum.energy[rank:].sum()) == pytest.approx(float(error), rel=1e-6)
        plain = Spectrum(w, None).factors(rank)
        assert error <= (x @ (w - plain[0] @ plain[1])).square().sum(1).mean() * (1 + 1e-9)


def test_whitening_of_inputs_that_span_little():  # T6: pseudo-inverse
    torch.manual_seed(0)
    x = torch.randn(300, 3, dtype=torch.float64) @ torch.randn(3, 10, dtype=torch.float64)
    w = torch.randn(10, 8, dtype=torch.float64)
    left, right = Spectrum(w, None, roots(x.T @ x / 300)).factors(3)
    assert rel(x @ left @ right, x @ w) < 1e-9  # rank 3 is all that these inputs see


@pytest.mark.parametrize("shape", [(3, 40, 8, 40), (2, 40, 8, 30), (1, 6, 9, 5), (2, 8, 8, 3)])
def test_qr_route_equals_the_svd(shape):  # T7
    heads, m, k, n = shape
    torch.manual_seed(0)
    a, b = torch.randn(heads, m, k), torch.randn(heads, k, n)
    u, s, v = product_svd(a, b)
    direct = torch.linalg.svd(a @ b, full_matrices=False)
    most = min(m, k, n)
    assert s.shape == (heads, most) and u.shape == (heads, m, most) and v.shape == (heads, n, most)
    assert rel(s, direct.S[:, :most]) <= 1e-6
    for rank in {1, most // 2, most} - {0}:
        mine = (u[..., :rank] * s[:, None, :rank]) @ v[..., :rank].mT
        theirs = (direct.U[..., :rank] * direct.S[:, None, :rank]) @ direct.Vh[:, :rank]
        assert rel(mine, theirs) <= 1e-5


def test_error_falls_with_the_rank():  # T8
    model, x = vit(torch.float64), torch.randn(3, 17, 48, dtype=torch.float64)

    def products(of):
        h = read_heads(of.blocks[0].attn)  # the queries' bias is a row of the product that is truncated
        return torch.cat([h.q, h.bq[:, None]], 1) @ h.k.mT, h.v @ h.o

    errors, outputs = [], []
    for rank in range(1, 17):
        small = cut(model, {"blocks.0.attn.qk": rank, "blocks.0.attn.vo": rank})
        errors.append([float((a - b).norm()) for a, b in zip(products(small), products(model), strict=True)])
        outputs.append(rel(small.blocks[0].attn(x), model.blocks[0].attn(x)))
    for falling in zip(*errors, strict=True):
        assert all(b <= a + 1e-12 for a, b in zip(falling, falling[1:], strict=False))
        assert falling[0] > 1 and falling[-1] < 1e-10
    assert outputs[-1] < 1e-10 and outputs[0] > 1e-3


def test_scale_is_that_of_the_original_heads():  # T9
    model, x = vit(torch.float64), torch.randn(3, 17, 48, dtype=torch.float64)
    attention = cut(model, {"qk": 5, "vo": 5}).blocks[0].attn
    assert attention.scale == 16**-0.5
    right = attention(x)
    attention.scale = 5**-0.5
    assert rel(attention(x), right) > 1e-3


def test_gauge():  # T10
    model, x = vit(), images()
    small = cut(model, {"qk": 6, "vo": 6, "fc1": 20})
    before, attention = small(x), small.blocks[0].attn
    torch.manual_seed(1)
    with torch.no_grad():
        for left, right in ((attention.qkv.weight[:18], attention.qkv.weight[18:36]),):
            for head in range(3):
                g = torch.randn(6, 6) + 3 * torch.eye(6)
                rows = slice(6 * head, 6 * head + 6)
                left[rows] = g @ left[rows]
                attention.qkv.bias[rows] = g @ attention.qkv.bias[rows]
                right[rows] = torch.linalg.inv(g).T @ right[rows]
                values = slice(36 + 6 * head, 42 + 6 * head)
                attention.qkv.weight[values] = g @ attention.qkv.weight[values]
                attention.proj.weight[:, rows] = attention.proj.weight[:, rows] @ torch.linalg.inv(g)
        layer = small.blocks[1].mlp.fc1
        g = torch.randn(20, 20) + 5 * torch.eye(20)
        layer.first.weight.copy_(g @ layer.first.weight)
        layer.second.weight.copy_(layer.second.weight @ torch.linalg.inv(g))
    assert rel(small(x), before) <= 1e-4
    dense = vit(torch.float64)
    balanced = copy.deepcopy(dense)
    apply(balanced, make_plan(dense, {"qk": 6, "vo": 6, "fc1": 20}))
    unbalanced = cut(dense, {"qk": 6, "vo": 6, "fc1": 20})  # all of Sigma on the right
    x = images(dtype=torch.float64)
    assert rel(balanced(x), unbalanced(x)) < 1e-9
    assert not torch.allclose(balanced.blocks[0].mlp.fc1.first.weight, unbalanced.blocks[0].mlp.fc1.first.weight)


def test_order_of_heads():  # T11
    model, x = vit(torch.float64), images(dtype=torch.float64)
    small = cut(model, {"qk": 6, "vo": 9})
    other, order = copy.deepcopy(model), torch.tensor([2, 0, 1])
    with torch.no_grad():
        for block in other.blocks:
            a = block.attn
            a.qkv.weight.copy_(a.qkv.weight.unflatten(0, (3, 3, 16))[:, order].flatten(0, 2))
            a.qkv.bias.copy_(a.qkv.bias.unflatten(0, (3, 3, 16))[:, order].flatten())
            a.proj.weight.copy_(a.proj.weight.unflatten(1, (3, 16))[:, order].flatten(1))
    assert rel(other(x), model(x)) < 1e-10
    assert rel(cut(other, {"qk": 6, "vo": 9})(x), small(x)) < 1e-10


@pytest.mark.parametrize("rank", [4, 8, 12])
def test_head_level_beats_separate_svds(rank):  # T12
    h = read_heads(vit(torch.float64).blocks[0].attn)
    dense = h.q @ h.k.mT
    left, right = Spectrum(h.q, h.k.mT).factors(math.floor(rank * (1 + 16 / 48)))
    separate = [Spectrum(w, None).factors(rank) for w in (h.q, h.k)]
    size = sum(f.numel() for pair in separate for f in pair)
    assert left.numel() + right.numel() <= size
    q, k = (a @ b for a, b in separate)
    assert ((left @ right - dense).norm(dim=(1, 2)) <= (q @ k.mT - dense).norm(dim=(1, 2))).all()


# --- counting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bias, change, total",
    [("none", {}, 10_991_976), ("none", {"blocks.11.mlp.fc1": 128}, 11_114_856), ("zero", {}, 11_003_616)],
)
def test_logged_deit_small(bias, change, total):  # T13
    model = on_meta("deit_small_patch16_224")
    ranks = comcat_ranks.ranks_from_list(model, comcat_ranks.LOGGED_DEIT_S) | change
    report = apply(model, make_plan(model, ranks, mode="faithful", bias=bias))
    assert report.total == surgery.count(model)[1] == total
    if not change and bias == "none":
        assert comcat_ranks.linear_macs(model) == 2_054_747_648
        assert comcat_ranks.attention_macs(model, 197) == 201_651_564
        weights = sum(
            p.numel() for n, p in model.named_parameters() if p.dim() > 1 and not n.endswith(("embed", "token"))
        )
        assert weights == 10_872_320
        biases = sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias") and "norm" not in n)
        assert biases == 24_424


def test_absorbed_biases_cost():  # T13, specification 1.3: h r1 + d for each block
    counted = {}
    for bias in ("none", "absorb", "zero"):
        model = on_meta("deit_small_patch16_224")
        ranks = {"qk": 32, "vo": 20}
        counted[bias] = apply(model, make_plan(model, ranks, bias=bias)).total
    assert counted["absorb"] - counted["none"] == 12 * (6 * 32 + 384)
    assert counted["zero"] - counted["none"] == 12 * (2 * 6 * 32 + 6 * 20 + 384)


@pytest.mark.parametrize(
    "name, total, paper, weights, reduction, epsilon, macs",
    [
        ("deit_small_patch16_224", 22_050_664, 21_955_432, 21_912_576, 0.5, 10_661_376, 4_241_218_560),
        ("deit_base_patch16_224", 86_567_656, 86_377_192, 86_292_480, 0.6, 33_927_168, 16_848_500_736),
    ],
)
def test_dense_counts_and_budget(name, total, paper, weights, reduction, epsilon, macs):  # T14, T15
    model = on_meta(name)
    assert surgery.count(model)[1] == total
    assert comcat_ranks.paper_parameters(model) == paper
    assert comcat_ranks.patch_weights(model) + sum(p.dense for p in parts(model)[0]) == weights
    assert comcat_ranks.authors_budget(model, reduction) == epsilon
    assert comcat_ranks.linear_macs(model) == macs
    assert model.training  # counting leaves the mode
    if name.startswith("deit_small"):
        assert comcat_ranks.attention_macs(model, 197) == 357_663_744


def test_formulas_are_the_counts():  # T13: 2 d (R1 + R2), r (in + out)
    model = vit()
    small = cut(model, {"qk": 5, "vo": 11, "fc1": 13})
    attention, layer = small.blocks[0].attn, small.blocks[0].mlp.fc1
    assert attention.qkv.weight.numel() + attention.proj.weight.numel() == 2 * 48 * (3 * 5 + 3 * 11)
    assert layer.first.weight.numel() + layer.second.weight.numel() == 13 * (48 + 192)
    found, _ = parts(model)
    ranks = {p.name: {"qk": 5, "vo": 11}.get(p.kind, 13 if p.name.endswith("fc1") else None) for p in found}
    counted = [m.weight.numel() for n, m in small.named_modules() if isinstance(m, nn.Linear)]
    assert sum(counted) == comcat_ranks.total_weights(found, ranks)


@pytest.mark.parametrize(
    "inputs, outputs, expected",
    [
        (192, 768, 153.6),
        (192, 1000, 161.07),
        (384, 1536, 307.2),
        (384, 1000, 277.46),
        (768, 3072, 614.4),
        (768, 1000, 434.39),
    ],
)
def test_break_even(inputs, outputs, expected):  # T16
    assert break_even(inputs, outputs) == pytest.approx(expected, abs=0.05)
    floor = math.floor(break_even(inputs, outputs))
    assert floor * (inputs + outputs) <= inputs * outputs < (floor + 1) * (inputs + outputs)
    assert worthwhile(inputs, outputs) <= 0.9 * break_even(inputs, outputs)


def test_dense_where_a_rank_would_not_pay():  # T16
    model = vit()
    dense = {n: m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for rank in (38, 39):  # 48 * 192 / 240 = 38.4
        plan = make_plan(model, {"fc1": rank, "qk": 16, "vo": 16, "head": 7})
        assert ("blocks.0.mlp.fc1" in plan.ranks) == (rank == 38)
        small = copy.deepcopy(model)
        report = apply(small, plan)
        sizes = {
            n: sum(p.numel() for m, p in small.get_submodule(n).named_parameters() if "weight" in m) for n in dense
        }
        assert all(sizes[n] <= dense[n] for n in dense)
        assert type(small.head) is nn.Linear and type(small.blocks[0].attn) is type(model.blocks[0].attn)
        assert report.skipped["head"] == "stays dense"
    faithful = copy.deepcopy(model)
    apply(faithful, make_plan(model, {"fc1": 39}, mode="faithful"))
    assert surgery.count(faithful.blocks[0].mlp)[1] > surgery.count(model.blocks[0].mlp)[1]  # as in the released code


@pytest.mark.parametrize(
    "name, totals",
    [
        ("deit_tiny_patch16_224", [30, 63, 96, 126, 159]),
        ("deit_small_patch16_224", [60, 126, 192, 252, 318]),
        ("deit_base_patch16_224", [120, 192, 252, 312, 384, 444, 504]),
    ],
)
def test_candidates(name, totals):  # T17
    found, _ = parts(on_meta(name))
    qk = found[0]
    assert [qk.heads * r for r in comcat_ranks.candidates(qk, "faithful")] == totals
    assert comcat_ranks.candidates(found[2], "faithful") == list(comcat_ranks.CANDIDATES[qk.inputs])
    corrected = comcat_ranks.candidates(found[2])
    assert corrected[-1] is None and all(r <= 0.9 * found[2].break_even for r in corrected[:-1])
    if name.startswith("deit_small"):
        assert found[2].weights(320) == 614_400 > found[2].dense == 589_824


def test_saved_size_and_back(tmp_path):  # T17
    model = vit()
    small = cut(model, {"qk": 5, "vo": 11, "fc1": 13, "head": 3})
    path = comcat.save(small, tmp_path / "small.safetensors")
    count, limit = surgery.count(small)[1], 20_000
    assert 4 * count <= path.stat().st_size <= 4 * count + limit
    again = vit(img_size=16)
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()
    header = comcat.load(again, path)
    assert Plan.from_json(header["cuts"][0][1]) == small.comcat_plan == again.comcat_plan
    assert torch.equal(again(images()), small(images()))
    assert comcat_ranks.attention_macs(again, 17) == 2 * 17**2 * 3 * (5 + 11)


# --- plans -----------------------------------------------------------------------------------------------------------


def test_plan_goes_through_json():
    model = vit()
    plan = make_plan(model, {"qk": 4, "blocks.1.attn.qk": 7, "head": None}, about={"why": "a test"})
    again = Plan.from_json(plan.to_json())
    assert again == plan and again.ranks["blocks.1.attn.qk"] == 7 and again.ranks["blocks.0.attn.qk"] == 4
    assert plan.model == "VisionTransformer" and plan.shapes["blocks.0.attn.vo"] == [3, 48, 48, 16]
    for text in ("[]", "{}", "nonsense", '{"method": "uvc"}', plan.to_json().replace("ranks", "rungs")):
        with pytest.raises(ValueError, match="no plan of ComCAT"):
            Plan.from_json(text)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ('"bias": "absorb"', '"bias": "absorbed"', "bias='absorbed' is none of absorb, none, zero"),
        ('"mode": "corrected"', '"mode": "correct"', "mode='correct' is none of corrected, faithful"),
        ('"blocks.0.attn.qk": 4', '"blocks.0.attn.qk": "4"', "rank of blocks.0.attn.qk='4' must be a whole number"),
        ('"blocks.0.attn.qk": 4', '"blocks.0.attn.qk": 4.0', "rank of blocks.0.attn.qk=4.0 must be a whole number"),
        ('"blocks.0.attn.qk": 4', '"blocks.0.attn.qk": 0', "rank of blocks.0.attn.qk=0 must be a whole number"),
        ('"about": {}', '"about": []', r"about=\[\] must be a dict"),
        ("[3, 48, 48, 16]", "[3, 48, 48]", r"shape of blocks.0.attn.qk=\[3, 48, 48\] must be \[heads"),
        ("[3, 48, 48, 16]", "[3, 48, 48, 1.5]", "shape of blocks.0.attn.qk, 4 of 4=1.5 must be a whole number"),
    ],
)
def test_half_valid_plans_are_refused(old, new, message):
    text = make_plan(vit(), {"qk": 4}).to_json()
    assert old in text
    with pytest.raises(ValueError, match=f"no plan of ComCAT: .*{message}"):
        Plan.from_json(text.replace(old, new, 1))


@pytest.mark.parametrize(
    "ranks, message",
    [
        ({"qk": 17}, "rank 17 of blocks.0.attn.qk must lie in 1..16, the head size"),
        ({"fc1": 0}, "rank 0 of blocks.0.mlp.fc1 must lie in 1..48"),
        ({"fc1": 2.5}, "rank 2.5 of"),
        ({"blocks.5.attn.qk": 3}, "no part 'blocks.5.attn.qk'"),
    ],
)
def test_ranks_refused(ranks, message):
    with pytest.raises(ValueError, match=message):
        make_plan(vit(), ranks)


def test_plan_for_another_model_is_refused():
    plan = make_plan(vit(), {"qk": 4})
    other = vit(embed_dim=96)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"plan is for VisionTransformer.*blocks.0.attn.qk.*\[3, 48, 48, 16\]"):
        apply(other, plan)
    assert list(before) == list(other.state_dict())
    with pytest.raises(TypeError, match="Plan is needed"):
        apply(other, {"qk": 4})
    tampered = Plan.from_json(plan.to_json().replace('"blocks.0.attn.qk": 4', '"blocks.0.attn.qk": 40'))
    with pytest.raises(ValueError, match="rank 40"):
        apply(vit(), tampered)


def test_nan_leaves_the_model_alone():
    model = vit()
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[0, 0] = float("nan")
    names = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="blocks.1.mlp.fc1 cannot be factored.*NaN"):
        apply(model, make_plan(model, {"qk": 4, "vo": 4, "fc1": 4}))
    assert names == [type(m) for m in model.modules()] and not hasattr(model, "comcat_plan")
    model = vit()
    with torch.no_grad():
        model.blocks[1].attn.proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="blocks.1.attn.vo cannot be factored.*right factor.*NaN"):
        apply(model, make_plan(model, {"qk": 4, "vo": 4}))


def test_models_that_cannot_be_factored():
    with pytest.raises(ValueError, match="no flat list of blocks"):
        parts(timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1), embed_dim=12, num_heads=(1, 2)))
    with pytest.raises(ValueError, match="widths"):
        parts(on_meta("hiera_tiny_224"))
    model = vit()
    apply(model, make_plan(model, {"qk": 4}))
    with pytest.raises(ValueError, match="factored already"):
        apply(model, make_plan(vit(), {"qk": 4}))
    with pytest.raises(ValueError, match="not factored by ComCAT"):
        comcat.save(vit(), "nowhere")
    model = vit()
    lora.lora_qv(model, rank=2)
    with pytest.raises(ValueError, match="LoRA already"):
        parts(model)
    rows = [(r.role, r.first, r.width) for r in qkv.find(cut(vit(), {"qk": 4}))]
    assert rows == [("q", 0, 12), ("v", 24, 48)] * 2  # its packed rows are not taken for timm's thirds


def test_file_of_another_model_is_refused(tmp_path):
    path = comcat.save(cut(vit(), {"qk": 4, "fc1": 9}), tmp_path / "a.safetensors")
    other = vit(num_classes=5)
    before = copy.deepcopy(other)
    with pytest.raises(ValueError, match="the plan is for VisionTransformer.*blocks.0.attn.qk"):
        comcat.load(vit(num_heads=4), path)
    deeper = vit(img_size=32)  # the same parts, another position embedding
    with pytest.raises(ValueError, match="pos_embed"):
        comcat.load(deeper, path)
    assert type(deeper.blocks[0].mlp.fc1) is nn.Linear and not hasattr(deeper, "comcat_plan")
    assert torch.equal(before(images()), other(images()))
    with pytest.raises(FileNotFoundError):
        comcat.load(other, tmp_path / "b.safetensors")


def test_qk_norm_and_rope_keep_their_queries_and_keys():
    model, x = vit(torch.float64, qk_norm=True), images(dtype=torch.float64)
    small = copy.deepcopy(model)
    report = apply(small, make_plan(model, {"vo": 16, "fc1": 9}, mode="faithful", bias="absorb"))
    assert "QK-norm" in report.skipped["blocks.0.attn.qk"]
    assert "QK-norm" in str(report)
    exact = cut(model, {"vo": 16})
    assert rel(exact(x), model(x)) < 1e-10
    with pytest.raises(ValueError, match="QK-norm stands between"):
        make_plan(model, {"blocks.0.attn.qk": 4})
    torch.manual_seed(0)
    settings = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}
    rope = Eva(**settings, use_rot_pos_emb=True).double().eval()
    with torch.no_grad():
        for p in rope.parameters():
            p.add_(0.1 * torch.randn_like(p))
    found, skipped = parts(rope)
    assert "rotary" in skipped["blocks.0.attn.qk"] and {p.kind for p in found} == {"vo", "fc"}
    assert rel(cut(rope, {"vo": 16})(x), rope(x)) < 1e-10
    assert 1e-6 < rel(cut(rope, {"vo": 12})(x), rope(x)) < 1


def test_scale_norm_keeps_its_values():
    model, x = vit(torch.float64, scale_attn_norm=True), images(dtype=torch.float64)
    assert "norm stands behind the values" in parts(model)[1]["blocks.0.attn.vo"]
    assert rel(cut(model, {"qk": 16})(x), model(x)) < 1e-10


@pytest.mark.parametrize("ranks", [(5, 11), (11, 5), (8, 8)])
def test_unequal_widths(ranks):
    """Padding the narrower side changes nothing: against attention written out."""
    model = cut(vit(torch.float64), {"qk": ranks[0], "vo": ranks[1]})
    x, a = torch.randn(2, 17, 48, dtype=torch.float64), model.blocks[0].attn
    h = read_heads(a)
    q, k, v = (torch.einsum("bnd,hdk->bhnk", x, w) + b[:, None] for w, b in ((h.q, h.bq), (h.k, h.bk), (h.v, h.bv)))
    expected = torch.einsum("bhnk,hko->bno", (q @ k.mT / 4).softmax(-1) @ v, h.o) + h.bo
    assert rel(a(x), expected) < 1e-12
    mask = torch.zeros(17, 17, dtype=torch.float64).masked_fill(torch.ones(17, 17).triu(1) > 0, float("-inf"))
    assert torch.allclose(a(x, is_causal=True), a(x, attn_mask=mask))


def test_distilled_model_and_modes():
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=2, num_classes=20).eval()
    small = copy.deepcopy(model)
    small.blocks[0].train()
    for p in small.blocks[1].parameters():
        p.requires_grad_(False)
    report = apply(small, make_plan(model, {"qk": 30, "vo": 30, "fc2": 40, "head": 9, "head_dist": 9}))
    assert {"head", "head_dist"} <= set(report.matched)
    assert small.blocks[0].attn.training and not small.blocks[1].attn.training
    assert not any(p.requires_grad for p in small.blocks[1].parameters())
    assert small(images(size=32)).shape == (4, 20)
    small.eval()
    copied = copy.deepcopy(small)
    assert torch.equal(copied(images(size=32)), small(images(size=32)))


def test_bf16_and_dropout():
    model = vit(attn_drop_rate=0.1, proj_drop_rate=0.2).to(torch.bfloat16)
    small = copy.deepcopy(model)
    report = apply(small, make_plan(model, {"qk": 6, "vo": 6}))
    assert small.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    assert any("attention dropout" in note for note in report.notes)
    a = small.blocks[0].attn
    assert a.attn_drop.p == 0.1 and a.proj_drop.p == 0.2
    x = images(dtype=torch.bfloat16)
    assert torch.equal(small(x), small(x))
    small.train()
    assert not torch.equal(small(x), small(x))


def test_pruned_model_is_factored():
    """timm's attention with two of three heads, as a pruning leaves it."""
    model = vit(torch.float64)
    a = model.blocks[0].attn
    keep = torch.arange(48).view(3, 16)[1:].flatten()
    qkv_new, proj = nn.Linear(48, 96).double(), nn.Linear(32, 48).double()
    with torch.no_grad():
        rows = torch.cat([keep, 48 + keep, 96 + keep])
        qkv_new.weight.copy_(a.qkv.weight[rows])
        qkv_new.bias.copy_(a.qkv.bias[rows])
        proj.weight.copy_(a.proj.weight[:, keep])
        proj.bias.copy_(a.proj.bias)
    a.qkv, a.proj, a.num_heads, a.attn_dim = qkv_new, proj, 2, 32
    x = images(dtype=torch.float64)
    assert parts(model)[0][0].heads == 2
    assert rel(cut(model, {"qk": 16, "vo": 16})(x), model(x)) < 1e-10


def test_heads_with_fewer_values_are_factored():
    """UVC's attention where every head has kept the same number of value dimensions; otherwise the reason is said."""
    model = vit(torch.float64)
    a = model.blocks[0].attn
    keep = (torch.arange(3)[:, None] * 16 + torch.arange(9)).flatten()
    narrow, proj = nn.Linear(48, 96 + 27).double(), nn.Linear(27, 48).double()
    with torch.no_grad():
        rows = torch.cat([torch.arange(96), 96 + keep])
        narrow.weight.copy_(a.qkv.weight[rows])
        narrow.bias.copy_(a.qkv.bias[rows])
        proj.weight.copy_(a.proj.weight[:, keep])
    model.blocks[0].attn = SlicedAttention(a, narrow, proj, [9, 9, 9])
    x = images(dtype=torch.float64)
    found, _ = parts(model)
    assert [p.full for p in found[:2]] == [16, 9] and found[1].dense == 2 * 48 * 27
    assert rel(cut(model, {"blocks.0.attn.qk": 16, "blocks.0.attn.vo": 9})(x), model(x)) < 1e-10
    small = cut(model, {"blocks.0.attn.qk": 5, "blocks.0.attn.vo": 7})
    assert (small.blocks[0].attn.key_dim, small.blocks[0].attn.value_dim) == (5, 7)
    model.blocks[0].attn.values = (5, 9, 13)
    assert "of its own value width" in parts(model)[1]["blocks.0.attn.qk"]


def test_factored_blocks_are_expanded_and_projected():
    """Block expansion copies factored blocks; LBP-WHT projects the gradients of their thin layers."""
    model, x = cut(vit(), {"qk": 5, "vo": 11, "fc1": 20, "fc2": 20}), images()
    before = model(x)
    projected = copy.deepcopy(model)
    report = lbp_wht.attach(projected, bases="LP_L1-2", exact_when="never", match=lambda name, module: True)
    assert "blocks.0.mlp.fc1.first" in report.matched and "blocks.0.attn.proj" in report.matched
    assert torch.equal(projected(x), before)
    block_expansion.attach(model, p=1)
    assert torch.equal(model(x), before) and len(model.blocks) == 3


# --- choice by hand and greedy ---------------------------------------------------------------------------------------


def test_uniform_ranks():
    model = on_meta("deit_small_patch16_224")
    found, _ = parts(model)
    for removed in (0.2, 0.4, 0.6, 0.8):
        ranks = comcat_ranks.uniform_ranks(model, attention=removed)
        mine = [p for p in found if p.kind != "fc"]
        left = comcat_ranks.total_weights(mine, ranks) / sum(p.dense for p in mine)
        assert 1 - removed - 1 / 64 < left <= 1 - removed + 1e-9
    ranks = comcat_ranks.uniform_ranks(model, mlp=0.3)
    assert set(ranks.values()) == {215} and len(ranks) == 24  # 0.7 * 307.2
    with pytest.raises(ValueError, match="must lie in"):
        comcat_ranks.uniform_ranks(model, mlp=1.0)
    with pytest.raises(ValueError, match="3 ranks for a model of 49 parts"):
        comcat_ranks.ranks_from_list(model, [1, 2, 3])


@pytest.mark.parametrize("reduction", [0.3, 0.5, 0.7])
def test_greedy_meets_its_budget(reduction):  # T23, for the greedy plan
    model = vit()
    found, _ = parts(model)
    budget = comcat_ranks.authors_budget(model, reduction)
    plan = comcat_ranks.greedy(model, budget)
    used = comcat_ranks.total_weights(found, plan.ranks)
    cheapest = min(p.unit for p in found if p.name in plan.ranks)
    assert budget - cheapest < used <= budget and plan.about["weights"] == used
    small = copy.deepcopy(model)
    apply(small, plan)
    linear = [m.weight.numel() for m in small.modules() if isinstance(m, nn.Linear)]
    assert sum(linear) == used
    with pytest.raises(ValueError, match="cannot be met; the smallest ranks take"):
        comcat_ranks.greedy(model, 500)
    assert all(r % 4 == 0 for r in comcat_ranks.greedy(model, budget, multiple=4).ranks.values())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"budget": float("nan")}, "budget=nan must be a finite number of weights"),
        ({"budget": "all"}, "budget='all' must be a finite number of weights"),
        ({"multiple": 0}, "greedy: multiple=0 must be a whole number of at least 1"),
        ({"multiple": 2.0}, "greedy: multiple=2.0 must be a whole number"),
        ({"weights": {}}, "greedy: weights say nothing of blocks.0.attn.qk"),
        ({"weights": {"blocks.0.attn.qk": -1.0}}, "weight of blocks.0.attn.qk=-1.0 must be a finite number"),
        ({"weights": {"blocks.0.attn.qk": float("nan")}}, "weight of blocks.0.attn.qk=nan must be a finite number"),
    ],
)
def test_greedy_refuses_nonsense(settings, message):
    model = vit()
    with pytest.raises(ValueError, match=message):
        comcat_ranks.greedy(model, **{"budget": comcat_ranks.authors_budget(model, 0.5), **settings})


def test_statistics_of_another_model_are_refused():
    model, x = vit(), images()
    for settings in ({"depth": 1}, {"num_classes": 5}, {"num_heads": 4}):
        statistics = comcat.calibrate(vit(**settings), [x])
        for ask in (
            lambda seen: comcat.greedy(model, comcat.authors_budget(model, 0.5), statistics=seen),
            lambda seen: comcat.spectra(model, seen),
            lambda seen: comcat.sensitivity(model, [x], statistics=seen),
            lambda seen: comcat.RankSearch(model, comcat.authors_budget(model, 0.5), statistics=seen),
        ):
            with pytest.raises(ValueError, match="the statistics are of .* calibrate the model itself"):
                ask(statistics)


def test_projection_against_all_choices():
    """Greedy on concave curves is the optimum up to the last step: compared with every choice there is."""
    generator = torch.Generator().manual_seed(0)
    curves = {}
    for name in "abc":
        gains = torch.rand(5, generator=generator).sort(descending=True).values.cumsum(0).tolist()
        cost = 3 + len(curves)
        curves[name] = [(r + 1, cost * (r + 1), gains[r]) for r in range(5)]
    import itertools

    for budget in range(15, 60, 4):
        chosen = comcat_ranks.project(curves, budget)
        index = {n: [p[0] for p in points].index(chosen[n]) for n, points in curves.items()}
        gain = sum(curves[n][i][2] for n, i in index.items())
        used = sum(curves[n][i][1] for n, i in index.items())
        choices = itertools.product(*curves.values())
        best = max(sum(p[2] for p in c) for c in choices if sum(p[1] for p in c) <= budget)
        assert used <= budget and gain >= best - 0.35  # less than the best single step
        steps = [points[index[n] + 1][1] - points[index[n]][1] for n, points in curves.items() if index[n] < 4]
        assert all(used + step > budget for step in steps)
    assert comcat_ranks.project(curves, 60) == {"a": 5, "b": 5, "c": 5}
    assert comcat_ranks.project(curves, 12, {"a": 5, "b": 5, "c": 5}) == {"a": 1, "b": 1, "c": 1}


def test_greedy_prefers_what_matters():
    model = vit()
    budget = comcat_ranks.authors_budget(model, 0.6)
    found, _ = parts(model)
    weights = {p.name: 1.0 for p in found}
    plain = comcat_ranks.greedy(model, budget, weights=weights)
    loud = comcat_ranks.greedy(model, budget, weights=weights | {"blocks.1.attn.vo": 1e6})
    assert loud.ranks.get("blocks.1.attn.vo", 16) > plain.ranks.get("blocks.1.attn.vo", 16) or (
        plain.ranks.get("blocks.1.attn.vo", 16) == 16
    )
    assert loud.ranks.get("blocks.1.attn.vo", 16) >= 15


def test_sensitivity_measures_and_leaves_no_trace():
    model = vit()
    with torch.no_grad():  # a block that hardly counts
        model.blocks[1].mlp.fc2.weight.mul_(1e-4)
    before, types = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    measured = comcat_ranks.sensitivity(model, [images(8)])
    assert list(measured) == [p.name for p in parts(model)[0]] and all(v >= 0 for v in measured.values())
    assert measured["blocks.0.mlp.fc1"] > 100 * measured["blocks.1.mlp.fc1"]
    assert types == [type(m) for m in model.modules()]
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    with pytest.raises(ValueError, match="no images"):
        comcat_ranks.sensitivity(model, [])
    spectra = comcat_calibrate.spectra(model)
    assert spectra["head"].energy.shape == (7,) and spectra["blocks.0.attn.qk"].energy.shape == (16,)
