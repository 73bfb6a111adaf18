"""Methods on top of each other: cut twice in both orders, adapted after a cut, cheap gradients under adapters."""


import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import leanvit
from leanvit import baselines, block_expansion, comcat, cuts, evaluate, kadaptation, lbp_wht, state, surgery, train, uvc
from leanvit.kernels import walsh
from leanvit.uvc import BlockPlan, Plan


def vit(seed=0, dtype=torch.float64):
    """Three blocks of width 32 with four heads, 8 x 8 patches and a class token; nothing is zero, not even biases."""
    torch.manual_seed(seed)
    net = VisionTransformer(img_size=32, patch_size=4, embed_dim=32, depth=3, num_heads=4, num_classes=5)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.05 * torch.randn_like(p)
    return net.to(dtype).eval()


def pixels(net, n=4):
    images = torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    return images.to(next(net.parameters()).dtype), torch.arange(n) % 5


@torch.no_grad()
def rel(a, b):
    return ((a - b).norm() / b.norm()).item()


def some_groups(blocks=3):
    """Two of four heads, all of their value dimensions, half of the units; the second block goes."""
    one = BlockPlan((0, 2), (tuple(range(8)),) * 2, tuple(range(0, 128, 2)))
    other = BlockPlan((1, 2, 3), (tuple(range(8)),) * 3, tuple(range(70)))
    return (one, None, other)[:blocks]


def pruned(net):
    uvc.apply(net, Plan(uvc.read_shapes(net), some_groups()))
    return net


def factored(net, ranks=None):
    """With these ranks a kind, or at full rank."""
    ranks = ranks or {p.name: p.full for p in comcat.parts(net)[0]}
    comcat.apply(net, comcat.make_plan(net, ranks, mode="faithful", bias="absorb"))
    return net


RANKS = {"qk": 5, "vo": 5, "fc1": 12, "fc2": 10}


def only_heads_and_units(net):
    """The same groups cut out of a model factored at some rank: a rank is a value dimension, and all of them stay."""
    shapes = uvc.read_shapes(net)
    wide = shapes.blocks[0].values[0]
    blocks = [b and BlockPlan(b.heads, (tuple(range(wide)),) * len(b.heads), b.units) for b in some_groups()]
    uvc.apply(net, Plan(shapes, tuple(blocks)))
    return net


CUT = {
    "factored": lambda: factored(vit(), RANKS),
    "pruned": lambda: pruned(vit()),
    "factored, pruned": lambda: only_heads_and_units(factored(vit(), RANKS)),
    "pruned, factored": lambda: factored(pruned(vit()), RANKS),
}
TWICE = ("factored, pruned", "pruned, factored")


# --- both orders -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def absorbed(net):
    """The values' bias of each head as a constant in the output bias, where factoring puts it."""
    for attn in (block.attn for block in net.blocks):
        values = attn.qkv.bias[-attn.proj.in_features :]
        attn.proj.bias += attn.proj.weight @ values
        values.zero_()
    return net


def masked(net, x):
    return uvc.mask(net, Plan(uvc.read_shapes(net), some_groups()))(x)


def test_both_orders_are_the_masked_model_at_full_rank():
    net, x = vit(), pixels(vit())[0]
    assert rel(absorbed(vit())(x), net(x)) < 1e-12
    assert rel(factored(pruned(vit()))(x), masked(net, x)) < 1e-10
    assert rel(only_heads_and_units(factored(vit()))(x), masked(absorbed(vit()), x)) < 1e-10
    assert rel(masked(absorbed(vit()), x), masked(net, x)) > 1e-3  # a head that goes takes its constant with it, or not
    assert rel(net(x), masked(net, x)) > 1e-2
    assert rel(factored(pruned(absorbed(vit())))(x), only_heads_and_units(factored(absorbed(vit())))(x)) < 1e-10


def test_the_orders_differ_below_full_rank_and_cost_the_same():
    """The first sees all heads and units, the second what is left: other factors, the same shapes."""
    one, other = (CUT[name]() for name in TWICE)
    x = pixels(one)[0]
    assert {n: t.shape for n, t in one.state_dict().items()} == {n: t.shape for n, t in other.state_dict().items()}
    assert 1e-4 < rel(one(x), other(x)) < 1


@pytest.mark.parametrize("name", TWICE)
def test_one_file_of_a_model_cut_twice_and_trained(name, tmp_path):
    net = CUT[name]().float()
    x, y = pixels(net)
    train.fit(net, torch.utils.data.TensorDataset(x, y), train.Recipe(batch_size=4, lr=1e-2, steps=3), progress=False)
    file = leanvit.save(net, tmp_path / "both.safetensors", header={"note": "kept"})
    assert file.stat().st_size < 4 * surgery.count(net)[1] + 24_000  # the weights, and the plans in the header
    fresh = vit(seed=1, dtype=torch.float32)
    assert leanvit.load(fresh, file)["note"] == "kept"
    assert torch.equal(fresh.eval()(x), net.eval()(x)) and cuts.history(fresh) == cuts.history(net)
    order = [{"factored": "comcat", "pruned": "uvc"}[word] for word in name.split(", ")]
    assert [method for method, _ in cuts.history(fresh)] == order


# --- adapting what was cut -------------------------------------------------------------------------------------------


def adapted_layer(net):
    """The last adapted output layer of an attention, by name."""
    return [n for n, m in net.named_modules() if isinstance(m, baselines.LoRA) and n.endswith("attn.proj")][-1]


@pytest.mark.parametrize("name", CUT)
def test_lora_on_a_cut_model_learns_by_its_own_formula(name):
    """y = W x + s B A x: g_B = s (g^T x A^T), g_A = s (B^T g^T x); nothing else but the head gets a gradient."""
    net = CUT[name]()
    x, y = pixels(net)
    before = net(x)
    baselines.lora(net, 3, match=baselines.attention_projections)
    assert torch.equal(net(x), before)  # B starts at zero
    with torch.no_grad():
        for n, p in net.named_parameters():
            _ = p.normal_(std=0.1) if "lora_" in n else None
    layer, seen = net.get_submodule(adapted_layer(net)), {}
    factors = [p for n, p in layer.named_parameters() if "lora_" in n]
    a, b = sorted(factors, key=lambda p: p.shape[0])  # (r, in), (out, r)
    units = torch.eye(layer.base.in_features, dtype=torch.float64)
    assert rel(layer(units) - layer.base(units), (b @ a).T) < 1e-10  # alpha is the rank: s = 1
    layer.register_forward_hook(lambda m, i, o: seen.update(x=i[0].detach().flatten(0, 1)))
    layer.register_full_backward_hook(lambda m, i, o: seen.update(g=o[0].flatten(0, 1)))
    F.cross_entropy(net(x), y).backward()
    assert rel(b.grad, seen["g"].T @ seen["x"] @ a.T) < 1e-9
    assert rel(a.grad, b.T @ seen["g"].T @ seen["x"]) < 1e-9
    head = surgery.head_parameters(net)
    assert {n for n, p in net.named_parameters() if p.grad is not None} == {
        n for n, _ in net.named_parameters() if "lora_" in n or n in head
    }
    adapted = net(x)
    baselines.merge(net)
    assert rel(net(x), adapted) < 1e-10 and rel(adapted, before) > 1e-4


@pytest.mark.parametrize("name", CUT)
def test_lora_on_a_cut_model_is_saved_and_loaded(name, tmp_path):
    net = CUT[name]()
    baselines.lora(net, 3)
    with torch.no_grad():
        for p in net.parameters():
            _ = p.normal_(std=0.1) if p.requires_grad else None
    file = leanvit.save(net, tmp_path / "lora.safetensors", names=state.changed_names(net))
    again = CUT[name]()
    baselines.lora(again, 3)
    leanvit.load(again, file)
    x = pixels(net)[0]
    assert torch.equal(again(x), net(x))


@pytest.mark.parametrize("name", CUT)
def test_cheap_gradients_of_a_cut_model(name):
    """All bases: the exact gradients. A few: g_W = (T g)^T (T x), by hand at the first layer; outputs stay."""
    exact, every, few = CUT[name](), CUT[name](), CUT[name]()
    (x, y), gradients = pixels(exact), {}
    wanted = {"match": lambda n, m: "mlp" in n or n.endswith("proj"), "exact_when": "never"}  # also the narrow ones
    lbp_wht.attach(every, "LP_Linf-8", **wanted)
    report, seen = lbp_wht.attach(few, "LP_L1-2", **wanted), {}
    assert len(report.matched) == sum("mlp" in n or n.endswith("proj") for n, _ in surgery.linears(few))
    layer = report.matched[0]  # behind the last attention the class token alone has a gradient, and that is exact
    few.get_submodule(layer).register_forward_hook(lambda m, i, o: seen.update(x=i[0].detach()))
    few.get_submodule(layer).register_full_backward_hook(lambda m, i, o: seen.update(g=o[0]))
    outputs = {}
    for key, net in {"exact": exact, "every": every, "few": few}.items():
        net.train()
        outputs[key] = net(x)
        F.cross_entropy(outputs[key], y).backward()
        gradients[key] = {n: p.grad for n, p in net.named_parameters()}
    assert torch.equal(outputs["exact"], outputs["every"]) and torch.equal(outputs["exact"], outputs["few"])
    assert all(rel(gradients["every"][n], g) < 1e-9 for n, g in gradients["exact"].items() if g.norm() > 1e-12)
    flat = [sequency for pair in lbp_wht.low_pass_l1(2) for sequency in pair]
    t_x, t_g = (walsh.project(seen[k], 8, 8, 1, flat, 8, False) for k in "xg")
    by_hand = t_g.flatten(0, 1).T @ t_x.flatten(0, 1)
    assert rel(gradients["few"][f"{layer}.weight"], by_hand) < 1e-9
    assert rel(by_hand, gradients["exact"][f"{layer}.weight"]) > 1e-4


# --- cheap gradients under adapters ----------------------------------------------------------------------------------

UNDER = {
    "LoRA": lambda net: baselines.lora(net, 3, match=baselines.attention_projections),
    "KAdaptation": lambda net: kadaptation.attach(net, 8, seed=0),
    "block expansion": lambda net: block_expansion.attach(net, positions=[1]),
}


@pytest.mark.parametrize("name", UNDER)
def test_cheap_gradients_under_an_adapter(name):
    """Frozen weights stay frozen and save nothing, all bases are exact, few bases are not, the outputs never change."""
    nets = {}
    for bases in (None, "LP_Linf-8", "LP_L1-2"):
        net = vit()
        UNDER[name](net)
        torch.manual_seed(3)
        with torch.no_grad():
            for p in [p for p in net.parameters() if p.requires_grad]:
                p += 0.05 * torch.randn_like(p)
        trained = {n for n, p in net.named_parameters() if p.requires_grad}
        if bases:
            assert lbp_wht.attach(net, bases, scope=None, exact_when="never").matched
            assert trained == {n for n, p in net.named_parameters() if p.requires_grad}
        x, y = pixels(net)
        out = net.train()(x)
        F.cross_entropy(out, y).backward()
        assert trained == {n for n, p in net.named_parameters() if p.grad is not None}
        nets[bases] = out, {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    (out, exact), (same, every), (again, few) = nets.values()
    assert torch.equal(out, same) and torch.equal(out, again)
    live = [n for n, g in exact.items() if g.norm() > 1e-10]
    assert live and all(rel(every[n], exact[n]) < 1e-8 for n in live)
    assert max(rel(few[n], exact[n]) for n in live) > 1e-3


@pytest.mark.parametrize("name", ["LoRA", "KAdaptation"])
def test_what_is_detached_and_merged_has_the_same_outputs(name):
    net = vit()
    UNDER[name](net)
    lbp_wht.attach(net, "LP_L1-2", exact_when="never")
    with torch.no_grad():
        for p in [p for p in net.parameters() if p.requires_grad]:
            p += 0.05 * torch.randn_like(p)
    x = pixels(net)[0]
    adapted = net.eval()(x)
    lbp_wht.detach(net)
    assert torch.equal(net(x), adapted)
    (baselines if name == "LoRA" else kadaptation).merge(net)
    assert rel(net(x), adapted) < 1e-10
    assert {type(m) for m in net.modules() if isinstance(m, nn.Linear)} == {nn.Linear}


def test_a_cut_and_adapted_model_is_evaluated_as_any_other():
    net = CUT["pruned, factored"]().float()
    x, y = pixels(net)
    images = torch.utils.data.TensorDataset(x, y)
    net.reset_classifier(5)
    baselines.full(net)
    before = F.cross_entropy(net(x), y).item()
    train.fit(net, images, train.Recipe(batch_size=4, lr=3e-3, steps=30), progress=False)
    assert F.cross_entropy(net.eval()(x), y).item() < before / 2 and evaluate.accuracy(net, images) == 1
