"""Statements of ComCAT's ledger (params/2_comcat/claims.yaml) that are about values, shown on small random models.

The paper is arXiv 2305.17235; sections are those of ComCAT's specification.
Exactness, biases, gauges, the spectral mask against the authors' mixture, one-way truncation, defects of the released
code, the adapter for diffusion models: everything here is `{claim id: our value}`, and `counts_comcat` has the counts.
"""

import copy
import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.transforms.v2.functional import center_crop, resize

from leanvit import comcat, comcat_diffusion, train
from leanvit import comcat_ranks as ranks
from leanvit.comcat_calibrate import Moments
from leanvit.comcat_cut import product
from leanvit.comcat_factors import Spectrum, product_svd, roots
from leanvit.comcat_mixture import MixedAttention, MixedLinear, truncations
from leanvit.comcat_modules import read_heads
from leanvit.comcat_plan import MODES
from leanvit.comcat_recut import Recut, current_ranks
from leanvit.comcat_schedule import Schedule, penalised
from leanvit.comcat_search import RankSearch, search
from leanvit.comcat_supernet import Supernet, coverage
from leanvit.distill import aligned_blocks, alignment_weights

Measured = dict[str, float | bool]
FAITHFUL = MODES[1]
SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}
WIDE = {"img_size": 32, "patch_size": 16, "embed_dim": 384, "depth": 1, "num_heads": 6, "num_classes": 10}  # DeiT-S
PER_CLASS = 50
IMAGES = 1000 * PER_CLASS  # ImageNet-1k's validation set, which the authors search on


def shown() -> Measured:
    """All of them; the caller's random numbers are left alone."""
    rooms: list[Callable[[], Measured]] = [
        _factorisation, _supernet, _search_pass, _losses, _truncation, _released, _adapter, _synthetic,
    ]  # fmt: skip
    result: Measured = {}
    with torch.random.fork_rng(devices=[]):
        for room in rooms:
            torch.manual_seed(0)
            result |= room()
    return result


def _random(dtype: torch.dtype = torch.float32, settings: Mapping = SMALL, **more) -> VisionTransformer:
    """A small model in eval mode with noise on every tensor."""
    torch.manual_seed(0)
    model = VisionTransformer(**{**settings, **more}).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def cut(model: nn.Module, chosen: Mapping[str, int | None], bias: str = "absorb") -> nn.Module:
    """A copy at these ranks, none of them dropped for saving nothing."""
    model = copy.deepcopy(model)
    comcat.apply(model, comcat.make_plan(model, chosen, mode=FAITHFUL, bias=bias))
    return model


def _rel(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


def _batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 3, 16, 16, generator=generator), torch.arange(8) % 7) for _ in range(2)]


def _factorisation() -> Measured:
    model, x = _random(settings=WIDE), torch.randn(2, 50, 384)
    dense, heads = model.blocks[0].attn, read_heads(model.blocks[0].attn)
    y, full = dense(x), {"qk": 64, "vo": 64}
    double = _random(torch.float64)
    z = torch.randn(2, 17, 48, dtype=torch.float64)
    narrow = cut(model, {"qk": 32, "vo": 20}).blocks[0].attn
    scaled = copy.deepcopy(narrow)
    scaled.scale = narrow.key_dim**-0.5

    def shifted(rows: slice) -> float:
        other = copy.deepcopy(dense)
        with torch.no_grad():
            other.qkv.bias[rows] += torch.randn(384)
        return _rel(other(x), y)

    q, k, v, o = (w.double() for w in (heads.q, heads.k, heads.v, heads.o))
    _, values, _ = product_svd(q, k.mT)
    direct = torch.linalg.svdvals(q[:2] @ k[:2].mT)[:, :64]
    spectrum = Spectrum(heads.q, heads.k.mT)
    (left, right), balanced = spectrum.factors(32, balanced=False), spectrum.factors(32)
    scores = (x[:, None] @ heads.q + heads.bq[:, None]) @ (x[:, None] @ heads.k + heads.bk[:, None]).mT
    by_hand = scores.mul(64**-0.5).softmax(-1) @ (x[:, None] @ heads.v + heads.bv[:, None]) @ heads.o
    rope = {**SMALL, "use_rot_pos_emb": True}
    without_qk = {"qk_norm": _random(qk_norm=True), "rope": Eva(**rope)}
    refused = {name: comcat.parts(other) for name, other in without_qk.items()}
    return {
        "full_rank_error": _rel(cut(model, full).blocks[0].attn(x), y),
        "full_rank_error_fp64": _rel(cut(double, {"qk": 16, "vo": 16}).blocks[0].attn(z), double.blocks[0].attn(z)),
        "biases_dropped_fail": _rel(cut(model, full, "none").blocks[0].attn(x), y) > 0.01,
        "released_full_rank_off": _rel(cut(model, full, "none").blocks[0].attn(x), y),
        "key_bias_irrelevant": shifted(slice(384, 768)) < 1e-5,
        "query_bias_matters": shifted(slice(0, 384)) > 1e-4,
        "scale_of_original_heads": narrow.scale == 64**-0.5 and _rel(scaled(x), narrow(x)) > 1e-3,
        "product_rank": max(int(torch.linalg.matrix_rank(a[0] @ b[0])) for a, b in ((q, k.mT), (v, o))),
        "qr_singular_values": float(((values[:2] - direct).abs() / direct).max()),
        "sigma_on_the_right": bool(((left.mT @ left - torch.eye(32)).abs() < 1e-5).all())
        and torch.allclose(right.norm(dim=-1), spectrum.s[:, :32], rtol=1e-4),
        "balanced_split_same_function": _rel(balanced[0] @ balanced[1], left @ right) < 1e-5,
        "order_of_fused_rows": _rel(by_hand.sum(1) + heads.bo, y) < 1e-5,
        **{f"{n}_keeps_qk": "blocks.0.attn.qk" in s and any(p.name == "blocks.0.attn.vo" for p in f)
           for n, (f, s) in refused.items()},
    }  # fmt: skip


def _mixed(model: nn.Module, name: str, spectra: Mapping, choices: Mapping, p: Mapping) -> nn.Module:
    """The authors' mixture in place of an attention or a layer."""
    module = model.get_submodule(name)
    if name in p:
        mixed = MixedLinear(truncations(spectra[name], choices[name]), module.bias)
        mixed.p = p[name]
        return mixed
    qk, vo = (truncations(spectra[f"{name}.{k}"], choices[f"{name}.{k}"]) for k in ("qk", "vo"))
    h = read_heads(module)
    mixed = MixedAttention(qk, vo, module.scale, h.bo + torch.einsum("hk,hko->o", h.bv, h.o))
    mixed.p_qk, mixed.p_vo = p[f"{name}.qk"], p[f"{name}.vo"]
    return mixed


def _net(model: nn.Module) -> tuple[Supernet, dict, dict, dict]:
    """The masked super-network of a dense model, its spectra, candidates and drawn weights with their logits."""
    found = comcat.parts(model)[0]
    spectra = {p.name: Spectrum(*product(model, p)) for p in found}
    choices = {p.name: ranks.candidates(p, FAITHFUL) for p in found}
    dtype = next(model.parameters()).dtype
    alphas = {n: torch.randn(len(c), dtype=dtype).requires_grad_() for n, c in choices.items()}
    p = {n: a.softmax(0) for n, a in alphas.items()}
    plan = comcat.make_plan(model, {q.name: q.full for q in found}, mode=FAITHFUL, bias="absorb")
    net = Supernet(model, found, spectra, plan, None)
    net.masks = {q.name: coverage(choices[q.name], q.full).to(dtype) @ p[q.name] for q in found}
    return net, spectra, choices, {"alpha": alphas, "p": p}


def _supernet() -> Measured:
    model, x = VisionTransformer(**WIDE).eval().requires_grad_(False), torch.randn(2, 50, 384)
    net, spectra, choices, drawn = _net(model)
    gaps = [
        float((net.modules[name](x) - _mixed(model, name, spectra, choices, drawn["p"])(x)).detach().abs().max())
        for name in ("blocks.0.attn", "blocks.0.mlp.fc1")
    ]
    mask = net.masks["blocks.0.attn.qk"].detach()
    double, z = _random(torch.float64).requires_grad_(False), torch.randn(5, 48, dtype=torch.float64)
    net, spectra, choices, drawn = _net(double)
    name = "blocks.0.mlp.fc1"
    forms = net.modules[name], _mixed(double, name, spectra, choices, drawn["p"])
    ours, theirs = (torch.autograd.grad(m(z).square().sum(), drawn["alpha"][name], retain_graph=True)[0] for m in forms)
    return {
        "mask_equals_mixture": max(gaps),
        "mask_gradient": _rel(ours, theirs),
        "mask_monotone": math.isclose(mask[0], 1, rel_tol=1e-6)
        and bool((mask.diff() <= 0).all() and mask.min() >= 0 and mask.max() <= 1 + 1e-6),
    }


def _search_pass() -> Measured:
    """One search of a small model in faithful mode: what moves, what is chosen, what it starts from."""
    model = _random()
    state = RankSearch(model, ranks.authors_budget(model, 0.5), mode=FAITHFUL)
    starts = all(torch.equal(a, torch.full_like(a, 1 / len(a))) for a in state.alphas)
    before, alphas = copy.deepcopy(model.state_dict()), [a.detach().clone() for a in state.alphas]
    state.search(1, _batches())
    still = all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    moved = all(not torch.equal(a, b) for a, b in zip(alphas, state.alphas, strict=True))
    with torch.no_grad():
        for alpha in state.alphas:
            alpha[-1] += 1  # the largest candidates of all parts together are above the budget
    chosen = state.choice(state.recut.spectra())
    likeliest = {
        p.name: state.candidates[p.name][int(a.argmax())] for p, a in zip(state.parts, state.alphas, strict=True)
    }
    optimizer = state.optimizer.param_groups[0]
    unbiased = all(b.attn.qkv.bias is None and b.attn.proj.bias is None for b in model.blocks)
    fresh = [m.bias for b in cut(_random(), {"qk": 8, "vo": 8}, "zero").blocks for m in (b.attn.qkv, b.attn.proj)]
    return {
        "alpha_alone_moves": still and moved,
        "alpha_start": starts,
        "argmax_read_off": chosen == likeliest,
        "released_unprojected": ranks.total_weights(state.parts, chosen) > state.budget,
        "released_no_bias_at_all": unbiased,
        "recipe_search_no_bias": unbiased,
        "recipe_finetune_zero_bias": bool(fresh) and not any(b.any() for b in fresh),
        "alpha_lr": optimizer["lr"],
        "alpha_weight_decay": optimizer["weight_decay"],
        "search_epochs": state.epochs,
        "beta": state.beta,
    }


def _losses() -> Measured:
    one, model, teacher = torch.tensor(1.0), _random(), _random(num_heads=4)
    (images, labels), loss = _batches()[0], comcat.authors_loss(teacher)
    aligned = loss.blocks == aligned_blocks(2) and loss.alignment > 0
    with torch.no_grad():
        told, logits = teacher(images).argmax(1), model(images)
        a, *_ = loss.alpha, loss.blocks.clear()  # the classes alone
        wanted = (1 - a) * F.cross_entropy(logits, labels) + a * F.cross_entropy(logits, told)
        hard = math.isclose(loss(model, images, labels), wanted, rel_tol=1e-5)
    weights = alignment_weights(30)
    above = [float(penalised(one, torch.tensor(s), 1, always=True)) for s in (0.5, 2.0)]
    below = [float(penalised(one, torch.tensor(s), 1)) for s in (0.5, 1.0, 2.0)]
    return {
        "penalty_form": all(math.isclose(v, s**1.5, rel_tol=1e-6) for v, s in zip(above, (0.5, 2.0), strict=True)),
        "penalty_above_only": below[:2] == [1.0, 1.0] and below[2] > 1,
        "penalty_at_twice": below[2],
        "distillation_a": a,
        "distillation_hard": hard,
        "recipe_search_aligned": aligned,
        "aligned_blocks": len({0, 1, 10, 11} & {*aligned_blocks(12)}),
        **{f"lambda_{t}": weights[t] for t in (*range(6), 19, 20)},
    }


def _truncation() -> Measured:
    model = _random(torch.float64)
    recut = Recut(model, FAITHFUL)
    low = {p.name: 5 for p in recut.parts}
    recut.cut(low)
    part = recut.parts[0]
    a, b = product(model, part, False)
    left, right = Spectrum(a, b).factors(16)
    back = _rel(left @ right, a @ b)
    recut.cut(low | {part.name: 12})
    a, b = product(model, part, False)
    grown = int(torch.linalg.matrix_rank(a @ b, rtol=1e-10).max())
    renewed = _renewals(Schedule(adaptive=False, faithful=True))
    return {
        "one_way_error": back,
        "one_way_rank": current_ranks(model, recut.parts)[part.name] == 12 and grown == 5,
        "fresh_optimizer": all(renewed),
        "optimizer_survives": _renewals(Schedule(faithful=True))
        == [True, True, True, False, True, False, False, False],
    }


def _renewals(schedule: Schedule) -> list[bool]:
    """Of eight epochs of a faithful run whose ranks stay: which ones need a new optimiser."""
    model, renewed = _random(depth=1), []
    search(model, _batches(), ranks.authors_budget(model, 0.5), epochs=8, mode=FAITHFUL, schedule=schedule, lr=0.0,
           train=lambda network, epoch, new: renewed.append(new))  # fmt: skip
    return renewed


def _kept(size: int) -> float:
    """Part of an image's side that is seen when it is resized to `size` and 224 pixels are cut out of the centre."""
    ramp = torch.arange(0.5, 448, dtype=torch.float64).div(448).expand(1, 448, 448)
    seen = center_crop(resize(ramp, [size, size], antialias=True), [224, 224])[0, 0]
    return float(seen[162] - seen[62]) * 2.24  # off the borders, a hundred pixels of 224


def _released() -> Measured:
    classes = [len(batch.unique()) for batch in torch.arange(IMAGES).div(PER_CLASS, rounding_mode="floor").split(64)]
    alpha = torch.zeros((), dtype=torch.float16, requires_grad=True)
    (alpha * 1e-8).backward()  # the gradient itself is fp16
    rate = train.Recipe(batch_size=4 * 256, lr=1e-4 * 4 * 256 / 512, steps=1)
    return {
        "released_fewest_classes": min(classes),
        "released_most_classes": max(classes),
        "released_crop": _kept(224),
        "released_crop_deit": _kept(256),
        "released_fp16_underflow": float(alpha.grad) == 0,
        "released_lr_not_scaled": train.learning_rate(rate, 0, 1) / 1e-4,
    }


def unet_attention(width: int, context: int | None = None, heads: int = 8, bias: bool = False) -> nn.Module:
    """An attention as Stable Diffusion's U-Net has them."""
    maps = [nn.Linear(n, width, bias=bias) for n in (width, context or width, context or width)]
    return comcat_diffusion.WideAttention(*maps, nn.Linear(width, width), heads, (width // heads) ** -0.5)


def _adapter() -> Measured:
    model = nn.ModuleList([unet_attention(32, 24, 4, bias=True)]).double()
    x, context = torch.randn(2, 9, 32, dtype=torch.float64), torch.randn(2, 5, 24, dtype=torch.float64)
    dense = model[0](x, context)
    bare = copy.deepcopy(model[0])
    with torch.no_grad():
        for layer in (bare.to_q, bare.to_k, bare.to_v):
            layer.bias.zero_()
    products = {}
    for s in (0.0, 1.0, 2.0):
        adapted = copy.deepcopy(model)
        comcat_diffusion.attach(adapted, s=s, mode=FAITHFUL, seed=0)
        y = adapted[0](x, context)
        comcat_diffusion.merge(adapted)
        q, k = (m.weight.unflatten(0, (4, -1)) for m in (adapted[0].to_q, adapted[0].to_k))
        products[s] = y, adapted[0](x, context), q.mT @ k
    (same, _, frozen), (y, merged, once), (_, _, twice) = products.values()
    return {
        "sd_perturbed_start": _rel(y, dense) > 1e-3,
        "sd_scale_squared": _rel(twice - frozen, 4 * (once - frozen)) < 1e-9,
        "sd_zero_scale": torch.equal(same, dense),
        "sd_merge_error": _rel(merged, y),
        "sd_no_merge_at_old_width": int(torch.linalg.matrix_rank(once).min()) == 8 + 2,
        "released_sd_zeroes_biases": _rel(bare(x, context), dense) > 1e-3,
    }


def _synthetic() -> Measured:
    """Errors of one attention on anisotropic tokens with a mean for each image, DeiT-S shapes (specification 6.2)."""
    d, h, n, k = 384, 6, 197, 64
    generator = torch.Generator().manual_seed(0)
    scale = torch.exp(-torch.linspace(0, 3, d))
    x = (torch.randn(4, n, d, generator=generator) + torch.randn(4, 1, d, generator=generator)) * scale
    x = x / x.square().mean().sqrt()
    q, key, v = (torch.randn(h, d, k, generator=generator) * d**-0.5 for _ in range(3))
    o = torch.randn(h, k, d, generator=generator) * d**-0.5

    def softmax_map(left: Tensor, right: Tensor) -> Tensor:
        return (x[:, None] @ left @ (x[:, None] @ right.mT).mT * 2 * k**-0.5).softmax(-1)

    exact = softmax_map(q, key.mT)
    tokens, centred, mixed = Moments(), Moments(), Moments()
    tokens.add(x.flatten(0, 1))
    centred.add((x - x.mean(1, keepdim=True)).flatten(0, 1))
    mixed.add((exact @ x[:, None]).transpose(0, 1).flatten(1, 2))
    ridge = 1e-4
    left = roots(tokens.covariance(False), ridge)
    forms = [Spectrum(q, key.mT, left, roots(m.covariance(False), ridge)) for m in (centred, tokens)]
    forms.append(Spectrum(q, key.mT))  # centred keys, keys as they are, plain
    output, white_output = Spectrum(v, o), Spectrum(v, o, roots(mixed.covariance(False), ridge))
    apart = [Spectrum(w, None) for w in (q, key)]
    result: Measured = {}
    for r in (48, 32, 16):
        lower = [a @ b for a, b in (s.factors(int(r * d / (d + k))) for s in apart)]
        maps = [*(softmax_map(*form.factors(r)) for form in forms), softmax_map(lower[0], lower[1].mT)]
        error = [_rel(m, exact) for m in maps]
        result[f"synthetic_order_{r}"] = error == sorted(error)
        y = exact @ x[:, None]
        errors = [_rel((y @ a @ b).sum(1), (y @ v @ o).sum(1)) for a, b in (output.factors(r), white_output.factors(r))]
        result[f"synthetic_vo_order_{r}"] = errors[1] < errors[0]
    return result
