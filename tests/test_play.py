"""The corners to play in draw what the library computes, as a picture and as widgets, without a screen."""

import copy
import importlib.util
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from leanvit import comcat, controls, evaluate, lbp_wht, play, play_bases, play_plan, surgery, uvc
from leanvit.data import load
from leanvit.models import create, transforms


@pytest.fixture(scope="module")
def backbone():
    return create("embedded_vit", checkpoint="embedded", global_pool="avg", fc_norm=False)


@pytest.fixture(scope="module")
def batch(backbone):
    garments = load("fashion_mnist_10k", "test", transform=transforms(backbone, train=False), limit=16)
    return evaluate.fetch(garments, range(6))


@pytest.fixture(scope="module")
def layers(backbone, batch):
    return {layer.site.name: layer for layer in play_bases.capture(backbone, batch)}


@pytest.fixture(scope="module")
def classifier():
    return create("embedded_vit", checkpoint="embedded").eval()


@pytest.fixture(scope="module")
def plans(classifier, batch):
    return play_plan.Plans(classifier, batch)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No front end, no runner, whatever started the tests; and no figure is left behind."""
    for name in ("JPY_SESSION_NAME", "LEANVIT_RESULT"):
        monkeypatch.delenv(name, raising=False)
    yield
    assert plt.get_fignums() == []


def control(widget, label):
    """The control of a widget with this description (or tooltip)."""
    if label in (getattr(widget, "description", None), getattr(widget, "tooltip", None)):
        return widget
    found = (control(child, label) for child in getattr(widget, "children", ()))
    return next((c for c in found if c is not None), None)


def picture(widget):
    """The PNG that a widget shows."""
    images = [c for c in widget.children if type(c).__name__ == "Image"]
    return images[0].value


# ---- widget or picture


def test_widgets_are_for_who_sits_in_front_of_a_kernel(monkeypatch):
    assert not play.is_live()
    monkeypatch.setenv("JPY_SESSION_NAME", "notebooks/1_lbp_wht.ipynb")
    assert play.is_live() and not play.is_live(False)
    monkeypatch.setenv("LEANVIT_RESULT", "outputs/smoke/1_lbp_wht.json")
    assert not play.is_live() and play.is_live(True)


def test_without_ipywidgets_there_is_a_picture(monkeypatch, backbone, batch):
    monkeypatch.setenv("JPY_SESSION_NAME", "a.ipynb")
    monkeypatch.setitem(sys.modules, "ipywidgets", None)  # an import raises
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "ipywidgets" else found(n, *a))
    assert isinstance(play.bases(backbone, batch), plt.Figure)
    with pytest.raises(ImportError, match=r"leanvit\[notebooks\]"):
        play.bases(backbone, batch, live=True)


# ---- bases


def test_the_energy_is_that_of_the_library(backbone, batch, layers):
    model = copy.deepcopy(backbone).eval()
    energy = lbp_wht.gradient_energy(model, lambda: F.cross_entropy(model(batch[0]), batch[1]))
    assert set(layers) == {name for name, e in energy.items() if e.sum() > 0}
    for name, layer in layers.items():
        torch.testing.assert_close(layer.energy(), energy[name], rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("bases", ["DC", "LP_L1-4", [(0, 2), (7, 7), (3, 1)]])
def test_the_numbers_are_those_of_the_layer(layers, bases):
    layer = layers["blocks.2.mlp.fc1"]
    kept, site = lbp_wht.parse_bases(bases), layer.site
    setting = lbp_wht.Setting("x", "tokens", site.grid, site.prefix, tuple(kept), tuple(kept))
    x, weight = layer.x.clone().requires_grad_(), layer.weight.clone().requires_grad_()
    y = lbp_wht.linear(x, weight, None, setting, site.grid)
    g_x, g_w = torch.autograd.grad(y, (x, weight), layer.g)
    exact_x, exact_w = torch.autograd.grad(F.linear(x, weight), (x, weight), layer.g)
    seen = play_bases.rebuild(layer, kept)
    cosines = [F.cosine_similarity(a.flatten(), b.flatten(), dim=0).item() for a, b in ((g_x, exact_x), (g_w, exact_w))]
    assert [seen.cosine_input, seen.cosine_weight] == pytest.approx(cosines, abs=1e-5)
    energy = layer.energy()
    lost = 1 - sum(energy[b] for b in kept) / energy.sum()  # Parseval; the class token stays exact
    tokens = layer.g[:, site.prefix :].double().norm() / layer.g.double().norm()
    assert seen.error == pytest.approx(float(lost.sqrt() * tokens), rel=1e-4)
    assert seen.flops == site.flops(len(kept)) / site.exact_flops()
    assert seen.saved == (1 + len(kept)) / 65


def test_all_functions_rebuild_everything(layers):
    whole = play_bases.rebuild(layers["blocks.0.attn.qkv"], play_bases.EVERY)
    assert whole.error < 1e-5 and min(whole.cosine_input, whole.cosine_weight) > 1 - 1e-5
    assert whole.flops > 1  # and cost more than the exact layer


def test_the_picture_of_bases_shows_what_was_kept(backbone, batch, layers):
    before = copy.deepcopy(backbone.state_dict())
    figure = play.bases(backbone, batch, layer="blocks.1.mlp.fc2", shown=("DC", "LHE-5", "LP_L1-3"))
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert all(p.grad is None for p in backbone.parameters())
    assert "blocks.1.mlp.fc2" in figure.get_suptitle() and len(figure.axes) == 4 * 4
    layer, axes = layers["blocks.1.mlp.fc2"], np.array(figure.axes).reshape(4, 4)
    kept = lbp_wht.low_error(layer.energy(), 5)
    shown = np.ma.filled(axes[0, 2].images[0].get_array(), np.nan)
    assert {tuple(b) for b in np.argwhere(~np.isnan(shown)).tolist()} == set(kept)
    channel = int(layer.g[0, 1:].square().sum(0).argmax())
    rebuilt = play_bases.rebuild(layer, kept).gradient[0, 1:, channel].reshape(8, 8)
    np.testing.assert_allclose(axes[1, 2].images[0].get_array(), rebuilt, rtol=1e-4, atol=1e-9)
    exact, lost = (axes[i, j].images[0].get_array() for i, j in ((1, 0), (2, 2)))
    np.testing.assert_allclose(exact, rebuilt + lost, rtol=1e-4, atol=1e-9)
    assert axes[0, 2].get_title(loc="left") + axes[0, 2].get_title() == "LHE-5: 5 of 64"


def test_a_layer_that_is_none_is_named(backbone, batch):
    with pytest.raises(ValueError, match=r"layer='blocks.9'.*there are blocks\.0\.attn\.qkv"):
        play.bases(backbone, batch, layer="blocks.9")


def test_a_model_without_gradient_is_refused(backbone, batch):
    model = copy.deepcopy(backbone)
    torch.nn.init.zeros_(model.head.weight)
    with pytest.raises(ValueError, match="no layer gets a gradient"):
        play.bases(model, batch)


def test_controls_of_the_bases_redraw_the_picture(backbone, batch, layers):
    corner = play.bases(backbone, batch, layer="blocks.1.mlp.fc1", live=True)

    def shows(layer, title, kept, image=0):
        seen = {title: play_bases.rebuild(layers[layer], sorted(kept))}
        figure = play_bases.draw(layers[layer], seen, batch[0], image, across=True)
        assert picture(corner) == play_bases.png(figure), title

    shows("blocks.1.mlp.fc1", "LP_L1-4", lbp_wht.low_pass_l1(4))
    control(corner, "size").value = 7
    control(corner, "image").value = 3
    shows("blocks.1.mlp.fc1", "LP_L1-7", lbp_wht.low_pass_l1(7), image=3)
    control(corner, "bases").value = "LHE"
    control(corner, "layer").value = "blocks.0.attn.qkv"
    best = lbp_wht.low_error(layers["blocks.0.attn.qkv"].energy(), 7)
    shows("blocks.0.attn.qkv", "LHE-7", best, image=3)
    button = control(corner, "7 changes of sign down, 6 across")
    button.value = not button.value
    shows("blocks.0.attn.qkv", "own choice", {*best} ^ {(7, 6)}, image=3)
    assert control(corner, "bases").value == "own choice"


def test_the_largest_size_follows_the_family_and_one_function_stays(backbone, batch, layers):
    corner = play.bases(backbone, batch, layer="blocks.1.mlp.fc1", shown=("LP_L1-15", "DC"), live=True)
    control(corner, "bases").value = "LP_Linf"
    assert control(corner, "size").value == control(corner, "size").max == 8
    control(corner, "size").value = 1
    mean = control(corner, "0 changes of sign down, 0 across")
    assert mean.value
    mean.value = False
    assert mean.value  # a gradient needs one


# ---- plans


@pytest.mark.parametrize("budget", [0.8, 0.45, 0.2])
def test_pruned_is_the_library_s_plan_carried_out(classifier, plans, batch, budget):
    plan = plans.uvc(budget, by="magnitude")
    assert plan.blocks == uvc.magnitude_plan(classifier, budget).blocks
    for by in ("importance", "magnitude"):
        plan, cut, small = plans.uvc(budget, by=by), plans.pruned(budget, by=by), copy.deepcopy(classifier)
        uvc.apply(small, plan)
        assert cut.flops == pytest.approx(controls.macs(small) / controls.macs(classifier), abs=1e-12)
        assert budget - 0.02 < cut.flops <= budget
        assert cut.parameters == surgery.count(small)[1]
        right = (small(batch[0]).argmax(1) == batch[1]).float().mean()
        assert cut.accuracy == pytest.approx(float(right))
        assert cut.kept["heads"] == [len(b.heads) / 3 for b in plan.blocks]
        assert cut.kept["hidden units"] == [len(b.units) / 384 for b in plan.blocks]


def test_importance_is_what_the_loss_says_of_a_mask(classifier, plans, batch):
    block, rises = classifier.blocks[1], []
    for unit in (int(plans.importance[1].units.argmax()), int(plans.importance[1].units.argmin())):
        mask = torch.ones(384, requires_grad=True)
        hook = block.mlp.fc2.register_forward_pre_hook(lambda m, x, mask=mask: (x[0] * mask, *x[1:]))
        each = []
        for image, label in zip(*batch, strict=True):
            loss = F.cross_entropy(classifier(image[None]), label[None])
            each.append(torch.autograd.grad(loss, mask)[0][unit].square())
        hook.remove()
        rises.append(float(sum(each) / len(each)))
        assert float(plans.importance[1].units[unit]) == pytest.approx(rises[-1], rel=1e-3)
    assert rises[0] > rises[1]


@pytest.mark.parametrize("budget", [0.8, 0.45, 0.1])
def test_factored_is_comcat_s_plan_carried_out(classifier, plans, batch, budget):
    ranks, cut, small = plans.ranks(budget), plans.factored(budget), copy.deepcopy(classifier)
    comcat.apply(small, comcat.make_plan(small, ranks), comcat.calibrate(classifier, [batch[0]]))
    assert cut.flops == pytest.approx(controls.macs(small) / controls.macs(classifier), abs=1e-12)
    assert 0.985 * budget < cut.flops <= budget
    assert cut.parameters == surgery.count(small)[1]
    assert cut.accuracy == pytest.approx(float((small(batch[0]).argmax(1) == batch[1]).float().mean()))
    full = {p.name: p.full for p in comcat.parts(classifier)[0]}
    assert cut.kept["fc1"] == [(ranks[n] or full[n]) / full[n] for n in ranks if n.endswith("fc1")]


def test_below_the_widths_whole_blocks_go(plans):
    few = plans.uvc(0.08)
    assert any(b is None for b in few.blocks) and few.ratio() <= 0.08
    assert np.isnan(plans.pruned(0.08).kept["heads"]).tolist() == [b is None for b in few.blocks]
    with pytest.raises(ValueError, match="cannot be met"):
        plans.uvc(plans.smallest(16) - 0.001)


def test_the_picture_of_plans_has_their_bars(classifier, batch, plans):
    before = copy.deepcopy(classifier.state_dict())
    figure = play.plan(classifier, batch, budgets=(0.6, 0.1))
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())
    assert len(figure.axes) == 3 * 2
    first, last = plans.pruned(0.6), plans.pruned(0.1, by="magnitude")
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights == pytest.approx(first.kept["heads"] + first.kept["hidden units"])
    crosses = [text.get_position()[0] for text in figure.axes[3].texts]
    assert crosses == np.flatnonzero(np.isnan(last.kept["heads"])).tolist() != []
    assert "60 % asked" in figure.axes[0].get_title(loc="left") + figure.axes[0].get_title()


def test_the_budget_s_slider_redraws_the_plans(classifier, batch, plans):
    corner = play.plan(classifier, batch, live=True)
    budget, group = control(corner.children[0], "budget"), control(corner.children[0], "units by")
    assert budget.min == np.ceil(100 * plans.smallest(16)) / 100
    for value, size in ((0.5, 16), (0.3, 64)):
        budget.value, group.value = value, size
        figure = play_plan.draw({f"{value:.0%} asked": plans.cuts(value, size)}, len(batch[1]), across=True)
        assert picture(corner) == play_bases.png(figure), (value, size)
    group.value, budget.value = 1, 0.01
    assert plans.smallest(1) <= budget.value
    group.value = 64  # its smallest plan is larger: the slider goes along
    assert budget.value == budget.min >= plans.smallest(64)
