"""Models that ComCAT has factored are cut by UVC: outputs, counts, searches, files, export."""

import copy

import pytest
import torch
from test_comcat import rel
from test_uvc import counted, images, random_plan, sliced, vit

import leanvit
from leanvit import comcat, controls, uvc
from leanvit.comcat_modules import FactoredAttention
from leanvit.export import export
from leanvit.uvc import BlockPlan, Plan, SlicedAttention
from leanvit.uvc_math import dead_heads, flops_ratio, group_norms
from leanvit.uvc_plan import block_macs, whole_plan


def factored(ranks=None, model=None, bias="absorb"):
    """A small model with these ranks in the corrected form of the biases, or the authors'."""
    model = copy.deepcopy(model or vit())
    ranks = ranks or {"qk": 5, "vo": 5, "fc1": 11, "fc2": 9}
    comcat.apply(model, comcat.make_plan(model, ranks, mode="faithful", bias=bias))
    return model


def even_plan(shapes):
    """Heads, the same number of value dimensions in all heads of a block, units; the third block goes."""
    values = shapes.blocks[0].values[0]
    blocks = [
        BlockPlan((0, 1, 2, 3), ((0, 2, 4), (0, 1, 2), (1, 2, 3), (0, 3, 4)), tuple(range(0, 128, 2))),
        BlockPlan((1, 3), (tuple(range(values)),) * 2, tuple(range(40))),
        None,
        BlockPlan((2,), ((1, 2),), tuple(range(128))),
    ]
    return Plan(shapes, tuple(blocks))


@pytest.mark.parametrize("bias", ["absorb", "none", "zero"])
def test_sliced_factors_are_masked_factors(bias):
    model = factored(bias=bias)
    x = images(model)
    plan = even_plan(uvc.read_shapes(model))
    small = sliced(model, plan)
    assert [type(b.attn) for b in small.blocks] == [FactoredAttention] * 3
    assert [(b.attn.num_heads, b.attn.value_dim) for b in small.blocks] == [(4, 3), (2, 5), (1, 2)]
    assert small.blocks[0].mlp.fc1.second.out_features == small.blocks[0].mlp.fc2.first.in_features == 64
    assert rel(small(x), uvc.mask(model, plan)(x)) < 1e-10
    assert rel(small(x), model(x)) > 1e-3


@pytest.mark.parametrize("seed", range(4))
def test_any_plan_at_all(seed):
    model = factored({"qk": 3, "vo": 6, "fc1": 7})  # fc2 stays dense
    plan = random_plan(uvc.read_shapes(model), seed, patches=True)
    small, x = sliced(model, plan), images(model)
    assert rel(small(x), uvc.mask(model, plan)(x)) < 1e-10
    again = uvc.read_shapes(small)
    assert uvc.dense_macs(again) == plan.macs()


def test_macs_are_counted_on_the_factors():
    """Equal widths of keys and values need no padding, so torch counts exactly the formula's multiply-adds."""
    model = factored()
    shapes = uvc.read_shapes(model)
    n, d, h, r, units = 17, 32, 4, 5, 128
    block = n * (d * 3 * h * r + h * r * d) + 2 * n * n * h * r + n * (11 + 9) * (d + units)
    assert [block_macs(b, d, n) for b in shapes.blocks] == [block] * 4
    assert counted(model) == 2 * (uvc.dense_macs(shapes) + uvc.head_macs(model))
    blocks = [BlockPlan((0, 2), (tuple(range(r)),) * 2, tuple(range(50))), None, *whole_plan(shapes).blocks[2:]]
    plan = Plan(shapes, tuple(blocks))
    assert counted(sliced(model, plan)) == 2 * (plan.macs() + uvc.head_macs(model))
    assert plan.ratio() < 0.8


@pytest.mark.parametrize("ranks", [{"qk": 1}, {"vo": 2}, {"qk": 2, "vo": 6}, {"qk": 5, "vo": 5}])
def test_macs_are_torchs_where_heads_are_padded(ranks):
    """Narrower queries, keys or values are padded before the fused product; what is cut unevenly is not."""
    model = factored(ranks)
    shapes = uvc.read_shapes(model)
    assert counted(model) == 2 * (uvc.dense_macs(shapes) + uvc.head_macs(model))
    for seed in range(4):
        plan = random_plan(shapes, seed)
        assert counted(sliced(model, plan)) == 2 * (plan.macs() + uvc.head_macs(model))
    width = shapes.blocks[0].values[0]
    narrow = BlockPlan((0, 2), ((0,),) * 2, tuple(range(50)))
    heads = BlockPlan((1, 3), (tuple(range(width)),) * 2, tuple(range(50)))
    plan = Plan(shapes, (narrow, heads, *whole_plan(shapes).blocks[2:]))
    small = sliced(model, plan)
    assert counted(small) == 2 * (plan.macs() + uvc.head_macs(small))
    assert uvc.dense_macs(uvc.read_shapes(small)) == plan.macs()


@pytest.mark.parametrize("dims", [None, 2])
def test_the_budget_is_met_where_heads_are_padded(dims):
    model = factored({"qk": 1, "vo": 8}, vit(img_size=64, patch_size=8))
    plan = uvc.magnitude_plan(model, 0.5, round_dims=dims)
    small = sliced(model, plan)
    assert 0.48 < plan.ratio() <= 0.5 and plan.ratio() == pytest.approx(plan.origin["predicted_ratio"])
    assert controls.macs(small) == plan.macs() <= 0.5 * controls.macs(model)


@pytest.mark.parametrize("dims", [False, True])
def test_a_padded_model_is_searched(dims):
    model = factored({"qk": 2, "vo": 6}, vit(dtype=torch.float32))
    data = [(images(model, 8, seed=s), torch.arange(8) % 5) for s in range(4)]
    dense = controls.macs(model)
    plan = uvc.search(model, data, 0.6, steps=12, settings=uvc.Settings(dims=dims, round_units=4, round_dims=2))
    uvc.apply(model, plan)
    assert 0.5 < controls.macs(model) / dense <= 0.6 and controls.macs(model) == plan.macs()


def test_plans_of_before_the_padding_was_counted():
    """They and plans of stock models have no word of it; they fit as they did."""
    shapes = uvc.read_shapes(vit())
    assert "padded" not in whole_plan(shapes).to_json()
    model = factored({"qk": 3, "vo": 6})
    plan = even_plan(uvc.read_shapes(model))
    text = plan.to_json()
    assert Plan.from_json(text) == plan
    old = text.replace(', "padded": true', "")
    assert old != text and Plan.from_json(old).macs() < plan.macs()
    x = images(model)
    assert torch.equal(sliced(model, Plan.from_json(old))(x), sliced(model, plan)(x))


@pytest.mark.parametrize("paper", [False, True])
def test_ratio_of_padded_heads(paper):
    model = factored({"qk": 3, "vo": 6})
    shapes = uvc.read_shapes(model)
    zero, none = torch.zeros(4, 2).double(), torch.zeros(4, 4).double()
    dead = torch.zeros(4, 4, dtype=torch.bool)
    told = dict(dead=dead, run=torch.ones(4), paper=paper, tokens=shapes.tokens)
    assert flops_ratio(shapes, zero, none, **told).item() == pytest.approx(1, rel=1e-12)
    blocks = [BlockPlan(b.heads, ((0, 1),) * 4, b.units) for b in whole_plan(shapes).blocks]
    plan = Plan(shapes, tuple(blocks))
    macs = plan.paper_macs() if paper else plan.macs()
    assert flops_ratio(shapes, zero, none + 4, **told).item() == pytest.approx(macs / uvc.dense_macs(shapes), rel=1e-12)


def test_ratio_of_factors_is_that_of_the_plan():
    model = factored({"qk": 3, "vo": 6, "fc1": 7, "fc2": 8})
    shapes = uvc.read_shapes(model)
    norms = group_norms(model, shapes)
    s, r = torch.tensor([[1.0, 30], [0, 0], [3, 127], [2, 64]]).double(), torch.zeros(4, 4).double()
    dead = dead_heads(norms, s[:, 0])
    ratio = flops_ratio(shapes, s, r, dead, torch.ones(4), paper=False, tokens=shapes.tokens)
    blocks = []
    for i, shape in enumerate(shapes.blocks):
        heads = tuple(h for h in range(4) if not dead[i, h])
        blocks.append(BlockPlan(heads, (tuple(range(6)),) * len(heads), tuple(range(int(shape.hidden - s[i, 1])))))
    assert ratio.item() == pytest.approx(Plan(shapes, tuple(blocks)).ratio(), rel=1e-12)


def test_units_are_ranked_by_the_product_of_their_factors():
    model = factored({"fc2": 32, "fc1": 32})  # full rank: the product is the dense weight
    ours, dense = (group_norms(m, uvc.read_shapes(m)) for m in (model, vit()))
    for a, b in zip(ours, dense, strict=True):
        torch.testing.assert_close(a.units, b.units, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("control", ["magnitude", "random"])
def test_controls_meet_their_budget_on_factors(control):
    model = factored()
    plan = uvc.magnitude_plan(model, 0.6) if control == "magnitude" else uvc.random_plan(model, 0.6, 3)
    small = sliced(model, plan)
    assert 0.5 < plan.ratio() <= 0.6
    assert counted(small) / 2 - uvc.head_macs(small) == plan.macs()


@pytest.mark.parametrize("mode", ["corrected", "faithful"])
def test_a_factored_model_is_searched(mode):
    model = factored(model=vit(dtype=torch.float32))
    data = [(images(model, 8, seed=s), torch.arange(8) % 5) for s in range(4)]
    if mode == "corrected":
        plan = uvc.search(model, data, 0.6, steps=12)
        assert 0.5 < plan.ratio() <= 0.6
    else:
        plan = uvc.search(model, data, mode="faithful", settings=uvc.Flags(num_epochs=2, warmup_epochs=0,
                                                                           zlr_schedule_list="1"))  # fmt: skip
    small = sliced(model, plan)
    assert rel(small(images(model)), uvc.mask(model, plan)(images(model))) < 1e-4


def test_an_uneven_plan_takes_sliced_attention():
    model = factored()
    shapes = uvc.read_shapes(model)
    uneven = BlockPlan((0, 3), ((0, 1), (2,)), (5,))
    small = sliced(model, Plan(shapes, (uneven, *whole_plan(shapes).blocks[1:])))
    assert type(small.blocks[0].attn) is SlicedAttention
    with torch.no_grad():
        assert torch.isfinite(small(images(model))).all()


def test_files_and_export(tmp_path):
    model = factored()
    plan = even_plan(uvc.read_shapes(model))
    small, x = sliced(model, plan), images(model)
    for save, load in ((uvc.save, uvc.load), (leanvit.save, leanvit.load)):
        path = save(small, tmp_path / f"{save.__module__}.safetensors")
        back = vit(seed=9)
        load(back, path)
        assert torch.equal(back(x), small(x))
    export(small.float(), tmp_path / "small.pt2", x.float())
    out = torch.export.load(tmp_path / "small.pt2").module()(x.float())
    torch.testing.assert_close(out, small(x.float()), rtol=1e-4, atol=1e-5)


def test_factored_after_cut_and_cut_again(tmp_path):
    """Cut, factored, cut again: one file holds the three."""
    model = vit()
    uvc.apply(model, uvc.magnitude_plan(model, 0.7))
    comcat.apply(model, comcat.make_plan(model, {"qk": 3, "vo": 3, "fc1": 6}, mode="faithful", bias="absorb"))
    shapes = uvc.read_shapes(model)
    uvc.apply(model, uvc.magnitude_plan(model, 0.8))
    assert uvc.dense_macs(uvc.read_shapes(model)) <= 0.8 * uvc.dense_macs(shapes)
    path, back = leanvit.save(model, tmp_path / "three.safetensors"), vit(seed=4)
    leanvit.load(back, path)
    assert torch.equal(back(images(model)), model(images(model)))


def test_a_plan_for_other_ranks_is_refused():
    plan = even_plan(uvc.read_shapes(factored()))
    with pytest.raises(ValueError, match="mlp_ranks"):
        uvc.apply(factored({"qk": 5, "vo": 5, "fc1": 10, "fc2": 9}), plan)
