"""What UVC's released solver does whatever the images: schedules, gates, duals, flags, the defects that decided it.

The code released with arXiv 2203.08243, as the specification of UVC describes it (sections 2.2 to 5.1).

Shown by running `FaithfulSearch` on random weights, by parsing the README's command, or by a few lines of torch.
"""

import math
from dataclasses import replace

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.data import DistributedSampler

from leanvit.distill import Distill
from leanvit.uvc_faithful import FaithfulSearch
from leanvit.uvc_flags import INERT, ONLY, README, Flags, from_flags
from leanvit.uvc_math import ascend, hard_gate, logistic_noise, shrink_, soft_gate
from leanvit.uvc_plan import Plan, Shapes, read_shapes, whole_plan

Value = float | bool
DEIT = {"t": "deit_tiny_patch16_224", "s": "deit_small_patch16_224", "b": "deit_base_patch16_224"}
IMAGENET = 1_281_167  # training images


def measured() -> dict[str, Value]:
    """The structural claims about the released code that need nothing; see `counts_uvc.measured`."""
    found: dict[str, Value] = {}
    for part in (gates, solver, schedules, flags, defects):
        found |= part()
    return found


def on_meta(name: str) -> nn.Module:
    """A timm model that has shapes and no weights."""
    with torch.device("meta"):
        return timm.create_model(name).eval()


def small_vit(dtype: torch.dtype = torch.float64) -> nn.Module:
    """A small ViT whose weights are all random, none zero."""
    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=4, num_heads=4, num_classes=5).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def skip_ratio(shapes: Shapes, skipped: int) -> float:
    """R in percent with the last `skipped` blocks gone and nothing else."""
    blocks = whole_plan(shapes).blocks
    return 100 * Plan(shapes, blocks[: len(blocks) - skipped] + (None,) * skipped).ratio()


# --- the released solver ---------------------------------------------------------------------------------------------


def faithful(steps_per_epoch: int = 4, model: nn.Module | None = None, follow: bool = False, **flags) -> FaithfulSearch:
    """The released solver on a small random ViT."""
    model = small_vit(torch.float32) if model is None else model
    return FaithfulSearch(model, Flags(**flags), steps_per_epoch=steps_per_epoch, follow_zlr_schedule=follow)


def set_duals(search: FaithfulSearch, z: float, yp: float) -> None:
    """Give the budget's multiplier and those of all counts these values, in place."""
    search.z.fill_(z)
    search.y.fill_(yp)
    search.p.fill_(yp)


def gates() -> dict[str, Value]:
    """The first gates: what they draw, and what their optimiser does. Expectations on a grid of quantiles."""
    search = faithful()
    first = search.logits.detach().clone()
    noise = torch.logit((torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000)
    logit = (first[0, 1] - first[0, 0]).double()
    hard, soft = hard_gate(logit, noise).mean().item(), soft_gate(logit, noise).mean().item()
    shapes = read_shapes(on_meta(DEIT["t"]))
    floor = skip_ratio(shapes, 12) / 100
    one = torch.ones(1, dtype=torch.float64)
    tau = (1 / torch.logit(soft_gate(one, 0 * one))).item()  # a gate of logit 1 is sigmoid(1 / tau)
    draws = hard_gate(logit.expand(12 * 4000), logistic_noise(12 * 4000, 0)).view(-1, 12).mean(1)
    inside = (floor + (1 - floor) * draws >= 0.75).double().mean().item()

    norms, ramp = search.norms(), []
    search.z.zero_()
    for interval, (task, value) in enumerate(((1.0, 0.0), (0.0, 0.0), (0.0, 1.0))):
        with torch.no_grad():
            search.logits.fill_(value)
        if interval == 2:
            search.gate_momentum.zero_()
        for t in range(1, search.flags.gating_interval + 1):
            search.step_number = t
            search.move_gates(norms, torch.full_like(first, task))
        ramp.append(search.gate_momentum[0, 0].item())
    return {
        "gate_first_skip": first[0, 0].item(),
        "gate_first_run": first[0, 1].item(),
        "gate_tau": tau,
        "gate_hard_run": hard,
        "gate_soft_mean": soft,
        "gate_r_after_warmup": floor + (1 - floor) * soft,
        "gate_ramp_mean": ramp[0],
        "gate_momentum": ramp[1] / ramp[0],
        "gate_weight_decay": ramp[2],
        "p4_gates_on": floor + (1 - floor) * soft - search.flags.z_grad_clip,
        "p5_random_draw": inside >= 0.9,
    }


def solver() -> dict[str, Value]:
    """Duals, limits and steps of the counts, the last on a DeiT-T whose heads are pulled at full rate."""
    search = faithful()
    keep_one = bool((search.s_limit == torch.tensor([3.0, 127.0])).all()) and bool((search.r_limit == 7).all())
    logits = torch.randn(4, 1000), torch.randn(4, 1000)
    per_class, textbook = (Distill(nn.Identity(), 0.1, 1.0, per_class=c).distance(*logits) for c in (True, False))
    tiny = faithful(model=timm.create_model(DEIT["t"]))
    set_duals(tiny, 1000.0, 0.0)
    tiny.move_counts(tiny.norms())
    head, unit = tiny.s.max(0).values.tolist()
    epochs = math.ceil(IMAGENET / (2 * 128)) * (tiny.flags.num_epochs - tiny.flags.warmup_epochs)
    return {
        "dual_y_first": search.y.max().item(),
        "dual_p_first": search.p.max().item(),
        "dual_z_first": search.z.item(),
        "limits_keep_one": keep_one,
        "kd_weaker": round((textbook / per_class).item(), 3),
        "count_step": head,
        "count_clip": head / tiny.flags.slr,
        "p1_unit_step": unit,
        "p1_units_in_25_epochs": epochs * unit,
    }


def schedules() -> dict[str, Value]:
    """Epochs, warm-up, learning rate, eps and the rate of z, as the released solver goes through them."""
    search, meant = faithful(600), faithful(600, follow=True)
    epochs = search.steps // search.steps_per_epoch
    rates = [search.learning_rate(t) for t in range(1, 30 * 600 + 1)]
    z_rates = {}
    for epoch in range(epochs):
        search.step_number = meant.step_number = max(0, epoch - 1) * 600 + 1
        z_rates[epoch] = (search.z_rate(), meant.z_rate())
    soft = faithful(use_gumbel=0)
    soft.step_number = soft.steps + 1  # after the last epoch
    warm = [e for e in range(epochs) if search.in_warmup(600 * e + 1) and search.in_warmup(600 * (e + 1))]
    search.step_number = 0
    gate = search.draw_gates().unique().item()
    of_one = DistributedSampler(range(IMAGENET), num_replicas=4, rank=0)
    return {
        "epochs_run": epochs,
        "warmup_gate": gate,
        "warmup_epochs": len(warm),
        "lr_warmup_steps": rates.index(max(rates)) + 1,
        "lr_peak": max(rates),
        "lr_last": rates[-1],
        "eps_last": soft.eps(),
        "zlr_real": z_rates[0][0] if len({r for r, _ in z_rates.values()}) == 1 else math.nan,
        **{f"zlr_epoch{e}": z_rates[e][1] for e in (0, 6, 12, 18, 24)},
        "steps_per_epoch_b": math.ceil(len(of_one) / 128),
    }


# --- the flags -------------------------------------------------------------------------------------------------------


def flags() -> dict[str, Value]:
    """The README's command as we read it, the hidden defaults, and what is refused."""
    parsed = from_flags(README, inert="drop")
    raw = {name.lstrip("-").replace("-", "_"): value for name, value in zip(README, README[1:], strict=False)
           if name.startswith("--")}  # fmt: skip
    found: dict[str, Value] = {}
    taken = ("budget", "enable_block_gating", "gating_weight", "use_gumbel", "glr", "z_grad_clip", "gating_interval",
             "eps", "eps_decay", "enable_warmup", "warmup_epochs", "learning_rate", "num_epochs")  # fmt: skip
    found |= {f"readme_{name}": getattr(parsed.flags, name) for name in taken}
    callers = ("train_batch_size", "distillation_alpha", "enable_deit")
    found |= {f"readme_{name}": float(parsed.caller[name]) for name in callers}
    dropped = ("patch_weight", "patch_l1_weight", "patchlr", "warmup_lr", "enable_patch_gating", "enable_pruning",
               "flops_with_mhsa")  # fmt: skip
    found |= {f"readme_{name}": float(raw[name]) for name in dropped}
    hidden = ("slr", "rlr", "ylr", "plr", "sl2wd", "weight_decay", "max_grad_norm")
    found |= {f"hidden_{name}": getattr(Flags(), name) for name in hidden}
    found |= {f"hidden_{n}": ONLY[n][0] for n in ("warmup_reset", "enable_part_gating", "enable_jumping")}
    found |= {f"hidden_{n}": ONLY[n][0] == "sgd" for n in ("soptim", "roptim")}
    found["readme_zlr_schedule_list"] = parsed.flags.zlr_schedule_list == "1,5,9,13,17"
    found["readme_distillation_type"] = parsed.caller["distillation_type"] == "soft"
    found["readme_patchloss"] = raw["patchloss"] == "l1"
    wrong = {"enable_pruning": 0, "flops_with_mhsa": 0, "soptim": "adam", "roptim": "adam"}
    for name in (*INERT, *ONLY, "eps", "eps_decay"):
        found[f"refused_{name}"] = refused(name, wrong.get(name, raw.get(name, 1)))
    return found


def refused(name: str, value: object) -> bool:
    """Whether the flag raises, by its name and with a reason."""
    try:
        from_flags({name: value})
    except ValueError as error:
        return str(error).startswith(f"--{name} {value}: it ")
    return False


# --- defects of the released code, each in a few lines ---------------------------------------------------------------


def defects() -> dict[str, Value]:
    """What decided the released solver's results."""
    z = 0.0
    for _ in range(math.ceil(IMAGENET / (2 * 128))):
        z = ascend(z, 1.0, 0.647, 0.5)  # R of the log's epoch 6
    order = [list(DistributedSampler(range(50), num_replicas=2, rank=0)) for _ in range(2)]
    column = torch.ones(3, 1, dtype=torch.float64)
    shrink_(column, torch.tensor([0]), Flags().learning_rate * 1.0)
    return {
        "p2_no_such_key": "zlr" not in torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0).param_groups[0],
        "p3_hundreds_per_epoch": 100 <= z < 1000,
        "p4_gates_off": lowest_budget_with_a_pull(),
        "p4_at_bound": slope_of_clamp(0.5),
        "p4_switches_off": [slope_of_clamp(x) for x in (-0.6, -0.4, 0.0, 0.4, 0.6)] == [0, 1, 1, 1, 0],
        "p6_expanded_gate": expanded_gate_raises(),
        "p7_dead_units": dead_units() > 0,
        "p8_logits_in_adamw": weights_optimiser_moves_logits(),
        "p12_same_order": order[0] == order[1],
        "p13_shrink": (1 / column - 1).max().item(),
        "p14_duals_grow": duals_only_grow(),
    }


def slope_of_clamp(distance: float) -> float:
    """Gradient of clamp(R - b, -0.5, 0.5), which the released code takes for R - b."""
    x = torch.tensor(distance, requires_grad=True)
    x.clamp(-0.5, 0.5).backward()
    return x.grad.item()


def lowest_budget_with_a_pull() -> float:
    """With gates off the released R is 1: the smallest budget (in thousandths) whose search moves a count at all."""
    search = faithful(enable_block_gating=0)
    norms = search.norms()
    set_duals(search, 1.0, 0.0)
    low, high = 0, 1000
    while high - low > 1:
        middle = (low + high) // 2
        search.s.zero_()
        search.r.zero_()
        search.flags = replace(search.flags, budget=middle / 1000)
        search.move_counts(norms)
        low, high = (low, middle) if search.s.any() else (middle, high)
    return high / 1000


def expanded_gate_raises() -> bool:
    """Gates as one expanded row of logits: does the optimiser refuse to write them?"""
    gate = nn.Parameter(torch.tensor([[-1.0, 1.0]]).expand(14, 2))
    gate.grad = torch.ones(14, 2)
    try:
        torch.optim.SGD([gate], lr=0.1).step()
    except RuntimeError:
        return True
    return False


def dead_units() -> int:
    """Masks as released: fc2's are made anew each time, fc1's only ever get zeros. Units go, then all come back."""
    first, second = torch.ones(8), torch.ones(8)
    for norms, gone in ((torch.arange(8.0), 3), (torch.arange(8.0).flip(0), 0)):
        smallest = norms.argsort()[:gone]
        second = torch.ones(8).index_fill(0, smallest, 0)
        first[smallest] = 0
    return int((second * (1 - first)).sum())  # counted as alive, and dead


def weights_optimiser_moves_logits() -> bool:
    """Does the optimiser of the weights shrink the gates' logits by its weight decay, without any gradient?"""
    search = faithful(learning_rate=0.1)
    before = search.logits.detach().abs()
    search.logits.grad = torch.zeros_like(search.logits)
    for group in search.optimizer.param_groups:
        group["lr"] = search.flags.learning_rate
    search.optimizer.step()
    return bool((search.logits.detach().abs() < before).all())


def duals_only_grow() -> bool:
    """Do the counts' multipliers never fall, whatever is removed, and does the budget's fall when R is below it?"""
    search = faithful(budget=1.0)
    set_duals(search, 1.0, 0.5)
    grown, norms = True, search.norms()
    for heads in (0.0, 2.0, 0.0):
        search.s[:, 0], before = heads, (search.y.clone(), search.p.clone(), search.z.item())
        search.move_duals(norms)
        grown &= bool((search.y >= before[0]).all() and (search.p >= before[1]).all()) and search.z.item() < before[2]
    return grown and bool((search.y[:, 0] > 0.5).all())
