"""UVC's two solvers, its budgets and controls; the numbers T1 to T26 are the property tests of its specification."""

import copy
import dataclasses
import math
import time

import numpy as np
import pytest
import torch
from test_uvc import counted, images, sliced, vit
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from leanvit import uvc
from leanvit.checkpoint import TrainingDiverged
from leanvit.data import load
from leanvit.distill import Distill
from leanvit.evaluate import fetch
from leanvit.export import export
from leanvit.models import create, transforms
from leanvit.uvc import CorrectedSearch, FaithfulSearch, Flags, Settings, from_flags
from leanvit.uvc_budget import Counts, meet
from leanvit.uvc_cost import FlopsCost, LatencyCost, LatencyTable
from leanvit.uvc_flags import README, zlr_schedule
from leanvit.uvc_importance import as_norms
from leanvit.uvc_math import (
    BudgetControl,
    ascend,
    dead_heads,
    group_norms,
    hard_gate,
    least_k,
    likely_gate,
    logistic_noise,
    next_smallest,
    shrink_,
    smallest,
    soft_gate,
)
from leanvit.uvc_plan import BlockPlan, whole_plan

SMALL = dict(round_units=4, round_dims=2, lr=1e-3)


def settings(**more):
    return Settings(**SMALL | more)


def flags(**more):
    """The README's, for a few epochs."""
    return Flags(**{"zlr_schedule_list": "1", **more})


def batches(model, count=3, seed=0, batch=4):
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    return [
        (torch.randn(batch, 3, 16, 16, generator=generator).to(dtype), torch.tensor([0, 1, 2, 3]) % model.num_classes)
        for _ in range(count)
    ]


def run(search, data, steps):
    for k in range(steps):
        search.step(*data[k % len(data)])
    return search


# --- least-k sums, proximal step -------------------------------------------------------------------------------------


def test_least_k_against_sorting():  # T10
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(7, generator=generator, dtype=torch.float64)
    ordered = a.sort().values
    sums = [float(least_k(a, torch.tensor(float(k)))) for k in range(8)]
    assert sums == pytest.approx([float(ordered[:k].sum()) for k in range(8)]) and sums[0] == 0
    steps = np.diff(sums)
    assert (steps >= 0).all() and (np.diff(steps) >= 0).all()  # non-decreasing and convex
    for k in (0.0, 0.3, 2.0, 5.5, 7.0):
        variable, b = torch.tensor(k, dtype=torch.float64, requires_grad=True), a.clone().requires_grad_()
        least_k(b, variable).backward()
        following = ordered[min(math.ceil(k), 6)]
        assert variable.grad == following == next_smallest(a, torch.tensor(k))
        members = torch.zeros(7, dtype=torch.float64)
        members[smallest(a, k)] = 1
        assert torch.equal(b.grad, members) and members.sum() == math.ceil(k)
    zeros = torch.tensor([0.0, 3.0, 0.0, 1.0])
    assert [float(least_k(zeros, torch.tensor(float(k)))) for k in range(5)] == [0, 0, 0, 1, 4]
    for k in (-0.5, 7.5):
        with pytest.raises(ValueError, match=r"is outside 0\.\.7"):
            least_k(a, torch.tensor(k))


def test_proximal_step():  # T11
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    eta, y = 0.3, 2.0
    columns = smallest(before.square().sum(0), 2)
    after = before.clone()
    shrink_(after, columns, eta * y)
    others = [c for c in range(6) if c not in columns.tolist()]
    assert torch.equal(after[:, others], before[:, others])
    torch.testing.assert_close(after[:, columns], before[:, columns] / (1 + 2 * eta * y))
    gradient = (after - before)[:, columns] / eta + 2 * y * after[:, columns]  # stationary
    assert gradient.abs().max() < 1e-12

    def objective(w):
        return (w - before).square().sum() / (2 * eta) + y * least_k(w.square().sum(0), torch.tensor(2.0))

    best = objective(after)
    for _ in range(200):  # the minimum, for norms that far apart
        assert objective(after + 0.01 * torch.randn(5, 6, generator=generator, dtype=torch.float64)) > best
    for strength, expected in ((0.0, before), (math.inf, before.index_fill(1, columns, 0))):
        same = before.clone()
        shrink_(same, columns, strength)
        assert torch.equal(same, expected)


# --- gates -----------------------------------------------------------------------------------------------------------


def test_gate_statistics():  # T12
    logit = torch.full((200_000,), 2.0)  # (g0, g1) = (-1, 1)
    noise = logistic_noise(len(logit), 3)
    assert torch.equal(noise, logistic_noise(len(logit), 3)) and not torch.equal(noise, logistic_noise(len(logit), 4))
    hard, soft = hard_gate(logit, noise), soft_gate(logit, noise)
    assert set(hard.tolist()) == {0.0, 1.0}
    p = 0.8808
    assert abs(hard.mean().item() - p) < 3 * math.sqrt(p * (1 - p) / len(hard))
    assert 0 <= soft.min() and soft.max() <= 1 and soft.mean().item() == pytest.approx(0.851, abs=0.002)
    g = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    gate = likely_gate(g)
    gate.sum().backward()
    assert gate.tolist() == [0, 0, 1]
    torch.testing.assert_close(g.grad, torch.sigmoid(g.detach()) * torch.sigmoid(-g.detach()))


def test_evaluation_draws_nothing():  # T12
    model = vit()
    x, data = images(model), batches(model)
    for search in (
        CorrectedSearch(model, 0.5, 40, settings=settings()),
        FaithfulSearch(model, flags(enable_warmup=0), steps_per_epoch=20),
    ):
        run(search, data, 3)
        with torch.no_grad():
            search.logits.view(len(model.blocks), -1)[1] *= -1
        search.refresh()
        first = model.eval()(x)
        assert torch.equal(model(x), first)
        without = copy.deepcopy(model)
        del without.blocks[1]
        assert search.hooks.exported.tolist() == [1, 0, 1, 1]
        search.close()
        del without
        plain = model.eval()(x)
        assert not torch.equal(plain, first)  # close() takes the gates away
        block = model.blocks[1]
        model.blocks[1] = nn.Identity()
        torch.testing.assert_close(model(x), first)
        model.blocks[1] = block


def test_gates_of_one_and_zero():  # T13
    model = vit()
    x = images(model)
    whole = model(x)
    search = CorrectedSearch(model, 0.5, 10, settings=settings())
    model.train()  # no dropout in it
    search.hooks.gates = torch.ones(4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(model(x), whole, rtol=1e-12, atol=1e-12)
    search.hooks.gates = torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    got = model(x)
    search.close()
    del model.blocks[2]
    torch.testing.assert_close(got, model(x), rtol=1e-12, atol=1e-12)


# --- the corrected solver --------------------------------------------------------------------------------------------


def test_control_of_z():  # T9, T21
    control = BudgetControl(0.3, 100, 0.7, 0.5, 10.0, 5.0)
    assert (
        control.target(0) == 1
        and control.target(35) == pytest.approx(0.65)
        and control.target(90) == pytest.approx(0.3)
    )
    assert control.update(1.0, 1) > 0  # from the first step on, whatever the budget
    for _ in range(1000):
        control.update(1.0, 100)
    assert control.integral == 5.0  # no winding up
    z = control.update(1.0, 100)
    assert control.update(0.2, 100) < z
    for _ in range(1000):
        z = control.update(0.2, 100)
    assert z == 0 and control.integral == 0
    assert ascend(2.0, 3.0, 0.7, 0.5) == 2.0 + 3.0 * (0.7 - 0.5) and ascend(0.1, 1.0, 0.3, 0.5) == 0.0


def test_duals_and_bounds_after_every_step():  # T4, T9
    model = vit()
    generator = torch.Generator().manual_seed(0)
    search = CorrectedSearch(model, 0.3, 30, settings=settings(dims=True, width_rate=60.0, gate_rate=300.0))
    for k in range(20):
        search.step(*batches(model, 1, seed=k)[0])
        for dual in (search.y, search.p, search.z):
            assert (dual >= 0).all()
        s, r = search.counts(), search.removed_dims()
        assert (s >= 0).all() and (s[:, 0] <= 3).all() and (s[:, 1] <= 127).all()
        assert (r >= 0).all() and (r <= 7).all()
        if k % 3 == 0:  # and from any state
            search.fractions.uniform_(0, 0.75, generator=generator)
    assert search.y.max() <= search.settings.y_limit


def test_signs():  # T14
    model = vit()
    search = CorrectedSearch(model, 0.5, 30, settings=settings(dims=True, gate_rate=5.0, importance="norms"))
    norms = search.norms()
    search.fractions.fill_(0.3)
    search.dim_fractions.fill_(0.3)
    start = [t.detach().clone() for t in (search.fractions, search.dim_fractions, search.logits)]

    def moved(z, y):
        for tensor, value in zip((search.fractions, search.dim_fractions, search.logits), start, strict=True):
            with torch.no_grad():
                tensor.copy_(value)
        search.gate_momentum.zero_()
        search.z.fill_(z)
        search.y.fill_(y)
        search.p.fill_(y)
        search.move_structure(norms)
        return [
            a.detach() - b for a, b in zip((search.fractions, search.dim_fractions, search.logits), start, strict=True)
        ]

    s, r, g = moved(1.0, 0.0)
    assert (s > 0).all() and (g < 0).all()
    alive = ~dead_heads(norms, torch.full((4,), 1.2))
    assert (r[alive] > 0).all() and (r[~alive] == 0).all()  # a dead head's dimensions save nothing
    s, r, g = moved(0.0, 0.1)
    assert (s < 0).all() and (r < 0).all() and (g == 0).all()
    assert all((d == 0).all() for d in moved(0.0, 0.0))
    search.logits.grad = torch.tensor([1.0, -1.0, 0.0, 0.0])
    s, r, g = moved(0.0, 0.0)
    assert g[0] < 0 < g[1] and (g[2:] == 0).all() and (s == 0).all() and (r == 0).all()  # gates follow the task


def test_ratio_is_that_of_the_exported_network():
    """Specification 2.8b: what z sees is R of the plan, whatever the logits' distance from zero."""
    model = vit()
    search = CorrectedSearch(model, 0.5, 30, settings=settings())
    search.fractions[:] = torch.tensor([0.25, 0.5])
    with torch.no_grad():
        search.logits.copy_(torch.tensor([0.1, -0.2, 2.0, -3.0]))
    block = BlockPlan((0, 1, 2), (tuple(range(8)),) * 3, tuple(range(64)))
    plan = uvc.Plan(search.shapes, (block, None, block, None))
    assert search.ratio(search.norms()) == pytest.approx(plan.ratio(), rel=1e-6)
    with torch.no_grad():
        search.logits.zero_()
    draws = set()
    for search.step_number in range(12):
        draws.add(tuple(search.draw_gates().tolist()))
    assert len(draws) > 5 and {v for d in draws for v in d} == {0.0, 1.0}  # hard, and anew in each step
    search.close()


def test_gate_step_of_the_released_solver():
    """Specification 2.2, 5: a ramp-weighted mean of `gating_interval` gradients, momentum 0.9, weight decay 1e-4."""
    _, search, norms = released(gating_interval=4, glr=0.5, gating_weight=0.3, enable_warmup=0, z_grad_clip=1.0)
    generator = torch.Generator().manual_seed(0)
    g, momentum = search.logits.detach().clone(), torch.zeros(4, 2)
    for first in (1, 5):
        total = torch.zeros(4, 2)
        for search.step_number in range(first, first + 4):
            task = torch.randn(4, 2, generator=generator)
            search.z.fill_(2.0)
            logits = search.logits.detach().clone().requires_grad_()
            ratio = search._ratio(search.s, search.r, search.sample(logits, "gates", search.step_number), norms)
            resource = torch.autograd.grad(ratio, logits)[0]
            total += (search.step_number % 4) * (task + 2.0 * 0.3 * resource)
            search.move_gates(norms, task)
        momentum = 0.9 * momentum + total / 4 + 1e-4 * g
        g -= 0.5 * momentum
        torch.testing.assert_close(search.logits.detach(), g)
    purposes = ("forward", "counts", "gates", "duals")
    assert len({tuple(search.sample(search.logits.detach(), p, 3).tolist()) for p in purposes}) == 4  # a draw for each
    search.close()


def test_signs_of_the_released_solver():  # T14
    model, search, norms = released(gating_interval=2, glr=1.0, gating_weight=1.0, enable_warmup=0, z_grad_clip=1.0)
    start = [t.detach().clone() for t in (search.s.fill_(1.5), search.r.fill_(2.5), search.logits)]

    def moved(z, dual, task=None):
        with torch.no_grad():
            for tensor, value in zip((search.s, search.r, search.logits), start, strict=True):
                tensor.copy_(value)
        search.z.fill_(z), search.y.fill_(dual), search.p.fill_(dual), search.gate_momentum.zero_()
        search.move_counts(norms)
        for search.step_number in (1, 2):  # the gates move in every second step
            search.move_gates(norms, task)
        s, r, g = (a.detach() - b for a, b in zip((search.s, search.r, search.logits), start, strict=True))
        return s, r, g[:, 1] - g[:, 0] + 2e-4  # without the gates' own weight decay, 1e-4 of each logit

    dead = dead_heads(norms, start[0][:, 0])
    s, r, g = moved(1.0, 0.0)
    assert (s > 0).all() and (r[~dead] > 0).all() and (r[dead] == 0).all() and (g < -1e-6).all()
    s, r, g = moved(0.0, 1.0)
    assert (s < 0).all() and (r < 0).all() and g.abs().max() < 1e-6
    s, r, g = moved(0.0, 0.0, torch.tensor([[0.0, 1.0], [0.0, -1.0], [0.0, 0.0], [0.0, 0.0]]))
    assert (s == 0).all() and (r == 0).all() and g[0] < -0.1 and g[1] > 0.1 and g[2:].abs().max() < 1e-6
    search.close()


@pytest.mark.parametrize("mode", ["corrected", "faithful"])
def test_proximal_step_of_a_search(mode):  # T11
    """After AdamW's step: the smallest columns of each kind by their own dual; all others stay.

    Released: at AdamW's rate. Corrected: at a rate of its own.
    """
    if mode == "faithful":
        model, search, norms = released()
        search.s[:], search.r[:], search.rate = torch.tensor([0.5, 2.0]), 1.5, 0.1
    else:
        model = vit()
        search = CorrectedSearch(model, 0.5, 40, settings=settings(shrink=4.0, dims=True, warmup=0.2))  # 4 / 40
        search.fractions[:], search.dim_fractions[:] = torch.tensor([0.5 / 4, 2.0 / 128]), 1.5 / 8
        norms, search.rate = search.norms(), 7.0
    # one head, two units, two dimensions of each head
    search.y[:], search.p[:] = torch.tensor([1.0, 2.0]), 3.0
    before = copy.deepcopy(model.state_dict())
    search._shrink(norms)
    for i, n in enumerate(norms):
        head, units = n.heads.argmin(), n.units.argsort()[:2]
        by_head, by_unit = torch.ones(4, 8), torch.ones(128)
        for h, dims in enumerate(n.dims):
            by_head[h, dims.argsort()[:2]] /= 1 + 2 * 0.1 * 3
        by_head[head] /= 1 + 2 * 0.1 * 1
        by_unit[units] /= 1 + 2 * 0.1 * 2
        block = model.blocks[i]
        for name, columns in (("attn.proj", by_head.flatten()), ("mlp.fc2", by_unit)):
            expected = before[f"blocks.{i}.{name}.weight"] * columns
            torch.testing.assert_close(block.get_submodule(name).weight.data, expected, rtol=1e-6, atol=0)
    assert torch.equal(model.blocks[0].mlp.fc1.weight, before["blocks.0.mlp.fc1.weight"])
    search.step_number = 0
    calls = []
    search._shrink = lambda norms: calls.append(norms)
    search.step(*batches(model)[0])
    assert len(calls) == 1  # in every step, the warm-up's, too
    search.close()


def test_bounds_of_the_released_solver():  # T4, T9
    """With rates that would take everything: never the last head, dimension or unit, and no dual below zero."""
    told = dict(slr=50.0, rlr=50.0, ylr=1.0, plr=1.0, enable_warmup=0, z_grad_clip=1.0, enable_block_gating=0)
    model, search, _ = released(**told)
    ends = set()
    for k in range(10):
        search.z.fill_(50.0 if k % 2 else 0.0)  # pulled to either end
        search.step(*batches(model, 1, seed=k)[0])
        assert (search.s >= 0).all() and (search.s <= torch.tensor([3.0, 127.0])).all()
        assert (search.r >= 0).all() and (search.r <= 7).all()
        assert all((dual >= 0).all() for dual in (search.y, search.p, search.z))
        ends |= set(search.s[:, 0].tolist())
        assert all(b is None or (b.heads and b.units and all(b.values)) for b in search.plan().blocks)
    assert {0.0, 3.0} <= ends
    search.close()


@pytest.mark.parametrize("warmup", [0.0, 0.5])
def test_warmup(warmup):  # T19
    model = vit()
    search = CorrectedSearch(model, 0.5, 20, settings=settings(warmup=warmup, ramp=1.0))
    measured = ("importance", "seen")  # they only watch
    frozen = {n: v.detach().clone() for n, v in search.variables().items() if n not in measured}
    weights = model.blocks[0].mlp.fc1.weight.detach().clone()
    run(search, batches(model), 10)
    assert not torch.equal(weights, model.blocks[0].mlp.fc1.weight)
    same = all(torch.equal(v, frozen[n]) for n, v in search.variables().items() if n in frozen)
    assert same == (warmup > 0)
    run(search, batches(model), 1)
    assert not torch.equal(search.fractions, frozen["fractions"]) and not torch.equal(search.logits, frozen["logits"])
    zs = [entry["z"] for entry in search.history]
    assert max(zs) > 0 and (warmup == 0 or max(zs[:10]) == 0)


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("dims", [False, True])
def test_the_budget_is_met(budget, dims):  # T8
    model = vit(dtype=torch.float32)
    history = []
    plan = uvc.search(model, batches(model), budget, steps=30, settings=settings(dims=dims), history=history)
    shapes = plan.shapes
    dense = uvc.dense_macs(shapes)
    group = 2 * 17 * 32 * 4  # of one chunk of four units
    assert budget - group / dense <= plan.ratio() <= budget
    assert plan.ratio() == pytest.approx(plan.origin["predicted_ratio"]) and len(history) == 30
    for block in plan.blocks:
        if block is not None:
            widths = {len(v) for v in block.values}
            assert len(block.units) % 4 == 0 and len(widths) == 1 and (dims or widths == {8}) and widths.pop() % 2 == 0
    x = images(model)
    masked, small = uvc.mask(model, plan).eval(), sliced(model, plan).eval()
    torch.testing.assert_close(masked(x), small(x), rtol=1e-4, atol=1e-4)
    assert counted(small) == 2 * (plan.macs() + uvc.head_macs(small))
    assert history[-1]["settled"] and history[-1]["ratio"] == pytest.approx(plan.ratio())


def test_budgets_that_cannot_be_met():  # T8
    model = vit()
    state, modules = copy.deepcopy(model.state_dict()), [id(m) for m in model.modules()]
    embed = uvc.read_shapes(model).embed_macs / uvc.dense_macs(uvc.read_shapes(model))
    for budget in (embed, 0.01):
        with pytest.raises(ValueError, match=r"cannot be met: the smallest plan of these settings has 0\.0\d\d\d"):
            CorrectedSearch(model, budget, 10, settings=settings())
    with pytest.raises(ValueError, match="cannot be met: the smallest plan of these settings has 0.7170"):
        CorrectedSearch(model, 0.5, 10, settings=settings(units=False, blocks=False))
    for budget in (0.0, 1.2, -1, "half", True, math.nan):
        with pytest.raises(ValueError, match=r"must be a part of the dense model's FLOPs, in \(0, 1\]"):
            uvc.search(model, batches(model), budget, settings=settings())
    with pytest.raises(ValueError, match="cannot be met with blocks"):
        uvc.magnitude_plan(model, 0.08, round_units=4)
    assert [id(m) for m in model.modules()] == modules and not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_repair_restores_and_skips_blocks():  # T8
    model = vit()
    shapes = uvc.read_shapes(model)
    norms, flops = group_norms(model, shapes), FlopsCost(shapes)
    whole = [Counts(4, 8, 128)] * 4
    gates = [0.4, 0.3, 0.2, 0.1]
    too_few = meet(flops, norms, 0.7, start=[whole[0], None, None, None], gates=gates, round_units=4)
    assert [b is not None for b in too_few.blocks] == [True, True, True, False] and 0.69 < too_few.ratio() <= 0.7
    tight = meet(flops, norms, 0.06, start=whole, gates=gates, round_units=4)
    assert tight.blocks[0] is not None and tight.blocks[3] is None and tight.ratio() <= 0.06
    kept = meet(flops, norms, 0.7, start=[whole[0], None, None, whole[3]], round_units=4)
    assert [b is not None for b in kept.blocks] == [True, False, False, True]
    least = [min(norms[0].units.tolist()), max(norms[0].units.tolist())]
    plan = uvc.magnitude_plan(model, 0.9, round_units=1)
    lost = set(range(128)) - set(plan.blocks[0].units)
    if lost:
        assert norms[0].units[list(lost)].max() <= norms[0].units[list(plan.blocks[0].units)].min()
    assert least[0] < least[1]


def test_units_go_as_well_as_heads():  # T16
    model = vit(dtype=torch.float32)
    plan = uvc.search(model, batches(model), 0.5, steps=40, settings=settings())
    gone = [128 - len(b.units) for b in plan.blocks if b is not None]
    assert sum(gone) > 0.05 * 128 * len(gone)
    assert any(len(b.heads) < 4 for b in plan.blocks if b is not None) or None in plan.blocks
    model = vit(dtype=torch.float32)
    plan = uvc.search(model, batches(model), 0.5, steps=40, settings=settings(heads=False))
    assert all(len(b.heads) == 4 for b in plan.blocks if b is not None)
    assert 0.5 - 2 * 17 * 32 * 4 / uvc.dense_macs(plan.shapes) <= plan.ratio() <= 0.5


def test_masks_are_made_anew():  # T17
    model = vit()
    search = CorrectedSearch(model, 0.5, 10, settings=settings())
    x = images(model)
    before = model.eval()(x)
    search.hooks.set_masks(uvc.magnitude_plan(model, 0.5, round_units=4), search.device)
    assert not torch.equal(model(x), before)
    search.hooks.set_masks(whole_plan(search.shapes), search.device)
    assert all((m == 1).all() for m in search.hooks.masks.values()) and torch.equal(model(x), before)
    search.close()
    faithful = FaithfulSearch(model, steps_per_epoch=1)
    state = copy.deepcopy(model.state_dict())
    faithful.s += torch.tensor([2.0, 60.0])
    assert all(len(b.heads) == 2 and len(b.units) == 68 for b in faithful.plan().blocks)
    faithful.s.zero_()
    assert faithful.plan().blocks == whole_plan(search.shapes).blocks
    masked = uvc.mask(model, faithful.plan())
    assert all(torch.equal(t, state[n]) for n, t in masked.state_dict().items())
    faithful.close()


@pytest.mark.parametrize("importance", ["loss", "norms"])
def test_a_small_budget_moves_from_the_first_step(importance):  # T21
    model = vit()
    search = run(CorrectedSearch(model, 0.2, 100, settings=settings(importance=importance)), batches(model), 1)
    assert search.z > 0 and (search.fractions[:, 1] > 0).all() and (search.logits != search.first_logits()).all()
    assert importance == "loss" or (search.fractions[:, 0] > 0).all()  # heads may all be worth more than any unit
    search.close()
    told = flags(budget=0.4, enable_block_gating=0, enable_warmup=0)  # the authors' clamp at work
    search = run(FaithfulSearch(model, told, steps_per_epoch=100), batches(model), 20)
    assert search.z > 1 and (search.s == 0).all() and (search.r == 0).all()
    search.close()
    search = run(
        FaithfulSearch(model, dataclasses.replace(told, z_grad_clip=1.0), steps_per_epoch=100), batches(model), 20
    )
    assert (search.s[:, 0] > 0).all()
    search.close()


def test_masks_are_in_the_forward_at_the_end():
    """What is trained after the ramp is the plan's network: slicing it changes nothing."""
    model = vit(dtype=torch.float32)
    search = CorrectedSearch(model, 0.5, 20, settings=settings(ramp=0.5))
    run(search, batches(model), 15)
    assert search.found is not None and not search.done
    x = images(model)
    training = model.eval()(x)
    run(search, batches(model), 5)
    after = model.eval()(x)
    assert not torch.allclose(training, after)
    plan = search.plan()
    search.close()
    torch.testing.assert_close(sliced(model, plan)(x), after, rtol=1e-4, atol=1e-4)


def test_patches_are_found_and_gathered():  # T26
    model = vit(dtype=torch.float32)
    data = batches(model)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.proj.weight.zero_()  # no token sees another ...
            block.attn.proj.bias.zero_()
        model.blocks[0].attn.proj.weight.normal_()
    plan = uvc.search(model, data, 0.4, steps=20, settings=settings(keep_patches=6))
    assert len(plan.patches) == 6 and plan.ratio() <= 0.4
    small = sliced(model, plan).eval()
    assert counted(small) == 2 * (plan.macs() + uvc.head_macs(small))
    with pytest.raises(ValueError, match=r"keep_patches=17 is outside 1\.\.16"):
        CorrectedSearch(model, 0.4, 20, settings=settings(keep_patches=17))


def test_patches_go_before_a_short_ramp_ends():
    """The plan has the patches that the rest of the search was trained with."""
    model, history = vit(dtype=torch.float32), []
    chosen = settings(keep_patches=8, ramp=0.05)
    plan = uvc.search(model, batches(model), 0.5, steps=40, settings=chosen, history=history)
    assert len(plan.patches) == 8 and plan.ratio() <= 0.5 and history[1]["settled"]
    small = sliced(model, plan)
    assert counted(small) == 2 * (plan.macs() + uvc.head_macs(small))


def test_a_warmup_that_leaves_no_step():
    model = vit()
    with pytest.raises(ValueError, match=r"search: steps=5 must be more than the warm-up takes \(5, warmup=0.95\)"):
        CorrectedSearch(model, 0.5, 5, settings=settings(warmup=0.95))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    CorrectedSearch(model, 0.5, 6, settings=settings(warmup=0.8)).close()


def test_patches_that_the_loss_reads_stay():
    """The loss depends on four patches alone: they are what the search keeps."""
    model = vit(dtype=torch.float32)
    read = [1, 6, 11, 12]

    def loss(m, x, y):
        tokens = m.patch_drop(m._pos_embed(m.patch_embed(x)))
        if tokens.shape[1] == 17:
            return tokens[:, [1 + p for p in read]].square().mean() + 0 * m(x).sum()
        return m(x).square().mean()

    search = run(CorrectedSearch(model, 0.4, 30, loss=loss, settings=settings(keep_patches=4)), batches(model), 4)
    assert list(search.patches) == read
    search.close()


# --- resume, processes -----------------------------------------------------------------------------------------------


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def released(**told):
    """A small model, the authors' search of it in its only epoch, and its norms."""
    model = vit()
    search = FaithfulSearch(model, flags(num_epochs=1, **told), steps_per_epoch=100)
    search.step_number = 1
    return model, search, search.norms()


def make(mode, model, **more):
    if mode == "faithful":
        told = flags(num_epochs=3, warmup_epochs=1, gating_interval=3, warmup_steps=2)
        return FaithfulSearch(model, told, steps_per_epoch=4, **more)
    patches = 8 if mode == "patches" else None
    return CorrectedSearch(model, 0.5, 16, settings=settings(dims=True, keep_patches=patches), **more)


@pytest.mark.parametrize("stop", [3, 9, 13])
@pytest.mark.parametrize("mode", ["corrected", "patches", "faithful"])
def test_resume(mode, stop, tmp_path):  # T22
    def model():
        return vit(dtype=torch.float32, proj_drop_rate=0.1)

    data = batches(model(), 16)
    whole = run(make(mode, model()), data, 16)
    first = run(make(mode, model()), data, stop)
    torch.save(first.state_dict(), tmp_path / "search.pt")
    torch.manual_seed(99)
    second = make(mode, vit(seed=5, dtype=torch.float32, proj_drop_rate=0.1))
    second.load_state_dict(torch.load(tmp_path / "search.pt"))  # weights_only: plain data
    for k in range(stop, 16):
        second.step(*data[k])
    assert same(whole.state_dict(), second.state_dict()) and second.done
    assert whole.plan() == second.plan()
    other = CorrectedSearch(model(), 0.7, 16, settings=settings())
    with pytest.raises(ValueError, match=r"load_state_dict: (mode|budget) was"):
        other.load_state_dict(first.state_dict())


def test_search_goes_on_from_a_state():  # T22
    data = batches(vit(dtype=torch.float32), 5)
    model, history = vit(dtype=torch.float32), []
    whole = uvc.search(model, data, 0.5, steps=16, settings=settings(), history=history)
    again = vit(dtype=torch.float32)
    search = run(CorrectedSearch(again, 0.5, 16, settings=settings()), data, 7)
    state = search.state_dict()
    search.close()
    other, told = vit(seed=4, dtype=torch.float32), []
    assert uvc.search(other, data, 0.5, steps=16, settings=settings(), state=state, history=told) == whole
    assert told == history and all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


@pytest.mark.parametrize("mode", ["corrected", "patches", "faithful"])
def test_a_state_in_memory_is_a_copy(mode):
    """It stays what it was while its search goes on, and while a search that took it goes on."""

    def model(seed=0):
        return vit(seed=seed, dtype=torch.float32)

    data = batches(model(), 16)
    first = run(make(mode, model()), data, 5)
    state = first.state_dict()
    for batch in data[5:]:
        first.step(*batch)
    for seed in (5, 6):
        again = make(mode, model(seed))
        again.load_state_dict(state)
        for batch in data[5:]:
            again.step(*batch)
        assert same(first.state_dict(), again.state_dict())


@pytest.mark.parametrize("keep", [None, 8])
def test_an_early_state_unsettles(keep):
    """A search that has decided goes back to a state of before: masks, kept patches and the plan go."""

    def search():
        return CorrectedSearch(vit(dtype=torch.float32), 0.5, 16, settings=settings(keep_patches=keep))

    data = batches(vit(dtype=torch.float32), 16)
    early, whole = run(search(), data, 1), run(search(), data, 16)
    back = run(search(), data, 12)
    assert back.found is not None
    back.load_state_dict(early.state_dict())
    assert back.found is None and back.patches is None and not back.hooks.masks and back.hooks.keep is None
    x = images(back.model)
    assert torch.equal(back.model.eval()(x), early.model.eval()(x))
    with pytest.raises(RuntimeError, match="1 are done"):
        back.plan()
    for batch in data[1:]:
        back.step(*batch)
    assert same(whole.state_dict(), back.state_dict()) and whole.plan() == back.plan()


def test_search_gives_the_modes_back():
    model = vit(dtype=torch.float32, proj_drop_rate=0.1)
    model.blocks[1].train()
    before = {n: m.training for n, m in model.named_modules()}
    uvc.search(model, batches(model), 0.5, steps=4, settings=settings())
    assert {n: m.training for n, m in model.named_modules()} == before and not model.training
    with pytest.raises(TrainingDiverged):
        uvc.search(model, batches(model), 0.5, steps=4, loss=lambda m, x, y: m(x).sum() * math.nan)
    assert {n: m.training for n, m in model.named_modules()} == before


def _in_a_group(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for mode in ("patches", "faithful"):
        model = vit(seed=rank, dtype=torch.float32, proj_drop_rate=0.1)  # rank 0's weights hold
        search = run(make(mode, model), batches(model, 14, seed=100 + rank), 14)
        variables = {n: v.detach().clone() for n, v in search.variables().items()}
        weights = {n: t.clone() for n, t in model.state_dict().items()}
        torch.save((variables, weights, search.plan().to_json(), search.history), folder / f"{mode}{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_decide_alike(tmp_path):  # T23
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=_in_a_group, args=(rank, tmp_path)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
        assert process.exitcode == 0
    for mode in ("patches", "faithful"):
        first, second = (torch.load(tmp_path / f"{mode}{rank}.pt") for rank in (0, 1))
        assert same(first, second)
        model = vit(dtype=torch.float32, proj_drop_rate=0.1)
        alone = run(make(mode, model), batches(model, 14, seed=100), 14)
        assert not same(first[0], {n: v.detach() for n, v in alone.variables().items()})  # rank 1's data count
        alone.close()


# --- the authors' solver ---------------------------------------------------------------------------------------------


def test_readme_flags():  # T20
    parsed = from_flags(README, inert="drop")
    assert parsed.flags == Flags()  # every constant of the command is the default
    nothing = "enable_patch_gating patch_weight patch_l1_weight patchloss patchlr warmup_lr eps eps_decay"
    assert set(parsed.inert) == set(nothing.split())
    assert parsed.caller["distillation_alpha"] == "0.1" and parsed.caller["uvc_train"] is True
    with pytest.raises(ValueError, match="--enable_patch_gating 1: it saves no FLOPs"):
        from_flags(README)
    for name in parsed.inert:
        with pytest.raises(ValueError, match=f"--{name} .*: it .*; leave it out"):
            from_flags({name: 1})
    assert from_flags({"--enable_patch_gating": 0, "eps": 0.2, "use-gumbel": 0}).flags == Flags(eps=0.2, use_gumbel=0)
    assert from_flags(["--budget=0.6", "--glr", "1e-3"]).flags == Flags(budget=0.6, glr=1e-3)
    cases = {
        "--budgett is no flag of UVC; did you mean --budget": {"budgett": 1},
        "--enable_pruning 0: it calls a function with 14": {"enable_pruning": 0},
        "--flops_with_mhsa 0: it crashes": {"flops_with_mhsa": "0"},
        "--num_epochs 'many' must be a whole number": {"num_epochs": "many"},
        "--budget 1.5 must be in": {"budget": 1.5},
        "--use_gumbel 2 must be 0 or 1": {"use_gumbel": 2},
        "--glr nan must be a finite number": {"glr": "nan"},
        "'0.5' follows no flag": ["0.5"],
        "'0.6' follows no flag": ["--budget", "0.5", "0.6"],
        "--budget is given twice": ["--budget", "0.5", "--budget", "0.6"],
        "inert='ignore' must be": None,
    }
    for message, words in cases.items():
        with pytest.raises(ValueError, match=message):
            from_flags(words) if words is not None else from_flags({}, inert="ignore")


def test_zlr_schedule():  # T20
    assert zlr_schedule("1,5,9,13,17", 30) == {0: 1, 6: 5, 12: 9, 18: 13, 24: 17}
    for text in ("", "1,x", "1;5", "-1", "inf", ",".join("1" * 31)):
        with pytest.raises(ValueError, match="--zlr_schedule_list"):
            zlr_schedule(text, 30)
    model = vit()
    told = Flags(num_epochs=4, zlr_schedule_list="1,50", enable_warmup=0)
    rates = {}
    for follow in (False, True):
        search = FaithfulSearch(model, told, steps_per_epoch=2, follow_zlr_schedule=follow)
        rates[follow] = []
        for k in range(8):
            search.step(*batches(model)[k % 3])
            rates[follow].append(search.z_rate())
            before = search.history[-2]["z"] if k else 1e-3
            expected = max(0.0, before + search.z_rate() * (search.history[-1]["ratio"] - 0.5))
            assert search.history[-1]["z"] == pytest.approx(expected, rel=1e-5)  # T9, exactly
        search.close()
    assert rates == {False: [1] * 8, True: [1, 1, 50, 50, 50, 50, 50, 50]}


def test_faithful_warmup_and_duals():  # T9, T19
    model = vit()
    data = batches(model)
    search = FaithfulSearch(model, flags(num_epochs=4, warmup_epochs=2, gating_interval=2), steps_per_epoch=3)
    frozen = {n: v.detach().clone() for n, v in search.variables().items()}
    seen = []
    model.blocks[0].register_forward_hook(lambda m, i, o: seen.append((i[0], o)))
    run(search, data, 6)
    assert all(torch.equal(v, frozen[n]) for n, v in search.variables().items())
    block = model.blocks[0]
    search.hooks.remove()
    before, out = seen[-1]
    assert before.shape == out.shape  # the hook above sees the half-weighted block
    search = FaithfulSearch(model, flags(num_epochs=4, warmup_epochs=2, gating_interval=2), steps_per_epoch=3)
    assert torch.equal(search.draw_gates(), torch.full((4,), 0.5)) and block is model.blocks[0]
    run(search, data, 6)
    y, p = search.y.clone(), search.p.clone()
    search.s += 1.5
    search.r += 2.5
    for k in range(6):
        search.step(*data[k % 3])
        assert (search.y >= y).all() and (search.p >= p).all() and search.z >= 0
        y, p = search.y.clone(), search.p.clone()
    assert (search.y > 1e-3).all() and not torch.equal(search.logits, frozen["logits"])
    search.close()
    off = FaithfulSearch(model, flags(num_epochs=4, enable_warmup=0), steps_per_epoch=3)
    run(off, data, 1)
    assert off.z != 1e-3
    off.close()


def test_faithful_starves_units():
    """P1 and P3: heads go to the limit, hidden units hardly move, z winds up."""
    model = vit(dtype=torch.float32)
    told = flags(num_epochs=2, enable_warmup=0, learning_rate=1e-3, enable_block_gating=0, slr=0.1, z_grad_clip=1.0)
    search = run(FaithfulSearch(model, told, steps_per_epoch=60), batches(model), 120)
    fractions = search.s / search.s_limit
    assert fractions[:, 0].min() == 1 and fractions[:, 1].max() < 0.1
    assert search.z > 10 and search.plan().ratio() > 0.6  # far from the budget
    search.close()


def test_faithful_without_gumbel():
    model = vit()
    told = flags(use_gumbel=0, num_epochs=4, warmup_epochs=1, gating_interval=1)
    search = run(FaithfulSearch(model, told, steps_per_epoch=2), batches(model), 6)
    assert search.eps() == pytest.approx(0.1 * 0.92)
    g = search.logits.detach()
    torch.testing.assert_close(search.sample(g, "any", 1), g[:, 1] ** 2 / (g[:, 1] ** 2 + search.eps()))
    search.close()


def test_faithful_through_search():
    model, history = vit(dtype=torch.float32), []
    told = flags(num_epochs=2, warmup_epochs=1)
    plan = uvc.search(model, batches(model), mode="faithful", settings=told, history=history)
    assert len(history) == 9 and plan.origin["flags"]["num_epochs"] == 2  # three epochs of three steps
    assert [h["warmup"] for h in history] == [True] * 3 + [False] * 6
    assert history[-1]["exported"] == pytest.approx(plan.ratio(), rel=1e-5)


# --- latency ---------------------------------------------------------------------------------------------------------


def table(**more):
    values = dict(
        heads=(1, 2, 4),
        attention_ms=(1.0, 1.5, 2.0),
        units=(32, 64, 128),
        mlp_ms=(0.5, 1.0, 2.0),
        rest_ms=1.0,
        about={},
    )
    return LatencyTable(**values | more)


def test_a_budget_in_milliseconds():
    model = vit(dtype=torch.float32)
    shapes = uvc.read_shapes(model)
    cost = LatencyCost(shapes, table())
    assert cost.dense == 17 and cost.mlp(0, 96) == 1.5 and cost.attention(0, 3, 8) == 1.75
    assert LatencyTable.from_json(table().to_json()) == table()
    s = torch.tensor([[1.0, 32.0]] * 4, requires_grad=True)
    ratio = cost.ratio(s, torch.zeros(4, 4), torch.zeros(4, 4), torch.ones(4))
    ratio.backward()
    assert ratio.item() == pytest.approx((1 + 4 * 3.25) / 17)
    torch.testing.assert_close(s.grad, torch.tensor([[-0.25 / 17, -1 / 64 / 17]] * 4))
    plan = uvc.search(model, batches(model), 0.6, steps=30, settings=settings(), latency=table())
    kept = [b for b in plan.blocks if b is not None]
    ms = 1 + sum(cost.attention(0, len(b.heads), 8) + cost.mlp(0, len(b.units)) for b in kept)
    assert 0.6 * 17 - 4 / 64 <= ms <= 0.6 * 17 and plan.origin["in"] == "latency"
    cases = {
        "knows no value dimensions": dict(settings=settings(dims=True), latency=table()),
        "a latency table is of all patches": dict(settings=settings(keep_patches=4), latency=table()),
        "ends at 2 heads and 128 units; block 0 has 4": dict(latency=table(heads=(1, 2), attention_ms=(1.0, 1.5))),
    }
    for message, arguments in cases.items():
        with pytest.raises(ValueError, match=message):
            CorrectedSearch(model, 0.6, 30, **arguments)
        assert not any(m._forward_hooks for m in model.modules())


def test_the_table_is_measured():
    torch.manual_seed(0)
    model = VisionTransformer(img_size=96, patch_size=8, embed_dim=128, depth=4, num_heads=4, num_classes=10)
    state, training = copy.deepcopy(model.state_dict()), model.training
    measured = uvc.measure_latency(model, images(model, 4), points=2, rounds=5, clock=time.process_time)
    assert measured.heads == (2, 4) and measured.units == (256, 512) and measured.about["batch"] == 4
    assert min(*measured.mlp_ms, *measured.attention_ms) > 0
    assert model.training == training and all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    with pytest.raises(ValueError, match="whose blocks are all alike"):
        uvc.measure_latency(sliced(model, uvc.random_plan(model, 0.6, 0)))


def test_a_table_of_another_model_is_refused():
    measured = uvc.measure_latency(vit(dtype=torch.float32), points=2, rounds=1, clock=time.process_time)
    assert [measured.about[n] for n in ("width", "tokens", "depth")] == [32, 17, 4]
    LatencyCost(uvc.read_shapes(vit(seed=3)), measured)
    others = {
        "width 32; this one has 24": dict(embed_dim=24),
        "tokens 17; this one has 5": dict(patch_size=8),
        "depth 4; this one has 3": dict(depth=3),
    }
    for message, other in others.items():
        with pytest.raises(ValueError, match=f"the latency table is of a model of {message}: measure it on this"):
            uvc.magnitude_plan(vit(**other), 0.9, latency=measured)


# --- controls, end to end --------------------------------------------------------------------------------------------


def test_controls_have_the_same_form_and_cost():
    model = vit()
    plans = [
        uvc.magnitude_plan(model, 0.5, round_units=4),
        *(uvc.random_plan(model, 0.5, s, round_units=4) for s in range(3)),
    ]
    group = 2 * 17 * 32 * 4 / uvc.dense_macs(plans[0].shapes)
    for plan in plans:
        assert 0.5 - group <= plan.ratio() <= 0.5
        assert sliced(model, plan)(images(model)).isfinite().all()
    assert uvc.random_plan(model, 0.5, 1, round_units=4) == plans[2] != plans[3]
    skipped = uvc.random_plan(model, 0.5, 0, skip=[1], round_units=4)
    assert skipped.blocks[1] is None and 0.5 - group <= skipped.ratio() <= 0.5
    with pytest.raises(ValueError, match=r"skip: block 7 is outside 0\.\.3"):
        uvc.magnitude_plan(model, 0.5, skip=[7])
    with pytest.raises(ValueError, match="must be at least 1"):
        uvc.magnitude_plan(model, 0.5, round_units=0)
    uneven = sliced(model, uvc.Plan(plans[0].shapes, (dataclasses.replace(
        whole_plan(plans[0].shapes).blocks[0], values=((0,), *[tuple(range(8))] * 3)
    ), *whole_plan(plans[0].shapes).blocks[1:])))  # fmt: skip
    with pytest.raises(ValueError, match="heads of 1 to 8 value dimensions"):
        uvc.magnitude_plan(uneven, 0.5)


def test_end_to_end_beats_random():  # T24
    """The embedded backbone on the embedded images at half the FLOPs, against random pruning with the same training."""
    model = create("embedded_vit", checkpoint="embedded")
    transform = transforms(model, train=False)
    train = load("fashion_mnist_10k", "train", transform=transform, limit=1024)
    test = load("fashion_mnist_10k", "test", transform=transform, limit=300)
    x, labels = fetch(train, range(len(train)))
    test_x, test_labels = fetch(test, range(len(test)))
    data = [(x[i : i + 32], labels[i : i + 32]) for i in range(0, 1024, 32)]

    @torch.no_grad()
    def accuracy(m):
        return (m.eval()(test_x).argmax(1) == test_labels).float().mean().item()

    dense = accuracy(model)
    found, teacher = copy.deepcopy(model), copy.deepcopy(model)
    loss = Distill(teacher, 0.5, 2.0)
    plan = uvc.search(found, data, 0.5, steps=24, loss=loss, settings=Settings(lr=5e-4))
    before = accuracy(found)
    small = sliced(found, plan)
    assert plan.ratio() <= 0.5 and accuracy(small) > dense - 0.12
    assert abs(accuracy(small) - before) < 0.1  # no jump at the masks
    control = sliced(model, uvc.random_plan(model, 0.5, 0))
    optimizer = torch.optim.AdamW(control.parameters(), 5e-4, weight_decay=0.05)
    control.train()
    for k in range(24):
        optimizer.zero_grad()
        loss(control, *data[k % 32]).backward()
        optimizer.step()
    assert accuracy(small) > accuracy(control)


def test_importance_is_the_mean_of_squared_gradients():
    """Against a loop over images with one mask for each group, on a model whose loss is known image by image."""
    model = vit()
    search = CorrectedSearch(model, 0.9, 10, settings=settings(blocks=False, lr=0.0, weight_decay=0.0))
    x, y = batches(model)[0]
    reference = [torch.zeros(4, 4), torch.zeros(4, 128)]
    for image, label in zip(x, y, strict=True):
        masks = [(torch.ones(4, requires_grad=True), torch.ones(128, requires_grad=True)) for _ in model.blocks]
        hooks = []
        for block, (heads, units) in zip(model.blocks, masks, strict=True):
            h = heads.double().repeat_interleave(8)
            hooks.append(block.attn.proj.register_forward_pre_hook(lambda m, i, h=h: (i[0] * h,)))
            hooks.append(block.mlp.fc2.register_forward_pre_hook(lambda m, i, u=units: (i[0] * u.double(),)))
        loss = torch.nn.functional.cross_entropy(model(image[None]).float(), label[None])
        grads = torch.autograd.grad(loss, [m for pair in masks for m in pair])
        for i in range(4):
            reference[0][i] += grads[2 * i].square() / len(x)
            reference[1][i] += grads[2 * i + 1].square() / len(x)
        for hook in hooks:
            hook.remove()
    search.step(x, y)
    found = as_norms(search.shapes, search.importance)
    for i, n in enumerate(found):
        torch.testing.assert_close(n.heads, reference[0][i], rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(n.units, reference[1][i], rtol=1e-4, atol=1e-9)


def test_what_costs_least_goes_first():
    """Groups of all blocks and kinds are weighed against each other: a block nothing depends on loses the most."""
    model = vit(dtype=torch.float32)
    with torch.no_grad():
        for p in (model.blocks[2].mlp.fc2.weight, model.blocks[2].attn.proj.weight):
            p.mul_(1e-3)  # its relative norms are as they were
    plans = {}
    for importance in ("loss", "norms"):
        fresh = copy.deepcopy(model)
        chosen = settings(blocks=False, importance=importance, lr=1e-6)
        plans[importance] = uvc.search(fresh, batches(fresh), 0.7, steps=20, settings=chosen)
    left = {name: [len(b.units) for b in plan.blocks] for name, plan in plans.items()}
    assert left["loss"][2] <= 16 < min(left["loss"][i] for i in (0, 1, 3))
    assert left["norms"][2] > 64  # the paper's norms cannot tell
    with pytest.raises(ValueError, match="importance='taylor' must be loss or norms"):
        Settings(importance="taylor")


def test_fixed_widths_restore_only_blocks_that_fit():
    model = vit()
    shapes = uvc.read_shapes(model)
    flops = FlopsCost(shapes)
    two = (flops.fixed + 2 * (flops.attention(0, 4, 8) + flops.mlp(0, 128))) / flops.dense
    whole = Counts(4, 8, 128)
    plan = meet(
        flops, group_norms(model, shapes), two + 0.02, start=[whole, whole, None, None], gates=[4, 3, 2, 1],
        fixed=("heads", "units"),
    )  # fmt: skip
    assert [b is not None for b in plan.blocks] == [True, True, False, False] and plan.ratio() == pytest.approx(two)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input():
    model = vit()
    data = batches(model)
    one_class = [(x, torch.zeros_like(y)) for x, y in data]
    cases = [
        (ValueError, "all labels are class 0; a search needs images of at least two", dict(batches=one_class)),
        (ValueError, "there are no batches", dict(batches=[])),
        (TypeError, "gone through only once", dict(batches=iter(data))),
        (ValueError, "mode='exact' must be corrected or faithful", dict(mode="exact")),
        (ValueError, "budget= is missing", dict(budget=None)),
        (ValueError, "takes Settings, not Flags", dict(settings=Flags())),
        (ValueError, "takes Flags, not Settings", dict(mode="faithful", settings=Settings())),
        (ValueError, "contradicts the flag --budget 0.6", dict(mode="faithful", settings=Flags(budget=0.6))),
        (ValueError, "goes by epochs", dict(mode="faithful", steps=5)),
        (ValueError, "knows FLOPs only", dict(mode="faithful", latency=table())),
        (ValueError, "steps=0 must be a whole number", dict(steps=0)),
    ]
    for error, message, change in cases:
        arguments = {"batches": data, "budget": 0.5, **change}
        with pytest.raises(error, match=message):
            uvc.search(model, arguments.pop("batches"), arguments.pop("budget"), **arguments)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        CorrectedSearch(vit().requires_grad_(False), 0.5, 5)
    broken = vit()
    with torch.no_grad():
        broken.blocks[2].mlp.fc2.weight[0, 0] = math.nan
    for call in (lambda: CorrectedSearch(broken, 0.5, 5), lambda: uvc.magnitude_plan(broken, 0.5)):
        with pytest.raises(ValueError, match="blocks.2.mlp.fc2 has weights that are not finite"):
            call()
    search = CorrectedSearch(model, 0.5, 2, loss=lambda m, x, y: m(x).sum() * math.inf)
    with pytest.raises(TrainingDiverged, match="the loss is .* at step 1 of 2"):
        search.step(*data[0])
    with pytest.raises(RuntimeError, match="is decided at step 1 of 2; 0 are done"):
        search.plan()
    search.close()
    with pytest.raises(RuntimeError, match="is closed"):
        search.step(*data[0])


@pytest.mark.parametrize("mode", ["corrected", "faithful"])
def test_an_open_search_is_closed_first(mode, tmp_path):
    """Its gates would go with the model, or act on the wrong blocks."""
    model = vit(dtype=torch.float32)
    search, plan = make(mode, model), uvc.magnitude_plan(model, 0.5, round_units=4)
    for net in (model, copy.deepcopy(model)):
        for what, call in {
            "export": lambda net=net: export(net, tmp_path / "a.pt2", images(model)),
            "apply": lambda net=net: uvc.apply(net, plan),
        }.items():
            with pytest.raises(ValueError, match=rf"{what}: a UVC search is open on this \w+; call its close\(\)"):
                call()
    search.close()
    uvc.apply(model, plan)
    assert len(model.uvc_plans) == 1


def test_soft_labels_of_one_class():
    model = vit(dtype=torch.float32)
    x = batches(model)[0][0]
    soft = [(x, torch.tensor([[0.1, 0.1, 0.6, 0.1, 0.1]]).repeat(4, 1))] * 2
    with pytest.raises(ValueError, match="all labels are class 2; a search needs images of at least two"):
        uvc.search(model, soft, 0.5, steps=2)
    one = torch.nn.functional.one_hot(torch.tensor([2]), 5).float()
    uvc.search(model, [*soft, (x[:1], one.roll(1, 1))], 0.5, steps=2, settings=settings())
    scores = [(x, torch.full((4, 5), 0.7))]  # no probabilities: for a loss that the caller knows
    uvc.search(model, scores, 0.5, steps=2, loss=lambda m, x, y: (m(x) - y).square().mean(), settings=settings())


@pytest.mark.parametrize("mode", ["corrected", "faithful"])
def test_cross_entropy_needs_one_classifier(mode):
    told = dict(settings=flags(), mode=mode) if mode == "faithful" else dict(budget=0.5, steps=2, settings=settings())
    model = vit(num_classes=0)
    data = [(x, y % 4) for x, y in batches(vit())]
    with pytest.raises(ValueError, match="search: VisionTransformer has no classifier head"):
        uvc.search(model, data, **told)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    search = CorrectedSearch(model, 0.5, 2, loss=lambda m, x, y: m(x).square().mean(), settings=settings())
    run(search, data, 2)
    distilled = VisionTransformerDistilled(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=5, class_token=True
    ).double()
    distilled.set_distilled_training(True)
    with pytest.raises(ValueError, match="search: VisionTransformerDistilled gives 2 outputs in training.*Distill"):
        uvc.search(distilled, data, **told)
    distilled.set_distilled_training(False)
    run(CorrectedSearch(distilled, 0.5, 2, settings=settings()), data, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 1}, "heads=1 must be True or False"),
        ({"ramp": 0.0}, r"ramp=0.0 must be in \(0, 1\]"),
        ({"warmup": 1.0}, "warmup=1.0"),
        ({"y_limit": -1}, "y_limit=-1 must be >= 0"),
        ({"lr": math.nan}, "lr=nan is not a finite number"),
        ({"round_units": 2.5}, "round_units=2.5 must be a whole number"),
        ({"round_units": 0}, "round_units=0 must be a whole number of at least 1"),
        ({"heads": False, "units": False, "blocks": False}, "nothing may go"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        Settings(**change)
