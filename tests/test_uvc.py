"""UVC's counting, plans and slicing; the numbers T1 to T26 are the property tests of its specification."""

import copy
import dataclasses
import json
import random
import re
import subprocess
import sys

import pytest
import timm
import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import leanvit
from leanvit import baselines, comcat, controls, cost, uvc
from leanvit.export import export
from leanvit.uvc import BlockPlan, Plan, SlicedAttention
from leanvit.uvc_math import flops_ratio
from leanvit.uvc_plan import block_macs, embed_macs, whole_plan

SMALL = dict(img_size=16, patch_size=4, embed_dim=32, depth=4, num_heads=4, num_classes=5)


def vit(seed=0, dtype=torch.float64, **settings):
    torch.manual_seed(seed)
    model = VisionTransformer(**SMALL | settings).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def images(model, batch=2, seed=1):
    p = next(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    size = model.patch_embed.img_size
    return torch.randn(batch, 3, *size, generator=generator, dtype=torch.float64).to(p.dtype)


def counted(model, batch=1):
    """FLOPs of one forward pass, by torch."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images(model, batch))
    return counter.get_total_flops()


def random_plan(shapes, seed, skip=0.3, patches=False):
    """Any plan at all: ragged, with skipped blocks."""
    draw = random.Random(seed)

    def some(n):
        return tuple(sorted(draw.sample(range(n), draw.randint(1, n))))

    blocks = []
    for shape in shapes.blocks:
        heads = some(shape.heads)
        block = BlockPlan(heads, tuple(some(shape.values[h]) for h in heads), some(shape.hidden))
        blocks.append(None if draw.random() < skip else block)
    return Plan(shapes, tuple(blocks), some(shapes.patches) if patches else None, {"seed": seed})


def stock_plan(shapes, seed):
    """Heads, units and blocks alone."""
    blocks = []
    for shape, block in zip(shapes.blocks, random_plan(shapes, seed).blocks, strict=True):
        values = () if block is None else tuple(tuple(range(shape.values[h])) for h in block.heads)
        blocks.append(None if block is None else dataclasses.replace(block, values=values))
    return Plan(shapes, tuple(blocks))


def extreme_plan(shapes):
    """One block with one head of one value dimension and one unit; all others skipped."""
    block = BlockPlan((2,), ((3,),), (7,))
    return Plan(shapes, (None, block, *[None] * (len(shapes.blocks) - 2)))


def sliced(model, plan):
    model = copy.deepcopy(model)
    uvc.apply(model, plan)
    return model


# --- counting --------------------------------------------------------------------------------------------------------

PUBLISHED = {"deit_tiny_patch16_224": 2_507_366_400, "deit_small_patch16_224": 9_197_764_608}
TERMS = {  # specification, 1.6: E, block, M0
    "deit_tiny_patch16_224": (28_901_376, 102_049_152, 1_253_491_200),
    "deit_small_patch16_224": (57_802_752, 378_391_296, 4_598_498_304),
    "deit_base_patch16_224": (115_605_504, 1_453_954_560, 17_563_060_224),
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", PUBLISHED)
def test_dense_flops_are_torchs(name, fused):  # T1
    model = timm.create_model(name, device="meta")
    for block in model.blocks:
        block.attn.fused_attn = fused
    shapes = uvc.read_shapes(model)
    total = 2 * (uvc.dense_macs(shapes) + uvc.head_macs(model))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 224, 224, device="meta"))
    assert total == PUBLISHED[name] == counter.get_total_flops()


@pytest.mark.parametrize("name", TERMS)
def test_the_terms_of_the_specification(name):  # T1
    shapes = uvc.read_shapes(timm.create_model(name, device="meta"))
    embed, block, dense = TERMS[name]
    assert embed == shapes.embed_macs and dense == uvc.dense_macs(shapes)
    assert block == block_macs(shapes.blocks[0], shapes.width, shapes.tokens)


@pytest.mark.parametrize("prefix", [{}, {"pool_include_prefix": True}, {"class_token": False}, {"num_heads": 2}])
def test_attention_pooling_counts(prefix):
    """timm's pooling by a latent query: a share for each token, so that dropped patches make it cheaper."""
    model = vit(global_pool="map", **prefix)
    shapes = uvc.read_shapes(model)
    assert controls.macs(model) == uvc.dense_macs(shapes) and shapes.pool_macs[1] == 2 * 32 * 32 + 2 * 32
    assert Plan.from_json(whole_plan(shapes).to_json()).shapes == shapes
    assert "pool_macs" not in whole_plan(uvc.read_shapes(vit())).to_json()
    for seed in range(3):
        plan = random_plan(shapes, seed, patches=True)
        assert controls.macs(sliced(model, plan)) == plan.macs()
    plan = uvc.magnitude_plan(model, 0.5, round_units=4)
    assert 0.48 < plan.ratio() <= 0.5 and plan.ratio() == pytest.approx(plan.origin["predicted_ratio"])
    assert controls.macs(sliced(model, plan)) == plan.macs()
    old = Plan.from_json(re.sub(r', "pool_macs": \[[^]]*\]', "", plan.to_json()))  # of before it was counted
    assert old.macs() < plan.macs() and controls.macs(sliced(model, old)) == plan.macs()


def test_attention_pooling_in_a_search():
    model = vit(global_pool="map", dtype=torch.float32)
    data = [(images(model, 4, seed=s), torch.arange(4)) for s in range(3)]
    plan = uvc.search(model, data, 0.5, steps=20, settings=uvc.Settings(keep_patches=8, round_units=4))
    assert plan.ratio() <= 0.5 and plan.ratio() == pytest.approx(plan.origin["predicted_ratio"])
    assert controls.macs(sliced(model, plan)) == plan.macs() <= 0.5 * controls.macs(model)


def test_a_distillation_token_counts():  # T1
    model = timm.create_model("deit_tiny_distilled_patch16_224", device="meta").eval()
    shapes = uvc.read_shapes(model)
    assert shapes.tokens == 198 and uvc.head_macs(model) == 2 * 192 * 1000
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() == 2 * (uvc.dense_macs(shapes) + uvc.head_macs(model))


@pytest.mark.parametrize("seed", range(4))
def test_sliced_flops_are_torchs(seed):  # T5
    model = vit()
    shapes = uvc.read_shapes(model)
    plan = random_plan(shapes, seed)
    small = sliced(model, plan)
    assert counted(small) == 2 * (plan.macs() + uvc.head_macs(small))
    removed = sum(8 - len(values) for block in plan.blocks if block is not None for values in block.values)
    assert plan.paper_macs() - plan.macs() == 17 * 32 * removed and plan.macs() <= plan.paper_macs()
    # the sliced model, read anew, says the same
    assert uvc.dense_macs(uvc.read_shapes(small)) == plan.macs()


def test_the_random_deit_of_the_specification():  # T5
    shapes = uvc.read_shapes(timm.create_model("deit_tiny_patch16_224", device="meta"))
    plan = random_plan(shapes, 5)
    model = timm.create_model("deit_tiny_patch16_224")
    uvc.apply(model, plan)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 224, 224))
    assert counter.get_total_flops() // 2 - 192_000 == plan.macs()


# --- equality of masked and sliced -----------------------------------------------------------------------------------

FAMILIES = {
    "vit": {},
    "layer scale": {"init_values": 0.5},
    "qk norm": {"qk_norm": True},
    "average pool": {"global_pool": "avg", "class_token": False},
    "registers": {"reg_tokens": 3},
    "pre norm": {"pre_norm": True},
    "mlp ratio 3": {"mlp_ratio": 3.0},
    "no biases": {"qkv_bias": False, "proj_bias": False},
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_sliced_is_masked(family):  # T6
    model = vit(**FAMILIES[family])
    shapes, x = uvc.read_shapes(model), images(model)
    plans = [
        *(random_plan(shapes, s) for s in range(4)),
        *(stock_plan(shapes, s) for s in range(2)),
        extreme_plan(shapes),
    ]
    for plan in plans:
        masked, small = uvc.mask(model, plan), sliced(model, plan)
        assert (masked(x) - small(x)).abs().max() <= 1e-10
        assert (masked(x) - model(x)).abs().max() > 1e-3  # something was cut
        parameters = sum(p.numel() for p in small.parameters())
        assert parameters < sum(p.numel() for p in masked.parameters()) or not any(plan.blocks)


@torch.no_grad()
def test_sliced_is_masked_in_single_precision():  # T6
    model = vit(dtype=torch.float32)
    x = images(model, 8)
    for seed in range(4):
        plan = random_plan(uvc.read_shapes(model), seed)
        masked, small = uvc.mask(model, plan)(x), sliced(model, plan)(x)
        assert (masked - small).abs().max() <= 1e-4 * masked.abs().max()


@torch.no_grad()
def test_a_skipped_block_is_no_block():  # T13
    model = vit()
    x, whole = images(model), whole_plan(uvc.read_shapes(model))
    assert torch.equal(sliced(model, whole)(x), model(x))
    without = copy.deepcopy(model)
    del without.blocks[2]
    plan = Plan(whole.shapes, (*whole.blocks[:2], None, whole.blocks[3]))
    small = sliced(model, plan)
    assert torch.equal(small(x), without(x)) and len(small.blocks) == 3
    assert [i["module"] for i in small.feature_info] == ["blocks.0", "blocks.1", "blocks.2"]
    assert uvc.kept_blocks(small) == [0, 1, 3]
    kept = small.forward_intermediates(x, indices=[2], intermediates_only=True)
    assert torch.equal(kept[0], without.forward_intermediates(x, indices=[2], intermediates_only=True)[0])


@torch.no_grad()
def test_heads_alone_leave_the_stock_class():
    model = vit()
    plan = stock_plan(uvc.read_shapes(model), 1)
    small = sliced(model, plan)
    kept = [b for b in plan.blocks if b is not None]
    assert any(len(b.heads) < 4 for b in kept)
    for block, p in zip(small.blocks, kept, strict=True):
        assert type(block.attn) is Attention and type(block.attn.qkv) is nn.Linear
        assert block.attn.num_heads == len(p.heads) and block.attn.attn_dim == 8 * len(p.heads)
        assert block.attn.qkv.weight.shape == (24 * len(p.heads), 32)
        assert block.mlp.fc1.weight.shape == (len(p.units), 32)
    ragged = sliced(model, random_plan(uvc.read_shapes(model), 1))
    assert any(type(b.attn) is SlicedAttention for b in ragged.blocks)


def test_a_cut_model_trains():
    model = vit()
    plan = random_plan(uvc.read_shapes(model), 1)
    small = sliced(model, plan).train()
    before = copy.deepcopy(small.state_dict())
    optimizer = torch.optim.SGD(small.parameters(), 0.1)
    small(images(small)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(t, before[n]) for n, t in small.state_dict().items() if n.startswith("blocks.0"))
    assert all(p.requires_grad for p in small.parameters())
    model.blocks[0].attn.qkv.weight.requires_grad_(False)
    assert not sliced(model, plan).blocks[0].attn.qkv.weight.requires_grad


@torch.no_grad()
def test_attention_masks_reach_sliced_heads():
    model = vit()
    whole = whole_plan(uvc.read_shapes(model))
    values = (tuple(range(8)), tuple(range(5)), tuple(range(5)), tuple(range(8)))
    plan = Plan(whole.shapes, (dataclasses.replace(whole.blocks[0], values=values), *whole.blocks[1:]))
    small, masked = sliced(model, plan).blocks[0].attn, uvc.mask(model, plan).blocks[0].attn
    x = torch.randn(2, 17, 32, dtype=torch.float64)
    bias = torch.randn(2, 1, 17, 17, dtype=torch.float64)
    for told in ({"attn_mask": bias}, {"is_causal": True}, {}):
        assert (small(x, **told) - masked(x, **told)).abs().max() < 1e-10
    assert small.runs() == [(0, 2, 8), (2, 2, 5)]
    with pytest.raises(ValueError, match="one attention mask for all heads"):
        small(x, attn_mask=bias.expand(2, 4, 17, 17))


@torch.no_grad()
def test_cut_twice():
    """A pruned model can be pruned again; the index map and the file know both plans."""
    model = vit()
    x, first = images(model), random_plan(uvc.read_shapes(model), 3)
    small = sliced(model, first)
    second = dataclasses.replace(random_plan(uvc.read_shapes(small), 4, skip=0), patches=(1, 5, 6, 11))
    masked = uvc.mask(small, second)
    uvc.apply(small, second)
    assert (small(x) - masked(x)).abs().max() < 1e-10
    assert len(small.uvc_plans) == 2 and uvc.kept_blocks(small) == [i for i, b in enumerate(first.blocks) if b]
    third = Plan(uvc.read_shapes(small), whole_plan(uvc.read_shapes(small)).blocks, (0, 2))
    uvc.apply(small, third)
    assert small.patch_drop.uvc_keep == (1, 6)


# --- patches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["vit", "average pool", "registers"])
@torch.no_grad()
def test_patches_are_gathered(family):  # T26
    model = vit(**FAMILIES[family])
    shapes, x = uvc.read_shapes(model), images(model)
    keep = (0, 3, 4, 9, 15)
    plan = Plan(shapes, whole_plan(shapes).blocks, keep)
    small = sliced(model, plan)
    assert counted(small) == 2 * (plan.macs() + uvc.head_macs(small)) < 0.5 * counted(model)
    prefix = shapes.prefix
    block = block_macs(shapes.blocks[0], 32, prefix + 5)
    assert plan.macs() == shapes.embed_macs + 4 * block
    tokens = model._pos_embed(model.patch_embed(x))  # position embeddings are added, then both are gathered
    tokens = torch.cat([tokens[:, :prefix], tokens[:, [prefix + k for k in keep]]], 1)
    expected = model.forward_head(model.norm(model.blocks(model.norm_pre(tokens))))
    assert torch.equal(small(x), expected) and (expected - model(x)).abs().max() > 1e-3


@torch.no_grad()
def test_kept_patches_are_those_of_one_grid():
    model = vit(dynamic_img_size=True, dtype=torch.float32)
    shapes = uvc.read_shapes(model)
    small = sliced(model, Plan(shapes, whole_plan(shapes).blocks, (0, 3, 4, 9, 15)))
    larger = torch.randn(2, 3, 24, 24)
    model(larger)
    uvc.apply(small, Plan(uvc.read_shapes(small), whole_plan(uvc.read_shapes(small)).blocks, (1, 2)))  # again
    assert small(images(model)).isfinite().all()
    with pytest.raises(ValueError, match="KeepPatches: tokens=37 must be 17, those of the grid .* plan was made for"):
        small(larger)
    program = torch.export.export(small, (images(model),), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    torch.testing.assert_close(program.module()(images(model, 3)), small(images(model, 3)))
    search = uvc.CorrectedSearch(model, 0.5, 8, settings=uvc.Settings(keep_patches=5))
    with torch.enable_grad(), pytest.raises(ValueError, match="tokens=37 must be 17"):
        search.step(larger, torch.tensor([0, 1]))
    with torch.enable_grad():
        search.step(images(model), torch.tensor([0, 1]))
    assert search.patches is not None
    with pytest.raises(ValueError, match="tokens=37 must be 17"):
        model(larger)
    search.close()
    model(larger)


def test_patches_need_their_place():
    model = vit(patch_drop_rate=0.5)
    shapes = uvc.read_shapes(model)
    with pytest.raises(ValueError, match="drops patches at random"):
        uvc.apply(model, Plan(shapes, whole_plan(shapes).blocks, (0, 1)))
    assert len(model.blocks) == 4 and not hasattr(model, "uvc_plans")


class Convolutions(nn.Module):
    """A patch embedding of three layers, as T2T-ViT's and the hybrids' are more than one."""

    def __init__(self, img_size, patch_size, in_chans, embed_dim, bias, **kwargs):
        super().__init__()
        self.img_size, self.patch_size, self.grid_size = (
            (img_size,) * 2,
            (patch_size,) * 2,
            (img_size // patch_size,) * 2,
        )
        self.num_patches = self.grid_size[0] ** 2
        self.norm, self.mix = nn.BatchNorm2d(8), nn.Linear(8 * patch_size**2 // 4, embed_dim)
        self.conv, self.unfold = nn.Conv2d(3, 8, 3, 2, 1), nn.Unfold(patch_size // 2, stride=patch_size // 2)

    def forward(self, x):
        return self.mix(self.unfold(self.norm(self.conv(x))).transpose(1, 2))


@torch.no_grad()
def test_another_patch_embedding_is_counted():
    model = vit(embed_layer=Convolutions).train()
    before = copy.deepcopy(model.patch_embed.norm.state_dict())
    shapes = uvc.read_shapes(model)
    assert shapes.embed_macs == 64 * 27 * 8 + 16 * 32 * 32
    assert all(torch.equal(t, before[n]) for n, t in model.patch_embed.norm.state_dict().items())
    model.eval()
    plan = uvc.magnitude_plan(model, 0.5, round_units=4)
    small = sliced(model, plan)
    assert counted(model) == 2 * (uvc.dense_macs(shapes) + uvc.head_macs(model))
    assert counted(small) == 2 * (plan.macs() + uvc.head_macs(small))


# --- plans, files, export --------------------------------------------------------------------------------------------


def test_a_plan_is_plain_data():
    shapes = uvc.read_shapes(vit())
    for plan in (random_plan(shapes, 0, patches=True), extreme_plan(shapes), whole_plan(shapes)):
        again = Plan.from_json(plan.to_json())
        assert again == plan and again.macs() == plan.macs()
        json.loads(plan.to_json())
    assert "block  1  heads 1 of 4, value dimensions 1 of 8, units 1 of 128" in str(extreme_plan(shapes))
    assert "block  0  skipped" in str(extreme_plan(shapes)) and whole_plan(shapes).ratio() == 1


@torch.no_grad()
def test_save_and_load(tmp_path):  # T7
    model = vit()
    plan = random_plan(uvc.read_shapes(model), 2, patches=True)
    small = sliced(model, plan)
    small.reset_classifier(3)
    small.double()
    path = uvc.save(small, tmp_path / "small.safetensors", {"note": "here"})
    assert path.stat().st_size < sum(p.numel() * 8 for p in model.parameters())
    fresh = vit(seed=9)
    header = uvc.load(fresh, path)
    x = images(model)
    assert torch.equal(fresh(x), small(x)) and header["note"] == "here" and fresh.num_classes == 3
    assert fresh.uvc_plans == [plan]
    assert leanvit.load(fresh, path) == header  # into a model of the same shapes
    with pytest.raises(ValueError, match="cut already"):
        uvc.load(fresh, path)
    other = vit(depth=3)
    state = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="for 4 blocks; this model has 3"):
        uvc.load(other, path)
    assert other.state_dict().keys() == state.keys() and len(other.blocks) == 3
    with pytest.raises(ValueError, match="no UVC plan was applied"):
        uvc.save(vit(), path)
    leanvit.save(vit(), tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="holds no model cut by UVC"):
        uvc.load(vit(), tmp_path / "plain.safetensors")


FRESH = """
import sys, torch
from timm.models.vision_transformer import VisionTransformer
from leanvit import uvc
model = VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=4, num_heads=4, num_classes=5).double().eval()
uvc.load(model, sys.argv[1])
x, expected = torch.load(sys.argv[2])
assert torch.equal(model(x), expected)
"""


def test_load_in_a_fresh_process(tmp_path):  # T7
    model = vit()
    small = sliced(model, random_plan(uvc.read_shapes(model), 2))
    x = images(model)
    with torch.no_grad():
        torch.save((x, small(x)), tmp_path / "out.pt")
    path = uvc.save(small, tmp_path / "small.safetensors")
    done = subprocess.run([sys.executable, "-c", FRESH, path, tmp_path / "out.pt"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("patches", [False, True])
def test_torch_export(patches):  # T7
    model = vit(dtype=torch.float32)
    small = sliced(model, random_plan(uvc.read_shapes(model), 2, patches=patches))
    x = images(small)
    program = torch.export.export(small, (x,))
    torch.testing.assert_close(program.module()(x), small(x))
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(small, (x,), dynamic_shapes=({0: batch},))
    more = images(small, 5)
    torch.testing.assert_close(program.module()(more), small(more))


def test_export_makes_its_folder(tmp_path):
    model = vit(dtype=torch.float32)
    small, x = sliced(model, random_plan(uvc.read_shapes(model), 2)), images(model)
    with pytest.raises(ValueError, match="must end in"):
        export(small, tmp_path / "none" / "small.pth", x)
    assert not (tmp_path / "none").exists()
    path = export(small, tmp_path / "new" / "folder" / "small.pt2", x)
    torch.testing.assert_close(torch.export.load(path).module()(x), small(x))


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_onnx(tmp_path):  # T7
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = vit(dtype=torch.float32)
    small = sliced(model, random_plan(uvc.read_shapes(model), 2, patches=True))
    x = images(small)
    torch.onnx.export(small, (x,), tmp_path / "small.onnx", dynamo=True)
    session = runtime.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert (torch.from_numpy(out) - small(x)).abs().max() <= 1e-4


# --- bad input -------------------------------------------------------------------------------------------------------

BAD_PLANS = {
    "it has 1 blocks, its shapes have 4": lambda p: {"blocks": p.blocks[:1]},
    r"heads of block 0 must be ascending numbers of 0\.\.3": lambda p: {
        "blocks": (dataclasses.replace(p.blocks[0], heads=(1, 0), values=p.blocks[0].values[:2]), *p.blocks[1:])
    },
    r"heads of block 0 .* skip it whole": lambda p: {
        "blocks": (dataclasses.replace(p.blocks[0], heads=(), values=()), *p.blocks[1:])
    },
    r"units of block 1 must be ascending numbers of 0\.\.127": lambda p: {
        "blocks": (p.blocks[0], dataclasses.replace(p.blocks[1], units=(128,)), *p.blocks[2:])
    },
    "keeps 4 heads and lists the values of 1": lambda p: {
        "blocks": (dataclasses.replace(p.blocks[0], values=((0,),)), *p.blocks[1:])
    },
    r"values of head 0 of block 0 must be ascending numbers of 0\.\.7": lambda p: {
        "blocks": (dataclasses.replace(p.blocks[0], values=((8,), (0,), (0,), (0,))), *p.blocks[1:])
    },
    r"patches must be ascending numbers of 0\.\.15": lambda p: {"patches": (16,)},
}


@pytest.mark.parametrize("message", BAD_PLANS)
def test_plans_that_contradict_their_shapes(message):
    plan = whole_plan(uvc.read_shapes(vit()))
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(plan, **BAD_PLANS[message](plan))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"method": "uvc", "format": 2}', '{"method": "comcat"}'])
def test_texts_that_are_no_plan(text):
    with pytest.raises(ValueError, match="is no UVC plan of format 1"):
        Plan.from_json(text)


def test_a_plan_for_another_model_changes_nothing():
    plan = random_plan(uvc.read_shapes(vit()), 0)
    named = dataclasses.replace(plan.shapes, architecture="deit_tiny_patch16_224")
    cases = {
        "is for 4 blocks; this model has 3": (vit(depth=3), plan),
        "of width 32; this one has 64": (vit(embed_dim=64), plan),
        "of patches 16; this one has 4": (vit(patch_size=8), plan),
        "of prefix 1; this one has 3": (vit(reg_tokens=2), plan),
        "a block 0 of heads 4; this model's has 2": (vit(num_heads=2), plan),
        "a block 0 of hidden 128; this model's has 64": (vit(mlp_ratio=2.0), plan),
        "of architecture deit_tiny_patch16_224; this one has deit_small": (
            vit(),
            dataclasses.replace(plan, shapes=named),
        ),
    }
    for message, (model, wrong) in cases.items():
        model.pretrained_cfg = {"architecture": "deit_small"}
        state, modules = copy.deepcopy(model.state_dict()), [id(m) for m in model.modules()]
        with pytest.raises(ValueError, match=message):
            uvc.apply(model, wrong)
        assert [id(m) for m in model.modules()] == modules and not hasattr(model, "uvc_plans")
        assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
        with pytest.raises(ValueError, match=message):
            uvc.mask(model, wrong)


def test_what_is_no_plan():
    model = vit()
    for wrong in (comcat.make_plan(model, {"qk": 3}), whole_plan(uvc.read_shapes(model)).to_json(), None):
        for call in (uvc.apply, uvc.mask):
            with pytest.raises(TypeError, match=r"UVC: a leanvit.uvc_plan.Plan is needed, got .* Plan.from_json"):
                call(model, wrong)
    with pytest.raises(TypeError, match=r"a leanvit.comcat_plan.Plan is needed, got leanvit.uvc_plan.Plan"):
        comcat.apply(model, whole_plan(uvc.read_shapes(model)))


def test_models_that_cannot_be_cut():
    lora = vit()
    baselines.lora(lora, 2)
    replaced = vit()
    replaced.blocks[1].mlp.fc1 = nn.Sequential(nn.Linear(32, 4), nn.Linear(4, 128))
    cases = {
        "no flat list of blocks": timm.create_model("swin_tiny_patch4_window7_224", embed_dim=8, depths=(1, 1)),
        "blocks.0 .* has EvaAttention as attn": timm.create_model("vit_betwixt_patch16_rope_reg4_gap_256", depth=1),
        "normalises over all heads or hidden units": vit(scale_attn_norm=True),
        "blocks.0 normalises over all": vit(scale_mlp_norm=True),
        "has SwiGLU as mlp": vit(mlp_layer=timm.layers.SwiGLU),
        "UVC: this model has LoRA already": lora,
        "blocks.1.mlp.fc1 is Sequential": replaced,
    }
    for message, model in cases.items():
        with pytest.raises(ValueError, match=message):
            uvc.read_shapes(model)


# --- R, differentiable -----------------------------------------------------------------------------------------------


def ratio(shapes, s=None, r=None, run=None, dead=None, paper=True):
    depth, most = len(shapes.blocks), shapes.blocks[0].heads
    s = torch.zeros(depth, 2, dtype=torch.float64) if s is None else s
    r = torch.zeros(depth, most, dtype=torch.float64) if r is None else r
    run = torch.ones(depth, dtype=torch.float64) if run is None else run
    if dead is None:
        dead = torch.arange(most)[None] < s[:, :1].ceil()  # the first heads are the weakest
    return flops_ratio(shapes, s, r, dead, run, paper=paper, tokens=shapes.tokens)


SKIPS = {  # specification, 1.6: R in per cent after k whole blocks
    "deit_tiny_patch16_224": "91.86 83.72 75.58 67.44 59.29 51.15 43.01",
    "deit_small_patch16_224": "91.77 83.54 75.31 67.09 58.86 50.63 42.40",
    "deit_base_patch16_224": "91.72 83.44 75.16 66.89 58.61 50.33 42.05",
}


@pytest.mark.parametrize("name", SKIPS)
def test_ratio_after_skips(name):  # T2
    shapes = uvc.read_shapes(timm.create_model(name, device="meta"))
    assert ratio(shapes) == 1
    for k, percent in enumerate(SKIPS[name].split(), 1):
        run = torch.tensor([0.0] * k + [1.0] * (12 - k), dtype=torch.float64)
        assert f"{100 * ratio(shapes, run=run):.2f}" == percent
    none = ratio(shapes, run=torch.zeros(12, dtype=torch.float64))
    assert none == shapes.embed_macs / uvc.dense_macs(shapes)


@pytest.mark.parametrize("paper", [True, False])
def test_ratio_is_monotone_and_bounded(paper):  # T3, T4
    shapes = uvc.read_shapes(vit())
    generator = torch.Generator().manual_seed(0)
    lowest = shapes.embed_macs / uvc.dense_macs(shapes)
    for _ in range(50):
        draw = torch.rand(4, 6, generator=generator, dtype=torch.float64)
        s, r = draw[:, :2] * torch.tensor([3.0, 127.0]), draw[:, 2:] * 7
        run = torch.rand(4, generator=generator, dtype=torch.float64)
        now = ratio(shapes, s, r, run, paper=paper)
        assert lowest <= now <= 1
        for more_s, more_r, more_run in (
            (s + torch.tensor([1.0, 0.0]), r, run),
            (s + torch.tensor([0.0, 1.0]), r, run),
            (s, r + 1, run),
            (s, r, run * 0.9),
        ):
            more_s, more_r = more_s.minimum(torch.tensor([3.0, 127.0])), more_r.clamp(max=7)
            assert ratio(shapes, more_s, more_r, more_run, paper=paper) <= now + 1e-15
    s = torch.tensor([[2.0, 0.0]] * 4, dtype=torch.float64)
    dead_only = torch.tensor([[7.0, 7.0, 0.0, 0.0]] * 4, dtype=torch.float64)
    assert ratio(shapes, s, dead_only, paper=paper) == ratio(shapes, s, paper=paper)


@pytest.mark.parametrize("seed", range(3))
def test_ratio_is_that_of_the_plan(seed):  # T5
    shapes = uvc.read_shapes(vit())
    draw = random.Random(seed)
    s = torch.tensor([[draw.randint(0, 3), draw.randint(0, 127)] for _ in range(4)], dtype=torch.float64)
    r = torch.tensor([[draw.randint(0, 7) for _ in range(4)] for _ in range(4)], dtype=torch.float64)
    run = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    blocks = []
    for i in range(4):
        heads = tuple(range(int(s[i, 0]), 4))
        values = tuple(tuple(range(8 - int(r[i, h]))) for h in heads)
        blocks.append(BlockPlan(heads, values, tuple(range(128 - int(s[i, 1])))) if run[i] else None)
    plan = Plan(shapes, tuple(blocks))
    dense = uvc.dense_macs(shapes)
    assert ratio(shapes, s, r, run, paper=True) == pytest.approx(plan.paper_macs() / dense, rel=1e-12)
    assert ratio(shapes, s, r, run, paper=False) == pytest.approx(plan.ratio(), rel=1e-12)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_small_patch16_224"])
def test_straight_through_derivatives(name):  # T15
    shapes = uvc.read_shapes(timm.create_model(name, device="meta"))
    n, d, h, hidden = 197, shapes.width, shapes.blocks[0].heads, shapes.blocks[0].hidden
    dense = uvc.dense_macs(shapes)
    qkv, product, projection, fc = 3 * n * d * d, n * n * d, n * d * d, n * d * hidden
    for heads, units, dims in ((0.0, 0.0, 0.0), (1.0, 100.0, 3.0), (0.4, 10.7, 5.2)):
        s = torch.tensor([[heads, units]] * 12, dtype=torch.float64, requires_grad=True)
        r = torch.full((12, h), dims, dtype=torch.float64, requires_grad=True)
        run = torch.full((12,), 0.7, dtype=torch.float64, requires_grad=True)
        dead = torch.arange(h)[None] < s.detach()[:, :1].ceil()
        for paper in (True, False):
            g_s, g_r, g_run = torch.autograd.grad(ratio(shapes, s, r, run, dead, paper), (s, r, run))
            row = 0 if paper else n * d
            torch.testing.assert_close(
                g_s[0], torch.tensor([(qkv + 2 * product + projection) / h, 2 * fc / hidden]).double() * -0.7 / dense,
                rtol=1e-6, atol=0,
            )  # fmt: skip
            expected = torch.where(dead[0], 0.0, -0.7 * ((product + projection) / d + row) / dense)
            torch.testing.assert_close(g_r[0], expected.double(), rtol=1e-6, atol=0)
            if heads == units == dims == 0:
                assert g_run[0].item() == pytest.approx(TERMS[name][1] / dense, rel=1e-6)
    if name == "deit_tiny_patch16_224":  # the table of specification 1.6, at run = 1
        whole = torch.autograd.grad(ratio(shapes, s, r, torch.ones(12).double(), dead), (s, r))
        assert f"{whole[0][0, 0]:.3e}" == "-1.169e-02" and f"{whole[0][0, 1]:.2e}" == "-6.03e-05"
        assert f"{whole[1][0, -1]:.2e}" == "-6.11e-05"


# --- speed -----------------------------------------------------------------------------------------------------------


def test_slicing_is_faster_and_masking_is_not():  # T25
    torch.manual_seed(0)
    model = VisionTransformer(img_size=96, patch_size=8, embed_dim=192, depth=3, num_heads=4, num_classes=10).eval()
    plan = uvc.magnitude_plan(model, 0.5)
    masked, small = uvc.mask(model, plan), sliced(model, plan)
    x = images(model, 8)
    with torch.no_grad():
        calls = {"dense": lambda: model(x), "masked": lambda: masked(x), "sliced": lambda: small(x)}
        times = cost.interleaved(calls, rounds=9)
    assert times["sliced"]["ratio_to_first"] > 1.3, times  # 1.9 on an idle machine
    assert times["masked"]["ratio_to_first"] < 1.2, times
    assert embed_macs(small) == embed_macs(model)
