"""UVC's numbers (arXiv 2203.08243) that need neither data nor weights, counted and shown again by the library.

`measured()` gives our value of every such claim of params/5_uvc/claims.yaml: here the multiply-adds, through torch's
counter on timm's DeiT models (meta device), R and slicing; in `counts_uvc_released.py` what the released solver does.
`derived()` recomputes what follows from printed columns.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from leanvit import cost, counts_uvc_released, extras, surgery
from leanvit.counts_uvc_released import DEIT, IMAGENET, Value, on_meta, skip_ratio, small_vit
from leanvit.sites import blank_images
from leanvit.uvc_math import flops_ratio
from leanvit.uvc_plan import BlockPlan, BlockShape, Plan, Shapes, dense_macs, head_macs, read_shapes
from leanvit.uvc_slicing import KeepPatches, apply, mask


def measured() -> dict[str, Value]:
    """`{claim id: our value}` of every structural claim that needs nothing and follows from no other; three seconds."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found: dict[str, Value] = {}
        for part in (resource, slopes, slicing, patches):
            found |= part()
        return found | counts_uvc_released.measured()


def flop_counts(model: nn.Module) -> dict[str, int]:
    """FLOPs of one image by module, by torch's counter; the model itself is ``""``."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(blank_images(model, 1))
    root = type(model).__name__
    return {name.removeprefix(root).removeprefix("."): sum(ops.values()) for name, ops in
            counter.get_flop_counts().items() if name.startswith(root)}  # fmt: skip


# --- resource function and slicing -----------------------------------------------------------------------------------


def resource() -> dict[str, Value]:
    """Multiply-adds of the DeiT models, by torch's counter, and R of skipped blocks (UVC's specification, 1.6)."""
    found: dict[str, Value] = {}
    over = []
    for size, name in DEIT.items():
        model = on_meta(name)
        flops, shapes = flop_counts(model), read_shapes(model)
        block = {n: flops[f"blocks.0.{n}"] // 2 for n in ("attn", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
        whole = flops["blocks.0"] // 2
        parts = {"embed": flops["patch_embed"] // 2, "qkv": block["attn.qkv"], "proj": block["attn.proj"]}
        parts |= {"qk": (block["attn"] - block["attn.qkv"] - block["attn.proj"]) // 2, "block": whole}
        parts |= {"fc": block["mlp.fc1"], "m0": parts["embed"] + len(model.blocks) * whole}
        found |= {f"macs_{part}_{size}": count for part, count in parts.items()}
        m0, parameters = parts["m0"], surgery.count(model)[1] / 1e6
        found |= {f"flops_{size}": flops[""], f"block_share_{size}": 100 * whole / m0, f"gmacs_{size}": m0 / 1e9}
        found |= {f"floor_{size}": skip_ratio(shapes, len(model.blocks))}
        found |= {f"skip{k}_{size}": skip_ratio(shapes, k) for k in range(1, 8)}
        found |= {f"savit_{size}_dense_gmacs": m0 / 1e9, f"savit_{size}_dense_params": parameters}
        for attention in (b.attn for b in model.blocks):
            attention.fused_attn = not attention.fused_attn
        over += [f / (2 * (dense_macs(shapes) + head_macs(model))) for f in (flops[""], flop_counts(model)[""])]
    tiny = on_meta(DEIT["t"])
    weights = sum(m.weight.numel() for m in tiny.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    base = read_shapes(on_meta(DEIT["b"]))
    return found | {
        "macs_fused_unfused": over[0] if len(set(over)) == 1 else math.nan,
        "log_flops_t": 2 * found["macs_m0_t"] / 1e6,
        "small_dense_gmacs": found["gmacs_s"],
        "log_tiny_parameters": weights / 1e6,
        "log_tiny_skip7": found["skip7_t"],
        "log_base_epoch7_r": skip_ratio(base, 11),
        "log_base_epoch16_r": skip_ratio(base, 6),
        "log_base_epoch30_r": skip_ratio(base, 6),
        "log_base_low_r": skip_ratio(base, 8),
        "log_base_high_r": skip_ratio(base, 6),
        "log_small_skips_alone": found["skip2_s"],
        "tp_dense_gmacs": torch_pruning_macs() / 1e9,
    }


def torch_pruning_macs() -> float:
    """Multiply-adds of ViT-B/16 by Torch-Pruning's counter, which adds biases, norms and classifier.

    Raises `MissingExtra` where that library is not installed.
    """
    extras.need("Torch-Pruning's count", "peers", "torch_pruning")
    import torch_pruning

    model = on_meta("vit_base_patch16_224")
    with torch.no_grad():
        return torch_pruning.utils.count_ops_and_params(model, torch.zeros(1, 3, 224, 224, device="meta"))[0]


def slopes() -> dict[str, Value]:
    """Derivatives of the authors' R at full size, by autograd, and what a head dimension is really worth."""
    found: dict[str, Value] = {}
    for size, name in DEIT.items():
        shapes = read_shapes(on_meta(name))
        heads = shapes.blocks[0].heads
        ours = {}
        for paper in (True, False):
            start = torch.zeros(12, 2), torch.zeros(12, heads), torch.ones(12)
            s, r, run = (t.double().requires_grad_() for t in start)
            dead = torch.zeros(12, heads, dtype=torch.bool)
            ratio = flops_ratio(shapes, s, r, dead, run, paper=paper, tokens=shapes.tokens)
            ours[paper] = [g.flatten()[:2] for g in torch.autograd.grad(ratio, (s, r, run))]
        (head, unit), dim, gate = ours[True][0].tolist(), ours[True][1][0].item(), ours[True][2][0].item()
        values = {"head": head, "unit": unit, "dim": dim, "gate": gate, "spread": head / unit}
        found |= {f"slope_{what}_{size}": value for what, value in values.items()}
        found[f"dim_worth_{size}"] = ours[False][1][0].item() / dim
    del found["slope_spread_s"], found["dim_worth_s"]  # not printed
    return found


def plan_of_counts(shapes: Shapes, paper_macs: int, v_rows: int) -> Plan:
    """A plan of which the authors' R counts `paper_macs` MACs, `v_rows` of them in rows of removed value dimensions.

    The kept heads, removed dimensions and kept units of such a plan follow from the two numbers (of several
    solutions, the one of fewest heads); which of them goes where is free.
    """
    tokens, width, shape = shapes.tokens, shapes.width, shapes.blocks[0]
    removed = v_rows // (tokens * width)
    rest = (paper_macs - shapes.embed_macs) // tokens + removed * (tokens + width)
    per_head = shape.head_dim * (4 * width + 2 * tokens)
    heads = next(k for k in range(1, 99) if removed < 63 * k and (rest - k * per_head) % (2 * width) == 0)
    units = (rest - heads * per_head) // (2 * width)
    blocks = math.ceil(units / shape.hidden)
    plans = []
    for i in range(blocks):
        own = range(heads * i // blocks, heads * (i + 1) // blocks)
        gone = [removed * (h + 1) // heads - removed * h // heads for h in own]
        values = tuple(tuple(range(g, shape.head_dim)) for g in gone)
        count = units * (i + 1) // blocks - units * i // blocks
        plans.append(BlockPlan(tuple(range(len(own))), values, tuple(range(count))))
    return Plan(shapes, tuple(plans) + (None,) * (len(shapes.blocks) - blocks))


def random_block(shape: BlockShape, seed: int) -> BlockPlan:
    """Some heads, dimensions and units of a block, at least one of each."""
    generator = torch.Generator().manual_seed(seed)

    def some(count: int) -> tuple[int, ...]:
        kept = 1 + int(torch.randint(count, (), generator=generator))
        return tuple(sorted(torch.randperm(count, generator=generator)[:kept].tolist()))

    heads = some(shape.heads)
    return BlockPlan(heads, tuple(some(shape.head_dim) for _ in heads), some(shape.hidden))


@torch.no_grad()
def slicing() -> dict[str, Value]:
    """What slicing leaves: exactly the formula's multiply-adds, and the masked model's logits."""
    model = on_meta(DEIT["t"])
    shapes = read_shapes(model)
    plan = plan_of_counts(shapes, 655_684_653, 19_781_952)
    masked = mask(model, Plan(shapes, tuple(random_block(b, i) for i, b in enumerate(shapes.blocks))))
    same = flop_counts(masked)[""] == flop_counts(model)[""]
    same &= cost.parameters(masked)["bytes"] == cost.parameters(model)["bytes"]
    apply(model, plan)
    sliced = flop_counts(model)[""] // 2 - head_macs(model)
    difference, conservative = 0.0, True
    for seed in range(4):
        dense = small_vit()
        small = read_shapes(dense)
        blocks = [None if i == seed else random_block(b, 10 * seed + i) for i, b in enumerate(small.blocks)]
        cut = Plan(small, tuple(blocks))
        heads_alone = Plan(small, tuple(b and replace(b, values=(tuple(range(8)),) * len(b.heads)) for b in blocks))
        conservative &= cut.macs() < cut.paper_macs() and heads_alone.macs() == heads_alone.paper_macs()
        zeros = mask(dense, cut)
        apply(dense, cut)
        x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
        difference = max(difference, (dense(x) - zeros(x)).abs().max().item())
    q, v = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 3)
    with FlopCounterMode(display=False) as counter:
        narrow = F.scaled_dot_product_attention(q, q, v)
    return {
        "sliced_r_macs": plan.paper_macs(),
        "sliced_v_rows": plan.paper_macs() - sliced,
        "sliced_macs": sliced,
        "sliced_r_conservative": conservative,
        "sliced_equals_masked": difference,
        "sdpa_narrow_values": narrow.shape == v.shape and counter.get_total_flops() == 2 * 2 * 5**2 * (8 + 3),
        "masks_save_nothing": same,
        "distilled_tokens": read_shapes(on_meta("deit_tiny_distilled_patch16_224")).tokens,
    }


def patches() -> dict[str, Value]:
    """Patch gates as released multiply tokens in front of the position embedding."""

    def times(gate: Tensor):
        return lambda module, inputs, output: output * gate

    model = on_meta(DEIT["t"])
    dense = flop_counts(model)[""]
    model.patch_embed.register_forward_hook(times(torch.zeros(1, 196, 1, device="meta")))
    small, x = small_vit(), torch.randn(1, 3, 16, 16, dtype=torch.float64)
    gate = torch.ones(1, 16, 1, dtype=torch.float64)
    gate[:, 8:] = 0
    handle = small.patch_embed.register_forward_hook(times(gate))
    with torch.no_grad():
        zeroed = small(x)
        handle.remove()
        small.patch_drop = KeepPatches(range(8), 1)
        gathered = small(x)
    return {
        "patch_gate_first": torch.sigmoid(torch.tensor(3.0)).item(),
        "patch_zeros_save_nothing": flop_counts(model)[""] == dense,
        "patch_zeros_attend": bool((zeroed - gathered).abs().max() > 1e-3),
    }


# --- what follows from printed columns -------------------------------------------------------------------------------


def derived(published: Mapping[str, Value]) -> dict[str, Value]:
    """`{claim id: value}` of the claims that follow from other published ones; `published` is `{claim id: value}`."""
    p = published
    rows = [name.removesuffix("_gmacs") for name in p if name.startswith("small_") and name.endswith("_gmacs")]
    found = {f"{row}_remaining": 100 * p[f"{row}_gmacs"] / p["small_dense_gmacs"] for row in rows}
    found |= {f"{row}_drop": p["small_dense_top1"] - p[f"{row}_top1"] for row in rows if row != "small_dense"}
    shapes = {size: read_shapes(on_meta(name)) for size, name in DEIT.items()}
    ratios = {size: [skip_ratio(s, k) for k in range(13)] for size, s in shapes.items()}

    def skips(size: str, ratio: float) -> int:
        """The most blocks that can be skipped at this R (in percent), up to the last printed digit."""
        return max(k for k, r in enumerate(ratios[size]) if r >= ratio - 0.01)

    steps = math.ceil(math.ceil(IMAGENET / p["log_small_gpus"]) / p["log_small_batch"])
    seven, last = ratios["t"][7], p["log_tiny_epoch31_r"]
    return found | {
        "tiny_top1_derived": p["tiny_dense_top1"] - p["tiny_drop"],
        "tiny_distilled_top1_derived": p["tiny_distilled_dense_top1"] - p["tiny_distilled_drop"],
        "base_uvc_drop": p["savit_b_dense_top1"] - p["base_uvc_top1"],
        "base_uvc_remaining": 100 * p["base_uvc_gmacs"] / p["savit_b_dense_gmacs"],
        "log_tiny_name": p["log_tiny_epoch9_r"] / 100,
        "log_tiny_blocks": skips("t", last),
        "log_tiny_width": seven - last,
        "log_tiny_overshoot": 100 * p["readme_budget"] - last,
        "log_base_skips": skips("b", p["log_base_epoch7_r"]),
        "log_small_gain": p["log_small_best"] - p["log_small_last"],
        "log_small_best_epoch": p["log_small_best_step"] / steps,
        "log_small_width_needed": ratios["s"][2] - p["small_uvc50_remaining"],
        "stage2_lr": p["readme_learning_rate"] * p["stage2_batch"] * p["stage2_gpus"] / 512,
    }
