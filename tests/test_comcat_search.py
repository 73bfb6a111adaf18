"""ComCAT's search and the schedules of Adaptive-ComCAT; property tests T18 to T30 of the specification."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from test_comcat import cut, images, rel, vit
from torch import nn

from leanvit import comcat, comcat_calibrate, comcat_ranks, lora, surgery
from leanvit.comcat import apply, parts
from leanvit.comcat_cut import product
from leanvit.comcat_factors import Spectrum
from leanvit.comcat_mixture import Mixture, truncations
from leanvit.comcat_ranks import candidates, total_weights
from leanvit.comcat_recut import current_ranks
from leanvit.comcat_schedule import Schedule, penalised, temperature
from leanvit.comcat_search import RankSearch, search
from leanvit.comcat_supernet import Supernet, coverage, swapped


def batches(n=3, size=8, classes=7):
    generator = torch.Generator().manual_seed(2)
    return [(images(size, seed=3 + i), torch.randint(classes, (size,), generator=generator)) for i in range(n)]


def budget(model, reduction=0.5):
    return comcat_ranks.authors_budget(model, reduction)


def supernet(model, ranks, weights, statistics=None):
    """The modules of the super-network with the masks of the candidates' weights, and the spectra behind them."""
    found, _ = parts(model)
    spectra = {}
    for part in found:
        weighting = (None, None) if statistics is None else statistics.weighting(part.name)
        spectra[part.name] = Spectrum(*product(model, part, True), *weighting)
    full = {p.name: p.full for p in found}
    plan = comcat.make_plan(model, full, mode="faithful", bias="absorb")
    net = Supernet(model, found, spectra, plan, statistics)
    net.masks = {p.name: coverage(ranks[p.name], p.full).to(weights[p.name]) @ weights[p.name] for p in found}
    return net, spectra


def mixture(model, ranks, weights, spectra):
    """The model with the authors' mixture of dense products in every part."""
    net = Mixture(model, parts(model)[0], spectra, ranks)
    net.weigh(weights)
    model = copy.deepcopy(model)
    for name, module in net.modules.items():
        surgery.replace(model, name, module)
    return model.requires_grad_(False)


def drawn(model, ranks, dtype):
    """Logits with gradients and the soft weights they give."""
    generator = torch.Generator().manual_seed(5)
    alphas = {p.name: torch.randn(len(ranks[p.name]), generator=generator, dtype=dtype) for p in parts(model)[0]}
    alphas = {n: a.requires_grad_() for n, a in alphas.items()}
    return alphas, {n: a.softmax(0) for n, a in alphas.items()}


# --- the super-network -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, forward, gradient", [(torch.float32, 1e-4, 1e-3), (torch.float64, 1e-10, 1e-8)])
def test_mask_equals_the_mixture(dtype, forward, gradient):  # T18
    model, x = vit(dtype), images(dtype=dtype)
    ranks = {p.name: candidates(p) for p in parts(model)[0]}
    alphas, weights = drawn(model, ranks, dtype)
    net, spectra = supernet(model, ranks, weights)
    for name, spectrum in spectra.items():  # the matrices themselves
        mixed = torch.einsum("a,a...->...", weights[name], truncations(spectrum, ranks[name]))
        c = net.masks[name]
        masked = (spectrum.u * (spectrum.s * c)[..., None, :]) @ spectrum.v.mT
        assert rel(masked, mixed) <= (1e-5 if dtype is torch.float32 else 1e-12)
    labels = torch.arange(4)
    with swapped(model, net.modules):
        mine = model(x)
        F.cross_entropy(mine, labels).backward()
    got = {n: a.grad.clone() for n, a in alphas.items()}
    for a in alphas.values():
        a.grad = None
    _, weights = alphas, {n: a.softmax(0) for n, a in alphas.items()}
    theirs = mixture(model, ranks, weights, spectra)(x)
    F.cross_entropy(theirs, labels).backward()
    assert rel(mine, theirs) <= forward
    both = torch.cat([got[n] for n in got]), torch.cat([alphas[n].grad for n in got])
    assert rel(*both) <= gradient and both[1].norm() > 0
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("which", [0, 2, -1])
def test_one_hot_weights_are_the_truncated_model(which):  # T19
    model, x = vit(torch.float64), images(dtype=torch.float64)
    ranks = {p.name: candidates(p) for p in parts(model)[0]}
    weights = {}
    for name, mine in ranks.items():
        index = which if which == -1 else min(which, len(mine) - 1)
        weights[name] = F.one_hot(torch.tensor(index % len(mine)), len(mine)).double()
    net, _ = supernet(model, ranks, weights)
    chosen = {n: r[int(weights[n].argmax())] for n, r in ranks.items()}
    with swapped(model, net.modules):
        masked = model(x)
    assert rel(masked, cut(model, {n: r for n, r in chosen.items() if r is not None})(x)) < 1e-10


def test_mask_with_statistics_leaves_the_mean_behind():
    """Whitened directions: a one-hot mask is the model that `apply` cuts with the same statistics."""
    model, x = vit(torch.float64), images(dtype=torch.float64)
    statistics = comcat_calibrate.calibrate(model, [images(64, dtype=torch.float64)])
    ranks = {p.name: [4, None] for p in parts(model)[0]}
    weights = {n: torch.tensor([1.0, 0.0], dtype=torch.float64) for n in ranks}
    net, _ = supernet(model, ranks, weights, statistics)
    with swapped(model, net.modules):
        masked = model(x)
    assert rel(masked, cut(model, dict.fromkeys(ranks, 4), statistics)(x)) < 1e-8


def test_coverage():  # T19
    cover = coverage([2, 4, None], 6)
    assert cover.tolist() == [[1, 1, 1]] * 2 + [[0, 1, 1]] * 2 + [[0, 0, 1]] * 2
    c = cover @ torch.tensor([0.5, 0.3, 0.2])
    assert c[0] == 1 and (c[1:] <= c[:-1]).all() and c.min() >= 0 and c.max() <= 1


def test_expected_size():  # T20
    model = vit()
    state = RankSearch(model, budget(model))
    generator = torch.Generator().manual_seed(0)
    a, b = ([torch.rand(len(al), generator=generator).double() for al in state.alphas] for _ in range(2))
    mixed = [0.3 * x + 0.7 * y for x, y in zip(a, b, strict=True)]
    assert float(state.size(mixed)) == pytest.approx(0.3 * float(state.size(a)) + 0.7 * float(state.size(b)))
    chosen = {p.name: state.candidates[p.name][i % 3] for i, p in enumerate(state.parts)}
    one_hot = []
    for part in state.parts:
        index = torch.tensor(state.candidates[part.name].index(chosen[part.name]))
        one_hot.append(F.one_hot(index, len(state.candidates[part.name])).double())
    small = cut(model, {n: r for n, r in chosen.items() if r is not None})
    linear = sum(m.weight.numel() for m in small.modules() if isinstance(m, nn.Linear))
    assert float(state.size(one_hot)) == linear == total_weights(state.parts, chosen)


def test_gradient_of_the_loss_by_finite_differences():  # T20
    model = vit(torch.float64)
    state = RankSearch(model, budget(model))
    state.budget = 10_000  # below what is there, so that the penalty counts
    state.alphas = [a.detach().double().requires_grad_() for a in state.alphas]
    found, x, labels = state.parts, images(dtype=torch.float64), torch.arange(4)
    noise = [torch.randn_like(a) for a in state.alphas]
    net, _ = supernet(model, state.candidates, {p.name: a.softmax(0) for p, a in zip(found, state.alphas, strict=True)})

    def value(alphas):
        p = [((a + g) / 2).softmax(0) for a, g in zip(alphas, noise, strict=True)]
        cover = {q.name: coverage(state.candidates[q.name], q.full).double() for q in found}
        net.masks = {q.name: cover[q.name] @ w for q, w in zip(found, p, strict=True)}
        return penalised(F.cross_entropy(model(x), labels), state.size(p), state.budget)

    with swapped(model, net.modules):
        value(state.alphas).backward()
        with torch.no_grad():
            for layer in (0, 3, 8):
                for i in range(2):
                    ends = []
                    for sign in (1, -1):
                        moved = [a.clone() for a in state.alphas]
                        moved[layer][i] += sign * 1e-5
                        ends.append(float(value(moved)))
                    assert float(state.alphas[layer].grad[i]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5)


def test_penalty():  # T21
    loss = torch.tensor(2.0)
    assert penalised(loss, torch.tensor(99.0), 100) is loss
    assert penalised(loss, torch.tensor(100.0), 100) is loss
    assert float(penalised(loss, torch.tensor(200.0), 100)) / 2 == pytest.approx(2.828427, abs=1e-6)
    assert float(penalised(loss, torch.tensor(50.0), 100, always=True)) == pytest.approx(2 * 0.5**1.5)


# --- a pass ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["corrected", "faithful"])
def test_a_pass_moves_alpha_alone(mode):  # T22
    model = vit(drop_path_rate=0.3).train()
    model.blocks[1].eval()
    state = RankSearch(model, budget(model), mode=mode)
    model.norm.weight.requires_grad_(False)
    before, alphas = copy.deepcopy(model.state_dict()), [a.detach().clone() for a in state.alphas]
    objects = [id(m) for m in model.modules()]
    modes, flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    rng = torch.get_rng_state()
    entry = state.search(1, batches())
    after = model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[n], after[n]) for n in before)
    assert objects == [id(m) for m in model.modules()]
    assert modes == [m.training for m in model.modules()] and flags == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters()) and torch.equal(rng, torch.get_rng_state())
    assert all(not torch.equal(a, b) for a, b in zip(alphas, state.alphas, strict=True))
    assert entry["steps"] == 3 and entry["seconds"] > 0 and math.isfinite(entry["loss"])
    state.commit()
    frozen = [a.detach().clone() for a in state.alphas]
    weights = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    F.cross_entropy(model(images()), torch.arange(4)).backward()
    weights.step()
    assert all(torch.equal(a, b) for a, b in zip(frozen, state.alphas, strict=True))


@pytest.mark.parametrize("mode", ["corrected", "faithful"])
def test_what_a_pass_descends(mode):  # T21, T22: the penalty's P and beta, the network's mode, the rates
    """A loss that is the same everywhere leaves the penalty alone: of the expected size, or of the sampled one."""
    alphas, modes = {}, set()

    def constant(model, x, y):
        modes.add(model.training)
        return 2 + 0 * model(x).sum()

    for seed, beta in ((0, 1.5), (1, 1.5), (0, 1e-3)):
        state = RankSearch(vit(), 12_000, mode=mode, seed=seed, beta=beta, weight_decay=0.0)
        assert state.optimizer.defaults["lr"] == (0.01 if mode == "faithful" else 0.1)
        state.optimizer = torch.optim.SGD(state.alphas, lr=1.0)
        state.search(1, batches(), constant)
        alphas[seed, beta] = torch.cat([a.detach() for a in state.alphas])
    start = torch.cat([torch.full_like(a, 1 / len(a)) for a in state.alphas])
    assert modes == {mode == "faithful"}
    assert torch.allclose(alphas[0, 1.5], alphas[1, 1.5], atol=1e-7) == (mode == "corrected")  # no noise in P
    steps = [(alphas[0, beta] - start).norm() for beta in (1.5, 1e-3)]
    assert steps[0] > 100 * steps[1] > 0
    assert RankSearch(vit(), 12_000, mode=mode).optimizer.defaults["weight_decay"] == 5e-4
    one_hot = [F.one_hot(torch.tensor(len(a) - 1), len(a)).double() for a in state.alphas[:2]]
    one_hot += [torch.zeros(len(a)).double() for a in state.alphas[2:]]
    largest = 2 * 48 * 40 if mode == "faithful" else 2 * 48 * 48  # nominal, not 3 * (40 // 3); or dense
    assert float(state.size(one_hot)) == 2 * largest


def test_a_pass_depends_on_its_seed_alone():  # T26: drop path draws from the search's own numbers
    results = []
    for noise in (0, 1):
        state = RankSearch(vit(drop_path_rate=0.5), budget(vit()), mode="faithful", seed=3)
        torch.manual_seed(noise)
        state.search(1, batches())
        results.append(torch.cat([a.detach() for a in state.alphas]))
    assert torch.equal(*results)


def test_a_failed_pass_leaves_no_trace():
    """The search after it is the one that would have been."""
    states = [RankSearch(vit(), budget(vit())) for _ in range(2)]
    x, y = batches(1)[0]
    with pytest.raises(ValueError, match="loss of step 1"):
        states[0].search(0, [(x, y), (x * float("nan"), y)])
    for state in states:
        state.search(0, batches())
    assert all(torch.equal(a, b) for a, b in zip(states[0].alphas, states[1].alphas, strict=True))
    assert torch.equal(*(s.generator.get_state() for s in states))


@pytest.mark.parametrize("reduction", [0.4, 0.7])
def test_the_choice_meets_the_budget(reduction):  # T23
    model = vit()
    limit = budget(model, reduction)
    plan = search(model, batches(), limit, epochs=2)
    found, _ = parts(model)
    used = total_weights(found, plan.ranks)
    cheapest = min(p.unit for p in found if plan.ranks.get(p.name, p.full) < p.full)
    assert limit - cheapest < used <= limit
    assert not hasattr(model, "comcat_plan")  # without training the model stays dense
    small = copy.deepcopy(model)
    apply(small, plan)
    assert sum(m.weight.numel() for m in small.modules() if isinstance(m, nn.Linear)) == used == plan.about["weights"]
    assert plan == comcat.Plan.from_json(plan.to_json())


def test_sensitivity_guides_the_projection():
    """From the same logits, what matters most keeps the most."""
    model = vit()
    even = {p.name: 1.0 for p in parts(model)[0]}
    ranks = []
    for factor in (1e-6, 1e6):
        state = RankSearch(model, budget(model, 0.6), weights=even | {"blocks.1.mlp.fc1": factor})
        ranks.append(state.search(0, batches())["ranks"]["blocks.1.mlp.fc1"] or 48)
    assert ranks[0] < ranks[1]


def test_slack_on_deit_small():  # T23: unit steps against the authors' grid
    with torch.device("meta"):
        import timm

        found, _ = parts(timm.create_model("deit_small_patch16_224"))
    limit, generator = 10_661_376, torch.Generator().manual_seed(0)
    fine, coarse = {}, {}
    for p in found:
        energy = torch.rand(p.full, generator=generator).sort(descending=True).values
        fine[p.name] = comcat_ranks.curve(p, energy)
        coarse[p.name] = comcat_ranks.curve(p, energy, [r for r in candidates(p, "faithful") if r < p.break_even])
    used = total_weights(found, comcat_ranks.project(fine, limit))
    assert limit - 1_920 < used <= limit and (limit - used) / limit <= 5e-4
    used = total_weights(found, comcat_ranks.project(coarse, limit))
    assert limit - 122_880 < used <= limit and (limit - used) / limit <= 0.012


def test_faithful_truncation_is_one_way():  # T24
    model = vit()
    state = RankSearch(model, budget(model), mode="faithful")
    assert all(torch.equal(a, torch.full_like(a, 1 / len(a))) for a in state.alphas)
    assert current_ranks(model, state.parts) == {p.name: max(state.candidates[p.name]) for p in state.parts}
    assert model.blocks[0].attn.qkv.bias is None and model.blocks[0].attn.proj.bias is None
    state.search(1, batches())
    low = {p.name: state.candidates[p.name][1] for p in state.parts}
    state.log[-1]["ranks"] = low
    assert state.commit()
    part = state.parts[0]
    a, b = product(model, part, False)
    committed = a @ b
    spectrum = state.recut.spectra()[part.name]
    for rank in state.candidates[part.name][1:]:
        left, right = spectrum.factors(rank)
        assert rel(left @ right, committed) <= 1e-6
    x, before = images(), model(images())
    state.log[-1]["ranks"] = {p.name: max(state.candidates[p.name]) for p in state.parts}
    state.commit()  # a larger rank: nothing comes back, but the parameters count
    assert rel(model(x), before) <= 1e-4
    assert current_ranks(model, state.parts) == {p.name: max(state.candidates[p.name]) for p in state.parts}
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_corrected_ranks_grow_back():  # T24: what is dropped is kept aside
    model, x = vit(torch.float64), images(dtype=torch.float64)
    dense, state = model(x), RankSearch(model, budget(model))
    state.search(0, [(b.double(), y) for b, y in batches()])
    assert state.commit()
    middle = {"qk": 5, "vo": 7, "fc": 6}
    for ranks in ({p.name: 3 for p in state.parts}, {p.name: middle[p.kind] for p in state.parts}):
        state.log[-1]["ranks"] = ranks
        assert state.commit() and not state.commit()
        assert current_ranks(model, state.parts) == ranks
        assert rel(model(x), cut(vit(torch.float64), ranks)(x)) < 1e-9  # as if cut from the dense model
    state.log[-1]["ranks"] = dict.fromkeys(ranks)
    assert state.commit()
    assert type(model.head) is nn.Linear and rel(model(x), dense) < 1e-9
    assert not state.commit()  # all dense already


def test_whitened_directions_grow_back():
    model, x = vit(torch.float64), images(dtype=torch.float64)
    dense = model(x)
    statistics = comcat_calibrate.calibrate(model, [images(64, dtype=torch.float64)])
    state = RankSearch(model, budget(model), statistics=statistics)
    state.search(0, [(b.double(), y) for b, y in batches()])
    state.commit()
    state.log[-1]["ranks"] = {p.name: 4 for p in state.parts}
    state.commit()
    assert rel(model(x), cut(vit(torch.float64), {p.name: 4 for p in state.parts}, statistics)(x)) < 1e-7
    state.log[-1]["ranks"] = {p.name: None for p in state.parts}
    state.commit()
    assert rel(model(x), dense) < 1e-7


def test_temperatures():  # T25
    expected = [5, 4.389, 3.852, 3.381, 2.968, 2.605, 2.287]
    assert [temperature(k, 30) for k in range(7)] == pytest.approx(expected, abs=6e-4)
    assert temperature(28, 30) == pytest.approx(0.13, abs=1e-3) and temperature(29, 30) == pytest.approx(
        0.114, abs=1e-3
    )
    model = vit()
    faithful = RankSearch(model, budget(model), mode="faithful", schedule=Schedule(adaptive=False, faithful=True))
    taus = [faithful.search(epoch, batches(1))["tau"] for epoch in (1, 2, 16)]
    assert taus == pytest.approx(expected[:3], abs=6e-4)  # by search
    model = vit()
    corrected = RankSearch(model, budget(model))
    taus = [corrected.search(epoch, batches(1))["tau"] for epoch in (0, 1, 6)]
    assert taus == pytest.approx([5, 4.389, 2.287], abs=6e-4)  # by epoch


def held_out(n=56, classes=7):
    """Images that the model was not made with, as many of each class, labels as it sees them in part."""
    x = images(n, seed=11)
    return x, torch.arange(n) % classes


def in_order(order, size=8):
    x, y = held_out()
    return [(x[i], y[i]) for i in order.split(size)]


def test_same_seed_same_ranks():  # T26
    order = torch.randperm(56, generator=torch.Generator().manual_seed(0))
    first, second, other = (search(vit(), in_order(order), budget(vit()), epochs=3, seed=s, lr=0.1) for s in (0, 0, 1))
    assert first.ranks == second.ranks and first.about["searches"][0]["size"] == second.about["searches"][0]["size"]
    assert other.about["searches"][0]["size"] != first.about["searches"][0]["size"]  # the seed is that of the noise


@pytest.mark.parametrize("mode", ["corrected", "faithful"])
def test_shuffling_leaves_plans_valid(mode):  # T26
    """Whatever the order: ranks within bounds, the same shapes, a budget met (corrected), counts as they are built."""
    model, limit, losses = vit(), budget(vit()), set()
    for seed in range(3):
        order = torch.randperm(56, generator=torch.Generator().manual_seed(seed))
        whole = vit()
        plan = search(whole, in_order(order), limit, epochs=2, mode=mode, lr=0.1, schedule=Schedule(first=0))
        found = [comcat.part_of(n, s) for n, s in plan.shapes.items()]
        assert plan.shapes == {p.name: [p.heads, p.inputs, p.outputs, p.full] for p in parts(model)[0]}
        assert set(plan.ranks) <= set(plan.shapes) and all(1 <= plan.ranks.get(p.name, 1) <= p.full for p in found)
        small = vit()
        apply(small, plan)
        used = sum(m.weight.numel() for m in small.modules() if isinstance(m, nn.Linear))
        assert used == total_weights(found, plan.ranks) == plan.about["weights"]
        if mode == "corrected":
            assert limit - max(p.unit for p in found) < used <= limit
        assert small(images()).shape == (4, 7) and torch.isfinite(small(images())).all()
        losses.add(plan.about["searches"][0]["size"])
    assert len(losses) == 3  # three orders are three searches


def test_search_sets_sorted_by_class_are_refused():  # T26, and the authors' second defect
    x, y = held_out()
    model, order = vit(), y.argsort(stable=True)
    state = RankSearch(model, budget(model))
    before = [a.detach().clone() for a in state.alphas]
    with pytest.raises(ValueError, match="is sorted by class, so that the last classes would decide; give shuffled"):
        state.search(0, in_order(order))
    assert all(torch.equal(a, b) for a, b in zip(before, state.alphas, strict=True)) and state.log == []
    with pytest.raises(ValueError, match="sorted by class"):
        state.search(0, in_order(order.flip(0)))
    state.search(0, [(x[order], y[order])])  # one batch holds all classes, however they stand in it
    state.search(1, in_order(torch.randperm(56, generator=torch.Generator().manual_seed(0))))
    faithful = RankSearch(vit(), budget(model), mode="faithful")  # as theirs
    assert faithful.search(1, in_order(order))["steps"] == 7


def test_alpha_learns_what_matters():
    """Of two blocks, one does nothing: its parts are the ones that lose their ranks."""
    model = vit()
    with torch.no_grad():
        for layer in (model.blocks[1].attn.proj, model.blocks[1].mlp.fc2):
            layer.weight.mul_(1e-3)
            layer.bias.zero_()
    labels = model(images(64)).argmax(1)
    assert len(labels.unique()) > 1
    data = [(images(64), labels)] * 60
    state = RankSearch(model, budget(model, 0.7), mode="corrected", lr=0.05)
    state.search(0, data)
    mean = {}
    for part, p in zip(state.parts, state.expected(), strict=True):
        sizes = torch.tensor([part.weights(r) for r in state.candidates[part.name]]) / part.dense
        mean[part.name] = float(p.detach() @ sizes.float())
    for kind in ("attn.vo", "mlp.fc1", "mlp.fc2"):
        assert mean[f"blocks.1.{kind}"] < mean[f"blocks.0.{kind}"]


# --- schedules -------------------------------------------------------------------------------------------------------


def schedule_of(stable_from, epochs=30, **settings):
    """(epochs searched, F after each) for ranks that change at every search before `stable_from` and never after."""
    schedule, searched, coefficients = Schedule(**settings), [], []
    for epoch in range(epochs):
        if schedule.due(epoch):
            schedule.record(epoch, [min(epoch, stable_from), 1])
            searched.append(epoch)
            coefficients.append(schedule.coefficient)
    return searched, coefficients


@pytest.mark.parametrize(
    "stable_from, searched",
    [
        (1, [1, 2, 4, 8, 16]),
        (2, [1, 2, 3, 4, 8, 16]),
        (3, [1, 2, 3, 4, 6, 8, 16]),
        (5, [1, 2, 3, 4, 5, 6, 8, 12, 16]),
        (8, [*range(1, 11), 12, 16]),
        (12, [*range(1, 15), 16, 24]),
        (20, [*range(1, 23), 24]),
        (99, [*range(1, 30)]),
    ],
)
def test_released_schedules(stable_from, searched):  # T27, T28
    got, coefficients = schedule_of(stable_from, faithful=True)
    assert got == searched and 5 <= len(got) <= 29
    assert all(math.log2(f).is_integer() for f in coefficients)
    if stable_from == 2:
        assert coefficients == [1, 1, 2, 4, 8, 16]
    assert schedule_of(stable_from, faithful=True, adaptive=False)[0] == [*range(1, 30)]


def test_corrected_schedule():
    assert schedule_of(2)[0] == [1, 2, 3, 5, 9, 17]  # last + F
    assert schedule_of(2, cap=4)[0] == [1, 2, 3, 5, 9, 13, 17, 21, 25, 29]
    assert schedule_of(2, first=0)[0] == [0, 1, 2, 3, 5, 9, 17]
    schedule = Schedule(tolerance=0.05)
    for epoch, ranks in ((1, [100, 100]), (2, [104, 95]), (4, [104, 95])):
        assert schedule.due(epoch)
        schedule.record(epoch, ranks)
    assert schedule.coefficient == 4 and not schedule.due(7) and schedule.due(8)
    schedule.record(8, [130, 95])
    assert schedule.coefficient == 1 and schedule.due(9)  # falls to 1 at a change
    with pytest.raises(ValueError, match="neither tolerance nor cap"):
        Schedule(faithful=True, cap=3)
    with pytest.raises(ValueError, match="must be >= 0"):
        Schedule(tolerance=-1)


@pytest.mark.parametrize("mode", ["corrected", "faithful"])
def test_always_changing_ranks_are_comcat(mode, monkeypatch):  # T28
    """With ranks that never stay, the adaptive run is the fixed one, number by number."""
    results = []
    for adaptive in (True, False):
        model = vit()
        turn = iter(range(100))

        def choice(self, spectra, turn=turn):
            lift = next(turn) % 2
            return {p.name: self.candidates[p.name][lift] for p in self.parts}

        monkeypatch.setattr(RankSearch, "choice", choice)
        schedule = Schedule(adaptive=adaptive, faithful=mode == "faithful")
        searched = []
        search(
            model,
            batches(1),
            budget(model),
            epochs=5,
            mode=mode,
            schedule=schedule,
            train=lambda m, e, r: sgd(m),
            save=lambda s, e, searched=searched: searched.append([x["epoch"] for x in s.log]),
        )
        results.append((searched[-1], model.state_dict()))
    assert results[0][0] == results[1][0] == [1, 2, 3, 4]
    assert all(torch.equal(t, results[1][1][n]) for n, t in results[0][1].items())


def sgd(model, lr=0.01):
    """One step of training."""
    x, y = batches(1)[0]
    model.train()
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    with torch.no_grad():
        for p, g in zip(model.parameters(), grads, strict=True):
            p.sub_(lr * g)
    model.eval()


def test_epochs_without_a_search_keep_everything(monkeypatch):  # T29
    monkeypatch.setattr(RankSearch, "choice", lambda self, spectra: {p.name: 4 for p in self.parts})
    model, seen, optimizers = vit(), [], []

    def train(model, epoch, renewed):
        if renewed:
            optimizers.append(torch.optim.AdamW(model.parameters(), lr=1e-3))
        x, y = batches(1)[0]
        optimizers[-1].zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizers[-1].step()
        steps = optimizers[-1].state[model.blocks[0].attn.qkv.weight]["step"]
        seen.append((epoch, renewed, int(steps), id(model.blocks[0].attn)))

    search(model, batches(1), budget(model), epochs=8, train=train, schedule=Schedule(first=1))
    assert [s[1] for s in seen] == [True, True] + [False] * 6  # the ranks stay: nothing is replaced any more
    assert [s[2] for s in seen] == [1, *range(1, 8)]
    assert len({s[3] for s in seen[1:]}) == 1


def test_unchanged_ranks_leave_the_logits(monkeypatch):  # T29: faithful, through the SVD anew
    monkeypatch.setattr(RankSearch, "choice", lambda self, s: {p.name: self.candidates[p.name][2] for p in self.parts})
    model = vit()
    state = RankSearch(model, budget(model), mode="faithful")
    state.search(1, batches(1))
    state.commit()
    sgd(model, 0.1)
    before, old = model(images()), model.blocks[0].attn
    state.search(2, batches(1))
    assert state.commit() and model.blocks[0].attn is not old
    assert rel(model(images()), before) <= 1e-4
    left = model.blocks[0].mlp.fc1.first.weight
    assert rel(left @ left.T, torch.eye(len(left))) < 1e-4  # orthonormal: all of Sigma on the right


@pytest.mark.parametrize("mode", ["corrected", "faithful"])
@pytest.mark.parametrize("stop", [0, 1, 3])
def test_resume(mode, stop, tmp_path):  # T30
    epochs, kept = 5, {}

    def run(model, **settings):
        return search(
            model, batches(2), budget(vit()), epochs=epochs, mode=mode, train=lambda m, e, r: sgd(m), **settings
        )

    def save(state, epoch):
        if epoch == stop:
            kept["state"] = state.state_dict()
            kept["path"] = tmp_path / "model.safetensors"
            if hasattr(state.model, "comcat_plan"):
                comcat.save(state.model, kept["path"])
            else:
                kept["dense"] = copy.deepcopy(state.model.state_dict())

    whole = vit()
    plan = run(whole, save=save)
    torch.save(kept["state"], tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = vit()
    if "dense" in kept:
        again.load_state_dict(kept["dense"])
    else:
        comcat.load(again, kept["path"])
    resumed = run(again, resume=state)
    assert resumed.ranks == plan.ranks
    epochs_searched = [[entry["epoch"] for entry in p.about["searches"]] for p in (plan, resumed)]
    assert epochs_searched[0] == epochs_searched[1]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_search_time_is_told():
    model = vit()
    plan = search(model, batches(1), budget(model), epochs=3, train=lambda m, e, r: sgd(m))
    about = plan.about
    assert about["search_seconds"] == pytest.approx(sum(s["seconds"] for s in about["searches"]))
    assert about["search_seconds"] > 0 < about["train_seconds"]
    assert plan.ranks == model.comcat_plan.ranks and about["weights"] <= budget(vit())


# --- bad input -------------------------------------------------------------------------------------------------------


def test_bad_search_sets():
    model = vit()
    state = RankSearch(model, budget(model))
    before = [a.detach().clone() for a in state.alphas]
    one = [(images(8), torch.full((8,), 3))]
    with pytest.raises(ValueError, match=r"one class only \(3\); give shuffled held-out images"):
        state.search(0, one)
    with pytest.raises(ValueError, match="no batches"):
        state.search(0, [])
    x, y = batches(1)[0]
    with pytest.raises(ValueError, match="loss of step 1 of epoch 0 is nan"):
        state.search(0, [(x, y), (x * float("nan"), y)])
    assert all(torch.equal(a, b) for a, b in zip(before, state.alphas, strict=True))
    assert state.log == [] and state.due(0) and type(model.blocks[0].mlp.fc1) is nn.Linear
    with pytest.raises(ValueError, match="nothing was searched"):
        state.commit()


def test_nan_in_weights_and_factors():
    model = vit()
    state = RankSearch(model, budget(model))
    state.search(0, batches(1))
    state.log[-1]["ranks"] = {p.name: 4 for p in state.parts}
    state.commit()
    with torch.no_grad():
        model.blocks[1].mlp.fc2.second.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="blocks.1.mlp.fc2 has no singular values: .*right factor.*holds NaN"):
        state.search(1, batches(1))
    model = vit()
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="blocks.0.attn.qk has no singular values: .*left factor"):
        comcat_ranks.greedy(model, budget(vit()))


def test_bad_settings():
    model = vit()
    with pytest.raises(ValueError, match=r"budget of 100 weights cannot be met; the smallest candidates take [\d,]+"):
        RankSearch(model, 100)
    with pytest.raises(ValueError, match="none of corrected, faithful"):
        RankSearch(model, budget(model), mode="fast")
    with pytest.raises(ValueError, match="beta=nan must be > 0"):
        RankSearch(model, budget(model), beta=math.nan)
    with pytest.raises(ValueError, match="part_kept=2 must lie between"):
        comcat.sensitivity(model, batches(1), part_kept=2)
    assert type(model.head) is nn.Linear
    with pytest.raises(ValueError, match="leave statistics, weights out"):
        RankSearch(model, budget(model), mode="faithful", statistics=object())
    with pytest.raises(ValueError, match="weights say nothing of blocks.0.attn.vo"):
        RankSearch(model, budget(model), weights={"blocks.0.attn.qk": 1.0})
    state = RankSearch(model, budget(model))
    kept = state.state_dict()
    state.search(0, batches(1))
    state.commit()
    with pytest.raises(ValueError, match="cut otherwise"):
        state.load_state_dict(kept)
    with pytest.raises(ValueError, match="cut in corrected mode"):
        RankSearch(model, budget(vit()), mode="faithful")


def test_the_search_without_training_leaves_the_model():
    model, before = vit(), vit().state_dict()
    for mode in ("corrected", "faithful"):
        plan = search(model, batches(), budget(model), epochs=3, mode=mode)
        assert list(before) == list(model.state_dict()) and not hasattr(model, "comcat_plan")
        assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
        apply(small := copy.deepcopy(model), plan)
        assert small.comcat_plan.mode == mode


@pytest.mark.parametrize("mode", ["corrected", "faithful"])
def test_bad_search_data_are_found_before_anything_is_cut(mode):
    model, before = vit(), vit().state_dict()
    for bad, message in (([], "no batches"), ([(images(8), torch.full((8,), 3))], "one class only")):
        with pytest.raises(ValueError, match=message):
            search(model, bad, budget(model), epochs=2, mode=mode, train=lambda m, e, r: sgd(m))
        assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_models_without_classes_are_not_searched():
    model = vit(num_classes=0)
    for mode in ("corrected", "faithful"):
        with pytest.raises(ValueError, match="search: VisionTransformer has no classifier head"):
            search(model, batches(), budget(model), epochs=2, mode=mode, train=lambda m, e, r: None)
    assert not hasattr(model, "comcat_plan")
    state = RankSearch(model, budget(model))
    with pytest.raises(ValueError, match="RankSearch: VisionTransformer has no classifier head"):
        state.search(0, batches())
    state.search(0, batches(), lambda m, x, y: m(x).square().mean())  # a loss of features


@pytest.mark.parametrize(
    "ranks, message",
    [
        ({"qk": [4]}, "ranks='qk' must be full names of the model's parts, as blocks.0.attn.qk"),
        ({"blocks.9.attn.qk": [4]}, "ranks='blocks.9.attn.qk' must be full names"),
        ({"blocks.0.attn.qk": [4, 17]}, r"ranks of blocks.0.attn.qk=\[4, 17\] must be a list .* 1..15, or None"),
        ({"blocks.0.attn.qk": [0, 4]}, "must be a list of whole numbers in 1..15"),
        ({"blocks.0.attn.qk": [4.0]}, "must be a list of whole numbers in 1..15"),
        ({"blocks.0.attn.qk": 4}, "must be a list of whole numbers"),
        ({"blocks.0.attn.qk": []}, "must be a list of whole numbers"),
        ({"blocks.0.mlp.fc1": [39]}, "must be a list of whole numbers in 1..38"),
    ],
)
def test_candidates_refused(ranks, message):
    model = vit()
    with pytest.raises(ValueError, match=message):
        RankSearch(model, budget(model), ranks=ranks)
    with pytest.raises(ValueError, match="whole numbers in 1..16$"):
        RankSearch(model, budget(model), mode="faithful", ranks={"blocks.0.attn.qk": [4, None]})


def test_own_candidates_bind_the_projection():
    model = vit()
    part = parts(model)[0][2]
    between = comcat_ranks.paying(part) + 1  # smaller than dense, though not faster
    assert part.name == "blocks.0.mlp.fc1" and between < part.break_even
    own = {p.name: [4, 8] for p in parts(model)[0]} | {part.name: [between], "head": [None]}
    found = {p.name: p for p in parts(model)[0]}
    most = total_weights(found.values(), {n: max(r, key=lambda x: x or 99) for n, r in own.items()})
    for limit in (budget(model, 0.5), most - 1_000):
        for seed in range(2):
            state = RankSearch(model, limit, ranks=own, seed=seed)
            chosen = state.search(0, batches())["ranks"]
            assert chosen["head"] is None and chosen[part.name] == between
            assert all(4 <= r <= 8 for n, r in chosen.items() if n not in ("head", part.name))
            assert total_weights(found.values(), chosen) <= limit
    free = RankSearch(model, budget(model, 0.4), ranks={n: [4, 8, None] for n in found if n != "head"})
    chosen = free.search(0, batches())["ranks"]
    assert None in chosen.values() and budget(model, 0.4) - 100 < total_weights(found.values(), chosen)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"budget": 30_000}, "budget=30,000 must be 26,664, as in the state"),
        ({"epochs": 4}, "epochs=4 must be 3"),
        ({"ranks": {"blocks.0.attn.qk": [4, None]}}, "candidates as in the state; start anew for others"),
    ],
)
def test_a_search_goes_on_as_it_began(change, message):
    model = vit()
    before = RankSearch(model, budget(model), epochs=3)
    before.search(0, batches())
    settings = {"budget": budget(model), "epochs": 3, **change}
    with pytest.raises(ValueError, match=message):
        RankSearch(model, **settings).load_state_dict(before.state_dict())
    RankSearch(model, budget(model), epochs=3).load_state_dict(before.state_dict())


def test_no_plan_above_the_budget():
    model = vit()
    for settings in ({"epochs": 0}, {"epochs": 1, "schedule": Schedule(first=1)}):
        with pytest.raises(ValueError, match=r"nothing was searched, and the model has [\d,]+ weights, more than"):
            search(model, batches(), budget(model), **settings)
    whole = total_weights(parts(model)[0], {})
    assert search(model, batches(), whole, epochs=0).ranks == {}
    with pytest.raises(ValueError, match="budget=nan must be a finite number of weights"):
        RankSearch(model, float("nan"))
    with pytest.raises(ValueError, match="RankSearch: weight of blocks.0.attn.qk=nan must be a finite number"):
        RankSearch(model, budget(model), weights={p.name: float("nan") for p in parts(model)[0]})


def test_adapted_models_are_not_searched():
    model = cut(vit(), {"qk": 4, "fc1": 9})
    lora.lora(model)
    with pytest.raises(ValueError, match="RankSearch: this model has LoRA already"):
        RankSearch(model, budget(vit()), mode="faithful")
