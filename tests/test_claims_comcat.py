"""The published numbers of ComCAT and Adaptive-ComCAT: no row lost, and the structural ones computed again."""

import ast
import math
import re
from collections import Counter
from itertools import product
from pathlib import Path

import nbformat
import pytest
import torch

from leanvit import claims, counts_comcat, params

ROOT = Path(__file__).parents[1]
FOLDER, NOTEBOOK = ROOT / "params" / "2_comcat", ROOT / "notebooks" / "2_comcat.ipynb"
BOOK = {claim.id: claim for claim in claims.load(FOLDER / "claims.yaml")}
VALUE = {claim.id: claim.value for claim in BOOK.values()}
SIZES = {"ti": (192, 3), "s": (384, 6), "b": (768, 12)}
TOKENS, CLASSES, DEPTH = 197, 1000, 12
NOMINAL = {
    "ti": (32, 64, 96, 128, 160),
    "s": (64, 128, 192, 256, 320),
    "b": (128, 192, 256, 320, 384, 448, 512),
}
MEANS_THAT_DIFFER = {"fid_mean_comcat", "fid_mean_cd", "fid_mean_db"}  # Table 5's means are not those of its concepts


@pytest.fixture(scope="module")
def ours():
    measured, derived = counts_comcat.measured(), counts_comcat.derived(VALUE)
    assert not set(measured) & set(derived)
    return measured | derived


def assert_matches(measured, *tables, kind=float):
    """Every measured claim holds; they are all numbers (or all statements) of these tables that need nothing."""
    rows = {c.id for c in BOOK.values() if c.table in tables and c.kind == "structural" and c.needs == "nothing"}
    assert {i for i in rows if (BOOK[i].compare == "true") == (kind is bool)} == set(measured)
    verdicts = claims.check([BOOK[name] for name in measured], measured)
    assert [verdict for verdict in verdicts if verdict.verdict != "matches"] == []


# ---- the book


def test_no_row_is_lost():
    assert dict(Counter(claim.table for claim in BOOK.values())) == {
        "architectures": 3 * 4 + 2,
        "factorisation": 13,
        "cost formulas": 12 + 7,
        "break-even": 3 * 2,
        "search space": 1 + 3 + sum(map(len, NOMINAL.values())) + 6,
        "super-network": 12,
        "losses": 7 + 8,
        "budget": 10,
        "alternation": 24,
        "training recipe": 43,
        "adaptive schedule": 8 * 2 + 13,
        "counts": 27,
        "training log": 49 + 2 * 6 + 8 + 2 + (30 + 2) + 3 * 6 + 2 + 3 + 9,
        "derived from the log": 9,
        "Table 2": (12 + 11 + 9) + (9 + 7 + 6) + 4,  # top-1, FLOPs, parameters; trends
        "released checkpoints": 4,
        "derived from Table 2": 4,
        "Table 3": 4 * 8,
        "derived from Table 3": 2,
        "Table 1": 2 + 2 * 4 + 1,
        "Table 4": 3 * 5 * 2 + 2,
        "figure manual-automatic": 2,
        "text on Eq. 6": 2,
        "Figure 1-2": 2,
        "diffusion adapter": 12 + 7,
        "Table 5": 3 * 4,
        "FID by concept": 3 * 7,
        "FID on MS-COCO": 3,
        "derived from Table 5": 8,
        "released code": 19 + 1,
        "synthetic check": 6 * 3 + 2 * 3,
        "peers": 9,
        "better than published": 4,
    }


def test_every_row_is_well_formed():
    text = (FOLDER / "claims.yaml").read_text(encoding="utf-8")
    ids = re.findall(r"\{id: (\w+)", text)
    assert len(ids) == len(set(ids)) == len(BOOK)
    for claim in BOOK.values():
        assert re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", claim.id), claim.id
        assert claim.paper in ("ComCAT", "Adaptive-ComCAT") and claim.tag in "SCDA"
        if claim.kind != "structural":
            assert claim.needs != "nothing", claim.id
        if claim.kind == "trend":
            assert claim.id.startswith("trend_") and claim.compare == "true"
            assert ("embedded.yaml" in claim.needs) != (claim.id == "trend_above_uvc")
    # one checkpoint's name is no result of the adaptive method: its paper was not at hand
    assert {c.table for c in BOOK.values() if c.paper == "Adaptive-ComCAT"} <= {
        "adaptive schedule", "counts", "training log", "derived from the log",
    }  # fmt: skip


def test_structural_rows_match(ours):
    wanted = {c.id for c in BOOK.values() if c.kind == "structural" and c.needs == "nothing"}
    recipe = {i for i in wanted if i.startswith("recipe_")}  # most are settings: below
    assert set(ours) - recipe == wanted - recipe
    verdicts = {v.id: v for v in claims.check([BOOK[i] for i in ours], ours)}
    assert {i for i, v in verdicts.items() if v.verdict != "matches"} == MEANS_THAT_DIFFER


COLUMNS = {  # cells and their sum, added up from the specification's tables
    "top1_s_": (12, 948.81),
    "top1_b_": (9, 732.13),
    "flops_down_": (18, 804.78),
    "params_down_": (15, 386.76),
    "table3_v100_": (4, 3391.22),
    "table3_snapdragon_": (4, 24.36),
    "table3_tx2_": (4, 94.89),
    "table3_eyeriss_": (4, 84.73),
    "table3_fpga_": (4, 13.72),
    "table1_heads_": (4, 230.98),
    "table1_matrices_": (4, 152.84),
    r"table4_svd_\d+$": (5, 296.13),
    r"table4_tucker_\d+$": (5, 260.35),
    r"table4_tt_\d+$": (5, 1.99),
    r"table4_svd_\d+_v100$": (5, 5650.27),
    r"table4_tucker_\d+_v100$": (5, 5515.15),
    r"table4_tt_\d+_v100$": (5, 3420.22),
    "log_top1_": (30, 2150.23),
    "log_supernet_": (6, 383.78),
    "log_soft_size_": (6, 64365034),
    r"log_pass_\d": (6, 5370),
    "log_rank_b": (48, 8396),
    "table5_time_": (3, 932),
    "table5_memory_": (3, 54551),
    "table5_extra_": (3, 11646),
    "table5_fid_": (3, 347.32),
    "coco_": (3, 96.59),
    "synthetic_(?:separate|plain|whitened|centred)_": (12, 7.494),
    "synthetic_vo_(?:plain|whitened)_": (6, 2.455),
}


@pytest.mark.parametrize("start", COLUMNS)
def test_columns_add_up(start):
    cells = [value for name, value in VALUE.items() if re.match(start, name)]
    count, total = COLUMNS[start]
    assert len(cells) == count and sum(cells) == pytest.approx(total, abs=0.004)


def test_schedules_are_those_in_the_claims(ours):
    for name in (c for c in BOOK if c.startswith("schedule_")):
        epochs = [int(n) for n in BOOK[name].claim.rpartition(" at ")[2].split(", ")]
        assert epochs == back_off(counts_comcat.STABLE[name.removeprefix("schedule_")])[0]
        assert ours[name.replace("schedule", "searches")] == len(epochs)


# ---- closed forms, without the library


def block(d):
    """Weights of attention and MLP of a block."""
    return 4 * d * d + 2 * 4 * d * d


def test_architectures_and_break_even():
    measured = {"tokens": (224 // 16) ** 2 + 1, "blocks": DEPTH}
    even = {}
    for size, (d, h) in SIZES.items():
        measured |= {f"width_{size}": d, f"heads_{size}": h, f"head_size_{size}": d // h, f"hidden_{size}": 4 * d}
        even |= {f"break_even_mlp_{size}": d * 4 * d / (5 * d), f"break_even_head_{size}": d * CLASSES / (d + CLASSES)}
    assert_matches(measured, "architectures")
    assert_matches(even, "break-even")


def test_costs_and_search_space():
    measured = {"materialised_break_even": 384 / 2, "matrix_break_even_s": 384 / 2}
    for size in "sb":
        d, h = SIZES[size]
        measured |= {f"rank_gain_{size}": 1 + 1 / h, f"separate_break_even_{size}": d * 64 / (d + 64)}
    assert_matches(measured, "cost formulas")
    space = {"decisions": 4 * DEPTH + 1, "mlp_320_s": 320 * 5 * 384, "mlp_dense_s": 4 * 384**2}
    space["coded_space"] = float(len(NOMINAL["s"])) ** (4 * DEPTH + 1)
    for size, (_, h) in SIZES.items():
        space |= {f"rank_{size}_{n}": h * (n // h) for n in NOMINAL[size]}
        space[f"candidates_{size}"] = len(NOMINAL[size])
        listed = re.search(r"candidates ([\d, ]+) where", BOOK[f"candidates_{size}"].claim)[1]
        assert listed == ", ".join(map(str, NOMINAL[size]))
    space |= {f"largest_per_head_{size}": NOMINAL[size][-1] // SIZES[size][1] for size in "sb"}
    assert_matches(space, "search space")


def test_mixture_and_mask():
    """Multiply-adds of the blocks: each candidate dense for each head, against one factored pass."""
    n, measured = TOKENS, {}
    for size in "sb":
        (d, h), (*_, largest), candidates = SIZES[size], NOMINAL[size], len(NOMINAL[size])
        mixture = DEPTH * candidates * (2 * h * (n * d * d + n * n * d) + 2 * n * d * 4 * d)
        rank = h * (largest // h)
        mask = DEPTH * (4 * n * d * rank + 2 * n * n * rank + 2 * n * largest * 5 * d)
        dense = n * DEPTH * block(d) + 2 * DEPTH * n * n * d + (n - 1) * 768 * d + d * CLASSES
        measured |= {f"mixture_macs_{size}": mixture / 1e9, f"mask_macs_{size}": mask / 1e9}
        measured |= {f"mask_saving_{size}": mixture / mask, f"mixture_over_dense_{size}": mixture / dense}
    shown = {"mask_equals_mixture", "mask_gradient"}
    verdicts = claims.check([BOOK[i] for i in measured], measured)
    assert [v for v in verdicts if v.verdict != "matches"] == []
    numbers = {c.id for c in BOOK.values() if c.table == "super-network" and c.compare != "true"}
    assert numbers == set(measured) | shown


def test_counts_budget_and_log():
    measured, budget = {}, {}
    for size, rho in (("s", 0.5), ("b", 0.6)):
        d, _ = SIZES[size]
        patch, inner = 768 * d, DEPTH * block(d) + d * CLASSES
        biases = DEPTH * (3 * d + d + 4 * d + d) + d + CLASSES
        rest = (2 * DEPTH + 1) * 2 * d, (1 + TOKENS) * d  # norms; class token and positions
        measured[f"paper_total_{size}"] = patch + inner + biases
        measured[f"total_{size}"] = patch + inner + biases + sum(rest)
        measured[f"linear_macs_{size}"] = (TOKENS - 1) * patch + TOKENS * DEPTH * block(d) + d * CLASSES
        budget[f"weights_{size}"] = patch + inner
        budget[f"epsilon_{size}"] = round((1 - rho) * (patch + inner)) - patch
    d, _ = SIZES["s"]
    rank = {i.removeprefix("log_rank_"): c.value for i, c in BOOK.items() if i.startswith("log_rank_")}
    del rank["changes"]
    of = {kind: [v for i, v in rank.items() if i.endswith(f"_{kind}")] for kind in ("qk", "vo", "fc1", "fc2")}
    attention = 2 * d * (sum(of["qk"]) + sum(of["vo"]))
    mlp = 5 * d * (sum(of["fc1"]) + sum(of["fc2"]))
    head = rank["classifier"] * (d + CLASSES)
    biases = DEPTH * 5 * d + d + CLASSES
    weights, norms, positions = 768 * d + attention + mlp + head, 25 * 2 * d, 198 * d
    total = weights + biases + norms + positions
    macs = 196 * 768 * d + TOKENS * (attention + mlp) + head
    flag = sum(2 * r1 + r2 + d for r1, r2 in zip(of["qk"], of["vo"], strict=True))
    epsilon = budget["epsilon_s"]
    measured |= {
        "attention_macs_s": DEPTH * TOKENS**2 * 2 * d,
        "log_weights": weights,
        "log_biases": biases,
        "log_norms": norms,
        "log_positions": positions,
        "log_total": total,
        "log_total_first": total + 64 * 5 * d,
        "log_total_flag": total + flag,
        "log_macs": macs,
        "log_gmacs": macs / 1e9,
        "log_attention_macs": TOKENS**2 * (sum(of["qk"]) + sum(of["vo"])),
        "log_reduction": 100 * (1 - total / measured["total_s"]),
        "log_reduction_paper": 100 * (1 - (weights + biases) / measured["paper_total_s"]),
        "log_macs_reduction": 100 * (1 - macs / measured["linear_macs_s"]),
        "log_argmax_weights": weights - 768 * d,
        "log_under_budget": 100 * ((weights - 768 * d) / epsilon - 1),
        "log_argmax_weights_first": weights - 768 * d + 64 * 5 * d,
        "log_over_budget": 100 * ((weights - 768 * d + 64 * 5 * d) / epsilon - 1),
        "log_classifier": head,
        "dense_classifier": d * CLASSES,
        "log_classifier_waste": head - d * CLASSES,
    }
    assert_matches(measured, "counts")
    budget |= {"patch_s": 768 * d, "unit_fc_s": 5 * d, "unit_attention_s": 2 * d * 6, "unit_grid_s": 64 * 5 * d}
    slack = {"slack_unit_s": 5 * d / epsilon, "slack_grid_s": 64 * 5 * d / epsilon}  # no step of the MLP fits any more
    assert_matches(budget | slack, "budget")


def back_off(stable_from, epochs=30):
    """(epochs searched, F after each) of the released rule, for ranks that change before `stable_from` only."""
    searched, coefficients, before, f = [], [], None, 1
    for epoch in range(1, epochs):
        if epoch % f == 0:
            now = min(epoch, stable_from)
            if epoch > 1:
                f = 2 * f if now == before else 1
            before = now
            searched.append(epoch)
            coefficients.append(f)
    return searched, coefficients


def test_adaptive_schedule_and_temperatures():
    when = {f"s{s}": s for s in (1, 2, 3, 5, 8, 12, 20)} | {"never": 99}
    runs = {name: back_off(s) for name, s in when.items()}
    steps = math.ceil(50_000 / 64)
    tau = [5 * 0.02 ** (k / 30) for k in range(31)]
    measured = {f"searches_{name}": len(run[0]) for name, run in runs.items()}
    measured |= {"fewest_searches": 5, "fewest_saved": 100 * 24 / 29, "tau_after_6": tau[6], "tau_at_29": tau[29]}
    measured |= {"alpha_steps_6": 6 * steps, "alpha_steps_29": 29 * steps}
    assert_matches(measured, "adaptive schedule")
    assert min(len(run[0]) for run in runs.values()) == 5
    assert runs["s2"] == ([VALUE[f"log_search_{i}_epoch"] for i in range(1, 7)],
                          [VALUE[f"log_search_{i}_coefficient"] for i in range(1, 7)])  # fmt: skip
    assert BOOK["coefficients_s2"].claim.endswith(", ".join(map(str, runs["s2"][1])))
    temperatures = {f"tau_{k}": tau[k] for k in range(7)}
    temperatures |= {"tau_start": tau[0], "tau_end": tau[30], "tau_factor": tau[1] / tau[0], "tau_29th": tau[28]}
    temperatures |= {"tau_after_29": tau[29], "steps_s": steps, "steps_b": math.ceil(50_000 / 16)}
    for name, value in temperatures.items():
        assert claims.check([BOOK[name]], {name: value})[0].verdict == "matches", name


def test_losses_and_rates_of_the_log():
    weights = [0.5]
    for t in range(1, 30):
        weights.append(max(weights[-1] * math.cos(math.pi * t / 60), 0.01))
    measured = {f"lambda_{t}": weights[t] for t in (*range(6), 19, 20)} | {"penalty_at_twice": 2**1.5}
    base, low = 5e-4 * VALUE["recipe_log_batch_s"] / 512, VALUE["recipe_search_lr_min"]
    for t in (1, 2, 3, 4, 5, 15, 29):
        measured[f"log_lr_{t}"] = low + (base - low) * (1 + math.cos(math.pi * t / 30)) / 2
    measured |= {"chance_loss": math.log(1000), "recipe_search_lr_b": 5e-4 * VALUE["recipe_search_batch_b"] / 512}
    assert [v for v in claims.check([BOOK[i] for i in measured], measured) if v.verdict != "matches"] == []
    assert VALUE["log_first_loss"] > VALUE["chance_loss"]


def test_diffusion_adapter():
    widths = {320: 5, 640: 5, 1280: 6}
    count = sum(n * 2 * 8 * (3 * width + 768) * 2 for width, n in widths.items())  # self 4 C, cross 2 C + 2 x 768
    assert count == VALUE["sd_parameters"] == VALUE["sd_attached"]
    measured = {"sd_mib": 4 * count / 2**20, "sd_mb_printed": 4 * count / 1e6, "sd_blocks": sum(widths.values())}
    assert [v for v in claims.check([BOOK[i] for i in measured], measured) if v.verdict != "matches"] == []


# ---- what follows from printed columns


def test_sums_and_ratios_follow_from_the_printed_columns():
    hours = lambda h, m, s=0: 3600 * h + 60 * m + s  # noqa: E731
    assert VALUE["log_whole_s"] == hours(28, 2, 16)
    assert VALUE["passes_sum_s"] == sum(VALUE[f"log_pass_{i}_s"] for i in range(1, 7))
    assert VALUE["comcat_whole_min"] == hours(33, 45) / 60 and VALUE["pass_s"] == hours(0, 14, 55)
    assert VALUE["log_train_s"] + VALUE["log_test_s"] + VALUE["passes_sum_s"] < VALUE["log_whole_s"]
    assert VALUE["headline_uvc"] == pytest.approx(79.27 - 78.82) and VALUE["headline_mdvit"] == pytest.approx(0.76)
    for row, table2 in (
        ("s_comcat", "top1_s_50"),
        ("b_comcat", "top1_b_61"),
        ("s", "top1_s_dense"),
        ("b", "top1_b_dense"),
    ):
        assert VALUE[f"table3_top1_{row}"] == VALUE[table2]
    assert VALUE["checkpoint_s_share"] == round(VALUE["params_down_s_44"] / 100, 2)
    assert VALUE["checkpoint_b_share"] == round(VALUE["params_down_b_61"] / 100, 2)


def test_printed_means_are_not_the_means_of_the_concepts(ours):
    for name in MEANS_THAT_DIFFER:
        method = name.removeprefix("fid_mean_")
        row = [c.value for c in BOOK.values() if c.id.startswith(f"fid_{method}_")]
        assert len(row) == 7 and ours[name] == pytest.approx(sum(row) / 7)
        assert VALUE[name] == VALUE[f"table5_fid_{method}"] and abs(VALUE[name] - sum(row) / 7) > 0.9
        assert float(re.search(r"\(([\d.]+)\)", BOOK[name].claim)[1]) == pytest.approx(sum(row) / 7, abs=0.005)


def test_trends_hold_for_the_printed_numbers():
    for x in (20, 40, 60, 80):
        assert VALUE[f"table1_heads_{x}"] > VALUE[f"table1_matrices_{x}"]
    for x in (10, 20, 30, 40, 50):
        assert VALUE[f"table4_svd_{x}"] > VALUE[f"table4_tucker_{x}"] > VALUE[f"table4_tt_{x}"]
    assert VALUE["top1_s_40"] > VALUE["top1_s_44"] > VALUE["top1_s_50"] > VALUE["top1_s_uvc"]
    assert VALUE["top1_s_dense"] - VALUE["top1_s_50"] < 1 and VALUE["top1_s_40"] > VALUE["top1_s_dense"]
    top1 = [VALUE[f"log_top1_{t}"] for t in range(30)]
    assert top1[-1] == max(top1) and top1[0] == min(top1) < VALUE["top1_s_dense"]
    rank = {kind: [VALUE[f"log_rank_b{b}_{kind}"] for b in range(12)] for kind in ("qk", "vo", "fc1", "fc2")}
    assert sum(rank["vo"]) > sum(rank["qk"])
    for kind in ("qk", "fc1", "fc2"):
        assert sum(rank[kind][:4]) > sum(rank[kind][-4:])


# ---- defects that decide a number, shown in plain torch


def heads(seed=0, d=24, h=3, k=8, dtype=torch.float64):
    """Maps (h, d, k) of queries, keys and values, (h, k, d) of outputs, and their biases."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((h, d, k),) * 3 + ((h, k, d),) + ((h, 1, k),) * 3 + ((d,),)
    return [torch.randn(*s, generator=generator, dtype=dtype) * d**-0.5 for s in shapes]


def attend(x, q, k, v, o, bq=0.0, bk=0.0, bv=0.0, bo=0.0):
    scores = (x[:, None] @ q + bq) @ (x[:, None] @ k + bk).mT / math.sqrt(8)
    return ((scores.softmax(-1) @ (x[:, None] @ v + bv)) @ o).sum(1) + bo


TOKENS_AT_RANDOM = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def without_biases(absorb=False):
    """Relative error of the output at full rank: biases thrown away, or absorbed as they should be."""
    q, k, v, o, bq, bk, bv, bo = heads()
    dense = attend(TOKENS_AT_RANDOM, q, k, v, o, bq, bk, bv, bo)
    kept = (bq, 0.0, 0.0, bo + (bv @ o).sum((0, 1))) if absorb else ()
    return float((attend(TOKENS_AT_RANDOM, q, k, v, o, *kept) - dense).norm() / dense.norm())


def test_biases_thrown_away_and_absorbed():
    assert without_biases() > VALUE["released_full_rank_off"]
    assert without_biases(absorb=True) < 1e-12


def test_truncation_is_one_way_and_lopsided():
    a, b = heads()[:2]
    u, s, vh = torch.linalg.svd(a[0] @ b[0].T)
    low = (u[:, :3] * s[:3]) @ vh[:3]
    u, s, vh = torch.linalg.svd(low)  # what the next search makes its candidates of
    for rank in (4, 6, 8):
        again = (u[:, :rank] * s[:rank]) @ vh[:rank]
        assert (again - low).norm() <= VALUE["one_way_error"] * low.norm()
    left, right = u[:, :3], s[:3, None] * vh[:3]  # as released
    assert torch.allclose(left.T @ left, torch.eye(3, dtype=left.dtype)) and right.norm() != pytest.approx(left.norm())


def test_a_mixture_of_truncations_is_a_mask():
    a, b = heads()[:2]
    u, s, vh = torch.linalg.svd(a[0] @ b[0].T)
    p, ranks = torch.tensor([0.2, 0.5, 0.3], dtype=s.dtype), (2, 5, 8)
    mixture = sum(w * (u[:, :r] * s[:r]) @ vh[:r] for w, r in zip(p, ranks, strict=True))
    c = torch.stack([p[[r > j for r in ranks]].sum() for j in range(len(s))])
    assert torch.allclose((u * (s * c)) @ vh, mixture, rtol=1e-10)
    assert c[0] == 1 and (c.diff() <= 0).all()


def test_released_search_in_numbers():
    labels = torch.arange(1000).repeat_interleave(50)  # sequential: class after class
    classes = [len(batch.unique()) for batch in labels.split(64)]
    measured = {
        "released_fewest_classes": min(classes),
        "released_most_classes": max(classes),
        "released_crop": 224 / 224,
        "released_crop_deit": 224 / 256,
        "released_full_rank_off": without_biases(),
        "released_nominal_s": next(n for n in NOMINAL["s"] if 6 * (n // 6) == 60),
        "released_nominal_b": next(n for n in NOMINAL["b"] if 12 * (n // 12) == 504),
        "released_svds_b": 3 * 2 * 12 * DEPTH,
        "released_lr_not_scaled": 4 * 256 / 512,
    }
    for size in "sb":
        d, h = SIZES[size]
        for name, (i, o) in {"mlp": (d, 4 * d), "head": (d, CLASSES)}.items():
            above = [r for r in NOMINAL[size] if r * (i + o) > i * o]
            measured[f"released_{name}_above_break_even_{size}"] = len(above)
        matrices = len(NOMINAL[size]) * DEPTH * (2 * h * d * d + 2 * 4 * d * d)
        measured[f"released_copied_gb_{size}"] = 4 * matrices / 1e9
    assert_matches(measured, "released code")


def test_fp16_loses_small_gradients():
    alpha = torch.zeros(5, dtype=torch.float16, requires_grad=True)
    lost, kept = (torch.autograd.grad((alpha.float() * g).sum(), alpha)[0] for g in (1e-8, 1e-3))
    assert not lost.any() and kept.all()


def test_nothing_stops_the_back_off():
    for epochs in (30, 100, 1000):
        searched, coefficients = back_off(1, epochs)
        assert searched == coefficients == [2**i for i in range(len(searched))]  # no cap
        assert epochs - 1 < 2 * searched[-1]  # nothing is searched any more, for up to half of the run
    flips = [back_off(s)[0] for s in (4, 5)]
    assert flips[0] != flips[1] and {4, 6} <= set(back_off(3)[0])  # F = 2 after 4, but 4 is a multiple already


# ---- the published recipes

SETTINGS = {  # of a published configuration, by the claims on DeiT-S and DeiT-B that it repeats
    "finetune_epochs": "tune_epochs",
    "search_epochs": "epochs",
    "search_batch": "batch_size",
    "finetune_batch": "tune_batch_size",
    "search_wd": "weight_decay",
    "finetune_wd": "tune_weight_decay",
    "search_lr": "lr",
    "finetune_lr": "tune_lr",
    "finetune_lr_min": "tune_lr_min",
    "alpha_batch": "alpha_batch",
    "rho": "budget",
    "drop_path": "drop_path",
    "mixup": "mixup",
    "cutmix": "cutmix",
    "smoothing": "smoothing",
    "seed": "seed",
    "search_lr_min": "lr_min",
}


def test_published_configurations_repeat_the_recipe():
    files = {size: params.read_yaml(FOLDER / f"paper_comcat_{size}.yaml") for size in "sb"}
    log = params.read_yaml(FOLDER / "paper_adaptive_s.yaml")
    notebook = "".join(cell["source"] for cell in nbformat.read(NOTEBOOK, as_version=4).cells)
    augment = ast.literal_eval(re.search(r"^AUGMENT = (\{.*?\})$", notebook, re.M | re.S)[1])
    magnitude, spread, _ = re.findall(r"[\d.]+", augment["auto_augment"])
    measured = {
        "recipe_log_batch_s": log["batch_size"],
        "recipe_search_lr_base": files["s"]["lr"] * 512 / files["s"]["batch_size"],
        "recipe_finetune_aligned_s": files["s"]["alignment"],
        "recipe_finetune_unaligned_b": files["b"]["alignment"] == 0,
        "recipe_random_erasing": augment["re_prob"],
        "recipe_colour_jitter": augment["color_jitter"],
        "recipe_randaugment_m": float(magnitude),
        "recipe_randaugment_mstd": float(spread),
        "recipe_image": 224,
    }
    for (claim, name), size in product(SETTINGS.items(), "sb"):
        id_ = f"recipe_{claim}_{size}" if f"recipe_{claim}_{size}" in BOOK else f"recipe_{claim}"
        if id_ in BOOK:
            measured[id_] = files[size][name]
    assert [v for v in claims.check([BOOK[i] for i in measured], measured) if v.verdict != "matches"] == []
    rest = {"recipe_search_no_bias", "recipe_finetune_zero_bias", "recipe_search_aligned"}  # of the library
    alone = {c.id for c in BOOK.values() if c.table == "training recipe" and c.needs == "nothing"}
    assert alone == (set(measured) | rest) - {"recipe_randaugment_m", "recipe_randaugment_mstd"}
    for size, settings in files.items():
        assert settings["model"].startswith(f"deit_{ {'s': 'small', 'b': 'base'}[size] }_patch16_224")
        assert settings["alpha_lr"] == VALUE["alpha_lr"] and settings["crop"] == VALUE["released_crop"]
    assert log["lr"] == files["s"]["lr"] * log["batch_size"] / files["s"]["batch_size"]
