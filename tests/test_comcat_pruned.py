"""Models that UVC has cut are factored by ComCAT: outputs, counts, searches and files."""

import copy

import pytest
import torch
from test_comcat import rel
from test_uvc import images, sliced, stock_plan, vit

import leanvit
from leanvit import comcat, comcat_ranks, cuts, state, surgery, uvc
from leanvit.comcat_modules import FactoredAttention, FactoredLinear
from leanvit.uvc import BlockPlan, Plan, SlicedAttention


def even_plan(shapes, patches=None):
    """Heads, as many value dimensions of each head in a block, units, patches; the third block goes."""
    blocks = [
        BlockPlan((0, 1, 2, 3), ((0, 1, 4, 5, 7),) * 4, tuple(range(0, 128, 2))),
        BlockPlan((1, 3), ((0, 2, 3), (1, 6, 7)), tuple(range(40))),
        None,
        BlockPlan((2,), (tuple(range(8)),), tuple(range(128))),
    ]
    return Plan(shapes, tuple(blocks), patches)


def factored(model, ranks, statistics=None):
    """A copy with these ranks, none of them dropped for saving nothing."""
    model = copy.deepcopy(model)
    comcat.apply(model, comcat.make_plan(model, ranks, mode="faithful", bias="absorb"), statistics)
    return model


def full_ranks(model):
    return {part.name: part.full for part in comcat.parts(model)[0]}


@pytest.mark.parametrize("patches", [None, (0, 3, 4, 9, 15)])
def test_sliced_models_are_factored_exactly_at_full_rank(patches):
    model = vit()
    small = sliced(model, even_plan(uvc.read_shapes(model), patches))
    found, skipped = comcat.parts(small)
    assert not skipped and [p.full for p in found if p.kind == "vo"] == [5, 3, 8]
    assert [p.heads for p in found if p.kind == "qk"] == [4, 2, 1]
    dense = {n: p.numel() for n, p in small.named_parameters() if p.dim() == 2 and "blocks" in n or n == "head.weight"}
    assert sum(p.dense for p in found) == sum(dense.values())
    whole, x = factored(small, full_ranks(small)), images(small)
    assert all(type(b.attn) is FactoredAttention and type(b.mlp.fc1) is FactoredLinear for b in whole.blocks)
    assert rel(whole(x), small(x)) < 1e-10


@pytest.mark.parametrize("seed", [0, 3, 8])
def test_stock_attentions_with_fewer_heads_are_factored(seed):
    model = vit()
    small = sliced(model, stock_plan(uvc.read_shapes(model), seed))
    x = images(small)
    assert rel(factored(small, full_ranks(small))(x), small(x)) < 1e-10


@pytest.mark.parametrize("statistics", [False, True])
def test_sliced_and_factored_is_masked_and_factored(statistics):
    """The factors see neither what was masked nor what was cut: both models are the same at every rank."""
    model = vit()
    plan = even_plan(uvc.read_shapes(model))
    small, masked = sliced(model, plan), uvc.mask(model, plan)
    kept = uvc.kept_blocks(small)
    ranks = {"qk": 3, "vo": 2, "mlp.fc1": 9, "mlp.fc2": 7}
    mine, theirs = {}, {}
    for new, old in enumerate(kept):
        for part, rank in ranks.items():
            name = part if "mlp" in part else f"attn.{part}"
            mine[f"blocks.{new}.{name}"] = theirs[f"blocks.{old}.{name}"] = rank
    batches, x = [images(model, 64, seed=4)], images(model)
    seen = [comcat.calibrate(m, batches, ridge=0) if statistics else None for m in (small, masked)]
    a, b = factored(small, mine, seen[0])(x), factored(masked, theirs, seen[1])(x)
    assert rel(a, b) < (1e-6 if statistics else 1e-10)
    assert rel(a, small(x)) > 1e-3  # something was lost on the way


def test_heads_of_many_widths_stay_and_the_rest_is_factored():
    model = vit()
    blocks = (BlockPlan((0, 2), ((0, 1, 2), (4,)), (1, 2, 3)), *[None] * 3)
    small = sliced(model, Plan(uvc.read_shapes(model), blocks))
    assert type(small.blocks[0].attn) is SlicedAttention
    found, skipped = comcat.parts(small)
    assert [p.name for p in found] == ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "head"]
    assert all("each head is of its own value width" in why for why in skipped.values()) and len(skipped) == 2
    with pytest.raises(ValueError, match=r"blocks.0.attn.vo cannot be factored: each head is of its own value width"):
        comcat.make_plan(small, {"blocks.0.attn.vo": 1})
    with pytest.raises(ValueError, match=r"no block's vo can be factored: each head is of its own value width"):
        comcat.make_plan(small, {"vo": 1})
    report = comcat.apply(small, comcat.make_plan(small, {"fc1": 2, "head": 2}))
    assert report.matched == ["blocks.0.mlp.fc1", "head"] and "own value width" in str(report)
    assert comcat_ranks.attention_macs(small, 17) == 17**2 * (2 * 8 + 4)


def test_greedy_search_and_refit_of_a_sliced_model():
    model = vit()
    small = sliced(model, even_plan(uvc.read_shapes(model)))
    batches = [(images(model, 32, seed=s), torch.arange(32) % 5) for s in (2, 3)]
    budget = comcat.authors_budget(small, 0.4)
    found, original = comcat.parts(small)[0], copy.deepcopy(small)
    plans = [comcat.greedy(small, budget), comcat.search(small, batches, budget, epochs=2)]
    for plan in plans:
        assert comcat.total_weights(found, plan.ranks) <= budget
        again = copy.deepcopy(small)
        assert comcat.apply(again, plan).total < surgery.count(small)[1]
        seen = torch.cat([x for x, _ in batches])
        before = rel(again(seen), original(seen))
        comcat.refit(again, original, batches)
        assert rel(again(seen), original(seen)) < before


# --- files -----------------------------------------------------------------------------------------------------------


def test_one_file_of_a_factored_model(tmp_path):
    """`leanvit.save` stores all of it, frozen tensors too, and a stock model of other classes becomes it."""
    small = factored(vit(), {"qk": 3, "vo": 6, "fc1": 9, "head": 2}).requires_grad_(False)
    small.head.requires_grad_(True)
    path = leanvit.save(small, tmp_path / "a.safetensors", header={"note": "mine"})
    again, x = vit(seed=7, num_classes=3), images(small)
    header = leanvit.load(again, path)
    assert header["note"] == "mine" and header["cuts"] == cuts.history(small) == cuts.history(again)
    assert torch.equal(again(x), small(x)) and again.num_classes == 5
    with torch.no_grad():
        again.norm.weight.zero_()
    leanvit.load(again, path)  # cut already by the same plan: the tensors alone
    assert torch.equal(again(x), small(x))
    part = leanvit.save(small, tmp_path / "head.safetensors", names=["head.second.bias"])
    assert part.stat().st_size < path.stat().st_size / 5


def test_files_that_do_not_fit(tmp_path):
    small, x = factored(vit(), {"qk": 3}), images(vit())
    path = leanvit.save(small, tmp_path / "a.safetensors")
    other = factored(vit(), {"qk": 4})
    before = other(x)
    with pytest.raises(ValueError, match="cut by comcat with other plans than the model of"):
        leanvit.load(other, path)
    wider = vit(embed_dim=64)
    with pytest.raises(ValueError, match="the plan is for VisionTransformer"):
        leanvit.load(wider, path)
    assert torch.equal(other(x), before) and not hasattr(wider, "comcat_plan")
    cuts.record(small, "saw", "{}")
    with pytest.raises(ValueError, match="was cut by 'saw', which is none of comcat, uvc"):
        leanvit.load(vit(), leanvit.save(small, tmp_path / "b.safetensors"))
    plain = leanvit.save(vit(), tmp_path / "plain.safetensors")
    assert "cuts" not in state.read_header(plain)
    leanvit.load(vit(seed=3), plain)
    with pytest.raises(ValueError, match="cut by comcat with other plans"):
        leanvit.load(other, plain)
    with pytest.raises(ValueError, match="holds no model factored by ComCAT"):
        comcat.load(vit(), plain)
