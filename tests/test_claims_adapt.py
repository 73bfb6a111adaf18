"""The published numbers of KAdaptation and block expansion, computed again without the library's methods."""

import copy
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import peft
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import nn

from leanvit import claims

PARAMS = Path(__file__).parents[1] / "params"
KAD = {claim.id: claim for claim in claims.load(PARAMS / "3_kadaptation" / "claims.yaml")}
BLOCK = {claim.id: claim for claim in claims.load(PARAMS / "4_block_expansion" / "claims.yaml")}
SPEED = {claim.id: claim for claim in claims.load(PARAMS / "7_speed" / "claims.yaml")}
HEAD = 513 * 1151 / 20  # 512 features of CLIP and a bias, the mean number of classes
SIZES = {"tiny": (192, 12), "small": (384, 12), "base": (768, 12), "large": (1024, 24), "huge": (1280, 32)}
ROWS = ("full", "top3", "linear", "lora_r4", "lora_r8", "lora_r16", "p1", "p2", "p3", "p4")


def assert_matches(book, measured, rows):
    """Every measured claim holds, and `rows` (a rule for claims) selects exactly the measured ones."""
    assert {claim.id for claim in book.values() if rows(claim)} == set(measured)
    verdicts = claims.check([book[name] for name in measured], measured)
    assert [verdict for verdict in verdicts if verdict.verdict != "matches"] == []


def structural(*tables, compare="equal"):
    """The structural claims of these tables: numbers, or statements."""
    return lambda c: c.kind == "structural" and c.table in tables and (c.compare == "true") == (compare == "true")


# ---- the books


@pytest.mark.parametrize(
    ("book", "tables"),
    [
        (
            KAD,
            {
                "parameter counts": 34,
                "structure": 14,
                "released code": 17,
                "PE": 9,
                "data sets": 30,
                "protocol": 13,
                "README, 20 data sets": 16,
                "README, figure": 1,
                "ICinW leaderboard": 1,
                "post of the first author": 16,
                "by data set, from memory": 60,
                "intrinsic dimension": 1,
            },
        ),
        (
            BLOCK,
            {
                "positions": 12,
                "structure": 7,
                "parameter counts": 24,
                "cost": 3,
                "k-NN": 8,
                "schedule": 12,
                "results table": 67,
                "README, figure": 41,
                "k-NN script, comments": 3,
                "abstract": 1,
                "released code": 3,
                "DINO, ICCV 2021": 1,
            },
        ),
    ],
    ids=["kadaptation", "block_expansion"],
)
def test_no_row_is_lost(book, tables):
    assert dict(Counter(claim.table for claim in book.values())) == tables
    for claim in book.values():
        assert re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", claim.id), claim.id
        assert claim.tag != "N" and claim.value is not None
        assert claim.kind in ("structural", "accuracy", "trend")
        if claim.kind == "accuracy":
            assert claim.needs != "nothing"
        if claim.kind == "accuracy" and claim.id != "abstract_ten_iterations":
            assert "GPU" in claim.needs and re.search("clip|dino", claim.needs, re.I), claim.id
        if claim.kind == "trend":
            assert claim.compare == "true" and "embedded.yaml" in claim.needs
        if claim.tag == "M":
            assert "from memory" in claim.claim
    alone = [c.id for c in book.values() if c.kind == "structural" and c.needs != "nothing"]
    assert alone == (["released_left_lambda"] if book is KAD else [])


def test_ids_are_unique_in_a_book_and_speed_goals_stand():
    for name in ("3_kadaptation", "4_block_expansion", "7_speed"):
        ids = re.findall(r"\{id: (\w+)", (PARAMS / name / "claims.yaml").read_text(encoding="utf-8"))
        assert len(ids) == len(set(ids)) == len(claims.load(PARAMS / name / "claims.yaml"))
    goals = {
        "kad_layer_over_full": 0.88,
        "kad_layer_over_lora": 1.05,
        "kad_merged_over_stock": 1.0,
        "block_p3_step": 0.88,
        "block_p3_saved": 0.70,
        "block_p1_step": 0.55,
        "block_p1_saved": 0.12,
        "knn_over_bare": 1.3,
    }
    assert {name: SPEED[name].value for name in goals} == goals
    for name in goals:
        assert SPEED[name].compare == ("equal" if name == "kad_merged_over_stock" else "at_most")
        assert SPEED[name].kind == ("memory" if name.endswith("saved") else "speed")


# ---- KAdaptation


def kadaptation(d, depth, n=32, r=1, rule_rank=1):
    """Numbers of the adapter: two sets of rules (rule_rank None: full), factors and a bias a layer."""
    rules = 2 * n**3 if rule_rank is None else 2 * 2 * n**2 * rule_rank
    return rules + depth * (2 * 2 * n * (d // n) * r + d)


def numbers(name, kept=lambda name: True):
    """Parameters of a timm model whose names are kept."""
    with torch.device("meta"):
        model = timm.create_model(name)
    return sum(p.numel() for key, p in model.named_parameters() if kept(key))


def test_counts_of_kadaptation_and_its_rivals():
    d, depth, w = 768, 12, 64
    backbone = {
        "linear": 0,
        "kadaptation": kadaptation(d, depth),
        "compacter": depth * (2 * d + 2 * (d + w) + w + d),
        "adapter": depth * (2 * d * w + w + d + 2 * d),
        "lora": depth * 2 * 4 * (d + d),
    }
    # timm's CLIP tower has a bias in the projection that OpenAI's lacks
    timm_counts = {size: numbers(f"vit_base_patch{size}_clip_quickgelu_224.openai") for size in (16, 32)}
    biases = {size: numbers(f"vit_base_patch{size}_clip_quickgelu_224.openai", "head.bias".__eq__) for size in (16, 32)}
    backbone["full"], b16 = timm_counts[32] - biases[32], timm_counts[16] - biases[16]
    measured = {f"params_{name}": int(count + HEAD) for name, count in backbone.items()}
    measured |= {f"backbone_{name}": count for name, count in backbone.items()}
    measured |= {f"kad_vit_{name}": kadaptation(*SIZES[name]) for name in ("tiny", "small", "large")}
    measured |= {f"kad_{role}_{side}": depth * 32 * 24 for role in "qv" for side in ("left", "right")}
    measured |= {
        "params_kadaptation_b16": int(kadaptation(d, depth) + HEAD),
        "params_full_b16": int(b16 + HEAD),
        "head_mean": HEAD,
        "classes_mean": 1151 / 20,
        "backbone_full_b16": b16,
        "timm_clip_b32": timm_counts[32],
        "timm_clip_b16": timm_counts[16],
        "layer_compacter": backbone["compacter"] / depth,
        "layer_adapter": backbone["adapter"] / depth,
        "compacter_rule": 4 * 4 * 4,
        "kad_rules": 4 * 32 * 32,
        "kad_bias": depth * d,
        "kad_full_rule": kadaptation(d, depth, rule_rank=None),
        "kad_full_rule_alone": 2 * 32**3,
    }
    assert_matches(KAD, measured, structural("parameter counts"))
    alone = measured["kad_full_rule_alone"] > measured["backbone_kadaptation"]
    assert_matches(KAD, {"kad_full_rule_not_printed": alone}, structural("parameter counts", compare="true"))
    parts = [measured[f"kad_{part}"] for part in ("rules", "bias", "q_left", "q_right", "v_left", "v_right")]
    assert sum(parts) == measured["params_kadaptation"] - int(HEAD) == 50_176


def update(n, d, rule_rank, seed=0, dtype=torch.float64):
    """A random sum of n Kronecker products of n x n rules and rank-one (d/n) x (d/n) matrices."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.randn(n, d // n, 1, generator=generator, dtype=dtype) for _ in range(2))
    rules = torch.randn(n, n, n, generator=generator, dtype=dtype)
    if rule_rank is not None:
        left = torch.randn(n, n, rule_rank, generator=generator, dtype=dtype)
        rules = left @ torch.randn(n, rule_rank, n, generator=generator, dtype=dtype)
    return torch.einsum("iac,ibe->abce", rules, u @ v.mT).reshape(d, d)


def test_structure_of_the_update():
    d, n = 768, 32
    ranks = {rank: int(torch.linalg.matrix_rank(update(n, d, rank))) for rank in (1, None)}
    rule = n * n * (0.02**2 / 12) ** 2  # E |s|^2 |t|^2, s and t uniform on (-0.01, 0.01)
    measured = {
        "kad_inner_size": n * 1 * 1,
        "kad_rank_default": ranks[1],
        "kad_rank_full_rule": ranks[None],
        "kad_rank_full_rule_n4": int(torch.linalg.matrix_rank(update(4, 64, None))),
        "kad_fewer_multiply_adds": d * d / (2 * d * n),
        "kad_materialised_mb": n * d * d * 4 / 1e6,
        "kad_file_kb": kadaptation(d, 12) * 4 / 1e3,
        "kad_scale": 128 / 4 * 5,
        "lora_scale": 128 / 4,
        "kad_first_step_gain": 160**2 * rule * (d / n) * 0.02**2,
        "lora_first_step_gain": 32**2 * d * 0.02**2,
        "intrinsic_threshold": 90,
    }
    assert_matches(KAD, measured, structural("structure"))


def test_what_leaves_the_output_as_it_is():
    torch.manual_seed(0)
    x, d, w = torch.randn(5, 64), 64, 16
    lora = x @ torch.randn(d, 4) @ torch.zeros(4, d)
    factors = torch.einsum("iac,ibe->abce", torch.randn(8, 8, 8), torch.randn(8, 8, 1) @ torch.zeros(8, 1, 8))
    adapter = F.relu(x @ (0.02 * torch.randn(d, w))) @ (0.02 * torch.randn(w, d))
    rules, (down, up) = torch.rand(4, 4, 4) * 2 - 1, ((d, w), (w, d))
    z = x
    for a, b in (down, up):
        small = nn.init.xavier_uniform_(torch.empty(a // 4, 1)) @ nn.init.xavier_uniform_(torch.empty(1, b // 4))
        z = F.gelu(z @ torch.einsum("iac,be->abce", rules, small).reshape(a, b))
    measured = {
        "lora_and_kad_start_as_identity": not lora.any() and not (x @ factors.reshape(d, d)).any(),
        "adapter_and_compacter_do_not": bool(adapter.abs().max() > 1e-3) and bool(z.abs().max() > 1e-3),
    }
    assert_matches(KAD, {k: bool(v) for k, v in measured.items()}, structural("structure", compare="true"))


def kad_gradients(start, steps):
    """Gradients of (s, t, u, v) after `steps` of gradient descent on a quadratic loss, n = 4, d = 16."""
    generator = torch.Generator().manual_seed(0)
    x, target = (torch.randn(32, 16, generator=generator) for _ in range(2))
    factors = [torch.randn(4, 4, generator=generator) for _ in range(2)] + [start(4, 4, generator), torch.zeros(4, 4)]
    factors = [f.requires_grad_() for f in factors]
    for step in range(steps + 1):
        s, t, u, v = factors
        h = torch.einsum("ia,ic,ib,ie->abce", s, t, u, v).reshape(16, 16)
        gradients = torch.autograd.grad(F.mse_loss(x @ h, target), factors)
        if step < steps:
            factors = [(f - 0.1 * g).detach().requires_grad_() for f, g in zip(factors, gradients, strict=True)]
    return gradients


def segments(tokens, batch, heads=12, width=768):
    """Which segment of a bias every (image, head, token) gets from the reshape without a transpose."""
    bias = torch.arange(heads).repeat_interleave(width // heads).expand(tokens, batch, width)
    scrambled = bias.reshape(batch * heads, tokens, width // heads)
    assert (scrambled == scrambled[..., :1]).all()
    return scrambled[..., 0].reshape(batch, heads, tokens)


def predicted(tokens, heads=12):
    return torch.tensor([[(tokens % heads * h + t) % heads for t in range(tokens)] for h in range(heads)])


def scramble_mixes_images():
    """The released reshape of (N, B, C): does the second image change what the first one gets?"""
    delta = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(0))
    other = delta.clone()
    other[:, 1] += 1
    first, right = ((d.reshape(2, 4, 5, 2)[0], d.reshape(5, 8, 2).transpose(0, 1)[:4]) for d in (delta, other))
    return not torch.equal(first[0], right[0]) and torch.equal(first[1], right[1])


def frozen_batch_norm():
    torch.manual_seed(0)
    norm, x = nn.BatchNorm1d(4, affine=False), 3 + 2 * torch.randn(64, 4)
    norm(x)
    norm.eval(), nn.Dropout(0.5).eval()
    kept = torch.allclose(norm.running_mean, 0.1 * x.mean(0), rtol=1e-5)
    return kept and torch.allclose(norm.running_var, 0.9 + 0.1 * x.var(0), rtol=1e-5)


def test_defects_of_the_released_kadaptation():
    def zero(a, b, generator):
        return torch.zeros(a, b)

    def live(a, b, generator):
        return torch.randn(a, b, generator=generator)

    dead = [not g.any() for steps in (0, 3) for g in kad_gradients(zero, steps)]
    measured = {
        "released_dead_factors": all(dead),
        "fixed_live_factors": all(bool(g.any()) for g in kad_gradients(live, 1)),
        "released_mixes_images": scramble_mixes_images(),
        "released_batch_norm": frozen_batch_norm(),
    }
    for tokens in (50, 197):
        found = [bool((segments(tokens, batch) == predicted(tokens)).all()) for batch in (1, 4)]
        measured[f"released_segments_n{tokens}"] = all(found)
    shown = structural("released code", compare="true")
    assert_matches(KAD, measured, lambda c: shown(c) and c.needs == "nothing")
    biases, unused = 12 * 768, 12 * 2 * 768
    counts = {
        "released_used": kadaptation(768, 12) - unused,
        "released_unused_v": unused,
        "released_with_gradient": biases,
        "released_effective": int(HEAD + biases),
        "released_q_scale": 160 * math.sqrt(64),
        "released_fallback_lambda": [10 ** (-6 + k / 8) for k in range(97)][-1],
    }
    assert_matches(KAD, counts, structural("released code"))


def test_golden_values_of_pe():
    def pe(score, count, m0=KAD["pe_m0"].value):
        return score * math.exp(-math.log10(count / m0 + 1))

    methods = ("kadaptation", "linear", "full", "adapter", "compacter", "lora")
    printed = {m: (KAD[f"accuracy_{m}"].value / 100, KAD[f"params_{m}"].value) for m in methods}
    measured = {f"pe_{m}": pe(*printed[m]) for m in methods}
    assert max(measured, key=measured.get) == "pe_kadaptation"
    measured |= {"pe_m0": 10**8, "pe_full_m0_1e7": pe(*printed["full"], 1e7), "pe_nine_m0": pe(1, 9e8)}
    assert_matches(KAD, measured, structural("PE"))


# classes, training, validation (0: none) and test images, prompts
ELEVATER = """
102 3060 0 6084 34 | 10 50000 0 10000 18 | 100 50000 0 10000 18 | 211 31650 10550 21100 5 | 47 1880 1880 1880 8
10 5000 5000 5000 3 | 7 28709 3589 3589 6 | 100 3334 3333 3333 2 | 101 75750 0 25250 1 | 43 26640 12569 12630 3
2 8500 0 500 1 | 4 6347 423 711 1 | 10 60000 0 10000 1 | 102 1020 1020 6149 1 | 37 3680 0 3669 1
2 262144 32768 32768 1 | 2 6920 827 1821 1 | 45 3150 3150 25200 18 | 196 8144 0 8041 8 | 20 2501 2510 4952 1
"""


def test_data_sets_and_protocol():
    table = np.array([row.split() for row in re.split(r"\||\n", ELEVATER.strip())], dtype=int)
    classes, train, val, test, prompts = table.T
    names = [name for name in KAD if name.startswith("classes_") and name not in ("classes_total", "classes_mean")]
    measured = dict(zip(names, classes.tolist(), strict=True))
    totals = {"classes_total": classes, "images_train": train, "images_val": val, "images_test": test}
    measured |= {name: int(column.sum()) for name, column in totals.items()}
    measured |= {"prompts_total": int(prompts.sum()), "datasets_number": len(table)}
    measured |= {"metric_accuracy": 20 - 4 - 1 - 1, "metric_mean_per_class": 4, "metric_roc_auc": 1, "metric_map11": 1}
    assert_matches(KAD, measured, structural("data sets"))
    assert [KAD[name].claim.split(":")[0] for name in names][::19] == ["Caltech-101", "VOC 2007"]
    assert (val > 0).sum() == 12 and "12 data sets" in KAD["images_val"].claim

    grid = [10 ** (-6 + k / 8) for k in range(97)]
    coarse = range(0, 97, 16)
    runs = len(coarse) + 2 * len((8, 4, 2, 1))  # both sides of the peak, the span halved four times
    rates = [10**e for e in range(-6, 0)]
    measured = {
        "protocol_shots": 5,
        "protocol_subsets": 3,
        "protocol_val_per_class": math.ceil(0.2 * 5),
        "protocol_search_epochs": 10,
        "protocol_final_epochs": 10 + 40,
        "search_learning_rates": len(rates),
        "search_grid": len(grid),
        "search_coarse_runs": len(coarse),
        "search_runs_per_rate": runs,
        "search_runs": runs * len(rates),
        "search_lambda_first": grid[0],
        "search_lambda_middle": grid[48],
        "search_lambda_last": grid[96],
    }
    assert_matches(KAD, measured, structural("protocol"))


def test_recalled_and_posted_rows_have_the_printed_means():
    for method in ("full", "linear", "adapter"):
        row = [claim.value for claim in KAD.values() if claim.id.startswith(f"recalled_{method}_")]
        assert len(row) == 20
        assert np.mean(row) == pytest.approx(KAD[f"accuracy_{method}"].value, abs=0.0055), method
        assert all(KAD[claim].tag == "M" for claim in KAD if claim.startswith("recalled_"))
    for name in ("fer_2013", "kitti_distance", "mnist", "oxford_flower_102"):
        seeds = [KAD[f"lora_{name}_seed{seed}"].value for seed in range(3)]
        assert np.mean(seeds) == pytest.approx(KAD[f"lora_{name}_mean"].value, abs=0.0055), name
    order = [KAD[f"accuracy_{m}"].value for m in ("kadaptation", "linear", "full", "adapter", "compacter", "lora")]
    assert order == sorted(order, reverse=True)  # what the trends state


# ---- block expansion


def expand(blocks, split):
    """The stack after expansion: (source, is new), by inserting behind every split-th block."""
    stack = []
    for index in range(blocks):
        stack.append((index, False))
        if (index + 1) % split == 0:
            stack.append((index, True))
    return stack


def test_positions():
    measured = {}
    for claim in (c for c in BLOCK.values() if re.fullmatch(r"positions_p\d+(_rule|_released)?", c.id)):
        p, split, sources, places = re.fullmatch(
            r"p = (\d+), split (\d+): copies of (.+) stand at (.+)", claim.claim
        ).groups()
        stack = expand(12, int(split))
        new = [(source, place) for place, (source, is_new) in enumerate(stack) if is_new]
        text = ", ".join(str(s) for s, _ in new), ", ".join(str(at) for _, at in new)
        measured[claim.id] = text == (sources, places) and len(new) == int(p)
    assert len(measured) == 7
    bijective = True
    for split in range(1, 13):
        stack = expand(12, split)
        old = {i: i + i // split for i in range(12)}
        new = {(j + 1) * (split + 1) - 1: split * (j + 1) - 1 for j in range(12 // split)}
        bijective &= all(stack[at] == (i, False) for i, at in old.items())
        bijective &= all(stack[at] == (source, True) for at, source in new.items())
        bijective &= sorted([*old.values(), *new]) == list(range(12 + 12 // split))
    measured["index_map_bijective"] = bijective
    assert_matches(BLOCK, measured, structural("positions", compare="true"))
    sizes = {"blocks_vit_l": (24, 6), "blocks_vit_h": (32, 8), "blocks_giant": (40, 8)}
    counts = {name: sum(new for _, new in expand(*size)) for name, size in sizes.items()}
    assert expand(12, 11)[-1] == (11, False)  # the last old block stays on top
    counts["split_p1_released"] = 11
    assert_matches(BLOCK, counts, structural("positions"))


def new_block(source, zero=("attn.proj.weight", "attn.proj.bias", "mlp.fc2.weight", "mlp.fc2.bias")):
    """A copy of a block with these tensors zeroed."""
    block = copy.deepcopy(source)
    with torch.no_grad():
        for name in zero:
            block.get_parameter(name).zero_()
    return block


def block_gradients(block, x):
    """Gradients by name of a loss that no output makes flat."""
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad(F.mse_loss(block(x), target), list(block.parameters()))
    return dict(zip((name for name, _ in block.named_parameters()), gradients, strict=True))


def test_structure_of_a_new_block():
    torch.manual_seed(0)
    source, x = Block(16, 2, qkv_bias=True), torch.randn(3, 5, 16)
    with torch.no_grad():
        for p in source.parameters():  # nothing is zero by chance
            p.add_(0.1 * torch.randn_like(p))
    block = new_block(source)
    first = block_gradients(block, x)
    written = {"attn.proj.weight", "attn.proj.bias", "mlp.fc2.weight", "mlp.fc2.bias"}
    scaled = copy.deepcopy(source)
    scaled.ls1, scaled.ls2 = (timm.layers.LayerScale(16, init_values=1e-5) for _ in range(2))
    small = block_gradients(new_block(scaled), x)
    ratio = small["mlp.fc2.weight"].norm() / first["mlp.fc2.weight"].norm()
    with torch.no_grad():
        for name, p in block.named_parameters():
            p -= 0.5 * first[name]
    second = block_gradients(block, x)
    key = second["attn.qkv.bias"][16:32]
    second["attn.qkv.bias"] = torch.cat([second["attn.qkv.bias"][:16], second["attn.qkv.bias"][32:]])
    largest = max(g.abs().max() for g in second.values())
    measured = {
        "identity_at_start": all(torch.equal(new_block(source).train(mode)(x), x) for mode in (True, False)),
        "identity_needs_biases": not torch.allclose(new_block(source, ["attn.proj.weight", "mlp.fc2.weight"])(x), x),
        "identity_needs_both_linears": not any(
            torch.allclose(new_block(source, [f"{part}.weight", f"{part}.bias"])(x), x)
            for part in ("attn.proj", "mlp.fc2")
        ),
        "gradients_first_step": all(bool(g.any()) == (name in written) for name, g in first.items()),
        "gradients_second_step": all(bool(g.any()) for g in second.values()) and bool(key.abs().max() < 1e-6 * largest),
        "gradients_layer_scale": float(ratio) == pytest.approx(1e-5, rel=1e-3),
    }
    assert_matches(BLOCK, measured, structural("structure", compare="true"))
    assert_matches(BLOCK, {"head_init_bound": 1 / math.sqrt(768)}, structural("structure"))


def block_numbers(d):
    """qkv, proj, fc1, fc2 and two norms."""
    return 3 * d * d + 3 * d + d * d + d + 4 * d * d + 4 * d + 4 * d * d + d + 4 * d


def test_counts_and_costs_of_block_expansion():
    d, head = 768, 100 * 769
    base = numbers("vit_base_patch16_224.dino")
    assert block_numbers(d) == numbers("vit_base_patch16_224.dino", lambda name: name.startswith("blocks.3."))
    trained = {"full": base + head, "top3": 3 * block_numbers(d) + head}
    trained |= {f"p{p}": p * block_numbers(d) + head for p in (1, 2, 3, 4)}
    lora = {r: 12 * 2 * r * (d + d) for r in (4, 8, 16)}
    measured = {f"block_vit_{name}": block_numbers(size) for name, (size, _) in SIZES.items()}
    measured |= {f"params_{name}": count for name, count in trained.items()}
    for r, count in lora.items():
        measured[f"lora_r{r}_backbone"] = count
        measured[f"params_lora_r{r}"] = count + head
        measured[f"params_lora_r{r}_head_twice"] = count + 2 * head
    measured |= {
        "block_zeroed_only": d * d + d + 4 * d * d + d,
        "head_100": head,
        "vit_b_backbone": base,
        "params_top3_with_norm": trained["top3"] + 2 * d,
    }
    assert_matches(BLOCK, measured, structural("parameter counts"))
    printed = {f"printed_{name}": count / 1e6 for name, count in trained.items()}
    printed |= {f"printed_lora_r{r}": measured[f"params_lora_r{r}_head_twice"] / 1e3 for r in lora}
    printed["printed_linear"] = head / 1e3
    assert_matches(BLOCK, printed, lambda c: c.id.startswith("printed_"))
    for r in lora:  # counted once, the head would not give what is printed
        assert abs(measured[f"params_lora_r{r}"] / 1e3 - BLOCK[f"printed_lora_r{r}"].value) > 70
    cost = {"cost_p2": 1 + 2 / 12, "cost_p3": 1 + 3 / 12, "file_p3_mb": trained["p3"] * 4 / 1e6}
    assert_matches(BLOCK, cost, structural("cost"))


def test_knn_and_schedule():
    knn = {
        "knn_temperature": 0.07,
        "knn_k": 20,
        "knn_bank": 1_281_167,
        "knn_queries": 50 * 1000,
        "knn_bank_gb": 1_281_167 * 768 * 4 / 1e9,
        "knn_feature_width": 768,
        "knn_lora_feature_width": 100,
    }
    assert_matches(BLOCK, knn, structural("k-NN"))
    assert re.findall(r"\d+", BLOCK["knn_k_values"].claim) == ["10", "20", "100", "200"]

    def rate(step, warmup=500, steps=10_000):
        if step < warmup:
            return step / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

    measured = {f"schedule_step{step}": rate(step) for step in (0, 10, 500, 5250, 10_000)}
    per_epoch = {"cifar": 50_000 // 128, "dtd": 1880 // 128, "flowers": 1020 // 128, "food": 75_750 // 128}
    measured |= {f"iterations_{name}": steps for name, steps in per_epoch.items()}
    measured |= {f"epochs_{name}": 10_000 / per_epoch[name] for name in ("cifar", "dtd", "food")}
    assert_matches(BLOCK, measured, structural("schedule"))


def test_the_identity_of_the_released_knn_lands_on_pefts_wrapper():
    """Assigning a head on the wrapper leaves the inner head: what comes out are the logits."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=5)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["qkv"], modules_to_save=["head"])).eval()
    x = torch.randn(2, 3, *model.default_cfg["input_size"][1:])
    with torch.no_grad():
        logits = wrapped(x)
        wrapped.head = nn.Identity()
        assert torch.equal(wrapped(x), logits) and logits.shape == (2, 5)
        plain = timm.create_model("test_vit", num_classes=5).eval()
        plain.head = nn.Identity()
        assert plain(x).shape == (2, plain.num_features)


def test_means_and_forgetting_follow_from_the_printed_columns():
    transfer, kept = ({row: BLOCK[f"{name}_{row}"].value for row in ROWS} for name in ("transfer", "knn"))
    mean = {f"mean_{row}": (transfer[row] + kept[row]) / 2 for row in ROWS}
    measured = mean | {f"forgetting_{row}": 76.11 - kept[row] for row in ROWS}
    measured["plasticity_p3_over_top3"] = transfer["p3"] - transfer["top3"]
    table = structural("results table")
    assert_matches(BLOCK, measured, lambda c: table(c) and not c.id.startswith("printed_"))
    # what the trends state holds for the printed numbers
    blocks, ranks = [f"p{p}" for p in (1, 2, 3, 4)], ["lora_r4", "lora_r8", "lora_r16"]
    assert [transfer[p] for p in blocks] == sorted(transfer[p] for p in blocks)
    for group in (blocks, ranks):
        assert [kept[row] for row in group] == sorted((kept[row] for row in group), reverse=True)
    assert min(kept[p] for p in blocks) > max(kept[r] for r in ranks) > min(kept[r] for r in ranks) > kept["full"]
    assert min(kept, key=kept.get) == "full" and min(transfer, key=transfer.get) == "linear"
    assert max(transfer, key=transfer.get) == "p4" and max(mean, key=mean.get) == "mean_p3"
    assert transfer["p3"] > transfer["full"] and transfer["p3"] > transfer["top3"]
    assert abs(kept["p3"] - kept["top3"]) < 1
    assert BLOCK["figure_cifar10_lora_knn"].value < BLOCK["figure_cifar10_full_knn"].value
