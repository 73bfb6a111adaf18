"""Local intrinsic dimension: the property test T23 of KAdaptation's specification, and the ways back."""

import copy

import pytest
import scipy.linalg
import timm
import torch

import leanvit
from leanvit import baselines, block_expansion, intrinsic, kadaptation
from leanvit.intrinsic import Fastfood, attach, detach, dimension, merge, reference, walsh_hadamard


def vit(seed=0):
    torch.manual_seed(seed)
    return timm.models.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3
    ).eval()


def images():
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def disturb(model, std=1.0):
    torch.manual_seed(2)
    with torch.no_grad():
        next(m for m in model.modules() if isinstance(m, intrinsic.Subspace)).intrinsic_z.normal_(std=std)
    return model


@pytest.mark.parametrize("bits", [0, 1, 3, 4, 5, 8, 10])
def test_walsh_hadamard_is_the_hadamard_matrix(bits):
    x = torch.randn(2**bits, dtype=torch.float64, requires_grad=True)
    matrix = torch.tensor(scipy.linalg.hadamard(2**bits), dtype=torch.float64)
    torch.testing.assert_close(walsh_hadamard(x), matrix @ x)
    assert torch.autograd.gradcheck(walsh_hadamard, x)
    for wrong in (3, 6, 0):
        with pytest.raises(ValueError, match="power of two"):
            walsh_hadamard(torch.zeros(wrong))


def test_the_transform_grows_as_l_log_l():
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for bits in (8, 12, 16):
        with FlopCounterMode(display=False) as counter:
            walsh_hadamard(torch.zeros(2**bits))
        counts.append(counter.get_total_flops() / (bits * 2**bits))
    assert max(counts) < 1.2 * min(counts)


@pytest.mark.parametrize(("size", "d"), [(100, 7), (100, 100), (16, 60), (1, 3), (256, 1)])
def test_fastfood_is_linear_deterministic_and_keeps_norms(size, d):
    """T23; also for a tensor of fewer numbers than d, where every direction still counts."""
    ray = Fastfood(size, d, torch.Generator().manual_seed(0))
    same = Fastfood(size, d, torch.Generator().manual_seed(0))
    other = Fastfood(size, d, torch.Generator().manual_seed(1))
    one, two = torch.randn(2, d, dtype=torch.float64)
    assert torch.equal(ray(one), same(one)) and not torch.equal(ray(one), other(one))
    torch.testing.assert_close(ray(2 * one - 3 * two), 2 * ray(one) - 3 * ray(two))
    assert ray(one).shape == (size,) and not ray(torch.zeros(d)).any()
    columns = torch.stack([ray(row) for row in torch.eye(d, dtype=torch.float64)])
    assert (columns.norm(dim=1) > 0).all()


def test_column_norms_and_the_mean_norm():
    """T23: E|Pz|^2 is |z|^2 within 10 %, for one tensor and over draws; columns have nearly equal norms."""
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(20):
        ray = Fastfood(1000, 40, generator)
        z = torch.randn(40, generator=generator)
        ratios.append((ray(z).square().sum() / z.square().sum()).item())
    assert sum(ratios) / 20 == pytest.approx(1, abs=0.1)
    columns = torch.stack([ray(row) for row in torch.eye(40)]).norm(dim=1)
    assert columns.std() < 0.1 and columns.mean() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("name", ["blocks.1.attn", "blocks.0.mlp", "blocks.0.attn.qkv", "blocks.1"])
def test_z_of_zero_is_the_pretrained_model(name):
    """T23"""
    model, stock = vit(), vit()
    report = attach(model, name, d=10)
    assert torch.equal(model(images()), stock(images()))
    assert report.trainable == 10 + 17 * 3 and report.matched == [name]
    now = model.get_submodule(name).parameters_now()
    for key, value in stock.get_submodule(name).named_parameters():
        assert torch.equal(now[key], value)
    disturb(model)
    assert not torch.allclose(model(images()), stock(images()), atol=1e-4)


def test_d_of_zero_trains_the_head_alone():
    """T23"""
    model, stock = vit(), vit()
    report = attach(model, "blocks.0.attn", d=0)
    assert report.trainable == 17 * 3 and torch.equal(model(images()), stock(images()))
    model(images()).sum().backward()
    merge(model)
    assert torch.equal(model(images()), stock(images()))


def test_training_moves_z_and_the_head_and_nothing_else():
    model, stock = vit(), vit()
    attach(model, "blocks.1.mlp", d=20)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 3
    optimiser = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.1)
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(model(images()), torch.tensor([0, 1, 2, 0]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0] and model.blocks[1].mlp.intrinsic_z.any()
    adapted = model(images())
    for key, value in stock.state_dict().items():
        if not key.startswith("head."):
            assert torch.equal(model.state_dict()[key.replace("blocks.1.mlp.", "blocks.1.mlp.base.")], value)
    merged = copy.deepcopy(model)
    undo = merge(merged)
    torch.testing.assert_close(merged(images()), adapted)
    assert merged.state_dict().keys() == stock.state_dict().keys()
    undo.unmerge()
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in merged.state_dict().items())
    assert torch.equal(merged(images()), adapted)
    detach(model)
    assert all(torch.equal(t, stock.state_dict()[n]) for n, t in model.state_dict().items() if n[:5] != "head.")


def test_attentions_that_take_more_than_the_tokens():
    torch.manual_seed(0)
    small = {"img_size": 28, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = timm.create_model("eva02_tiny_patch14_224", **small).eval()  # rope=, and biases of the attention
    x = torch.randn(2, 3, 28, 28)
    stock = model(x)
    attach(model, "blocks.1.attn", d=8)
    assert torch.equal(model(x), stock)
    assert not torch.allclose(disturb(model)(x), stock, atol=1e-4)


def test_mixed_precision_and_saving(tmp_path):
    model = vit()
    attach(model, "blocks.0.attn", d=12, seed=7)
    disturb(model, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(images())
        low.float().sum().backward()
    assert model.blocks[0].attn.intrinsic_z.grad.dtype == torch.float32
    torch.testing.assert_close(low.float(), model(images()).detach(), rtol=0.1, atol=0.1)
    path = leanvit.save(model, tmp_path / "z.safetensors")
    other = vit()
    attach(other, "blocks.0.attn", d=12, seed=7)
    leanvit.load(other, path)
    assert torch.equal(other(images()), model(images()))


def test_reference_and_dimension():
    model = vit()
    report = reference(model, "blocks.0.attn")
    assert report.trainable == sum(p.numel() for p in model.blocks[0].attn.parameters()) + 17 * 3
    curve = {0: 0.5, 10: 0.7, 40: 0.79, 100: 0.82}
    assert dimension(curve, 0.85) == 40 and dimension(curve, 0.95) is None and dimension(curve, 0.8, 1.0) == 100


def test_bad_input():
    for name, message in (
        ("blocks.9.attn", "has no module 'blocks.9.attn'; attentions and MLPs are blocks.0.attn, blocks.0.mlp"),
        ("", "has no module ''"),
        ("blocks.0.attn.attn_drop", "has no parameters"),
        ("head", "holds the head|has no"),
    ):
        model = vit()
        before = [p.requires_grad for p in model.parameters()]
        with pytest.raises(ValueError, match=message):
            attach(model, name, d=3)
        assert [p.requires_grad for p in model.parameters()] == before
    for d in (-1, 1.5, True, 10**9):
        with pytest.raises(ValueError, match=r"must be a whole number from 0 to 1,?088"):
            attach(vit(), "blocks.0.attn", d=d)
    model = vit()
    attach(model, "blocks.0.attn", d=3)
    with pytest.raises(ValueError, match="has a subspace already"):
        attach(model, "blocks.1.attn", d=3)
    for seed in ("a", None, -1):
        with pytest.raises(ValueError, match=f"intrinsic: seed={seed!r} must be a whole number"):
            attach(vit(), "blocks.0.attn", d=3, seed=seed)
    for undo in (merge, detach):
        with pytest.raises(ValueError, match=f"{undo.__name__}: no subspace is attached"):
            undo(vit())


ADAPTERS = [
    lambda m: kadaptation.attach(m, n=4), lambda m: baselines.lora_qv(m), lambda m: baselines.vera(m, rank=4),
    lambda m: baselines.adapter(m, 4), lambda m: baselines.compacter(m, 8), lambda m: baselines.lora(m),
]  # fmt: skip


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_no_subspace_beside_an_adapter(adapter):
    """A second would freeze the first, and P z is a map of the parameters that the module had."""
    model = vit()
    attach(model, "blocks.0.attn", d=3)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    with pytest.raises(ValueError, match=r"has a subspace already \(blocks.0.attn.intrinsic_z\); merge or"):
        adapter(model)
    assert trained == [n for n, p in model.named_parameters() if p.requires_grad]
    with pytest.raises(ValueError, match=r"this model has a subspace already \(blocks.0.attn.intrinsic_z\)"):
        block_expansion.attach(model, p=1)
    model = vit()
    adapter(model)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    with pytest.raises(ValueError, match=r"intrinsic: this model has \w+ already"):
        attach(model, "blocks.0.attn", d=3)
    assert names == [n for n, p in model.named_parameters() if p.requires_grad]


def test_a_z_of_another_seed_does_not_load(tmp_path):
    one, other = vit(), vit()
    attach(one, "blocks.0.attn", d=12, seed=7)
    path = leanvit.save(disturb(one), tmp_path / "z.safetensors")
    attach(other, "blocks.0.attn", d=12, seed=8)
    with pytest.raises(ValueError, match=r"settings of blocks.0.attn: {'seed': 7} in the file, {'seed': 8} in the"):
        leanvit.load(other, path)
