"""KAdaptation: the property tests T1-T16 of its specification, on small timm models."""

import copy
import math

import pytest
import timm
import torch
from torch import nn

import leanvit
from leanvit import baselines, intrinsic, kadaptation, lbp_wht, qkv, state
from leanvit.kadaptation import Kronecker, attach, detach, merge, parameters_formula
from leanvit.kernels import lowrank

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
FAMILIES = {
    "vit_base_patch32_clip_quickgelu_224": {"img_size": 64},
    "deit_tiny_distilled_patch16_224": {"img_size": 32},
    "vit_small_patch14_reg4_dinov2": {"img_size": 28},
    "beit_base_patch16_224": {"img_size": 32},
    "eva02_tiny_patch14_224": {"img_size": 28},  # fused, biases of the attention
    "eva02_base_patch14_224": {"img_size": 28},  # q, k and v apart
    "vit_small_patch16_dinov3_qkvb": {"img_size": 32},
    "swinv2_tiny_window8_256": {"img_size": 64, "depths": (1, 1), "num_heads": (1, 2), "depth": None},
}


def vit(num_classes=3, dtype=torch.float32, depth=2, **settings):
    torch.manual_seed(0)
    settings = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": depth, "num_heads": 2, **settings}
    model = timm.models.VisionTransformer(num_classes=num_classes, **settings)
    return model.to(dtype)


def family(name):
    torch.manual_seed(0)
    settings = {k: v for k, v in (SMALL | FAMILIES[name]).items() if v is not None}
    model = timm.create_model(name, **settings).eval()
    with torch.no_grad():
        for p in model.parameters():  # norms, LayerScale and biases that start at 0 or 1
            p.add_(torch.randn_like(p), alpha=0.1 if p.dim() > 1 else 0.3)
    return model, images(settings["img_size"])


def images(size=16, count=4, seed=1, dtype=torch.float32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def disturb(model, std=0.2, seed=2):
    """Values for all factors, as after a training."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.rpartition(".")[2].startswith("kad_"):
                p.copy_(torch.randn_like(p, dtype=torch.float32) * std)
    return model


def adapters(model):
    return {n: p for n, p in model.named_parameters() if "kad_" in n}


def deltas(model):
    return [m for m in model.modules() if isinstance(m, Kronecker)]


def train(model, steps=3, optimizer=torch.optim.AdamW, lr=1e-2, **settings):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = optimizer(trained, lr=lr, **settings)
    model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(images()), torch.tensor([0, 1, 2, 0]))
        loss.backward()
        optimiser.step()
    return optimiser


# --- start, gradients, counts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "rule_rank"), [("fixed", 1), ("fixed", None), ("paper", 1), ("paper", None), ("released", 1)]
)
def test_the_start_is_the_base_model_bit_for_bit(mode, rule_rank):
    """T1"""
    model, stock = vit(), vit()
    report = attach(model, n=4, mode=mode, rule_rank=rule_rank)
    assert report.matched == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    assert torch.equal(model(images()), stock(images()))


@pytest.mark.parametrize("mode", ["fixed", "paper"])
@pytest.mark.parametrize("rule_rank", [1, 2, None])
@pytest.mark.parametrize("share_qv", kadaptation.SHARED)
def test_every_trainable_is_used_and_alive_after_one_step(mode, rule_rank, share_qv):
    """T2 and T16"""
    model = vit()
    attach(model, n=4, rank=2, rule_rank=rule_rank, mode=mode, share_qv=share_qv, seed=0)
    model(images()).square().sum().backward()
    for name, p in adapters(model).items():
        alive = name.endswith(("kad_v", "kad_bias"))
        assert p.grad is not None and bool(p.grad.any()) == alive, name
    train(model, 1)
    model.zero_grad()
    model(images()).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_released_never_learns_its_kronecker_factors():
    """T2: the regression test of the released defect; and (b), the values' own factors have no gradient at all."""
    model = vit()
    attach(model, n=4, mode="released")
    before = {n: p.detach().clone() for n, p in adapters(model).items()}
    for optimizer in (torch.optim.AdamW, torch.optim.SGD):
        train(model, 10, optimizer, weight_decay=0.0)
    for name, p in adapters(model).items():
        if name.endswith("kad_bias"):
            assert not torch.equal(p, before[name])
        elif ".v.kad_u" in name or ".v.kad_v" in name:
            assert p.grad is None
        else:
            assert not p.grad.any() and torch.equal(p, before[name]), name
    assert all(not delta.matrix().any() for delta in deltas(model))  # |H| = 0 after any number of steps
    used = [n for n, p in adapters(model).items() if p.grad is not None]
    assert sum(adapters(model)[n].numel() for n in used) == 2 * 2 * 4 * 4 + 2 * (2 * 32 + 32)


@pytest.mark.parametrize(
    ("rank", "rule_rank", "share_qv", "bias"),
    [(1, 1, False, True), (2, 3, False, True), (1, None, False, True), (1, 1, "rules", True), (3, 1, "factors", False),
     (2, None, True, True)],
)  # fmt: skip
def test_counts(rank, rule_rank, share_qv, bias):
    """T3"""
    model = vit(depth=3)
    settings = {"rank": rank, "rule_rank": rule_rank, "share_qv": share_qv, "bias": bias}
    report = attach(model, n=8, **settings)
    own = sum(p.numel() for p in adapters(model).values())
    assert own == parameters_formula(32, 3, 8, **settings)
    assert report.trainable == own + 33 * 3
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == set(adapters(model)) | {"head.weight", "head.bias"}


def test_golden_counts_of_real_shapes():
    """T3: 50,176 on ViT-B, whatever the patch, and the other sizes."""
    assert [parameters_formula(d, depth) for d, depth in ((192, 12), (384, 12), (768, 12), (1024, 24))] == [
        15_616, 27_136, 50_176, 126_976,
    ]  # fmt: skip
    assert parameters_formula(768, 12, rule_rank=None) == 111_616
    for name in ("vit_base_patch32_clip_quickgelu_224", "vit_base_patch16_clip_quickgelu_224"):
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=0)
        assert attach(model).trainable == 50_176
        model = None
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=0)
    assert attach(model, mode="released").trainable == 50_176


# --- sharing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule_rank", [1, None])
def test_rules_are_one_object_stored_once_and_collect_all_gradients(rule_rank):
    """T4"""
    model = vit(depth=3)
    attach(model, n=4, rule_rank=rule_rank, seed=0)
    disturb(model)
    for role in "qv":
        assert len({id(getattr(b.attn.qkv, role).rules) for b in model.blocks}) == 1
    assert model.blocks[0].attn.qkv.q.rules is not model.blocks[0].attn.qkv.v.rules
    names = [n for n in model.state_dict() if n.rpartition(".")[2] in ("kad_s", "kad_t", "kad_a")]
    assert names == [
        f"kad_rules.{r}.{k}" for r in "qv" for k in (["kad_a"] if rule_rank is None else ["kad_s", "kad_t"])
    ]
    tensors = [t.data_ptr() for t in model.state_dict().values()]
    assert len(set(tensors)) == len(tensors)

    apart = copy.deepcopy(model)
    for delta in deltas(apart):
        delta.elsewhere = (copy.deepcopy(delta.rules), delta.elsewhere[1])
    for m in (model, apart):
        m.double()
        for delta in deltas(m):
            delta.rules.double()
        m(images(dtype=torch.float64)).square().sum().backward()
    for name, p in model.kad_rules.named_parameters():
        role, tensor = name.split(".")
        parts = [getattr(getattr(b.attn.qkv, role).rules, tensor).grad for b in apart.blocks]
        torch.testing.assert_close(p.grad, sum(parts), rtol=1e-9, atol=1e-12)


def test_sharing_survives_copies_pickles_dtypes_and_devices(tmp_path):
    model = vit()
    attach(model, n=4, share_qv="factors")
    disturb(model)
    wanted = model(images())
    torch.save(model, tmp_path / "model.pt")
    copies = [copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)]
    for other in copies:
        assert torch.equal(other(images()), wanted)
        rules = {id(p) for p in other.kad_rules.parameters()}
        for delta in deltas(other):
            assert {id(p) for p in delta.rules.parameters()} <= rules
        assert rules.isdisjoint(id(p) for p in model.parameters())
        first = other.blocks[0].attn.qkv
        assert first.v.pair()[0] is first.q.kad_u and first.v.bias() is first.q.kad_bias
    other = copies[0].double()
    torch.testing.assert_close(other(images(dtype=torch.float64)).float(), wanted, rtol=1e-4, atol=1e-5)
    empty = copies[1].to("meta")  # parameters are new objects there
    assert {d.rules.kad_s.device.type for d in deltas(empty)} == {"meta"}
    swapped = {n: torch.zeros_like(p) for n, p in adapters(model).items()}
    assert torch.equal(torch.func.functional_call(model, swapped, images()), vit()(images()))  # also by name


def test_the_same_seed_gives_the_same_start():
    one, two, three = vit(), vit(), vit()
    torch.manual_seed(5)
    state_before = torch.get_rng_state()
    attach(one, n=4, seed=3)
    assert torch.equal(torch.get_rng_state(), state_before)
    attach(two, n=4, seed=3)
    attach(three, n=4, seed=4)
    for (name, p), q, r in zip(adapters(one).items(), adapters(two).values(), adapters(three).values(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r) == name.endswith(("kad_v", "kad_bias"))


def test_the_magnitudes_of_the_start():
    """1.4 and 1.7: unit norm of every map from v to H, or the released magnitudes."""
    model = vit(embed_dim=256, num_heads=4)
    attach(model, n=32, seed=0)
    delta = model.blocks[0].attn.qkv.q
    p, q = delta.factors()
    assert p.norm(dim=0).mean().item() == pytest.approx(1, abs=0.15) and not q.any()
    assert delta.rules.kad_t.norm(dim=1).mean().item() == pytest.approx(1, abs=0.1)
    full = vit(embed_dim=256, num_heads=4)
    attach(full, n=32, rule_rank=None, seed=0)
    assert full.kad_rules.q.kad_a.flatten(1).norm(dim=1).mean().item() == pytest.approx(1, abs=0.05)
    for mode, spread in (("paper", 0.02), ("released", 0.0)):
        model = vit(embed_dim=256, num_heads=4)
        attach(model, n=32, mode=mode, seed=0)
        assert model.kad_rules.q.kad_s.abs().max() <= 0.01
        assert model.kad_rules.v.kad_t.std().item() == pytest.approx(0.01 / 3**0.5, rel=0.1)
        delta = model.blocks[0].attn.qkv.q
        assert delta.kad_u.std().item() == pytest.approx(spread, rel=0.1) and delta.scale == 160


# --- the maths -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule_rank", [1, 2, None])
def test_the_output_is_the_formula(rule_rank):
    """T5, T6, T13: dq = scale x H + b with H = sum_i kron(A_i, u_i v_i^T), before the heads; keys bit for bit."""
    model = vit(dtype=torch.float64)
    attach(model, n=4, rank=2, rule_rank=rule_rank, scale=1.5)
    disturb(model)
    layer, x = model.blocks[0].attn.qkv, torch.randn(3, 5, 32, dtype=torch.float64)
    y, stock = layer(x), layer.base(x)
    assert torch.equal(y[..., 32:64].view(torch.int64), stock[..., 32:64].view(torch.int64))
    for delta, rows in ((layer.q, slice(0, 32)), (layer.v, slice(64, 96))):
        h = lowrank.kronecker_sum_ref(delta.rules.matrices(), delta.kad_u, delta.kad_v)
        torch.testing.assert_close(
            y[..., rows] - stock[..., rows], 1.5 * x @ h + layer.q.kad_bias, rtol=1e-10, atol=1e-10
        )
        torch.testing.assert_close(delta(x), 1.5 * x @ h + layer.q.kad_bias, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(delta.weight(), 1.5 * h.T, rtol=1e-12, atol=1e-12)


def test_rank_bounds():
    """T7"""

    def ranks(n, width=96, **settings):
        model = disturb(_attached(vit(embed_dim=width, num_heads=2), n=n, **settings))
        return {torch.linalg.matrix_rank(d.weight(), rtol=1e-11).item() for d in deltas(model)}

    assert ranks(32) == {32}
    assert ranks(4, rank=2, rule_rank=3) == {4 * 3 * 2}
    assert ranks(4, rule_rank=None) == {16}
    assert ranks(12, rule_rank=None) == {96}


def _attached(model, **settings):
    attach(model, **settings)
    return model


def test_the_fast_path_never_builds_h(monkeypatch):
    def forbidden(*arguments):
        raise AssertionError("H was built")

    monkeypatch.setattr(lowrank, "kronecker_sum", forbidden)
    for rule_rank in (1, None):
        model = disturb(_attached(vit(), n=4, rule_rank=rule_rank, dropout=0.5))
        model.eval()(images()).sum().backward()  # dropout is inert here
        model = disturb(_attached(vit(), n=4, rule_rank=rule_rank))
        model.train()(images()).sum().backward()
    with pytest.raises(AssertionError, match="H was built"):
        disturb(_attached(vit(), n=4, dropout=0.5)).train()(images())


@pytest.mark.parametrize("rule_rank", [1, None])
def test_dropout_acts_on_h_in_training_alone(rule_rank):
    """T14"""
    model = disturb(_attached(vit(), n=4, rule_rank=rule_rank, dropout=0.5))
    plain = disturb(_attached(vit(), n=4, rule_rank=rule_rank))
    model.eval(), plain.eval()
    torch.testing.assert_close(model(images()), plain(images()))
    assert torch.equal(model(images()), model(images()))
    model.train()
    assert not torch.equal(model(images()), model(images()))
    delta, x = model.blocks[0].attn.qkv.q, torch.eye(32)
    masked = torch.stack([delta(x) - delta.bias() for _ in range(2000)])
    h = delta.weight().T.float()
    dropped = (masked[0].abs() < 1e-6).float().mean()  # entries, not channels
    assert dropped.item() == pytest.approx(0.5, abs=0.06)
    torch.testing.assert_close(masked.mean(0), h, rtol=0.3, atol=0.1 * h.abs().max().item())
    delta(x).sum().backward()
    assert delta.kad_v.grad.any()


# --- independence ----------------------------------------------------------------------------------------------------


def spread(model, x):
    """How much an image's logits depend on the images beside it, relative to the logits."""
    with torch.no_grad():
        together = model(x)
        alone = torch.cat([model(x[i : i + 1]) for i in range(len(x))])
        order = torch.tensor([2, 0, 3, 1])
        permuted = model(x[order])
    scale = together.abs().max()
    return max((together - alone).abs().max() / scale, (together[order] - permuted).abs().max() / scale)


def test_batch_independence_and_what_the_released_code_does():
    """T10"""
    for rule_rank in (1, None):
        assert spread(disturb(_attached(vit(), n=4, rule_rank=rule_rank)).eval(), images()) < 1e-5
    released = disturb(_attached(vit(), n=4, mode="released", scale=4)).eval()
    assert spread(released, images()) > 0.05


def test_a_bias_of_one_head_stays_in_it_and_the_released_one_wanders():
    """T11"""
    x = torch.randn(3, 17, 32)
    changes = {}
    for mode in ("fixed", "released"):
        model = _attached(vit(num_heads=4), n=4, mode=mode)
        layer = model.blocks[0].attn.qkv
        with torch.no_grad():
            layer.q.kad_bias[8:16] = 1  # head 1
        change = (layer(x) - layer.base(x)).detach().view(3, 17, 3, 4, 8)
        assert not change[:, :, 1].any()
        changes[mode] = change[:, :, 0], change[:, :, 2]
    for change in changes["fixed"]:
        torch.testing.assert_close(change[:, :, 1], torch.ones(3, 17, 8), rtol=1e-5, atol=1e-5)
        assert not change[:, :, [0, 2, 3]].any()
    q, v = changes["released"]
    head, token = torch.arange(4), torch.arange(17)[:, None]
    wanted = (((17 % 4) * head + token) % 4 == 1).float()[None, :, :, None].expand(3, 17, 4, 8)
    torch.testing.assert_close(v, wanted)
    torch.testing.assert_close(q, math.sqrt(8) * wanted)  # (d): added after the division by sqrt(head width)


def test_the_released_q_delta_is_added_after_the_division():
    """1.6 d, through timm's own attention: logits are q k^T / sqrt(hd) + dq k^T."""
    model = _attached(vit(num_heads=2, depth=1), n=4, mode="released")
    layer = model.blocks[0].attn.qkv
    with torch.no_grad():
        layer.q.kad_bias.normal_()
    x = torch.randn(2, 9, 32)
    q, k, v = layer.base(x).reshape(2, 9, 3, 2, 16).permute(2, 0, 3, 1, 4)
    b = qkv.scrambled(layer.q.kad_bias.expand(2, 9, 32), 2).view(2, 9, 2, 16).transpose(1, 2)
    attention = ((q / 4 + b) @ k.mT).softmax(-1)
    wanted = model.blocks[0].attn.proj((attention @ (v + b)).transpose(1, 2).reshape(2, 9, 32))
    torch.testing.assert_close(model.blocks[0].attn(x), wanted, rtol=1e-4, atol=1e-5)


def test_token_equivariance():
    """T12"""
    model = disturb(_attached(vit(), n=4))
    x, order = torch.randn(2, 17, 32), torch.randperm(17)
    block = model.blocks[0]
    torch.testing.assert_close(block(x)[:, order], block(x[:, order]), rtol=1e-4, atol=1e-5)


# --- training, merging, saving ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", kadaptation.MODES)
def test_frozen_tensors_stay_bit_for_bit(mode):
    """T9"""
    model = vit()
    stock = {n: t.clone() for n, t in model.state_dict().items()}
    attach(model, n=4, mode=mode)
    optimiser = train(model, 3, weight_decay=0.1)
    now = model.state_dict()
    for name, tensor in stock.items():
        if not name.startswith("head."):
            assert torch.equal(now[name.replace(".qkv.", ".qkv.base.")], tensor), name
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in optimiser.state} <= trained
    detach(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in vit().modules()]
    assert all(torch.equal(t, stock[n]) for n, t in model.state_dict().items() if not n.startswith("head."))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("settings", [{}, {"rule_rank": None}, {"rank": 2, "share_qv": True}, {"bias": False}])
def test_merge_gives_the_same_logits_and_a_plain_timm_model(dtype, limit, settings, tmp_path):
    """T8"""
    model, x = disturb(_attached(vit(dtype=dtype), n=4, **settings)), images(dtype=dtype)
    before = {n: t.clone() for n, t in vit(dtype=dtype).state_dict().items()}
    adapted = model(x)
    assert (adapted - vit(dtype=dtype)(x)).abs().max() > 1e-2
    q = model.blocks[0].attn.qkv.q.weight()
    merge(model)
    assert (model(x) - adapted).abs().max() <= limit * adapted.abs().max()
    torch.save(model.state_dict(), tmp_path / "merged.pt")
    plain = vit(dtype=dtype)
    plain.load_state_dict(torch.load(tmp_path / "merged.pt"), strict=True)  # T8: plain timm reads the file
    assert torch.equal(plain(x), model(x))
    torch.testing.assert_close(
        model.blocks[0].attn.qkv.weight[:32].double(), before["blocks.0.attn.qkv.weight"][:32].double() + q,
        rtol=1e-6, atol=1e-6,
    )  # fmt: skip
    for name, tensor in model.state_dict().items():
        if "attn.qkv" not in name:
            assert torch.equal(tensor, before[name])
        else:
            assert (
                torch.equal(tensor[32:64], before[name][32:64])
                and not torch.equal(tensor, before[name])
                or (name.endswith("bias") and settings == {"bias": False})
            )


def assert_unmerged(model, x, change=lambda model: None):
    """Merge, `change`, unmerge: T8's "restores W", bit for bit, and the update with it."""
    before = {n: t.clone() for n, t in model.state_dict().items()}
    modules, flags = dict(model.named_modules()), {n: p.requires_grad for n, p in model.named_parameters()}
    adapted = model(x)
    merged = merge(model)
    assert not adapters(model)
    change(model)
    merged.unmerge()
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(t, before[n]) for n, t in after.items())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(m is modules[n] for n, m in model.named_modules())  # an optimiser's parameters are still the model's
    assert torch.equal(model(x), adapted)
    return merged


@pytest.mark.parametrize("settings", [{}, {"rule_rank": None}, {"share_qv": True}, {"bias": False}])
def test_unmerge_restores_the_weights_and_the_update(settings):
    """T8"""
    model = disturb(_attached(vit(), n=4, **settings))
    merged = assert_unmerged(model, images())
    model(images()).sum().backward()
    assert all(p.grad is not None for p in adapters(model).values())
    with pytest.raises(ValueError, match=r"unmerge: blocks.0.attn.qkv \(Shifted\) is not the layer"):
        merged.unmerge()
    adapted = model(images())
    merge(model)
    assert (model(images()) - adapted).abs().max() <= 1e-5 * adapted.abs().max()


@pytest.mark.parametrize("name", FAMILIES)
def test_unmerge_in_other_families(name):
    model, x = family(name)
    attach(model, n=4, seed=0)
    assert_unmerged(disturb(model, 0.1), x)


def test_unmerge_after_training_the_merged_weights_or_with_a_new_bias():
    def train_all(model):
        with torch.no_grad():
            for block in model.blocks:
                block.attn.qkv.weight += 1
                block.attn.qkv.bias += 1

    assert_unmerged(disturb(_attached(vit(), n=4)), images(), train_all)
    model = disturb(_attached(vit(qkv_bias=False), n=4))
    assert_unmerged(model, images())
    assert model.blocks[0].attn.qkv.base.bias is None


def test_unmerge_follows_the_model_to_another_dtype_and_refuses_another_surgery():
    model, x = disturb(_attached(vit(), n=4)), images()
    adapted = model(x)
    merged = merge(model)
    model.double()
    merged.unmerge()
    torch.testing.assert_close(model(x.double()), adapted.double(), rtol=1e-5, atol=1e-5)
    merged = merge(model)
    lbp_wht.attach(model, bases="LP_L1-2", exact_when="never")
    state_before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"unmerge: blocks.0.attn.qkv \(LBPLinear\) is not the layer"):
        merged.unmerge()
    assert all(torch.equal(t, state_before[n]) for n, t in model.state_dict().items())
    lbp_wht.detach(model)


def test_a_merged_model_is_not_attached_to_again_but_its_weights_can_be():
    model = disturb(_attached(vit(), n=4))
    merge(model)
    wanted, trained = model(images()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="merge: KAdaptation is not attached to this VisionTransformer"):
        merge(model)
    methods = [
        lambda m: attach(m, n=8), lambda m: baselines.lora_qv(m), lambda m: baselines.adapter(m, 4),
        lambda m: baselines.vera(m, rank=4), lambda m: intrinsic.attach(m, "blocks.0.mlp", 3),
    ]  # fmt: skip
    for method in methods:
        for again in (model, copy.deepcopy(model)):
            with pytest.raises(ValueError, match=r"KAdaptation was merged into blocks.0.attn.qkv.* into a new model"):
                method(again)
    assert torch.equal(model(images()), wanted) and [p.requires_grad for p in model.parameters()] == trained
    fresh = vit()
    fresh.load_state_dict(model.state_dict())
    attach(fresh, n=8)
    assert torch.equal(fresh(images()), wanted)


@pytest.mark.parametrize("undo", [merge, detach])
def test_a_part_of_the_model_is_refused_whole_and_a_wrapped_model_is_not(undo):
    model = disturb(_attached(vit(), n=4))
    wanted = model(images())
    with pytest.raises(ValueError, match=f"{undo.__name__}: the A_i that attn.qkv shares .* give the whole model"):
        undo(model.blocks[0])
    assert torch.equal(model(images()), wanted) and len(deltas(model)) == 4
    undo(nn.Sequential(model))
    assert not deltas(model) and not adapters(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in vit().modules()]


def test_what_may_be_trained_after_merge_and_detach():
    for undo in (merge, detach):
        model = _attached(vit(), n=4)
        undo(model)
        assert [n for n, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]


@pytest.mark.parametrize("match", ["q_proj", "v_proj"])
@pytest.mark.parametrize("share_qv", [False, True])
def test_queries_or_values_alone(match, share_qv):
    """Where they are layers of their own, `match` may choose one of them."""
    model, x = family("eva02_base_patch14_224")
    report = attach(model, n=4, share_qv=share_qv, match=lambda name, module: name.endswith(match))
    assert report.matched == [f"blocks.{i}.attn.{match}" for i in (0, 1)] and len(report.skipped) == 2
    adapted = disturb(model, 0.1)(x)
    adapted.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapters(model).values())
    merge(model)
    torch.testing.assert_close(model(x), adapted, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families(name):
    model, x = family(name)
    stock, plain = copy.deepcopy(model), copy.deepcopy(model)
    report = attach(model, n=4, seed=0)
    expected = 2 if "q_proj" not in " ".join(report.matched) else 4
    assert len(report.matched) == expected
    torch.testing.assert_close(model(x), stock(x), rtol=1e-5, atol=1e-5)  # a bias may be added apart from the layer
    disturb(model, 0.1)
    adapted = model(x)
    assert (adapted - stock(x)).abs().max() > 5e-3
    adapted.square().sum().backward()
    assert all(p.grad is not None for p in adapters(model).values())  # T16
    merged = copy.deepcopy(model)
    merge(merged)
    assert [type(m) for m in merged.modules()] == [type(m) for m in stock.modules()]
    torch.testing.assert_close(merged(x), adapted, rtol=1e-5, atol=2e-5)
    plain.load_state_dict(merged.state_dict(), strict=True)
    torch.testing.assert_close(plain(x), adapted, rtol=1e-5, atol=2e-5)
    detach(model)
    # a trained table of relative positions (BEiT) makes torch take another attention kernel
    model.requires_grad_(False), stock.requires_grad_(False)
    assert torch.equal(model(x), stock(x)) and model.state_dict().keys() == stock.state_dict().keys()


def test_a_layer_without_any_bias_gets_one_when_merged():
    model = disturb(_attached(vit(qkv_bias=False), n=4))
    wanted = model(images())
    merge(model)
    torch.testing.assert_close(model(images()), wanted, rtol=1e-5, atol=1e-5)
    vit(qkv_bias=True).load_state_dict(model.state_dict(), strict=True)


def test_save_and_load(tmp_path):
    """T15"""
    model = disturb(_attached(vit(), n=4, seed=0))
    path = leanvit.save(model, tmp_path / "adapter.safetensors", header={"n": 4})
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    own = path.stat().st_size - 4 * count
    assert 0 < own < 4096 + 90 * len(model.state_dict())  # the names of the frozen tensors
    other = _attached(vit(), n=4, seed=1)
    assert leanvit.load(other, path) == {"n": 4}
    assert torch.equal(other(images()), model(images()))
    for wrong, what in (
        (_attached(vit(embed_dim=64), n=4), "shape of"),
        (_attached(vit(depth=3), n=4), "missing in the file"),
        (_attached(vit(), n=8), "shape of kad_rules.q.kad_s|shape of blocks.0.attn.qkv.q.kad_u"),
        (_attached(vit(), n=4, rule_rank=None), "kad_rules.q.kad_a"),
        (vit(), "unexpected in the file: blocks.0.attn.qkv.q.kad"),
    ):
        with pytest.raises(ValueError, match=what):
            leanvit.load(wrong, path)
    assert len(state.changed_names(model)) == len(set(state.changed_names(model)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 1.0}, r"settings of blocks.0.attn.qkv.q: .*'scale': 4.0} in the file, .*'scale': 1.0} in the model"),
        ({"mode": "paper"}, "'scale': 160.0} in the model"),
        ({"mode": "released", "scale": 4.0}, "'Kronecker'.* in the file, .*'Released'.* in the model"),
    ],
)
def test_a_file_of_another_scale_or_mode_does_not_load(settings, message, tmp_path):
    """The tensors have the same names and shapes, the logits would be others."""
    path = leanvit.save(disturb(_attached(vit(), n=4)), tmp_path / "adapter.safetensors")
    other = _attached(vit(), n=4, **settings)
    before = {n: t.clone() for n, t in other.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        leanvit.load(other, path)
    assert all(torch.equal(t, before[n]) for n, t in other.state_dict().items())


# --- with others -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["lbp_wht", "kadaptation"])
@pytest.mark.parametrize("rule_rank", [1, None])
def test_composes_with_lbp_wht(first, rule_rank):
    model = vit(img_size=64, depth=1)
    stock, x = copy.deepcopy(model), images(64)
    steps = [
        lambda: lbp_wht.attach(model, bases="LP_L1-2", exact_when="never"),
        lambda: attach(model, n=4, rule_rank=rule_rank),
    ]
    for step in steps if first == "lbp_wht" else steps[::-1]:
        step()
    assert isinstance(model.blocks[0].attn.qkv.base, lbp_wht.LBPLinear)
    assert torch.equal(model(x), stock(x))
    disturb(model)
    adapted = model(x)
    adapted.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapters(model).values())
    merged = copy.deepcopy(model)
    merge(merged)
    torch.testing.assert_close(merged(x), adapted, rtol=1e-5, atol=1e-5)
    for undo in (detach, lbp_wht.detach):
        undo(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]
    assert torch.equal(model(x), stock(x))


def test_the_input_gradient_of_lbp_goes_around_the_adapter():
    """The adapter's own part of the input gradient stays exact."""
    model = disturb(_attached(vit(img_size=64, depth=1), n=4))
    exact = model.blocks[0].attn.qkv
    x = torch.randn(2, 257, 32, requires_grad=True)
    weight = torch.cat([exact.q.weight(), exact.q.weight() * 0, exact.v.weight()]).float()
    lbp_wht.attach(model, bases="DC", exact_when="never")
    g = torch.randn(2, 257, 96)
    (both,) = torch.autograd.grad(exact(x), x, g)
    (base,) = torch.autograd.grad(exact.base(x), x, g)
    torch.testing.assert_close(both - base, g @ weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule_rank", [1, None])
def test_compiles_and_trains_compiled(rule_rank):
    model = disturb(_attached(vit(depth=1), n=4, rule_rank=rule_rank))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images()), model(images()))
    wanted = torch.autograd.grad(model(images()).square().sum(), list(adapters(model).values()))
    compiled(images()).square().sum().backward()
    for grad, p in zip(wanted, adapters(model).values(), strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"rule_rank": None}, {"dropout": 0.3}, {"mode": "released"}])
def test_mixed_precision(settings):
    model, stock = _attached(vit(), n=4, **settings), vit()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(images()), stock(images()))  # T1 under autocast
    disturb(model, 0.05).eval()
    with torch.autocast("cpu", torch.bfloat16):
        low = model(images())
        low.float().square().sum().backward()
    torch.testing.assert_close(low.float(), model(images()).detach(), rtol=0.1, atol=0.1)
    used = [p for n, p in adapters(model).items() if p.grad is not None]
    assert used and all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in used)


def test_the_block_without_a_gradient_of_its_input():
    """Behind a frozen patch embedding the first layer's input needs no gradient, and none is computed."""
    model = disturb(_attached(vit(depth=1), n=4))
    layer, x = model.blocks[0].attn.qkv, torch.randn(2, 17, 32)
    layer(x).sum().backward()
    assert layer.q.kad_u.grad.any() and x.grad is None and layer.base.weight.grad is None


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 5}, r"n=5 does not divide the widths 48 of blocks.0.attn.qkv; n that do: 2, 3, 4, 6, 8, 12, 16, 24, 48"),
        ({}, "n=32 does not divide the widths 48"),
        ({"n": 0}, "n=0 must be a whole number of at least 1"),
        ({"n": 4, "rank": 1.5}, "rank=1.5 must be a whole number"),
        ({"n": 4, "rule_rank": 0}, "rule_rank=0 must be"),
        ({"n": 4, "mode": "fast"}, "mode='fast' is not one of fixed, paper, released"),
        ({"n": 4, "share_qv": "bias"}, "share_qv='bias' is not one of"),
        ({"n": 4, "dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        ({"n": 4, "scale": float("nan")}, "scale=nan must be a finite number"),
        ({"n": 4, "mode": "released", "rule_rank": None}, "mode 'released' factors A_i"),
        ({"n": 4, "mode": "released", "share_qv": True}, "mode 'released' factors A_i"),
        ({"n": 4, "match": lambda n, m: "atn" in n}, "match chose none of the query and value layers blocks.0.attn.q"),
        ({"n": 4, "seed": "a"}, "seed='a' must be a whole number of at least 0"),
        ({"n": 4, "mode": ["fixed"]}, r"mode=\['fixed'\] is not one of"),
    ],
)
def test_bad_arguments_leave_the_model_as_it_was(settings, message):
    model = vit(embed_dim=48)
    before = {n: (p, p.requires_grad) for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        attach(model, **settings)
    now = {n: (p, p.requires_grad) for n, p in model.named_parameters()}
    assert now.keys() == before.keys()
    assert all(now[n][0] is p and now[n][1] == trained for n, (p, trained) in before.items())
    assert not hasattr(model, "kad_rules")


def test_models_that_cannot_be_adapted():
    with pytest.raises(ValueError, match="ResNet has no attention"):
        attach(timm.create_model("resnet10t", num_classes=2))
    with pytest.raises(ValueError, match="shared A_i would become a step of this nn.Sequential"):
        attach(nn.Sequential(vit()), n=4)
    model = _attached(vit(), n=4)
    with pytest.raises(ValueError, match="KAdaptation already .*merge or detach"):
        attach(model, n=4)
    model = vit()
    baselines.lora(model, rank=2)
    with pytest.raises(ValueError, match="LoRA already .*merge or detach"):
        attach(model, n=4)
    for undo in (merge, detach):
        with pytest.raises(ValueError, match=f"{undo.__name__}: KAdaptation is not attached"):
            undo(vit())
    model = _attached(vit(), n=4, mode="released")
    with pytest.raises(ValueError, match="merge: mode 'released' .* mixes tokens and images"):
        merge(model)
    assert len(deltas(model)) == 4
    xcit = timm.create_model("xcit_nano_12_p16_224", depth=1, embed_dim=32, num_heads=2)
    for normed in (vit(qk_norm=True), family("swinv2_tiny_window8_256")[0], family("eva02_base_patch14_224")[0], xcit):
        for method in (lambda m: attach(m, n=4, mode="released"), baselines.lora_scrambled):
            trained = [p.requires_grad for p in normed.parameters()]
            with pytest.raises(ValueError, match="(mode 'released'|lora_scrambled) is defined for a fused qkv"):
                method(normed)
            assert trained == [p.requires_grad for p in normed.parameters()]
    layer = _attached(vit(), n=4, mode="released").blocks[0].attn.qkv
    with pytest.raises(ValueError, match=r"defined on tokens \(B, N, C\), got \(2, 3, 3, 32\)"):
        layer(torch.randn(2, 3, 3, 32))


def test_match_chooses_layers_and_the_report_says_what_was_left():
    model = vit(depth=3)
    report = attach(model, n=4, match=lambda name, module: name.startswith("blocks.2."))
    assert report.matched == ["blocks.2.attn.qkv"]
    assert report.skipped == {"blocks.0.attn.qkv": "not matched", "blocks.1.attn.qkv": "not matched"}
    assert "4 terms, scale 4" in str(report)
