"""The structural claims of ComCAT's and Adaptive-ComCAT's papers (params/2_comcat/claims.yaml), with the library.

No data and no weights: timm builds the DeiTs on the meta device, plans factor them, and what stands there is counted;
`shown_comcat` has what is about values. `measured` gives `{claim id: our value}` for everything that needs nothing,
`derived` recomputes what follows from the printed columns (sums, ratios, means).
"""

import math
from collections.abc import Callable, Mapping
from itertools import pairwise

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from leanvit import comcat, comcat_diffusion, surgery, train
from leanvit import comcat_ranks as ranks
from leanvit.comcat_factors import break_even
from leanvit.comcat_mixture import MixedAttention, MixedLinear
from leanvit.comcat_plan import Part
from leanvit.comcat_recut import current_ranks
from leanvit.comcat_schedule import Schedule, temperature
from leanvit.comcat_search import RankSearch
from leanvit.shown_comcat import FAITHFUL, IMAGES, Measured, cut, shown, unet_attention

DEIT = {"ti": "deit_tiny_patch16_224", "s": "deit_small_patch16_224", "b": "deit_base_patch16_224"}
REDUCTION = {"s": 0.5, "b": 0.6}
SEARCH_BATCH = {"s": 64, "b": 16}
LOG_SEARCHES, LOG_BATCH = 6, 256


def measured() -> Measured:
    """Every structural claim that needs neither data nor weights, in five seconds of one core."""
    rooms: list[Callable[[], Measured]] = [
        _architectures, _formulas, _candidates, _supernet, _budget, _temperature, _schedule, _log, _diffusion, shown,
    ]  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # timm draws the weights that nobody looks at
        return {name: value for room in rooms for name, value in room().items()}


def _meta(size: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(DEIT[size])


def _macs(model: nn.Module, x: Tensor) -> int:
    """Multiply-adds of one call, attention in the unfused form, which the counter can see."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(x)
    return counter.get_total_flops() // 2


def _found(model: nn.Module) -> dict[str, Part]:
    return {part.name: part for part in comcat.parts(model)[0]}


def _weights(model: nn.Module) -> int:
    """Weights without positions and tokens: matrices and the patch embedding."""
    return sum(p.numel() for n, p in model.named_parameters() if p.dim() > 1 and not n.endswith(("embed", "token")))


def _architectures() -> Measured:
    result: Measured = {}
    for size in DEIT:
        model = _meta(size)
        block, found = model.blocks[0], _found(model)
        result |= {
            f"width_{size}": model.embed_dim,
            f"heads_{size}": block.attn.num_heads,
            f"head_size_{size}": found["blocks.0.attn.qk"].full,
            f"hidden_{size}": block.mlp.fc1.out_features,
            f"break_even_mlp_{size}": found["blocks.0.mlp.fc1"].break_even,
            f"break_even_head_{size}": found["head"].break_even,
        }
        if size == "ti":
            continue
        result |= {
            f"total_{size}": surgery.count(model)[1],
            f"paper_total_{size}": ranks.paper_parameters(model),
            f"linear_macs_{size}": ranks.linear_macs(model),
            f"table3_params_{size}": ranks.paper_parameters(model) / 1e6,
            f"table3_flops_{size}": ranks.linear_macs(model) / 1e9,
            f"weights_{size}": ranks.patch_weights(model) + ranks.total_weights(found.values(), {}),
            f"epsilon_{size}": ranks.authors_budget(model, REDUCTION[size]),
        }
        if size == "s":
            result |= {"tokens": model.pos_embed.shape[1], "blocks": len(model.blocks), "decisions": len(found)}
            result["attention_macs_s"] = ranks.attention_macs(model, model.pos_embed.shape[1])
    return result


def _formulas() -> Measured:
    """The table of costs (specification 1.4), on DeiT-S attentions of 197 tokens."""
    d, h, n, r1, r2, r = 384, 6, 197, 32, 20, 128
    x = torch.empty(1, n, d, device="meta")
    made = {"dense": _meta("s").blocks[0]}
    for bias in ("none", "zero", "absorb"):
        made[bias] = cut(_meta("s"), {"qk": r1, "vo": r2, "fc1": r}, bias).blocks[0]
    attention = {name: block.attn for name, block in made.items()}
    weights = {name: _weights(m) for name, m in attention.items()}
    biases = {name: surgery.count(m)[1] - weights[name] for name, m in attention.items()}
    same = cut(_meta("s"), {"qk": r1, "vo": r1}, "none").blocks[0].attn  # of one width: nothing is padded
    linear = {name: _macs(m.qkv, x) + _macs(m.proj, x[..., : m.proj.in_features]) for name, m in attention.items()}
    mix = {name: _macs(m, x) - _macs(m.qkv, x) - _macs(m.proj, x[..., : m.proj.in_features])
           for name, m in (("dense", attention["dense"]), ("same", same))}  # fmt: skip
    lower = [_weights(cut(_meta("s"), {"qk": a, "vo": b}, "none").blocks[0].attn) for a, b in ((63, 64), (64, 63))]
    equal = _weights(cut(_meta("s"), {"qk": 64, "vo": 64}, "none").blocks[0].attn)
    layer = made["none"].mlp.fc1
    return {
        "formula_weights_dense": weights["dense"] == 4 * d * d,
        "formula_weights_low_rank": weights["none"] == 2 * d * (h * r1 + h * r2),
        "formula_biases_dense": biases["dense"] == 4 * d,
        "formula_biases_search": biases["none"] == 0,
        "formula_biases_flag": biases["zero"] == 2 * h * r1 + h * r2 + d,
        "formula_biases_absorbed": biases["absorb"] == h * r1 + d,
        "formula_macs_dense": linear["dense"] == 4 * n * d * d,
        "formula_macs_low_rank": linear["none"] == 2 * n * d * (h * r1 + h * r2),
        "formula_mix_dense": mix["dense"] == 2 * n * n * d,
        "formula_mix_low_rank": mix["same"] == n * n * 2 * h * r1
        and ranks.attention_macs(nn.ModuleList([attention["none"]]), n) == n * n * h * (r1 + r2),
        "formula_weights_fc": _weights(layer) == r * (d + 4 * d) and surgery.count(layer)[1] == _weights(layer) + 4 * d,
        "formula_macs_fc": _macs(layer, x) == n * r * (d + 4 * d),
        "full_rank_costs_dense": equal == weights["dense"] and max(lower) < equal,
        "materialised_break_even": break_even(d, d),
        "matrix_break_even_s": break_even(d, d),
        **{f"separate_break_even_{s}": break_even(w, 64) for s, w in (("s", 384), ("b", 768))},
        **{f"rank_gain_{s}": 64 / break_even(w, 64) for s, w in (("s", 384), ("b", 768))},
    }


def _candidates() -> Measured:
    result: Measured = {}
    for size in DEIT:
        model = _meta(size)
        found = _found(model)
        part, nominal = found["blocks.0.attn.qk"], ranks.nominal_candidates(model.embed_dim)
        result[f"candidates_{size}"] = len(nominal)
        result |= {f"rank_{size}_{n}": part.heads * ranks.realised(part, n) for n in nominal}
        if size == "ti":
            continue
        result[f"largest_per_head_{size}"] = max(ranks.candidates(part, FAITHFUL))
        for name, layer in (("mlp", found["blocks.0.mlp.fc1"]), ("head", found["head"])):
            above = [r for r in ranks.candidates(layer, FAITHFUL) if r > layer.break_even]
            result[f"released_{name}_above_break_even_{size}"] = len(above)
        products = [p for p in found.values() if p.kind != "fc"]
        matrices = {p.name: len(ranks.candidates(p, FAITHFUL)) * p.heads * p.inputs * p.outputs
                    for p in found.values() if p.name != "head"}  # fmt: skip
        result[f"released_copied_gb_{size}"] = 4 * sum(matrices.values()) / 1e9
        if size == "b":
            rounds = 3  # the candidates, the truncation, and an initialisation that is thrown away
            result["released_svds_b"] = rounds * sum(p.heads for p in products)
        else:
            layer = found["blocks.0.mlp.fc1"]
            result |= {"mlp_320_s": layer.weights(320), "mlp_dense_s": layer.dense, "unit_fc_s": layer.unit}
            result |= {"unit_attention_s": part.unit, "unit_grid_s": layer.weights(128) - layer.weights(64)}
            result["patch_s"] = ranks.patch_weights(model)
            result["coded_space"] = float(math.prod(len(ranks.candidates(p, FAITHFUL)) for p in found.values()))
        # what the search counts for a realised rank
        largest = {p.name: max(ranks.candidates(p, FAITHFUL)) for p in found.values()}
        state = RankSearch(cut(model, largest, "none"), 10**12, mode=FAITHFUL)
        chosen = [torch.zeros_like(a) for a in state.alphas]
        chosen[0][state.candidates[part.name].index({"s": 60, "b": 504}[size] // part.heads)] = 1
        result[f"released_nominal_{size}"] = float(state.size(chosen)) / (part.inputs + part.outputs)
    return result


def _supernet() -> Measured:
    """What the two forms of the super-network cost: one image, the blocks alone."""
    result: Measured = {}
    for size in REDUCTION:
        mixture, masked, dense = _forward_macs(size)
        result |= {f"mixture_macs_{size}": mixture / 1e9, f"mask_macs_{size}": masked / 1e9}
        result |= {f"mask_saving_{size}": mixture / masked, f"mixture_over_dense_{size}": mixture / dense}
    return result


def _forward_macs(size: str) -> tuple[int, int, int]:
    """Multiply-adds of one image: the blocks as a mixture, the blocks at the largest candidates, and all, dense."""
    model, tokens = _meta(size), 197
    found, d, depth = _found(model), model.embed_dim, len(model.blocks)
    qk, fc = found["blocks.0.attn.qk"], found["blocks.0.mlp.fc1"]
    n, m = (len(ranks.candidates(p, FAITHFUL)) for p in (qk, fc))
    with torch.device("meta"):
        x, hidden = torch.empty(1, tokens, d), torch.empty(1, tokens, fc.outputs)
        attention = MixedAttention(torch.empty(n, qk.heads, d, d), torch.empty(n, qk.heads, d, d), 1.0, None)
        first, second = (MixedLinear(torch.empty(m, a, b), None) for a, b in ((d, fc.outputs), (fc.outputs, d)))
    attention.p_qk = attention.p_vo = [1 / n] * n
    first.p = second.p = [1 / m] * m
    mixture = depth * (_macs(attention, x) + _macs(first, x) + _macs(second, hidden))
    dense = ranks.linear_macs(model) + ranks.attention_macs(model, tokens)
    largest = cut(model, {p.name: max(ranks.candidates(p, FAITHFUL)) for p in found.values() if p.name != "head"})
    return mixture, _macs(largest.blocks, x), dense


def _budget() -> Measured:
    """What a projection leaves of eps, for falling random spectra: in unit steps, and on the authors' grid."""
    model, generator = _meta("s"), torch.Generator().manual_seed(0)
    found, limit, fine, coarse = comcat.parts(model)[0], ranks.authors_budget(model, 0.5), {}, {}
    for part in found:
        energy = torch.rand(part.full, generator=generator).sort(descending=True).values
        grid = [r for r in ranks.candidates(part, FAITHFUL) if r < part.break_even]
        fine[part.name], coarse[part.name] = ranks.curve(part, energy), ranks.curve(part, energy, grid)
    used = {n: ranks.total_weights(found, ranks.project(c, limit)) for n, c in (("unit", fine), ("grid", coarse))}
    return {f"slack_{name}_s": (limit - weights) / limit for name, weights in used.items()}


def _temperature() -> Measured:
    """The temperatures of 30 epochs, and the steps of a search."""
    return {
        **{f"tau_{k}": temperature(k, 30) for k in range(7)},
        "tau_start": temperature(0, 30),
        "tau_end": temperature(30, 30),
        "tau_factor": temperature(1, 30) / temperature(0, 30),
        "tau_29th": temperature(28, 30),
        "tau_after_29": temperature(29, 30),
        "tau_after_6": temperature(LOG_SEARCHES, 30),
        "tau_at_29": temperature(29, 30),
        **{f"steps_{size}": len(DataLoader(range(IMAGES), batch_size=n)) for size, n in SEARCH_BATCH.items()},
    }


def _searches(lists: Callable[[int], list[int]], epochs: int = 30, **settings) -> tuple[list[int], list[int]]:
    """Epochs that search, and F after each, for the ranks that each epoch's search would choose."""
    schedule, searched, coefficients = Schedule(faithful=True, **settings), [], []
    for epoch in range(epochs):
        if schedule.due(epoch):
            schedule.record(epoch, lists(epoch))
            searched.append(epoch)
            coefficients.append(schedule.coefficient)
    return searched, coefficients


STABLE = {"s1": 1, "s2": 2, "s3": 3, "s5": 5, "s8": 8, "s12": 12, "s20": 20, "never": 99}


def _schedule() -> Measured:
    """Adaptive-ComCAT's schedules; `schedule_*` compares with the epochs in the claim (specification 3.2)."""
    wanted = {
        "s1": [1, 2, 4, 8, 16], "s2": [1, 2, 3, 4, 8, 16], "s3": [1, 2, 3, 4, 6, 8, 16],
        "s5": [*range(1, 7), 8, 12, 16], "s8": [*range(1, 11), 12, 16], "s12": [*range(1, 15), 16, 24],
        "s20": [*range(1, 23), 24], "never": [*range(1, 30)],
    }  # fmt: skip
    runs = {s: _searches(lambda epoch, at=at: [min(epoch, at), 1]) for s, at in STABLE.items()}
    model = _meta("s")
    found, log = comcat.parts(model)[0], list(comcat.LOGGED_DEIT_S)
    flip = _searches(lambda epoch: [*log[:-1], log[-1] - (epoch >= 4)])[1]
    over = [64 * p.heads if p.kind != "fc" else 300 for p in found]  # a list that is above eps and stays
    too_large = ranks.total_weights(found, ranks.ranks_from_list(model, over)) > ranks.authors_budget(model, 0.5)
    all_stay = _searches(lambda epoch: log)
    every = _searches(lambda epoch: log, adaptive=False)[0]
    fewest = len(runs["s1"][0])
    steps = len(DataLoader(range(IMAGES), batch_size=SEARCH_BATCH["s"]))
    return {
        **{f"schedule_{s}": run[0] == wanted[s] for s, run in runs.items()},
        **{f"searches_{s}": len(run[0]) for s, run in runs.items()},
        "searches_comcat": len(every),
        "first_epoch_unsearched": every[0] == 1,
        "coefficients_s2": runs["s2"][1] == [1, 1, 2, 4, 8, 16],
        "fewest_searches": fewest,
        "fewest_saved": 100 * (1 - fewest / len(every)),
        "back_off_doubles": all(b == 2 * a for a, b in pairwise(all_stay[1])),
        "one_flip_resets": all_stay[1][:3] == [1, 2, 4] and flip[:3] == [1, 2, 1],
        "gap_to_multiple": {4, 6} <= {*runs["s3"][0]} and 5 not in runs["s3"][0],
        "never_capped": all_stay[0][-1] == 16 and all_stay[1][-1] == 16,
        "over_budget_backs_off": too_large and _searches(lambda epoch: over)[1] == all_stay[1],
        "alpha_steps_6": LOG_SEARCHES * steps,
        "alpha_steps_29": len(every) * steps,
    }


def _log() -> Measured:
    """Adaptive-ComCAT's DeiT-S, built from the ranks in its training log."""
    dense = _meta("s")
    chosen = ranks.ranks_from_list(dense, comcat.LOGGED_DEIT_S)
    first = chosen | {"blocks.11.mlp.fc1": 128}
    model, found = cut(dense, chosen, "none"), _found(dense)
    total, paper = surgery.count(model)[1], ranks.paper_parameters(model)
    macs, epsilon = ranks.linear_macs(model), ranks.authors_budget(dense, 0.5)
    weights = {name: ranks.total_weights(found.values(), r) for name, r in (("", chosen), ("_first", first))}
    sums = {"norms": 0, "positions": 0, "biases": 0}
    for name, parameter in model.named_parameters():
        kind = "norms" if "norm" in name else "positions" if name.endswith(("embed", "token")) else "biases"
        sums[kind] += parameter.numel() if kind != "biases" or name.endswith("bias") else 0
    now = current_ranks(model, list(found.values()))
    nets = {n.replace("blocks.", "b").replace(".attn.", "_").replace(".mlp.", "_"): now[n] * p.heads
            for n, p in found.items()}  # fmt: skip
    nets["classifier"] = nets.pop("head")
    classifier, lists = model.head, {1: [*first.values()]}
    searched, coefficients = _searches(lambda epoch: lists.get(epoch, [*chosen.values()]))
    recipe = train.Recipe(batch_size=LOG_BATCH, lr=5e-4 * LOG_BATCH / 512, steps=30, min_lr_ratio=0.04)
    unscaled = train.Recipe(batch_size=LOG_BATCH, lr=5e-4, steps=30)
    changes = [lists.get(e, [*chosen.values()]) for e in searched]
    return {
        "log_weights": _weights(model),
        **{f"log_{kind}": number for kind, number in sums.items()},
        "log_total": total,
        "log_total_first": surgery.count(cut(dense, first, "none"))[1],
        "log_total_flag": surgery.count(cut(dense, chosen, "zero"))[1],
        "log_macs": macs,
        "log_gmacs": macs / 1e9,
        "log_attention_macs": ranks.attention_macs(model, 197),
        "log_reduction": 100 * (1 - total / surgery.count(dense)[1]),
        "log_reduction_paper": 100 * (1 - paper / ranks.paper_parameters(dense)),
        "log_macs_reduction": 100 * (1 - macs / ranks.linear_macs(dense)),
        **{f"log_argmax_weights{name}": number for name, number in weights.items()},
        "log_under_budget": 100 * (weights[""] / epsilon - 1),
        "log_over_budget": 100 * (weights["_first"] / epsilon - 1),
        "log_classifier": _weights(classifier),
        "dense_classifier": found["head"].dense,
        "log_classifier_waste": _weights(classifier) - found["head"].dense,
        **{f"log_rank_{name}": rank for name, rank in nets.items()},
        **{f"log_search_{i}_epoch": epoch for i, epoch in enumerate(searched, 1)},
        **{f"log_search_{i}_coefficient": f for i, f in enumerate(coefficients, 1)},
        "log_rank_changes": sum(a != b for a, b in pairwise(changes)),
        "log_lr_0": train.learning_rate(unscaled, 0, 30),
        **{f"log_lr_{t}": train.learning_rate(recipe, t, 30) for t in (1, 2, 3, 4, 5, 15, 29)},
        "chance_loss": float(F.cross_entropy(torch.zeros(1, 1000), torch.tensor([0]))),
    }


def _diffusion() -> Measured:
    """Adapters on attentions of the shapes of Stable Diffusion 1's U-Net."""
    with torch.device("meta"):
        unet = nn.ModuleList(
            nn.ModuleList([unet_attention(width), unet_attention(width, 768)])
            for width, number in comcat_diffusion.STABLE_DIFFUSION_1.items()
            for _ in range(number)
        )
    report = comcat_diffusion.attach(unet)
    return {
        "sd_parameters": comcat_diffusion.parameters_formula(),
        "sd_attached": report.trainable,
        "sd_mib": 4 * report.trainable / 2**20,
        "sd_mb_printed": 4 * report.trainable / 1e6,
        "sd_blocks": len(unet),
        "sd_attentions": len(report.matched),
        "sd_rank": comcat_diffusion.adapters(unet)[0][1].rank,
    }


CONCEPTS = ("bear", "tortoise", "pot", "barn", "cat", "dog", "goldendoodle")


def derived(printed: Mapping[str, float]) -> Measured:
    """Claims that are sums, ratios and means of printed ones; `printed` maps every id of claims.yaml to its value."""
    v = printed
    passes = sum(v[f"log_pass_{i}_s"] for i in range(1, 7))
    every = passes / 6 * 29
    whole = v["log_whole_s"] - passes + every
    epoch = (v["log_train_s"] + v["log_test_s"]) / 30
    fid = {m: [v[f"fid_{m}_{c}"] for c in CONCEPTS] for m in ("comcat", "cd", "db")}
    means = {m: v[f"table5_fid_{m}"] for m in fid}
    best = {c: min(fid, key=lambda m, i=i: fid[m][i]) for i, c in enumerate(CONCEPTS)}
    top1 = [v[f"log_top1_{t}"] for t in range(30)]
    result: Measured = {
        "passes_sum_s": passes,
        "passes_sum_h": passes / 3600,
        "epoch_min": v["log_train_s"] / 30 / 60,
        "pass_s": passes / 6,
        "comcat_whole_min": whole / 60,
        "search_time_saved": 100 * (1 - passes / every),
        "search_time_factor": every / passes,
        "phase_time_saved": 100 * (1 - v["log_whole_s"] / whole),
        "pipeline_time_saved": 100 * (every - passes) / (whole + 300 * epoch),
        "log_soft_over": v["log_soft_size_1"] > v["epsilon_s"] > v["log_soft_size_6"],
        "log_best_is_last": max(top1) == top1[-1],
        "headline_uvc": v["top1_s_50"] - v["top1_s_uvc"],
        "headline_mdvit": v["top1_b_61"] - v["top1_b_mdvit"],
        "checkpoint_b_gap": v["checkpoint_b_top1"] - v["top1_b_61"],
        "checkpoint_s_gap": v["checkpoint_s_top1"] - v["top1_s_44"],
        "storage_over_cd": v["table5_extra_cd"] / v["table5_extra_comcat"],
        "storage_over_db": v["table5_extra_db"] / v["table5_extra_comcat"],
        "time_over_db": v["table5_time_db"] / v["table5_time_comcat"],
        "fid_best_on_average": min(means, key=means.get) == "comcat",
        "fid_not_best_everywhere": {c: m for c, m in best.items() if m != "comcat"}
        == {"bear": "db", "pot": "db", "cat": "cd"},
    }
    for method, row in fid.items():
        result[f"fid_mean_{method}"] = sum(row) / len(row)
    for size, row in (("s", "s_50"), ("b", "b_61")):
        for what in ("flops", "params"):
            small, large = v[f"table3_{what}_{size}_comcat"], v[f"table3_{what}_{size}"]
            result[f"{what}_down_{row}"] = 100 * (1 - small / large)
        result[f"v100_speedup_{size}"] = v[f"table3_v100_{size}_comcat"] / v[f"table3_v100_{size}"]
    return result
