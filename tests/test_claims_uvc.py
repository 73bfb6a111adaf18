"""UVC's ledger: no row lost, what needs nothing measured again, the closed forms without the library."""

import re
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
from torch.utils.data import DistributedSampler

from leanvit import claims, counts_uvc, uvc
from leanvit import counts_uvc_released as released
from leanvit.uvc_math import next_smallest
from leanvit.uvc_plan import read_shapes

BOOK = {c.id: c for c in claims.load(Path(__file__).parents[1] / "params" / "5_uvc" / "claims.yaml")}
PUBLISHED = {name: claim.value for name, claim in BOOK.items()}
WIDTHS = {"t": 192, "s": 384, "b": 768}


def assert_matches(measured):
    verdicts = claims.check([BOOK[name] for name in measured], measured)
    assert [verdict for verdict in verdicts if verdict.verdict != "matches"] == []


# ---- the book


def test_no_row_is_lost():
    tables = {
        # three models: 8 terms, share, floor, 7 skips, GMACs; the log's size, both kinds of attention
        "resource function": 3 * (8 + 1 + 1 + 7 + 1) + 2,
        "derivatives of R": 3 * 4 + 2 + 2,
        "slicing": 8,
        "variables and loss": 18,
        "patch gating": 6,
        "schedules": 14,
        "recipe": 21,
        "README command": 13 + 1 + 3 + 2 + 7 + 3 + 2 + 7 + 1,
        "refused flags": 17,
        "argparse defaults": 15 + 5 + 2,
        # P1 to P14 as far as they have a number or can be shown, and seven trends
        "released code": 2 + 1 + 1 + 4 + 3 + 3 + 7 * 1 + 7,
        "README, DeiT-S": 7 * 3 + 6 + 2,
        "README, DeiT-T": 7,
        # all columns but four parameter counts that SAViT leaves empty; UVC's own row has four cells
        "SAViT, Table 2": 4 + 3 * (11 + 6 + 4) - 4,
        "DIMAP, Table 2b": 2 + 2 * 3,
        "older README, file names": 3,
        "log, DeiT-T stage 1": 2 + 7 * 2 + 3 + 5 + 3,
        "log, DeiT-B stage 1": 4 * 2 + 2 + 3 + 1,
        "log, DeiT-S stage 2": 3 + 3 + 5 + 5 + 2,
        # Torch-Pruning, Isomorphic, NViT, MDP, X-Pruner, CP-ViT, WDPruning, ViT-Slim, VTC-LFC, ToMe, DynamicViT,
        # S2ViTE, EViT, HiAP, SKD, CORP, a trend
        "peers": sum((7, 4 * 3, 4 * 3, 2, 2 * 2, 3, 2 * 3, 2 * 3, 3 * 2, 2 * 4, 5, 1, 2, 2 * 2, 3, 2, 1)),
        "ablation, as others tell it": 3,
        "controls": 2,
    }
    assert dict(Counter(claim.table for claim in BOOK.values())) == tables
    kinds = Counter(claim.kind for claim in BOOK.values())
    assert kinds == {"structural": 383, "accuracy": 88, "trend": 21, "speed": 11}


def test_every_row_says_where_it_comes_from_and_what_it_takes():
    for claim in BOOK.values():
        assert re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", claim.id), claim.id
        assert claim.tag in "CASDT" and claim.value is not None, claim.id  # nothing from memory, nothing missing
        assert (claim.kind == "trend") == claim.id.startswith("trend_"), claim.id
        if claim.kind == "accuracy":
            assert claim.unit in ("%", "points") and "GPU" in claim.needs, claim.id
        if claim.kind == "trend":
            assert claim.compare == "true" and "params/5_uvc/embedded.yaml" in claim.needs
        if claim.kind == "speed":
            assert re.search(r"V100|A5000|NVIDIA", claim.needs), claim.id
        if claim.tag == "D" and claim.kind == "structural":
            assert claim.needs == "nothing", claim.id  # what was derived can be derived again
    assert not any(
        re.search("t2t", claim.id + claim.claim, re.I) for claim in BOOK.values() if claim.kind != "structural"
    )


def test_flags_stand_with_value_and_default():
    """Every flag of the README's command that UVC itself reads has its row, the inert ones a refusal, too."""
    words = {word.lstrip("-").replace("-", "_") for word in released.README if word.startswith("--")}
    launch = {"gpu_num", "uvc_train", "model_type", "eval_every", "num_workers", "seed", "output_dir", "log_interval"}
    assert {f"readme_{word}" for word in words - launch} <= set(BOOK)
    assert {f"refused_{name}" for name in (*released.INERT, *released.ONLY)} <= set(BOOK)


# the columns once more, straight from the tables: top-1, GMACs, remaining %
SMALL = """
dense 79.8 4.6 100 | scop 77.5 2.6 56.4 | power 78.3 2.7 58.7 | hvt 78.0 2.4 52.2 | patch_slimming 79.4 2.6 56.5
uvc58 79.44 2.65 57.61 | uvc50 78.82 2.32 50.41
"""
# parameters in millions (0: none printed), GMACs, top-1
SAVIT = """
b_dense 86.6 17.6 81.84 | b_s2vite 56.8 11.8 82.22 | b_ssp 56.8 11.8 80.80 | b_vtp 47.3 10.0 80.7
b_psvit 86.6 9.8 81.5
b_evovit 0 11.7 81.3 | b_dynamicvit 0 11.2 81.3 | b_vitslim 52.6 10.6 82.40 | b_savit_10g 51.9 10.6 82.75
b_savit_8g 42.6 8.8 82.54 | b_savit_5g 25.4 5.3 81.66 | s_dense 22.1 4.6 79.85 | s_s2vite 14.6 3.1 79.22
s_ssp 14.6 3.1 77.74 | s_adavit 0 3.6 78.60 | s_dynamicvit 0 3.4 79.60 | s_savit 14.7 3.1 80.11
t_dense 5.7 1.3 72.20 | t_s2vite 4.2 0.9 70.12 | t_ssp 4.2 0.9 68.59 | t_savit 4.2 0.9 70.72
"""
# top-1 and Real FLOPs of the epochs after the warm-up
LOGS = """
tiny_epoch6 59.02 64.7 | tiny_epoch7 57.57 65.9 | tiny_epoch8 58.63 57.7 | tiny_epoch9 48.56 48.45
tiny_epoch10 41.57 41.6 | tiny_epoch20 54.25 42.6 | tiny_epoch31 56.28 42.71
base_epoch6 74.17 66.8 | base_epoch7 6.8 8.93 | base_epoch16 68.75 50.33 | base_epoch30 67.98 50.33
"""


@pytest.mark.parametrize(
    ("text", "prefix", "columns"),
    [
        (SMALL, "small_", ("top1", "gmacs", "remaining")),
        (SAVIT, "savit_", ("params", "gmacs", "top1")),
        (LOGS, "log_", ("top1", "r")),
    ],
    ids=["README", "SAViT", "logs"],
)
def test_every_cell_of_the_large_tables(text, prefix, columns):
    rows = [row.split() for row in re.split(r"\||\n", text.strip())]
    cells = {f"{prefix}{name}_{c}": float(v) for name, *row in rows for c, v in zip(columns, row, strict=True)}
    cells = {name: value for name, value in cells.items() if not (value == 0 and name.endswith("params"))}
    assert {name: PUBLISHED.get(name) for name in cells} == cells


# ---- what needs nothing


def test_structural_rows_match():
    state = torch.random.get_rng_state()
    measured = counts_uvc.measured()
    assert torch.equal(state, torch.random.get_rng_state())
    derived = counts_uvc.derived(PUBLISHED)
    assert not set(measured) & set(derived)
    alone = {c.id for c in BOOK.values() if c.kind == "structural" and c.needs == "nothing"}
    assert set(measured) | set(derived) == alone
    if torch.__version__ < "2.15":  # what the bound itself has as gradient is torch's matter
        del measured["p4_at_bound"]
    assert_matches(measured | derived)


@pytest.mark.parametrize("size", WIDTHS)
def test_closed_forms(size):
    """The terms of section 1.6 and their derivatives, from N, D, h and P alone."""
    d = WIDTHS[size]
    heads, hidden, n = d // 64, 4 * d, 197
    terms = {
        "embed": 196 * d * 16 * 16 * 3,
        "qkv": 3 * n * d * d,
        "qk": n * n * d,
        "proj": n * d * d,
        "fc": n * d * hidden,
    }
    block = terms["qkv"] + 2 * terms["qk"] + terms["proj"] + 2 * terms["fc"]
    m0 = terms["embed"] + 12 * block
    measured = {f"macs_{name}": count for name, count in (terms | {"block": block, "m0": m0}).items()}
    measured |= {"flops": 2 * (m0 + 1000 * d), "block_share": 100 * block / m0, "floor": 100 * terms["embed"] / m0}
    measured |= {f"skip{k}": 100 - 100 * k * block / m0 for k in range(1, 8)}
    attention = terms["qkv"] + 2 * terms["qk"] + terms["proj"]
    measured |= {
        "slope_head": -attention / heads / m0,
        "slope_unit": -2 * terms["fc"] / hidden / m0,
        "slope_dim": -(terms["qk"] + terms["proj"]) / d / m0,
        "slope_gate": block / m0,
    }
    if size != "s":
        measured["slope_spread"] = measured["slope_head"] / measured["slope_unit"]
        measured["dim_worth"] = 1 + d / (n + d)
    measured = {f"{name}_{size}": value for name, value in measured.items()}
    resource = ("resource function", "derivatives of R")
    others = {"log_flops_t", "macs_fused_unfused", f"gmacs_{size}"}
    rows = {c.id for c in BOOK.values() if c.table in resource and c.id.endswith(f"_{size}")} - others
    assert rows == set(measured)
    assert_matches(measured)


def test_the_random_draw_of_the_specification_is_consistent():
    """MACs by R less the V rows that it leaves in are the sliced ones, in whole dimensions."""
    r_macs, v_rows, sliced = (PUBLISHED[f"sliced_{name}"] for name in ("r_macs", "v_rows", "macs"))
    assert r_macs - v_rows == sliced and v_rows % (197 * 192) == 0
    shapes = read_shapes(counts_uvc.on_meta(released.DEIT["t"]))
    plan = counts_uvc.plan_of_counts(shapes, r_macs, v_rows)
    removed = sum(64 - len(v) for b in plan.blocks if b is not None for v in b.values)
    assert removed == v_rows // (197 * 192) and None in plan.blocks
    assert plan.paper_macs() == r_macs


# ---- printed columns


def test_printed_columns_agree_with_each_other():
    p = PUBLISHED
    rows = ("dense", "scop", "power", "hvt", "patch_slimming", "uvc58", "uvc50")
    for row in rows[1:]:
        assert p[f"small_{row}_top1"] + p[f"small_{row}_drop"] == pytest.approx(p["small_dense_top1"], abs=1e-9), row
    # the two rows of UVC have two decimals, so their columns agree more closely than rounding of 4.6 explains
    for row in ("uvc58", "uvc50"):
        assert p[f"small_{row}_gmacs"] == pytest.approx(4.6 * p[f"small_{row}_remaining"] / 100, abs=0.005)
    assert round(p["log_small_best"], 2) == p["small_uvc50_top1"]  # the README's number is the best reading
    assert 100 * p["log_small_name"] == p["small_uvc50_remaining"]
    assert p["base_uvc_top1"] == pytest.approx(p["dimap_uvc_top1"], abs=0.05)
    assert p["base_uvc_gmacs"] == p["dimap_uvc_gmacs"] == 8.0
    assert p["log_tiny_skip7"] == p["skip7_t"] and p["log_base_epoch16_r"] == p["skip6_b"]
    schedule = [value for name, value in p.items() if re.fullmatch(r"argparse_zlr\d", name)]
    assert schedule == [10, 20, 30, 40, 50]


def test_what_the_trends_state_holds_for_the_printed_numbers():
    p = PUBLISHED
    assert max(p["small_uvc50_drop"], p["tiny_drop"], p["tiny_distilled_drop"]) < 1
    assert p["small_uvc58_top1"] > p["small_uvc50_top1"] and p["small_uvc58_gmacs"] > p["small_uvc50_gmacs"]
    assert p["log_small_best"] > p["log_small_last"] > p["log_small_before"]
    assert p["log_tiny_epoch1_top1"] < p["log_tiny_epoch5_top1"] < p["tiny_dense_top1"]
    for last in (p["log_tiny_epoch31_r"], p["log_base_epoch7_r"]):
        assert abs(last - 100 * p["readme_budget"]) > 2
    saved = 100 - p["log_tiny_epoch31_r"]
    assert (100 - p["log_tiny_skip7"]) / saved > 0.9
    assert min(p["log_tiny_left_low"], p["log_base_left"]) > 99
    rivals = {"vtclfc_s": p["vtclfc_s_top1"], "isomorphic_2_6g": p["isomorphic_2_6g_top1"]}
    assert min(rivals.values()) > p["small_uvc50_top1"] and p["vtclfc_s_gmacs"] < p["small_uvc50_gmacs"]


# ---- defects: the control beside each


def test_without_the_defect_nothing_is_shown():
    """Each demonstration turns out the other way where the cause is taken away."""
    sampler = DistributedSampler(range(50), num_replicas=2, rank=0)
    orders = []
    for epoch in range(2):  # P12
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] != orders[1]
    gate = torch.nn.Parameter(torch.tensor([[-1.0, 1.0]]).expand(14, 2).clone())  # P6
    gate.grad = torch.ones(14, 2)
    torch.optim.SGD([gate], lr=0.1).step()
    assert released.slope_of_clamp(0.1) == 1 and released.slope_of_clamp(3.0) == 0  # P4
    for low, follow in ((1, False), (17, True)):  # P2
        search = released.faithful(4, follow=follow)
        search.step_number = search.steps
        assert search.z_rate() == low
    model = released.small_vit()  # P7: masks made anew know no dead units
    plan = uvc.magnitude_plan(model, 0.5, round_units=4)
    again = uvc.mask(uvc.mask(model, plan), plan)
    for block, kept in zip(again.blocks, plan.blocks, strict=True):
        units = torch.zeros(128, dtype=torch.bool)
        units[list(kept.units)] = True
        for alive in (block.mlp.fc1.weight.any(1), block.mlp.fc2.weight.any(0)):
            assert torch.equal(alive, units)


def test_units_starve_and_their_own_clip_feeds_them():
    """P1: with one clip for both kinds a unit count moves 194 times slower than a head count; alone it does not."""
    search = released.faithful(model=timm.create_model("test_vit", num_classes=5), enable_block_gating=0)
    norms = search.norms()
    released.set_duals(search, 1e6, 0.0)
    search.move_counts(norms)
    heads, units = search.s.max(0).values.tolist()
    assert heads == pytest.approx(search.flags.slr) and units < heads / 20
    search.s[:, 0] = search.s_limit[:, 0]  # no head can go any more, so units alone are clipped
    search.s[:, 1] = search.r[:] = 0
    search.move_counts(norms)
    assert search.s[:, 1].max().item() == pytest.approx(search.flags.slr)
    assert all(next_smallest(n.units, torch.tensor(0.0)) == n.units.min() for n in norms)
